"""The files in which the model is given away, and where. No torch.

Repositories and paths are those of the hub's own file listings; sizes are what those show, rounded, for people. A
download takes the exact ones from the hub.
"""

from __future__ import annotations

from dataclasses import dataclass

_TENCENT = "tencent/HunyuanImage-2.1"
_COMFY = "Comfy-Org/HunyuanImage_2.1_ComfyUI"


@dataclass(frozen=True)
class ReleasedFile:
    """A file of a repository; `option` is what takes it, None for one that is found beside another.

    `about_bytes` is None where no listing was at hand.
    """

    repository: str
    path: str
    option: str | None
    about_bytes: float | None
    what: str

    @property
    def name(self) -> str:
        """The file's own name, under which it lies in a model folder."""
        return self.path.rpartition("/")[2]


TOKENIZER = ReleasedFile(
    "Qwen/Qwen2.5-VL-7B-Instruct", "tokenizer.json", None, None, "Qwen's tokenizer, beside its encoder"
)

_DIT = ReleasedFile(_TENCENT, "dit/hunyuanimage2.1.safetensors", "dit", 34.9e9, "the DiT, bf16")
_DIT_FP8 = (
    ReleasedFile(_TENCENT, "dit/hunyuanimage2.1_fp8.safetensors", "dit", 17.9e9, "the DiT in scaled fp8"),
    ReleasedFile(
        _TENCENT, "dit/hunyuanimage2.1_fp8_scale.safetensors", None, 45.6e3, "its scales, beside it"
    ),
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
"""The files of a model folder by what its DiT is; no two have one name."""
