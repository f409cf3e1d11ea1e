"""What to render, as users write it: prompt lines with overrides, and prompt files (.txt, .toml, .json).

`train --sample_prompts`, `sample` and `infer --from_file` share this. A prompt line is

    a dog on a beach --n blurry --w 1024 --h 768 --s 30 --l 3.5 --fs 5 --d 42

and what it does not set comes from the command. The fields of `PromptSpec` are declared like options, with their
spellings in lines and tables. Agrees with tests/golden/prompts.json, except that a line of which the reference tool
would silently ignore a part is an error.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hyimg.checkpoints.architecture import SPATIAL_FACTOR
from hyimg.config.documents import DOCUMENT_BYTES, parse_document, read_text
from hyimg.config.option import MAX_SEED, REQUIRED, option, options_of
from hyimg.config.values import check_value, convert
from hyimg.errors import HyimgError, did_you_mean, first_few, first_lines
from hyimg.report import Reporter

SIZE_MULTIPLE = SPATIAL_FACTOR
"""Widths and heights are multiples of it: the VAE turns 32x32 pixels into one latent pixel."""
MAX_STEPS = 1000
MAX_CHARS = 1_000_000
"""The most characters that a prompt may have, as a caption; the text encoder reads its first 1024 tokens."""
MAX_PROMPTS = 100_000
"""The most prompts of one file."""

OTHER_MODELS_FLAGS = ("cn", "ctr", "rcfg", "i", "im", "ci", "f")
"""Flags of the reference tool's family that HunyuanImage does not support."""


@dataclass(frozen=True, kw_only=True)
class RenderDefaults:
    """What a command renders with where a prompt does not say otherwise; without arguments, the base model's."""

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
    """One prompt as the user wrote it; None where a field is not set.

    Aliases of up to two letters are flags of prompt lines, longer ones (and the fields themselves) keys of tables.
    """

    prompt: str = option(REQUIRED, maximum=MAX_CHARS, help="what to render")
    negative_prompt: str | None = option(
        None, aliases=("n",), maximum=MAX_CHARS, help="what to keep away from"
    )
    width: int | None = option(
        None, aliases=("w",), minimum=SIZE_MULTIPLE, multiple_of=SIZE_MULTIPLE, help="pixels"
    )
    height: int | None = option(
        None, aliases=("h",), minimum=SIZE_MULTIPLE, multiple_of=SIZE_MULTIPLE, help="pixels"
    )
    steps: int | None = option(None, aliases=("s", "sample_steps", "infer_steps"), help="steps")
    guidance_scale: float | None = option(None, aliases=("l", "g", "scale"), minimum=0, help="guidance")
    flow_shift: float | None = option(None, aliases=("fs",), above=0, help="shift of the schedule")
    seed: int | None = option(
        None,
        aliases=("d",),
        minimum=0,
        maximum=MAX_SEED,
        limits="without a seed, a random one is drawn",
        help="seed of the noise",
    )
    sampler: str | None = option(
        None, aliases=("ss", "sample_sampler"), maximum=MAX_CHARS, help="name of the sampler"
    )
    index: int = 0
    """Place in its file, from 0; it names the image."""
    extra: Mapping[str, object] = field(default_factory=dict)
    """Unknown keys of a TOML or JSON prompt, kept for the caller."""

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


_OPTIONS = {opt.name: opt for opt in options_of(PromptSpec)}
FLAGS = {alias: opt.name for opt in _OPTIONS.values() for alias in opt.aliases if len(alias) <= 2}
KEYS = {name: opt.name for opt in _OPTIONS.values() for name in opt.names if len(name) > 2}

_FLAG = re.compile(r"(?:^|\s)--(?=[A-Za-z])")
# what looks like a flag and is not one: a blank after the dashes, one dash, or a dash that a word processor made of two
_NEAR_FLAG = re.compile(
    rf"(?:^|(?<=\s))(?:--\s+|-|[\u2013\u2014]\s*)({'|'.join(FLAGS)})(?:\s+(\S+))?(?=\s|$)", re.IGNORECASE
)
_MOST_COMPARED = 1000


