"""`make bench`: what commands cost as whole processes, as a table and as `bench/results.json`.

Every figure is the median of several runs on the machine that the first lines name. Times are wall seconds,
memory the largest resident set of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from benchmarks import samples, text_encoder
from benchmarks.figures import HYIMG, Figure, apart, command, median
from benchmarks.inputs import write_images, write_lora


def main() -> None:
    """Measures, prints the table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each command, after one warm-up")
    parser.add_argument(
        "--output", type=Path, default=Path("bench"), help="folder for results and scratch files"
    )
    parser.add_argument(
        "--samples", action="store_true", help="only the start of `train` on up to 100,000 samples (minutes)"
    )
    parser.add_argument(
        "--text-encoder",
        action="store_true",
        help="only the text encoder layer by layer, beside the whole one (minutes)",
    )
    options = parser.parse_args()
    part = measure
    if options.samples:
        part = samples.measure
    elif options.text_encoder:
        part = text_encoder.measure
    scratch = options.output / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    figures = []
    for figure in part(scratch, options.runs):
        figures.append(figure)
        memory = f"{figure.peak_mb:8.0f} MB" if figure.peak_mb is not None else " " * 11
        print(f"{figure.name:44} {figure.seconds:8.3f} s {memory}  {figure.beside}", flush=True)
    machine = {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version()}
    document = {"machine": machine, "runs": options.runs, "figures": [asdict(f) for f in figures]}
    (options.output / "results.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(scratch)
    print(
        f"\n{machine['cpu']}, {machine['cores']} cores; median of {options.runs}; {options.output}/results.json"
    )


def measure(scratch: Path, runs: int) -> Iterator[Figure]:
    """Every figure, in order."""
    yield command("hyimg --help", ["--help"], runs, "goal 0.4 s")
    yield command("hyimg train --help", ["train", "--help"], runs, "goal 0.7 s")
    yield command("hyimg inspect-modules --json", ["inspect-modules", "--json"], runs, "goal 1 s")
    yield from _conversion(scratch, runs)
    yield from _warm_training(scratch, runs)


def _conversion(scratch: Path, runs: int) -> Iterator[Figure]:
    """A 400 MB LoRA to ComfyUI's names, beside `cp` and `sha256sum` of the same file."""
    source, copy = scratch / "lora.safetensors", scratch / "copy.safetensors"
    apart(write_lora, source)
    arguments = ["convert-comfy", str(source), str(scratch / "comfy.safetensors"), "--overwrite"]
    ours = command("convert-comfy, 400 MB", arguments, runs, "goal 150 MB")
    yield ours

    def coreutils() -> None:
        subprocess.run(["cp", source, copy], check=True)
        subprocess.run(["sha256sum", source], check=True, stdout=subprocess.DEVNULL)

    if shutil.which("sha256sum"):
        beside = median(coreutils, runs)
        yield Figure(
            "cp and sha256sum of that file", beside, beside=f"ours {ours.seconds / beside:.2f} of it"
        )


def _warm_training(scratch: Path, runs: int) -> Iterator[Figure]:
    """Process start to the end of one step on a tiny model, everything cached."""
    subprocess.run([*HYIMG, "make-tiny-model", scratch / "model"], check=True, stderr=subprocess.DEVNULL)
    images = scratch / "images"
    images.mkdir()
    apart(write_images, images)
    dataset = scratch / "dataset.toml"
    dataset.write_text(f"[[datasets]]\nresolution = 256\n[[datasets.subsets]]\nimage_dir = {str(images)!r}\n")
    model = {name: scratch / "model" / file for name, file in _MODEL_FILES.items()}
    common = ["--dataset_config", str(dataset)]
    fill = [
        ["cache-latents", *common, "--vae", str(model["vae"])],
        ["cache-text", *common, "--text_encoder", str(model["text_encoder"]), "--byt5", str(model["byt5"])],
    ]
    for arguments in fill:
        subprocess.run([*HYIMG, *arguments], check=True, stderr=subprocess.DEVNULL)
        yield command(f"{arguments[0]}, all cached", arguments, runs)
    train = [
        "train",
        "--dit",
        str(model["dit"]),
        *common,
        "--output_dir",
        str(scratch / "run"),
        "--overwrite",
    ]
    yield command("train, start to one step, all cached", [*train, "--max_train_steps", "1"], runs)


_MODEL_FILES = {
    "dit": "hunyuanimage2.1.safetensors",
    "text_encoder": "qwen_2.5_vl_7b.safetensors",
    "byt5": "byt5_small_glyphxl_fp16.safetensors",
    "vae": "hunyuan_image_2.1_vae_fp16.safetensors",
}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
