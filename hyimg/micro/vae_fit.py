"""The loss of the micro VAE, and pictures of the small world as what it sees.

Shapes: B batch, C latent channels, H W pixels or latent pixels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from hyimg.flow.noise import latent_noise
from hyimg.micro.architectures import MICRO_VAE
from hyimg.micro.recipe import Recipe
from hyimg.micro.world import PICTURE_SIDE, draw, training_scene
from hyimg.model.architecture import SPATIAL_FACTOR
from hyimg.model.random_init import init_random
from hyimg.model.vae import SCALING_FACTOR, VAE
from hyimg.randomness import keyed_generator, keyed_random

# Colours are most of a picture's pixels and edges few: a step from pixel to pixel counts beside the pixel
EDGE_WEIGHT = 0.5
# Holds the posterior open a little, so that the decoder forgives a latent that is slightly off
KL_WEIGHT = 1e-4
# Brings each latent channel to mean 0 and deviation 1 after the factor that every HunyuanImage VAE is scaled by
SPREAD_WEIGHT = 0.05

# Log variance that the encoder begins with: a deviation of a twelfth
_LOG_VARIANCE = -5.0


def make_vae(seed: int) -> VAE:
    """The VAE with its first weights, a function of the seed.

    Blocks change nothing at first, so that what a picture's parts are on average passes through at once. The last way
    up adds a texture, the same in every picture: a norm would make of an even picture the same numbers whatever its
    colour, but for what it stands beside.
    """
    vae = VAE(MICRO_VAE)
    init_random(vae, seed)
    texture = "decoder.up.4.upsample.conv.bias"
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if ".conv2." in name or ".proj_out." in name:
                parameter.zero_()
            if name == texture:
                parameter.copy_(torch.randn(parameter.shape, generator=keyed_generator(seed, "texture")))
        bias = vae.encoder.conv_out.bias
        assert bias is not None
        bias[MICRO_VAE.latent_channels :] = _LOG_VARIANCE
    return vae


def to_image(pictures: list[tuple[int, int]]) -> Tensor:
    """Training pictures by (seed, number), as the VAE takes them: float32 (B, 3, 128, 128) in -1..1."""
    drawn = [draw(training_scene(seed, number), seed, number) for seed, number in pictures]
    image_BHWC = torch.stack([torch.from_numpy(one) for one in drawn])
    return image_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class VAELoss:
    """A step's loss as a function of its number. Products are in bfloat16, weights and the loss in float32."""

    vae: VAE
    recipe: Recipe

    def __call__(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        image_BCHW = self.images(step).to(self.vae.device)
        with torch.autocast(image_BCHW.device.type, torch.bfloat16):
            return vae_loss(self.vae, image_BCHW, self.recipe.seed, step)

    def images(self, step: int) -> Tensor:
        """What a step is shown: parts, of the side of its stage, of pictures that come in this step only."""
        side = self._side(step)
        number = self.recipe.vae.batch_size * (PICTURE_SIDE // side) ** 2
        first = step * self.recipe.vae.batch_size * (PICTURE_SIDE // SPATIAL_FACTOR) ** 2
        parts = []
        for place, image_CHW in enumerate(
            to_image([(self.recipe.seed, first + one) for one in range(number)])
        ):
            random = keyed_random(self.recipe.seed, step, place, "part")
            top, left = (random.randrange(PICTURE_SIDE - side + 1) for _ in range(2))
            parts.append(image_CHW[:, top : top + side, left : left + side])
        return torch.stack(parts)

    def _side(self, step: int) -> int:
        ends = accumulate(share for share, _ in self.recipe.vae_stages)
        sides = [side for _, side in self.recipe.vae_stages]
        return next(
            (side for end, side in zip(ends, sides, strict=True) if step < end * self.recipe.vae.steps),
            sides[-1],
        )


def vae_loss(vae: VAE, image_BCHW: Tensor, *key: int) -> tuple[Tensor, Mapping[str, float]]:
    """How far the reconstructions are from the images, and the latents from what a DiT likes to see.

    `key` is (seed, step), of which the posterior's sample is drawn.
    """
    mean_BCHW, log_variance_BCHW = vae.encode_moments(image_BCHW).float().chunk(2, dim=1)
    log_variance_BCHW = log_variance_BCHW.clamp(-30.0, 20.0)
    seed, step = key
    noise_BCHW = latent_noise(mean_BCHW.shape, seed, step, "vae", 0, "posterior").to(mean_BCHW.device)
    latent_BCHW = mean_BCHW + torch.exp(0.5 * log_variance_BCHW) * noise_BCHW
    decoded_BCHW = vae.decode(latent_BCHW * SCALING_FACTOR).float()
    pixels = F.l1_loss(decoded_BCHW, image_BCHW)
    edges = sum(F.l1_loss(decoded_BCHW.diff(dim=dim), image_BCHW.diff(dim=dim)) for dim in (-1, -2))
    kl = 0.5 * (mean_BCHW.square() + log_variance_BCHW.exp() - 1 - log_variance_BCHW).mean()
    spread = _spread(mean_BCHW * SCALING_FACTOR)
    loss = pixels + EDGE_WEIGHT * edges + KL_WEIGHT * kl + SPREAD_WEIGHT * spread
    psnr = -10 * torch.log10(F.mse_loss(decoded_BCHW.clamp(-1, 1), image_BCHW) / 4)
    details = {"l1": pixels, "kl": kl, "spread": spread, "psnr": psnr}
    return loss, {name: round(float(value.detach()), 5) for name, value in details.items()}


def _spread(latent_BCHW: Tensor) -> Tensor:
    """How far the channels' means are from 0 and their deviations from 1, squared, over the batch."""
    mean_C = latent_BCHW.mean((0, 2, 3))
    std_C = latent_BCHW.std((0, 2, 3))
    return (mean_C.square() + (std_C - 1).square()).mean()
