"""`hyimg infer`: prompts to pictures. Texts are encoded first, then one DiT renders all, then one VAE decodes.

The three models are never in memory together.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from hyimg.cache.atomic import atomic_write_bytes, require_writable_folder
from hyimg.cache.identity import file_identity
from hyimg.config.commands import InferConfig
from hyimg.encoders.glyph import glyph_prompt
from hyimg.encoders.progress import encode_prompts
from hyimg.encoders.text import TextEncoders
from hyimg.errors import HyimgError
from hyimg.flow.pictures import METADATA_KEY, decode_image, save_png
from hyimg.flow.prompts import PromptSpec, RenderSpec, load_prompts
from hyimg.flow.renderer import (
    PromptStates,
    Renderer,
    attach_lora,
    check_loras,
    lora_multipliers,
    prompts_to_encode,
    render_defaults,
    resolve_samplers,
    settings_of,
)
from hyimg.memory.device import compute_dtype, resolve_device, vae_dtype
from hyimg.model.architecture import NATIVE_SIZES
from hyimg.model.loading import check_dit, check_vae, load_dit, load_vae
from hyimg.model.safetensors_file import Checkpoint
from hyimg.plugins import load_plugins
from hyimg.report import Reporter

LATENT_KEY = "latent"


@dataclass(frozen=True)
class Rendered:
    """A latent (batch 1, scaled, float32, CPU) and what it was made with, as the PNG tells it."""

    latent_BCHW: Tensor
    settings: dict[str, Any]


def infer(config: InferConfig, report: Reporter) -> list[Path]:
    """Renders the prompts, or decodes the latents, and returns the files that were written.

    An existing file at `--save_path` is replaced. Raises HyimgError for wrong input before a weight is read.
    """
    assert config.vae.vae is not None
    check_vae(config.vae.vae)
    if config.output.split_attn:
        report.note("note: `--split_attn` changes nothing: one image at a time has no mask")
    if config.output.latent_path:
        _check_latents_only(config)
        rendered = [_read_latent(path) for path in config.output.latent_path]
        targets = _targets(config, len(rendered))
    else:
        plan = _plan(config, report)
        targets = _targets(config, len(plan.specs))
        rendered = _render(config, plan, report)
    return _write(config, rendered, targets, report)


# ---- what to render, checked


@dataclass(frozen=True)
class _Plan:
    specs: list[RenderSpec]
    multipliers: list[float]
    samplers: dict[str, Callable[..., Tensor]]
    encoders: TextEncoders
    device: torch.device


def _plan(config: InferConfig, report: Reporter) -> _Plan:
    if config.dit.dit is None:
        raise HyimgError("`--dit` is required", hint="or give `--latent_path` to decode saved latents")
    arch = check_dit(config.dit.dit)
    specs = _specs(config)
    plugins = load_plugins(config.common.plugin)
    defaults = render_defaults(config.sampling, arch)
    if config.prompt.negative_prompt is not None:
        defaults = replace(defaults, negative_prompt=config.prompt.negative_prompt)
    decided = [spec.resolve(defaults) for spec in specs]
    samplers = resolve_samplers(plugins, [s.sampler for s in decided], config.sampling.sampler_args, arch)
    multipliers = lora_multipliers(config.lora.lora_weight, config.lora.lora_multiplier)
    check_loras(config.lora.lora_weight, arch)
    for width, height in dict.fromkeys((spec.width, spec.height) for spec in decided):
        if (width, height) not in NATIVE_SIZES:
            report.warning(
                f"{width}x{height} is not one of the sizes that the model was made for: "
                + ", ".join(f"{w}x{h}" for w, h in NATIVE_SIZES)
            )
    return _Plan(
        decided, multipliers, samplers, _open_encoders(config), resolve_device(config.compute.device)
    )


def _specs(config: InferConfig) -> list[PromptSpec]:
    prompt, from_file = config.prompt.prompt, config.prompt.from_file
    if (prompt is None) == (from_file is None):
        raise HyimgError(
            "give one of `--prompt` and `--from_file`", hint="or `--latent_path` to decode latents"
        )
    if from_file is not None:
        return load_prompts(from_file)
    assert prompt is not None
    return [PromptSpec(prompt=prompt)]


def _open_encoders(config: InferConfig) -> TextEncoders:
    files = config.encoders
    if files.text_encoder is None or files.byt5 is None:
        missing = "text_encoder" if files.text_encoder is None else "byt5"
        raise HyimgError(
            f"`--{missing}` is required", hint="both text encoders are needed to render a prompt"
        )
    device = torch.device("cpu") if files.text_encoder_cpu else resolve_device(config.compute.device)
    return TextEncoders.open(
        files.text_encoder,
        files.byt5,
        files.tokenizer,
        device=device,
        batch_size=files.text_encoder_batch_size,
        mmap=not config.compute.disable_mmap_load_safetensors,
    )


# ---- rendering


def _render(config: InferConfig, plan: _Plan, report: Reporter) -> list[Rendered]:
    states: dict[str, PromptStates] = {
        prompt: (encoded.text_TD, encoded.byt5_SE)
        for prompt, encoded in encode_prompts(plan.encoders, prompts_to_encode(plan.specs), report)
    }
    assert config.dit.dit is not None
    dit = load_dit(
        config.dit.dit,
        device=plan.device,
        dtype=compute_dtype(config.compute.mixed_precision),
        mmap=not config.compute.disable_mmap_load_safetensors,
    )
    for path, multiplier in zip(config.lora.lora_weight, plan.multipliers, strict=True):
        network = attach_lora(dit, path, multiplier)
        report.note(f"LoRA {path}: {len(network.plan)} modules, multiplier {multiplier:g}")
    renderer = Renderer(
        dit, config.sampling, plan.samplers, states, lambda text: glyph_prompt(text) is not None
    )
    loras = [
        {"file": path.name, "sha256": file_identity(path), "multiplier": multiplier}
        for path, multiplier in zip(config.lora.lora_weight, plan.multipliers, strict=True)
    ]
    rendered = []
    with report.task("render", sum(spec.steps for spec in plan.specs), unit="step") as task:
        for spec in plan.specs:
            settings = settings_of(
                spec, config.sampling, config.compute.mixed_precision, config.dit.dit, loras
            )
            latent_BCHW = renderer.render(spec, lambda step, x, denoised: task.advance())
            rendered.append(Rendered(latent_BCHW, settings))
    del dit, renderer
    _free(plan.device)
    return rendered


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- latents and pictures on disk


def _targets(config: InferConfig, count: int) -> list[Path]:
    """A path without suffix for each result; the folder is tried, so that a render is not lost at its end."""
    save_path = config.output.save_path
    assert save_path is not None
    if save_path.suffix.lower() in (".png", ".safetensors"):
        if save_path.is_dir():
            raise HyimgError(
                f"`--save_path` `{save_path}` is a folder", hint="name a file, or a folder without suffix"
            )
        require_writable_folder(save_path.parent)
        stem = save_path.with_suffix("")
        return [stem] if count == 1 else [stem.with_name(f"{stem.name}-{i:04}") for i in range(1, count + 1)]
    require_writable_folder(save_path)
    return [save_path / f"{i:04}" for i in range(1, count + 1)]


def _write(
    config: InferConfig, rendered: Sequence[Rendered], targets: Sequence[Path], report: Reporter
) -> list[Path]:
    written = []
    output_type = config.output.output_type
    if output_type in ("latent", "latent_images"):
        for one, target in zip(rendered, targets, strict=True):
            written.append(_write_latent(one, target.with_name(f"{target.name}.safetensors")))
    if output_type in ("images", "latent_images"):
        device = resolve_device(config.compute.device)
        assert config.vae.vae is not None
        vae = load_vae(config.vae.vae, device=device, dtype=vae_dtype(config.compute.mixed_precision, device))
        with report.task("decode", len(rendered), unit="image") as task:
            for one, target in zip(rendered, targets, strict=True):
                path = target.with_name(f"{target.name}.png")
                settings = None if config.output.no_metadata else one.settings
                save_png(decode_image(vae, one.latent_BCHW), path, settings)
                written.append(path)
                task.advance()
    for path in written:
        report.note(f"saved {path}")
    return written


def _write_latent(rendered: Rendered, path: Path) -> Path:
    metadata = {METADATA_KEY: json.dumps(rendered.settings, ensure_ascii=False)}
    atomic_write_bytes(path, save({LATENT_KEY: rendered.latent_BCHW.contiguous()}, metadata=metadata))
    return path


def _check_latents_only(config: InferConfig) -> None:
    if config.prompt.prompt is not None or config.prompt.from_file is not None:
        raise HyimgError(
            "`--latent_path` decodes saved latents and takes no prompt", hint="leave one of them out"
        )
    if config.output.output_type != "images":
        raise HyimgError("`--latent_path` gives images", hint="leave out `--output_type`")


def _read_latent(path: Path) -> Rendered:
    checkpoint = Checkpoint.open(path)
    info = checkpoint.tensors.get(LATENT_KEY)
    if info is None or len(info.shape) != 4 or info.shape[0] != 1:
        raise HyimgError(
            f"`{path}` holds no latent", hint="`hyimg infer --output_type latent` writes such files"
        )
    settings = json.loads(checkpoint.metadata.get(METADATA_KEY, "{}"))
    return Rendered(checkpoint.read(LATENT_KEY).float(), settings)
