"""What a training step minimises: from a batch's cached entries to one loss an image.

Every draw (posterior, noise, timestep, perturbation) is keyed by (seed, epoch, sample, repeat), so an image's
loss does not depend on the batch around it, on the device or on what was trained before.

Shapes: B batch, C latent channels, H W latent height and width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hyimg.config.flow import FlowMatching
from hyimg.data.training_data import LoadedBatch
from hyimg.errors import HyimgError, RunError
from hyimg.flow.losses import LossContext
from hyimg.flow.noise import ip_noise_strength, latent_noise
from hyimg.flow.schedule import timesteps
from hyimg.flow.targets import add_noise, apply_prediction_type, perturb_noise, velocity_target
from hyimg.flow.timesteps import TimestepContext, TimestepSampler, draw, sample_sigmas
from hyimg.flow.weighting import loss_weighting
from hyimg.model.conditioning import TextCondition, collate
from hyimg.model.dit import DiT

Loss = Callable[[Tensor, Tensor, LossContext], Tensor]

DISTILLED_GUIDANCE = 3.25
"""The guidance scale that a distilled model is told, as in rendering (spec: official default)."""


@dataclass(frozen=True)
class NoisedBatch:
    """The keyed draws of a batch, float32 on the CPU: clean latent, noise, the noise that is mixed in, sigma."""

    latent_BCHW: Tensor
    noise_BCHW: Tensor
    mixed_noise_BCHW: Tensor
    sigma_B: Tensor

    def noisy(self) -> Tensor:
        """What the model is shown."""
        return add_noise(self.latent_BCHW, self.mixed_noise_BCHW, self.sigma_B)


@dataclass(frozen=True)
class Objective:
    """The loss of a DiT on a batch. `posterior_mean` takes the VAE's mean in place of a sample."""

    dit: DiT
    loss: Loss
    timestep_sampler: TimestepSampler
    flow: FlowMatching
    seed: int
    posterior_mean: bool = False

    def __call__(self, batch: LoadedBatch, epoch: int) -> tuple[Tensor, Tensor]:
        """(loss_B, sigma_B): the weighted loss of each image with its graph, and its noise level; float32."""
        drawn = self.draw(batch, epoch)
        mask_BHW = batch.alpha_mask_BHW
        weight_map_B1HW = None if mask_BHW is None else mask_BHW[:, None]
        loss_B = self.evaluate(drawn, collate(batch.text), weight_map_B1HW)
        return loss_B * batch.weights_B.to(loss_B.device), drawn.sigma_B

    def draw(self, batch: LoadedBatch, epoch: int | str) -> NoisedBatch:
        """Everything random about a batch, by key; `epoch` is a word outside of training ("validation")."""
        samples = list(zip(batch.sample_keys, batch.repeats, strict=True))
        keys = [(self.seed, epoch, key, repeat) for key, repeat in samples]
        shape = batch.mean_BCHW.shape[1:]
        latent_BCHW = batch.mean_BCHW
        if not self.posterior_mean:
            posterior_BCHW = torch.stack([latent_noise(shape, *key, purpose="posterior") for key in keys])
            latent_BCHW = latent_BCHW + batch.std_BCHW * posterior_BCHW
        noise_BCHW = torch.stack([latent_noise(shape, *key) for key in keys])
        mixed_BCHW = noise_BCHW
        if self.flow.ip_noise_gamma:
            random = self.flow.ip_noise_gamma_random_strength
            gammas = [ip_noise_strength(self.flow.ip_noise_gamma, *key, random=random) for key in keys]
            extra_BCHW = torch.stack([latent_noise(shape, *key, purpose="ip_noise") for key in keys])
            mixed_BCHW = perturb_noise(noise_BCHW, extra_BCHW, torch.tensor(gammas))
        sigma_B = sample_sigmas(
            self.timestep_sampler,
            draw(self.seed, epoch, samples),
            timestep_context(self.flow, *shape[-2:]),
            min_timestep=self.flow.min_timestep,
            max_timestep=self.flow.max_timestep,
        )
        return NoisedBatch(latent_BCHW, noise_BCHW, mixed_BCHW, sigma_B)

    def evaluate(
        self, drawn: NoisedBatch, text: TextCondition, weight_map_B1HW: Tensor | None = None
    ) -> Tensor:
        """loss_B of given draws, float32, weighted by noise level but not by sample."""
        device = self.dit.device
        sigma_B = drawn.sigma_B.to(device)
        noisy_BCHW = drawn.noisy().to(device)
        target_BCHW = velocity_target(drawn.latent_BCHW, drawn.noise_BCHW).to(device)
        answer_BCHW = self.predict(noisy_BCHW, sigma_B, text.to(device, self.dit.dtype)).float()
        prediction_BCHW = apply_prediction_type(
            answer_BCHW,
            noisy_BCHW,
            sigma_B,
            self.flow.model_prediction_type,  # type: ignore[arg-type]
        )
        weights = None if weight_map_B1HW is None else weight_map_B1HW.to(device)
        loss_B = self._measure(
            prediction_BCHW, target_BCHW, LossContext(sigma_B, timesteps(sigma_B), weights)
        )
        return loss_B * loss_weighting(sigma_B, self.flow.weighting_scheme, self.flow.model_prediction_type)

    def _measure(self, prediction_BCHW: Tensor, target_BCHW: Tensor, context: LossContext) -> Tensor:
        """The loss function's answer, checked: it may be a plugin's."""
        try:
            loss_B = self.loss(prediction_BCHW, target_BCHW, context)
        except HyimgError:
            raise
        except Exception as error:
            raise RunError(
                f"the loss failed: {type(error).__name__}: {error}", hint="mend the plugin"
            ) from error
        if (
            not isinstance(loss_B, Tensor)
            or loss_B.shape != context.sigma_B.shape
            or loss_B.requires_grad != prediction_BCHW.requires_grad
        ):
            shape = list(loss_B.shape) if isinstance(loss_B, Tensor) else type(loss_B).__name__
            raise RunError(
                f"the loss gave {shape} for {len(context.sigma_B)} images, not one differentiable value for each",
                hint="a loss is `(prediction, target, context) -> (B,)`",
            )
        return loss_B

    def predict(self, noisy_BCHW: Tensor, sigma_B: Tensor, text: TextCondition) -> Tensor:
        """The DiT's answer; a distilled one is told guidance 3.25 and, as the end of its step, its start."""
        arch = self.dit.arch
        timestep_B = timesteps(sigma_B)
        guidance_B = torch.full_like(timestep_B, DISTILLED_GUIDANCE * 1000) if arch.guidance_embed else None
        answer: Tensor = self.dit(
            noisy_BCHW,
            timestep_B,
            text,
            guidance_B=guidance_B,
            timestep_r_B=timestep_B if arch.meanflow else None,
        )
        return answer


def timestep_context(flow: FlowMatching, latent_height: int, latent_width: int) -> TimestepContext:
    """What a timestep sampler is told of a batch of that latent size."""
    return TimestepContext(
        latent_height=latent_height,
        latent_width=latent_width,
        sigmoid_scale=flow.sigmoid_scale,
        discrete_flow_shift=flow.discrete_flow_shift,
        weighting_scheme=flow.weighting_scheme,
        logit_mean=flow.logit_mean,
        logit_std=flow.logit_std,
        mode_scale=flow.mode_scale,
    )
