"""Regular expressions that give modules a rank or a learning rate: `network_reg_dims`, `network_reg_lrs`.

The text is `PATTERN=NUMBER,PATTERN=NUMBER,...`. A pattern is searched (`re.search`) in a module's LoRA name
and in its dotted name; a match in either counts. Where several patterns match a module the last one wins, as
the reference tool's guide says (its code takes the first).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hyimg.errors import HyimgError, nearest
from hyimg.lora.files.formats import lora_name

PatternKind = Literal["rank", "learning rate"]
Rule = tuple[re.Pattern[str], float]
"""A pattern and its number; a rank is a whole number."""

MOST_SECONDS = 5.0
"""For finding a pattern in one name; the usual ones take microseconds."""

# An escape, a class, or a brace that begins no repetition
_BEYOND_RE = re.compile(r"(\\.)|(\[\^?\]?(?:\\.|[^\]\\])*\])|\{(?!\d*(?:,\d*)?\})", re.DOTALL)
_COUNT = re.compile(r"\{(\d{1,9})")
_MOST_REPETITIONS = 10_000  # which the engine writes out
_ESCAPE_OR_BRACKET = re.compile(r"(\\.)|\[", re.DOTALL)

OPTION = {"rank": "network_reg_dims", "learning rate": "network_reg_lrs"}


@dataclass(frozen=True)
class Matches:
    """What rules do to modules, both in the order they were given."""

    values: tuple[float | None, ...]
    """For each module the number of the last rule that matches it, None where none does."""
    counts: tuple[int, ...]
    """For each rule how many modules it matches, overruled or not."""


def parse_patterns(text: str, kind: PatternKind) -> list[Rule]:
    """The rules of a `network_reg_dims` ("rank") or `network_reg_lrs` ("learning rate") text.

    A comma inside braces, brackets or parentheses belongs to the pattern, and the number follows the last
    `=`. A rank is a whole number, a learning rate any finite one; neither is negative.

    Raises:
        HyimgError: a pair without a number, a number out of range, an invalid expression.
    """
    rules: list[Rule] = []
    for pair in _split_pairs(text):
        pattern, equals, number = pair.rpartition("=")
        if not equals or not pattern.strip():
            raise HyimgError(
                f"`{pair}` in `{OPTION[kind]}` is not of the form `PATTERN={_EXAMPLE[kind][0]}`",
                hint=f"write for example `{OPTION[kind]}=img_attn_qkv={_EXAMPLE[kind][1]}`",
            )
        value = _number(number.strip(), pair, kind)
        rules.append((compile_pattern(pattern.strip(), OPTION[kind]), value))
    return rules


def compile_pattern(pattern: str, option: str) -> re.Pattern[str]:
    """A pattern compiled; raises HyimgError, naming the option, for one that is no valid expression."""
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        reason = str(error) if isinstance(error, re.error) else "it is nested too deeply or repeats too often"
        raise HyimgError(f"`{pattern}` in `{option}` is not a valid regular expression: {reason}") from error


def match(modules: Sequence[str], rules: Sequence[Rule]) -> Matches:
    """Applies rules to dotted module names such as `double_blocks.0.img_attn_qkv`."""
    values: list[float | None] = [None] * len(modules)
    counts = []
    for pattern, value in rules:
        hits = [i for i, module in enumerate(modules) if matches(pattern, module)]
        for i in hits:
            values[i] = value
        counts.append(len(hits))
    return Matches(tuple(values), tuple(counts))


def matches(pattern: re.Pattern[str], module: str) -> bool:
    """Whether a pattern is found in a module's LoRA name or in its dotted name; raises as `is_found`."""
    return is_found(pattern.pattern, lora_name(module)) or is_found(pattern.pattern, module)


