"""Checks the tests: breaks hyimg in one place at a time and runs the tests that should notice.

    python benchmarks/mutations.py --room flow

`mutations.toml` lists the mutations. They are applied to a temporary copy of the working tree, never to the tree
itself. Exits with 1 if a mutation survives, that is if its tests still pass, or if the test that failed does so without
the mutation too. A mutation is a table:

    [[mutation]]
    room = "flow"                          # the part of hyimg that it breaks
    what = "the sigma shift is ignored"    # the behaviour that it breaks
    old = "return shift * sigma / (1 +"    # found exactly once in hyimg/**/*.py, whatever the file
    new = "return sigma / (1 +"            # what takes its place
    tests = ["test_schedule.py"]           # names of test files, in any folder under tests/
    select = "shift"                       # optional: pytest's -k
    hangs = true                           # optional: running into the time limit counts as killed

White space and trailing commas do not matter when `old` is searched, so that a snippet survives a move to another
file and a reformatting.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import tomli

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".toml")
# Folders of the working tree that no test needs
_NOT_COPIED = (".*", "__pycache__", "bench", "build", "demo", "*.egg-info")
_PASSED, _FAILED = 0, 1  # pytest's exit codes; all others mean that it could not run the tests
_FAILED_TEST = re.compile(r"^(?:FAILED|ERROR) (\S+?::\w+)", re.MULTILINE)
_TEST_NAME = re.compile(r"^ *(?:async )?def (test_\w+)", re.MULTILINE)
_SELECTOR = re.compile(r"\b(?!(?:and|or|not)\b)\w+")
KILLED = "killed"


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """An entry of the list; see the module's docstring."""

    room: str
    what: str
    old: str
    new: str
    tests: Sequence[str]
    select: str = ""
    hangs: bool = False


@dataclass(frozen=True)
class Place:
    """Where a snippet stands: the characters `start` to `end` of a file."""

    path: Path
    start: int
    end: int

    def replaced(self, text: str, new: str) -> str:
        """The file's text with `new` in this place, its lines indented as the first."""
        line = text[text.rfind("\n", 0, self.start) + 1 : self.start]
        indent = line[: len(line) - len(line.lstrip())]
        return text[: self.start] + new.replace("\n", "\n" + indent) + text[self.end :]


def load(path: Path = LIST) -> list[Mutation]:
    """The mutations of a list file, in its order."""
    with path.open("rb") as file:
        return [Mutation(**entry) for entry in tomli.load(file)["mutation"]]


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation: "killed" with the test that failed, "survived", or why it was not tried."""

    result: str
    killer: str | None = None


class Source:
    """The Python files below a folder, searchable regardless of white space and trailing commas."""

    def __init__(self, folder: Path) -> None:
        self._files = {path: _compact(path.read_text("utf-8")) for path in sorted(folder.rglob("*.py"))}

    def find(self, snippet: str) -> list[Place]:
        """Every place of a snippet."""
        wanted, _ = _compact(snippet)
        places = []
        for path, (text, offsets) in self._files.items():
            at = text.find(wanted)
            while at >= 0:
                places.append(Place(path, offsets[at], offsets[at + len(wanted) - 1] + 1))
                at = text.find(wanted, at + 1)
        return places


def _compact(text: str) -> tuple[str, list[int]]:
    """The text without white space and trailing commas, and where each of its characters was."""
    offsets = [offset for offset, character in enumerate(text) if not character.isspace()]
    kept = [
        offset
        for offset, following in zip(offsets, [*offsets[1:], None], strict=False)
        if not (text[offset] == "," and following is not None and text[following] in ")]}")
    ]
    return "".join(text[offset] for offset in kept), kept


def problems(mutations: Sequence[Mutation], root: Path = ROOT) -> list[str]:
    """A line for each entry that no longer fits the tree: its snippet, its test files or their tests' names."""
    source, files = Source(root / "hyimg"), _test_files(root)
    lines = []
    for number, mutation in enumerate(mutations, start=1):
        places = source.find(mutation.old)
        if len(places) != 1:
            lines.append(
                f"{number} ({mutation.what}): the snippet is found {len(places)} times: {mutation.old!r}"
            )
            continue
        try:
            ast.parse(places[0].replaced(places[0].path.read_text("utf-8"), mutation.new))
        except SyntaxError as error:
            lines.append(f"{number} ({mutation.what}): the mutated file is no Python: {error}")
        lines += [
            f"{number} ({mutation.what}): there is no test file `{name}`"
            for name in mutation.tests
            if name not in files
        ]
        text = "\n".join(
            (root / path).read_text("utf-8") for name in mutation.tests for path in files.get(name, [])
        )
        names = " ".join(_TEST_NAME.findall(text)).lower()
        lines += [
            f"{number} ({mutation.what}): no test is called `{word}`"
            for word in _SELECTOR.findall(mutation.select)
            if word.lower() not in names
        ]
    return lines


