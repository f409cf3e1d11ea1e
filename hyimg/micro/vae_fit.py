"""The loss of the micro VAE, and pictures of the small world as what it sees.

Shapes: B batch, C latent channels, H W pixels or latent pixels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hyimg.flow.noise import latent_noise
from hyimg.micro.architectures import MICRO_VAE
from hyimg.micro.recipe import Recipe
from hyimg.micro.vae_start import start_as_linear_codec
from hyimg.micro.world import draw, training_scene
from hyimg.model.random_init import init_random
from hyimg.model.vae import SCALING_FACTOR, VAE

# Colours are most of a picture's pixels and edges few: a step from pixel to pixel counts beside the pixel
EDGE_WEIGHT = 0.5
# Shapes and letters are a tenth of a picture: their pixels, and those about them, count so many times as much
FOCUS = 4.0
FOCUS_REACH = 3
# Holds the posterior open a little, so that the decoder forgives a latent that is slightly off
KL_WEIGHT = 1e-4
# Brings each latent channel to mean 0 and deviation 1 after the factor that every HunyuanImage VAE is scaled by
SPREAD_WEIGHT = 0.05


def make_vae(recipe: Recipe) -> VAE:
    """The VAE with its first weights, a function of the recipe: a linear codec of the small world's pictures."""
    seed = recipe.seed
    vae = VAE(MICRO_VAE)
    init_random(vae, seed)
    start_as_linear_codec(
        vae, to_image([(seed, number) for number in range(recipe.vae_start_pictures)]), seed
    )
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
        """What a step is shown: pictures that come in this step only."""
        size, seed = self.recipe.vae.batch_size, self.recipe.seed
        return to_image([(seed, step * size + place) for place in range(size)])


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
    weight_B1HW = _focus(image_BCHW)
    pixels = (weight_B1HW * (decoded_BCHW - image_BCHW).abs()).mean()
    edges = sum(
        (
            weight_B1HW.narrow(dim, 1, weight_B1HW.shape[dim] - 1)
            * (decoded_BCHW - image_BCHW).diff(dim=dim).abs()
        ).mean()
        for dim in (-1, -2)
    )
    kl = 0.5 * (mean_BCHW.square() + log_variance_BCHW.exp() - 1 - log_variance_BCHW).mean()
    spread = _spread(mean_BCHW * SCALING_FACTOR)
    loss = pixels + EDGE_WEIGHT * edges + KL_WEIGHT * kl + SPREAD_WEIGHT * spread
    psnr = -10 * torch.log10(F.mse_loss(decoded_BCHW.clamp(-1, 1), image_BCHW) / 4)
    details = {"l1": pixels, "kl": kl, "spread": spread, "psnr": psnr}
    return loss, {name: round(float(value.detach()), 5) for name, value in details.items()}


def _focus(image_BCHW: Tensor) -> Tensor:
    """How much each pixel counts (B, 1, H, W), 1 in the mean of a batch. The first pixel is always background."""
    differs_B1HW = (image_BCHW - image_BCHW[..., :1, :1]).abs().amax(1, keepdim=True) > 0.1
    near_B1HW = F.max_pool2d(differs_B1HW.float(), 2 * FOCUS_REACH + 1, stride=1, padding=FOCUS_REACH)
    weight_B1HW = 1 + (FOCUS - 1) * near_B1HW
    return weight_B1HW / weight_B1HW.mean()


def _spread(latent_BCHW: Tensor) -> Tensor:
    """How far the channels' means are from 0 and their deviations from 1, squared, over the batch."""
    mean_C = latent_BCHW.mean((0, 2, 3))
    std_C = latent_BCHW.std((0, 2, 3))
    return (mean_C.square() + (std_C - 1).square()).mean()
