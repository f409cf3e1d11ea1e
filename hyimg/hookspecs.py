"""The hooks that a plugin may implement. Each has its paragraph and example in docs/plugins.md.

Hooks that give something return a mapping from the name that a user types to the function, or to its place
as "module:function", which is imported only when somebody asks for that name. Hooks that see events return
nothing. Our own losses, samplers, timestep samplings and optimisers come through the same hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import torch

    from hyimg.training.run import Run

hookspec = pluggy.HookspecMarker("hyimg")
hookimpl = pluggy.HookimplMarker("hyimg")

Provided = Mapping[str, "str | Callable[..., Any]"]


@hookspec
def hyimg_losses() -> Provided:  # type: ignore[empty-body]
    """Losses for `--loss_type`: `(prediction, target, context) -> (B,)`, one value per image.

    `prediction` and `target` are float32 BCHW, `context` a `hyimg.flow.losses.LossContext`. Further keyword
    arguments with defaults are what `--loss_args` may set.
    """


@hookspec
def hyimg_samplers() -> Provided:  # type: ignore[empty-body]
    """Samplers for `--sampler`: `(denoise, x, sigmas, callback) -> x`, all float32.

    `denoise(x_BCHW, sigma)` is the model's estimate of the clean latent with guidance applied; `sigmas` fall
    from 1 to 0; `callback(step, x, denoised)` is called after each step. Further keyword arguments with
    defaults are what `--sampler_args` may set.
    """


@hookspec
def hyimg_timestep_samplers() -> Provided:  # type: ignore[empty-body]
    """Timestep samplings for `--timestep_sampling`: `(draws, context) -> sigma_B` in 0..1, float32.

    `draws` is a `hyimg.flow.timesteps.Draws` (each sample's own uniform and normal draw), `context` a
    `hyimg.flow.timesteps.TimestepContext`.
    """


@hookspec
def hyimg_optimizers() -> Provided:  # type: ignore[empty-body]
    """Optimisers for `--optimizer_type`: `(parameter_groups, lr, **arguments) -> torch.optim.Optimizer`."""


@hookspec
def hyimg_run_start(run: Run) -> None:
    """Training is about to begin, or to go on after the step `run.step`; nothing has been changed yet.

    What a plugin keeps over steps goes into the run's states, and comes back from them, through
    `run.remember(Stateful(name, state_dict, load_state_dict))` (`hyimg.training.resume`). In training on several
    devices the event comes in every process; `run.processes.is_main` says which one should write files.
    """


@hookspec
def hyimg_step_end(run: Run, step: int, loss_B: torch.Tensor) -> None:
    """An optimiser step is done. `step` counts from 1; `loss_B` are the step's losses, float32, one per image."""


@hookspec
def hyimg_epoch_end(run: Run, epoch: int) -> None:
    """An epoch is done and its files are saved. `epoch` counts from 1."""


@hookspec
def hyimg_run_end(run: Run) -> None:
    """Training is over and the final file is saved."""
