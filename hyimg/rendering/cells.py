"""The cells of a contact sheet: a prompt and a column each, and which of them are there from an earlier run.

An image is kept where its own settings are those that it would be made with now. Rendered latents wait in a hidden
folder for the VAE, so that a run that was stopped can reuse them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hyimg.cache.own_files import is_link
from hyimg.checkpoints.architecture import VAEArch
from hyimg.config.image_file import FINGERPRINTS, is_whole, read_settings
from hyimg.errors import HyimgError, raise_system_limit
from hyimg.rendering.decoding import as_recorded, read_latent
from hyimg.rendering.loras import LoRAUse
from hyimg.rendering.prompts import PromptSpec, RenderSpec
from hyimg.rendering.render_plan import RenderPlan

BASE_LABEL = "base"
LATENT_FOLDER = ".latents"


@dataclass(frozen=True)
class Column:
    """A column of the sheet: its label, and the LoRA (None: the base model)."""

    label: str
    lora: LoRAUse | None = None

    @property
    def loras(self) -> list[LoRAUse]:
        return [] if self.lora is None else [self.lora]


@dataclass(frozen=True)
class Cell:
    """An image of the sheet: what it is made with, and the files of its picture and, before that, its latent."""

    spec: RenderSpec
    column: Column
    settings: Mapping[str, object]
    path: Path
    latent_path: Path

    @property
    def has_picture(self) -> bool:
        """Whether there is a picture; a link in its place does not count, and is replaced."""
        return self.path.exists() and not is_link(self.path)

    def changes(self) -> list[str] | None:
        """The settings in which the picture that is there differs from what is wanted; None without a picture, and
        for a picture of the wanted settings that is damaged.

        Raises HyimgError for a picture that tells no settings, which is not ours to replace.
        """
        if not self.has_picture:
            return None
        settings = read_settings(self.path)
        if settings is None:
            raise HyimgError(
                f"`{self.path}` is not a picture of `hyimg sample`",
                hint="name another `--output_dir`, or move it away",
            )
        changed = differing(settings, self.settings)
        return changed if changed or is_whole(self.path) else None

    def latent_settings(self, vae: VAEArch) -> Mapping[str, Any] | None:
        """The settings of the latent that an earlier run left; None without a usable one."""
        try:
            if is_link(self.latent_path) or not self.latent_path.exists():
                return None
            return read_latent(self.latent_path, vae).settings
        except HyimgError as error:  # whatever is wrong with it: it is rendered again
            raise_system_limit(error)
            return None

    def is_rendered(self, vae: VAEArch) -> bool:
        """Whether an earlier run has left the latent that is wanted."""
        settings = self.latent_settings(vae)
        return settings is not None and not differing(settings, self.settings)


def columns_of(loras: Sequence[LoRAUse], *, with_base: bool) -> list[Column]:
    """The columns with labels that tell them apart: file names, with the folder's or the multiplier where needed.

    Raises HyimgError where there is no column, or none of that helps.
    """
    base = [Column(BASE_LABEL)] if with_base else []
    if not (base or loras):
        raise HyimgError("there is nothing to render", hint="name LoRA files, or leave out `--no_base`")
    namings = (
        [lora.path.stem for lora in loras],
        [f"{lora.path.resolve().parent.name}-{lora.path.stem}" for lora in loras],
        [f"{lora.path.stem}@{lora.multiplier:g}" for lora in loras],
    )
    for labels in namings:
        if len({BASE_LABEL, *labels}) == len(labels) + 1:
            return base + [Column(label, lora) for label, lora in zip(labels, loras, strict=True)]
    labels = namings[0]
    double = next(label for label in labels if labels.count(label) > 1)
    raise HyimgError(
        f"two columns would be named `{double}`", hint="give LoRA files of distinct names, or once each"
    )


def cells_of(plan: RenderPlan, columns: Sequence[Column], folder: Path) -> list[Cell]:
    """A cell for each prompt and column, row by row."""
    return [
        Cell(
            spec,
            column,
            plan.settings(spec, column.loras),
            folder / f"{_stem(spec, column)}.png",
            folder / LATENT_FOLDER / f"{_stem(spec, column)}.safetensors",
        )
        for spec in plan.specs
        for column in columns
    ]


def with_kept_seeds(
    plan: RenderPlan, prompts: Sequence[PromptSpec], columns: Sequence[Column], folder: Path, vae: VAEArch
) -> RenderPlan:
    """The plan, where a prompt without a seed has the one that its row was begun with, if it was."""
    specs = list(plan.specs)
    for cell in cells_of(plan, columns, folder):
        number = cell.spec.index
        if prompts[number].seed is not None or plan.defaults.seed is not None:
            continue
        settings = read_settings(cell.path) if cell.has_picture else cell.latent_settings(vae)
        if settings is None or differing(settings, cell.settings) != ["seed"]:
            continue
        if isinstance(settings["seed"], int):
            specs[number] = replace(specs[number], seed=settings["seed"])
    return replace(plan, specs=specs)


def differing(recorded: Mapping[str, Any], wanted: Mapping[str, object]) -> list[str]:
    """The keys in which recorded settings differ from wanted ones; files that only one of them names do not count."""
    now = as_recorded(wanted)
    keys = [key for key in {**now, **recorded} if key != FINGERPRINTS and recorded.get(key) != now.get(key)]
    before, after = recorded.get(FINGERPRINTS, {}), now[FINGERPRINTS]
    return keys + [name for name in after if name in before and before[name] != after[name]]


def _stem(spec: RenderSpec, column: Column) -> str:
    return f"{spec.index + 1:03}-{column.label}"
