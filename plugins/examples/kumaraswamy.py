"""A hyimg plugin in one file: the timestep sampling `kumaraswamy`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from hyimg.errors import HyimgError
from hyimg.hookspecs import Provided, hookimpl

if TYPE_CHECKING:
    from hyimg.flow.timesteps import Draws, TimestepContext


@hookimpl
def hyimg_timestep_samplers() -> Provided:
    return {"kumaraswamy": kumaraswamy}


def kumaraswamy(draws: Draws, context: TimestepContext, *, a: float = 2.0, b: float = 2.0) -> Tensor:
    """Noise levels after Kumaraswamy's distribution on 0..1, with the density a b x^(a-1) (1 - x^a)^(b-1).

    Much like a beta distribution, and its inverse is a formula (Kumaraswamy 1980, Journal of Hydrology 46):
    `a` = `b` = 1 is uniform, a larger `a` draws more high levels, a larger `b` more low ones. Raises HyimgError for a
    number that is not above 0.
    """
    if a <= 0 or b <= 0:
        raise HyimgError(f"`a` {a:g} and `b` {b:g} of `kumaraswamy` must be above 0")
    return (1 - (1 - draws.uniform_B) ** (1 / b)) ** (1 / a)
