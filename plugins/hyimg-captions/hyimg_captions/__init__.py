"""A hyimg plugin: the caption transforms `underscores` and `replace`, and the command `hyimg tags`.

The command is named by its place, so that `hyimg --help` need not import what it needs.
"""

from __future__ import annotations

from hyimg.hookspecs import Provided, hookimpl


@hookimpl
def hyimg_caption_transforms() -> Provided:
    return {
        "underscores": "hyimg_captions.transforms:underscores",
        "replace": "hyimg_captions.transforms:replace",
    }


@hookimpl
def hyimg_commands() -> Provided:
    return {"tags": "hyimg_captions.tags:tags"}
