"""The optimisers, by the names that the reference tool's users know.

Each is `(parameter_groups, lr, **arguments) -> torch.optim.Optimizer`; what is not torch's own is imported
when it is asked for.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from hyimg.errors import HyimgError
from hyimg.plugins import Plugins, bind_arguments, load_object, parse_arguments

Groups = Iterable[dict[str, Any]]


def adamw(groups: Groups, lr: float, **arguments: Any) -> Optimizer:
    """torch's AdamW (Loshchilov and Hutter, arXiv 1711.05101), weight decay 0.01 unless said otherwise."""
    return torch.optim.AdamW(list(groups), lr=lr, **arguments)


def sgd_nesterov(groups: Groups, lr: float, *, momentum: float = 0.9, **arguments: Any) -> Optimizer:
    """SGD with Nesterov momentum."""
    return torch.optim.SGD(list(groups), lr=lr, momentum=momentum, nesterov=True, **arguments)


def adamw_8bit(groups: Groups, lr: float, **arguments: Any) -> Optimizer:
    """bitsandbytes' AdamW with its state in 8 bits (Dettmers et al., arXiv 2110.02861)."""
    return _bitsandbytes("AdamW8bit")(list(groups), lr=lr, **arguments)  # type: ignore[no-any-return]


def adafactor(groups: Groups, lr: float, **arguments: Any) -> Optimizer:
    """transformers' Adafactor (Shazeer and Stern, arXiv 1804.04235).

    With `relative_step=True`, its default, it makes its own rate, and `--learning_rate` is not used.
    """
    from transformers.optimization import Adafactor

    relative = arguments.get("relative_step", True)
    # a group's own rate would override the None that asks for a relative one
    own = [{k: v for k, v in group.items() if k != "lr"} if relative else group for group in groups]
    return Adafactor(own, lr=None if relative else lr, **arguments)  # type: ignore[no-any-return]


def _bitsandbytes(name: str) -> Callable[..., Any]:
    # it looks for an optional kernel on import and logs a line that reads like a failure
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise HyimgError(
            f"`--optimizer_type` `{name}` needs bitsandbytes, which cannot be imported: {error}",
            hint="pip install bitsandbytes",
        ) from error
    return getattr(bitsandbytes.optim, name)  # type: ignore[no-any-return]


# Where the built-in functions pass their arguments on, so that those can be checked before long work
_CONSTRUCTORS: dict[str, str] = {
    "adamw": "torch.optim:AdamW",
    "adafactor": "transformers.optimization:Adafactor",
    "sgd_nesterov": "torch.optim:SGD",
    "adamw_8bit": "bitsandbytes.optim:AdamW8bit",
}


def resolve_optimizer(
    plugins: Plugins, name: str, pairs: Iterable[str]
) -> Callable[[Groups, float], Optimizer]:
    """The optimiser of that name, or at `package.Class`, with `--optimizer_args` bound and checked.

    Raises HyimgError for an unknown name, a class that cannot be imported, or an argument it does not take.
    """
    arguments = parse_arguments(pairs, "--optimizer_args")
    if "lr" in arguments:
        raise HyimgError("`lr` in `--optimizer_args`: the rate is `--learning_rate`", hint="take it out")
    if "." in name:
        make = checked = load_object(name)
    else:
        make = plugins.resolve("optimizers", name)
        constructor = _CONSTRUCTORS.get(make.__name__) if make.__module__ == __name__ else None
        checked = load_object(constructor) if constructor else make
    bind_arguments(checked, arguments, option="--optimizer_args", name=name)
    bound = functools.partial(make, **arguments)
    _try(bound, name)
    return lambda groups, lr: bound(list(groups), lr=lr)


def _try(make: Callable[..., Any], name: str) -> None:
    """Makes the optimiser of one parameter, so that a value which it refuses is found before the model is read."""
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    try:
        made = make([{"params": [parameter], "lr": 1e-4}], lr=1e-4)
    except HyimgError:
        raise
    except Exception as error:
        raise HyimgError(
            f"the optimiser `{name}` refuses its arguments: {type(error).__name__}: {error}",
            hint="mend `--optimizer_args`",
        ) from error
    if not isinstance(made, Optimizer):
        raise HyimgError(f"`{name}` is no optimiser: it makes a {type(made).__name__}")
