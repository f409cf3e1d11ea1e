"""Runs mutated cases of every kind and prints what they came to. From the repository's folder:

python -m tests.robustness.harness --cases 20                      20 of each kind
python -m tests.robustness.harness --cases 20 --kinds "LoRA"       of the kinds with this in their name
python -m tests.robustness.harness --only "VAE:17" --keep FOLDER   one case again, its files kept in FOLDER
python -m tests.robustness.harness --what limits                   every command under every limit
python -m tests.robustness.harness --what disks                    on disks that are nearly full (as root)
python -m tests.robustness.harness --what signals --cases 5        every signal at 5 moments of every command
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import random
import resource
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "MKL_CBWR": "COMPATIBLE",
        "HYIMG_LOAD_PLUGINS": "",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "COLUMNS": "120",
    }
)

from tests.robustness.children import Outcome, run_cases
from tests.robustness.rules import Case
from tests.robustness.world import World, make_world


@dataclass
class Row:
    """What the cases of one kind came to."""

    kind: str
    cases: int = 0
    codes: dict[str, int] = field(default_factory=lambda: {"0": 0, "1": 0, "2": 0, "other": 0})
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.cases += 1
        self.codes[str(outcome.code) if outcome.code in (0, 1, 2) else "other"] += 1
        self.faults += described(outcome)
        for fault in described(outcome):
            print(fault, flush=True)
        self.seconds += outcome.seconds


def import_all() -> None:
    """Everything that a command imports when it runs, so that children need not."""
    import importlib
    import pkgutil

    import hyimg.cli.app
    import hyimg.stages

    for module in pkgutil.iter_modules(hyimg.stages.__path__):
        importlib.import_module(f"hyimg.stages.{module.name}")
    for name in (
        "hyimg.encoders.byt5",
        "transformers.models.t5.modeling_t5",
        "PIL.Image",
        "hyimg.reports.dataset_report",
    ):
        importlib.import_module(name)
    from PIL import Image

    Image.init()
    with contextlib.redirect_stdout(io.StringIO()):  # what the command line itself imports late
        for arguments in (["--help"], ["plugins"], ["inspect-modules", "--arch", "tiny"]):
            hyimg.cli.app.run(arguments)
    gc.collect()
    gc.freeze()  # children that collect garbage would copy every page of it


def quiet_run(folder: Path) -> Callable[[list[str]], None]:
    """Runs command lines that must succeed, each in a child."""
    count = 0

    def run(arguments: list[str]) -> None:
        nonlocal count
        count += 1
        case = Case(f"world {count}", folder / f"world-{count}", arguments)

        def prepare(case: Case) -> None:
            case.arguments = arguments

        (outcome,) = run_cases([(case, prepare)], jobs=1)
        if outcome.code != 0:
            raise RuntimeError(f"{shlex.join(arguments)} ended with {outcome.code}: {outcome.err}")
        shutil.rmtree(case.folder)

    return run


def cases_of(
    name: str, numbers: Sequence[int], seed: int, world: World, folder: Path
) -> list[tuple[Case, Callable]]:
    """The cases of a kind: (case, what prepares it in its child)."""
    from tests.robustness.setting import KINDS, Setting

    def preparation(number: int) -> Callable[[Case], None]:
        return lambda case: KINDS[name](Setting(case, world, random.Random(f"{seed} {name} {number}")))

    place = folder / "".join(c if c.isalnum() else "-" for c in name)
    return [(Case(f"{name}:{number}", place / str(number)), preparation(number)) for number in numbers]


def signature(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder."""
    stats = {str(path): path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def described(outcome: Outcome) -> list[str]:
    """A fault in a few lines: which case, what was done, what the command did."""
    case = outcome.case
    line = shlex.join(case.arguments)
    return [f"{case.name} | {fault} | {case.words[:300]} | hyimg {line[:300]}" for fault in outcome.faults]


def run_kind(
    name: str, numbers: Sequence[int], options: argparse.Namespace, world: World, folder: Path
) -> Row:
    row = Row(name)
    before = signature(world.root)
    for outcome in run_cases(cases_of(name, numbers, options.seed, world, folder), jobs=options.jobs):
        row.add(outcome)
        if options.keep:
            print(f"hyimg {shlex.join(outcome.case.arguments)}\n{outcome.out}{outcome.err}", file=sys.stderr)
        else:
            shutil.rmtree(outcome.case.folder, ignore_errors=True)
    if signature(world.root) != before:
        row.faults.append(f"{name} | changes files that are only read")
        print(row.faults[-1], flush=True)
    return row


def run_mutations(options: argparse.Namespace, world: World, folder: Path) -> list[Row]:
    """A row for each kind of file and each command line."""
    from tests.robustness.setting import KINDS

    names = [name for name in KINDS if options.kinds in name]
    numbers: Sequence[int] = range(options.first, options.first + options.cases)
    if options.only:
        name, _, number = options.only.rpartition(":")
        names, numbers = [name], [int(number)]
    return [run_kind(name, numbers, options, world, folder) for name in names]


def run_disturbed(what: str, options: argparse.Namespace, world: World, folder: Path) -> list[Row]:
    """A row for each limit, disk or signal of each command."""
    from tests.robustness import disturbances as d

    commands = options.commands or list(d.COMMANDS)
    undisturbed = d.Undisturbed(commands, world, folder / f"{what}, undisturbed")
    draw = random.Random(options.seed)
    rows: dict[str, Row] = {}

    def count(kind: str, outcome: Outcome) -> None:
        rows.setdefault(kind, Row(kind)).add(outcome)

    common = {"undisturbed": undisturbed, "world": world, "folder": folder}
    if what == "disks":
        for name in commands:
            for kilobytes in d.DISKS[:: options.every]:
                outcome = d.full_disk_case(name, kilobytes, **common)
                if outcome is None:
                    return []
                count(f"disk, {name}", outcome)
        return list(rows.values())
    if what == "limits":
        cases, disturb = d.limit_cases(commands), d.limited
    else:
        cases, disturb = d.signal_cases(commands, options.cases), d.signalled(options.seed, undisturbed)
    draw.shuffle(cases)
    for outcome in d.disturbed(disturb, cases[:: options.every], **common, jobs=options.jobs):
        command, _, label = outcome.case.name.rpartition(", ")
        count(f"{label.rpartition(' ')[0]}, {command}", outcome)
    return [rows[kind] for kind in sorted(rows)]


def table(rows: Sequence[Row]) -> str:
    lines = [
        f"{'kind':32} {'cases':>6} {'exit 0':>7} {'1':>5} {'2':>5} {'other':>6} {'faults':>7} {'cpu s':>6}"
    ]
    for row in rows:
        codes = row.codes
        lines.append(
            f"{row.kind:32} {row.cases:6} {codes['0']:7} {codes['1']:5} {codes['2']:5} {codes['other']:6} "
            f"{len(row.faults):7} {row.seconds:6.1f}"
        )
    total = sum(row.cases for row in rows)
    lines.append(f"{total} cases of {len(rows)} kinds, {sum(len(row.faults) for row in rows)} faults")
    return "\n".join(lines)


def main() -> int:
    options = _options()
    from tests.robustness import command_lines, kinds, model_kinds  # noqa: F401  (they register their kinds)

    started = time.monotonic()
    import_all()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="robust"))
    folder.mkdir(exist_ok=True)
    try:
        world = make_world(folder / "world", quiet_run(folder))
        rows = []
        for what in options.what:
            run = run_mutations if what == "mutations" else partial(run_disturbed, what)
            rows += run(options, world, folder)
        print(table(rows))
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cpu_seconds = sum(usage.ru_utime + usage.ru_stime for usage in used)
        print(f"{cpu_seconds:.0f} s of a processor, {time.monotonic() - started:.0f} s in all")
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return int(any(row.faults for row in rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whats = ("mutations", "limits", "disks", "signals")
    parser.add_argument("--what", choices=whats, nargs="+", default=["mutations"])
    parser.add_argument("--cases", type=int, default=5, help="of each kind of file; signals of each command")
    parser.add_argument(
        "--every", type=int, default=1, help="of limits, disks and signals: every nth case only"
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", help="only kinds of files with this in their name")
    parser.add_argument("--commands", nargs="+", help="only these commands, for limits, disks and signals")
    parser.add_argument("--only", help="KIND:NUMBER, one case")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="a new folder, in which the cases' files are kept")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
