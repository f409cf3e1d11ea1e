"""The optimisers, by the reference tool's names.

Each is `(parameter_groups, lr, **arguments) -> torch.optim.Optimizer`; other packages than torch are imported only
when used.
"""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from hyimg.errors import HyimgError, exception_text
from hyimg.plugins import Plugins, load_object
from hyimg.plugins.arguments import bind_arguments, check_kinds, check_names, parse_arguments

Groups = Iterable[dict[str, Any]]
MakeOptimizer = Callable[[Groups, float], Optimizer]


@dataclass(frozen=True)
class PackagedOptimizer:
    """A class of another package: Python imports it from `package`, pip installs `install`."""

    name: str
    package: str
    install: str

    def constructor(self) -> Callable[..., Optimizer]:
        """The class. Raises HyimgError, with the command that installs it, if it cannot be imported."""
        try:
            return getattr(importlib.import_module(self.package), self.name)  # type: ignore[no-any-return]
        except Exception as error:  # a binary for another torch or CUDA may raise anything
            package = self.package.partition(".")[0]
            raise HyimgError(
                f"`--optimizer_type` `{self.name}` needs {package}, which cannot be imported or is too old: "
                f"{exception_text(error)}",
                hint=f"pip install --upgrade {self.install}",
            ) from error

    def __call__(self, groups: Groups, lr: float, **arguments: Any) -> Optimizer:
        return self.constructor()(list(groups), lr=lr, **arguments)


_TORCH = functools.partial(PackagedOptimizer, package="torch.optim", install="torch")
_BITSANDBYTES = functools.partial(PackagedOptimizer, package="bitsandbytes.optim", install="bitsandbytes")
_SCHEDULEFREE = functools.partial(PackagedOptimizer, package="schedulefree", install='"hyimg[optimizers]"')
_DADAPTATION = functools.partial(PackagedOptimizer, package="dadaptation", install='"hyimg[optimizers]"')
_DADAPTATION_EXPERIMENTAL = functools.partial(
    PackagedOptimizer, package="dadaptation.experimental", install='"hyimg[optimizers]"'
)

# Loshchilov and Hutter, arXiv 1711.05101; weight decay 0.01 unless said otherwise
adamw = _TORCH("AdamW")
# State in 8 bits: Dettmers et al., arXiv 2110.02861; the paged ones move it to CPU memory where a GPU is full
adamw_8bit = _BITSANDBYTES("AdamW8bit")
paged_adamw = _BITSANDBYTES("PagedAdamW")
paged_adamw_8bit = _BITSANDBYTES("PagedAdamW8bit")
paged_adamw_32bit = _BITSANDBYTES("PagedAdamW32bit")
# Pagliardini et al., arXiv 2409.03137: a second, slow average of the gradient
ademamix_8bit = _BITSANDBYTES("AdEMAMix8bit")
paged_ademamix_8bit = _BITSANDBYTES("PagedAdEMAMix8bit")
# Chen et al., arXiv 2302.06675
lion = _BITSANDBYTES("Lion")
lion_8bit = _BITSANDBYTES("Lion8bit")
paged_lion_8bit = _BITSANDBYTES("PagedLion8bit")
# Mishchenko and Defazio, arXiv 2306.06101: finds the rate itself, and `lr` scales it
prodigy = PackagedOptimizer("Prodigy", "prodigyopt", '"hyimg[optimizers]"')
# Defazio and Mishchenko, arXiv 2301.07733, likewise. By the authors' package: in pytorch_optimizer 4.1
# DAdaptAdan diverges on a quadratic bowl, and DAdaptSGD estimates another rate
dadapt_adagrad = _DADAPTATION("DAdaptAdaGrad")
dadapt_adam = _DADAPTATION("DAdaptAdam")
dadapt_adan = _DADAPTATION("DAdaptAdan")
dadapt_lion = _DADAPTATION("DAdaptLion")
dadapt_sgd = _DADAPTATION("DAdaptSGD")
dadapt_adam_preprint = _DADAPTATION_EXPERIMENTAL("DAdaptAdamPreprint")
dadapt_adan_ip = _DADAPTATION_EXPERIMENTAL("DAdaptAdanIP")
# Luo et al., arXiv 2307.02047
came = PackagedOptimizer("CAME", "pytorch_optimizer", '"hyimg[optimizers]"')
# Defazio et al., arXiv 2405.15682: averages take the place of a schedule
adamw_schedule_free = _SCHEDULEFREE("AdamWScheduleFree")
radam_schedule_free = _SCHEDULEFREE("RAdamScheduleFree")
sgd_schedule_free = _SCHEDULEFREE("SGDScheduleFree")


def sgd_nesterov(groups: Groups, lr: float, *, momentum: float = 0.9, **arguments: Any) -> Optimizer:
    """torch's SGD with Nesterov momentum."""
    return torch.optim.SGD(list(groups), lr=lr, momentum=momentum, nesterov=True, **arguments)


def sgd_nesterov_8bit(groups: Groups, lr: float, *, momentum: float = 0.9, **arguments: Any) -> Optimizer:
    """bitsandbytes' SGD with momentum in 8 bits, under the reference tool's name.

    As there, `nesterov=True` is passed on, which bitsandbytes accepts and ignores.
    """
    return _BITSANDBYTES("SGD8bit")(groups, lr, momentum=momentum, nesterov=True, **arguments)


