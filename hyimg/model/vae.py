"""The VAE of HunyuanImage-2.1: images to latents of 1/32 their size, and back.

Between levels a convolution changes width and size in one step, by moving pixels to channels or back, in parallel
with a shortcut that averages or repeats channels. Modules and parameters are named as in the original checkpoint.
Shapes: B batch, C channels, H W image, feature or latent size
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from hyimg.checkpoints.architecture import NUM_GROUPS, SPATIAL_FACTOR, VAEArch
from hyimg.errors import HyimgError
from hyimg.model.vae_tiling import GroupNorm, Layer, modules_of, run_in_tiles

# Factor from the VAE's latents to the DiT's (official `config.json` of the VAE)
SCALING_FACTOR = 0.75289

# Stages that run in tiles: those at the image's size, a half and a quarter of it. Inner ones need little memory
_NUM_TILED = 3

# (r1 r2 c): the order of a 2x2 square of pixels among the channels
_PIXELS_TO_CHANNELS = "b c (h r1) (w r2) -> b (r1 r2 c) h w"
_CHANNELS_TO_PIXELS = "b (r1 r2 c) h w -> b c (h r1) (w r2)"


class Posterior(NamedTuple):
    """Mean and standard deviation of a latent, float32 (B, C, H/32, W/32), both scaled by `SCALING_FACTOR`."""

    mean_BCHW: Tensor
    std_BCHW: Tensor


class VAE(nn.Module):
    """Encoder and decoder, in any size. Computes in the weights' dtype."""

    def __init__(self, arch: VAEArch) -> None:
        super().__init__()
        self.arch = arch
        self.encoder = Encoder(arch)
        self.decoder = Decoder(arch)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.conv_in.weight.device

    def set_chunk_rows(self, chunk_rows: int | None) -> None:
        """Runs the 3x3 convolutions in chunks of this many rows, to limit their workspace; None: at once.

        Without gradients only. Results differ at most by the rounding of the convolution's kernel.
        """
        for module in self.modules():
            if isinstance(module, Conv3x3):
                module.chunk_rows = chunk_rows

    def set_tile_size(self, pixels: int | None) -> None:
        """Runs the stages near the image in square tiles of this many pixels a side; None: at once.

        At least 128 and a multiple of 8. Without gradients only. An image that fits in a tile gives the same bits; a
        larger one is equal within rounding, and takes several times as long (see `hyimg.model.vae_tiling`).
        """
        assert pixels is None or (pixels >= 128 and pixels % 8 == 0)
        self.encoder.tile_size = self.decoder.tile_size = pixels

    def encode_moments(self, image_BCHW: Tensor) -> Tensor:
        """The encoder's output, unscaled: mean, then log variance (B, 2*C, H/32, W/32) in the weights' dtype.

        The image (B, 3, H, W) is RGB in -1..1, any float dtype. Raises `HyimgError` unless 32 divides H and W.
        """
        height, width = image_BCHW.shape[-2:]
        if height % SPATIAL_FACTOR or width % SPATIAL_FACTOR:
            raise HyimgError(f"an image of {width}x{height} cannot be encoded: sides must be multiples of 32")
        moments_BCHW: Tensor = self.encoder(image_BCHW.to(self.dtype))
        return moments_BCHW

    def encode(self, image_BCHW: Tensor) -> Posterior:
        """The scaled posterior of an image (B, 3, H, W), RGB in -1..1; a training latent is mean + std * noise."""
        mean_BCHW, log_variance_BCHW = self.encode_moments(image_BCHW).float().chunk(2, dim=1)
        std_BCHW = torch.exp(0.5 * log_variance_BCHW.clamp(-30.0, 20.0))
        return Posterior(mean_BCHW * SCALING_FACTOR, std_BCHW * SCALING_FACTOR)

    def decode(self, latent_BCHW: Tensor) -> Tensor:
        """Decodes a scaled latent (B, C, H, W) to an image (B, 3, 32*H, 32*W) in the weights' dtype.

        Values are about -1..1, not clamped.
        """
        image_BCHW: Tensor = self.decoder((latent_BCHW / SCALING_FACTOR).to(self.dtype))
        return image_BCHW


