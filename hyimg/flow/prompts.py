"""What to render, as users write it: prompt lines with overrides, and prompt files (.txt, .toml, .json).

`train --sample_prompts`, `sample` and `infer --from_file` share this. A prompt line is

    a dog on a beach --n blurry --w 1024 --h 768 --s 30 --l 3.5 --fs 5 --d 42

and what it leaves out comes from the command. Agrees with tests/golden/prompts.json except where the
reference tool obeys a line in part only, without a word: there it is an error.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hyimg.errors import HyimgError
from hyimg.flow.prompt_fields import Problem, PromptFields


@dataclass(frozen=True, kw_only=True)
class RenderDefaults:
    """What a command renders with where a prompt does not say otherwise; as they stand, the base model's."""

    negative_prompt: str = ""
    width: int = 2048
    height: int = 2048
    steps: int = 50
    guidance_scale: float = 3.5
    flow_shift: float = 5.0
    seed: int | None = None
    sampler: str = "euler"


BASE_DEFAULTS = RenderDefaults()
"""The official pipeline's values for the base checkpoint."""
DISTILLED_DEFAULTS = RenderDefaults(steps=8, guidance_scale=3.25, flow_shift=4.0)
"""The official pipeline's values for the distilled checkpoint."""


@dataclass(frozen=True, kw_only=True)
class RenderSpec:
    """One image to render, everything decided; sizes in pixels."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    flow_shift: float
    seed: int
    sampler: str
    index: int
    extra: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class PromptSpec:
    """One prompt as the user wrote it; None where nothing was said."""

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    flow_shift: float | None = None
    seed: int | None = None
    sampler: str | None = None
    index: int = 0
    """Place in its file, from 0; it names the image."""
    extra: Mapping[str, object] = field(default_factory=dict)
    """Keys of a TOML or JSON prompt that mean nothing here, kept for what comes after."""

    def resolve(self, defaults: RenderDefaults) -> RenderSpec:
        """The prompt completed from `defaults`; with a seed in neither, a random one (to be recorded)."""
        values: dict[str, Any] = {}
        for name in (f.name for f in fields(RenderDefaults)):
            own = getattr(self, name)
            values[name] = getattr(defaults, name) if own is None else own
        if values["seed"] is None:
            # the system's entropy: it neither disturbs Python's generator nor repeats after its seeding
            values["seed"] = random.SystemRandom().getrandbits(32)
        return RenderSpec(prompt=self.prompt, index=self.index, extra=self.extra, **values)


def parse_prompt_line(line: str, *, place: str = "prompt") -> PromptSpec:
    """Read one prompt line; `place` is how an error calls it.

    A flag is two dashes with a letter behind and white space in front; other dashes are text. Flags may be
    upper case and come in any order; of a repeated one the last counts. Steps are brought into 1..1000, so
    that `--s 0` means one step, as in the reference.
    Raises HyimgError, naming place and flag, for an unknown flag or a bad value.
    """
    return _read_all([(place, line)])[0]


def load_prompts(path: Path) -> list[PromptSpec]:
    """Read a prompt file, of the kind that its suffix says.

    .txt: a prompt line each; blank lines and lines that begin with `#` are skipped. .toml: `[prompt]` with
    common keys and one `[[prompt.subset]]` for each prompt, whose keys win. .json: a list of prompt lines or
    objects. Raises HyimgError for a file that cannot be read or that holds no prompt, and one for all the
    bad flags and keys in it.
    """
    readers: dict[str, Callable[[str, Path], list[tuple[str, object]]]] = {
        ".txt": _txt_entries,
        ".toml": _toml_entries,
        ".json": _json_entries,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise HyimgError(f"prompt file `{path}` is neither .txt, .toml nor .json")
    entries = reader(_read_text(path), path)
    if not entries:
        raise HyimgError(f"prompt file `{path}` holds no prompt")
    return _read_all(entries)


def _read_all(entries: list[tuple[str, object]]) -> list[PromptSpec]:
    """The prompts of (place, line or table) pairs, or one error for all that is wrong with them."""
    read = []
    for place, entry in entries:
        prompt = PromptFields(place)
        if isinstance(entry, str):
            prompt.read_line(entry)
        elif isinstance(entry, dict):
            prompt.read_table(entry)
        else:
            prompt.complain("it is neither a prompt line nor a table of keys")
        read.append(prompt)
    if problems := [problem for prompt in read for problem in prompt.problems]:
        raise _error(problems)
    return [PromptSpec(index=index, **prompt.values) for index, prompt in enumerate(read)]


def _error(problems: list[Problem]) -> HyimgError:
    if len(problems) == 1:
        place, message, hint = problems[0]
        return HyimgError(f"{place}: {message}", hint=hint)
    lines = [f"{place}: {message}" + (f" ({hint})" if hint else "") for place, message, hint in problems]
    return HyimgError("\n  ".join([f"{len(problems)} things are wrong with the prompts", *lines]))


# ---- files, as (place, line or table) pairs


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise HyimgError(f"prompt file `{path}` does not exist") from None
    except UnicodeDecodeError as error:
        raise HyimgError(f"prompt file `{path}` is not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise HyimgError(f"prompt file `{path}` cannot be read: {error.strerror}") from None


def _txt_entries(text: str, path: Path) -> list[tuple[str, object]]:
    # only a # in the first column makes a comment, so that an indented "#hashtag" can begin a prompt
    return [
        (f"`{path}` line {number}", line)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip() and not line.startswith("#")
    ]


def _toml_entries(text: str, path: Path) -> list[tuple[str, object]]:
    import tomli

    try:
        common = tomli.loads(text).get("prompt")
    except RecursionError:
        raise _too_deep(path) from None
    except ValueError as error:  # TOMLDecodeError, or a number of thousands of digits
        raise HyimgError(f"prompt file `{path}` is not TOML: {error}") from None
    if isinstance(common, dict):
        subsets = common.pop("subset", [{}])
        if isinstance(subsets, list) and all(isinstance(subset, dict) for subset in subsets):
            tables = [{**common, **subset} for subset in subsets]
            return [(f"`{path}` prompt {number}", table) for number, table in enumerate(tables, start=1)]
    raise HyimgError(
        f"prompt file `{path}` has no prompts",
        hint="write `[prompt]` with common keys and a `[[prompt.subset]]` for each prompt",
    )


def _json_entries(text: str, path: Path) -> list[tuple[str, object]]:
    import json

    try:
        prompts = json.loads(text)
    except RecursionError:
        raise _too_deep(path) from None
    except ValueError as error:  # JSONDecodeError, or a number of thousands of digits
        raise HyimgError(f"prompt file `{path}` is not JSON: {error}") from None
    if not isinstance(prompts, list):
        raise HyimgError(f"prompt file `{path}` is not a list of prompts")
    return [(f"`{path}` prompt {number}", prompt) for number, prompt in enumerate(prompts, start=1)]


def _too_deep(path: Path) -> HyimgError:
    return HyimgError(
        f"prompt file `{path}` is nested too deeply",
        hint="a prompt is a line, or one table of keys and values",
    )
