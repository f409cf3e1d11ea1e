from __future__ import annotations

import dataclasses
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hyimg.errors import HyimgError
from hyimg.rendering import prompts
from hyimg.rendering.prompts import (
    DISTILLED_DEFAULTS,
    PromptSpec,
    RenderDefaults,
    load_prompts,
    parse_prompt_line,
)
from hyimg.report import SilentReporter

FIELD_OF_KEY = {
    "enum": "index",
    "sample_steps": "steps",
    "scale": "guidance_scale",
    "sample_sampler": "sampler",
}

# The golden file's lines that hyimg treats otherwise, and why.
# decisions.md: "`--g` and `--l` both guidance" (the last one counts), "`--fs` number".
CHANGED_LINES = {
    '"Hello" sign --g 4.0 --l 5 --fs 4.5': {"guidance_scale": 5.0, "flow_shift": 4.5},
    # A prompt's own words are never flags: the reference reads its first word as one too, so that a prompt
    # "n scale railway" becomes its own negative prompt.
    "s 12 starts like a flag --w 64": {"steps": None},
}
# A bad flag or value is an error; the reference drops it, or the part of it that it cannot read, silently.
BAD_LINES = {
    "text with -- dashes and --unknown 5 flag": "--unknown",
    "float width --w 512.9 --l 7.25": "--w",
    'quoted "text --w 256" inside --h 320': "--w",
    "bad scale --l 1.2.3 --d 3": "--l",
}


def said(spec: PromptSpec) -> dict[str, Any]:
    """The fields that the user gave, under our names."""
    fields = dataclasses.asdict(spec)
    extra = fields.pop("extra")
    return {name: value for name, value in fields.items() if value is not None} | extra


def ours(expected: dict[str, Any]) -> dict[str, Any]:
    return {FIELD_OF_KEY.get(key, key): value for key, value in expected.items()}


def write(folder: Path, suffix: str, content: str) -> Path:
    path = folder / f"prompts{suffix}"
    path.write_text(content, encoding="utf-8")
    return path


def test_a_text_file_agrees_with_the_golden_file(tmp_path: Path, golden_prompts: dict[str, Any]) -> None:
    lines = golden_prompts["txt"]["file_content"].split("\n")
    prompt_lines = [line for line in lines if line.strip() and line[0] != "#"]
    expected = dict(zip(prompt_lines, map(ours, golden_prompts["txt"]["expected"]), strict=True))
    for line, changes in CHANGED_LINES.items():
        expected[line] = {k: v for k, v in (expected[line] | changes).items() if v is not None}

    good = [line for line in lines if line not in BAD_LINES]
    specs = load_prompts(write(tmp_path, ".txt", "\n".join(good)))
    wanted = [fields for line, fields in expected.items() if line not in BAD_LINES]
    assert [said(spec) for spec in specs] == [w | {"index": i} for i, w in enumerate(wanted)]


def test_every_bad_line_of_the_golden_file_is_in_one_error(
    tmp_path: Path, golden_prompts: dict[str, Any]
) -> None:
    content = golden_prompts["txt"]["file_content"]
    path = write(tmp_path, ".txt", content)
    with pytest.raises(HyimgError) as caught:
        load_prompts(path)
    message = caught.value.message
    assert len(message.splitlines()) == 1 + len(BAD_LINES)
    for line, flag in BAD_LINES.items():
        number = content.split("\n").index(line) + 1
        assert f"`{path}` line {number}: " in message
        assert f"`{flag}`" in message


@pytest.mark.parametrize("name", ["toml", "json"])
def test_tables_agree_with_the_golden_file(tmp_path: Path, golden_prompts: dict[str, Any], name: str) -> None:
    specs = load_prompts(write(tmp_path, f".{name}", golden_prompts[name]["file_content"]))
    assert [said(spec) for spec in specs] == [ours(e) for e in golden_prompts[name]["expected"]]


