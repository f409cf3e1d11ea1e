"""A hyimg plugin: the networks `loha` and `lokr`. They are imported when they are asked for."""

from __future__ import annotations

from hyimg.hookspecs import Provided, hookimpl


@hookimpl
def hyimg_networks() -> Provided:
    return {"loha": "hyimg_lycoris.loha:LoHa", "lokr": "hyimg_lycoris.lokr:LoKr"}
