"""The Qwen2.5 tokenizer: found, built and applied to prompts in the template. No torch, no transformers.

Whatever file the vocabulary comes from, the rest is built here: NFC, Qwen's split pattern, byte-level
pairs, special tokens recognised in the raw text (also where a prompt spells them out).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from hyimg.encoders.template import (
    TEMPLATE_PREFIX,
    TEMPLATE_TOKENS,
    Tokenized,
    fill_template,
    truncate,
)
from hyimg.encoders.vocabulary import Vocabulary, find_vocabulary, read_vocabulary
from hyimg.errors import HyimgError
from hyimg.model.release import TOKENIZER

HUB_REPOSITORY = TOKENIZER.repository

# Words with a leading space or sign, single digits, runs of signs, line ends, other white space
# (`tokenizer.json` of the repository above, pre_tokenizer)
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


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
                f"the tokenizer in `{source}` is not Qwen2.5's: the prompt template has {num_tokens} tokens "
                f"in it, not {TEMPLATE_TOKENS}",
                hint=f"use the tokenizer files of `{HUB_REPOSITORY}`",
            )

    @property
    def num_tokens(self) -> int:
        """One more than the highest id: an embedding needs at least so many rows."""
        return 1 + max(*self._vocabulary.ids.values(), *self._vocabulary.special.values())

    @cached_property
    def identity(self) -> str:
        """sha256 over the vocabulary, its merges and special tokens: the same from every file form."""
        vocabulary = self._vocabulary
        content = json.dumps(
            [sorted(vocabulary.ids.items()), list(vocabulary.merges), sorted(vocabulary.special.items())]
        )
        return hashlib.sha256(content.encode()).hexdigest()

    def encode(self, prompt: str) -> Tokenized:
        """The ids of `prompt` in the template, at most 1024 + 34 of them."""
        return truncate(self._ids(fill_template(prompt)))

    def _ids(self, text: str) -> list[int]:
        # A lone surrogate, which a JSON caption can hold, has no UTF-8 form
        text = text.encode("utf-8", "replace").decode("utf-8")
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """A `tokenizers` byte-pair encoder that gives the ids of Qwen2.5's own tokenizer.

    Raises `HyimgError` where the special tokens' ids do not follow those of the byte pairs.
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
            raise HyimgError(f"the tokenizer's special token `{token}` cannot have the id {i}")
    return tokenizer


def load_qwen_tokenizer(
    tokenizer: Path | None, encoder_path: Path | None, *, download: bool = True
) -> QwenTokenizer:
    """The tokenizer from the first of these that is there:

    `tokenizer` (a file, a folder, or the reference tool's cache folder; and then nothing else), the files
    beside the encoder, the ranks file in the PyPI package dashscope, the hub's
    `Qwen/Qwen2.5-VL-7B-Instruct` (cached, then downloaded unless `download` is false).

    Raises `HyimgError` where none is found, or the first one found is not Qwen2.5's.
    """
    path = _given(tokenizer) or _beside(encoder_path) or _in_dashscope() or _from_hub(download)
    return QwenTokenizer(read_vocabulary(path), str(path))


def _given(tokenizer: Path | None) -> Path | None:
    """`tokenizer`, or the folder in it in which the reference tool's cache keeps Qwen's files."""
    if tokenizer is None:
        return None
    cached = tokenizer / HUB_REPOSITORY.replace("/", "_")
    return cached if cached.is_dir() and find_vocabulary(tokenizer) is None else tokenizer


def _beside(encoder_path: Path | None) -> Path | None:
    """The tokenizer in the encoder's folder, in a folder `tokenizer` in it, or (diffusers) next to it."""
    if encoder_path is None:
        return None
    folder = encoder_path if encoder_path.is_dir() else encoder_path.parent
    folders = [folder, folder / "tokenizer"]
    if encoder_path.is_dir():
        folders.append(folder.parent / "tokenizer")
    return next((found for f in folders if (found := find_vocabulary(f)) is not None), None)


def _in_dashscope() -> Path | None:
    """Looked up without importing the package, which would take seconds and is not needed."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "resources" / "qwen.tiktoken"
    return path if path.is_file() else None


def _from_hub(download: bool) -> Path:
    from huggingface_hub import hf_hub_download

    def fetch(*, local_files_only: bool) -> Path:
        return Path(hf_hub_download(HUB_REPOSITORY, TOKENIZER.path, local_files_only=local_files_only))

    # The cache first: a hub that does not answer takes half a minute to fail. Both calls may raise the
    # errors of several libraries
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
            "no Qwen tokenizer: none was given, none is beside the text encoder, the package `dashscope` "
            f"is not installed, and `{HUB_REPOSITORY}` cannot be had from the hub ({reason})",
            hint="install the extra with `pip install 'hyimg[tokenizer]'`, or give `--tokenizer FOLDER`",
        ) from error
