"""How a prompt's fields are written, and which values they may have: in a line's flags, in a table's keys."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from hyimg.errors import did_you_mean
from hyimg.flow.sizes import SIZE_MULTIPLE, is_valid_size, size_hint

MAX_STEPS = 1000

FLAGS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "steps",
    "l": "guidance_scale",
    "g": "guidance_scale",
    "fs": "flow_shift",
    "ss": "sampler",
}
OTHER_MODELS_FLAGS = ("cn", "ctr", "rcfg", "i", "im", "ci", "f")
"""Flags of the reference tool's family that HunyuanImage has no use for."""

KEYS = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "width": "width",
    "height": "height",
    "seed": "seed",
    "steps": "steps",
    "sample_steps": "steps",
    "infer_steps": "steps",
    "scale": "guidance_scale",
    "guidance_scale": "guidance_scale",
    "flow_shift": "flow_shift",
    "sampler": "sampler",
    "sample_sampler": "sampler",
}

_TEXT_FIELDS = ("prompt", "negative_prompt", "sampler")
_FRACTION_FIELDS = ("guidance_scale", "flow_shift")
_FLAG = re.compile(r"(?:^|\s)--(?=[A-Za-z])")


class Problem(NamedTuple):
    """Something wrong with one prompt: where it stands, what it is and what to do."""

    place: str
    message: str
    hint: str | None = None


class PromptFields:
    """The fields of one prompt as they are read, and all that is wrong with them.

    `place` is how a message calls the prompt ("`cats.txt` line 3").
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self.values: dict[str, Any] = {}
        self.problems: list[Problem] = []

    def complain(self, message: str, hint: str | None = None) -> None:
        self.problems.append(Problem(self.place, message, hint))

    def read_line(self, line: str) -> None:
        """Read a prompt line: text, then flags, each begun by two dashes between white space and a letter."""
        prompt, *flags = _FLAG.split(line.strip())
        self.take("prompt", prompt.strip(), "the prompt")
        for text in flags:
            flag, *rest = text.split(maxsplit=1)
            value = rest[0].strip() if rest else ""
            name = FLAGS.get(flag.lower())
            if name is None:
                self._unknown_flag(flag)
            else:
                said = f"`--{flag} {value}`" if value else f"`--{flag}` without a value"
                self.take(name, value if name in _TEXT_FIELDS else _number(value), said)

    def read_table(self, table: Mapping[str, object]) -> None:
        """Read a TOML or JSON table. Null is as if not given; a strange key goes to `extra`."""
        self.values["extra"] = {}
        for key, value in table.items():
            name = KEYS.get(key)
            if name is not None and value is not None:
                self.take(name, value, f"`{key} = {value}`")
            elif name is None and key != "subset":
                # a misspelt key would be lost without a word; a strange one is somebody's own
                if hint := did_you_mean(key, KEYS):
                    self.complain(f"unknown key `{key}`", hint)
                self.values["extra"][key] = value
        if table.get("prompt") is None:
            self.complain("it has no `prompt`")

    def take(self, name: str, value: Any, said: str) -> None:
        """Check a field's value and keep it; `said` is how the user wrote it."""
        if wrong := _wrong(name, value):
            message, hint = wrong
            self.complain(f"{said} {message}", hint)
        elif name == "steps":
            self.values[name] = max(1, min(MAX_STEPS, value))
        else:
            self.values[name] = float(value) if name in _FRACTION_FIELDS else value

    def _unknown_flag(self, flag: str) -> None:
        known = ", ".join(f"`--{name}`" for name in FLAGS)
        what = "is for other models" if flag.lower() in OTHER_MODELS_FLAGS else "is not known"
        self.complain(f"the flag `--{flag}` {what}", f"the flags are {known}")


def _number(text: str) -> int | float | str:
    """A number if the text is one, else the text, for the check to refuse."""
    try:
        return int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else float(text)
    except ValueError:
        return text


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the floats
        return False


def _wrong(name: str, value: object) -> tuple[str, str | None] | None:
    """What is wrong with a field's value, and the way out; None where it is right."""
    if name in _TEXT_FIELDS:
        return None if isinstance(value, str) else ("is not text", None)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        return "is not a number", None
    if name in _FRACTION_FIELDS:
        if value < 0 or (value == 0 and name == "flow_shift"):
            return f"is not {'over' if name == 'flow_shift' else 'at least'} 0", None
        return None
    if not isinstance(value, int):
        return "is not a whole number", None
    if name in ("width", "height") and not is_valid_size(value):
        return f"is not a multiple of {SIZE_MULTIPLE}", size_hint(value)
    if name == "seed" and not 0 <= value < 2**64:
        return "is not from 0 to 2^64 - 1", "leave the seed out for a random one"
    return None
