"""The sizes of the micro model: true structure and names, a few megabytes.

The VAE is 64 channels wide at the picture's own size, not less: its norms have 32 groups, and a group of one channel
loses what the channel is on average, which in plain pictures is their colour.
"""

from __future__ import annotations

from hyimg.encoders.byt5 import ByT5Arch
from hyimg.encoders.byt5_tokens import NUM_TOKENS
from hyimg.encoders.qwen_checkpoint import QwenArch
from hyimg.encoders.tiny import TINY_VOCAB
from hyimg.model.architecture import DiTArch, VAEArch

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