class PromptFields:
    """The fields of one prompt while it is read, and all that is wrong with them.

    `place` names the prompt in messages ("`cats.txt` line 3"). `hints` holds what the unknown keys of a file may
    mean: names are compared once for each key, and for at most `_MOST_COMPARED` of them.
    """

    def __init__(self, place: str, hints: dict[str, str | None] | None = None) -> None:
        self.place = place
        self._hints = {} if hints is None else hints
        self.values: dict[str, Any] = {}
        self.problems: list[tuple[str, str | None]] = []
        """Sentences with their hints."""
        self.warnings: list[str] = []

    def add_problem(self, message: str, hint: str | None = None) -> None:
        self.problems.append((f"{self.place}: {message}", hint))

    def read_line(self, line: str) -> None:
        """Read a prompt line: text, then flags, each with two dashes between white space and a letter."""
        prompt, *flags = _FLAG.split(line.strip())
        if flags and not prompt.strip():
            self.add_problem(
                f"the line begins with the option `--{flags[0].split(maxsplit=1)[0]}` and has no prompt",
                "write the prompt first, then the options",
            )
        self._set("prompt", prompt.strip(), "the prompt", typed=False)
        self._warn_of_near_flags(line)
        for text in flags:
            flag, *rest = text.split(maxsplit=1)
            name = FLAGS.get(flag.lower())
            if name is not None:
                self._set(name, rest[0].strip() if rest else "", f"`--{flag}`", typed=False)
                continue
            what = "is for other models" if flag.lower() in OTHER_MODELS_FLAGS else "is unknown"
            known = ", ".join(f"`--{one}`" for one in FLAGS)
            self.add_problem(f"the flag `--{flag}` {what}", f"the flags are {known}")

    def _warn_of_near_flags(self, line: str) -> None:
        for match in _NEAR_FLAG.finditer(line):
            flag, value = match[1].lower(), match[2] or ""
            if _OPTIONS[FLAGS[flag]].kind != "str":
                try:
                    convert("float", value)
                except ValueError:
                    continue  # "- d minor" is text: a number would follow the option
            written = line[match.start() : match.end(1)]
            self.warnings.append(f"{self.place}: `{written}` is part of the text; the option is `--{flag}`")

    def read_table(self, table: Mapping[str, object]) -> None:
        """Read a TOML or JSON table. Null counts as not given; an unknown key goes to `extra`."""
        self.values["extra"] = {}
        for key, value in table.items():
            name = KEYS.get(key)
            if name is not None and value is not None:
                self._set(name, value, f"`{key}`", typed=True)
            elif name is None and key != "subset":
                # a misspelt key would be lost silently; any other may be somebody's own
                if key not in self._hints and len(self._hints) < _MOST_COMPARED:
                    self._hints[key] = did_you_mean(key, KEYS)
                if hint := self._hints.get(key):
                    self.add_problem(f"unknown key `{key}`", hint)
                else:
                    self.warnings.append(f"{self.place}: the key `{key}` has no effect")
                self.values["extra"][key] = value
        if table.get("prompt") is None:
            self.add_problem("it has no `prompt`")

    def _set(self, name: str, raw: object, label: str, *, typed: bool) -> None:
        """Checks a field's value and keeps it; `label` is how an error names the field."""
        try:
            value = check_value(_OPTIONS[name], raw, typed=typed)
        except ValueError as error:
            self.add_problem(f"{label} {error}")
        else:
            self.values[name] = max(1, min(MAX_STEPS, value)) if name == "steps" else value


def check_size(pixels: int, name: str) -> None:
    """Raises HyimgError where an image's `name`, width or height, cannot be so many `pixels`."""
    try:
        check_value(_OPTIONS[name], pixels, typed=True)
    except ValueError as error:
        raise HyimgError(f"the {name} {error}") from None


def parse_prompt_line(line: str, report: Reporter | None = None, *, place: str = "prompt") -> PromptSpec:
    """Read one prompt line; `place` is its name in errors. `report` is warned of text that looks like a flag.

    A flag is two dashes after white space and before a letter; other dashes are text. Flags may be upper case and come
    in any order; of a repeated one the last counts. Steps are clamped to 1..1000, so that `--s 0` means one step, as in
    the reference.
    Raises HyimgError, naming place and flag, for an unknown flag, a wrong value, or a line without a prompt.
    """
    return _read_all([(place, line)], report)[0]


def load_prompts(path: Path, report: Reporter | None = None) -> list[PromptSpec]:
    """Read a prompt file; its suffix says which kind it is.

    .txt: a prompt line each; blank lines and lines that begin with `#` are skipped. .toml: `[prompt]` with
    common keys and one `[[prompt.subset]]` for each prompt, whose keys win. .json: a list of prompt lines or
    objects. Raises HyimgError for a file that cannot be read or that holds no prompt, and one for all the
    wrong flags and keys in it. `report` is warned as by `parse_prompt_line`.
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
        raise HyimgError(f"prompt file `{path}` has no prompts")
    if len(entries) > MAX_PROMPTS:
        raise HyimgError(
            f"prompt file `{path}` has {len(entries)} prompts; at most {MAX_PROMPTS} are read from one file",
            hint="split the file",
        )
    return _read_all(entries, report)


def _read_all(entries: list[tuple[str, object]], report: Reporter | None) -> list[PromptSpec]:
    """The prompts of (place, line or table) pairs, or one error for all that is wrong with them."""
    read = []
    hints: dict[str, str | None] = {}
    for place, entry in entries:
        prompt = PromptFields(place, hints)
        if isinstance(entry, str):
            prompt.read_line(entry)
        elif isinstance(entry, dict):
            prompt.read_table(entry)
        else:
            prompt.add_problem("it is neither a prompt line nor a table of keys")
        read.append(prompt)
    if problems := [problem for prompt in read for problem in prompt.problems]:
        raise _error(problems)
    if report is not None and (warnings := [text for prompt in read for text in prompt.warnings]):
        report.warning(first_few(warnings, separator="; "))
    return [PromptSpec(index=index, **prompt.values) for index, prompt in enumerate(read)]


def _error(problems: list[tuple[str, str | None]]) -> HyimgError:
    if len(problems) == 1:
        message, hint = problems[0]
        return HyimgError(message, hint=hint)
    lines = [message + (f" ({hint})" if hint else "") for message, hint in problems]
    listing = first_lines(lines, limit=12)
    return HyimgError(f"the prompts have {len(problems)} problems:", details=listing)


# ---- files, as (place, line or table) pairs


def _read_text(path: Path) -> str:
    try:
        return read_text(path, DOCUMENT_BYTES)
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
    common = parse_document(text, path, "prompt file").get("prompt")
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
    prompts = parse_document(text, path, "prompt file")
    if not isinstance(prompts, list):
        raise HyimgError(f"prompt file `{path}` is not a list of prompts")
    return [(f"`{path}` prompt {number}", prompt) for number, prompt in enumerate(prompts, start=1)]