def test_a_toml_prompt_may_override_a_common_key(tmp_path: Path, golden_prompts: dict[str, Any]) -> None:
    """decisions.md overrides `toml_subset_overrides_parent`, an exception in the reference."""
    content = golden_prompts["toml_subset_overrides_parent"]["file_content"]
    first, second = load_prompts(write(tmp_path, ".toml", content))
    assert (first.steps, second.steps) == (25, 8)


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("a cat --seed 2", "the flag `--seed` is unknown", "`--d`"),
        (" --n blurry --w 64", "the line begins with the option `--n` and has no prompt", "the prompt first"),
        ("a cat --cn pose.png", "the flag `--cn` is for other models", "`--d`"),
    ],
)
def test_a_bad_flag_is_one_error_that_names_place_and_flag(line: str, message: str, hint: str | None) -> None:
    with pytest.raises(HyimgError) as caught:
        parse_prompt_line(line, place="`cats.txt` line 3")
    assert caught.value.message == f"`cats.txt` line 3: {message}"
    assert caught.value.exit_code == 2
    assert (caught.value.hint is None) if hint is None else (hint in str(caught.value.hint))


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("a -- b --w 64", {"prompt": "a -- b", "width": 64}),
        ("well--known\t--D 5", {"prompt": "well--known", "seed": 5}),
        ("a cat --n", {"prompt": "a cat", "negative_prompt": ""}),
        ("a cat --L 2 --G 1e0", {"prompt": "a cat", "guidance_scale": 1.0}),
        ("x --d 18446744073709551615", {"prompt": "x", "seed": 2**64 - 1}),
    ],
)
def test_what_a_prompt_line_means(line: str, fields: dict[str, Any]) -> None:
    assert said(parse_prompt_line(line)) == {"index": 0, **fields}


@pytest.mark.parametrize(
    ("line", "near"),
    [
        ("a cat -- n blurry --w 64", ["-- n` is part of the text; the option is `--n"]),
        ("a cat -n blurry", ["-n` is part of the text; the option is `--n"]),
        ("a cat \u2014w 64 \u2013 S 20", ["\u2014w", "\u2013 S` is part of the text; the option is `--s"]),
        ("a cat --n dim --  l 4", ["--  l` is part"]),
        ("a cat -- not a dog -- d minor - n-th, mid-d 5 -s", []),
    ],
)
def test_what_looks_like_an_option_and_is_text_is_named(tmp_path: Path, line: str, near: list[str]) -> None:
    report = SilentReporter()
    spec = parse_prompt_line(line, report, place="`p.txt` line 2")
    assert spec.prompt == line.split(" --w 64")[0].split(" --n dim")[0]
    said = "; ".join(report.warnings)
    assert said.count("`p.txt` line 2: ") == len(near)
    assert all(f"`{text}" in said for text in near)
    report = SilentReporter()
    load_prompts(write(tmp_path, ".txt", "\n".join(["a -- n b"] * 20)), report)
    assert len(report.warnings) == 1
    assert report.warnings[0].endswith("and 17 more")


