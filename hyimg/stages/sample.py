"""`hyimg sample`: a prompt file times one or more LoRA files, as images and one contact sheet.

Rows are prompts, columns the base model and the LoRA files; a row has one seed, so that columns compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image
from torch import Tensor

from hyimg.cache.atomic import require_writable_folder
from hyimg.cache.index import Index
from hyimg.config.commands import SampleConfig
from hyimg.data.plan import text_store_for_training
from hyimg.data.sheet import contact_sheet
from hyimg.errors import HyimgError
from hyimg.flow.pictures import decode_image, save_png
from hyimg.flow.plan import (
    LoRAUse,
    RenderPlan,
    encode_states,
    free_memory,
    load_decoder,
    open_encoders,
    plan_renders,
)
from hyimg.flow.prompts import RenderSpec, load_prompts
from hyimg.flow.renderer import PromptStates, attach_lora, prompts_to_encode
from hyimg.memory.out_of_memory import explained, text_encoder_changes, vae_changes
from hyimg.model.loading import check_vae
from hyimg.report import Reporter

SHEET_NAME = "sheet.png"
BASE_LABEL = "base"


@dataclass(frozen=True)
class Column:
    """A column of the sheet: its label, and the LoRA (None: the base model)."""

    label: str
    lora: LoRAUse | None = None

    @property
    def loras(self) -> list[LoRAUse]:
        return [] if self.lora is None else [self.lora]


def sample(config: SampleConfig, report: Reporter) -> Path:
    """Renders every prompt with every column and returns the contact sheet's path.

    Raises HyimgError for wrong input before a weight is read, and RunError for an image that is not finite.
    """
    sheet = config.sheet
    assert config.dit.dit is not None
    assert config.vae.vae is not None
    assert sheet.sample_prompts is not None
    assert sheet.output_dir is not None
    check_vae(config.vae.vae)
    plan = plan_renders(
        load_prompts(sheet.sample_prompts),
        dit=config.dit.dit,
        sampling=config.sampling,
        memory=config.memory,
        compute=config.compute,
        lora_weight=sheet.lora_weight,
        lora_multiplier=sheet.lora_multiplier,
        plugins=config.common.plugin,
        report=report,
    )
    columns = _columns(plan.loras, with_base=not sheet.no_base)
    require_writable_folder(sheet.output_dir)
    states = _states(config, prompts_to_encode(plan.specs), report)

    with explained(plan.changes_for_memory):
        latents = _render(plan, columns, states, report)
    free_memory(plan.device)

    rows: list[list[Image.Image]] = []
    decoding = explained(partial(vae_changes, config.vae, picture="picture (`--image_size`)"))
    with decoding, report.task("decode", len(plan.specs) * len(columns), unit="image") as task:
        vae = load_decoder(config.vae, config.compute)
        for spec in plan.specs:
            rows.append([])
            for column in columns:
                image = decode_image(vae, latents[spec.index, column.label])
                path = sheet.output_dir / f"{spec.index + 1:03}-{column.label}.png"
                save_png(image, path, plan.settings(spec, column.loras))
                rows[-1].append(image)
                task.advance()
    sheet_path = sheet.output_dir / SHEET_NAME
    picture = contact_sheet(rows, [_row_label(spec) for spec in plan.specs], [c.label for c in columns])
    save_png(picture, sheet_path, None)
    report.note(f"saved {len(plan.specs) * len(columns)} images and {sheet_path}")
    return sheet_path


def _columns(loras: list[LoRAUse], *, with_base: bool) -> list[Column]:
    columns = [Column(BASE_LABEL)] if with_base else []
    columns += [Column(lora.path.stem, lora) for lora in loras]
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


def _states(config: SampleConfig, prompts: list[str], report: Reporter) -> dict[str, PromptStates]:
    """The prompts' encoder states, from the text cache where a folder is named, else from the encoders.

    Encoders that are named too say which of the cache's stores is meant.
    """
    files, cache_dir = config.encoders, config.sheet.cache_dir
    named = files.text_encoder is not None and files.byt5 is not None
    if cache_dir is not None:
        index = Index(cache_dir if cache_dir.is_dir() else None)
        identity = open_encoders(files, config.compute, memo=index).identity if named else None
        store = text_store_for_training(cache_dir / "text", [], prompts, index=index, identity=identity)
        entries = {prompt: store.read(prompt) for prompt in prompts}
        return {prompt: (entry.text_TD, entry.byt5_SE) for prompt, entry in entries.items()}
    if not named:
        raise HyimgError(
            "`hyimg sample` needs the prompts' embeddings",
            hint="give `--text_encoder` and `--byt5`, or `--cache_dir` after `hyimg cache-text --sample_prompts`",
        )
    with explained(partial(text_encoder_changes, files)):
        return encode_states(open_encoders(files, config.compute), prompts, report)


def _render(
    plan: RenderPlan, columns: list[Column], states: dict[str, PromptStates], report: Reporter
) -> dict[tuple[int, str], Tensor]:
    """The latents by (index of the prompt, label of the column); the DiT is let go on return."""
    renderer = plan.load_renderer(states, report)
    latents = {}
    with report.task("render", len(columns) * sum(spec.steps for spec in plan.specs), unit="step") as task:
        for column in columns:
            networks = [
                attach_lora(renderer.dit, lora.path, lora.multiplier, report) for lora in column.loras
            ]
            for spec in plan.specs:
                latents[spec.index, column.label] = renderer.render(
                    spec, lambda step, x, denoised: task.advance()
                )
            for network in networks:
                network.detach(renderer.dit)
    return latents


def _row_label(spec: RenderSpec) -> str:
    return f"{spec.prompt}  (seed {spec.seed})"
