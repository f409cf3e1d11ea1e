"""The built-in network, registered through the hook that plugins use."""

from __future__ import annotations

from hyimg.hookspecs import Provided, hookimpl

NETWORKS: dict[str, str] = {"lora": "hyimg.lora.adapter:LoRA"}


@hookimpl
def hyimg_networks() -> Provided:
    return NETWORKS
