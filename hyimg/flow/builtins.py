"""The built-in losses, samplers and timestep samplers, by the names that users type.

The values are "module:function" and are imported only when used, so that listing the names costs nothing.
A new one is a function in its module and a line here.
"""

from __future__ import annotations

from hyimg.hookspecs import Provided, hookimpl

LOSSES: dict[str, str] = {
    "l1": "hyimg.flow.losses:l1",
    "l2": "hyimg.flow.losses:l2",
    "huber": "hyimg.flow.losses:huber",
    "smooth_l1": "hyimg.flow.losses:smooth_l1",
}

SAMPLERS: dict[str, str] = {
    "euler": "hyimg.flow.samplers:euler",
    "heun": "hyimg.flow.samplers:heun",
    "dpm++2m": "hyimg.flow.samplers:dpmpp_2m",
}

TIMESTEP_SAMPLERS: dict[str, str] = {
    "sigma": "hyimg.flow.timesteps:sigma",
    "uniform": "hyimg.flow.timesteps:uniform",
    "sigmoid": "hyimg.flow.timesteps:sigmoid",
    "shift": "hyimg.flow.timesteps:shift",
    "flux_shift": "hyimg.flow.timesteps:flux_shift",
}


@hookimpl
def hyimg_losses() -> Provided:
    return LOSSES


@hookimpl
def hyimg_samplers() -> Provided:
    return SAMPLERS


@hookimpl
def hyimg_timestep_samplers() -> Provided:
    return TIMESTEP_SAMPLERS
