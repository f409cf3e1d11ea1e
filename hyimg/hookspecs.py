"""The hooks that a plugin may implement; docs/plugins.md is generated from their docstrings and examples.

Hooks that provide something return a mapping from the name that a user types to the function, or to its location
as "module:function", which is imported only when that name is used. Hooks that observe events return
nothing. The built-in losses, samplers, timestep samplings, optimisers, network and commands use the same hooks.

Each example is a complete plugin, and a test runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

if TYPE_CHECKING:
    import torch

    from hyimg.config.commands import TrainConfig
    from hyimg.report import Reporter

hookspec = pluggy.HookspecMarker("hyimg")
hookimpl = pluggy.HookimplMarker("hyimg")

Provided = Mapping[str, "str | Callable[..., Any]"]


@dataclass(frozen=True)
class Stateful:
    """A part of a training run that is saved in its states and restored from them.

    `state_dict` returns dictionaries, lists and tuples of numbers, strings and tensors; `load_state_dict` gets the
    same back, with tensors on the CPU that it may keep.
    """

    name: str
    state_dict: Callable[[], Any]
    load_state_dict: Callable[[Any], object]


class RunSchedule(Protocol):
    """The length of a run, in optimiser steps and in epochs."""

    @property
    def max_steps(self) -> int: ...
    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def num_epochs(self) -> int: ...


class RunFiles(Protocol):
    """The run folder, and the name that all files of the run begin with (`--output_name`)."""

    @property
    def directory(self) -> Path: ...
    @property
    def name(self) -> str: ...


class RunProcesses(Protocol):
    """Which of a run's `world` processes this is. The main one, rank 0, writes the files."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def is_main(self) -> bool: ...


class RunLoss(Protocol):
    """`value` is the mean loss of the last 50 steps, NaN before the first."""

    @property
    def value(self) -> float: ...


class TrainingRun(Protocol):
    """A run as event hooks see it. These attributes stay; whatever else a run has may change.

    `step` and `epoch` are the last completed ones, 0 before the first. `measured` (name -> number) are the values
    that the step's line of metrics gets next to its losses. `saved` lists the LoRA files in the order of saving;
    only the main process has any.
    """

    step: int
    epoch: int
    measured: dict[str, float]
    report: Reporter

    @property
    def config(self) -> TrainConfig: ...
    @property
    def seed(self) -> int: ...
    @property
    def schedule(self) -> RunSchedule: ...
    @property
    def folder(self) -> RunFiles: ...
    @property
    def processes(self) -> RunProcesses: ...
    @property
    def losses(self) -> RunLoss: ...
    @property
    def saved(self) -> Sequence[Path]: ...

    def register_state(self, part: Stateful) -> None:
        """Adds a part to the run's states; in a resumed run it is restored at once. Names are unique."""


@hookspec
def hyimg_losses() -> Provided:  # type: ignore[empty-body]
    """Losses for `--loss_type`: `(prediction, target, context) -> (B,)`, one value per image.

    `prediction` and `target` are the predicted and the target velocity, float32 BCHW; `context` is a
    `hyimg.flow.losses.LossContext` with noise levels, timesteps and, for images with masks, the weight map, which
    `hyimg.flow.losses.image_mean` applies. `--loss_args` sets keyword arguments. A loss that raises, has the wrong
    shape or has no gradient ends the run at its first step, exit code 1.

    ```python
    from hyimg.flow.losses import image_mean
    from hyimg.hookspecs import hookimpl


    def quartic(prediction, target, context, *, weight: float = 1.0):
        \"\"\"Mean of the fourth powers; --loss_args "weight=2" scales it.\"\"\"
        return weight * image_mean((prediction - target) ** 4, context.weight_map)


    @hookimpl
    def hyimg_losses():
        return {"quartic": quartic}
    ```
    """


@hookspec
def hyimg_samplers() -> Provided:  # type: ignore[empty-body]
    """Samplers for `--sampler`, and for `--ss` in a prompt file: `(denoise, x, sigmas, callback) -> x`, all float32.

    `denoise(x_BCHW, sigma)` is the model's estimate of the clean latent with guidance applied; `sigmas` decrease
    from 1 to 0 and number one more than the steps; `callback(step, x, denoised)`, if not None, is called after
    each step, counted from 0. Returns a latent of the shape of `x`. `--sampler_args` sets keyword arguments.

    ```python
    from hyimg.hookspecs import hookimpl


    def clipped_euler(denoise, x, sigmas, callback, *, stop: float = 0.0):
        \"\"\"Euler's method that skips the levels below `stop` and jumps to the estimate.\"\"\"
        levels = sigmas.tolist()
        for step, (sigma, after) in enumerate(zip(levels, levels[1:])):
            denoised = denoise(x, sigma)
            after = 0.0 if after < stop else after
            x = denoised + (x - denoised) * (after / sigma)
            if callback is not None:
                callback(step, x, denoised)
            if after == 0:
                break
        return x


    @hookimpl
    def hyimg_samplers():
        return {"clipped_euler": clipped_euler}
    ```
    """


