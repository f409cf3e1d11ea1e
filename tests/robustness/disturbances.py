"""Commands that run into a limit of the system, or are sent a signal, and are then run again as they were.

The first run ends with a sentence and exit code 1 or 2 (after a signal 128 and its number), or does not notice; it
changes nothing that is not its own. The second, without the limit, ends with 0 and leaves what a run leaves that nobody
disturbed: no file less, and none more.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.robustness.children import Outcome, mount, run_cases
from tests.robustness.rules import Case, snapshot
from tests.robustness.setting import Setting
from tests.robustness.world import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LIMITS: Mapping[str, tuple[int, Sequence[int]]] = {
    # descriptors: those that are open, and so many more
    "descriptors": (resource.RLIMIT_NOFILE, (0, 1, 2, 3, 4, 6, 9, 14, 20)),
    "file size": (resource.RLIMIT_FSIZE, (0, 100, 3_000, 9_000, 30_000, 100_000, 400_000)),
    "address space": (resource.RLIMIT_AS, (1_000_000, 20_000_000, 60_000_000, 150_000_000)),
}
SHARED_MEMORY = (4096, 16384, 65536)
"""Bytes of `/dev/shm`, which loader processes send batches through."""
DISKS = (4, 12, 40, 150, 500, 1500)
"""Free kilobytes of a disk."""
_DRAWN = re.compile(r"-[0-9a-f]{8}\.")


def _train(s: Setting, *extra: object) -> None:
    data = s.dataset()
    saves = ["--max_train_steps", 4, "--save_every_n_steps", 1, "--save_last_n_steps", 2, "--save_state"]
    s.train(data, *saves, "--resume", "latest", *extra)


def _train_with_samples(s: Setting) -> None:
    prompts = [
        "--sample_prompts",
        s.world.root / "prompts.txt",
        "--sample_every_n_steps",
        2,
        "--vae",
        s.world.vae,
    ]
    _train(s, *prompts)


def _train_that_caches_first(s: Setting) -> None:
    data = s.dataset(caches=False)
    models = ["--vae", s.world.vae, *s.world.encoders[:4]]
    s.train(
        data, "--cache_latents", "--cache_text_encoder_outputs", *models, "--resume", "latest", "--save_state"
    )
    s.case.writable += ("set/hyimg-cache",)


def _lora(s: Setting) -> Path:
    return s.world.run / "lora.safetensors"


def _sample(s: Setting) -> None:
    prompts = ["--sample_prompts", s.world.root / "prompts.txt"]
    s.runs("sample", *s.world.renders, *prompts, "--lora_weight", _lora(s), "--output_dir", s.out)


def _infer(s: Setting) -> None:
    prompts = s.copy(s.world.root / "prompts.txt")
    output = ["--output_type", "latent_images", "--save_path", s.out, "--overwrite"]
    s.runs("infer", *s.world.renders, "--from_file", prompts, "--seed", 1, *output)


def _merged(s: Setting) -> None:
    merged = ["--save_merged_model", s.out / "merged.safetensors", "--overwrite"]
    s.runs("infer", *s.world.renders[:2], "--lora_weight", _lora(s), *merged)


def _with_sheet(s: Setting) -> None:
    s.report(s.dataset(caches=False), "--contact_sheet", s.out / "sheet.png")


COMMANDS: Mapping[str, Callable[[Setting], None]] = {
    "dataset": _with_sheet,
    "cache-latents": lambda s: s.cache_latents(s.dataset(caches=False)),
    "cache-text": lambda s: s.cache_text(s.dataset(caches=False)),
    "train": _train,
    "train with samples": _train_with_samples,
    "train with a worker": lambda s: _train(s, "--max_data_loader_n_workers", 1),
    "train that caches first": _train_that_caches_first,
    "sample": _sample,
    "infer": _infer,
    "infer, merged model": _merged,
    "convert-comfy": lambda s: s.runs("convert-comfy", _lora(s), s.out / "b.safetensors", "--overwrite"),
    "merge": lambda s: s.runs("merge", _lora(s), _lora(s), "-o", s.out / "b.safetensors", "--overwrite"),
    "make-tiny-model": lambda s: s.runs("make-tiny-model", s.out, "--overwrite"),
    "check": lambda s: s.runs("check", _lora(s), "--fp8", "--dit", s.world.dit, "--device", "cpu"),
    "inspect-modules": lambda s: s.runs("inspect-modules", "--dit", s.world.dit),
}
"""Every command that reads or writes much, in a form that may be run again."""


def command_case(
    name: str, case_name: str, folder: Path, world: World
) -> tuple[Case, Callable[[Case], None]]:
    """A case of a command on files that are whole."""

    def prepare(case: Case) -> None:
        if not any(case.work.iterdir()):
            COMMANDS[name](Setting(case, world, random.Random(0)))
        else:
            _again(case, name, world)

    return Case(case_name, folder), prepare


def _again(case: Case, name: str, world: World) -> None:
    """The same command line, the files staying as they are."""
    setting = Setting(case, world, random.Random(0))
    setting.copy = lambda source, target=None: case.work / (target or source.name)  # type: ignore[method-assign]
    setting.dataset = lambda *, caches=True: case.work / "set" / "data.toml"  # type: ignore[method-assign]
    COMMANDS[name](setting)


class Undisturbed:
    """What every command leaves and how long it takes where nothing disturbs it."""

    def __init__(self, names: Sequence[str], world: World, folder: Path) -> None:
        self.names: dict[str, set[str]] = {}
        self.seconds: dict[str, float] = {}
        for name in names:
            case, prepare = command_case(
                name, f"{name}, undisturbed", folder / "whole" / name.replace(" ", "-"), world
            )
            started = time.monotonic()
            (outcome,) = run_cases([(case, prepare)], jobs=1)
            if outcome.code != 0 or outcome.faults:
                raise RuntimeError(f"{case.name}: {outcome.faults} {outcome.err}")
            self.names[name] = _names(case.work)
            self.seconds[name] = time.monotonic() - started

    def differences(self, name: str, work: Path) -> list[str]:
        """What a folder lacks, and what it has that it should not have."""
        here, whole = _names(work), self.names[name]
        faults = [f"the second run leaves {sorted(here - whole)[:5]}"] if here - whole else []
        return faults + ([f"the second run lacks {sorted(whole - here)[:5]}"] if whole - here else [])


def _names(folder: Path) -> set[str]:
    """Every name below a folder, without what is drawn in them; an open index has files of its own."""
    return {_DRAWN.sub("-*.", path) for path in snapshot(folder) if "index.sqlite-" not in path}


def disturbed(
    disturb: Callable[[Case, str], None],
    cases: Sequence[tuple[str, str]],
    undisturbed: Undisturbed,
    world: World,
    folder: Path,
    *,
    jobs: int,
) -> Iterator[Outcome]:
    """For each (command, label): the disturbed run, and the one after it; the outcome has the faults of both."""
    firsts = []
    for name, label in cases:
        case, prepare = command_case(
            name, f"{name}, {label}", folder / f"{name}-{label}".replace(" ", "-"), world
        )
        disturb(case, label)
        firsts.append((case, prepare))
    names = {case.name: name for (case, _), (name, _) in zip(firsts, cases, strict=True)}
    for first in list(run_cases(firsts, jobs=jobs)):
        yield _and_again(first, names[first.case.name], undisturbed, world)
        shutil.rmtree(first.case.folder, ignore_errors=True)


def _and_again(first: Outcome, name: str, undisturbed: Undisturbed, world: World) -> Outcome:
    """The outcome with the faults of the run after it, where it did not do its work."""
    if first.code != 0:
        first.case.words += first.err.replace("\n", " ")[-250:]
        case, prepare = command_case(name, first.case.name, first.case.folder, world)
        (second,) = run_cases([(case, prepare)], jobs=1)
        first.faults += [f"then: {fault}" for fault in second.faults]
        if second.code != 0:
            first.faults.append(f"then: exit code {second.code}: {second.err[-300:]}")
            return first
    if "out of memory: no samples" not in first.err:
        first.faults += undisturbed.differences(name, first.case.work)
    return first


# ---- limits


def limited(case: Case, label: str) -> None:
    """Sets the limit that a label names: `descriptors 3`."""
    kind, _, value = label.rpartition(" ")
    amount = int(value)
    if kind == "shared memory":
        case.shared_memory = amount
        return
    number, _ = LIMITS[kind]
    if kind == "descriptors":
        amount += 3 + 2  # what every process has, and the two files that a case keeps open
    case.limits = {number: amount}
    case.may_lack_memory = kind == "address space"


def limit_cases(names: Sequence[str], kinds: Sequence[str] = tuple(LIMITS)) -> list[tuple[str, str]]:
    cases = [(name, f"{kind} {value}") for name in names for kind in kinds for value in LIMITS[kind][1]]
    if os.geteuid() == 0:
        cases += [
            (name, f"shared memory {size}") for name in names for size in SHARED_MEMORY if "worker" in name
        ]
    return cases


# ---- a disk of its own


def unmount(target: Path) -> None:
    ctypes.CDLL(None).umount2(os.fsencode(target), 2)  # lazily: an index may be open


def full_disk_case(
    name: str, kilobytes: int, undisturbed: Undisturbed, world: World, folder: Path
) -> Outcome | None:
    """A command on a disk with so many kB free, and again with room; None where nothing can be mounted."""
    case, prepare = command_case(
        name, f"{name}, {kilobytes} kB free", folder / f"{name}-disk".replace(" ", "-"), world
    )
    case.work.mkdir(parents=True)
    if not mount(case.work, "size=40m"):
        return None
    try:

        def prepare_and_fill(case: Case) -> None:
            prepare(case)
            stat = os.statvfs(case.work)
            used = (stat.f_blocks - stat.f_bfree) * stat.f_frsize
            mount(case.work, f"size={used + 1024 * kilobytes}", flags=32)  # MS_REMOUNT

        (first,) = run_cases([(case, prepare_and_fill)], jobs=1)
        mount(case.work, "size=40m", flags=32)
        return _and_again(first, name, undisturbed, world)
    finally:
        unmount(case.work)
        shutil.rmtree(case.folder, ignore_errors=True)


# ---- signals


def signalled(seed: int, undisturbed: Undisturbed) -> Callable[[Case, str], None]:
    """Gives a case the signal that its label names (`SIGTERM 4`), at a moment drawn by the whole label."""

    def disturb(case: Case, label: str) -> None:
        number = signal.Signals[label.partition(" ")[0]]
        name = case.name.rpartition(",")[0]
        draw = random.Random(f"{seed} {case.name}")
        case.signal = (number, draw.uniform(0, 0.9) * undisturbed.seconds[name])

    return disturb


def signal_cases(names: Sequence[str], each: int) -> list[tuple[str, str]]:
    return [(name, f"{number.name} {i}") for name in names for number in SIGNALS for i in range(each)]
