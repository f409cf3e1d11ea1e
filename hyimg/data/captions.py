"""Captions: reading them, and turning one into the text that is encoded.

    lines = read_caption_file(path)
    texts = variants(caption, settings, 8)      # what is encoded and cached for this caption

Agrees with the reference tool (tests/golden/captions.json) but where it loses text: tags are joined with the
caption's own separator, `keep_tokens_separator` never stays in the text, prefix and suffix are put on every
line, blank lines are skipped. A variant is a function of (caption, settings, number) and of nothing else,
so it can be cached; which variant a sample takes is drawn while training (`hyimg.data.samples`).
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from hyimg.errors import HyimgError
from hyimg.randomness import keyed_random

_NEWLINE = re.compile(r"\r\n|\r|\n")
_WILDCARD = re.compile(r"\{([^}]+)\}")
_READ_BYTES = 1 << 16
_UNUSED = random.Random(0)  # seeding one costs more than the rest of a caption that draws nothing


@dataclass(frozen=True)
class CaptionSettings:
    """The keys of a dataset file that decide the text of a caption; names and meanings as there."""

    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str | None = None
    secondary_separator: str | None = None
    caption_separator: str = ","
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    enable_wildcard: bool = False
    caption_tag_dropout_rate: float = 0.0

    @property
    def joiner(self) -> str:
        """What stands between tags that are joined: the separator, with a space after the usual comma."""
        return ", " if self.caption_separator == "," else self.caption_separator

    @property
    def key(self) -> str:
        """The settings that differ from the default, as text; so a setting added later moves no variant."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return json.dumps(given, sort_keys=True, ensure_ascii=False)


def read_caption_file(path: Path | str) -> str:
    """A caption file's lines, stripped, blank ones left out, joined by newlines.

    Raises `HyimgError` where the file cannot be read, is not UTF-8, or holds no text.
    """
    try:
        text = _read(path).decode().removeprefix("\ufeff")
    except OSError as error:
        raise HyimgError(f"cannot read the caption file `{path}`: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise HyimgError(
            f"the caption file `{path}` is not UTF-8 (byte {error.start})", hint="save it as UTF-8"
        ) from error
    if caption := clean_lines(text):
        return caption
    raise HyimgError(
        f"the caption file `{path}` is empty",
        hint='write a caption into it, or remove it and set `class_tokens` (`""` for no text at all)',
    )


def _read(path: Path | str) -> bytes:
    """A file's bytes; a third of the time that a file object takes, of which a dataset may need 100,000."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        parts = []
        while part := os.read(descriptor, _READ_BYTES):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def clean_lines(text: str) -> str:
    """The lines of a text, stripped, without the blank ones."""
    if "\n" not in text and "\r" not in text:
        return text.strip()
    return "\n".join(line for raw in _NEWLINE.split(text) if (line := raw.strip()))


def caption_from_metadata(entry: Mapping[str, object], settings: CaptionSettings) -> str:
    """The caption of a `metadata_file` entry: its `caption`, with its `tags` at the end of every line.

    `tags` is text or a list of texts. Raises `ValueError` where either is of another type.
    """
    caption, tags = entry.get("caption"), entry.get("tags")
    if not isinstance(caption, str | None):
        raise ValueError("`caption` is no text")
    if isinstance(tags, list) and all(isinstance(tag, str) for tag in tags):
        tags = settings.joiner.join(tags)
    if not isinstance(tags, str | None):
        raise ValueError("`tags` is neither text nor a list of texts")
    lines = clean_lines(caption or "").split("\n")
    tag_line = clean_lines(tags or "").replace("\n", settings.joiner)
    return "\n".join(settings.joiner.join(part for part in (line, tag_line) if part) for line in lines)


def varies(caption: str, settings: CaptionSettings) -> bool:
    """Whether `compose` may give different texts for a caption."""
    text = _with_affixes(caption, settings)
    if settings.enable_wildcard and ("\n" in text or "{" in text):
        return True
    if settings.shuffle_caption and settings.caption_separator in text:
        return True
    return settings.caption_tag_dropout_rate > 0


def variants(caption: str, settings: CaptionSettings, count: int) -> list[str]:
    """The texts that are encoded for a caption: `count` variants, or the one where nothing varies.

    Variant k depends on (caption, settings, k) only. Some may be equal: then they are stored once.
    """
    if not varies(caption, settings):
        return [compose(caption, settings, _UNUSED)]
    return [
        compose(caption, settings, keyed_random("caption", k, settings.key, caption)) for k in range(count)
    ]


def compose(caption: str, settings: CaptionSettings, rng: random.Random) -> str:
    """One text from a caption: affixes, one line, wildcards, shuffling, tag dropout, separators.

    `rng` is drawn from in that order, as the reference tool draws: `choice` for the line and for each
    wildcard, `shuffle` for the tags, one `random` for each tag that may be dropped.
    """
    lines = [_with_affixes(line, settings) for line in clean_lines(caption).split("\n")]
    if settings.enable_wildcard:
        line = rng.choice(lines) if len(lines) > 1 else lines[0]
        text = _fill_wildcards(line, rng)
    else:
        text = lines[0]
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
    # the escapes become characters that the text does not hold, so that the pattern passes over them
    left, right = _absent_characters(text)
    text = text.replace("{{", left).replace("}}", right)
    text = _WILDCARD.sub(lambda match: rng.choice(match.group(1).split("|")), text)
    return text.replace(left, "{").replace(right, "}")


def _absent_characters(text: str) -> tuple[str, str]:
    """Two characters of the private use area that `text` does not hold."""
    private_use = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)
    return next(private_use), next(private_use)


def _rearrange(text: str, settings: CaptionSettings, rng: random.Random) -> str:
    """Tags that keep their place, then the shuffled and dropped ones, then a fixed end, joined."""
    head, tags, tail = _split_tags(text, settings)
    if settings.shuffle_caption:
        rng.shuffle(tags)
    if (rate := settings.caption_tag_dropout_rate) > 0:
        tags = [tag for tag in tags if rng.random() >= rate]
    return settings.joiner.join([*head, *tags, *tail])


def _split_tags(text: str, settings: CaptionSettings) -> tuple[list[str], list[str], list[str]]:
    """The tags of a text: fixed at the front, free, fixed at the end.

    `keep_tokens_separator` divides them, where the text holds it; else `keep_tokens` counts the first ones.
    """
    divider = settings.keep_tokens_separator
    if divider and divider in text:
        head, free, *tail = (_tags(part, settings.caption_separator) for part in text.split(divider))
        return head, free, [tag for part in tail for tag in part]
    tags = [tag.strip() for tag in text.strip().split(settings.caption_separator)]
    return tags[: settings.keep_tokens], tags[settings.keep_tokens :], []


def _tags(part: str, separator: str) -> list[str]:
    return [tag.strip() for tag in part.split(separator) if tag.strip()]
