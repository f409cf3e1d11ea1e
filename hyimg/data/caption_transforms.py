"""`--caption_transform`: plugins' functions that captions pass through before their variants are drawn.

A transform is a pure function of caption and image. The dataset report, cache-text and train each apply it anew,
and an entry of the text cache is found by the text that comes out: so a cache is never stale, and a run without
the transform that its cache was made with says which entries are missing.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from hyimg.config.dataset import DatasetOptions
from hyimg.data.captions import clean_lines
from hyimg.errors import HyimgError
from hyimg.plugins import Plugins, bind_arguments, describe, load_plugins, parse_arguments
from hyimg.plugins.arguments import arguments_of

_NUM_REPEATED = 16


@dataclass(frozen=True)
class CaptionContext:
    """What a transform may know beside the caption: the image's file, and of its subset whether it is for
    regularisation, and `custom_attributes`."""

    image_path: Path
    is_reg: bool = False
    custom_attributes: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Transform:
    """One transform with its arguments."""

    name: str
    function: Callable[..., Any]
    arguments: Mapping[str, Any]

    def __call__(self, caption: str, context: CaptionContext) -> str:
        """The new caption; HyimgError, naming the image, where the function raises or gives no text."""
        blame = f"the caption transform `{self.name}`"
        try:
            text: object = self.function(caption, context, **self.arguments)
        except HyimgError:
            raise
        except Exception as error:
            raise HyimgError(
                f"{blame} failed on the caption of `{context.image_path}`: {describe(error)}",
                hint="mend the plugin, or leave `--caption_transform` out",
            ) from error
        if not isinstance(text, str):
            raise HyimgError(
                f"{blame} gave `{text!r}` for the caption of `{context.image_path}`, and not text",
                hint="it is `(caption, context) -> caption`",
            )
        return text


@dataclass(frozen=True)
class CaptionTransforms:
    """The transforms of a command, in order; none leaves captions as they are."""

    transforms: tuple[Transform, ...] = ()

    @staticmethod
    def of(options: DatasetOptions, plugins: Plugins | Sequence[str]) -> CaptionTransforms:
        """What the options name. `plugins` are loaded here where only their places are given (`--plugin`).

        An argument goes to every transform that takes it. Raises HyimgError for an unknown name or argument,
        and for arguments without a transform.
        """
        names, option = options.caption_transform, "--caption_transform_args"
        arguments = parse_arguments(options.caption_transform_args, option)
        if arguments and not names:
            raise HyimgError(
                f"`{option}` without `--caption_transform`", hint="name the transform that takes them"
            )
        if not isinstance(plugins, Plugins):
            if not (names or plugins):
                return CaptionTransforms()
            plugins = load_plugins(plugins)
        found = [
            (plugins.canonical("caption_transforms", name), plugins.resolve("caption_transforms", name))
            for name in names
        ]
        taken = {argument for _, function in found for argument in arguments_of(function)}
        transforms = []
        for name, function in found:
            own = {
                key: arguments[key] for key in arguments if key in arguments_of(function) or key not in taken
            }
            bound = bind_arguments(function, own, option=option, name=name)
            transforms.append(Transform(name, function, bound))
        return CaptionTransforms(tuple(transforms))

    def __bool__(self) -> bool:
        return bool(self.transforms)

    def __call__(self, caption: str, context: CaptionContext) -> str:
        """The caption as it is trained, lines stripped and blank ones left out; raises as `Transform`."""
        for transform in self.transforms:
            caption = transform(caption, context)
        return clean_lines(caption) if self.transforms else caption

    def check_pure(self, captions: Iterable[tuple[str, CaptionContext]]) -> None:
        """Raises HyimgError where one of the first captions becomes another text when it is transformed again."""
        for caption, context in islice(captions, _NUM_REPEATED):
            for transform in self.transforms:
                if transform(caption, context) != transform(caption, context):
                    raise HyimgError(
                        f"the caption transform `{transform.name}` gives another text each time, for "
                        f"`{context.image_path}`",
                        hint="what is drawn must follow from the caption; `shuffle_caption` and wildcards in the "
                        "dataset file make variants",
                    )


def caption_transform_flags(options: DatasetOptions, plugin: Sequence[str]) -> str:
    """The flags with which another command transforms captions in the same way."""
    if not options.caption_transform:
        return ""
    words = ["", "--caption_transform", *options.caption_transform]
    if options.caption_transform_args:
        words += ["--caption_transform_args", *options.caption_transform_args]
    if plugin:
        words += ["--plugin", *plugin]
    return " ".join(shlex.quote(word) if word else "" for word in words)
