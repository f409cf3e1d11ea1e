"""The text encoders of the micro model: random and frozen, made so that the DiT can tell words and their places apart.

What the DiT needs of a token's state is the word and what stood just before it (a red circle on blue has the same
words as a blue circle on red, and the DiT gives text no positions of its own). A random transformer keeps words apart,
by its embedding, but attends to whatever its weights happen to favour: which word stood before shows well for some
words and hardly for others. So here queries and keys are the same for every word, and turned such that rotary
positions let each head look back a fixed number of tokens.

Shapes: N query heads, M key/value heads, K head size
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hyimg.encoders.qwen_checkpoint import QwenArch
from hyimg.encoders.text import TextEncoders
from hyimg.encoders.tiny import make_tiny_byt5, make_tiny_qwen, train_tiny_tokenizer
from hyimg.micro.architectures import MICRO_BYT5, MICRO_QWEN
from hyimg.micro.world import caption, training_scene
from hyimg.model.folder import ModelFolder

# A head's attention falls by e to this power from the token that it looks at to its neighbours, about
_SHARPNESS = 7.0
# Rotary pairs that tell distances: the fastest alone would repeat after 6 tokens
_NUM_PAIRS = 2

# Captions that the tokenizer learns its words from
_NUM_CAPTIONS = 120


def write_text_encoders(folder: ModelFolder, seed: int) -> None:
    """Writes the language model with its tokenizer beside it, and byT5."""
    make_tiny_qwen(folder.text_encoder, arch=MICRO_QWEN, seed=seed, weights=look_back_weights(MICRO_QWEN))
    make_tiny_byt5(folder.byt5, arch=MICRO_BYT5, seed=seed)
    texts = (caption(training_scene(0, number), number) for number in range(_NUM_CAPTIONS))
    train_tiny_tokenizer(texts, folder.directory)


def open_text_encoders(folder: ModelFolder, *, batch_size: int = 64) -> TextEncoders:
    """Both encoders of a folder, on the CPU. Raises `HyimgError` as `TextEncoders.open`."""
    return TextEncoders.open(folder.text_encoder, folder.byt5, batch_size=batch_size)


def look_back_weights(arch: QwenArch) -> dict[str, Tensor]:
    """Queries and keys of every layer, by name, with which head n attends to the token n + 1 before.

    With no weights but biases q and k, a score is q * R(distance) * k: of two equal vectors it is highest at distance
    0, and of a query that is turned back by n + 1 tokens at distance n + 1.
    """
    frequencies = arch.rope_theta ** (-torch.arange(0, arch.head_dim, 2)[:_NUM_PAIRS] / arch.head_dim)
    # The score is the sum over pairs of length**2 * cos(frequency * distance) / sqrt(K)
    fall = float((1 - frequencies.cos()).sum()) / math.sqrt(arch.head_dim)
    length = math.sqrt(_SHARPNESS / fall)

    def heads(number: int, turns: Tensor) -> Tensor:
        """Biases (number * K) whose pairs are turned by so many tokens a head."""
        angles = turns[:, None] * frequencies
        bias = torch.zeros(number, 2, arch.head_dim // 2)
        bias[:, 0, :_NUM_PAIRS], bias[:, 1, :_NUM_PAIRS] = length * angles.cos(), -length * angles.sin()
        return bias.flatten()

    q_bias = heads(arch.num_heads, torch.arange(arch.num_heads) + 1.0)
    k_bias = heads(arch.num_kv_heads, torch.zeros(arch.num_kv_heads))
    weights = {}
    for layer in range(arch.num_layers):
        prefix = arch.layer_prefix(layer) + "self_attn."
        for side, bias in (("q", q_bias), ("k", k_bias)):
            weights[f"{prefix}{side}_proj.bias"] = bias
            weights[f"{prefix}{side}_proj.weight"] = torch.zeros(len(bias), arch.hidden)
    return weights
