"""`hyimg demo`: the real commands, one after another, on a tiny model and photographs that ship in a wheel.

Every command runs in a process of its own and is printed as it could be typed. The tiny model's weights are
random, so the pictures show that the pipeline runs, not what the real model paints.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hyimg.cache.atomic import atomic_write_text
from hyimg.config.commands import DemoConfig
from hyimg.errors import HyimgError, RunError
from hyimg.report import Reporter, duration_text

# Photographs of scikit-image's wheel (its README gives their licences), and what is to be seen
PHOTOGRAPHS = {
    "astronaut.png": "a portrait of an astronaut in an orange suit, a flag and a model rocket behind her",
    "chelsea.png": "a close portrait of a tabby cat looking to the side",
    "coffee.png": "a cup of espresso with a spoon on a wooden table",
    "rocket.jpg": "a white rocket on its launch pad at night, lit from below",
    "hubble_deep_field.jpg": "hundreds of galaxies on a black sky",
    "page.png": 'a scanned page of a book with the heading "Region-based segmentation"',
    "text.png": 'handwritten mathematics on lined paper, with the letters "s" and "t"',
    "motorcycle_left.png": "a red motorcycle parked in a workshop",
}
DATASET = """\
[general]
caption_extension = ".txt"
enable_bucket = true
min_bucket_reso = 128
max_bucket_reso = 384
bucket_reso_steps = 32

[[datasets]]
resolution = 256
batch_size = 2

  [[datasets.subsets]]
  image_dir = "{images}"
  num_repeats = 2
"""
PROMPTS = """\
# a prompt a line; flags override the command line
a portrait of an astronaut in an orange suit --d 1
a shop sign that says "OPEN" --d 2 --w 320 --h 256
"""
COMMANDS = (
    "make-tiny-model {model}",
    "dataset {dataset} --vae {vae} --text_encoder {text_encoder} --byt5 {byt5} --contact_sheet {crops}",
    "cache-latents --dataset_config {dataset} --vae {vae}",
    "cache-text --dataset_config {dataset} --text_encoder {text_encoder} --byt5 {byt5} --sample_prompts {prompts}",
    "train --dit {dit} --dataset_config {dataset} --output_dir {run} --output_name demo --network_dim 8"
    " --network_alpha 8 --learning_rate 1e-3 --max_train_epochs 4 --save_every_n_epochs 2"
    " --gradient_checkpointing --log_with tensorboard --seed 1",
    "sample --dit {dit} --vae {vae} --cache_dir {cache} --sample_prompts {prompts} --lora_weight {epoch_2} {lora}"
    " --image_size 256 256 --infer_steps 12 --output_dir {sample}",
    "infer --dit {dit} --text_encoder {text_encoder} --byt5 {byt5} --vae {vae} --lora_weight {lora}"
    " --lora_multiplier 1.0 --image_size 256 256 --infer_steps 12 --seed 3 --prompt 'a portrait of an astronaut'"
    " --save_path {picture}",
    "convert-comfy {lora} {comfy}",
    "inspect-modules --dit {dit} --network_alpha 4 --network_args network_reg_dims=img_attn_qkv=16,single_blocks=4",
)
_MARKER = "hyimg-demo.txt"


def demo(config: DemoConfig, report: Reporter) -> Path:
    """Runs the pipeline in the folder and returns the contact sheet's path.

    Raises HyimgError where the folder holds something else or the photographs are not installed, RunError
    where a command fails.
    """
    directory = config.demo.directory
    assert directory is not None
    photographs = _photographs()
    _claim(directory, overwrite=config.demo.overwrite)
    started = time.monotonic()
    _write_dataset(directory, photographs)
    report.note(f"# {len(PHOTOGRAPHS)} photographs and captions in {directory / 'images'}")
    for command in _commands(directory):
        _run(command, report)
    sheet = directory / "sample" / "sheet.png"
    report.note(f"\ndone in {duration_text(time.monotonic() - started)}")
    report.note(f"contact sheet (rows prompts, columns base and LoRA): {sheet}")
    report.note(f"picture: {directory / 'render' / 'astronaut.png'}")
    report.note(
        f"LoRA: {directory / 'run' / 'demo.safetensors'}, for ComfyUI {directory / 'demo-comfy.safetensors'}"
    )
    return sheet


def _photographs() -> Path:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise HyimgError("the demo's photographs come from scikit-image", hint="pip install 'hyimg[demo]'")
    folder = Path(spec.origin).parent / "data"
    missing = [name for name in PHOTOGRAPHS if not (folder / name).is_file()]
    if missing:
        raise HyimgError(
            f"this scikit-image has no `{missing[0]}`", hint="pip install --upgrade scikit-image"
        )
    return folder


def _claim(directory: Path, *, overwrite: bool) -> None:
    """Empties the folder of an earlier demo; any other folder that is not empty is left alone."""
    if directory.is_dir() and any(directory.iterdir()):
        if not (directory / _MARKER).is_file():
            raise HyimgError(f"`{directory}` is not empty and no earlier demo", hint="choose a new folder")
        if not overwrite:
            raise HyimgError(
                f"`{directory}` holds an earlier demo", hint="give `--overwrite`, or a new folder"
            )
        shutil.rmtree(directory)
    atomic_write_text(
        directory / _MARKER, "made by `hyimg demo`; `hyimg demo --overwrite` replaces this folder\n"
    )


def _write_dataset(directory: Path, photographs: Path) -> None:
    images = directory / "images"
    images.mkdir()
    for name, caption in PHOTOGRAPHS.items():
        shutil.copyfile(photographs / name, images / name)
        atomic_write_text(images / f"{Path(name).stem}.txt", caption + "\n")
    atomic_write_text(directory / "dataset.toml", DATASET.format(images=images.absolute().as_posix()))
    atomic_write_text(directory / "prompts.txt", PROMPTS)


def _commands(directory: Path) -> list[list[str]]:
    model = directory / "model"
    places = {
        "model": model,
        "dit": model / "hunyuanimage2.1.safetensors",
        "text_encoder": model / "qwen_2.5_vl_7b.safetensors",
        "byt5": model / "byt5_small_glyphxl_fp16.safetensors",
        "vae": model / "hunyuan_image_2.1_vae_fp16.safetensors",
        "dataset": directory / "dataset.toml",
        "cache": directory / "hyimg-cache",
        "crops": directory / "dataset.png",
        "prompts": directory / "prompts.txt",
        "run": directory / "run",
        "epoch_2": directory / "run" / "demo-000002.safetensors",
        "lora": directory / "run" / "demo.safetensors",
        "sample": directory / "sample",
        "picture": directory / "render" / "astronaut.png",
        "comfy": directory / "demo-comfy.safetensors",
    }
    # split first, so that a folder's name may hold blanks
    return [[word.format_map(places) for word in shlex.split(line)] for line in COMMANDS]


def _run(arguments: Sequence[str], report: Reporter) -> None:
    report.note(f"\n$ hyimg {shlex.join(arguments)}")
    done = subprocess.run([sys.executable, "-m", "hyimg", *arguments], check=False)
    if done.returncode != 0:
        raise RunError(
            f"`hyimg {arguments[0]}` ended with exit code {done.returncode}", hint="its message stands above"
        )