@hookspec
def hyimg_timestep_samplers() -> Provided:  # type: ignore[empty-body]
    """Timestep samplings for `--timestep_sampling`: `(draws, context) -> sigma_B` in 0..1, float32.

    `draws` is a `hyimg.flow.timesteps.Draws`: a uniform and a normal draw per sample, float32 of shape B. Use these
    and no generator, so that runs are reproducible. `context` is a `hyimg.flow.timesteps.TimestepContext`.
    `--timestep_sampling_args` sets keyword arguments. Levels outside 0..1 or of another shape are an error.
    `--show_timesteps FILE.png` plots the distribution.

    ```python
    from hyimg.hookspecs import hookimpl


    def power(draws, context, *, exponent: float = 2.0):
        \"\"\"The higher the exponent, the more low noise levels.\"\"\"
        return draws.uniform_B**exponent


    @hookimpl
    def hyimg_timestep_samplers():
        return {"power": power}
    ```
    """


@hookspec
def hyimg_optimizers() -> Provided:  # type: ignore[empty-body]
    """Optimisers for `--optimizer_type`: `(parameter_groups, lr, **arguments) -> torch.optim.Optimizer`.

    A class works too. Groups are dictionaries with `params` and `lr`. `--optimizer_args` sets keyword arguments.
    The optimiser is tried for a few steps on small parameters before the model is loaded, so that errors surface
    early. Its `state` and `param_groups` are saved and resumed; they may hold tensors, numbers, strings, lists and
    dictionaries.

    ```python
    import torch

    from hyimg.hookspecs import hookimpl


    def nesterov(parameter_groups, lr, *, momentum: float = 0.9):
        \"\"\"SGD with Nesterov's momentum; --optimizer_args "momentum=0.95" sets it.\"\"\"
        return torch.optim.SGD(parameter_groups, lr=lr, momentum=momentum, nesterov=True)


    @hookimpl
    def hyimg_optimizers():
        return {"nesterov": nesterov}
    ```
    """


@hookspec
def hyimg_networks() -> Provided:  # type: ignore[empty-body]
    """Network types for `--network_module`: subclasses of `hyimg.lora.base.Adapter`, one adapter per Linear.

    An adapter creates its parameters in `__init__(in_features, out_features, *, rank, alpha)`, initialises them in
    `initialize(*key)` so that it changes nothing yet, and returns in `delta()` what it adds to the weight: float32
    (out_features, in_features), with its graph, scaled by alpha/rank. Saving, resuming, averaging, ranks and
    learning rates by pattern, module dropout, preservation, validation and previews follow from these. Further
    keyword arguments of `__init__` are set by `--network_args`. `supports` lists the optional features that the
    class supports; options that need others are refused. Files hold parameters under their own names.

    ```python
    import torch
    from torch import nn

    from hyimg.hookspecs import hookimpl
    from hyimg.lora.base import Adapter


    class Rows(Adapter):
        \"\"\"A factor per output row and one per input column: rank 1 without random initialisation.\"\"\"

        def __init__(self, in_features, out_features, *, rank, alpha, start: float = 0.01):
            super().__init__(in_features, out_features, rank=rank, alpha=alpha)
            self.start = start
            self.rows = nn.Parameter(torch.zeros(out_features))
            self.columns = nn.Parameter(torch.zeros(in_features))

        @torch.no_grad()
        def initialize(self, *key):
            self.rows.zero_()
            self.columns.fill_(self.start)

        def delta(self):
            return self.scale * torch.outer(self.rows.float(), self.columns.float())


    @hookimpl
    def hyimg_networks():
        return {"rows": Rows}
    ```
    """


