"""Where the files of a model lie in a folder of their own. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelFolder:
    """The files of a model folder, under the names that the guide's downloads have."""

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
        """Lies beside the text encoder, where it is found without an option."""
        return self.directory / "tokenizer.json"

    def files(self) -> dict[str, Path]:
        """The files by the option that takes each."""
        return {"dit": self.dit, "text_encoder": self.text_encoder, "byt5": self.byt5, "vae": self.vae}
