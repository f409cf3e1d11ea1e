"""What the processes of a run give each other in a step, so that each of them knows the whole step.

Every process shows its share of the step's batches. Then gradients, losses and noise levels are summed over
the processes, each having zeros where another has values, and all of them take the same optimiser step. So
weights and optimiser are the same everywhere without ever being sent, and N processes do what one does with
N times the accumulation.

Shapes: B images of a step, P parameters
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyimg.memory.processes import Processes
from hyimg.memory.reduction import sum_over_processes
from hyimg.training.steps import Step


class StepTally:
    """What this process has measured of a step's images."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.losses: dict[int, Tensor] = {}
        self.sigmas: dict[int, Tensor] = {}
        self.preservation: list[Tensor] = []

    def add(self, number: int, loss_B: Tensor, sigma_B: Tensor) -> None:
        """The losses and noise levels (0..1) of the step's batch `number`, detached."""
        self.losses[number], self.sigmas[number] = loss_B, sigma_B

    def add_preservation(self, loss_B: Tensor) -> None:
        """The losses of a batch that hold the base's output, detached."""
        self.preservation.append(loss_B)


@dataclass(frozen=True)
class StepTotals:
    """A step as all processes have measured it: losses and noise levels by image, in the order of the step's
    batches, and the sum of the losses that hold the base's output; float32, on the CPU."""

    loss_B: Tensor
    sigma_B: Tensor
    preservation: float


@dataclass(frozen=True)
class Exchange:
    """The exchange of a run; for a process alone it gives back what it is given."""

    processes: Processes
    device: torch.device

    def totals(self, tally: StepTally, parameters: Sequence[Tensor]) -> StepTotals:
        """The whole step; the parameters' gradients become those of all its images.

        A parameter without a gradient in any process (module dropout left it out of all batches) has none
        afterwards, as with one process.
        """
        loss_B, sigma_B = (_in_order(tally.step, values) for values in (tally.losses, tally.sigmas))
        kept = float(torch.cat(tally.preservation).sum()) if tally.preservation else 0.0
        if self.processes.world == 1:
            return StepTotals(loss_B, sigma_B, kept)
        has_gradient_P = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
        told = torch.cat([loss_B, sigma_B, has_gradient_P, torch.tensor([kept])]).to(self.device)
        sum_over_processes([told])
        sizes = [len(loss_B), len(sigma_B), len(parameters), 1]
        loss_B, sigma_B, has_gradient_P, kept_1 = torch.split_with_sizes(told.cpu(), sizes)
        gradients = []
        for parameter, number in zip(parameters, has_gradient_P.tolist(), strict=True):
            if number and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                gradients.append(parameter.grad)
        sum_over_processes(gradients)
        return StepTotals(loss_B, sigma_B, float(kept_1))

    def agreed(self, asked: signal.Signals | None) -> signal.Signals | None:
        """The signal that asks the run to stop, once any process has got one: the same answer in all of them."""
        if self.processes.world == 1:
            return asked
        counts = {number: torch.zeros(1, device=self.device) for number in (signal.SIGINT, signal.SIGTERM)}
        if asked is not None:
            counts[asked] += 1
        sum_over_processes(list(counts.values()))
        return next((number for number, count in counts.items() if bool(count)), None)


def _in_order(step: Step, values: dict[int, Tensor]) -> Tensor:
    """The values of this process's batches at the places of their images, 0 elsewhere; float32, on the CPU."""
    ordered_B = torch.zeros(step.num_samples)
    if values:
        own = torch.cat(list(values.values())).float().cpu()
        places = [place for number in values for place in step.places(number)]
        ordered_B[places] = own
    return ordered_B
