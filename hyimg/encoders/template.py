"""The prompt template that HunyuanImage-2.1 was trained with, and its length limit. No torch.

The DiT sees the tokens of the prompt and of the closing `<|im_end|>`; the instruction before them only
steers the language model, so its tokens are dropped from the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TEMPLATE_PREFIX = (
    "<|im_start|>system\n"
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n"
)
TEMPLATE_SUFFIX = "<|im_end|>"

# Of `TEMPLATE_PREFIX`, and dropped also where a prompt's leading newline fuses with the prefix's last one
TEMPLATE_TOKENS = 34

# The reference tool's limit. Tencent's code stops at 1000 + 34, ComfyUI has none
MAX_TOKENS = 1024 + TEMPLATE_TOKENS


@dataclass(frozen=True)
class Tokenized:
    """Token ids of one text, and how many more there were before it was cut to its limit."""

    ids: tuple[int, ...]
    num_cut: int = 0


def fill_template(prompt: str) -> str:
    """The whole text that is tokenized; braces and special tokens in the prompt stay as they are."""
    return f"{TEMPLATE_PREFIX}{prompt}{TEMPLATE_SUFFIX}"


def truncate(ids: Sequence[int], limit: int = MAX_TOKENS) -> Tokenized:
    """The first `limit` ids. A prompt that is cut loses its closing token too, as in the reference tool."""
    return Tokenized(tuple(ids[:limit]), max(0, len(ids) - limit))
