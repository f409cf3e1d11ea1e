"""Model files: their kind by tensor names, the released files on the hub, and a folder that holds them. No torch.

Repositories, paths and rounded sizes are from the hub's file listings; downloads ask the hub for exact sizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ModelKind = Literal["dit", "vae", "qwen", "byt5", "lora", "unknown"]

# Unsupported kinds of adapters, by the ends of their tensors' names: LyCORIS's (`lycoris/modules/*.py`,
# `weight_list`), then PEFT's (`peft/tuners/*/layer.py`, `adapter_layer_names`)
OTHER_ADAPTERS: tuple[tuple[str, str], ...] = (
    (r"diff|diff_b", "full weights (LyCORIS's `full`)"),
    (r"w_norm|b_norm", "norm layers (LyCORIS's `train_norm`)"),
    (r"oft_blocks|oft_diag|oft_[rR]", "OFT"),
    (r"boft_[RsS]", "BOFT"),
    (r"a1\.weight|a2\.weight|b1\.weight|b2\.weight|bm\.weight|glora_\w+", "GLoRA"),
    (r"on_input|ia3_l", "IA3"),
    (r"lora_mid\.weight", "a LoRA of convolutions (Tucker decomposition)"),
    (r"lora_E", "AdaLoRA"),
    (r"vera_lambda_[bd]", "VeRA"),
    (r"lora_B\.bias|lora_B\.\w+\.bias", "biases (PEFT's `lora_bias`)"),
)

# Patterns that occur in the names of one kind of file only; the first kind that matches is taken
_MARKS: tuple[tuple[ModelKind, re.Pattern[str]], ...] = (
    (
        "lora",
        re.compile(
            r"\.lora_down\.|\.lora_up\.|\.lora_[AB]|lora\.(down|up)\.|\.hada_w1_|\.lokr_w1"
            rf"|\.({'|'.join(ends for ends, _ in OTHER_ADAPTERS)})(\.default)?(\.weight)?$"
        ),
    ),
    ("dit", re.compile(r"double_blocks\.|single_blocks\.|single_transformer_blocks\.")),
    ("vae", re.compile(r"encoder\.down|decoder\.up|decoder\.mid")),
    ("byt5", re.compile(r"encoder\.block\.")),
    ("qwen", re.compile(r"layers\.0\.self_attn\.q_proj\.")),
)

KIND_NAMES: Mapping[ModelKind, str] = {
    "dit": "a diffusion transformer (DiT)",
    "vae": "a VAE",
    "qwen": "a Qwen2.5-VL text encoder",
    "byt5": "a byT5 text encoder",
    "lora": "a LoRA",
    "unknown": "a file of an unknown kind",
}

# Name parts that torch.compile, DistributedDataParallel, FSDP and checkpoint_wrapper insert
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def identify(names: Iterable[str]) -> ModelKind:
    """The kind of model that has tensors of these names."""
    names = list(names)
    for kind, marks in _MARKS:
        if any(marks.search(name) for name in names):
            return kind
    return "unknown"


def unwrapped(name: str) -> str:
    """Removes wrappers' name parts (`_orig_mod.`, `module.`) from a tensor's name."""
    return _WRAPPERS.sub("", name)


_TENCENT = "tencent/HunyuanImage-2.1"
_COMFY = "Comfy-Org/HunyuanImage_2.1_ComfyUI"


@dataclass(frozen=True)
class ReleasedFile:
    """A file of a repository and the option that takes it; None for a file that is found next to another.

    `about_bytes` is a rounded size, None if unknown.
    """

    repository: str
    path: str
    option: str | None
    about_bytes: float | None
    what: str

    @property
    def name(self) -> str:
        """Its name in a model folder."""
        return self.path.rpartition("/")[2]


TOKENIZER = ReleasedFile("Qwen/Qwen2.5-VL-7B-Instruct", "tokenizer.json", None, None, "Qwen's tokenizer")

_DIT = ReleasedFile(_TENCENT, "dit/hunyuanimage2.1.safetensors", "dit", 34.9e9, "the DiT, bf16")
_DIT_FP8 = (
    ReleasedFile(_TENCENT, "dit/hunyuanimage2.1_fp8.safetensors", "dit", 17.9e9, "the DiT in scaled fp8"),
    ReleasedFile(_TENCENT, "dit/hunyuanimage2.1_fp8_scale.safetensors", None, 45.6e3, "the fp8 DiT's scales"),
)
_DIT_DISTILLED = ReleasedFile(
    _TENCENT, "dit/hunyuanimage2.1-distilled.safetensors", "dit", 34.9e9, "the distilled DiT, bf16: 8 steps"
)
_OTHERS = (
    ReleasedFile(
        _COMFY,
        "split_files/text_encoders/qwen_2.5_vl_7b.safetensors",
        "text_encoder",
        16.6e9,
        "Qwen2.5-VL, bf16",
    ),
    TOKENIZER,
    ReleasedFile(
        _COMFY,
        "split_files/text_encoders/byt5_small_glyphxl_fp16.safetensors",
        "byt5",
        439e6,
        "the glyph byT5, fp16",
    ),
    ReleasedFile(
        _COMFY, "split_files/vae/hunyuan_image_2.1_vae_fp16.safetensors", "vae", 811e6, "the VAE, fp16"
    ),
)

VARIANTS: dict[str, tuple[ReleasedFile, ...]] = {
    "bf16": (_DIT, *_OTHERS),
    "fp8": (*_DIT_FP8, *_OTHERS),
    "distilled": (_DIT_DISTILLED, *_OTHERS),
}
"""The files of a model folder, by the variant of its DiT; their names are unique."""


@dataclass(frozen=True)
class ModelFolder:
    """The files of a model folder, named as in the downloads."""

    directory: Path

    @property
    def dit(self) -> Path:
        return self.directory / "hunyuanimage2.1.safetensors"

    @property
    def text_encoder(self) -> Path:
        return self.directory / "qwen_2.5_vl_7b.safetensors"

    @property
    def byt5(self) -> Path:
        return self.directory / "byt5_small_glyphxl_fp16.safetensors"

    @property
    def vae(self) -> Path:
        return self.directory / "hunyuan_image_2.1_vae_fp16.safetensors"

    @property
    def tokenizer(self) -> Path:
        """Next to the text encoder, where it is found without an option."""
        return self.directory / "tokenizer.json"

    def files(self) -> dict[str, Path]:
        """The files by the option that takes each."""
        return {"dit": self.dit, "text_encoder": self.text_encoder, "byt5": self.byt5, "vae": self.vae}
