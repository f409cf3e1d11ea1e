"""`make bench`: speed and memory, as a table and as `bench/results.json`.

Times are wall seconds, medians of several runs; memory is said by each part. Every figure is a ratio, or holds for
the machine that the last line names.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from benchmarks.figures import Figure, Options, apart
from benchmarks.machine import describe_machine

# Each a module of this package with `measure(options)`; the first six are what is measured on a CPU
PARTS = {
    "commands": "whole commands as processes: help, conversion, warm caches, start of a run",
    "loading": "a 2 GB checkpoint: time and peak memory of each way to load it",
    "training_step": "a mid-size DiT's training step against the plain composition of the same model",
    "training_run": "`hyimg train` of that model: from its start to the first step, and what the loop adds",
    "streaming": "streamed blocks of the full model on a simulated link: overlap of copies and computation",
    "vae_memory": "encoding and decoding 1024x1024: whole, in chunks of rows, in tiles",
    "samples": "only if named: the start of `train` on up to 100,000 samples (minutes)",
    "text_encoder": "only if named: the text encoder layer by layer, beside the whole one (minutes)",
    "choices": "only if named: what training options change in the demo's outcome (many minutes)",
    "gpu": "with `--device cuda`: the full model's training step, streaming, memory caps, and the floor",
}
_ON_CPU = ("commands", "loading", "training_step", "training_run", "streaming", "vae_memory")


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table, writes the JSON."""
    options, parts, output = _parse(arguments)
    figures: dict[str, list[Figure]] = {}
    machine = apart(describe_machine, options.device)
    for part in parts:
        print(f"{part}: {PARTS[part]}")
        shutil.rmtree(options.scratch, ignore_errors=True)
        options.scratch.mkdir(parents=True)
        figures[part] = []
        for figure in importlib.import_module(f"benchmarks.{part}").measure(options):
            figures[part].append(figure)
            print(row(figure), flush=True)
            # Written after each, so that a long benchmark which is stopped has told what it knows
            _write(output, machine, options, figures)
    shutil.rmtree(options.scratch)
    told = ", ".join(f"{value}" for value in machine.values())
    print(f"\n{told}\nmedian of {options.runs} where more than one; {output}")


def _parse(arguments: list[str] | None) -> tuple[Options, list[str], Path]:
    listing = "\n".join(f"  {name:14} {text}" for name, text in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"{__doc__}\nparts:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="what to measure (not given: all that suits the device)"
    )
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each figure, after one warm-up")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="of training_step, gpu and choices: configurations with TEXT in the name",
    )
    parser.add_argument(
        "--toy", action="store_true", help="tiny sizes: shows that it works, measures nothing"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("bench"), help="folder for results and scratch files"
    )
    given = parser.parse_args(arguments)
    parts = [part.replace("-", "_") for part in given.parts]
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"there is no part `{unknown[0]}`; there are {', '.join(PARTS)}")
    parts = parts or (list(_ON_CPU) if given.device == "cpu" else ["training_step", "gpu"])
    # torch sets limits and the current device by number only
    device = "cuda:0" if given.device == "cuda" else given.device
    options = Options(given.output / "scratch", given.runs, device, given.toy, given.only)
    return options, parts, given.output / "results.json"


def row(figure: Figure) -> str:
    """A line of the table."""
    seconds = f"{figure.seconds:9.3f} s" if figure.seconds is not None else " " * 11
    memory = f"{figure.peak_mb:8.0f} MB" if figure.peak_mb is not None else " " * 11
    return f"{figure.name:52} {seconds} {memory}  {figure.beside}".rstrip()


def _write(
    path: Path, machine: dict[str, object], options: Options, figures: dict[str, list[Figure]]
) -> None:
    document = {
        "machine": machine,
        "runs": options.runs,
        "toy": options.toy,
        "parts": {part: [asdict(figure) for figure in some] for part, some in figures.items()},
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
