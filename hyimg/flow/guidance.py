"""Guidance: how the answers with and without the prompt become one velocity.

The official pipeline starts with classifier-free guidance (CFG), which fixes the composition, and goes on
with adaptive projected guidance (APG), which does not oversaturate; where the prompt holds quoted text the
change comes late. Agrees with tests/golden/guidance.safetensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hyimg.memory.device import has_float64

# Shapes: B batch, C latent channels, H W latent height and width

# what the official pipeline runs APG with
APG_SCALE = 10.0
APG_NORM_LIMIT = 10.0
APG_MOMENTUM = -0.5


@dataclass(frozen=True, kw_only=True)
class GuidanceSettings:
    """The user's guidance options. At scale 1 there is no guidance and no second model pass."""

    guidance_scale: float = 3.5
    guidance_rescale: float = 0.0
    """Rescaling (0..1) of the CFG steps."""
    guidance_rescale_apg: float = 0.0
    """Rescaling (0..1) of the APG steps."""
    apg_start_step_general: int = 5
    """The last step, from 0, with CFG; APG follows. At or over the number of steps: no APG."""
    apg_start_step_ocr: int = 38
    """The same where the prompt holds quoted text."""

    @property
    def needs_uncond(self) -> bool:
        return self.guidance_scale != 1


def classifier_free(cond_BCHW: Tensor, uncond_BCHW: Tensor, scale: float) -> Tensor:
    """`uncond + scale * (cond - uncond)`: Ho and Salimans (arXiv 2207.12598)."""
    return uncond_BCHW + scale * (cond_BCHW - uncond_BCHW)


def rescale(guided_BCHW: Tensor, cond_BCHW: Tensor, factor: float) -> Tensor:
    """Bring the spread of a guided velocity back to the unguided one's by `factor` (0 not, 1 wholly).

    Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv 2305.08891), 3.4.
    """
    if factor == 0:
        return guided_BCHW
    dims = list(range(1, cond_BCHW.ndim))
    ratio_B111 = cond_BCHW.std(dims, keepdim=True) / guided_BCHW.std(dims, keepdim=True)
    return guided_BCHW * (factor * ratio_B111 + (1 - factor))


def project_out(direction_BCHW: Tensor, onto_BCHW: Tensor) -> Tensor:
    """`direction` without its part along `onto`, image by image; in float64, as the official code has it.

    (Some GPUs have no float64; there it is float32.)
    """
    dtype = torch.float64 if has_float64(onto_BCHW.device) else torch.float32
    direction, onto = direction_BCHW.to(dtype), onto_BCHW.to(dtype)
    dims = list(range(1, onto.ndim))
    along_B111 = (direction * onto).sum(dims, keepdim=True)
    square_B111 = onto.square().sum(dims, keepdim=True)
    # the floor only keeps an all-zero `onto` from dividing zero by zero
    return (direction - along_B111 / square_B111.clamp(min=1e-24) * onto).to(direction_BCHW.dtype)


def adaptive_projected(cond_BCHW: Tensor, uncond_BCHW: Tensor, direction_BCHW: Tensor) -> Tensor:
    """APG: follow the guidance direction where it does not merely amplify the answer itself.

    Sadat et al., "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models"
    (arXiv 2410.02416), with the official pipeline's constants and its weight 0 on the parallel part.
    `direction` is `cond - uncond` with momentum; it is shortened to norm 10 at most.
    """
    dims = list(range(1, direction_BCHW.ndim))
    norm_B111 = torch.linalg.vector_norm(direction_BCHW, dim=dims, keepdim=True)
    limited = direction_BCHW * (APG_NORM_LIMIT / norm_B111).clamp(max=1)
    return uncond_BCHW + APG_SCALE * project_out(limited, cond_BCHW)


class Guidance:
    """The guidance of one rendering: the settings, the text rule and APG's momentum.

    The momentum belongs to steps, not to calls: a sampler that asks twice at one noise level replaces the
    contribution of its first call.
    """

    def __init__(self, settings: GuidanceSettings, *, has_quoted_text: bool = False) -> None:
        self.settings = settings
        self.start_step = settings.apg_start_step_ocr if has_quoted_text else settings.apg_start_step_general
        self._step = -1
        self._direction: Tensor | None = None
        self._direction_before: Tensor | None = None

    def __call__(self, cond_BCHW: Tensor, uncond_BCHW: Tensor, step: int) -> Tensor:
        """The guided velocity at `step` (from 0), in float32."""
        cond_BCHW, uncond_BCHW = cond_BCHW.float(), uncond_BCHW.float()
        settings = self.settings
        if not settings.needs_uncond:
            return cond_BCHW
        # CFG steps feed the momentum too, so that APG does not start from nothing
        direction_BCHW = self._with_momentum(cond_BCHW - uncond_BCHW, step)
        if step <= self.start_step:
            guided_BCHW = classifier_free(cond_BCHW, uncond_BCHW, settings.guidance_scale)
            return rescale(guided_BCHW, cond_BCHW, settings.guidance_rescale)
        guided_BCHW = adaptive_projected(cond_BCHW, uncond_BCHW, direction_BCHW)
        return rescale(guided_BCHW, cond_BCHW, settings.guidance_rescale_apg)

    def _with_momentum(self, difference_BCHW: Tensor, step: int) -> Tensor:
        if step != self._step:
            self._step, self._direction_before = step, self._direction
        before = self._direction_before
        self._direction = difference_BCHW if before is None else difference_BCHW + APG_MOMENTUM * before
        return self._direction
