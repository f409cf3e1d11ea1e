"""The loss of the micro VAE, and pictures of the small world as what it sees.

Shapes: B batch, C latent channels, H W pixels or latent pixels

The first weights of the micro VAE: a linear codec, computed from pictures in closed form.

From random weights a VAE spends hours on what linear algebra gives in seconds. Blocks are zeroed, so that what is left
is linear: the encoder's ways down get the principal components of what they are given, the decoder's ways up the least
squares that lead back to it. What a picture's sharp edges take beyond that, the blocks then learn.

Shapes: B batch, C D channels, H W pixels, N samples, r1 r2 a 2x2 square of pixels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from benchmarks.micro.recipe import Recipe
from benchmarks.micro.text_encoders import MICRO_VAE
from hyimg.demo.world import draw, training_scene
from hyimg.flow.targets import latent_noise
from hyimg.memory.precision import multiplies_bf16
from hyimg.model.loading import init_random
from hyimg.model.vae import SCALING_FACTOR, VAE, Downsample, Upsample
from hyimg.randomness import keyed_generator

# Where a 2x2 square of pixels goes among the channels, in `Downsample` and `Upsample`
_PIXELS_TO_CHANNELS = "b c (h r1) (w r2) -> b (r1 r2 c) h w"

# Deviation of the texture that every other channel before the last norm has, where the others have colours of about 1
_TEXTURE = 4.0
# Log variance of the posterior: a deviation of a twelfth
_LOG_VARIANCE = -5.0
# The nonlinear part of the moments begins small beside the linear one
_NONLINEAR = 0.1

# Pixels that least squares are taken over, a level
_NUM_SAMPLES = 40_000
# Pictures whose neighbourhoods are held at a time
_PICTURES_AT_A_TIME = 4
_RIDGE = 1e-4


@torch.no_grad()
def start_as_linear_codec(vae: VAE, image_BCHW: Tensor, seed: int) -> None:
    """Gives the VAE the weights of a linear codec of such images (float32, -1..1); `seed` keys what is drawn.

    Of random weights only the insides of blocks remain, which a zeroed convolution follows.
    """
    for name, parameter in vae.named_parameters():
        if ".conv2." in name or ".proj_out." in name:
            parameter.zero_()
    features = _start_encoder(vae, image_BCHW)
    latent_BCHW = vae.encode_moments(image_BCHW).chunk(2, dim=1)[0]
    _start_decoder(vae, latent_BCHW, features, image_BCHW, seed)


def _start_encoder(vae: VAE, image_BCHW: Tensor) -> list[Tensor]:
    """Returns what each level works on, of images."""
    encoder = vae.encoder
    colors = torch.arange(3)
    encoder.conv_in.weight[:3] = 0  # three channels are the colours as they are, the others filters
    encoder.conv_in.weight[colors, colors, 1, 1] = 1
    x = encoder.conv_in(image_BCHW)
    features = [x]
    *ways_down, last_way_down = [module for module in encoder.modules() if isinstance(module, Downsample)]
    for way_down in ways_down:
        rows_ND, mean_D, variance_N = _principal(x, way_down.conv.out_channels)
        rows_ND /= variance_N.mean().sqrt()
        _set_way_down(way_down, rows_ND[:, :, None, None], -rows_ND @ mean_D, middle=slice(1, 2))
        x = way_down(x)
        features.append(x)
    # The moments' shortcut takes the mean of two channels: each component is there twice. It sees a 2x2 square, since
    # of the four places that it is computed at only two become latents
    number = last_way_down.conv.out_channels // 2
    rows_ND, mean_D, variance_N = _principal(rearrange(x, _PIXELS_TO_CHANNELS, r1=2, r2=2), number)
    rows_ND /= variance_N.clamp(min=1e-6).sqrt()[:, None] * SCALING_FACTOR
    kernel = rearrange(rows_ND, "n (r1 r2 c) -> n c r1 r2", r1=2, r2=2).repeat_interleave(2, dim=0)
    bias = (-rows_ND @ mean_D).repeat_interleave(2)
    _set_way_down(last_way_down, kernel, bias, middle=slice(1, 3))
    features.append(last_way_down(x))
    encoder.conv_out.weight *= _NONLINEAR
    bias = _bias(encoder.conv_out)
    bias.zero_()
    bias[vae.arch.latent_channels :] = _LOG_VARIANCE
    return features


def _set_way_down(way_down: Downsample, kernel: Tensor, bias: Tensor, *, middle: slice) -> None:
    """The kernel, at these places of the 3x3, together with a shortcut that takes means of groups of channels."""
    conv = way_down.conv
    conv.weight.zero_()
    conv.weight[:, :, middle, middle] = kernel
    group = conv.in_channels // conv.out_channels
    for channel in range(conv.out_channels):
        conv.weight[channel, channel * group : (channel + 1) * group, 1, 1] -= 1 / group
    _bias(conv).copy_(bias)


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def _start_decoder(
    vae: VAE, latent_BCHW: Tensor, features: list[Tensor], image_BCHW: Tensor, seed: int
) -> None:
    decoder, generator = vae.decoder, keyed_generator(seed, "linear codec")
    repeats = decoder.conv_in.out_channels // decoder.conv_in.in_channels
    _set_beside_repeats(decoder.conv_in, *_least_squares(latent_BCHW, features[-1], generator), repeats)
    x = decoder.conv_in(latent_BCHW) + repeat(latent_BCHW, "b c h w -> b (c r) h w", r=repeats)
    targets = [_last_features(image_BCHW, vae.arch.channels[0], generator), *features[1:-1]]
    for way_up in [module for module in decoder.modules() if isinstance(module, Upsample)]:
        wanted = rearrange(targets.pop(), _PIXELS_TO_CHANNELS, r1=2, r2=2)
        _set_beside_repeats(way_up.conv, *_least_squares(x, wanted, generator), way_up.repeats)
        x = way_up(x)
    weight, bias = _least_squares(F.silu(decoder.norm_out(x)), image_BCHW, generator)
    decoder.conv_out.weight.copy_(weight)
    _bias(decoder.conv_out).copy_(bias)


def _last_features(image_BCHW: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """What the last norm is to be given: colours in every other channel, beside a texture that no picture changes.

    A norm over an even picture would leave the same numbers whatever its colour is. With the texture, which has most
    of a group's variance, what it does is nearly linear.
    """
    batch, _, height, width_px = image_BCHW.shape
    directions = F.normalize(torch.randn(width // 2, 3, generator=generator), dim=1)
    colors_BCHW = torch.einsum("nc,bchw->bnhw", directions, image_BCHW)
    texture = torch.randn(width // 2, 2, 2, generator=generator)
    texture = texture - texture.mean((1, 2), keepdim=True)
    texture = _TEXTURE * texture / texture.std((1, 2), keepdim=True)
    texture_CHW = texture.repeat(1, height // 2, width_px // 2)
    pairs = torch.stack([colors_BCHW, texture_CHW.expand(batch, -1, -1, -1)], dim=2)
    return pairs.flatten(1, 2)


def _set_beside_repeats(conv: nn.Conv2d, weight: Tensor, bias: Tensor, repeats: int) -> None:
    """The weights that do so together with a shortcut that repeats each channel."""
    conv.weight.copy_(weight)
    outputs = torch.arange(conv.out_channels)
    conv.weight[outputs, outputs // repeats, 1, 1] -= 1
    _bias(conv).copy_(bias)


def _principal(x_BCHW: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading principal components of a pixel's channels (N, C), the channels' means (C), and variances (N)."""
    x_CN = rearrange(x_BCHW, "b c h w -> c (b h w)").double()
    mean_C = x_CN.mean(1)
    variances, vectors = torch.linalg.eigh(torch.cov(x_CN, correction=0))
    rows_NC = vectors.T.flip(0)[:number]
    return rows_NC.float(), mean_C.float(), variances.flip(0)[:number].float()


