"""What hyimg does, as a file that can be compared before and after a change that should change nothing.

    python benchmarks/behaviour.py before.json --clone ../hyimg-before
    python benchmarks/behaviour.py after.json
    python benchmarks/behaviour.py --compare before.json after.json [--only REGEX] [--skip REGEX]

Runs the command lines of `behaviour.ini`, some 350, on the tiny and on the micro model, with one thread, on the
CPU, and records of each its exit code, its output (paths, times, dates and measured memory normalised), and the
files that it wrote: tensors by shape, norm and hash, pictures by pixels, metadata and documents as text. It imports
no inner module of hyimg by name, so that one version of it runs on any tree. Two recordings of one tree on one
machine are equal; another processor may round differently.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import difflib
import hashlib
import importlib
import json
import os
import pkgutil
import platform
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    **{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE", "CUDA_VISIBLE_DEVICES": ""},
    **{"HYIMG_LOAD_PLUGINS": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "PYTHONHASHSEED": "0"},
    **{
        "PYTHONUTF8": "1",
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "NO_COLOR": "1",
        "TERM": "dumb",
        "COLUMNS": "100",
    },
    **{"PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "ignore"},
}
MAX_SECONDS = 300
VOLATILE = {
    *("seconds", "samples_per_second", "peak_memory_gb", "eta_seconds", "saved", "started", "log_name"),
    *("modelspec.date", "ss_session_id", "ss_training_started_at", "ss_training_finished_at", "free_bytes"),
}
"""Keys of metrics, states and metadata that differ from run to run."""


IMAGES = {  # caption -> size
    "a red square": (160, 120),
    'a sign with the word "GO"': (128, 128),
    "a {green|blue} field, grass, under a sky": (120, 170),
    "a dark road, night, stars": (200, 200),
    "a red cat": (300, 90),
}


def read_cases(parser: configparser.ConfigParser, words: dict[str, str]) -> list[dict[str, str]]:
    """Phases of cases: name -> command lines, with `{out}` still in them."""

    def fill(text: str) -> str:
        while (filled := re.sub(r"\{(\w+)\}", lambda m: words.get(m[1], m[0]), text)) != text:
            text = filled
        return text

    section = {name: {key: " ".join(line.split()) for key, line in parser[name].items()} for name in parser}
    phases = [{name: fill(line)} for name, line in section["preparation"].items()]
    cases = {f"train {name}": fill("{train} " + line) for name, line in section["training"].items()}
    for name, line in section["resumed"].items():
        step = fill(
            "{train} " + line + " --max_train_steps 4 --save_every_n_steps 2 --save_state --output_dir"
        )
        cases[f"resume {name}"] = (
            f"{step} {{out}}/a; {step} {{out}}/b --resume {{out}}/a/lora-step00000002-state"
        )
    cases |= {name: fill(line) for name, line in section["others"].items()}
    cases |= {f"help {name}": f"{name} --help" for name in section["help"]["commands"].split()}
    cases |= {f"wrong: {line}": fill(line) for line in parser["wrong"]["lines"].strip().splitlines()}
    return [*phases, {**cases, "help": "--help"}]


class World:
    """The folder that the commands run in, and the words that stand for its files."""

    def __init__(self, root: Path, clone: Path) -> None:
        self.root, self.clone = root, clone
        self._parser = configparser.ConfigParser(interpolation=None, delimiters=(":",))
        self._parser.optionxform = str  # type: ignore[assignment, method-assign]
        self._parser.read(Path(__file__).with_suffix(".ini"), encoding="utf-8")
        # LoHa and LoKr come from an example package, or are built in
        is_package = (clone / "plugins" / "hyimg-lycoris").is_dir()
        words = {"clone": str(clone), "lycoris": "--plugin hyimg_lycoris" if is_package else ""}
        self.phases = read_cases(self._parser, {**self._parser["words"], **words})

    def write(self) -> None:
        """Pictures with captions, dataset files, prompt files, LoRAs of other tools, and files that are wrong."""
        root, files = self.root, dict(self._parser["files"])
        for folder in ("images", "masks", "regular", "broken"):
            (root / "set" / folder).mkdir(parents=True)
        (root / "empty").mkdir()
        for number, (caption, (width, height)) in enumerate(IMAGES.items()):
            shape = (height // 10, width // 10, 3)
            noise = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
            image = Image.fromarray(noise).resize((width, height))
            image.save(root / "set" / "images" / f"{number}.png")
            image.convert("L").save(root / "set" / "masks" / f"{number}.png")
            image.rotate(90).save(root / "set" / ("regular" if number < 2 else "broken") / f"{number}.png")
            for folder in ("images", "broken"):
                (root / "set" / folder / f"{number}.txt").write_text(caption, encoding="utf-8")
        (root / "set" / "broken" / "3.png").write_bytes(b"not a picture")
        entries = {f"{number}.png": {"caption": f"picture {number}", "tags": "a, b"} for number in range(3)}
        (root / "set" / "meta.json").write_text(json.dumps(entries), encoding="utf-8")
        for name, text in files.items():
            (root / name).write_text(text.strip() + "\n", encoding="utf-8")
        for name, change in self._parser["datasets"].items():
            old, _, new = change.partition(" -> ")
            assert old in files["set/data.toml"], name
            text = files["set/data.toml"].replace(old, new).strip() + "\n"
            (root / "set" / f"{name}.toml").write_text(text, encoding="utf-8")
        (root / "garbage.safetensors").write_bytes(b"\xff" * 5000)
        (root / "model.ckpt").write_bytes(b"PK\x03\x04")
        (root / "golden").mkdir()
        for path in (REPOSITORY / "tests" / "golden").glob("lora_*.safetensors"):
            shutil.copy(path, root / "golden")


def import_everything() -> None:
    """Every module of hyimg, whatever their names are, so that a forked child has nothing to import."""
    package = importlib.import_module("hyimg")
    for module in pkgutil.walk_packages(package.__path__, "hyimg."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def run_case(world: World, log: Path, out: str, line: str) -> None:
    """Runs a case's commands in turn, each in a forked child; leaves what they print and how they end in `log`."""
    log.mkdir(parents=True)
    for number, part in enumerate(line.replace("{out}", out).split("; ")):
        words = shlex.split(part)
        if words[0] == "copy":
            shutil.copy(world.root / words[1], world.root / words[2])
            continue
        if (pid := os.fork()) == 0:
            _run_command(words, world.root, log / str(number))
        status = os.waitpid(pid, 0)[1]
        code = os.waitstatus_to_exitcode(status)
        (log / f"{number}.code").write_text(str(code) if code >= 0 else f"killed by signal {-code}")


