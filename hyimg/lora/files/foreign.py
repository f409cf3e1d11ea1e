"""Which other model a LoRA is for, and which kind of adapter that is not read, by the names in it.

So a refusal can say what was given, in the same words in every command.

PEFT's folders and configuration: which file holds the weights, and how strongly they act.

PEFT writes a LoRA as a folder, `adapter_model.safetensors` with `adapter_config.json` next to it; diffusers writes the
same configuration into the file's metadata, as `lora_adapter_metadata`. Neither has an alpha in the tensors:

    LoRA         lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`    peft/tuners/lora/layer.py
    LoHa, LoKr   alpha / r, for a LoKr of two whole factors too               peft/tuners/loha, lokr/layer.py

`rank_pattern` and `alpha_pattern` give single modules another r or alpha. A key is a regular expression for the whole
name of a module or for its end after a dot, and the first that matches wins (`peft.utils.other.get_pattern_key`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyimg.cache.hashing import file_identity, hash_bytes
from hyimg.checkpoints.model_files import OTHER_ADAPTERS, unwrapped
from hyimg.checkpoints.safetensors_file import Header, TensorInfo, read_header
from hyimg.config.documents import DOCUMENT_BYTES, parse_json, read_bounded
from hyimg.errors import HyimgError, first_few
from hyimg.lora.files.formats import bare_module
from hyimg.lora.patterns import is_found

# The first that fits the start of a module's name, behind any prefix; from the tools' own files
_MARKS: tuple[tuple[str, str], ...] = (
    (r"joint_(transformer_)?blocks[._]\d", "Stable Diffusion 3"),
    (r"(input|output)_blocks[._]\d|middle_block[._]", "Stable Diffusion XL or 1.5"),
    (r"(down|up)_blocks[._]\d|mid_block[._]", "Stable Diffusion XL or 1.5"),
    (r"blocks[._]\d+[._](self_attn|cross_attn|ffn)[._]", "Wan"),
    (r"transformer_blocks[._]\d+[._](img_mlp[._]net|txt_mlp[._]net|img_mod[._]1|txt_mod[._]1)", "Qwen-Image"),
    (r"double_stream_blocks[._]\d|single_stream_blocks[._]\d", "HiDream"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"transformer_blocks[._]\d+[._](attn1|attn2|scale_shift)", "PixArt or LTX-Video"),
    (r"(layers|noise_refiner|context_refiner)[._]\d+[._](attention|feed_forward)", "Lumina 2 or Z-Image"),
    (r"layers[._]\d+[._](self_attn|mlp)[._]", "a language model"),
    (r"text_model[._]encoder|te\d?[._]|text_encoder", "a text encoder"),
)
_PREFIX = (
    r"(?:lora_(?:unet|transformer|prior_unet)_+|lycoris_|lora_(?=te)"
    r"|(?:(?:base_model\.model|model|diffusion_model|transformer|unet)\.)*)"
)


def looks_like(names: Iterable[str]) -> str | None:
    """The model that tensors of these names are for, None where nothing tells it."""
    names = [unwrapped(name) for name in names]
    for mark, model in _MARKS:
        pattern = re.compile(_PREFIX + f"(?:{mark})")
        if any(pattern.match(name) for name in names):
            return model
    return None


_KIND = [
    (re.compile(rf"(?P<stem>.+)\.(?:{ends})(?:\.default)?(?:\.weight)?"), kind)
    for ends, kind in OTHER_ADAPTERS
]
_BUTTERFLY_DIMENSIONS = 4
"""LyCORIS has one name for the blocks of OFT (blocks, rows, columns) and of BOFT (factors, blocks, rows, columns)."""


def other_kinds(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """The tensors of adapters of kinds that are not read, each with its kind; alpha and the like belong to it."""
    kinds: dict[str, str] = {}
    stems: dict[str, str] = {}
    for name, info in tensors.items():
        for pattern, kind in _KIND:
            if (found := pattern.fullmatch(name)) is not None:
                is_boft = kind == "OFT" and len(info.shape) == _BUTTERFLY_DIMENSIONS
                kinds[name] = "BOFT" if is_boft else kind
                if not kind.startswith("biases"):
                    stems[found["stem"]] = kinds[name]
                break
    for name in tensors:
        stem, _, end = name.rpartition(".")
        if stem in stems and end in ("alpha", "dora_scale", "rescale", "scalar", "weight", "bias"):
            kinds[name] = stems[stem]
    return kinds


def what_is_unmapped(tensors: Mapping[str, TensorInfo], unmapped: Sequence[str]) -> str:
    """What the tensors of a file that are not read are: `2 of OFT: ..., 1 of no module that a LoRA can adapt: ...`."""
    kinds = other_kinds(tensors)
    for name in unmapped:
        if "base_model.model." in name and name.endswith((".weight", ".bias")) and ".lora_" not in name:
            kinds.setdefault(name, "the model's own weights (PEFT's `modules_to_save` or `bias`)")
    groups: dict[str, list[str]] = {}
    for name in unmapped:
        groups.setdefault(kinds.get(name, "no module that a LoRA can adapt"), []).append(f"`{name}`")
    return "; ".join(f"{len(names)} of {kind}: {first_few(names)}" for kind, names in groups.items())


METADATA_KEY = "lora_adapter_metadata"
"""The metadata key under which diffusers writes PEFT's configuration (rank and alpha) as JSON."""
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLED_WEIGHTS_NAME = "adapter_model.bin"
# What diffusers' pipelines call the file in a folder
_DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"

