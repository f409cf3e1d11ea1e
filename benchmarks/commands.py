"""Whole commands as processes: help, conversion, warm caches, the start of a training run."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

from benchmarks.figures import HYIMG, Figure, Options, apart, command, median
from benchmarks.inputs import write_images, write_lora

_MODEL_FILES = {
    "dit": "hunyuanimage2.1.safetensors",
    "text_encoder": "qwen_2.5_vl_7b.safetensors",
    "byt5": "byt5_small_glyphxl_fp16.safetensors",
    "vae": "hunyuan_image_2.1_vae_fp16.safetensors",
}


def measure(options: Options) -> Iterator[Figure]:
    """Median time and largest resident set of each command."""
    runs = options.runs
    yield command("hyimg --help", ["--help"], runs, "goal 0.4 s")
    yield command("hyimg train --help", ["train", "--help"], runs, "goal 0.7 s")
    yield command("hyimg inspect-modules --json", ["inspect-modules", "--json"], runs, "goal 1 s")
    if not options.toy:
        yield from _conversion(options)
        yield from _warm_training(options)


def _conversion(options: Options) -> Iterator[Figure]:
    """A 400 MB LoRA to ComfyUI's names, beside `cp` and `sha256sum` of the same file."""
    source, copy = options.scratch / "lora.safetensors", options.scratch / "copy.safetensors"
    apart(write_lora, source)
    arguments = ["convert-comfy", str(source), str(options.scratch / "comfy.safetensors"), "--overwrite"]
    ours = command("convert-comfy, 400 MB", arguments, options.runs, "goal 150 MB")
    yield ours
    assert ours.seconds is not None

    def coreutils() -> None:
        subprocess.run(["cp", source, copy], check=True)
        subprocess.run(["sha256sum", source], check=True, stdout=subprocess.DEVNULL)

    if shutil.which("sha256sum"):
        beside = median(coreutils, options.runs)
        yield Figure(
            "cp and sha256sum of that file", beside, beside=f"ours {ours.seconds / beside:.2f} of it"
        )


def _warm_training(options: Options) -> Iterator[Figure]:
    """Process start to the end of one step on a tiny model, everything cached."""
    scratch = options.scratch
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
        yield command(f"{arguments[0]}, all cached", arguments, options.runs)
    train = ["train", "--dit", str(model["dit"]), *common]
    train += ["--output_dir", str(scratch / "run"), "--overwrite", "--max_train_steps", "1"]
    yield command("train, start to one step, all cached", train, options.runs)
