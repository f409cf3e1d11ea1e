"""No command imports a module from the folder in which it is started, nor do the processes that it starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hyimg.distributed.launch import run_command
from hyimg.import_path import keep_working_folder_out_of_children, leave_out_working_folder

ROOT = Path(__file__).parents[1]
# Python's own `runpy` imports a few more before hyimg's first line
NAMES = (
    "typer",
    "click",
    "rich",
    "json",
    "signal",
    "inspect",
    "dataclasses",
    "torch",
    "numpy",
    "hyimg_plugin",
)


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a file that ends the process for each of `NAMES`."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working folder')", "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_m_hyimg_imports_nothing_from_the_working_folder(hostile: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "hyimg", "dataset", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_commands_that_start_commands_import_nothing_from_the_working_folder(
    hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    done = run_command(["--version"], quiet=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hyimg ")


def test_only_one_function_starts_python() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "hyimg").rglob("*.py")
        if re.search(r"sys\.executable|os\.system\(|shell=True|os\.popen|os\.exec", path.read_text("utf-8"))
    }
    assert found == {"hyimg/import_path.py"}


def test_the_working_folder_stays_where_hyimg_itself_is_run_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT), "elsewhere"])
    leave_out_working_folder()
    assert sys.path == [str(ROOT), "elsewhere"]


def test_a_folder_that_python_did_not_add_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["bin", str(tmp_path)])
    leave_out_working_folder()
    assert sys.path == ["bin", str(tmp_path)]


@pytest.mark.parametrize("given", [None, "", "1"])
def test_children_are_told_unless_the_user_has_decided(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", given or "")
    if given is None:
        monkeypatch.delenv("PYTHONSAFEPATH")
    keep_working_folder_out_of_children()
    assert os.environ["PYTHONSAFEPATH"] == ("1" if given is None else given)
