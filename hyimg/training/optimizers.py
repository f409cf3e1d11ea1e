"""The optimisers, by the names that the reference tool's users know.

Each is `(parameter_groups, lr, **arguments) -> torch.optim.Optimizer`; what is not torch's own is imported
when it is asked for.
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

from hyimg.errors import HyimgError
from hyimg.plugins import Plugins, check_names, load_object, parse_arguments

Groups = Iterable[dict[str, Any]]
MakeOptimizer = Callable[[Groups, float], Optimizer]


@dataclass(frozen=True)
class PackagedOptimizer:
    """A class that is used as it is: `package` is where Python imports it from, `install` what pip installs."""

    name: str
    package: str
    install: str

    def constructor(self) -> Callable[..., Optimizer]:
        """The class. Raises HyimgError, with the line that installs it, where it cannot be imported."""
        try:
            return getattr(importlib.import_module(self.package), self.name)  # type: ignore[no-any-return]
        except (ImportError, AttributeError) as error:
            package = self.package.partition(".")[0]
            raise HyimgError(
                f"`--optimizer_type` `{self.name}` needs {package}, which cannot be imported or is too old: {error}",
                hint=f"pip install --upgrade {self.install}",
            ) from error

    def __call__(self, groups: Groups, lr: float, **arguments: Any) -> Optimizer:
        return self.constructor()(list(groups), lr=lr, **arguments)


_TORCH = functools.partial(PackagedOptimizer, package="torch.optim", install="torch")
_BITSANDBYTES = functools.partial(PackagedOptimizer, package="bitsandbytes.optim", install="bitsandbytes")
_SCHEDULEFREE = functools.partial(PackagedOptimizer, package="schedulefree", install='"hyimg[optimizers]"')

# Loshchilov and Hutter, arXiv 1711.05101; weight decay 0.01 unless said otherwise
adamw = _TORCH("AdamW")
# State in 8 bits: Dettmers et al., arXiv 2110.02861; the paged ones move it to CPU memory where a GPU is full
adamw_8bit = _BITSANDBYTES("AdamW8bit")
paged_adamw = _BITSANDBYTES("PagedAdamW")
paged_adamw_8bit = _BITSANDBYTES("PagedAdamW8bit")
# Chen et al., arXiv 2302.06675
lion = _BITSANDBYTES("Lion")
lion_8bit = _BITSANDBYTES("Lion8bit")
paged_lion_8bit = _BITSANDBYTES("PagedLion8bit")
# Mishchenko and Defazio, arXiv 2306.06101: finds the rate itself, and `lr` scales it
prodigy = PackagedOptimizer("Prodigy", "prodigyopt", '"hyimg[optimizers]"')
# Luo et al., arXiv 2307.02047
came = PackagedOptimizer("CAME", "pytorch_optimizer", '"hyimg[optimizers]"')
# Defazio et al., arXiv 2405.15682: averages take the place of a schedule
adamw_schedule_free = _SCHEDULEFREE("AdamWScheduleFree")
radam_schedule_free = _SCHEDULEFREE("RAdamScheduleFree")
sgd_schedule_free = _SCHEDULEFREE("SGDScheduleFree")


def sgd_nesterov(groups: Groups, lr: float, *, momentum: float = 0.9, **arguments: Any) -> Optimizer:
    """torch's SGD with Nesterov momentum."""
    return torch.optim.SGD(list(groups), lr=lr, momentum=momentum, nesterov=True, **arguments)


def adafactor(groups: Groups, lr: float, **arguments: Any) -> Optimizer:
    """transformers' Adafactor (Shazeer and Stern, arXiv 1804.04235).

    With `relative_step=True`, its default, it makes its own rate, and `--learning_rate` is not used.
    """
    from transformers.optimization import Adafactor

    relative = arguments.get("relative_step", True)
    # a group's own rate would override the None that asks for a relative one
    own = [{k: v for k, v in group.items() if k != "lr"} if relative else group for group in groups]
    return Adafactor(own, lr=None if relative else lr, **arguments)  # type: ignore[no-any-return]


# Where our own functions pass their arguments on, so that those can be checked before long work
_PASSES_ON_TO = {"adafactor": "transformers.optimization:Adafactor", "sgd_nesterov": "torch.optim:SGD"}


def resolve_optimizer(plugins: Plugins, name: str, pairs: Iterable[str]) -> MakeOptimizer:
    """The optimiser of that name, or at `package.Class`, with `--optimizer_args` bound and checked.

    One that has modes (schedule-free ones) is made in its training mode. Raises HyimgError for an unknown
    name, a class that cannot be imported, or an argument it does not take; `try_optimizer` finds the rest.
    """
    _quieten_bitsandbytes()
    arguments = parse_arguments(pairs, "--optimizer_args")
    if "lr" in arguments:
        raise HyimgError("`lr` in `--optimizer_args`: the rate is `--learning_rate`", hint="take it out")
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

    def make_optimizer(groups: Groups, lr: float) -> Optimizer:
        optimizer: Optimizer = make(list(groups), lr=lr, **arguments)
        if has_modes(optimizer):
            optimizer.train()  # type: ignore[attr-defined]
        return optimizer

    return make_optimizer


def _by_name(plugins: Plugins, name: str) -> Callable[..., Any]:
    """A built-in or a plugin's, in any case, or one of torch's under its own name, as the reference tool takes it."""
    own = plugins.provided("optimizers")
    if name.lower() not in {known.lower() for known in own}:
        there = getattr(torch.optim, name, None)
        if isinstance(there, type) and issubclass(there, Optimizer):
            return there
    return plugins.resolve("optimizers", name)


def has_modes(optimizer: object) -> bool:
    """Whether the weights to use are other ones than those that it moves, as schedule-free optimisers have it."""
    return all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))


def makes_own_rate(optimizer: Optimizer) -> bool:
    """Whether it is transformers' Adafactor with `relative_step=True`."""
    return bool(optimizer.param_groups[0].get("relative_step"))


def rates(optimizer: Optimizer) -> dict[str, float]:
    """The rate of each parameter group as metrics name it: `learning_rate`, `learning_rate_1` and so on.

    To be asked after a step. A rate that Adafactor makes itself is that of the group's first parameter.
    `effective_learning_rate` stands beside the rate where the optimiser scales what it is given: Prodigy by
    its `d`, a schedule-free one in its warm-up.
    """
    told: dict[str, float] = {}
    for number, group in enumerate(optimizer.param_groups):
        suffix = f"_{number}" if number else ""
        rate = group["lr"]
        if group.get("relative_step"):
            state = optimizer.state.get(group["params"][0])
            # transformers gives its own schedule, which shows the rate, no other way to it
            rate = optimizer._get_lr(group, state) if state else None  # type: ignore[attr-defined]
        if rate is None:
            continue
        told[f"learning_rate{suffix}"] = float(rate)
        if "d" in group:
            told[f"effective_learning_rate{suffix}"] = float(group["d"]) * float(rate)
        elif "scheduled_lr" in group:
            told[f"effective_learning_rate{suffix}"] = float(group["scheduled_lr"])
    return told


def _quieten_bitsandbytes() -> None:
    # it looks for an optional kernel on import, and transformers imports it too, and logs a line that reads
    # like a failure
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # the run says so itself (`hyimg.training.optimization`)
    warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU", UserWarning)
