"""The documentation tells the truth: its commands parse, its plugin runs, and every hook is described."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch

from hyimg import hookspecs
from hyimg.cli.app import run
from hyimg.config import load
from hyimg.demo.concept import DemoFolder
from hyimg.plugins import load_plugins
from hyimg.stages.demo import command_lines

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def commands(page):
    """Every complete `hyimg ...` command in a page's indented or fenced blocks."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        match = re.fullmatch(r"\s{4,}(?:\$ )?(hyimg [a-z-]+ [^#|]*?)\s*(?:#.*)?", line)
        if match and not any(sign in line for sign in ("...", "->", " (")):
            yield shlex.split(match[1])[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_in_the_docs_parse(page, monkeypatch, capsys):
    check_that_they_parse(commands(page), monkeypatch, capsys)


def test_the_commands_of_the_demo_parse(tmp_path, monkeypatch, capsys):
    lines = command_lines(DemoFolder(tmp_path / "a demo"))
    assert {line[0] for line in lines} >= {"dataset", "train", "sample", "infer", "convert-comfy", "check"}
    check_that_they_parse(lines, monkeypatch, capsys)


def check_that_they_parse(lines, monkeypatch, capsys):
    class ParsedError(BaseException):
        pass

    def parsed(*args, **kwargs):
        raise ParsedError

    # what comes after parsing: the files that the docs name are not here
    monkeypatch.setattr(load, "check_inputs", parsed)
    monkeypatch.setattr(load, "image_options", lambda path, given: {"prompt": "x"})
    for command in lines:
        keys = ("dit", "dataset_config", "output_dir") if command[0] == "train" else ("dit", "vae")
        monkeypatch.setattr(load, "read_run_file", lambda path, keys=keys: dict.fromkeys(keys, "x"))
        if command[0] in (
            "dataset",
            "cache-latents",
            "cache-text",
            "train",
            "infer",
            "sample",
            "convert-comfy",
            "inspect-modules",
            "download-models",
            "merge",
            "check",
            "demo",
        ):
            try:
                run(command)
            except ParsedError:
                continue
            pytest.fail(f"{command}: {capsys.readouterr().err}")


def test_the_readme_shows_every_stage():
    shown = {command[0] for command in commands(ROOT / "README.md")}
    assert {"dataset", "cache-latents", "cache-text", "train", "infer"} <= shown


def test_the_plugin_in_the_docs_runs(tmp_path):
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    file = tmp_path / "double.py"
    file.write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], encoding="utf-8")
    loss = load_plugins([str(file)]).resolve("losses", "double")
    prediction, target = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    assert loss(prediction, target, None, factor=3.0).tolist() == [3.0, 3.0]


def test_every_hook_is_described():
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    for name, function in inspect.getmembers(hookspecs, inspect.isfunction):
        if name.startswith("hyimg_"):
            assert f"### {name}(" in text
            assert inspect.getdoc(function)


def test_changelog_and_version_agree():
    import hyimg

    assert f'version = "{hyimg.__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