class Encoder(nn.Module):
    """Image (B, 3, H, W) to moments (B, 2*C, H/32, W/32)."""

    def __init__(self, arch: VAEArch) -> None:
        super().__init__()
        self.tile_size: int | None = None
        widths = arch.channels
        self.conv_in = conv3x3(3, widths[0])
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            parts = {"block": nn.ModuleList(ResnetBlock(width) for _ in range(arch.layers_per_block))}
            sampler = {"downsample": Downsample(width, widths[level + 1])} if level + 1 < len(widths) else {}
            self.down.append(nn.ModuleDict({**parts, **sampler}))
        self.mid = MidBlock(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], 2 * arch.latent_channels)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        stages = [_layers(level) for level in self.down]
        stages[0].insert(0, self.conv_in)
        x = self.mid(_run_stages(enumerate(stages), image_BCHW, self.tile_size))
        shortcut = reduce(x, "b (c r) h w -> b c h w", "mean", c=self.conv_out.out_channels)
        moments_BCHW: Tensor = self.conv_out(F.silu(self.norm_out(x))) + shortcut
        return moments_BCHW


class Decoder(nn.Module):
    """Unscaled latent (B, C, H, W) to image (B, 3, 32*H, 32*W); has one more block per level than the encoder."""

    def __init__(self, arch: VAEArch) -> None:
        super().__init__()
        self.tile_size: int | None = None
        widths = arch.channels[::-1]
        self.conv_in = conv3x3(arch.latent_channels, widths[0])
        self.mid = MidBlock(widths[0])
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            parts = {"block": nn.ModuleList(ResnetBlock(width) for _ in range(arch.layers_per_block + 1))}
            sampler = {"upsample": Upsample(width, widths[level + 1])} if level + 1 < len(widths) else {}
            self.up.append(nn.ModuleDict({**parts, **sampler}))
        self.norm_out = group_norm(widths[-1])
        self.conv_out = conv3x3(widths[-1], 3)

    def forward(self, latent_BCHW: Tensor) -> Tensor:
        repeats = self.conv_in.out_channels // self.conv_in.in_channels
        x = self.conv_in(latent_BCHW) + repeat(latent_BCHW, "b c h w -> b (c r) h w", r=repeats)
        stages = [_layers(level) for level in self.up]
        # A stage starts with the upsampling from the one before, whose output is smaller
        for stage, following in pairwise(stages):
            following.insert(0, stage.pop())
        stages[-1] += [self.norm_out, F.silu, self.conv_out]
        depths = reversed(range(len(stages)))
        return _run_stages(zip(depths, stages, strict=True), self.mid(x), self.tile_size)


