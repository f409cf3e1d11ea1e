"""Captions: reading them, and composing the prompts that are encoded.

    lines = read_caption_file(path)
    texts = variants(caption, settings, 8)      # what is encoded and cached for this caption

Agrees with the reference tool (tests/golden/captions.json) except where that loses text: tags are joined with the
caption's own separator, `keep_tokens_separator` is always removed, every line gets prefix and suffix, blank lines are
skipped, and `multiline_caption` uses the whole text. A variant is a function of (caption, settings, number), so it can
be cached; training draws which variant a sample uses (`hyimg.data.samples.choose`).

`--caption_transform` names plugin functions that change captions before variants are composed. A transform is a pure
function of caption and image. The dataset report, cache-text and train each apply it, and a text cache entry is found
by the result: so the cache cannot be stale, and a run without the transform reports missing entries.
"""

from __future__ import annotations

import codecs
import json
import random
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

from hyimg.config.dataset_options import DatasetOptions
from hyimg.config.documents import read_bounded
from hyimg.config.option import option
from hyimg.errors import HyimgError, raise_system_limit
from hyimg.plugins import Plugins, load_plugins
from hyimg.plugins.arguments import arguments_of, bind_arguments, parse_arguments
from hyimg.plugins.guard import guarded
from hyimg.randomness import keyed_random

CAPTION_BYTES = 1_000_000
"""Size limit of a caption; the text encoder uses its first 1024 tokens."""

_NEWLINE = re.compile(r"\r\n|\r|\n")
_BLANK_LINES = re.compile(r"\n{3,}")
_DAMAGE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ufffd]")
_WILDCARD = re.compile(r"\{([^}]+)\}")
_UNUSED = random.Random(0)  # seeding one costs more than the rest of a caption that draws nothing