_DEFAULT = 8.0
"""PEFT's r and alpha where a configuration does not say them."""
# The kinds whose tensors are read here, and what each calls its alpha
_ALPHA_NAMES = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
# Starting values that are taken out of the base's weights, so that the adapter alone is not the change of the model
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Variants of a LoRA whose product is not alpha/r * B @ A alone
_VARIANTS = (
    *("use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication", "arrow_config"),
    *("kasa_config", "monteclora_config"),
)


def is_peft_folder(path: Path) -> bool:
    """Whether a folder is an adapter that PEFT saved."""
    return any((path / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME, _PICKLED_WEIGHTS_NAME))


def weights_file(path: Path) -> Path:
    """The file with a LoRA's tensors: `path` itself, or what a folder (PEFT's, diffusers') has of one.

    Raises `HyimgError` for a folder without a LoRA file, or with several.
    """
    if not path.is_dir():
        return path
    for name in (WEIGHTS_NAME, _DIFFUSERS_NAME):
        if (path / name).is_file():
            return path / name
    files = _safetensors_in(path)
    if len(files) == 1:
        return files[0]
    if not files and (path / _PICKLED_WEIGHTS_NAME).is_file():
        read_header(path / _PICKLED_WEIGHTS_NAME)  # raises, since it is a pickle
    found = first_few([f"`{file.name}`" for file in files]) if files else "no safetensors file"
    raise HyimgError(
        f"`{path}` is a folder with {found}, and a LoRA is one file",
        hint=f"name the file; of a folder that PEFT saved, `{WEIGHTS_NAME}` is read",
    )


def config_file(weights: Path) -> Path | None:
    """The `adapter_config.json` that belongs to a LoRA file, there already or to be written, or None.

    It belongs to `adapter_model.safetensors`, or to the only safetensors file next to it.
    """
    path = weights.parent / CONFIG_NAME
    if not path.is_file():
        return None
    others = [file for file in _safetensors_in(weights.parent) if file.name != weights.name]
    return path if weights.name == WEIGHTS_NAME or not others else None


def lora_identity(path: Path, hash_weights: Callable[[Path], str]) -> str:
    """A hash of all that decides what a LoRA does: `hash_weights` of its file, and the configuration next to it."""
    weights = weights_file(path)
    config, digest = config_file(weights), hash_weights(weights)
    return digest if config is None else hash_bytes(f"{digest}{file_identity(config)}".encode())


def _safetensors_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.safetensors") if p.is_file() and not p.name.startswith("."))