def _test_files(root: Path) -> dict[str, list[str]]:
    """The test files by name, as paths relative to the root."""
    files: dict[str, list[str]] = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        files.setdefault(path.name, []).append(str(path.relative_to(root)))
    return files


class Copy:
    """A copy of the working tree in which mutations are tried, one at a time."""

    def __init__(self, folder: Path, *, root: Path = ROOT, timeout: float = 180) -> None:
        self.root = folder / "hyimg"
        self.timeout = timeout
        shutil.copytree(root, self.root, ignore=shutil.ignore_patterns(*_NOT_COPIED), symlinks=True)
        self._source = Source(self.root / "hyimg")
        self._test_files = _test_files(self.root)

    def try_out(self, mutation: Mutation) -> Outcome:
        """Runs the tests of a mutation with it applied."""
        places = self._source.find(mutation.old)
        if len(places) != 1:
            return Outcome(f"snippet found {len(places)} times")
        place = places[0]
        original = place.path.read_text("utf-8")
        try:
            _write(place.path, place.replaced(original, mutation.new))
            code = self.run_tests(
                [path for name in mutation.tests for path in self._test_files.get(name, [])], mutation.select
            )
        finally:
            _write(place.path, original)
        if code is None:
            return Outcome(KILLED if mutation.hangs else "timed out")
        if code == _FAILED:
            failed = _FAILED_TEST.findall(self.last_output())
            return Outcome(KILLED, failed[0] if failed else None)
        return Outcome("survived" if code == _PASSED else f"not tested (pytest ended with {code})")

    def run_tests(self, tests: Iterable[str], select: str = "") -> int | None:
        """pytest's exit code for these files and tests, or None if it ran into the time limit."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", "--tb=short"]
        command += ["-m", "not long", *(["-k", select] if select else []), *tests]
        # tests may start processes in other folders; the environment's own hyimg is the tree that was copied
        environment = {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}
        with (
            (self.root.parent / "output").open("wb") as output,
            subprocess.Popen(
                command, cwd=self.root, env=environment, stdout=output, stderr=output, start_new_session=True
            ) as process,
        ):
            try:
                return process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                return None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def fail_anyway(self, tests: Sequence[str]) -> list[str]:
        """Those of the tests that fail without a mutation, and so say nothing of one."""
        left = list(dict.fromkeys(tests))
        bad: list[str] = []
        while left and self.run_tests(left) != _PASSED:
            failed = _FAILED_TEST.findall(self.last_output())
            if not failed:
                return bad + left
            bad.append(failed[0])
            left = [test for test in left if test != failed[0]]
        return bad

    def last_output(self) -> str:
        """What pytest printed last."""
        return (self.root.parent / "output").read_text("utf-8", "replace")


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode())
    # Python compares times in whole seconds, and would take the code of another mutation for this one's
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives its exit code."""
    given = _parser().parse_args(arguments)
    mutations = load()
    if given.check:
        lines = problems(mutations)
        print("\n".join(lines) or f"{len(mutations)} mutations, each found once")
        return 1 if lines else 0
    chosen = [
        (number, mutation)
        for number, mutation in enumerate(mutations, start=1)
        if (not given.only or number in given.only) and (not given.room or mutation.room in given.room)
    ]
    with tempfile.TemporaryDirectory(prefix="hyimg-mutations-") as folder:
        copy = Copy(Path(folder), timeout=given.timeout)
        return _try_all(copy, chosen, show_output=given.verbose)


def _try_all(copy: Copy, chosen: Sequence[tuple[int, Mutation]], *, show_output: bool) -> int:
    started = time.perf_counter()
    others: list[str] = []
    killers: dict[str, list[str]] = {}
    for number, mutation in chosen:
        before = time.perf_counter()
        outcome = copy.try_out(mutation)
        seconds = time.perf_counter() - before
        line = f"{number:4} {outcome.result:9} {seconds:6.1f} s  {mutation.room}: {mutation.what}"
        print(line + (f"  [{outcome.killer}]" if outcome.killer else ""), flush=True)
        if outcome.killer:
            killers.setdefault(outcome.killer, []).append(line)
        if outcome.result != KILLED:
            others.append(line)
            if show_output:
                print(copy.last_output(), flush=True)
    for test in copy.fail_anyway(list(killers)):
        others += [f"{line}: `{test}` fails without it too" for line in killers.get(test, [test])]
    seconds = time.perf_counter() - started
    print(f"{len(chosen) - len(others)} of {len(chosen)} killed in {seconds:.0f} s")
    if others:
        print("\n".join(["not killed:", *others]))
    return 1 if others else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--room", action="append", help="only this room's mutations; may be repeated")
    parser.add_argument("--only", action="append", type=int, metavar="N", help="only this number's")
    parser.add_argument("--check", action="store_true", help="run no test, only look for the snippets")
    parser.add_argument(
        "--timeout", type=float, default=180, help="seconds for the tests of one mutation (%(default)s)"
    )
    parser.add_argument("--verbose", action="store_true", help="show pytest's output unless killed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