class ResnetBlock(nn.Module):
    """Two normalised convolutions and a residual; the width is constant within a level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = group_norm(width)
        self.conv1 = conv3x3(width, width)
        self.norm2 = group_norm(width)
        self.conv2 = conv3x3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # One expression, so that no intermediate result outlives its use: each may be gigabytes
        x = x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return x


class MidBlock(nn.Module):
    """The innermost level, with attention between all positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(width)
        self.attn_1 = AttentionBlock(width)
        self.block_2 = ResnetBlock(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_2(self.attn_1(self.block_1(x)))
        return x


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, with 1x1 convolutions as in the checkpoint."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = group_norm(width)
        self.q = nn.Conv2d(width, width, kernel_size=1)
        self.k = nn.Conv2d(width, width, kernel_size=1)
        self.v = nn.Conv2d(width, width, kernel_size=1)
        self.proj_out = nn.Conv2d(width, width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (rearrange(f(normed), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        attn = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj_out(rearrange(attn, "b 1 (h w) c -> b c h w", h=x.shape[-2]))
        return x


class Downsample(nn.Module):
    """Halves the size by moving pixels to channels; the shortcut averages groups of channels."""

    def __init__(self, width: int, next_width: int) -> None:
        super().__init__()
        self.conv = conv3x3(width, next_width // 4)
        self.next_width = next_width

    def forward(self, x: Tensor) -> Tensor:
        shortcut = rearrange(x, _PIXELS_TO_CHANNELS, r1=2, r2=2)
        shortcut = reduce(shortcut, "b (c group) h w -> b c h w", "mean", c=self.next_width)
        x = rearrange(self.conv(x), _PIXELS_TO_CHANNELS, r1=2, r2=2)
        return x + shortcut


class Upsample(nn.Module):
    """Doubles the size by moving channels to pixels; the shortcut repeats channels."""

    def __init__(self, width: int, next_width: int) -> None:
        super().__init__()
        self.conv = conv3x3(width, 4 * next_width)
        self.repeats = 4 * next_width // width

    def forward(self, x: Tensor) -> Tensor:
        # The shortcut's repeated channels are broadcast, and never exist
        widened = rearrange(self.conv(x), "b (c r) h w -> b c r h w", r=self.repeats) + x[:, :, None]
        x = rearrange(widened.flatten(1, 2), _CHANNELS_TO_PIXELS, r1=2, r2=2)
        return x


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with padding 1, run in chunks of `chunk_rows` rows if that is set.

    The workspace of a convolution may be several times its input; chunks limit it. Each chunk includes one row of its
    neighbours, so that the result is the same.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)
        self.chunk_rows: int | None = None

    def forward(self, input: Tensor) -> Tensor:
        height = input.shape[2]
        if self.chunk_rows is None or height <= self.chunk_rows:
            return super().forward(input)
        output_BCHW = input.new_empty(input.shape[0], self.out_channels, *input.shape[2:])
        for start in range(0, height, self.chunk_rows):
            end = min(start + self.chunk_rows, height)
            above, below = int(start > 0), int(end < height)
            rows = input[:, :, start - above : end + below]
            # zeros only where the image ends
            padded = F.pad(rows, (1, 1, 1 - above, 1 - below))
            output_BCHW[:, :, start:end] = F.conv2d(padded, self.weight, self.bias)
        return output_BCHW


def conv3x3(in_channels: int, out_channels: int) -> Conv3x3:
    return Conv3x3(in_channels, out_channels)


def group_norm(width: int) -> GroupNorm:
    return GroupNorm(NUM_GROUPS, width, eps=1e-6)


def _run_stages(stages: Iterable[tuple[int, Sequence[Layer]]], x: Tensor, tile_size: int | None) -> Tensor:
    """Runs (depth, layers) stages in order; at depth d a pixel is 2**d image pixels wide.

    `tile_size` is the side of a tile in image pixels; None runs without tiles.
    """
    for depth, layers in stages:
        if tile_size is None or depth >= _NUM_TILED:
            for layer in layers:
                x = layer(x)
        else:
            input_depth = depth + isinstance(layers[0], Upsample)
            x = run_in_tiles(layers, x, side=tile_size >> input_depth, margin=_reach(layers))
    return x


def _reach(layers: Sequence[Layer]) -> int:
    """The receptive radius of the layers in input pixels, rounded up to an even number."""
    reach, pixel = 0.0, 1.0
    for layer in layers:
        reach += pixel * sum(isinstance(module, Conv3x3) for module in modules_of([layer]))
        if isinstance(layer, Upsample):
            pixel /= 2
    return 2 * math.ceil(reach / 2)


def _layers(level: nn.Module) -> list[Layer]:
    """The blocks of a level, then the layer that changes the size."""
    return [
        layer for part in level.children() for layer in (part if isinstance(part, nn.ModuleList) else [part])
    ]
