"""What every case must keep to, whatever was damaged: exit codes, output, and what may change on disk."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

MAX_LINES = 40
MAX_LINE = 2100
"""Characters of a line that a person is to read."""
NOTES = ("case.json", "result.json", "broken.txt")

# What a terminal may act on: C0 but for tab and newline, DEL, C1, and marks that change the direction of text
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\u200e\u200f\ufeff]")
_WORDS = (
    r"Traceback \(most recent|error: unexpected [A-Z]|error: [A-Z]\w*(?:Error|Exception)\b|site-packages/\S+\.py:\d+: |"
    r"^\w*Warning: |0x[0-9a-f]{9,}|\[Errno "
)
_UNFORESEEN = re.compile(_WORDS, re.MULTILINE)
_UNFORESEEN_OR_TOO_LARGE = re.compile(_WORDS + "|out of memory|tried to allocate", re.MULTILINE)


@dataclass
class Case:
    """One command line on files of its own: `folder/work` is where it stands, and all that it may write."""

    name: str
    folder: Path
    arguments: list[str] = field(default_factory=list)
    words: str = ""
    """What was done to the files, for the report."""
    writable: tuple[str, ...] = ("out",)
    """Below `work`: what the command may change. Elsewhere it may change nothing."""
    is_json: bool = False
    """Whether stdout is a document: it escapes what it holds as JSON does."""
    environment: Mapping[str, str] = field(default_factory=dict)
    runs_code: bool = False
    """Whether the case's files are plugins, whose code the command line asks for."""
    makes_files_anywhere: bool = False
    """Whether new files may appear anywhere in `work`: a damaged command line names other outputs."""
    limits: Mapping[int, int] = field(default_factory=dict)
    """Soft limits (`resource.RLIMIT_...`) while the command runs; of the address space, beyond what is in use."""
    signal: tuple[int, float] | None = None
    """A signal, and after how many seconds of the command's work it is sent."""
    may_lack_memory: bool = False
    """Whether memory may run out: a native library may then end the process, which no Python code can prevent."""
    shared_memory: int | None = None
    """Bytes of a `/dev/shm` of its own; only root can make one."""

    @property
    def work(self) -> Path:
        return self.folder / "work"


def snapshot(folder: Path) -> dict[str, object]:
    """What every name below a folder is: a file's bytes, a link's target, a folder."""
    found: dict[str, object] = {}
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = os.path.join(root, name)
            key = os.path.relpath(path, folder)
            if os.path.islink(path):
                found[key] = f"-> {os.readlink(path)}"
            elif os.path.isdir(path):
                found[key] = "a folder"
            elif os.path.isfile(path) and os.path.getsize(path) < 50_000_000:
                with open(path, "rb") as file:
                    found[key] = file.read()
            else:
                found[key] = "a device, a pipe or a large file"
    return found


def check_files(case: Case, code: int, before: Mapping[str, object]) -> list[str]:
    """The rules for what a command leaves on disk, whatever was damaged."""
    faults = []
    after = snapshot(case.folder)
    ours = [f"work/{place}" for place in case.writable]
    changed = [
        name
        for name in {**before, **after}
        if before.get(name) != after.get(name)
        and name not in NOTES
        and not any(name == place or name.startswith(f"{place}/") for place in ours)
        and not (case.makes_files_anywhere and name not in before and name.startswith("work/"))
    ]
    if changed:
        faults.append(f"changes {sorted(changed)[:5]}")
    if code == 2:
        harmed = [
            name
            for name, content in before.items()
            if isinstance(content, bytes) and after.get(name) != content and "index.sqlite" not in name
        ]
        if harmed:
            faults.append(f"is refused, and changes {sorted(harmed)[:5]}")
    left = [name for name in after if name not in before and name.endswith((".hyimg-tmp", ".lock"))]
    # a signal may come right after a file was made, as a kill may, whose leftovers the crash points hold
    if left and case.signal is None:
        faults.append(f"leaves {sorted(left)[:5]}")
    return faults


def check_text(case: Case, code: int, out: bytes, err: bytes) -> list[str]:
    """The rules for what a command prints, and for its exit code."""
    # a panic of a Rust library passes every `except Exception`
    if case.may_lack_memory and b"panicked at" in err:
        return []
    faults = []
    stopped = case.signal is not None and code == 128 + case.signal[0]
    if code not in (0, 1, 2) and not stopped:
        faults.append(f"exit code {code}")
    for name, data in (("stdout", out), ("stderr", err)):
        try:
            text = data.decode()
        except UnicodeDecodeError:
            faults.append(f"{name} is not UTF-8")
            continue
        if (found := _CONTROL.search(text)) is not None:
            faults.append(f"{name} has {found[0]!r}: {text[max(0, found.start() - 60) : found.end()]!r}")
        if name == "stdout" and case.is_json:
            continue
        lines = text.splitlines()
        if name == "stderr" and len(lines) > MAX_LINES:
            faults.append(f"{len(lines)} lines on {name}")
        if (longest := max(map(len, lines), default=0)) > MAX_LINE:
            faults.append(f"a line of {longest} characters on {name}")
        unforeseen = _UNFORESEEN if case.may_lack_memory else _UNFORESEEN_OR_TOO_LARGE
        if (found := unforeseen.search(text)) is not None:
            faults.append(f"{name}: {text[max(0, found.start() - 100) : found.end() + 250]}")
    errors = [line for line in err.decode("utf-8", "replace").splitlines() if line.startswith("error: ")]
    if code in (1, 2) and len(errors) != 1 and case.signal is None:
        faults.append(f"exit code {code} with {len(errors)} lines `error: ...`")
    return faults