def _run_command(words: list[str], root: Path, log: Path) -> None:
    """The end of a forked child: the command, with its streams in files."""
    code = 70
    try:
        os.chdir(root)
        signal.alarm(MAX_SECONDS)
        standard_input = os.open(root / "prompts.txt", os.O_RDONLY)
        os.dup2(standard_input, 0)
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(log.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT), stream)
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            os.environ[name] = value
        if words[0] == "python":
            os.execv(sys.executable, [sys.executable, "-m", "hyimg", *words[1:]])
        known = set(sys.modules)
        code = importlib.import_module("hyimg.cli.app").run(words)
        log.with_suffix(".modules").write_text("\n".join(sys.modules.keys() - known))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


def run_cases(world: World, logs: Path, jobs: int) -> dict[str, Path]:
    """Runs all cases, `jobs` at a time, each phase after the one before; gives each case's folder of output."""
    outs: dict[str, Path] = {}
    for phase in world.phases:
        running: set[int] = set()
        for name, line in phase.items():
            slug = name.replace(" ", "-") if re.fullmatch(r"[\w -]+", name) else f"case-{len(outs)}"
            outs[name] = Path("out") / slug
            (world.root / outs[name]).parent.mkdir(exist_ok=True)
            if "copy " in line:
                (world.root / outs[name]).mkdir()
            if len(running) >= jobs:
                running.discard(os.wait()[0])
            if (pid := os.fork()) == 0:
                run_case(world, logs / slug, str(outs[name]), line)
                os._exit(0)
            running.add(pid)
        while running:
            running.discard(os.wait()[0])
        if len(phase) == 1 and name != "demo":
            _assert_done(name, logs / slug)
        _import_what_was_needed(logs)
    return outs


def _import_what_was_needed(logs: Path) -> None:
    """Imports what the commands so far have imported, which is most of the time of a small one."""
    for log in logs.glob("*/*.modules"):
        for name in log.read_text().split():
            if name not in sys.modules and not name.startswith("hyimg"):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        log.unlink()


def _assert_done(name: str, log: Path) -> None:
    """Without what the preparation makes, nothing that follows means anything."""
    if any(path.read_text() != "0" for path in log.glob("*.code")):
        sys.exit(f"`{name}` failed:\n" + (log / "0.stderr").read_text(encoding="utf-8"))