def is_found(pattern: str, name: str) -> bool:
    """Whether `re.search` finds a pattern in a name.

    The patterns of a file of somebody else's may be written so that `re` never ends; another engine that has a limit
    takes its place. Raises `re.error` for an invalid pattern, HyimgError for one that takes over `MOST_SECONDS`.
    """
    re.compile(pattern)
    if math.prod(max(1, int(count)) for count in _COUNT.findall(pattern)) > _MOST_REPETITIONS:
        raise HyimgError(f"the regular expression `{pattern}` repeats a part over {_MOST_REPETITIONS} times")
    try:
        return _engine(pattern).search(name, timeout=MOST_SECONDS) is not None
    except TimeoutError:
        raise HyimgError(
            f"the regular expression `{pattern}` takes more than {MOST_SECONDS:g} s for the name `{name}`",
            hint="write it without repetitions in repetitions, such as `(a+)+`",
        ) from None


@functools.lru_cache
def _engine(pattern: str) -> Any:
    """A pattern that `re` has compiled, for the `regex` library: its syntax beyond that of `re` is literal."""
    import regex

    return regex.compile(_BEYOND_RE.sub(_literally, pattern))


def _literally(match: re.Match[str]) -> str:
    """In a class `[` is a character (else `[[:alpha:]]`), and so is `{` that begins no repetition (else `a{e}`)."""
    escape, character_class = match.groups()
    if character_class is None:
        return escape or r"\{"
    inner = _ESCAPE_OR_BRACKET.sub(lambda found: found[1] or r"\[", character_class[1:])
    return f"[{inner}"


def unmatched(modules: Sequence[str], rules: Sequence[Rule], kind: PatternKind) -> list[str]:
    """One sentence for each pattern that matches no module, with the nearest names."""
    counts = match(modules, rules).counts
    return [
        f"`{pattern.pattern}` in `{OPTION[kind]}` matches no module{nearest_names(pattern.pattern, modules)}"
        for (pattern, _), count in zip(rules, counts, strict=True)
        if not count
    ]


_EXAMPLE = {"rank": ("RANK", "8"), "learning rate": ("RATE", "1e-4")}
_CLOSING = {"(": ")", "{": "}"}


def _split_pairs(text: str) -> list[str]:
    """Splits at the commas that stand outside brackets, in the way a regular expression reads brackets."""
    pairs, start, position = [], 0, 0
    last = {opening: text.rfind(closing) for opening, closing in _CLOSING.items()}
    open_brackets: list[str] = []
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif open_brackets and open_brackets[-1] == "]":  # in a class all but its end is literal
            if character == "]":
                open_brackets.pop()
        elif character == "[":
            open_brackets.append("]")
            # a first `]`, after an optional `^`, is literal
            position += 1 if text[position + 1 : position + 2] == "^" else 0
            position += 1 if text[position + 1 : position + 2] == "]" else 0
        elif last.get(character, -1) > position:
            open_brackets.append(_CLOSING[character])
        elif open_brackets and character == open_brackets[-1]:
            open_brackets.pop()
        elif character == "," and not open_brackets:
            pairs.append(text[start:position])
            start = position + 1
        position += 1
    pairs.append(text[start:])
    return [pair.strip() for pair in pairs if pair.strip()]


def _number(text: str, pair: str, kind: PatternKind) -> float:
    try:
        value: float = int(text) if kind == "rank" else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        wanted = "a whole number, 0 or more" if kind == "rank" else "a number, 0 or more"
        raise HyimgError(f"the {kind} `{text}` of `{pair}` in `{OPTION[kind]}` is not {wanted}")
    return value


def nearest_names(pattern: str, modules: Sequence[str]) -> str:
    """The kinds of module whose names look most like the letters of a pattern, as the end of a sentence."""
    kinds = dict.fromkeys(re.sub(r"^\w+_blocks\.\d+\.", "", module).replace(".", "_") for module in modules)
    letters = "_".join(re.findall(r"[a-z0-9]+", pattern.lower()))
    close = nearest(letters, kinds) or nearest(letters.rpartition("_")[2], kinds)
    shown = ", ".join(f"`{kind}`" for kind in close or list(kinds)[:3])
    return f"; the nearest names are {shown}" if close else f"; there are, for example, {shown}"
