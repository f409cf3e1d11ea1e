"""The built-in optimisers, registered through the hook that plugins use."""

from __future__ import annotations

from hyimg.hookspecs import Provided, hookimpl

OPTIMIZERS: dict[str, str] = {
    "AdamW": "hyimg.training.optimizers:adamw",
    "AdamW8bit": "hyimg.training.optimizers:adamw_8bit",
    "PagedAdamW": "hyimg.training.optimizers:paged_adamw",
    "PagedAdamW8bit": "hyimg.training.optimizers:paged_adamw_8bit",
    "Adafactor": "hyimg.training.optimizers:adafactor",
    "Lion": "hyimg.training.optimizers:lion",
    "Lion8bit": "hyimg.training.optimizers:lion_8bit",
    "PagedLion8bit": "hyimg.training.optimizers:paged_lion_8bit",
    "Prodigy": "hyimg.training.optimizers:prodigy",
    "CAME": "hyimg.training.optimizers:came",
    "AdamWScheduleFree": "hyimg.training.optimizers:adamw_schedule_free",
    "RAdamScheduleFree": "hyimg.training.optimizers:radam_schedule_free",
    "SGDScheduleFree": "hyimg.training.optimizers:sgd_schedule_free",
    "SGDNesterov": "hyimg.training.optimizers:sgd_nesterov",
}


@hookimpl
def hyimg_optimizers() -> Provided:
    return OPTIMIZERS
