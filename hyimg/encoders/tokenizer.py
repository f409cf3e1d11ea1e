"""The Qwen2.5 tokenizer, and the prompt template that HunyuanImage-2.1 was trained with. No torch, no transformers.

The vocabulary has three file formats: `tokenizer.json` (the tokenizers library), `vocab.json` + `merges.txt`
(transformers' older files), and `*.tiktoken` (lines of "base64 of a token, its rank"; Qwen's first release, and the
PyPI package dashscope). All become the same `Vocabulary`, so ids and identity do not depend on the format. The rest is
always built here: NFC, Qwen's split pattern, byte-level BPE, and special tokens, which are recognised in the raw text.

The DiT gets the tokens of the prompt and the closing `<|im_end|>`; the instruction before them only steers the language
model, so its tokens are dropped from the output.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.util
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

from tokenizers import AddedToken, Encoding, Regex, Tokenizer, models, normalizers, pre_tokenizers

from hyimg.checkpoints.model_files import TOKENIZER
from hyimg.config.documents import parse_json, read_bounded, read_text
from hyimg.errors import HyimgError

# Size limit of each file; Qwen's `tokenizer.json`, the largest, has 11 MB
_VOCABULARY_BYTES = 100_000_000

# Their ids follow those of the byte pairs, in this order: from 151643 in the real vocabulary
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
    """Tokens (spelt in `byte_alphabet`) with their ids, merges by rank, and special tokens with their ids."""

    ids: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    special: Mapping[str, int]


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a tokenizer file, or of a folder with one of the three formats.

    Raises `HyimgError` if there is none or it cannot be read.
    """
    found = path if path.is_file() else find_vocabulary(path)
    if found is None:
        raise HyimgError(
            f"there is no Qwen tokenizer in `{path}`",
            hint="give a folder with `tokenizer.json`, or with `vocab.json` and `merges.txt`, "
            "or the path of a `qwen.tiktoken` file",
        )
    try:
        if found.suffix == ".tiktoken":
            return _consistent(_from_tiktoken(found))
        if found.name == "vocab.json":
            return _consistent(_from_vocab_and_merges(found, found.with_name("merges.txt")))
        return _consistent(_from_tokenizer_json(found))
    except OSError as error:
        raise HyimgError(
            f"tokenizer file `{error.filename or found}` cannot be read: {error.strerror or error}"
        ) from None
    except HyimgError as error:
        raise HyimgError(f"`{found}` is not a BPE tokenizer file like Qwen's: {error.message}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise HyimgError(f"`{found}` is not a BPE tokenizer file like Qwen's") from None


def _consistent(vocabulary: Vocabulary) -> Vocabulary:
    """The vocabulary. Raises ValueError for one that the tokenizers library cannot build."""
    ids = vocabulary.ids
    if not ids or not all(0 <= i < 2**32 for i in (*ids.values(), *vocabulary.special.values())):
        raise ValueError("an id does not fit in 32 bits")
    for left, right in vocabulary.merges:
        if not (left in ids and right in ids and left + right in ids):
            raise ValueError(f"a merge of {left!r} and {right!r}, which are not tokens")
    return vocabulary


def find_vocabulary(folder: Path) -> Path | None:
    """The tokenizer file of a folder, in the first format found, or None."""
    if (folder / "tokenizer.json").is_file():
        return folder / "tokenizer.json"
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return folder / "vocab.json"
    return next(iter(sorted(folder.glob("*.tiktoken"))), None)


def _from_tokenizer_json(path: Path) -> Vocabulary:
    content: dict[str, Any] = parse_json(read_bounded(path, _VOCABULARY_BYTES), "it")
    model = content["model"]
    if model["type"] != "BPE":
        raise ValueError(model["type"])
    # "left right" up to tokenizers 0.19, pairs since then
    merges = [_pair(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    special = {str(token["content"]): int(token["id"]) for token in content["added_tokens"]}
    ids = {str(token): int(i) for token, i in model["vocab"].items() if token not in special}
    return Vocabulary(ids, merges, special)


def _from_vocab_and_merges(vocab: Path, merges: Path) -> Vocabulary:
    content = parse_json(read_bounded(vocab, _VOCABULARY_BYTES), "it")
    ids = {str(token): int(i) for token, i in content.items()}
    # The first line may be a comment with the version; a later line that starts with "#" is a merge
    lines = read_text(merges, _VOCABULARY_BYTES).split("\n")
    if lines[0].startswith("#version"):
        del lines[0]
    return Vocabulary(ids, [_pair(line.split(" ")) for line in lines if line], special_after(ids))


def _pair(parts: Sequence[str]) -> tuple[str, str]:
    left, right = parts
    return left, right


def _from_tiktoken(path: Path) -> Vocabulary:
    ranks: dict[bytes, int] = {}
    for line in read_bounded(path, _VOCABULARY_BYTES).splitlines():
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
    """The two tokens that `token` was merged from: what is left after all merges of lower rank.

    Raises `ValueError` if more than two parts are left, which is impossible in a BPE vocabulary.
    """
    rank = ranks[token]

    def is_lower(part: bytes) -> bool:
        return ranks.get(part, rank) < rank

    cuts = [i for i in range(1, len(token)) if is_lower(token[:i]) and is_lower(token[i:])]
    if len(cuts) == 1:  # the common case, and fast
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
    """A printable character for each byte, as in GPT-2's vocabulary files and all later ones.

    Printable Latin-1 maps to itself, the other 68 bytes to the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return tuple(chr(byte if byte in printable else 0x100 + others.index(byte)) for byte in range(256))


TEMPLATE_PREFIX = (
    "<|im_start|>system\n"
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n"
)
TEMPLATE_SUFFIX = "<|im_end|>"

# Tokens of `TEMPLATE_PREFIX`; as many are dropped if a prompt's leading newline merges with the prefix's last one
TEMPLATE_TOKENS = 34

# The reference tool's limit; Tencent's code has 1000 + 34, ComfyUI none
MAX_TOKENS = 1024 + TEMPLATE_TOKENS


@dataclass(frozen=True)
class Tokenized:
    """Token ids of one text, and how many more were cut off at the limit."""

    ids: tuple[int, ...]
    num_cut: int = 0


def fill_template(prompt: str) -> str:
    """The text that is tokenized; braces and special tokens in the prompt are kept."""
    return f"{TEMPLATE_PREFIX}{prompt}{TEMPLATE_SUFFIX}"


def truncate(ids: Sequence[int], limit: int = MAX_TOKENS) -> Tokenized:
    """The first `limit` ids. A truncated prompt also loses its closing token, as in the reference tool."""
    return Tokenized(tuple(ids[:limit]), max(0, len(ids) - limit))


HUB_REPOSITORY = TOKENIZER.repository

# Words with a leading space or punctuation, single digits, runs of punctuation, line ends, other whitespace
# (`tokenizer.json` of the repository above, pre_tokenizer)
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

COUNTED_CHARS = 65_536
"""Prompts (with template) of at most this many characters are tokenized completely."""

# Each word is tokenized on its own, and its end does not depend on what follows the next word
_NUM_SETTLING_WORDS = 3


class QwenTokenizer:
    """Prompts to token ids. Raises `HyimgError` for a vocabulary that cannot be Qwen's.

    `source` says where the vocabulary was read, for messages.
    """

    def __init__(self, vocabulary: Vocabulary, source: str) -> None:
        self.source = source
        self._vocabulary = vocabulary
        self._tokenizer = build_tokenizer(vocabulary)
        num_tokens = len(self._ids(TEMPLATE_PREFIX))
        if num_tokens != TEMPLATE_TOKENS:
            raise HyimgError(
                f"the tokenizer in `{source}` is not Qwen2.5's: the prompt template has {num_tokens} tokens, "
                f"not {TEMPLATE_TOKENS}",
                hint=f"use the tokenizer files of `{HUB_REPOSITORY}`",
            )

    @property
    def num_tokens(self) -> int:
        """The highest id plus one: the rows that an embedding needs at least."""
        return 1 + max(*self._vocabulary.ids.values(), *self._vocabulary.special.values())

    @cached_property
    def identity(self) -> str:
        """sha256 over vocabulary, merges and special tokens; the same for every file format."""
        vocabulary = self._vocabulary
        content = json.dumps(
            [sorted(vocabulary.ids.items()), list(vocabulary.merges), sorted(vocabulary.special.items())]
        )
        return hashlib.sha256(content.encode()).hexdigest()

    def encode(self, prompt: str) -> Tokenized:
        """The ids of `prompt` in the template, at most 1024 + 34.

        A prompt of more than `COUNTED_CHARS` is tokenized only as far as these ids need, and `num_cut` counts only that
        part.
        """
        text, num_chars = fill_template(prompt), COUNTED_CHARS
        while num_chars < len(text):
            begin = self._encode(text[:num_chars])
            if len(set(begin.word_ids[MAX_TOKENS:])) > _NUM_SETTLING_WORDS:
                return truncate(begin.ids)
            num_chars *= 2
        return truncate(self._ids(text))

    def _ids(self, text: str) -> list[int]:
        return self._encode(text).ids

    def _encode(self, text: str) -> Encoding:
        # A lone surrogate, which a JSON caption can contain, has no UTF-8 form
        text = text.encode("utf-8", "replace").decode("utf-8")
        return self._tokenizer.encode(text, add_special_tokens=False)


class PromptRows(Sequence[tuple[int, ...]]):
    """The ids of prompts, tokenized on access: the ids of 100,000 captions would take gigabytes.

    `lengths` and `num_cut` (as in `Tokenized`) are stored for all.
    """

    def __init__(self, tokenizer: QwenTokenizer, prompts: Sequence[str]) -> None:
        self._tokenizer, self._prompts = tokenizer, prompts
        self.lengths, self.num_cut = array("I"), array("I")
        for prompt in prompts:
            tokenized = tokenizer.encode(prompt)
            self.lengths.append(len(tokenized.ids))
            self.num_cut.append(tokenized.num_cut)

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._tokenizer.encode(self._prompts[index]).ids


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """A tokenizer of the `tokenizers` library with the ids of Qwen2.5's own.

    Raises `HyimgError` if the special tokens' ids do not follow those of the byte pairs.
    """
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocabulary.ids), merges=list(vocabulary.merges)))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokens = sorted(vocabulary.special, key=vocabulary.special.__getitem__)
    # Recognised in the raw text, before normalization and splitting
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
    for token, i in vocabulary.special.items():
        if tokenizer.token_to_id(token) != i:
            raise HyimgError(f"the tokenizer's special token `{token}` cannot have id {i}")
    return tokenizer


def load_qwen_tokenizer(
    tokenizer: Path | None, encoder_path: Path | None, *, download: bool = True
) -> QwenTokenizer:
    """The tokenizer from the first of these that exists:

    `tokenizer` (a file, a folder, or the reference tool's cache folder; if given, nothing else is tried), the files
    next to the encoder, the tiktoken file in the PyPI package dashscope, the hub's `Qwen/Qwen2.5-VL-7B-Instruct`
    (cached, or downloaded unless `download` is false).

    Raises `HyimgError` if none is found, or the first one found is not Qwen2.5's.
    """
    path = _given(tokenizer) or _beside(encoder_path) or _in_dashscope() or _from_hub(download)
    return QwenTokenizer(read_vocabulary(path), str(path))


def _given(tokenizer: Path | None) -> Path | None:
    """`tokenizer`, or the folder in it where the reference tool's cache has Qwen's files."""
    if tokenizer is None:
        return None
    cached = tokenizer / HUB_REPOSITORY.replace("/", "_")
    return cached if cached.is_dir() and find_vocabulary(tokenizer) is None else tokenizer


def _beside(encoder_path: Path | None) -> Path | None:
    """The tokenizer in the encoder's folder, in its subfolder `tokenizer`, or (diffusers) in `tokenizer` next to it."""
    if encoder_path is None:
        return None
    folder = encoder_path if encoder_path.is_dir() else encoder_path.parent
    folders = [folder, folder / "tokenizer"]
    if encoder_path.is_dir():
        folders.append(folder.parent / "tokenizer")
    return next((found for f in folders if (found := find_vocabulary(f)) is not None), None)


def _in_dashscope() -> Path | None:
    """Found without importing the package, which would take seconds."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "resources" / "qwen.tiktoken"
    return path if path.is_file() else None


def _from_hub(download: bool) -> Path:
    from huggingface_hub import hf_hub_download

    def fetch(*, local_files_only: bool) -> Path:
        return Path(hf_hub_download(HUB_REPOSITORY, TOKENIZER.path, local_files_only=local_files_only))

    # The cache first: a hub that does not answer takes half a minute to fail. Both calls may raise errors of several
    # libraries
    with contextlib.suppress(Exception):
        return fetch(local_files_only=True)
    if not download:
        raise HyimgError(
            "no Qwen tokenizer on this machine",
            hint="install the extra with `pip install 'hyimg[tokenizer]'`, or give `--tokenizer FOLDER`",
        )
    try:
        return fetch(local_files_only=False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HyimgError(
            "no Qwen tokenizer: none was given, none is next to the text encoder, the package `dashscope` "
            f"is not installed, and `{HUB_REPOSITORY}` cannot be downloaded ({reason})",
            hint="install the extra with `pip install 'hyimg[tokenizer]'`, or give `--tokenizer FOLDER`",
        ) from error
