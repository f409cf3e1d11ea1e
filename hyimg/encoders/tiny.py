"""Tiny text encoders with random weights, for dry runs and tests.

Structure, names and tokens are the real ones, including tensors that a loader must ignore (vision tower, head).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from hyimg.cache.atomic import atomic_write_bytes, atomic_write_text
from hyimg.checkpoints.safetensors_file import read_header
from hyimg.encoders.byt5 import ByT5Arch
from hyimg.encoders.glyph import NUM_TOKENS
from hyimg.encoders.qwen_checkpoint import QwenArch
from hyimg.encoders.tokenizer import (
    SPECIAL_TOKENS,
    Vocabulary,
    build_tokenizer,
    byte_alphabet,
    fill_template,
    special_after,
)
from hyimg.randomness import keyed_generator

_Shapes = Mapping[str, tuple[int, ...]]

TINY_VOCAB = 1024

TINY_QWEN = QwenArch(
    hidden=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, intermediate=128, vocab=TINY_VOCAB
)
TINY_BYT5 = ByT5Arch(
    d_model=48, num_heads=3, head_dim=16, d_ff=96, num_layers=2, num_buckets=32, vocab=NUM_TOKENS
)

# A few of the vision tower's 390 tensors
_DUMMY_VISION: _Shapes = {
    "visual.patch_embed.proj.weight": (8, 3, 2, 2, 2),
    "visual.blocks.0.norm1.weight": (8,),
    "visual.merger.mlp.0.bias": (8,),
}

# Enough text for a thousand tokens; more would only take longer
_MAX_TRAINING_CHARS = 10_000


def make_tiny_qwen(
    path: Path | str,
    *,
    arch: QwenArch = TINY_QWEN,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a Qwen2.5-VL file in the ComfyUI layout: all layers, final norm, head, some vision tensors.

    `weights`, by name, replace random ones. The number of heads, which no shape shows, is in the metadata that
    `check_qwen` reads.
    """
    shapes: dict[str, tuple[int, ...]] = {
        arch.embedding_name: (arch.vocab, arch.hidden),
        **{
            arch.layer_prefix(layer) + name: shape
            for layer in range(arch.num_layers)
            for name, shape in arch.layer_shapes().items()
        },
        f"{arch.prefix}norm.weight": (arch.hidden,),
        "lm_head.weight": (arch.vocab, arch.hidden),
        **_DUMMY_VISION,
    }
    config = {"hidden": arch.hidden, "heads": arch.num_heads}
    meta = {"what": "random weights in the layout of Qwen2.5-VL", "config": config, "seed": seed}
    _write(path, shapes, f"qwen {seed}", dtype, {"meta": json.dumps(meta)}, weights or {})


def make_tiny_byt5(
    path: Path | str, *, arch: ByT5Arch = TINY_BYT5, seed: int = 0, dtype: torch.dtype = torch.float16
) -> None:
    """Writes a glyph byT5 file with the real vocabulary of 1510 rows."""
    _write(path, arch.read_shapes(), f"byt5 {seed}", dtype, {}, {})


def _write(
    path: Path | str,
    shapes: _Shapes,
    key: str,
    dtype: torch.dtype,
    metadata: dict[str, str],
    given: Mapping[str, Tensor],
) -> None:
    # One metadata entry at most: the library writes several in an order that changes from run to run
    tensors = {
        name: (given[name] if name in given else _random_weight(name, shape, key)).to(dtype)
        for name, shape in shapes.items()
    }
    atomic_write_bytes(path, save(tensors, metadata=metadata), root=Path(path).parent, verify=read_header)


def _random_weight(name: str, shape: tuple[int, ...], key: str) -> Tensor:
    """Norms of one, embeddings of unit variance, matrices that preserve the variance of their input."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    is_table = name.endswith(("embed_tokens.weight", "shared.weight", "relative_attention_bias.weight"))
    std = 1.0 if is_table else 1 / math.sqrt(math.prod(shape[1:]))
    return torch.randn(shape, generator=keyed_generator(key, name)) * std


def train_tiny_tokenizer(texts: Iterable[str], folder: Path | str, *, num_tokens: int = TINY_VOCAB) -> Path:
    """Writes `folder/tokenizer.json`, BPE trained on `texts` with Qwen's splitting and special tokens.

    Returns the file's path. It has at most `num_tokens` ids. Every word of the prompt template is one token, as in the
    real vocabulary, so the template has 34 tokens here too. The same texts give the same file.
    """
    splitter = build_tokenizer(Vocabulary({}, [], {}))

    def words(text: str) -> Counter[str]:
        pieces = splitter.pre_tokenizer.pre_tokenize_str(splitter.normalizer.normalize_str(text))
        return Counter(piece for piece, _ in pieces)

    template = re.sub(r"<\|\w+\|>", "", fill_template(""))
    counts = words("\n".join(texts)[:_MAX_TRAINING_CHARS])
    # The template's words outweigh all others, so they are merged first
    counts.update(dict.fromkeys(words(template), _MAX_TRAINING_CHARS))
    alphabet = byte_alphabet()
    merges = _learn_merges(counts, num_tokens - len(alphabet) - len(SPECIAL_TOKENS))
    ids = {token: i for i, token in enumerate([*alphabet, *(left + right for left, right in merges)])}
    path = Path(folder) / "tokenizer.json"
    tokenizer = build_tokenizer(Vocabulary(ids, merges, special_after(ids)))
    atomic_write_text(path, tokenizer.to_str(pretty=True), root=folder)
    return path


def _learn_merges(counts: Mapping[str, int], limit: int) -> list[tuple[str, str]]:
    """The `limit` merges of byte-pair encoding (Sennrich et al. 2016, algorithm 1), ties by spelling.

    The trainer of the tokenizers library is faster, but breaks ties differently in each run.
    """
    parts = {word: list(word) for word in counts}
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, split in parts.items():
            for pair in pairwise(split):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for split in parts.values():
            _merge(split, best)
    return merges


def _merge(split: list[str], pair: tuple[str, str]) -> None:
    i = 0
    while i < len(split) - 1:
        if (split[i], split[i + 1]) == pair:
            split[i : i + 2] = [split[i] + split[i + 1]]
        i += 1
