"""The report of `hyimg check`: what a LoRA file holds, which programs load how much of it, and what fp8 would keep.

Which modules a program applies and which tensors it drops is derived from the names alone, by its loader's rules:

    ComfyUI          `comfy/lora.py`, `comfy/weight_adapter/`: `lora_unet_` or `diffusion_model.` and its own
                     module names; a tensor that it does not know is dropped with a line in the log
    reference tool   sd-scripts, `library/lora_utils.py`: `lora_unet_` or nothing, and the original names
    diffusers        0.42, `HunyuanImageTransformer2DModel.load_lora_adapter`: `transformer.` and its own names;
                     `.alpha` tensors are ignored silently
    diffusion-pipe   `models/base.py`: `diffusion_model.` and ComfyUI's names; one unknown tensor is an error

Their effect on the golden files was measured with the programs themselves (tests/golden/lora_loading.json).

The steps of fp8 are coarser than most updates. For a weight W, an update D and C = fp8(W + D) - fp8(W), the share of
the update that survives is <C, D>^2 / (|C|^2 |D|^2).

Shapes: O output features, I input features
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from hyimg.lora.base import Adapter
from hyimg.lora.files.conversion import MERGED_FROM
from hyimg.lora.files.foreign import CONFIG_NAME
from hyimg.lora.files.formats import FORMATS, LOHA_ROLES, LOKR_ROLES, TensorKey
from hyimg.lora.files.stored import KIND_TITLES, LoRAFile, by_module
from hyimg.memory.fp8 import dequantize, layer_kind, quantize

LYCORIS_ROLES = LOHA_ROLES | LOKR_ROLES

# Endings of down and up; ComfyUI wants both of a pair in one style, which no tool mixes
_COMFYUI_HALVES = re.compile(
    r"\.lora_(down|up)\.weight|\.lora_[AB](\.weight|\.default\.weight)?|[._]lora\.(down|up)\.weight"
    r"|\.lora_linear_layer\.(down|up)\.weight"
)
_DIFFUSERS_HALVES = re.compile(r"\.lora_[AB]\.weight|\.lora\.(down|up)\.weight")


@dataclass(frozen=True)
class Compatibility:
    """What one program does with a file.

    `applied` are the model's own names of the modules that it changes; `dropped` has the reason for each module that it
    ignores, entirely or in part; `num_dropped_tensors` includes tensors of applied modules. `notes` say how the effect
    differs from training.
    """

    loader: Loader
    applied: tuple[str, ...]
    dropped: Mapping[str, str]
    num_dropped_tensors: int
    notes: tuple[str, ...]

    @property
    def loads(self) -> Literal["all", "part", "none"]:
        if not self.dropped and not self.notes:
            return "all"
        return "part" if self.applied else "none"


@dataclass(frozen=True)
class Loader:
    """A program that loads LoRA files; `format` is the one to convert to for it."""

    name: str
    title: str
    format: str
    unsupported_reason: Callable[[TensorKey], str | None]
    """Why it does not read a tensor, None if it does."""
    is_strict: bool = False
    """Whether it refuses a file with one tensor that it does not know."""


def _comfyui(key: TensorKey) -> str | None:
    names = [FORMATS[name].module_name(key.linear, key.index) for name in ("comfy", "peft")]
    if key.part is not None or key.stem not in names:
        return f"knows `{names[0]}` and `{names[1]}`, and not `{key.stem}`"
    known = {
        "down": _COMFYUI_HALVES,
        "up": _COMFYUI_HALVES,
        "magnitude": re.compile(r"\.dora_scale"),
    }.get(key.role, re.compile(re.escape(f".{key.role}")))
    return None if known.fullmatch(key.suffix) else f"knows no `{key.suffix[1:]}`"


def _reference(key: TensorKey) -> str | None:
    name = FORMATS["kohya"].module_name(key.linear, key.index)
    if key.part is not None or key.stem not in (name, name.removeprefix("lora_unet_")):
        return f"knows `{name}`, and not `{key.stem}`"
    if key.role in LYCORIS_ROLES:
        return "reads LoHa and LoKr only with `--lycoris`, by LyCORIS's own code"
    known = (".lora_down.weight", ".lora_up.weight", ".alpha")
    return None if key.suffix in known else f"knows no `{key.suffix[1:]}`"


def _diffusers(key: TensorKey) -> str | None:
    format = FORMATS["diffusers"]
    is_whole = key.part is None and len(key.linear.diffusers) > 1
    name = format.module_name(key.linear, key.index, key.part or 0)
    if is_whole or key.stem != name:
        return f"knows `{name}`, and not `{key.stem}`"
    if key.role in LYCORIS_ROLES:
        return "is not known to read LoHa or LoKr unconverted"
    known = {"magnitude": re.compile(r"\.lora_magnitude_vector")}.get(key.role, _DIFFUSERS_HALVES)
    return None if known.fullmatch(key.suffix) else f"ignores `{key.suffix[1:]}`"


def _diffusion_pipe(key: TensorKey) -> str | None:
    name = FORMATS["peft"].module_name(key.linear, key.index)
    if key.part is not None or key.stem != name:
        return f"knows `{name}`, and not `{key.stem}`"
    return None if key.suffix in (".lora_A.weight", ".lora_B.weight") else f"knows no `{key.suffix[1:]}`"


LOADERS: tuple[Loader, ...] = (
    Loader("comfyui", "ComfyUI", "comfy", _comfyui),
    Loader("sd_scripts", "the reference tool (sd-scripts)", "kohya", _reference),
    Loader("diffusers", "diffusers", "diffusers", _diffusers),
    Loader("diffusion_pipe", "PEFT / diffusion-pipe", "peft", _diffusion_pipe, is_strict=True),
)


def compatibility(file: LoRAFile) -> list[Compatibility]:
    """What each program does with a file, in the order of `LOADERS`, apart from its `unmapped` tensors."""
    return [_compatibility(loader, file) for loader in LOADERS]


def _compatibility(loader: Loader, file: LoRAFile) -> Compatibility:
    applied: list[str] = []
    dropped: dict[str, str] = {}
    ignored: dict[str, str] = {}
    num_tensors = 0
    for adapters in by_module(file.adapters):
        keys = [key for adapter in adapters for key in adapter.keys.values()]
        reasons = {key: reason for key in keys if (reason := loader.unsupported_reason(key)) is not None}
        num_tensors += len(reasons)
        essential = [reason for key, reason in reasons.items() if key.role not in ("alpha", "magnitude")]
        if essential:
            dropped[keys[0].module] = essential[0]
            continue
        applied.append(keys[0].module)
        ignored |= {key.role: reason for key, reason in reasons.items()}
    if loader.is_strict and num_tensors:
        first = next(iter((*dropped.values(), *ignored.values())))
        reason = f"stops at the first tensor that it does not know: it {first}"
        count = sum(len(adapter.keys) for adapter in file.adapters)
        return Compatibility(loader, (), dict.fromkeys(file.module_names, reason), count, ())
    notes = _notes(loader, file, ignored) if applied else []
    return Compatibility(loader, tuple(applied), dropped, num_tensors, tuple(notes))


def _notes(loader: Loader, file: LoRAFile, ignored: Mapping[str, str]) -> list[str]:
    notes = []
    if "magnitude" in ignored:
        notes.append("a DoRA is applied as a plain LoRA, without its magnitudes")
    if "alpha" in ignored:
        notes.append("`.alpha` is ignored, so the strength is rank/alpha times that of training")
    elif file.peft is not None and not (loader.name == "diffusers" and file.peft.in_metadata):
        scales = {adapter.scale for adapter in file.adapters if "alpha" not in adapter.keys}
        factors = [f"{factor:.4g}" for factor in sorted({1 / scale for scale in scales if scale})]
        if factors and factors != ["1"]:
            place = "the metadata" if file.peft.in_metadata else f"`{CONFIG_NAME}`"
            times = factors[0] if len(factors) == 1 else f"{factors[0]} to {factors[-1]}"
            notes.append(f"alpha in {place} is ignored, so the strength is {times} times that of training")
    num_doras = sum(adapter.is_dora for adapter in file.adapters)
    if loader.name == "diffusers" and 0 < num_doras < len(file.adapters):
        notes.append("modules that are not a DoRA are turned into one, since PEFT has it in all or in none")
    return notes


# Values of a weight that are processed at a time; there are several float32 temporaries of that size
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class Survival:
    """The four sums from which survival is computed, over any number of values; they can be added."""

    along: float = 0.0  # <C, D>
    change: float = 0.0  # |C|^2
    update: float = 0.0  # |D|^2
    error: float = 0.0  # |C - D|^2

    def __add__(self, other: Survival) -> Survival:
        return Survival(
            self.along + other.along,
            self.change + other.change,
            self.update + other.update,
            self.error + other.error,
        )

    @property
    def share(self) -> float:
        """The squared cosine between change and update, 0..1; 0 for an obtuse angle or no change."""
        energy = self.change * self.update
        return max(0.0, self.along) ** 2 / energy if energy else 0.0

    @property
    def relative_error(self) -> float:
        """|C - D| / |D|; 0 for an update of zeros."""
        return float((self.error / self.update) ** 0.5) if self.update else 0.0


def total(parts: Iterable[Survival]) -> Survival:
    """The sum of all parts."""
    return sum(parts, Survival())


@torch.no_grad()
def survival(weight_OI: Tensor, adapter: Adapter) -> Survival:
    """How much of an update remains after merging it into this base weight and quantising; on the weight's device.

    Merged as in `hyimg.lora.merging`: the sum in float32, rounded to the weight's dtype.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=weight_OI.device)
    step = max(1, _CHUNK_VALUES // weight_OI.shape[1])
    for start in range(0, len(weight_OI), step):
        rows = slice(start, start + step)
        base_OI, update_OI = weight_OI[rows], adapter.delta_rows(rows, weight_OI.device)
        merged_OI = (base_OI.float() + update_OI).to(base_OI.dtype)
        change_OI = _through_fp8(merged_OI).sub_(_through_fp8(base_OI))
        sums += torch.stack(
            [
                (change_OI * update_OI).sum(),
                change_OI.square().sum(),
                update_OI.square().sum(),
                change_OI.sub_(update_OI).square_().sum(),
            ]
        )
    return Survival(*sums.tolist())


def _through_fp8(weight_OI: Tensor) -> Tensor:
    return dequantize(*quantize(weight_OI), torch.float32)


# The most useful entries of a file's metadata; the reference tool's keys
_TRAINING = {
    "name": "ss_output_name",
    "title": "modelspec.title",
    "trigger_phrase": "modelspec.trigger_phrase",
    "base_model": "ss_sd_model_name",
    "model_version": "ss_base_model_version",
    "network_module": "ss_network_module",
    "network_dim": "ss_network_dim",
    "network_alpha": "ss_network_alpha",
    "images": "ss_num_train_images",
    "epoch": "ss_epoch",
    "steps": "ss_steps",
    "learning_rate": "ss_learning_rate",
    "optimizer": "ss_optimizer",
    "seed": "ss_seed",
    "comment": "ss_training_comment",
    "merged_from": MERGED_FROM,
}


@dataclass(frozen=True)
class ModuleReport:
    """One module's update; `norm` is None if a value is not finite (one NaN turns every image black)."""

    name: str
    rank: int
    alpha: float
    norm: float | None


def report_module(name: str, adapter: Adapter) -> ModuleReport:
    """The report on a module's adapter, whose parameters become float64."""
    is_finite = math.isfinite(adapter.alpha) and all(bool(p.isfinite().all()) for p in adapter.parameters())
    norm = float(adapter.double().update_norm()) if is_finite else None
    return ModuleReport(name, adapter.rank, adapter.alpha, norm)


@dataclass(frozen=True)
class KindReport:
    """The modules of one kind (`linear1`), or all of them; `fp8` with `--fp8`."""

    kind: str
    num_modules: int
    ranks: Mapping[int, int]
    alphas: Mapping[float, int]
    norm: float
    fp8: Survival | None

    def as_json(self) -> dict[str, object]:
        entry: dict[str, object] = {
            "kind": self.kind,
            "modules": self.num_modules,
            "ranks": {str(rank): count for rank, count in self.ranks.items()},
            "alphas": {f"{alpha:g}": count for alpha, count in self.alphas.items()},
            "norm": self.norm,
        }
        if self.fp8 is not None:
            entry["fp8"] = {"survives": self.fp8.share, "relative_error": self.fp8.relative_error}
        return entry


@dataclass(frozen=True)
class LoRAReport:
    """What `check` found.

    `adapters` counts modules by kind of adapter (LoRA, DoRA, LoHa, LoKr); `not_finite` are the modules with NaN or
    infinity, which `kinds` exclude, `zero` those without effect, `unmapped` the tensors that belong to no module that a
    LoRA of this model can adapt.
    """

    file: str
    formats: tuple[str, ...]
    adapters: Mapping[str, int]
    dtypes: Mapping[str, int]
    kinds: tuple[KindReport, ...]
    all: KindReport
    not_finite: tuple[str, ...]
    zero: tuple[str, ...]
    unmapped: tuple[str, ...]
    compatibility: tuple[Compatibility, ...]
    training: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """The report as `--json` prints it."""
        return {
            "file": self.file,
            "formats": list(self.formats),
            "adapters": dict(self.adapters),
            "dtypes": dict(self.dtypes),
            "kinds": [kind.as_json() for kind in self.kinds],
            "all": self.all.as_json(),
            "not_finite": list(self.not_finite),
            "zero": list(self.zero),
            "unmapped": list(self.unmapped),
            "consumers": [
                {
                    "name": found.loader.name,
                    "loads": found.loads,
                    "applied": len(found.applied),
                    "dropped": dict(found.dropped),
                    "dropped_tensors": found.num_dropped_tensors,
                    "notes": list(found.notes),
                }
                for found in self.compatibility
            ],
            "training": dict(self.training),
        }


def report_file(
    file: LoRAFile, modules: Sequence[ModuleReport], survivals: Mapping[str, Survival]
) -> LoRAReport:
    """The report on a file from those on its modules; `survivals` by module, empty without `--fp8`."""
    finite = [module for module in modules if module.norm is not None]
    by_kind = sorted(finite, key=lambda module: layer_kind(module.name))
    kinds = tuple(
        _report(kind, list(group), survivals)
        for kind, group in groupby(by_kind, key=lambda module: layer_kind(module.name))
    )
    firsts = [adapters[0] for adapters in by_module(file.adapters)]
    metadata = file.header.metadata
    return LoRAReport(
        str(file.path),
        file.formats,
        Counter("DoRA" if first.is_dora else KIND_TITLES[first.kind] for first in firsts),
        Counter(info.dtype for info in file.header.tensors.values()),
        kinds,
        _report("all", finite, survivals),
        tuple(module.name for module in modules if module.norm is None),
        tuple(module.name for module in finite if module.norm == 0),
        file.unmapped,
        tuple(compatibility(file)),
        {
            name: metadata[key]
            for name, key in _TRAINING.items()
            if metadata.get(key) not in (None, "None", "")
        },
    )


def _report(kind: str, modules: Sequence[ModuleReport], survivals: Mapping[str, Survival]) -> KindReport:
    return KindReport(
        kind,
        len(modules),
        dict(sorted(Counter(module.rank for module in modules).items())),
        dict(sorted(Counter(module.alpha for module in modules).items())),
        sum((module.norm or 0.0) ** 2 for module in modules) ** 0.5,
        total(survivals[module.name] for module in modules) if survivals else None,
    )
