"""One prompt's embeddings to one latent: the model, guidance and a sampler joined.

Two kinds of checkpoint are rendered. The base model is called with and without the prompt and guided from
outside. A distilled model has guidance inside (it is told the scale) and, being a mean-flow model, is told
where its step ends; it is never called without the prompt.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from hyimg.errors import RunError
from hyimg.flow.guidance import Guidance, GuidanceSettings
from hyimg.flow.noise import initial_noise
from hyimg.flow.samplers import Callback, Sampler, euler, run_sampler
from hyimg.flow.schedule import inference_sigmas, timesteps
from hyimg.flow.sizes import SIZE_MULTIPLE, check_size
from hyimg.model.architecture import DiTArch
from hyimg.model.conditioning import TextCondition, collate

# Shapes: B batch (1 here, 2 in a joined call), C latent channels, H W latent height and width


class VelocityModel(Protocol):
    """What rendering needs of a DiT: its architecture and its call."""

    @property
    def arch(self) -> DiTArch: ...

    def __call__(
        self,
        latent_BCHW: Tensor,
        timestep_B: Tensor,
        text: TextCondition,
        *,
        guidance_B: Tensor | None = None,
        timestep_r_B: Tensor | None = None,
    ) -> Tensor: ...


class Denoiser:
    """The function that samplers see: `(x_BCHW, sigma) -> estimate of the clean latent`, float32.

    A sampler may ask at any noise level; the step that it belongs to is the interval of `sigmas` that holds
    it. That step decides which guidance applies and where a mean-flow model's step ends.
    """

    def __init__(
        self,
        dit: VelocityModel,
        condition: TextCondition,
        uncond: TextCondition | None,
        sigmas: Tensor,
        guidance: Guidance,
        *,
        batch_cond_uncond: bool = False,
    ) -> None:
        arch = dit.arch
        self.dit = dit
        self.guidance = guidance
        self.guides = guidance.settings.needs_uncond and not arch.guidance_embed
        assert uncond is not None or not self.guides, "guidance needs the negative prompt's embeddings"
        self.condition = condition
        self.uncond = uncond if self.guides else None
        self.joined = _join(condition, self.uncond) if batch_cond_uncond and self.uncond else None
        self._levels = sigmas.tolist()
        self._rising = [-level for level in self._levels]

    def __call__(self, x_BCHW: Tensor, sigma: float) -> Tensor:
        return x_BCHW - sigma * self.velocity(x_BCHW, sigma)

    def velocity(self, x_BCHW: Tensor, sigma: float) -> Tensor:
        """The guided velocity at x, float32."""
        step = self.step_at(sigma)
        if self.uncond is None:
            return self._predict(x_BCHW, sigma, step, self.condition)
        if self.joined is not None:
            both_BCHW = self._predict(torch.cat([x_BCHW, x_BCHW]), sigma, step, self.joined)
            cond_BCHW, uncond_BCHW = both_BCHW.chunk(2)
        else:
            cond_BCHW = self._predict(x_BCHW, sigma, step, self.condition)
            uncond_BCHW = self._predict(x_BCHW, sigma, step, self.uncond)
        return self.guidance(cond_BCHW, uncond_BCHW, step)

    def step_at(self, sigma: float) -> int:
        """The step, from 0, that starts at or last before the noise level `sigma`."""
        last_step = len(self._levels) - 2
        return min(max(bisect_right(self._rising, -sigma) - 1, 0), last_step)

    def _predict(self, x_BCHW: Tensor, sigma: float, step: int, text: TextCondition) -> Tensor:
        arch = self.dit.arch
        sigma_B = torch.full((x_BCHW.shape[0],), sigma, dtype=torch.float32, device=x_BCHW.device)
        # the scale is told times 1000 like a time, in float32: bfloat16 would make 3248 of 3250
        scale = self.guidance.settings.guidance_scale
        guidance_B = torch.full_like(sigma_B, scale * 1000) if arch.guidance_embed else None
        end_B = torch.full_like(sigma_B, self._levels[step + 1]) if arch.meanflow else None
        return self.dit(
            x_BCHW,
            timesteps(sigma_B),
            text,
            guidance_B=guidance_B,
            timestep_r_B=None if end_B is None else timesteps(end_B),
        ).float()


@torch.no_grad()
def render_latent(
    dit: VelocityModel,
    condition: TextCondition,
    uncond: TextCondition | None,
    *,
    height: int,
    width: int,
    steps: int,
    flow_shift: float,
    seed: int,
    guidance: GuidanceSettings,
    has_quoted_text: bool = False,
    sampler: Sampler = euler,
    sampler_name: str = "euler",
    sampler_args: Mapping[str, object] = MappingProxyType({}),
    batch_cond_uncond: bool = False,
    callback: Callback | None = None,
) -> Tensor:
    """Render one image's latent, [1, C, height / 32, width / 32], scaled, float32, on the condition's device.

    Args:
        dit: the model; the architecture says whether it is distilled.
        condition, uncond: embeddings of the prompt and of the negative prompt, a batch of one each, on the
            model's device. `uncond` is not used at guidance scale 1 nor by a distilled model.
        height, width: pixels, multiples of 32.
        seed: the initial noise; drawn on the CPU, so alike on every device.
        guidance: for a distilled model only `guidance_scale` is used.
        has_quoted_text: whether the prompt holds text to write, which postpones APG.
        sampler, sampler_name, sampler_args: the sampler, what an error calls it, and its keyword arguments.
        batch_cond_uncond: one model call with both embeddings in place of two calls: faster, more memory, and
            equal within the tolerance of another batch size only.
        callback: `(step, x, estimate)` after every step; what it raises ends the rendering.

    Raises HyimgError for a size, step number or shift that cannot be rendered, and RunError for a sampler that
    fails and for a latent that is not finite.
    """
    check_size(height, "height")
    check_size(width, "width")
    sigmas = inference_sigmas(steps, flow_shift)
    denoise = Denoiser(
        dit,
        condition,
        uncond,
        sigmas,
        Guidance(guidance, has_quoted_text=has_quoted_text),
        batch_cond_uncond=batch_cond_uncond,
    )
    shape = (1, dit.arch.latent_channels, height // SIZE_MULTIPLE, width // SIZE_MULTIPLE)
    noise_BCHW = initial_noise(shape, seed).to(condition.text_BTD.device)
    latent_BCHW = run_sampler(sampler, sampler_name, denoise, noise_BCHW, sigmas, callback, sampler_args)
    if not torch.isfinite(latent_BCHW).all():
        raise RunError(
            f"the latent is not finite (NaN or infinity) after {steps} steps of the sampler `{sampler_name}`",
            hint="leave the LoRA out or lower its `--lora_multiplier`, or lower `--guidance_scale`",
        )
    return latent_BCHW


def _join(condition: TextCondition, uncond: TextCondition) -> TextCondition:
    """Two conditions of one row each as one of two rows, each row's valid tokens only."""
    return collate([_row(condition), _row(uncond)])


def _row(condition: TextCondition) -> tuple[Tensor, Tensor | None]:
    """The valid tokens of a condition with one row."""
    text_TD = condition.text_BTD[0][condition.text_mask_BT[0]]
    if condition.byt5_BSE is None or condition.byt5_mask_BS is None:
        return text_TD, None
    byt5_SE = condition.byt5_BSE[0][condition.byt5_mask_BS[0]]
    return text_TD, byt5_SE if len(byt5_SE) else None
