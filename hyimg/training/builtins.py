"""The built-in optimisers, registered through the hook that plugins use."""

from __future__ import annotations

from hyimg.hookspecs import Provided, hookimpl

OPTIMIZERS: dict[str, str] = {
    "AdamW": "hyimg.training.optimizers:adamw",
    "AdamW8bit": "hyimg.training.optimizers:adamw_8bit",
    "Adafactor": "hyimg.training.optimizers:adafactor",
    "SGDNesterov": "hyimg.training.optimizers:sgd_nesterov",
}


@hookimpl
def hyimg_optimizers() -> Provided:
    return OPTIMIZERS
