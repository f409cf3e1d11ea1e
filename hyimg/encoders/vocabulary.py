"""Qwen2.5's byte-pair vocabulary, read from each form in which it is given away. No torch.

Three forms: `tokenizer.json` (the tokenizers library), `vocab.json` + `merges.txt` (transformers' older
files), `*.tiktoken` (lines "base64 of a token, its rank"; Qwen's own first release, and the PyPI package
dashscope). All end as the same `Vocabulary`, so that the source makes no difference to ids or identity.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from hyimg.errors import HyimgError

# Their ids follow those of the byte pairs, in this order: 151643 on in the real vocabulary
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)


@dataclass(frozen=True)
class Vocabulary:
    """Byte pairs (spelt in `byte_alphabet`) with their ids, their merges in order, the special tokens."""

    ids: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    special: Mapping[str, int]


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary in a tokenizer file, or in a folder that holds one of the three forms.

    Raises `HyimgError` where there is none or it cannot be read.
    """
    found = path if path.is_file() else find_vocabulary(path)
    if found is None:
        raise HyimgError(
            f"there is no Qwen tokenizer in `{path}`",
            hint="give a folder that holds `tokenizer.json`, or `vocab.json` and `merges.txt`, "
            "or the path of a `qwen.tiktoken` file",
        )
    try:
        if found.suffix == ".tiktoken":
            return _from_tiktoken(found)
        if found.name == "vocab.json":
            return _from_vocab_and_merges(found, found.with_name("merges.txt"))
        return _from_tokenizer_json(found)
    except OSError as error:
        raise HyimgError(f"tokenizer file `{found}` cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise HyimgError(f"`{found}` is not a byte-pair tokenizer file as Qwen's is") from None


def find_vocabulary(folder: Path) -> Path | None:
    """The tokenizer file of a folder: the first form that is there, or None."""
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return folder / "vocab.json"
    return next(iter(sorted(folder.glob("*.tiktoken"))), None)


def _from_tokenizer_json(path: Path) -> Vocabulary:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    if model["type"] != "BPE":
        raise ValueError(model["type"])
    # Written as "left right" up to tokenizers 0.19, as pairs since
    merges = [_pair(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    special = {str(token["content"]): int(token["id"]) for token in content["added_tokens"]}
    ids = {str(token): int(i) for token, i in model["vocab"].items() if token not in special}
    return Vocabulary(ids, merges, special)


def _from_vocab_and_merges(vocab: Path, merges: Path) -> Vocabulary:
    ids = {str(token): int(i) for token, i in json.loads(vocab.read_text(encoding="utf-8")).items()}
    # A comment on the first line gives the version; a later line that starts with "#" is a merge
    lines = merges.read_text(encoding="utf-8").split("\n")
    if lines[0].startswith("#version"):
        del lines[0]
    return Vocabulary(ids, [_pair(line.split(" ")) for line in lines if line], special_after(ids))


def _pair(parts: Sequence[str]) -> tuple[str, str]:
    left, right = parts
    return left, right


def _from_tiktoken(path: Path) -> Vocabulary:
    ranks: dict[bytes, int] = {}
    for line in path.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token, validate=True)] = int(rank)
    printable = {token: "".join(map(byte_alphabet().__getitem__, token)) for token in ranks}
    merges = [
        (printable[left], printable[right])
        for token in sorted(ranks, key=ranks.__getitem__)
        if len(token) > 1
        for left, right in [_last_merge(token, ranks)]
    ]
    ids = {printable[token]: rank for token, rank in ranks.items()}
    return Vocabulary(ids, merges, special_after(ids))


def _last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that `token` was merged from: where merging by lower ranks only comes to a stop.

    Raises `ValueError` where more than two parts are left, which no byte-pair vocabulary has.
    """
    rank = ranks[token]

    def is_lower(part: bytes) -> bool:
        return ranks.get(part, rank) < rank

    cuts = [i for i in range(1, len(token)) if is_lower(token[:i]) and is_lower(token[i:])]
    if len(cuts) == 1:  # the common case, and the only one that is quick
        return token[: cuts[0]], token[cuts[0] :]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pair_ranks = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
        lowest = min(pair_ranks)
        if lowest >= rank:
            raise ValueError(f"{token!r} does not follow from lower ranks")
        i = pair_ranks.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def special_after(ids: Mapping[str, int]) -> dict[str, int]:
    """Qwen's special tokens on the ids that follow those of the byte pairs."""
    first = max(ids.values()) + 1
    return {token: first + i for i, token in enumerate(SPECIAL_TOKENS)}


@lru_cache
def byte_alphabet() -> tuple[str, ...]:
    """A printable character for each byte, as GPT-2's vocabulary files and all after it write bytes.

    Printable Latin-1 stands for itself; the other 68 bytes take the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return tuple(chr(byte if byte in printable else 0x100 + others.index(byte)) for byte in range(256))
