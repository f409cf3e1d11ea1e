"""What `infer` and `sample` share around the renderer: a plan made from headers, and what is loaded for it.

A stage's story: plan (everything wrong is found here), encode the prompts, load the DiT and render, let it go,
load the VAE and decode.

A picture rendered again: whether the files of the command are those that it was made with.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hyimg.cache.hashing import Memo, fingerprint
from hyimg.cache.prompt_embeddings import PromptEmbedding
from hyimg.checkpoints.architecture import DIT_2_1, DIT_2_1_DISTILLED, NATIVE_SIZES, DiTArch
from hyimg.checkpoints.header_check import open_dit
from hyimg.config.image_file import FINGERPRINTS, lora_records, read_settings
from hyimg.config.models import Compute, Memory, PromptEncoders, VAEFile
from hyimg.config.rendering import LoRAFiles, Sampling
from hyimg.encoders.glyph import glyph_prompt
from hyimg.encoders.text import TextEncoders, encode_prompts
from hyimg.errors import FullMemory, HyimgError
from hyimg.lora.merging import refuse_merging_into_fp8
from hyimg.memory.budget import least_decoding_bytes, require_room_for_images
from hyimg.memory.device import empty_cache, host_memory, resolve_device, total_memory
from hyimg.memory.dit_loader import DiTSetup
from hyimg.memory.out_of_memory import Changes, rendering_changes, text_encoder_changes
from hyimg.memory.precision import Precision, decide_precision
from hyimg.memory.swap import max_blocks_to_swap
from hyimg.model.loading import check_vae, load_vae
from hyimg.model.vae import VAE
from hyimg.plugins import Plugins, load_plugins
from hyimg.rendering.loras import LoRAUse, merging, plan_loras
from hyimg.rendering.prompts import PromptSpec, RenderDefaults, RenderSpec
from hyimg.rendering.renderer import (
    Renderer,
    decide,
    describe_preset,
    render_defaults,
    resolve_samplers,
    settings_of,
)
from hyimg.report import Reporter

# By option, the fields of a prompt that it stands in for
_FIELDS = {
    "negative_prompt": ("negative_prompt",),
    "image_size": ("width", "height"),
    "infer_steps": ("steps",),
    "guidance_scale": ("guidance_scale",),
    "flow_shift": ("flow_shift",),
    "seed": ("seed",),
    "sampler": ("sampler",),
}


@dataclass(frozen=True)
class RenderPlan:
    """What to render, decided and checked; `loras` in the order of the command line.

    `facts` are the settings that all images have in common, as their files tell them.
    """

    dit: DiTSetup
    vae: VAEFile
    specs: list[RenderSpec]
    loras: list[LoRAUse]
    defaults: RenderDefaults
    plugins: Plugins
    sampling: Sampling
    precision: Precision
    lora_mode: str
    facts: Mapping[str, object]

    @property
    def arch(self) -> DiTArch:
        return self.dit.opened.arch

    def decide(self, prompts: Sequence[PromptSpec], report: Reporter) -> list[RenderSpec]:
        """Completes prompts as the plan's own are; warns of sizes that the model was not made for.

        Raises HyimgError for a sampler that is unknown or cannot render with the model, and for a size that this
        machine has no memory for.
        """
        specs = decide(prompts, self.defaults, self.plugins)
        self.samplers(specs)
        require_room(specs, self.dit, self.vae, self.precision)
        warn_of_sizes(specs, self.arch, report)
        return specs

    def samplers(self, specs: Sequence[RenderSpec]) -> dict[str, Callable[..., Tensor]]:
        """The samplers that images name."""
        names = [spec.sampler for spec in specs]
        return resolve_samplers(self.plugins, names, self.sampling.sampler_args, self.arch)

    def load_renderer(
        self, states: Mapping[str, PromptEmbedding], report: Reporter, *, loras: Sequence[LoRAUse] = ()
    ) -> Renderer:
        """The renderer with the DiT read to where the memory options want it.

        `loras` are merged into the weights while they are read, or applied live, depending on `--lora_mode`.
        """
        merged = loras if self.lora_mode == "merge" else ()
        report.note(self.dit.describe())
        dit = self.dit.load(report, around=lambda placement: merging(placement, merged, self.arch, report))
        for lora in loras if not merged else ():
            lora.attach(dit, report)
        return Renderer(
            dit,
            self.sampling,
            self.samplers(self.specs),
            states,
            lambda prompt: glyph_prompt(prompt) is not None,
            self.joins,
        )

    def joins(self, spec: RenderSpec) -> bool:
        """Whether an image's model calls with and without the prompt are one.

        Decided from the card and the sizes, not from what is free at the moment, so that an image repeats.
        """
        if self.arch.guidance_embed or spec.guidance_scale == 1:
            return False
        if self.sampling.batch_cond_uncond != "auto":
            return self.sampling.batch_cond_uncond == "on"
        return self.dit.has_room_for_two(spec.width, spec.height)

    def option_facts(self, prompts: Sequence[PromptSpec]) -> dict[str, bool | list[str]]:
        """What decides which options have an effect on the pictures of these prompts (`hyimg.config.option`).

        Where prompts are still to be asked for, only what the model says.
        """
        facts: dict[str, bool | list[str]] = {"not_distilled": not self.arch.guidance_embed}
        if not prompts:
            return facts
        quoted = [glyph_prompt(spec.prompt) is not None for spec in self.specs]
        starts = [
            self.sampling.apg_start_step_ocr if has_text else self.sampling.apg_start_step_general
            for has_text in quoted
        ]
        return {
            **facts,
            "is_guided": any(spec.guidance_scale != 1 for spec in self.specs),
            "apg_starts": any(start + 1 < spec.steps for start, spec in zip(starts, self.specs, strict=True)),
            "has_quoted_prompts": any(quoted),
            "has_plain_prompts": not all(quoted),
            "left_to_flags": [
                option
                for option, fields in _FIELDS.items()
                if any(getattr(prompt, field) is None for prompt in prompts for field in fields)
            ],
        }

    def changes_for_memory(self, place: FullMemory) -> list[str]:
        """What to change where memory runs out while the DiT is loaded or renders."""
        return rendering_changes(
            self.dit.memory,
            place,
            most_blocks=max_blocks_to_swap(self.arch),
            is_fp8_file=self.dit.is_fp8_file,
            on_cpu=self.dit.device.type == "cpu",
            joined=any(self.joins(spec) for spec in self.specs),
        )

    def settings(self, spec: RenderSpec, loras: Sequence[LoRAUse]) -> dict[str, object]:
        """Everything that an image of `spec` is made with, where `loras` act."""
        records = [lora.record for lora in loras]
        settings = settings_of(
            spec, self.sampling, self.precision.mixed_precision, self.dit.opened.path, records
        )
        return {**settings, "batch_cond_uncond": "on" if self.joins(spec) else "off", **self.facts}


def plan_renders(
    prompts: Sequence[PromptSpec],
    *,
    dit: Path,
    encoders: PromptEncoders,
    vae: VAEFile,
    sampling: Sampling,
    memory: Memory,
    compute: Compute,
    lora: LoRAFiles,
    plugins: Sequence[str],
    report: Reporter,
    negative_prompt: str | None = None,
) -> RenderPlan:
    """Completes the prompts and checks all that needs no weight; warns of sizes that the model was not made for.

    Raises HyimgError for the first thing that is wrong.
    """
    opened = open_dit(dit, mmap=not compute.disable_mmap_load_safetensors)
    arch = opened.arch
    defaults = render_defaults(sampling, arch)
    if negative_prompt is not None:
        defaults = replace(defaults, negative_prompt=negative_prompt)
    device = resolve_device(compute.device, report)
    precision = precision_of(compute, encoders, device)
    plan = RenderPlan(
        dit=DiTSetup(opened, memory, device, precision.dit),
        vae=vae,
        specs=[],
        loras=[],
        defaults=defaults,
        plugins=load_plugins(plugins),
        sampling=sampling,
        precision=precision,
        lora_mode=lora.lora_mode,
        facts={},
    )
    specs = plan.decide(prompts, report)
    if line := describe_preset(sampling, specs):
        report.note(line)
    loras = plan_loras(lora, arch, report)
    plan.dit.check()
    if loras and lora.lora_mode == "merge":
        refuse_merging_into_fp8(
            opened, "`--lora_mode merge`", "omit it: on fp8 weights a LoRA is applied live"
        )
        if memory.fp8_scaled:
            report.warning(
                "`--lora_mode merge` with `--fp8_scaled` rounds most of a LoRA away "
                "(`hyimg check LORA --dit FILE --fp8` tells how much)"
            )
    files = {"dit": dit, "vae": vae.vae, "text_encoder": encoders.text_encoder, "byt5": encoders.byt5}
    facts = {
        "lora_mode": lora.lora_mode,
        "attn_mode": memory.attn_mode,
        "fp8_scaled": memory.fp8_scaled,
        "torch_compile": memory.torch_compile,
        "fp8_vl": encoders.fp8_vl,
        "text_encoder_dtype": precision.text_entries[0],
        "vae_chunk_size": vae.vae_chunk_size,
        "vae_tile_size": vae.vae_tile_size,
        FINGERPRINTS: {name: fingerprint(path) for name, path in files.items() if path is not None},
    }
    return replace(plan, specs=specs, loras=loras, facts=facts)


def require_room(specs: Sequence[RenderSpec], dit: DiTSetup, vae: VAEFile, precision: Precision) -> None:
    """Raises HyimgError for a picture that cannot be rendered or decoded in the memory that there is."""
    if not specs:
        return
    device = precision.device
    needs: dict[str, Callable[[int, int], int]] = {"rendering": dit.least_bytes}
    hints = {}
    if vae.vae is not None:
        in_tiles = vae.vae_tile_size is not None
        needs["decoding"] = partial(
            least_decoding_bytes,
            check_vae(vae.vae),
            bytes_per_value=precision.vae.itemsize,
            in_tiles=in_tiles,
        )
        hints = {} if in_tiles else {"decoding": "give `--vae_tile_size 512`"}
    memory = total_memory(device)
    require_room_for_images(
        [(spec.width, spec.height) for spec in specs],
        needs,
        device_name="this machine" if memory is None else str(device),
        memory=host_memory() if memory is None else memory,
        hints=hints,
    )


def warn_of_sizes(specs: Sequence[RenderSpec], arch: DiTArch, report: Reporter) -> None:
    """Warns, once for each, of sizes that HunyuanImage-2.1 was not made for; other models have sizes of their own."""
    if arch not in (DIT_2_1, DIT_2_1_DISTILLED):
        return
    for width, height in dict.fromkeys((spec.width, spec.height) for spec in specs):
        if (width, height) not in NATIVE_SIZES:
            report.warning(
                f"{width}x{height} (width x height) is not one of the sizes that the model was made for: "
                + ", ".join(f"{w}x{h}" for w, h in NATIVE_SIZES)
            )


def precision_of(compute: Compute, encoders: PromptEncoders, device: torch.device) -> Precision:
    """What the models compute in that render on `device`."""
    return decide_precision(
        compute,
        device,
        text_encoder_dtype=encoders.text_encoder_dtype,
        text_encoder_device=torch.device("cpu") if encoders.text_encoder_cpu else device,
    )


def open_encoders(
    files: PromptEncoders, compute: Compute, precision: Precision, memo: Memo | None = None
) -> TextEncoders:
    """Both text encoders, headers checked and no weight read; raises HyimgError where one is not named.

    They take one prompt at a time: kernels round by a batch's shape, and an
    image must not depend on the other prompts of its batch.
    """
    if files.text_encoder is None or files.byt5 is None:
        missing = "text_encoder" if files.text_encoder is None else "byt5"
        raise HyimgError(
            f"`--{missing}` is required", hint="both text encoders are needed to render a prompt"
        )
    return TextEncoders.open(
        files.text_encoder,
        files.byt5,
        files.tokenizer,
        device=precision.text_encoder_device,
        dtype=precision.text_encoder,
        fp8=files.fp8_vl,
        byt5_dtype=precision.byt5,
        batch_size=1,
        mmap=not compute.disable_mmap_load_safetensors,
        memo=memo,
    )


def encoder_changes(files: PromptEncoders) -> Changes:
    """What to change where memory runs out while `encode_states` encodes."""
    return partial(text_encoder_changes, files)


def encode_states(
    encoders: TextEncoders, prompts: Sequence[str], report: Reporter
) -> dict[str, PromptEmbedding]:
    """prompt -> its embedding, on the CPU."""
    return dict(encode_prompts(encoders, prompts, report))


def load_decoder(options: VAEFile, compute: Compute, precision: Precision) -> VAE:
    """The VAE, where and in the type that decoding is done in."""
    assert options.vae is not None
    return load_vae(
        options.vae,
        device=precision.device,
        dtype=precision.vae,
        mmap=not compute.disable_mmap_load_safetensors,
        chunk_rows=options.vae_chunk_size,
        tile_size=options.vae_tile_size,
    )


def free_memory(device: torch.device) -> None:
    """Gives back the memory of a model that nothing refers to any more, before the next one is loaded."""
    gc.collect()
    empty_cache(device)


def check_repetition(path: Path, plan: RenderPlan, report: Reporter) -> None:
    """Warns where a plan with the settings of the picture `path` has other files than the picture had.

    Raises HyimgError for a LoRA file that was found by its name and has another content: what the command names
    itself is its own affair.
    """
    settings = read_settings(path)
    assert settings is not None, "the config was made of them"
    before, now = settings[FINGERPRINTS], plan.facts[FINGERPRINTS]
    assert isinstance(now, dict)
    others = [f"`--{name}`" for name in now if before.get(name) != now[name]]
    records = lora_records(settings, path)
    for lora, record in zip(plan.loras, records, strict=False):
        name = Path(str(record["file"])).name
        if lora.sha256 != record.get("sha256") and lora.path in (path.parent / name, Path(name)):
            raise HyimgError(
                f"`{lora.path}` is not the LoRA that `{path}` was made with: its content is another",
                hint="name the right file with `--lora_weight`",
            )
    if [lora.sha256 for lora in plan.loras] != [record.get("sha256") for record in records]:
        others.append("`--lora_weight`")
    if others:
        report.warning(
            f"`{path}` was made with other files for {', '.join(others)}: this will not be the same picture"
        )
