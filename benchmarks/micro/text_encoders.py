"""The text encoders of the micro model: random and frozen, made so that the DiT can tell words and their places apart.

What the DiT needs of a token's state is the word and what stood just before it (a red circle on blue has the same
words as a blue circle on red, and the DiT gives text no positions of its own). A random transformer keeps words apart,
by its embedding, but attends to whatever its weights happen to favour: which word stood before shows well for some
words and hardly for others. So here queries and keys are the same for every word, and turned such that rotary
positions let each head look back a fixed number of tokens.

Shapes: N query heads, M key/value heads, K head size

The sizes of the micro model: true structure and names, a few megabytes.

The VAE is 64 channels wide at the picture's own size, not less: its norms have 32 groups, and a group of one channel
loses what the channel is on average, which in plain pictures is their colour.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hyimg.checkpoints.architecture import DiTArch, VAEArch
from hyimg.checkpoints.model_files import ModelFolder
from hyimg.config.models import Compute
from hyimg.demo.world import caption, training_scene
from hyimg.encoders.byt5 import ByT5Arch
from hyimg.encoders.glyph import NUM_TOKENS
from hyimg.encoders.qwen_checkpoint import QwenArch
from hyimg.encoders.text import TextEncoders
from hyimg.encoders.tiny import TINY_VOCAB, make_tiny_byt5, make_tiny_qwen, train_tiny_tokenizer
from hyimg.memory.precision import decide_precision

LATENT_CHANNELS = 32

MICRO_VAE = VAEArch(channels=(64, 64, 64, 64, 128, 128), latent_channels=LATENT_CHANNELS, layers_per_block=1)
MICRO_QWEN = QwenArch(
    hidden=128, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=16, intermediate=256, vocab=TINY_VOCAB
)
MICRO_BYT5 = ByT5Arch(
    d_model=48, num_heads=3, head_dim=16, d_ff=96, num_layers=2, num_buckets=32, vocab=NUM_TOKENS
)
MICRO_DIT = DiTArch(
    hidden=128,
    heads=4,
    head_dim=32,
    num_double=2,
    num_single=4,
    mlp_hidden=512,
    latent_channels=LATENT_CHANNELS,
    text_dim=MICRO_QWEN.hidden,
    byt5_dim=MICRO_BYT5.d_model,
    byt5_hidden=64,
    refiner_depth=2,
)


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
    """Both encoders of a folder, on the CPU in its own precision. Raises `HyimgError` as `TextEncoders.open`."""
    precision = decide_precision(Compute(), torch.device("cpu"))
    return TextEncoders.open(
        folder.text_encoder,
        folder.byt5,
        dtype=precision.text_encoder,
        byt5_dtype=precision.byt5,
        batch_size=batch_size,
    )


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
