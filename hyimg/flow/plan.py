"""What `infer` and `sample` share around the renderer: a plan made from headers, and what is loaded for it.

A stage's story: plan (everything wrong is found here), encode the prompts, load the DiT and render, let it go,
load the VAE and decode.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hyimg.cache.identity import Memo, file_identity
from hyimg.config.models import Compute, Memory, TextEncoderFiles, VAEFile
from hyimg.config.rendering import Sampling
from hyimg.encoders.glyph import glyph_prompt
from hyimg.encoders.progress import encode_prompts
from hyimg.encoders.text import TextEncoders
from hyimg.errors import HyimgError
from hyimg.flow.prompts import PromptSpec, RenderSpec
from hyimg.flow.renderer import (
    PromptStates,
    Renderer,
    check_loras,
    decide,
    lora_multipliers,
    render_defaults,
    resolve_samplers,
    settings_of,
)
from hyimg.memory.device import compute_dtype, resolve_device, vae_dtype
from hyimg.memory.dit import DiTOptions
from hyimg.memory.out_of_memory import Place, rendering_changes
from hyimg.memory.swap_plan import max_blocks_to_swap
from hyimg.model.architecture import NATIVE_SIZES
from hyimg.model.header_check import read_dit
from hyimg.model.loading import check_dit, load_vae
from hyimg.model.safetensors_file import Checkpoint
from hyimg.model.vae import VAE
from hyimg.plugins import load_plugins
from hyimg.report import Reporter


@dataclass(frozen=True)
class LoRAUse:
    """A LoRA file with the multiplier that it acts by, and the hash of its content."""

    path: Path
    multiplier: float
    sha256: str

    @property
    def record(self) -> dict[str, object]:
        """As an image's settings tell it."""
        return {"file": self.path.name, "sha256": self.sha256, "multiplier": self.multiplier}


@dataclass(frozen=True)
class RenderPlan:
    """What to render, decided and checked; `loras` in the order of the command line."""

    dit: Path
    specs: list[RenderSpec]
    loras: list[LoRAUse]
    samplers: Mapping[str, Callable[..., Tensor]]
    sampling: Sampling
    memory: Memory
    compute: Compute
    device: torch.device

    def load_renderer(self, states: Mapping[str, PromptStates], report: Reporter) -> Renderer:
        """The renderer with the DiT read to where the memory options want it; no LoRA is attached."""
        options, dtype = DiTOptions.of(self.memory), compute_dtype(self.compute.mixed_precision)
        report.note(options.describe(self.dit, self.device, dtype))
        mmap = not self.compute.disable_mmap_load_safetensors
        dit = options.load(self.dit, self.device, dtype, report, mmap=mmap)
        return Renderer(
            dit, self.sampling, self.samplers, states, lambda prompt: glyph_prompt(prompt) is not None
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
        )

    def settings(self, spec: RenderSpec, loras: Sequence[LoRAUse]) -> dict[str, object]:
        """Everything that an image of `spec` is made with, where `loras` act."""
        records = [lora.record for lora in loras]
        return settings_of(spec, self.sampling, self.compute.mixed_precision, self.dit, records)


def plan_renders(
    prompts: Sequence[PromptSpec],
    *,
    dit: Path,
    sampling: Sampling,
    memory: Memory,
    compute: Compute,
    lora_weight: Sequence[Path],
    lora_multiplier: Sequence[float],
    plugins: Sequence[str],
    report: Reporter,
    negative_prompt: str | None = None,
) -> RenderPlan:
    """Completes the prompts and checks all that needs no weight; warns of sizes that the model was not made for.

    Raises HyimgError for the first thing that is wrong.
    """
    arch = check_dit(dit)
    loaded = load_plugins(plugins)
    defaults = render_defaults(sampling, arch)
    if negative_prompt is not None:
        defaults = replace(defaults, negative_prompt=negative_prompt)
    specs = decide(prompts, defaults, loaded)
    samplers = resolve_samplers(loaded, [spec.sampler for spec in specs], sampling.sampler_args, arch)
    multipliers = lora_multipliers(lora_weight, lora_multiplier)
    check_loras(lora_weight, arch)
    device = resolve_device(compute.device)
    DiTOptions.of(memory).check(dit, device, compute_dtype(compute.mixed_precision))
    warn_of_sizes(specs, report)
    hashes = {path: file_identity(path) for path in dict.fromkeys(lora_weight)}
    loras = [LoRAUse(path, m, hashes[path]) for path, m in zip(lora_weight, multipliers, strict=True)]
    return RenderPlan(dit, specs, loras, samplers, sampling, memory, compute, device)


def warn_of_sizes(specs: Sequence[RenderSpec], report: Reporter) -> None:
    """Warns, once for each, of sizes that the model was not made for."""
    for width, height in dict.fromkeys((spec.width, spec.height) for spec in specs):
        if (width, height) not in NATIVE_SIZES:
            report.warning(
                f"{width}x{height} (width x height) is not one of the sizes that the model was made for: "
                + ", ".join(f"{w}x{h}" for w, h in NATIVE_SIZES)
            )


def open_encoders(files: TextEncoderFiles, compute: Compute, memo: Memo | None = None) -> TextEncoders:
    """Both text encoders, headers checked and no weight read; raises HyimgError where one is not named."""
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
        batch_size=files.text_encoder_batch_size,
        mmap=not compute.disable_mmap_load_safetensors,
        memo=memo,
    )


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
