"""What `infer` and `sample` share around the renderer: a plan made from headers, and what is loaded for it.

A stage's story: plan (everything wrong is found here), encode the prompts, load the DiT and render, let it go,
load the VAE and decode.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hyimg.cache.identity import Memo, fingerprint
from hyimg.config.models import Compute, Memory, TextEncoderFiles, VAEFile
from hyimg.config.picture import FINGERPRINTS
from hyimg.config.rendering import LoRAFiles, Sampling
from hyimg.encoders.glyph import glyph_prompt
from hyimg.encoders.progress import encode_prompts
from hyimg.encoders.text import TextEncoders
from hyimg.errors import HyimgError
from hyimg.flow.loras import LoRAUse, merging, plan_loras
from hyimg.flow.prompts import PromptSpec, RenderDefaults, RenderSpec
from hyimg.flow.renderer import (
    PromptStates,
    Renderer,
    decide,
    render_defaults,
    resolve_samplers,
    settings_of,
)
from hyimg.lora.merged_file import refuse_merging_into_fp8
from hyimg.memory.device import compute_dtype, resolve_device, vae_dtype
from hyimg.memory.dit import DiTOptions
from hyimg.memory.out_of_memory import Changes, Place, rendering_changes, text_encoder_changes
from hyimg.memory.swap_plan import max_blocks_to_swap
from hyimg.model.architecture import DIT_2_1, DIT_2_1_DISTILLED, NATIVE_SIZES, DiTArch
from hyimg.model.header_check import read_dit
from hyimg.model.loading import check_dit, load_vae
from hyimg.model.safetensors_file import Checkpoint
from hyimg.model.vae import VAE
from hyimg.plugins import Plugins, load_plugins
from hyimg.report import Reporter


@dataclass(frozen=True)
class RenderPlan:
    """What to render, decided and checked; `loras` in the order of the command line.

    `facts` are the settings that all images have in common, as their files tell them.
    """

    dit: Path
    arch: DiTArch
    specs: list[RenderSpec]
    loras: list[LoRAUse]
    defaults: RenderDefaults
    plugins: Plugins
    sampling: Sampling
    memory: Memory
    compute: Compute
    device: torch.device
    lora_mode: str
    facts: Mapping[str, object]

    def decide(self, prompts: Sequence[PromptSpec], report: Reporter) -> list[RenderSpec]:
        """Completes prompts as the plan's own are; warns of sizes that the model was not made for.

        Raises HyimgError for a sampler that is unknown or cannot render with the model.
        """
        specs = decide(prompts, self.defaults, self.plugins)
        self.samplers(specs)
        warn_of_sizes(specs, self.arch, report)
        return specs

    def samplers(self, specs: Sequence[RenderSpec]) -> dict[str, Callable[..., Tensor]]:
        """The samplers that images name."""
        names = [spec.sampler for spec in specs]
        return resolve_samplers(self.plugins, names, self.sampling.sampler_args, self.arch)

    def load_renderer(
        self, states: Mapping[str, PromptStates], report: Reporter, *, loras: Sequence[LoRAUse] = ()
    ) -> Renderer:
        """The renderer with the DiT read to where the memory options want it.

        `loras` are merged into the weights while these are read, or act beside them, as `--lora_mode` has it.
        """
        merged = loras if self.lora_mode == "merge" else ()
        options, dtype = DiTOptions.of(self.memory), compute_dtype(self.compute.mixed_precision)
        report.note(options.describe(self.dit, self.device, dtype))
        dit = options.load(
            self.dit,
            self.device,
            dtype,
            report,
            mmap=not self.compute.disable_mmap_load_safetensors,
            around=lambda placement: merging(placement, merged, self.arch, report),
        )
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
        return DiTOptions.of(self.memory).has_room_for_two(
            self.dit, self.device, compute_dtype(self.compute.mixed_precision), spec.width, spec.height
        )

    def changes_for_memory(self, place: Place) -> list[str]:
        """What to change where memory runs out while the DiT is loaded or renders."""
        contents = read_dit(Checkpoint.open(self.dit))
        return rendering_changes(
            self.memory,
            place,
            most_blocks=max_blocks_to_swap(contents.arch),
            is_fp8_file=contents.quantization is not None,
            on_cpu=self.device.type == "cpu",
            joined=any(self.joins(spec) for spec in self.specs),
        )

    def settings(self, spec: RenderSpec, loras: Sequence[LoRAUse]) -> dict[str, object]:
        """Everything that an image of `spec` is made with, where `loras` act."""
        records = [lora.record for lora in loras]
        settings = settings_of(spec, self.sampling, self.compute.mixed_precision, self.dit, records)
        return {**settings, "batch_cond_uncond": "on" if self.joins(spec) else "off", **self.facts}


def plan_renders(
    prompts: Sequence[PromptSpec],
    *,
    dit: Path,
    encoders: TextEncoderFiles,
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
    arch = check_dit(dit)
    defaults = render_defaults(sampling, arch)
    if negative_prompt is not None:
        defaults = replace(defaults, negative_prompt=negative_prompt)
    device = resolve_device(compute.device, report)
    plan = RenderPlan(
        dit=dit,
        arch=arch,
        specs=[],
        loras=[],
        defaults=defaults,
        plugins=load_plugins(plugins),
        sampling=sampling,
        memory=memory,
        compute=compute,
        device=device,
        lora_mode=lora.lora_mode,
        facts={},
    )
    specs = plan.decide(prompts, report)
    loras = plan_loras(lora, arch)
    DiTOptions.of(memory).check(dit, device, compute_dtype(compute.mixed_precision))
    if loras and lora.lora_mode == "merge":
        refuse_merging_into_fp8(dit, "`--lora_mode merge`", "leave it out: a LoRA acts beside fp8 weights")
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
        "vae_chunk_size": vae.vae_chunk_size,
        "vae_tile_size": vae.vae_tile_size,
        FINGERPRINTS: {name: fingerprint(path) for name, path in files.items() if path is not None},
    }
    return replace(plan, specs=specs, loras=loras, facts=facts)


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


def open_encoders(files: TextEncoderFiles, compute: Compute, memo: Memo | None = None) -> TextEncoders:
    """Both text encoders, headers checked and no weight read; raises HyimgError where one is not named.

    They take one prompt at a time, whatever `text_encoder_batch_size` is: kernels round by a batch's shape, and an
    image must not depend on the prompts beside its own.
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
        device=torch.device("cpu") if files.text_encoder_cpu else resolve_device(compute.device),
        fp8=files.fp8_vl,
        batch_size=1,
        mmap=not compute.disable_mmap_load_safetensors,
        memo=memo,
    )


def encoder_changes(files: TextEncoderFiles) -> Changes:
    """What to change where memory runs out while `encode_states` encodes."""
    return partial(text_encoder_changes, replace(files, text_encoder_batch_size=1))


def encode_states(
    encoders: TextEncoders, prompts: Sequence[str], report: Reporter
) -> dict[str, PromptStates]:
    """Each prompt's encoder states, on the CPU."""
    encoded = encode_prompts(encoders, prompts, report)
    return {prompt: (text.text_TD, text.byt5_SE) for prompt, text in encoded}


def load_decoder(options: VAEFile, compute: Compute) -> VAE:
    """The VAE on the device that `compute` names, in the type that decoding is done in."""
    assert options.vae is not None
    device = resolve_device(compute.device)
    return load_vae(
        options.vae,
        device=device,
        dtype=vae_dtype(compute.mixed_precision, device),
        mmap=not compute.disable_mmap_load_safetensors,
        chunk_rows=options.vae_chunk_size,
        tile_size=options.vae_tile_size,
    )


def free_memory(device: torch.device) -> None:
    """Gives back the memory of a model that nothing refers to any more, before the next one is loaded."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
