"""Schedule-free optimisers: the weights to save and to render with are not those that are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.optim import Optimizer

from hyimg.training.optimizers import has_modes


@contextmanager
def averaged_weights(optimizer: Optimizer) -> Iterator[None]:
    """A block in which the parameters hold the average that the optimiser keeps (x of arXiv 2405.15682).

    Afterwards they are what they were, bit for bit: going to the average and back by the optimiser's own
    `eval` and `train` would round, so that saving would change the run. Takes the memory of a copy meanwhile.
    Nothing happens for an optimiser without modes.
    """
    if not has_modes(optimizer):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p.detach().clone() for p in parameters]
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter, values in zip(parameters, trained, strict=True):
                parameter.copy_(values)