@dataclass(frozen=True)
class CaptionSettings:
    """The keys of a dataset file that determine the text of a caption."""

    shuffle_caption: bool = option(False, help="shuffle the tags of captions")
    keep_tokens: int = option(0, minimum=0, help="number of tags at the front that keep their place")
    keep_tokens_separator: str | None = option(
        None, minimum=1, help="text after the tags that keep their place"
    )
    secondary_separator: str | None = option(
        None, minimum=1, help="separates tags that stay together when shuffled"
    )
    caption_separator: str = option(",", minimum=1, help="separates tags")
    caption_prefix: str | None = option(None, help="put before a caption (each line of it, or the full text)")
    caption_suffix: str | None = option(None, help="put after a caption (each line of it, or the full text)")
    enable_wildcard: bool = option(False, help="pick one of `{a|b}`, and one of the lines")
    caption_tag_dropout_rate: float = option(
        0.0, minimum=0, maximum=1, help="how often each tag is dropped, 0..1"
    )
    multiline_caption: bool = option(False, help="use the full text of a caption, not only its first line")

    def clean(self, text: str) -> str:
        """The caption with its lines stripped, without blank lines; with `multiline_caption`, one blank line separates
        paragraphs."""
        return clean_paragraphs(text) if self.multiline_caption else clean_lines(text)

    def num_dropped_lines(self, caption: str) -> int:
        """The number of a caption's lines that no variant uses."""
        return 0 if self.multiline_caption or self.enable_wildcard else caption.count("\n")

    @property
    def joiner(self) -> str:
        """Joins tags: the separator, with a space after the usual comma."""
        return ", " if self.caption_separator == "," else self.caption_separator

    @property
    def key(self) -> str:
        """The settings that differ from the default, as JSON; a setting added later does not change variants."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return json.dumps(given, sort_keys=True, ensure_ascii=False)


def read_caption_file(path: Path | str, settings: CaptionSettings = CaptionSettings()) -> str:
    """The caption of a file, after `settings.clean`.

    Raises `HyimgError` if the file cannot be read, is not UTF-8, or has no text.
    """
    try:
        return caption_of_file(path, settings)
    except ValueError as error:
        raise HyimgError(f"the caption file `{path}` {error}") from error


def caption_of_file(path: Path | str, settings: CaptionSettings) -> str:
    """As `read_caption_file`; raises `ValueError` with what is wrong with the file, without its name."""
    try:
        data = read_bounded(path, CAPTION_BYTES)
    except OSError as error:
        raise_system_limit(error)
        raise ValueError(f"cannot be read: {error.strerror}") from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("is UTF-16, not UTF-8; save it as UTF-8")
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8; save it as UTF-8") from error
    check_caption(text)
    return settings.clean(text)


def check_caption(text: str) -> None:
    """Raises `ValueError` for a text that cannot be a caption: too long, with NUL characters, or blank."""
    if len(text) > CAPTION_BYTES:
        raise ValueError(f"has {len(text)} characters, and a caption has at most {CAPTION_BYTES}")
    if "\0" in text:
        raise ValueError("has NUL characters, probably from UTF-16; save it as UTF-8")
    if not text.strip():
        raise ValueError('is empty; write a caption, or remove it and set `class_tokens` (`""` for no text)')


def is_damaged(text: str) -> bool:
    """Whether a text has control characters (other than tabs and line ends) or replacement characters."""
    return _DAMAGE.search(text) is not None


def clean_lines(text: str) -> str:
    """The lines of a text, stripped, without the blank ones."""
    if "\n" not in text and "\r" not in text:
        return text.strip()
    return "\n".join(line for raw in _NEWLINE.split(text) if (line := raw.strip()))


def clean_paragraphs(text: str) -> str:
    """The lines of a text, stripped, with one blank line between paragraphs."""
    lines = "\n".join(line.strip() for line in _NEWLINE.split(text))
    return _BLANK_LINES.sub("\n\n", lines).strip()


def caption_from_metadata(entry: Mapping[str, object], settings: CaptionSettings) -> str | None:
    """The caption of a metadata entry: its `caption` (or `text`), with its `tags` at the end of every line, or of the
    text with `multiline_caption`. None if it has none of them.

    `tags` is text or a list of texts. Raises `ValueError` with what is wrong.
    """
    caption, tags = entry.get("caption"), entry.get("tags")
    caption = entry.get("text") if caption is None else caption
    if caption is None and tags is None:
        return None
    if not isinstance(caption, str | None):
        raise ValueError("is not text")
    if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        tags = settings.joiner.join(tags)
    if not isinstance(tags, str | None):
        raise ValueError("has `tags` that are neither text nor a list of texts")
    check_caption(f"{caption or ''}{tags or ''}")
    cleaned = settings.clean(caption or "")
    lines = [cleaned] if settings.multiline_caption else cleaned.split("\n")
    tag_line = clean_lines(tags or "").replace("\n", settings.joiner)
    return "\n".join(settings.joiner.join(part for part in (line, tag_line) if part) for line in lines)


def varies(caption: str, settings: CaptionSettings) -> bool:
    """Whether `compose` may give different texts for a caption."""
    text = _with_affixes(caption, settings)
    if settings.enable_wildcard and ("{" in text or ("\n" in text and not settings.multiline_caption)):
        return True
    if settings.shuffle_caption and settings.caption_separator in text:
        return True
    return settings.caption_tag_dropout_rate > 0


def variants(caption: str, settings: CaptionSettings, count: int) -> list[str]:
    """The texts that are encoded for a caption: `count` variants, or one if nothing varies.

    Variant k depends only on (caption, settings, k). Equal variants are stored once.
    """
    if not varies(caption, settings):
        return [compose(caption, settings, _UNUSED)]
    return [
        compose(caption, settings, keyed_random("caption", k, settings.key, caption)) for k in range(count)
    ]


def compose(caption: str, settings: CaptionSettings, rng: random.Random) -> str:
    """One text from a caption: affixes, one line, wildcards, shuffling, tag dropout, separators.

    With `multiline_caption` the whole text is used instead of a line. The draws from `rng` are those of the reference
    tool: `choice` for the line and for each wildcard, `shuffle` for the tags, `random` for each tag that may be
    dropped.
    """
    if settings.multiline_caption:
        text = _with_affixes(settings.clean(caption), settings)
    else:
        lines = [_with_affixes(line, settings) for line in clean_lines(caption).split("\n")]
        text = rng.choice(lines) if settings.enable_wildcard and len(lines) > 1 else lines[0]
    if settings.enable_wildcard:
        text = _fill_wildcards(text, rng)
    separator = settings.keep_tokens_separator
    if settings.shuffle_caption or settings.caption_tag_dropout_rate > 0 or (separator and separator in text):
        text = _rearrange(text, settings, rng)
    if settings.secondary_separator:
        text = text.replace(settings.secondary_separator, settings.caption_separator)
    return text


def _with_affixes(line: str, settings: CaptionSettings) -> str:
    return " ".join(part for part in (settings.caption_prefix, line, settings.caption_suffix) if part)


def _fill_wildcards(text: str, rng: random.Random) -> str:
    """`{a|b}` becomes a or b; `{{` and `}}` are braces. Wildcards do not nest."""
    # replace the escapes by characters that the text does not contain, so that the pattern skips them
    left, right = _absent_characters(text)
    text = text.replace("{{", left).replace("}}", right)
    # only up to the last closing brace: after it, the pattern would search to the end from each opening one
    head, brace, tail = text.rpartition("}")
    text = _WILDCARD.sub(lambda match: rng.choice(match.group(1).split("|")), head + brace) + tail
    return text.replace(left, "{").replace(right, "}")


def _absent_characters(text: str) -> tuple[str, str]:
    """Two characters that `text` does not contain, from the private use area on."""
    held = set(text)
    absent = (character for character in map(chr, range(0xE000, 0x110000)) if character not in held)
    return next(absent), next(absent)


def _rearrange(text: str, settings: CaptionSettings, rng: random.Random) -> str:
    """The fixed tags, then the others shuffled and some dropped, then the fixed end, joined."""
    head, tags, tail = _split_tags(text, settings)
    if settings.shuffle_caption:
        rng.shuffle(tags)
    if (rate := settings.caption_tag_dropout_rate) > 0:
        tags = [tag for tag in tags if rng.random() >= rate]
    return settings.joiner.join([*head, *tags, *tail])


def _split_tags(text: str, settings: CaptionSettings) -> tuple[list[str], list[str], list[str]]:
    """The tags of a text: fixed at the front, free, fixed at the end.

    They are divided by `keep_tokens_separator` if the text contains it, else the first `keep_tokens` are fixed.
    """
    divider = settings.keep_tokens_separator
    if divider and divider in text:
        head, free, *tail = (_tags(part, settings.caption_separator) for part in text.split(divider))
        return head, free, [tag for part in tail for tag in part]
    tags = [tag.strip() for tag in text.strip().split(settings.caption_separator)]
    return tags[: settings.keep_tokens], tags[settings.keep_tokens :], []


def _tags(part: str, separator: str) -> list[str]:
    return [tag.strip() for tag in part.split(separator) if tag.strip()]


_NUM_REPEATED = 16


@dataclass(frozen=True)
class CaptionContext:
    """What a transform gets besides the caption: the image's file, and of its subset `is_reg` and
    `custom_attributes`."""

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
        """The new caption. Raises HyimgError, which names the image, if the function raises or does not return text."""
        blame = f"the caption transform `{self.name}`"
        hint = "fix the plugin, or remove `--caption_transform`"
        with guarded(f"{blame} failed on the caption of `{context.image_path}`", hint=hint):
            text: object = self.function(caption, context, **self.arguments)
        if not isinstance(text, str):
            raise HyimgError(
                f"{blame} returned `{text!r}` instead of text for the caption of `{context.image_path}`",
                hint="its signature is `(caption, context) -> caption`",
            )
        return text


@dataclass(frozen=True)
class CaptionTransforms:
    """The transforms of a command, in order; without any, captions are unchanged."""

    transforms: tuple[Transform, ...] = ()

    @staticmethod
    def of(options: DatasetOptions, plugins: Plugins | Sequence[str]) -> CaptionTransforms:
        """The transforms that the options name. `plugins` may be the values of `--plugin`, which are loaded here.

        An argument goes to every transform that accepts it. Raises HyimgError for an unknown name or argument, and for
        arguments without a transform.
        """
        names, option = options.caption_transform, "--caption_transform_args"
        arguments = parse_arguments(options.caption_transform_args, option)
        if arguments and not names:
            raise HyimgError(
                f"`{option}` without `--caption_transform`", hint="name the transform that they are for"
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
        """The caption after all transforms; raises as `Transform`."""
        for transform in self.transforms:
            caption = transform(caption, context)
        return caption

    def check_pure(self, captions: Iterable[tuple[str, CaptionContext]]) -> None:
        """Raises HyimgError if transforming one of the first captions twice gives two different texts."""
        for caption, context in islice(captions, _NUM_REPEATED):
            for transform in self.transforms:
                if transform(caption, context) != transform(caption, context):
                    raise HyimgError(
                        f"the caption transform `{transform.name}` returns a different text each time for "
                        f"`{context.image_path}`",
                        hint="make its random choices depend on the caption only, or use `shuffle_caption` or wildcards"
                        " in the dataset file for variants",
                    )


def caption_transform_flags(options: DatasetOptions, plugin: Sequence[str]) -> str:
    """The flags for another command to transform captions in the same way."""
    if not options.caption_transform:
        return ""
    words = ["", "--caption_transform", *options.caption_transform]
    if options.caption_transform_args:
        words += ["--caption_transform_args", *options.caption_transform_args]
    if plugin:
        words += ["--plugin", *plugin]
    return " ".join(shlex.quote(word) if word else "" for word in words)
