"""`hyimg sample`: a prompt file times one or more LoRA files, as images and one contact sheet.

Rows are prompts, columns the base model and the LoRA files; a row has one seed, so that columns compare.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from hyimg.cache.atomic import require_writable_folder
from hyimg.cache.identity import file_identity
from hyimg.config.commands import SampleConfig
from hyimg.data.plan import text_store_for_training
from hyimg.data.sheet import contact_sheet
from hyimg.encoders.glyph import glyph_prompt
from hyimg.encoders.progress import encode_prompts
from hyimg.encoders.text import TextEncoders
from hyimg.errors import HyimgError
from hyimg.flow.pictures import decode_image, save_png
from hyimg.flow.prompts import RenderSpec, load_prompts
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
from hyimg.model.loading import check_dit, check_vae, load_dit, load_vae
from hyimg.plugins import load_plugins
from hyimg.report import Reporter

SHEET_NAME = "sheet.png"
BASE_LABEL = "base"


@dataclass(frozen=True)
class Column:
    """A column of the sheet: its label, and the LoRA file with its multiplier (None: the base model)."""

    label: str
    lora: Path | None = None
    multiplier: float = 1.0


def sample(config: SampleConfig, report: Reporter) -> Path:
    """Renders every prompt with every column and returns the contact sheet's path.

    Raises HyimgError for wrong input before a weight is read.
    """
    sheet = config.sheet
    assert config.dit.dit is not None
    assert config.vae.vae is not None
    assert sheet.sample_prompts is not None
    assert sheet.output_dir is not None
    device = resolve_device(config.compute.device)
    arch = check_dit(config.dit.dit)
    check_vae(config.vae.vae)
    defaults = render_defaults(config.sampling, arch)
    specs = [spec.resolve(defaults) for spec in load_prompts(sheet.sample_prompts)]
    samplers = resolve_samplers(
        load_plugins(config.common.plugin), [s.sampler for s in specs], config.sampling.sampler_args, arch
    )
    check_loras(sheet.lora_weight, arch)
    columns = _columns(config)
    require_writable_folder(sheet.output_dir)
    states = _states(config, specs, report)

    latents = _render(config, specs, columns, samplers, states, report)
    gc.collect()
    vae = load_vae(config.vae.vae, device=device, dtype=vae_dtype(config.compute.mixed_precision, device))
    rows: list[list[Image.Image]] = []
    with report.task("decode", len(specs) * len(columns), unit="image") as task:
        for spec in specs:
            rows.append([])
            for column in columns:
                image = decode_image(vae, latents[spec.index, column.label])
                path = sheet.output_dir / f"{spec.index + 1:03}-{column.label}.png"
                save_png(image, path, _settings(config, spec, column))
                rows[-1].append(image)
                task.advance()
    sheet_path = sheet.output_dir / SHEET_NAME
    picture = contact_sheet(rows, [_row_label(spec) for spec in specs], [c.label for c in columns])
    save_png(picture, sheet_path, None)
    report.note(f"saved {len(specs) * len(columns)} images and {sheet_path}")
    return sheet_path


def _columns(config: SampleConfig) -> list[Column]:
    sheet = config.sheet
    multipliers = lora_multipliers(sheet.lora_weight, sheet.lora_multiplier)
    columns = [] if sheet.no_base else [Column(BASE_LABEL)]
    columns += [Column(p.stem, p, m) for p, m in zip(sheet.lora_weight, multipliers, strict=True)]
    if not columns:
        raise HyimgError("there is nothing to render", hint="name LoRA files, or leave out `--no_base`")
    labels = [column.label for column in columns]
    for label in labels:
        if labels.count(label) > 1:
            raise HyimgError(
                f"two columns would be named `{label}`",
                hint="give LoRA files of distinct names, none of them `base`",
            )
    return columns


def _states(config: SampleConfig, specs: list[RenderSpec], report: Reporter) -> dict[str, PromptStates]:
    """The prompts' encoder states, from the text cache where a folder is named, else from the encoders."""
    prompts = prompts_to_encode(specs)
    if config.sheet.cache_dir is not None:
        store = text_store_for_training(config.sheet.cache_dir / "text", [], prompts)
        entries = {prompt: store.read(prompt) for prompt in prompts}
        return {prompt: (entry.text_TD, entry.byt5_SE) for prompt, entry in entries.items()}
    files = config.encoders
    if files.text_encoder is None or files.byt5 is None:
        raise HyimgError(
            "`hyimg sample` needs the prompts' embeddings",
            hint="give `--text_encoder` and `--byt5`, or `--cache_dir` after `hyimg cache-text --sample_prompts`",
        )
    device = torch.device("cpu") if files.text_encoder_cpu else resolve_device(config.compute.device)
    encoders = TextEncoders.open(
        files.text_encoder,
        files.byt5,
        files.tokenizer,
        device=device,
        batch_size=files.text_encoder_batch_size,
    )
    return {
        prompt: (encoded.text_TD, encoded.byt5_SE)
        for prompt, encoded in encode_prompts(encoders, prompts, report)
    }


def _render(
    config: SampleConfig,
    specs: list[RenderSpec],
    columns: list[Column],
    samplers: dict[str, Callable[..., Tensor]],
    states: dict[str, PromptStates],
    report: Reporter,
) -> dict[tuple[int, str], Tensor]:
    assert config.dit.dit is not None
    dit = load_dit(
        config.dit.dit,
        device=resolve_device(config.compute.device),
        dtype=compute_dtype(config.compute.mixed_precision),
        mmap=not config.compute.disable_mmap_load_safetensors,
    )
    renderer = Renderer(dit, config.sampling, samplers, states, lambda text: glyph_prompt(text) is not None)
    latents = {}
    with report.task("render", len(columns) * sum(spec.steps for spec in specs), unit="step") as task:
        for column in columns:
            network = attach_lora(dit, column.lora, column.multiplier) if column.lora is not None else None
            for spec in specs:
                latents[spec.index, column.label] = renderer.render(
                    spec, lambda step, x, denoised: task.advance()
                )
            if network is not None:
                network.detach(dit)
    return latents


def _settings(config: SampleConfig, spec: RenderSpec, column: Column) -> dict[str, object]:
    assert config.dit.dit is not None
    loras = []
    if column.lora is not None:
        loras = [
            {"file": column.lora.name, "sha256": file_identity(column.lora), "multiplier": column.multiplier}
        ]
    return settings_of(spec, config.sampling, config.compute.mixed_precision, config.dit.dit, loras)


def _row_label(spec: RenderSpec) -> str:
    return f"{spec.prompt}  (seed {spec.seed})"