@hookspec
def hyimg_caption_transforms() -> Provided:  # type: ignore[empty-body]
    """Caption transforms for `--caption_transform`: `(caption, context) -> caption`, applied in the order given.

    A transform gets the caption as it is in the image's file (possibly several lines), before prefix, wildcards,
    shuffling and dropout. It must be deterministic: every command transforms the captions again, and the result is
    the key into the text cache. `context` is a `hyimg.data.captions.CaptionContext`. `--caption_transform_args`
    sets keyword arguments. Prompts of previews are not transformed. Raising, or returning anything but text, is an
    error that names the image.

    ```python
    from hyimg.hookspecs import hookimpl


    def lower(caption, context, *, keep: str = ""):
        \"\"\"Lower case, except for the word `keep`; captions of regularisation images are not changed.\"\"\"
        if context.is_reg:
            return caption
        return " ".join(word if word == keep else word.lower() for word in caption.split(" "))


    @hookimpl
    def hyimg_caption_transforms():
        return {"lower": lower}
    ```
    """


@hookspec
def hyimg_commands() -> Provided:  # type: ignore[empty-body]
    """Commands: `hyimg NAME ...` runs the function, a Typer command whose signature declares its options.

    `hyimg NAME --help` comes from its signature and docstring. A `hyimg.errors.HyimgError` is printed as one
    sentence with exit code 2, as in every command; any other exception is reported with the plugin's name, exit
    code 1. `hyimg --plugin FILE NAME` runs a command from a file or module that is not installed. `hyimg --help`
    imports plugins to list their commands and skips those that would import torch: import heavy packages inside
    functions, or give commands as "module:function".

    ```python
    from pathlib import Path
    from typing import Annotated

    import typer

    from hyimg.errors import HyimgError
    from hyimg.hookspecs import hookimpl


    def count_words(caption: Path, least: Annotated[int, typer.Option(help="shortest word")] = 1):
        \"\"\"Count the words of a caption file.\"\"\"
        if not caption.is_file():
            raise HyimgError(f"there is no file `{caption}`", hint="name a caption file")
        print(sum(len(word) >= least for word in caption.read_text(encoding="utf-8").split()))


    @hookimpl
    def hyimg_commands():
        return {"count-words": count_words}
    ```
    """


@hookspec
def hyimg_run_start(run: TrainingRun) -> None:
    """Training is about to start, or to continue after step `run.step`; nothing has changed yet.

    `run` is a `hyimg.hookspecs.TrainingRun`. State that a plugin keeps between steps is saved and restored with the
    run after `run.register_state(Stateful(name, state_dict, load_state_dict))` (`hyimg.hookspecs.Stateful`; the
    method's earlier name, `run.remember`, still works). A plugin that raises ends the run with an error that names
    it, exit code 1, as in every event. With several processes, events reach each of them; `run.processes.is_main`
    says which one should write files.

    ```python
    from hyimg.hookspecs import hookimpl


    @hookimpl
    def hyimg_run_start(run):
        run.report.note(f"{run.config.saving.output_name}: {run.schedule.max_steps} steps, seed {run.seed}")
    ```
    """


@hookspec
def hyimg_step_end(run: TrainingRun, step: int, loss_B: torch.Tensor) -> None:
    """An optimiser step is complete, but not saved yet.

    `step` counts from 1; `loss_B` holds the losses of the step's images, float32 on the CPU. Numbers added to
    `run.measured` (name -> number) are logged with the step, in the metrics file and in the trackers.

    ```python
    from hyimg.hookspecs import hookimpl


    @hookimpl
    def hyimg_step_end(run, loss_B):
        run.measured["loss_worst"] = float(loss_B.max())
    ```
    """


@hookspec
def hyimg_epoch_end(run: TrainingRun, epoch: int) -> None:
    """An epoch is complete and its files are saved.

    `epoch` counts from 1; `run.saved` lists the files, newest last. The epoch's state is already saved, so a plugin
    must change its registered state in `hyimg_step_end`, not here: a resumed run would miss the change.

    ```python
    from hyimg.hookspecs import hookimpl


    @hookimpl
    def hyimg_epoch_end(run, epoch):
        run.report.note(f"epoch {epoch}: smoothed loss {run.losses.value:.4f}")
    ```
    """


@hookspec
def hyimg_run_end(run: TrainingRun) -> None:
    """Training is finished and the final file is saved. Not called for a run that failed or was stopped.

    ```python
    from hyimg.cache.atomic import atomic_write_text
    from hyimg.hookspecs import hookimpl


    @hookimpl
    def hyimg_run_end(run):
        folder = run.folder.directory
        atomic_write_text(folder / "done.txt", f"{run.step} steps\\n", root=folder)
    ```
    """
