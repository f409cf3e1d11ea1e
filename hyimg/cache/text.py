"""The text cache: for a prompt, what the DiT is conditioned on. Equal prompts are stored once.

    store = TextStore(cache_dir / "text", encoder_identity, index=Index(cache_dir))
    store.write("a cat", TextEntry(text_TD, byt5_SE))
    entry = store.read("a cat")

Shapes: T text tokens, D text width, S glyph tokens, E byT5 width; valid tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hyimg.cache.entries import EntryStore
from hyimg.errors import RunError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TextEntry:
    """`text_TD` and, where the prompt quotes text, `byt5_SE`; in the precision the encoders gave them."""

    text_TD: torch.Tensor
    byt5_SE: torch.Tensor | None = None


class TextStore(EntryStore):
    kind = "text"
    command = "hyimg cache-text"
    models = "`--text_encoder` and `--byt5`"

    def key(self, prompt: str) -> str:
        return self.key_of({"prompt": prompt})

    def write(self, prompt: str, entry: TextEntry) -> None:
        """Writes an entry as it is (float32, bfloat16 or float16).

        Raises `RunError` where a value is not finite, and as `EntryStore.write_raw`.
        """
        import torch

        from hyimg.cache.tensors import to_raw

        tensors = {"text": entry.text_TD}
        if entry.byt5_SE is not None:
            tensors["byt5"] = entry.byt5_SE
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise RunError(
                    f"the {name} encoder gave values that are not finite for the prompt `{prompt}`"
                )
        self.write_raw(self.key(prompt), {name: to_raw(t) for name, t in tensors.items()}, {"prompt": prompt})

    def read(self, prompt: str) -> TextEntry:
        """The entry of a prompt, on the CPU; raises as `EntryStore.read_raw`."""
        from hyimg.cache.tensors import from_raw

        raw = self.read_raw(self.key(prompt))
        return TextEntry(from_raw(raw["text"]), from_raw(raw["byt5"]) if "byt5" in raw else None)