def _least_squares(x_BCHW: Tensor, wanted_BDHW: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weight (D, C, 3, 3) and bias (D) of the convolution that comes nearest to what is wanted."""
    per_picture = max(1, _NUM_SAMPLES // len(x_BCHW))
    inner, outer = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    at_a_time = _PICTURES_AT_A_TIME
    both = zip(torch.split(x_BCHW, at_a_time), torch.split(wanted_BDHW, at_a_time), strict=True)
    for x, wanted in both:
        around_BEP, wanted_BDP = F.unfold(x, 3, padding=1), wanted.flatten(2)
        chosen = torch.randperm(around_BEP.shape[2], generator=generator)[:per_picture]
        around_NE = F.pad(rearrange(around_BEP[:, :, chosen], "b e p -> (b p) e").double(), (0, 1), value=1.0)
        wanted_ND = rearrange(wanted_BDP[:, :, chosen], "b d p -> (b p) d").double()
        inner = inner + around_NE.T @ around_NE
        outer = outer + around_NE.T @ wanted_ND
    ridge = _RIDGE * inner.diagonal().mean() * torch.eye(len(inner), dtype=torch.float64)
    solution_DE = torch.linalg.solve(inner + ridge, outer).T.float()
    weight_DE, bias_D = solution_DE[:, :-1], solution_DE[:, -1]
    return weight_DE.unflatten(1, (x_BCHW.shape[1], 3, 3)), bias_D


# Most pixels are flat colour and few are edges: differences between neighbouring pixels count as well as pixels
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
    """A step's loss as a function of its number. Products are in bfloat16 where the device
    multiplies it in hardware, weights and the loss in float32."""

    vae: VAE
    recipe: Recipe

    def __call__(self, step: int) -> tuple[Tensor, Mapping[str, float]]:
        image_BCHW = self.images(step).to(self.vae.device)
        device = image_BCHW.device
        with torch.autocast(device.type, torch.bfloat16, enabled=multiplies_bf16(device)):
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
