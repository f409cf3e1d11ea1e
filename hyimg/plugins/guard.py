"""Calls of plugins' functions: their exceptions and wrong results become errors that name the plugin's part."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from hyimg.errors import HyimgError, exception_text, out_of_memory_place

if TYPE_CHECKING:
    from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


class Guard:
    """What a plugin's function, which `guarded` calls, is given to call back."""

    def __init__(self) -> None:
        self.ours: list[BaseException] = []

    def unblamed(self, function: Callable[P, T]) -> Callable[P, T]:
        """`function`, whose exceptions are not the plugin's fault and stay what they are."""

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return function(*args, **kwargs)
            except BaseException as error:
                # one that was raised in calling it, by wrong arguments, is the plugin's
                if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
                    self.ours.append(error)
                raise

        return call


@contextmanager
def guarded(
    what: str, *, hint: str, error: type[HyimgError] = HyimgError, imports: bool = False
) -> Iterator[Guard]:
    """A block that calls a plugin's function, or a class that the user named.

    An exception in it, `SystemExit` too, becomes `error`: "WHAT: ValueError: its message". HyimgErrors, a lack of
    memory, and what comes from functions that are `unblamed` pass unchanged. In a block that `imports`, a MemoryError
    becomes `error` too: Python raises it for source code that is nested too deeply.
    """
    guard = Guard()
    try:
        yield guard
    except HyimgError:
        raise
    except (Exception, SystemExit) as caught:
        parses = imports and isinstance(caught, MemoryError)
        if caught in guard.ours or (out_of_memory_place(caught) is not None and not parses):
            raise
        raise error(f"{what}: {exception_text(caught)}", hint=hint) from caught


def check_tensor(
    value: object, shape: Sequence[int], what: str, *, hint: str, error: type[HyimgError] = HyimgError
) -> Tensor:
    """`value`, if it is a floating-point tensor of that shape; else raises `error`.

    `what` begins the message, "the loss returned" for "the loss returned a list, not a float tensor of shape (2,)".
    """
    import torch

    expected = f"a float tensor of shape {tuple(shape)}"
    if not isinstance(value, torch.Tensor):
        raise error(f"{what} {type(value).__name__}, not {expected}", hint=hint)
    if tuple(value.shape) != tuple(shape) or not value.is_floating_point():
        given = f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
        raise error(f"{what} {given}, not {expected}", hint=hint)
    return value