class Plain:
    """Text and names without what differs from run to run or from folder to folder."""

    def __init__(self, world: World) -> None:
        rules = {
            re.escape(str(world.root)) + "/?": "WORK/",
            re.escape(str(world.clone)) + r"(?!/\.venv)": "CLONE",
            re.escape(sys.prefix) + r"/lib/python[\d.]+/site-packages": "PYTHON",
            r"/tmp/tmp\w+": "TMP",
            r"out/case-\d+": "OUT",
            r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d|\b20\d{6}-\d{6}\b": "DATE",
            r"-[0-9a-f]{8}(?=\.(?:safetensors|json)\b)": "-RANDOM",
            r"(hyimg_plugin_\w+)_[0-9a-f]{8}\b": r"\1",
            r"\b1[789]\d{8}\.\d+": "TIMESTAMP",
            r"events\.out\.tfevents\.[\w.-]+": "EVENTS",
            r"[\d.]+ (\w+)/s\b|[\d.]+ s/(\w+)": r"RATE of \1\2",
            r"[\d.]+ (?:s|ms|min|h)(?: [\d.]+ (?:s|min))*(?![\w/])": "TIME",
            r"peak [\d.]+ [GM]B": "peak MEMORY",
            r"(?<=times slower: )[\d.]+|[\d.]+(?= times (?:as long|slower))": "N",
        }
        self._rules = [(re.compile(pattern), text) for pattern, text in rules.items()]

    def __call__(self, text: str) -> str:
        for pattern, replacement in self._rules:
            text = re.sub(pattern, replacement, text)
        return text

    def lines(self, text: str) -> list[str]:
        """Without lines of progress that is not complete, which come by the clock."""
        under_way = re.compile(r"^[\w -]+: (\d+)/(\d+) \(")
        found = ((line, under_way.match(line)) for line in text.splitlines())
        return [self(line).rstrip() for line, match in found if match is None or match[1] == match[2]]


def record(world: World, logs: Path, outs: dict[str, Path]) -> dict[str, Any]:
    """Everything that is compared: key -> number, text, or list of lines."""
    plain = Plain(world)
    found: dict[str, Any] = {}
    for name, out in outs.items():
        for path in sorted(path for path in (logs / out.name).iterdir() if path.suffix != ".modules"):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text:
                found[f"{name} | {path.name}"] = plain.lines(text)
        found |= dict(files_below(world.root / out, f"{name} | file", plain))
        if name.startswith("resume "):
            files = (found.get(f"{name} | file {half}/lora.safetensors", []) for half in "ab")
            first, second = ([line for line in lines if line.startswith("tensor")] for lines in files)
            found[f"{name} | is equal"] = bool(first) and first == second
    for folder in ("model", "set/hyimg-cache", "demo"):
        found |= dict(files_below(world.root / folder, f"file {folder}", plain))
    return dict(sorted(found.items()))


def files_below(folder: Path, prefix: str, plain: Plain) -> Iterator[tuple[str, Any]]:
    """Each file of a folder, in a form that tells what has changed."""
    for path in sorted(folder.rglob("*")):
        name = plain(path.relative_to(folder).as_posix())
        if path.is_file() and "index.sqlite" not in name:
            try:
                yield f"{prefix} {name}", _content(path, name, plain)
            except Exception as error:
                yield f"{prefix} {name}", f"unreadable: {error!r}"


def _content(path: Path, name: str, plain: Plain) -> Any:
    if path.suffix == ".safetensors":
        return list(_safetensors(path, plain))
    if path.suffix == ".png":
        with Image.open(path) as image:
            pixels = np.asarray(image)
            mean = f"{image.mode} {image.size} mean {pixels.mean():.3f} {_hash(pixels.tobytes())}"
            return [mean, *(f"{key}: {plain(str(text))}" for key, text in image.info.items())]
    if name.endswith("EVENTS"):
        return "is there"
    text = path.read_bytes().decode("utf-8", "replace")
    if path.name == "manifest.json":
        return sorted(json.loads(text)["files"])
    if path.suffix == ".json":
        return list(_json_lines(json.loads(text), plain))
    if path.suffix == ".jsonl":
        return [json.dumps(_without_volatile(json.loads(line))) for line in text.splitlines()]
    return plain.lines(text)