@dataclass(frozen=True)
class PeftConfig:
    """A configuration; `where` says where it was found, for messages, `in_metadata` whether in the LoRA file."""

    where: str
    values: Mapping[str, Any]
    in_metadata: bool

    @staticmethod
    def find(header: Header) -> PeftConfig | None:
        """The configuration of a LoRA file: that in its metadata, or in the `adapter_config.json` next to it.

        Raises `HyimgError` for one that cannot be read, and for a kind of adapter or a variant that is not a plain
        update of the weights.
        """
        path = config_file(header.path)
        if METADATA_KEY in header.metadata:
            where = f"`{METADATA_KEY}` in the metadata of `{header.path}`"
            text: str | bytes = header.metadata[METADATA_KEY]
        elif path is not None:
            where = f"`{path}`"
            try:
                text = read_bounded(path, DOCUMENT_BYTES)
            except OSError as error:
                raise HyimgError(f"{where} cannot be read: {error.strerror or error}") from None
        else:
            return None
        values = {name.removeprefix("transformer."): v for name, v in parse_json(text, where).items()}
        config = PeftConfig(where, values, METADATA_KEY in header.metadata)
        config._check()
        return config

    def _check(self) -> None:
        kind = self.values.get("peft_type") or "LORA"
        if not isinstance(kind, str) or kind not in _ALPHA_NAMES:
            raise HyimgError(
                f"{self.where} is of PEFT's {kind}, which is not supported",
                hint="LoRA (with DoRA), LoHa and LoKr are read",
            )
        start = self.values.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise HyimgError(
                f"{self.where} has `init_lora_weights` `{start}`, which took the adapter's first values out of "
                "the base's weights: on the original model the adapter does something else",
                hint="save it with PEFT's `path_initial_model_for_weight_conversion`, which makes a plain LoRA of it",
            )
        if variants := [name for name in _VARIANTS if self.values.get(name)]:
            raise HyimgError(f"{self.where} has `{variants[0]}`, a variant of LoRA that is not supported")
        for name in ("rank_pattern", "alpha_pattern"):
            for key, value in self._pattern(name).items():
                self._number(f"{name}` of `{key}", value)
        for name in ("r", self._alpha_name):
            self._number(name, self.values.get(name))

    @property
    def _alpha_name(self) -> str:
        return _ALPHA_NAMES[self.values.get("peft_type") or "LORA"]

    @property
    def uses_dora(self) -> bool:
        return bool(self.values.get("use_dora"))

    def scale(self, stem: str, rank: int | None) -> float:
        """What the product of the module `stem` (its name in the file) is multiplied by.

        `rank` is that of the tensors, None for a LoKr of whole factors. Raises `HyimgError` where the configuration
        says another rank: it is then of another file.
        """
        alpha = self._of_module("alpha_pattern", self._alpha_name, stem)
        if alpha is None:
            alpha = _DEFAULT
        r = self._of_module("rank_pattern", "r", stem)
        if rank is not None and r is not None and r != rank:
            raise HyimgError(
                f"{self.where} says rank {r:g} for `{stem}`, whose tensors have rank {rank}",
                hint="the configuration is of another file: put the right one in its place",
            )
        r = rank or r or _DEFAULT
        return alpha / (math.sqrt(r) if self.values.get("use_rslora") else r)

    def _of_module(self, pattern: str, default: str, stem: str) -> float | None:
        # PEFT knew the module in the bare model, or by parts of the prefix
        names = (stem.removeprefix("base_model.model."), bare_module(stem))
        for key, value in self._pattern(pattern).items():
            if any(_matches(key, name) for name in names):
                return self._number(pattern, value)
        return self._number(default, self.values.get(default))

    def _pattern(self, name: str) -> Mapping[str, Any]:
        pattern = self.values.get(name) or {}
        if not isinstance(pattern, dict):
            raise HyimgError(f"{self.where} has the `{name}` {pattern!r}, which is not a JSON object")
        return pattern

    def _number(self, name: str, value: Any) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise HyimgError(f"{self.where} has the `{name}` {value!r}, which is not a number")
        return float(value)


def _matches(key: str, module: str) -> bool:
    try:
        return is_found(rf"\A(.*\.)?({key})$", module)
    except re.error:
        return module == key or module.endswith(f".{key}")


def strength_unknown(header: Header, keys: Iterable[str]) -> str | None:
    """A warning for a file with PEFT's own names (`keys` are its adapters without an alpha) and no configuration."""
    if not any("base_model.model." in key for key in keys):
        return None
    there = (header.path.parent / CONFIG_NAME).is_file()
    what = (
        f"`{CONFIG_NAME}` in its folder is not read, since there are several safetensors files"
        if there
        else f"there is no `{CONFIG_NAME}` next to it"
    )
    return (
        f"`{header.path}` has PEFT's names (`base_model.model.`) and no alpha, and {what}: it is applied as if alpha "
        "were the rank (with alpha 16 and rank 4 that is 4 times too weak); keep the two files of PEFT's folder "
        f"together, as `{WEIGHTS_NAME}` and `{CONFIG_NAME}`"
    )
