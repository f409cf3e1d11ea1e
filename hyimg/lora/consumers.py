"""What the programs that read LoRAs of this model make of a file: modules applied, tensors dropped, and why.

Told from the names alone, by the rules of each program's loader:

    ComfyUI          `comfy/lora.py`, `comfy/weight_adapter/`: `lora_unet_` or `diffusion_model.` and its own
                     module names; a tensor that it does not know is dropped with a line in the log
    reference tool   sd-scripts, `library/lora_utils.py`: `lora_unet_` or nothing, and the original names
    diffusers        0.42, `HunyuanImageTransformer2DModel.load_lora_adapter`: `transformer.` and its own names;
                     `.alpha` tensors are ignored without a word
    diffusion-pipe   `models/base.py`: `diffusion_model.` and ComfyUI's names; one strange tensor stops it

What these programs do to the golden files was measured with them (tests/golden/lora_loading.json).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hyimg.lora.contents import PEFT_CONFIG, AdaptedModule, LoRAContents
from hyimg.lora.formats import FORMATS, LOHA_ROLES, LOKR_ROLES, Key, parse_key

LYCORIS_ROLES = LOHA_ROLES | LOKR_ROLES

# Endings of down and up; ComfyUI wants both of a pair in one style, which no tool mixes
_COMFYUI_HALVES = re.compile(
    r"\.lora_(down|up)\.weight|\.lora_[AB](\.weight|\.default\.weight)?|[._]lora\.(down|up)\.weight"
    r"|\.lora_linear_layer\.(down|up)\.weight"
)
_DIFFUSERS_HALVES = re.compile(r"\.lora_[AB]\.weight|\.lora\.(down|up)\.weight")


@dataclass(frozen=True)
class Verdict:
    """What one program does with a file.

    `applied` are the model's own names of the modules that it changes; `dropped` gives the reason for each
    module that it does not, or not wholly; `num_dropped_tensors` counts tensors of applied modules as well.
    `notes` say how what is applied differs from what was trained.
    """

    consumer: str
    title: str
    applied: tuple[str, ...]
    dropped: Mapping[str, str]
    num_dropped_tensors: int
    notes: tuple[str, ...]

    @property
    def loads(self) -> str:
        """all, part or none."""
        if not self.dropped and not self.notes:
            return "all"
        return "part" if self.applied else "none"


@dataclass(frozen=True)
class Consumer:
    """A program. `refusal` says why it does not read a tensor, None where it does."""

    name: str
    title: str
    format: str
    """The format to convert to for it."""
    refusal: Callable[[Key], str | None]
    stops_at_strange: bool = False
    """Whether one tensor that it does not know makes it load nothing."""


def _comfyui(key: Key) -> str | None:
    names = [FORMATS[name].module_name(key.target, key.index) for name in ("comfy", "peft")]
    if key.part is not None or key.stem not in names:
        return f"knows `{names[0]}` and `{names[1]}`, and not `{key.stem}`"
    known = {
        "down": _COMFYUI_HALVES,
        "up": _COMFYUI_HALVES,
        "magnitude": re.compile(r"\.dora_scale"),
    }.get(key.role, re.compile(re.escape(f".{key.role}")))
    return None if known.fullmatch(key.suffix) else f"knows no `{key.suffix[1:]}`"


def _reference(key: Key) -> str | None:
    name = FORMATS["kohya"].module_name(key.target, key.index)
    if key.part is not None or key.stem not in (name, name.removeprefix("lora_unet_")):
        return f"knows `{name}`, and not `{key.stem}`"
    if key.role in LYCORIS_ROLES:
        return "reads LoHa and LoKr only with `--lycoris`, by LyCORIS's own code"
    known = (".lora_down.weight", ".lora_up.weight", ".alpha")
    return None if key.suffix in known else f"knows no `{key.suffix[1:]}`"


def _diffusers(key: Key) -> str | None:
    format = FORMATS["diffusers"]
    is_whole = key.part is None and len(key.target.diffusers) > 1
    name = format.module_name(key.target, key.index, key.part or 0)
    if is_whole or key.stem != name:
        return f"knows `{name}`, and not `{key.stem}`"
    if key.role in LYCORIS_ROLES:
        return "is not known to read LoHa or LoKr as they stand"
    known = {"magnitude": re.compile(r"\.lora_magnitude_vector")}.get(key.role, _DIFFUSERS_HALVES)
    return None if known.fullmatch(key.suffix) else f"ignores `{key.suffix[1:]}`"


def _diffusion_pipe(key: Key) -> str | None:
    name = FORMATS["peft"].module_name(key.target, key.index)
    if key.part is not None or key.stem != name:
        return f"knows `{name}`, and not `{key.stem}`"
    return None if key.suffix in (".lora_A.weight", ".lora_B.weight") else f"knows no `{key.suffix[1:]}`"


CONSUMERS: tuple[Consumer, ...] = (
    Consumer("comfyui", "ComfyUI", "comfy", _comfyui),
    Consumer("sd_scripts", "the reference tool (sd-scripts)", "kohya", _reference),
    Consumer("diffusers", "diffusers", "diffusers", _diffusers),
    Consumer("diffusion_pipe", "PEFT / diffusion-pipe", "peft", _diffusion_pipe, stops_at_strange=True),
)


def verdicts(contents: LoRAContents) -> list[Verdict]:
    """What each program does with a file, in the order of `CONSUMERS`. `unmapped` tensors are not judged."""
    return [_verdict(consumer, contents) for consumer in CONSUMERS]


def _verdict(consumer: Consumer, contents: LoRAContents) -> Verdict:
    applied: list[str] = []
    dropped: dict[str, str] = {}
    ignored: dict[str, str] = {}
    num_tensors = 0
    for module in contents.modules:
        refusals = {key: reason for key in _keys(module) if (reason := consumer.refusal(key)) is not None}
        num_tensors += len(refusals)
        vital = [reason for key, reason in refusals.items() if key.role not in ("alpha", "magnitude")]
        if vital:
            dropped[module.name] = vital[0]
            continue
        applied.append(module.name)
        ignored |= {key.role: reason for key, reason in refusals.items()}
    if consumer.stops_at_strange and num_tensors:
        first = next(iter((*dropped.values(), *ignored.values())))
        reason = f"stops at the first tensor that it does not know: it {first}"
        names = [module.name for module in contents.modules]
        count = sum(len(piece.keys) for module in contents.modules for piece in module.pieces)
        return Verdict(consumer.name, consumer.title, (), dict.fromkeys(names, reason), count, ())
    notes = _notes(consumer, contents, ignored) if applied else []
    return Verdict(consumer.name, consumer.title, tuple(applied), dropped, num_tensors, tuple(notes))


def _keys(module: AdaptedModule) -> list[Key]:
    texts = [text for piece in module.pieces for text in piece.keys.values()]
    return [key for text in texts if (key := parse_key(text)) is not None]


def _notes(consumer: Consumer, contents: LoRAContents, ignored: Mapping[str, str]) -> list[str]:
    notes = []
    if "magnitude" in ignored:
        notes.append("a DoRA is applied as a plain LoRA: its row lengths are left out")
    if "alpha" in ignored:
        notes.append("`.alpha` is ignored, so that the strength is rank/alpha times what was trained")
    elif PEFT_CONFIG in contents.header.metadata and consumer.name != "diffusers":
        first = contents.modules[0].pieces[0]
        key, rank = next(iter(first.keys.values())), first.rank(contents.header)
        scale = contents.peft_scale(key, rank) if rank and "alpha" not in first.keys else 1.0
        if scale not in (0, 1):
            notes.append(
                f"alpha in the metadata is ignored, so that the strength is {1 / scale:.4g} times what was trained"
            )
    num_doras = sum(piece.is_dora for module in contents.modules for piece in module.pieces)
    if consumer.name == "diffusers" and 0 < num_doras < sum(len(m.pieces) for m in contents.modules):
        notes.append("modules that are no DoRA are made one, since PEFT knows all or none")
    return notes