def _safetensors(path: Path, plain: Plain) -> Iterator[str]:
    """A line a tensor where there are few, one for all where there are many; the metadata in their order."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = file.read()
    metadata = header.pop("__metadata__", {})
    whole, squares, lines = hashlib.sha256(), 0.0, []
    for name, entry in sorted(header.items()):
        values = data[slice(*entry["data_offsets"])]
        whole.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode() + values)
        squares += (square := _square(values, entry["dtype"]))
        norm = f"{entry['dtype']} {entry['shape']} norm {square**0.5:.5g}"
        lines.append(f"tensor {name}: {norm} {_hash(values)}")
    if len(lines) > 8:
        lines = [f"tensors: {len(lines)}, norm {squares**0.5:.6g} {whole.hexdigest()[:16]}"]
    yield from lines
    shapes = sorted((name, entry["dtype"], entry["shape"]) for name, entry in header.items())
    yield f"tensor names and shapes {_hash(json.dumps(shapes).encode())}"
    yield f"order of the tensors {_hash(json.dumps(list(header)).encode())}"
    for key, text in metadata.items():
        yield f"{key}: {'...' if key in VOLATILE else _short(plain(text))}"


def _square(values: bytes, dtype: str) -> float:
    """The sum of squares of a tensor's values, to distinguish rounding from a fault."""
    types = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
    if dtype == "BF16":
        numbers = (np.frombuffer(values, "<u2").astype("<u4") << 16).view("<f4")
    elif dtype in types:
        numbers = np.frombuffer(values, types[dtype])
    else:
        return 0.0
    return float(np.square(numbers.astype(np.float64)).sum())


def _json_lines(value: Any, plain: Plain) -> Iterator[str]:
    if not isinstance(value, dict):
        value = {"": value}
    if isinstance(value.get("metrics"), list):  # of a state: the checksum of a file that holds times
        value["metrics"] = value["metrics"][:1]
    for key, item in value.items():
        yield f"{key}: {_short(plain(json.dumps(_without_volatile(item))), 4000) if key not in VOLATILE else '...'}"


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: "..." if key in VOLATILE else _without_volatile(item) for key, item in value.items()}
    return [_without_volatile(item) for item in value] if isinstance(value, list) else value


def _short(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]}... {_hash(text.encode())}"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def compare(before: dict[str, Any], after: dict[str, Any], only: str, skip: str) -> int:
    """Prints what differs; gives how many values do."""
    num_different = 0
    for key in sorted(before.keys() | after.keys()):
        if not re.search(only, key) or (skip and re.search(skip, key)):
            continue
        values = [recording.get(key, []) for recording in (before, after)]
        old, new = (value if isinstance(value, list) else [str(value)] for value in values)
        if old != new:
            num_different += 1
            what = "" if key in before and key in after else " (new)" if key in after else " (gone)"
            print(f"== {key}{what}")
            lines = list(difflib.unified_diff(old, new, n=0, lineterm=""))[2:]
            print("\n".join(line for line in lines if not line.startswith("@@ ")))
    print(f"{num_different} of {len(before.keys() | after.keys())} differ")
    return num_different


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, nargs="?", help="JSON file to write")
    parser.add_argument("--clone", type=Path, default=REPOSITORY, help="tree to record (this one)")
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time")
    parser.add_argument("--keep", type=Path, help="folder for the files, which is kept")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--only", default="", metavar="REGEX", help="compare keys that match")
    parser.add_argument("--skip", default="", metavar="REGEX", help="do not compare keys that match")
    given = parser.parse_args()
    if given.compare:
        before, after = (json.loads(path.read_text(encoding="utf-8")) for path in given.compare)
        if before["machine"] != after["machine"]:
            print(f"recorded on {before['machine']} and on {after['machine']}")
        sys.exit(compare(before["recorded"], after["recorded"], given.only, given.skip) > 0)
    if given.output is None:
        parser.error("name a file to write, or `--compare BEFORE AFTER`")
    clone = given.clone.resolve()
    if os.environ.get("HYIMG_BEHAVIOUR") is None:
        # a process whose libraries see the environment from their start on
        path = os.pathsep.join(map(str, [clone, *sorted((clone / "plugins").glob("hyimg-*"))]))
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path, "HYIMG_BEHAVIOUR": "1"}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)
    write_recording(given.output, clone, given.jobs, given.keep)


def write_recording(output: Path, clone: Path, jobs: int, keep: Path | None) -> None:
    """Runs all cases and writes the JSON file."""
    started = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="behaviour-")) if keep is None else keep.resolve()
    logs, work = root / "logs", root / "work"
    logs.mkdir(parents=True)
    world = World(work, clone)
    world.write()
    sys.path.remove(str(Path(__file__).resolve().parent))  # hyimg must not import this folder's modules
    import_everything()
    place = Path(importlib.import_module("hyimg").__file__ or "").parents[1]
    assert place == clone, f"{place} was imported in place of {clone}"
    outs = run_cases(world, logs, jobs)
    recorded = record(world, logs, outs)
    machine = {"python": platform.python_version(), "torch": importlib.import_module("torch").__version__}
    processor = re.search("model name.*", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    machine["processor"] = processor[0] if processor else ""
    document = {"machine": machine, "recorded": recorded}
    output.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{len(outs)} cases, {len(recorded)} values in {output}, {time.monotonic() - started:.0f} s")
    if keep is None:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
