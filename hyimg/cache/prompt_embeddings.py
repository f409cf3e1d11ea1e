"""The text cache: the embeddings of prompts, which the DiT is conditioned on. Equal prompts are stored once.

    store = TextStore(cache_dir / "text", encoder_identity, index=Index(cache_dir))
    store.write("a cat", PromptEmbedding(text_TD, byt5_SE))
    entry = store.read("a cat")

Shapes: T text tokens, D text width, S glyph tokens, E byT5 width; valid tokens only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hyimg.cache.entries import EntryStore
from hyimg.errors import RunError

if TYPE_CHECKING:
    import torch


class PromptEmbedding(NamedTuple):
    """What the DiT is conditioned on for one prompt: valid tokens only, on the CPU.

    `text_TD` are Qwen's hidden states (float32 or bfloat16), `byt5_SE` byT5's of the quoted text (float32 or float16;
    None if the prompt quotes nothing).
    """

    text_TD: torch.Tensor
    byt5_SE: torch.Tensor | None = None


# What `model.json` says: the dtype in which the text encoder computed, and a hash of the encoders without the dtypes
DTYPE, ENCODERS = "text_encoder_dtype", "encoders"


class TextStore(EntryStore):
    kind = "text"
    command = "hyimg cache-text"
    models = "`--text_encoder` and `--byt5`"
    choice = "give `--text_encoder` and `--byt5`, and `--fp8_vl` for the entries that were made with it"
    train_flag = "--cache_text_encoder_outputs"

    @classmethod
    def dtypes(cls, folder: Path | str) -> dict[str, str]:
        """identity -> the dtype in which the text encoder computed its entries, "bf16" or "fp32".

        Stores written before this was recorded are bf16.
        """
        return {identity: about.get(DTYPE, "bf16") for identity, about in cls.known_models(folder).items()}

    @property
    def dtype(self) -> str:
        """The dtype of this store, as `dtypes`."""
        return self.dtypes(self.folder).get(self.model_identity, "bf16")

    def key(self, prompt: str) -> str:
        return self.key_of({"prompt": prompt})

    def write(self, prompt: str, embedding: PromptEmbedding) -> None:
        """Writes an entry in the dtypes that it has (float32, bfloat16 or float16).

        Raises `RunError` for a value that is not finite, and as `EntryStore.write_tensors`.
        """
        import torch

        tensors = {"text": embedding.text_TD}
        if embedding.byt5_SE is not None:
            tensors["byt5"] = embedding.byt5_SE
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise RunError(
                    f"the {name} encoder gave values that are not finite for the prompt `{prompt}`"
                )
        self.write_tensors(self.key(prompt), tensors, {"prompt": prompt})

    def read(self, prompt: str) -> PromptEmbedding:
        """The entry of a prompt, on the CPU; raises as `EntryStore.read_tensors`."""
        tensors = self.read_tensors(self.key(prompt), {"text": 2}, {"byt5": 2})
        return PromptEmbedding(tensors["text"], tensors.get("byt5"))
