"""Damaged files, odd command lines, limits of the system and signals: a sentence and an exit code, and no harm.

`make test` runs a sample of each, `make test-long` all of it, with a table. What a fault means, and how to run its case
again, is in `tests/robustness/harness.py`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.robustness.rules import Case, check_files, check_text, snapshot

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def harness(capsys):
    """Runs the harness; prints its table, and gives (the number of cases, what did not hold)."""

    def run(*arguments: object, timeout: float, show: bool = True) -> tuple[int, str]:
        command = [sys.executable, "-m", "tests.robustness.harness", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode in (0, 1), done.stderr
        faults, heading, rows = done.stdout.partition("kind  ")
        if show:
            with capsys.disabled():
                print(f"\n{heading}{rows}{done.stderr}")
        found = re.search(r"(\d+) cases of \d+ kinds, (\d+) faults", rows)
        assert found, done.stdout + done.stderr
        assert (done.returncode == 0) == (found[2] == "0")
        return int(found[1]), faults

    return run


@pytest.mark.parametrize(
    ("code", "out", "err", "fault"),
    [
        (0, "fine\n", "warning: a\n", None),
        (2, "", "error: `a.png` is damaged\nhint: remove it\n", None),
        (3, "", "", "exit code 3"),
        (0, "\x1b[2J", "", "stdout has '\\x1b'"),
        (2, "", "error: `\u202egnp`\n", "stderr has '\\u202e'"),
        (2, "", "error: a\nerror: b\n", "exit code 2 with 2 lines"),
        (1, "", "", "exit code 1 with 0 lines"),
        (1, "", "error: unexpected KeyError: 'a'\n", "stderr: error: unexpected KeyError"),
        (1, "", "error: out of memory\n", "stderr: error: out of memory"),
        (0, "", "Traceback (most recent call last):\n", "stderr: Traceback"),
        (0, "", "a\n" * 50, "50 lines on stderr"),
        (0, "x" * 5000, "", "a line of 5000 characters on stdout"),
    ],
)
def test_what_a_command_prints_is_held_to_the_rules(code, out, err, fault, tmp_path):
    faults = check_text(Case("case", tmp_path), code, out.encode(), err.encode())
    assert faults == [] if fault is None else faults[0].startswith(fault), faults


@pytest.mark.parametrize(
    ("path", "code", "fault"),
    [
        ("work/out/new.png", 0, None),
        ("work/out/old.png", 0, None),
        ("work/out/old.png", 2, "is refused, and changes"),
        ("work/in.png", 0, "changes ['work/in.png']"),
        ("home/new", 0, "changes ['home/new']"),
        ("work/out/.a.1-00000000.hyimg-tmp", 0, "leaves"),
    ],
)
def test_what_a_command_leaves_is_held_to_the_rules(path, code, fault, tmp_path):
    case = Case("case", tmp_path)
    for name in ("work/out/old.png", "work/in.png", "home/kept"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"old")
    before = snapshot(tmp_path)
    (tmp_path / path).write_bytes(b"new")
    faults = check_files(case, code, before)
    assert faults == [] if fault is None else faults[0].startswith(fault), faults


def test_a_sample_of_damage_limits_and_signals(harness):
    what = ["mutations", "limits", "signals", "disks"]
    arguments = ["--cases", 1, "--seed", 5, "--commands", "convert-comfy", "train", "--every", 6]
    cases, faults = harness("--what", *what, *arguments, timeout=900, show=False)
    assert not faults
    assert cases > 55


@pytest.mark.long
def test_thousands_of_damaged_files_and_odd_command_lines(harness):
    cases, faults = harness("--cases", 110, "--seed", 2, timeout=7200)
    assert cases >= 5000
    assert not faults


@pytest.mark.long
@pytest.mark.parametrize("what", ["limits", "signals", "disks"])
def test_every_command_under_every_limit_and_signal(harness, what):
    cases, faults = harness("--what", what, "--cases", 6, "--seed", 3, timeout=7200)
    if what == "disks" and cases == 0:
        pytest.skip("only root can mount a small disk")
    assert cases > 80
    assert not faults
