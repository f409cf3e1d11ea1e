"""A loss or gradient that is not finite: what is said of it, and whether the run goes on (`--on_nan`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hyimg.errors import DivergedError
from hyimg.lora.network import LoRANetwork
from hyimg.report import Reporter, count_text

MOST_IN_A_ROW = 10
"""So many steps in a row that are not finite end a run that leaves such steps out: it has diverged."""

_MOST_NAMED = 4


@dataclass(frozen=True)
class StepImages:
    """The images of a step in order: their keys, timesteps (0..1000) and losses (float32, on the CPU)."""

    keys: Sequence[str]
    timesteps: Sequence[float]
    loss_B: Tensor

    def named(self, image_paths: Mapping[str, Path]) -> str:
        """The images whose loss is not finite, or all, if it is the gradient that is not; a few at most."""
        bad = [place for place, loss in enumerate(self.loss_B.tolist()) if not math.isfinite(loss)]
        places = bad or list(range(len(self.keys)))
        names = [
            f"`{image_paths.get(self.keys[place], self.keys[place])}` at timestep {self.timesteps[place]:.1f}"
            for place in places[:_MOST_NAMED]
        ]
        more = len(places) - len(names)
        return ", ".join(names) + (f" and {more} more" if more else "")


@dataclass
class NonFiniteGuard:
    """Stops the run at a step that is not finite or, with `skip`, lets the loop leave it out.

    `image_paths` tells an image's path by its key. Its state is part of the run's.
    """

    skip: bool = False
    image_paths: Mapping[str, Path] = field(default_factory=dict)
    num_skipped: int = 0
    in_a_row: int = 0

    def admits(
        self,
        step: int,
        images: StepImages,
        gradient_norm: float,
        network: LoRANetwork,
        *,
        last_good: Path | None,
        report: Reporter,
    ) -> bool:
        """Whether the step may be taken; its gradients are still in place.

        Raises DivergedError, naming images, timesteps and module, where the run is to stop.
        """
        is_finite = math.isfinite(gradient_norm) and bool(torch.isfinite(images.loss_B).all())
        if is_finite:
            self.in_a_row = 0
            return True
        trouble = self._describe(step, images, network)
        self.num_skipped += 1
        self.in_a_row += 1
        if not self.skip:
            raise DivergedError(trouble, hint=_hint(step, last_good))
        if self.in_a_row >= MOST_IN_A_ROW:
            raise DivergedError(
                f"{trouble}; it is step {self.in_a_row} of such in a row", hint=_hint(step, last_good)
            )
        report.warning(f"{trouble}: left out ({count_text(self.num_skipped, 'step')} so far)")
        return False

    def _describe(self, step: int, images: StepImages, network: LoRANetwork) -> str:
        what = "gradient" if bool(torch.isfinite(images.loss_B).all()) else "loss"
        module = first_bad_module(network)
        where = f", and the gradient of `{module}` first" if module is not None else ""
        return f"the {what} is not finite at step {step}: {images.named(self.image_paths)}{where}"

    def state_dict(self) -> dict[str, int]:
        return {"num_skipped": self.num_skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.num_skipped, self.in_a_row = state["num_skipped"], state["in_a_row"]


def first_bad_module(network: LoRANetwork) -> str | None:
    """The first module, in model order, whose gradient is not finite."""
    for module, lora in network.adapters():
        for parameter in lora.parameters():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                return module.name
    return None


def _hint(step: int, last_good: Path | None) -> str:
    if last_good is not None:
        return f"lower `--learning_rate`, or leave such steps out by `--on_nan skip`; `{last_good}` is from before"
    if step == 1:
        return (
            "at the first step that comes of the model, the caches or `--network_weights`: check those files"
        )
    return "lower `--learning_rate`, or leave such steps out by `--on_nan skip`; nothing was saved before it"
