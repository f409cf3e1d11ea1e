"""The sizes of a DiT and of a VAE, read from the shapes of their tensors. No torch.

So 2.1, 2.1-distilled and the tiny test models share one code path and need no config file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from hyimg.errors import HyimgError

Shapes = Mapping[str, tuple[int, ...]]

# Pixels along one side of a latent pixel, in every HunyuanImage VAE: five halvings
SPATIAL_FACTOR = 32
NUM_VAE_LEVELS = 6
# Width and height in pixels that the official project recommends
NATIVE_SIZES = ((2560, 1536), (2304, 1792), (2048, 2048), (1792, 2304), (1536, 2560))
# Groups of each of the VAE's GroupNorms
NUM_GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class DiTArch:
    """The sizes of a HunyuanImage diffusion transformer (patches of 1x1 latent pixels).

    The distilled model has `guidance_embed` and `meanflow` (a second timestep). Raises `HyimgError` for sizes that
    contradict each other.
    """

    hidden: int
    heads: int
    head_dim: int
    num_double: int
    num_single: int
    mlp_hidden: int
    latent_channels: int
    text_dim: int
    byt5_dim: int
    byt5_hidden: int
    refiner_depth: int
    guidance_embed: bool = False
    meanflow: bool = False

    def __post_init__(self) -> None:
        if self.heads * self.head_dim != self.hidden:
            raise _not_a_dit(f"{self.hidden} hidden units do not divide into heads of {self.head_dim}")
        if self.head_dim % 4:
            raise _not_a_dit(f"a head of {self.head_dim} values cannot carry a rotary position in two axes")
        if not (self.num_double and self.num_single):
            raise _not_a_dit(f"it has {self.num_double} double and {self.num_single} single blocks")

    @staticmethod
    def from_shapes(shapes: Shapes) -> DiTArch:
        """The sizes that tensors of these shapes (original names) make.

        A head is as wide as the q-norm. Reads only tensors that set a size; `header_check.open_dit` checks the others.
        """
        patch = _shape(shapes, "img_in.proj.weight", 4)
        if patch[2:] != (1, 1):
            raise _not_a_dit(f"its patches are {patch[2]}x{patch[3]} latent pixels, not 1x1")
        hidden = patch[0]
        head_dim = _shape(shapes, "double_blocks.0.img_attn_q_norm.weight", 1)[0]
        byt5 = _shape(shapes, "byt5_in.fc1.weight", 2)
        return DiTArch(
            hidden=hidden,
            heads=hidden // head_dim,
            head_dim=head_dim,
            num_double=_count(shapes, "double_blocks."),
            num_single=_count(shapes, "single_blocks."),
            mlp_hidden=_shape(shapes, "double_blocks.0.img_mlp.fc1.weight", 2)[0],
            latent_channels=patch[1],
            text_dim=_shape(shapes, "txt_in.input_embedder.weight", 2)[1],
            byt5_dim=byt5[1],
            byt5_hidden=byt5[0],
            refiner_depth=_count(shapes, "txt_in.individual_token_refiner.blocks."),
            guidance_embed=any(name.startswith("guidance_in.") for name in shapes),
            meanflow=any(name.startswith("time_r_in.") for name in shapes),
        )


@dataclass(frozen=True, kw_only=True)
class VAEArch:
    """The sizes of a HunyuanImage VAE: `channels` of its six levels from the image inwards.

    Raises `HyimgError` for sizes that contradict each other.
    """

    channels: tuple[int, ...]
    latent_channels: int
    layers_per_block: int = 2

    def __post_init__(self) -> None:
        if len(self.channels) != NUM_VAE_LEVELS:
            raise _not_a_vae(f"it has {len(self.channels)} levels of resolution, not {NUM_VAE_LEVELS}")
        if any(channels % NUM_GROUPS for channels in self.channels):
            raise _not_a_vae(f"its widths {self.channels} are not multiples of {NUM_GROUPS}")
        # Shortcuts between levels average or repeat whole groups of channels
        pairs = zip(self.channels, self.channels[1:], strict=False)
        if any((4 * outer) % inner or (4 * inner) % outer for outer, inner in pairs):
            raise _not_a_vae(f"its widths {self.channels} change by factors that its shortcuts cannot take")
        if self.latent_channels < 1 or self.channels[-1] % (2 * self.latent_channels):
            raise _not_a_vae(
                f"{self.channels[-1]} channels do not divide into {self.latent_channels} latent channels"
            )

    @staticmethod
    def from_shapes(shapes: Shapes) -> VAEArch:
        """The sizes that tensors of these shapes (original names) make."""
        num_levels = _count(shapes, "encoder.down.")
        widths = [
            _shape(shapes, f"encoder.down.{level}.block.0.conv1.weight", 4, vae=True)[0]
            for level in range(num_levels)
        ]
        return VAEArch(
            channels=tuple(widths),
            latent_channels=_shape(shapes, "decoder.conv_in.weight", 4, vae=True)[1],
            layers_per_block=_count(shapes, "encoder.down.0.block."),
        )


DIT_2_1 = DiTArch(
    hidden=3584,
    heads=28,
    head_dim=128,
    num_double=20,
    num_single=40,
    mlp_hidden=14336,
    latent_channels=64,
    text_dim=3584,
    byt5_dim=1472,
    byt5_hidden=2048,
    refiner_depth=2,
)
DIT_2_1_DISTILLED = replace(DIT_2_1, guidance_embed=True, meanflow=True)
VAE_2_1 = VAEArch(channels=(128, 256, 512, 512, 1024, 1024), latent_channels=64)

# `hyimg make-tiny-model`: the real structure at widths that a laptop's CPU can train and render
DIT_TINY = DiTArch(
    hidden=64,
    heads=2,
    head_dim=32,
    num_double=2,
    num_single=4,
    mlp_hidden=256,
    latent_channels=16,
    text_dim=64,
    byt5_dim=48,
    byt5_hidden=64,
    refiner_depth=2,
)
DIT_TINY_FULL = replace(DIT_TINY, num_double=20, num_single=40)
VAE_TINY = VAEArch(channels=(32, 32, 32, 32, 32, 64), latent_channels=16)


def _count(shapes: Iterable[str], prefix: str) -> int:
    """How many consecutive numbers, from 0, follow `prefix` in the names."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    numbers = {int(match[1]) for name in shapes if (match := pattern.match(name))}
    return next(n for n in range(len(numbers) + 1) if n not in numbers)


def _shape(shapes: Shapes, name: str, num_dims: int, *, vae: bool = False) -> tuple[int, ...]:
    refuse = _not_a_vae if vae else _not_a_dit
    if name not in shapes:
        raise refuse(f"it has no tensor `{name}`")
    if len(shapes[name]) != num_dims:
        raise refuse(f"`{name}` has the shape {tuple(shapes[name])}, not {num_dims} dimensions")
    if 0 in shapes[name]:
        raise refuse(f"`{name}` is empty, with the shape {tuple(shapes[name])}")
    return tuple(shapes[name])


def _not_a_dit(reason: str) -> HyimgError:
    return HyimgError(f"these tensors cannot be a HunyuanImage-2.1 DiT: {reason}")


def _not_a_vae(reason: str) -> HyimgError:
    return HyimgError(f"these tensors cannot be a HunyuanImage-2.1 VAE: {reason}")