def test_bad_keys_of_tables_are_errors_and_strange_ones_are_kept(tmp_path: Path) -> None:
    content = (
        '[{"prompt": "a", "widht": 64}, {"prompt": "b", "seed": true}, {"width": 64}, 5, {"prompt": 3}, '
    )
    content += '{"prompt": null}, {"prompt": "c", "scale": "x"}]'
    with pytest.raises(HyimgError) as caught:
        load_prompts(write(tmp_path, ".json", content))
    lines = caught.value.message.splitlines()[1:]
    assert [re.search(r"prompt (\d): (.*)", line).groups() for line in lines] == [  # type: ignore[union-attr]
        ("1", "unknown key `widht` (did you mean `width`?)"),
        ("2", "`seed` must be a whole number, got `true`"),
        ("3", "it has no `prompt`"),
        ("4", "it is neither a prompt line nor a table of keys"),
        ("5", "`prompt` must be text, got `3`"),
        ("6", "it has no `prompt`"),
        ("7", '`scale` must be a number, got `"x"`'),
    ]
    report = SilentReporter()
    table = '[{"prompt": "a", "mood": "blue", "seed": null}]'
    (spec,) = load_prompts(write(tmp_path, ".json", table), report)
    assert (spec.extra, spec.seed) == ({"mood": "blue"}, None)
    assert len(report.warnings) == 1
    assert report.warnings[0].endswith("the key `mood` has no effect")


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".txt", "# only\n\n", "has no prompts"),
        (".json", "[]", "has no prompts"),
        (".json", "{", "is not valid JSON"),
        (".json", "{}", "is not a list"),
        (".toml", "[prompt", "is not valid TOML"),
        (".toml", "width = 64", "has no prompts"),
        (".json", "[" * 100_000, "nested too deeply"),
        (".toml", "a = " + "[" * 100_000, "nested too deeply"),
        (".json", "[" + "9" * 5000 + "]", "more than 300 digits"),
        (".toml", "a = " + "9" * 5000, "more than 300 digits"),
        (".csv", "a", "neither .txt, .toml nor .json"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, suffix: str, content: str, message: str) -> None:
    with pytest.raises(HyimgError, match=message) as caught:
        load_prompts(write(tmp_path, suffix, content))
    assert f"prompts{suffix}" in caught.value.message


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HyimgError, match="does not exist"):
        load_prompts(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(HyimgError, match="not UTF-8"):
        load_prompts(tmp_path / "latin.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(HyimgError, match="cannot be read"):
        load_prompts(tmp_path / "folder.txt")
    (tmp_path / "windows.txt").write_bytes("\ufeffa cat --d 1\r\na dog\r\n".encode())
    assert [spec.prompt for spec in load_prompts(tmp_path / "windows.txt")] == ["a cat", "a dog"]


def test_a_prompt_is_completed_from_the_commands_defaults() -> None:
    defaults = RenderDefaults(width=1024, steps=20, seed=3, negative_prompt="bad")
    spec = parse_prompt_line("a cat --h 768 --l 0 --n").resolve(defaults)
    assert (spec.width, spec.height, spec.steps, spec.seed) == (1024, 768, 20, 3)
    assert (spec.guidance_scale, spec.negative_prompt, spec.flow_shift) == (0.0, "", 5.0)
    distilled = parse_prompt_line("a cat").resolve(DISTILLED_DEFAULTS)
    assert (distilled.steps, distilled.guidance_scale, distilled.flow_shift) == (8, 3.25, 4.0)


def test_a_prompt_without_a_seed_gets_a_random_one() -> None:
    seeds = set()
    for _ in range(20):
        random.seed(0)  # by a plugin, say
        before = random.getstate()
        seeds.add(parse_prompt_line("a cat").resolve(RenderDefaults()).seed)
        assert random.getstate() == before
    assert len(seeds) == 20
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_prompts_are_read_without_torch() -> None:
    code = "import sys, hyimg.rendering.prompts, hyimg.plugins.builtins; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_of_many_wrong_lines_the_first_are_listed_and_the_rest_counted(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"a cat --zz{n} 4" for n in range(60)), encoding="utf-8")
    with pytest.raises(HyimgError) as caught:
        load_prompts(path)
    lines = caught.value.message.splitlines()
    assert lines[0] == "the prompts have 60 problems:"
    assert len(lines) < 16
    assert lines[-1].endswith("48 more")


def test_a_prompt_file_has_bounds(tmp_path, monkeypatch):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n" * 11, encoding="utf-8")
    monkeypatch.setattr(prompts, "MAX_PROMPTS", 10)
    with pytest.raises(HyimgError, match=r"prompts\.txt` has 11 prompts; at most 10 are read"):
        load_prompts(path)
    path.write_text("x" * (prompts.MAX_CHARS + 1), encoding="utf-8")
    with pytest.raises(
        HyimgError, match="line 1: the prompt must be at most 1000000 characters, got 1000001"
    ):
        load_prompts(path)
