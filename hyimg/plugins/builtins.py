"""The built-in losses, samplers, timestep samplers, optimisers, networks and commands, by the names that users type.

The values are "module:function" and are imported only when used, so that listing the names costs nothing.
A new one is a function in its module and a line here.
"""

from __future__ import annotations

from hyimg.config.command_table import COMMAND_TABLE
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


OPTIMIZERS: dict[str, str] = {
    "AdamW": "hyimg.training.optimizers:adamw",
    "AdamW8bit": "hyimg.training.optimizers:adamw_8bit",
    "PagedAdamW": "hyimg.training.optimizers:paged_adamw",
    "PagedAdamW8bit": "hyimg.training.optimizers:paged_adamw_8bit",
    "PagedAdamW32bit": "hyimg.training.optimizers:paged_adamw_32bit",
    "AdEMAMix8bit": "hyimg.training.optimizers:ademamix_8bit",
    "PagedAdEMAMix8bit": "hyimg.training.optimizers:paged_ademamix_8bit",
    "Adafactor": "hyimg.training.optimizers:adafactor",
    "Lion": "hyimg.training.optimizers:lion",
    "Lion8bit": "hyimg.training.optimizers:lion_8bit",
    "PagedLion8bit": "hyimg.training.optimizers:paged_lion_8bit",
    "Prodigy": "hyimg.training.optimizers:prodigy",
    # the reference tool's name of the preprint's
    "DAdaptation": "hyimg.training.optimizers:dadapt_adam_preprint",
    "DAdaptAdamPreprint": "hyimg.training.optimizers:dadapt_adam_preprint",
    "DAdaptAdam": "hyimg.training.optimizers:dadapt_adam",
    "DAdaptAdaGrad": "hyimg.training.optimizers:dadapt_adagrad",
    "DAdaptAdan": "hyimg.training.optimizers:dadapt_adan",
    "DAdaptAdanIP": "hyimg.training.optimizers:dadapt_adan_ip",
    "DAdaptLion": "hyimg.training.optimizers:dadapt_lion",
    "DAdaptSGD": "hyimg.training.optimizers:dadapt_sgd",
    "CAME": "hyimg.training.optimizers:came",
    "AdamWScheduleFree": "hyimg.training.optimizers:adamw_schedule_free",
    "RAdamScheduleFree": "hyimg.training.optimizers:radam_schedule_free",
    "SGDScheduleFree": "hyimg.training.optimizers:sgd_schedule_free",
    "SGDNesterov": "hyimg.training.optimizers:sgd_nesterov",
    "SGDNesterov8bit": "hyimg.training.optimizers:sgd_nesterov_8bit",
}


@hookimpl
def hyimg_optimizers() -> Provided:
    return OPTIMIZERS


NETWORKS: dict[str, str] = {
    "lora": "hyimg.lora.adapter:LoRA",
    "loha": "hyimg.lora.lycoris:LoHa",
    "lokr": "hyimg.lora.lycoris:LoKr",
}


@hookimpl
def hyimg_networks() -> Provided:
    return NETWORKS


@hookimpl
def hyimg_commands() -> Provided:
    # so that no plugin can take their names
    return {name: command.target for name, command in COMMAND_TABLE.items()}
