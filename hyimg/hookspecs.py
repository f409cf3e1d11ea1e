"""The hooks that a plugin may implement; docs/plugins.md is made of their paragraphs and examples.

Hooks that give something return a mapping from the name that a user types to the function, or to its place
as "module:function", which is imported only when somebody asks for that name. Hooks that see events return
nothing. Our own losses, samplers, timestep samplings, optimisers, network and commands come through the same hooks.

Each example is a whole plugin, and a test runs it.
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

    `prediction` and `target` are float32 BCHW, the velocity as the model gives it and as it should be; `context`
    is a `hyimg.flow.losses.LossContext` with noise levels, timesteps and, where images have masks, the weight
    map, which `hyimg.flow.losses.image_mean` honours. Keyword arguments are what `--loss_args` may set. A loss
    of another shape, without a gradient, or that raises ends the run at its first step, exit code 1.

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

    `denoise(x_BCHW, sigma)` is the model's estimate of the clean latent with guidance applied; `sigmas` fall
    from 1 to 0, one more than there are steps; `callback(step, x, denoised)`, where it is not None, is called
    after each step, counted from 0. What is returned has the shape of `x`. Keyword arguments are what
    `--sampler_args` may set.

    ```python
    from hyimg.hookspecs import hookimpl


    def clipped_euler(denoise, x, sigmas, callback, *, stop: float = 0.0):
        \"\"\"Euler's method, which leaves the levels below `stop` out and jumps to the estimate.\"\"\"
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

    `draws` is a `hyimg.flow.timesteps.Draws` (each sample's own uniform and normal draw, float32 of shape B: to
    use them, and no generator, is what makes a run repeatable), `context` a
    `hyimg.flow.timesteps.TimestepContext`. Keyword arguments are what `--timestep_sampling_args` may set. Levels
    outside of 0..1 or of another shape are an error. `--show_timesteps FILE.png` draws what comes out.

    ```python
    from hyimg.hookspecs import hookimpl


    def power(draws, context, *, exponent: float = 2.0):
        \"\"\"More of the low noise levels, the higher the exponent.\"\"\"
        return draws.uniform_B**exponent


    @hookimpl
    def hyimg_timestep_samplers():
        return {"power": power}
    ```
    """


@hookspec
def hyimg_optimizers() -> Provided:  # type: ignore[empty-body]
    """Optimisers for `--optimizer_type`: `(parameter_groups, lr, **arguments) -> torch.optim.Optimizer`.

    A class is such a function too. Groups are dictionaries with `params` and `lr`. Keyword arguments are what
    `--optimizer_args` may set. It makes a few steps on small parameters before the model is read, so that what
    it cannot do is said at once. What it keeps in `state` and `param_groups` is saved and resumed: tensors,
    numbers, texts, lists and dictionaries.

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
    """Kinds of network for `--network_module`: subclasses of `hyimg.lora.base.Adapter`, one adapter a Linear.

    A kind makes its parameters in `__init__(in_features, out_features, *, rank, alpha)`, gives them first values
    in `initialize(*key)` so that it does nothing yet, and says in `delta()` what it adds to the weight: float32
    (out_features, in_features), with its graph, alpha/rank in it. Saving, resuming, averages, rates and ranks by
    pattern, module dropout, preservation, validation and samples follow from these. Further keyword arguments of
    `__init__` are what `--network_args` may set. What else a kind can do stands in its `honours`; an option that
    it does not honour is refused. Files hold parameters under their own names.

    ```python
    import torch
    from torch import nn

    from hyimg.hookspecs import hookimpl
    from hyimg.lora.base import Adapter


    class Rows(Adapter):
        \"\"\"A factor for each output row and one for each input column: rank 1 without a draw.\"\"\"

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
    """Caption transforms for `--caption_transform`: `(caption, context) -> caption`, in the order that they are named.

    It sees the caption of an image as its file has it (several lines, where it has), before prefix, wildcards,
    shuffling and dropout, and must give the same text for the same caption and image: every command makes the
    captions anew, and the text cache is found by what comes out. `context` is a
    `hyimg.data.caption_transforms.CaptionContext`. Keyword arguments are what `--caption_transform_args` may set.
    Prompts of samples are not transformed. What raises or gives no text is an error that
    names the image.

    ```python
    from hyimg.hookspecs import hookimpl


    def lower(caption, context, *, keep: str = ""):
        \"\"\"Small letters, except in the word `keep`; images for regularisation stay as they are.\"\"\"
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
    """Commands of one's own: `hyimg NAME ...` runs the function, a Typer command whose signature says its options.

    `hyimg NAME --help` is made of its signature and docstring. A `hyimg.errors.HyimgError` becomes a sentence and
    exit code 2, as for every command; anything else that is raised is told with the plugin's name, exit code 1.
    The command of a file or module that is not installed is run by `hyimg --plugin FILE NAME`. To list commands,
    `hyimg --help` imports the plugins, and leaves out those that would import torch: heavy things are imported
    inside functions, or named as "module:function".

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
def hyimg_run_start(run: Run) -> None:
    """Training is about to begin, or to go on after the step `run.step`; nothing has been changed yet.

    What a plugin keeps over steps goes into the run's states, and comes back from them, through
    `run.remember(Stateful(name, state_dict, load_state_dict))` (`hyimg.training.resume`). A plugin that raises
    ends the run with a sentence that names it, exit code 1, as for every event. In training on several devices
    events come in every process; `run.processes.is_main` says which one should write files.

    ```python
    from hyimg.hookspecs import hookimpl


    @hookimpl
    def hyimg_run_start(run):
        run.report.note(f"{run.config.saving.output_name}: {run.schedule.max_steps} steps, seed {run.seed}")
    ```
    """


@hookspec
def hyimg_step_end(run: Run, step: int, loss_B: torch.Tensor) -> None:
    """An optimiser step is done; nothing of it is saved yet.

    `step` counts from 1; `loss_B` are the step's losses, float32 on the CPU, one per image of the step. What is
    put into `run.measured` (name -> number) stands in the step's line of metrics and in the trackers.

    ```python
    from hyimg.hookspecs import hookimpl


    @hookimpl
    def hyimg_step_end(run, loss_B):
        run.measured["loss_worst"] = float(loss_B.max())
    ```
    """


@hookspec
def hyimg_epoch_end(run: Run, epoch: int) -> None:
    """An epoch is done and its files are saved.

    `epoch` counts from 1; `run.saved` lists the files, the newest last. The epoch's state is saved already: what a
    plugin remembers is to change at the ends of steps, else a resumed run does not know it.

    ```python
    from hyimg.hookspecs import hookimpl


    @hookimpl
    def hyimg_epoch_end(run, epoch):
        run.report.note(f"epoch {epoch}: smoothed loss {run.losses.value:.4f}")
    ```
    """


@hookspec
def hyimg_run_end(run: Run) -> None:
    """Training is over and the final file is saved. Not called for a run that failed or was stopped.

    ```python
    from hyimg.hookspecs import hookimpl


    @hookimpl
    def hyimg_run_end(run):
        (run.folder.directory / "done.txt").write_text(f"{run.step} steps\\n", encoding="utf-8")
    ```
    """