def adafactor(groups: Groups, lr: float, **arguments: Any) -> Optimizer:
    """transformers' Adafactor (Shazeer and Stern, arXiv 1804.04235).

    With `relative_step=True`, its default, it computes its own rate, and `--learning_rate` is ignored.
    """
    from transformers.optimization import Adafactor

    relative = arguments.get("relative_step", True)
    # a rate in the group would override the None that requests a relative one
    own = [{k: v for k, v in group.items() if k != "lr"} if relative else group for group in groups]
    return Adafactor(own, lr=None if relative else lr, **arguments)  # type: ignore[no-any-return]


# Where these functions pass their arguments, so that they can be checked early
_PASSES_ON_TO = {
    "adafactor": "transformers.optimization:Adafactor",
    "sgd_nesterov": "torch.optim:SGD",
    "sgd_nesterov_8bit": "bitsandbytes.optim:SGD8bit",
}


def resolve_optimizer(
    plugins: Plugins, name: str, pairs: Iterable[str], *, wrapper_pairs: Iterable[str] | None = None
) -> MakeOptimizer:
    """The optimiser of that name, or at `package.Class`, with `--optimizer_args` bound and checked.

    With `wrapper_pairs`, the `--schedulefree_wrapper_args`, it is wrapped to be schedule-free, unless it is
    already. One that has modes (schedule-free ones) is made in its training mode. Raises HyimgError for an
    unknown name, a class that cannot be imported, or an argument it does not take; `try_optimizer` finds the rest.
    """
    _quieten_bitsandbytes()
    arguments = parse_arguments(pairs, "--optimizer_args")
    if "lr" in arguments:
        raise HyimgError("`lr` in `--optimizer_args`: the rate is `--learning_rate`", hint="remove it")
    if "." in name:
        make = checked = load_object(name)
    else:
        make = _by_name(plugins, name)
        checked = make
        if isinstance(make, PackagedOptimizer):
            checked = make.constructor()
        elif make.__module__ == __name__:
            checked = load_object(_PASSES_ON_TO[make.__name__])
    check_names(checked, arguments, option="--optimizer_args", name=name)
    check_kinds(checked, arguments, option="--optimizer_args", name=name)

    wrap = _wrapper(wrapper_pairs) if wrapper_pairs is not None else None

    def make_optimizer(groups: Groups, lr: float) -> Optimizer:
        optimizer: Optimizer = make(list(groups), lr=lr, **arguments)
        if wrap is not None and isinstance(optimizer, Optimizer) and not has_modes(optimizer):
            optimizer = wrap(optimizer)
        if has_modes(optimizer):
            optimizer.train()  # type: ignore[attr-defined]
        return optimizer

    return make_optimizer


def _wrapper(pairs: Iterable[str]) -> Callable[[Optimizer], Optimizer]:
    """`--optimizer_schedulefree_wrapper` with its arguments bound and checked."""
    option = "--schedulefree_wrapper_args"
    try:
        from schedulefree import ScheduleFreeWrapper

        from hyimg.training.schedulefree_wrapper import ScheduleFreeOptimizer
    except ImportError as error:
        raise HyimgError(
            "`--optimizer_schedulefree_wrapper` needs schedulefree, which cannot be imported or is too old: "
            f"{exception_text(error)}",
            hint='pip install --upgrade "hyimg[optimizers]"',
        ) from error
    arguments = parse_arguments(pairs, option)
    bound = bind_arguments(ScheduleFreeWrapper, arguments, option=option, name="ScheduleFreeWrapper")
    return functools.partial(ScheduleFreeOptimizer, **bound)


def base_of(optimizer: Optimizer) -> Optimizer:
    """The optimiser inside schedulefree's wrapper, or itself if it is not wrapped."""
    base = getattr(optimizer, "base", None)
    return base if isinstance(base, Optimizer) else optimizer


def _by_name(plugins: Plugins, name: str) -> Callable[..., Any]:
    """A built-in or a plugin's, in any case, or one of torch's under its own name, as the reference tool takes it."""
    own = plugins.provided("optimizers")
    if name.lower() not in {known.lower() for known in own}:
        there = getattr(torch.optim, name, None)
        if isinstance(there, type) and issubclass(there, Optimizer):
            return there
    return plugins.resolve("optimizers", name)


def has_modes(optimizer: object) -> bool:
    """Whether it has training and evaluation weights, like schedule-free optimisers."""
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


def makes_own_rate(optimizer: Optimizer) -> bool:
    """Whether it is transformers' Adafactor with `relative_step=True`."""
    return bool(optimizer.param_groups[0].get("relative_step"))


def rates(optimizer: Optimizer) -> dict[str, float]:
    """The rate of each parameter group by its name in metrics: `learning_rate`, `learning_rate_1` and so on.

    Call it after a step. For the rates that Adafactor computes, that of the group's first parameter.
    `effective_learning_rate` is added if the optimiser scales the rate: Prodigy by its `d`, a schedule-free
    optimiser in its warm-up.
    """
    found: dict[str, float] = {}
    for number, group in enumerate(optimizer.param_groups):
        suffix = f"_{number}" if number else ""
        rate = group["lr"]
        if group.get("relative_step"):
            state = optimizer.state.get(group["params"][0])
            # transformers gives its own schedule, which shows the rate, no other way to it
            rate = optimizer._get_lr(group, state) if state else None  # type: ignore[attr-defined]
        if rate is None:
            continue
        found[f"learning_rate{suffix}"] = float(rate)
        if "d" in group:
            found[f"effective_learning_rate{suffix}"] = float(group["d"]) * float(rate)
        elif "scheduled_lr" in group:
            found[f"effective_learning_rate{suffix}"] = float(group["scheduled_lr"])
    return found


def _quieten_bitsandbytes() -> None:
    # it looks for an optional kernel on import, and transformers imports it too, and logs a line that reads
    # like a failure
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # the run says so itself (`hyimg.training.optimization`)
    warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU", UserWarning)
