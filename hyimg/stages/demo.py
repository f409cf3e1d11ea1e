"""`hyimg demo`: a LoRA from pictures to ComfyUI with the real commands, one after another, on the micro model.

The micro model comes with the package and renders plain shapes; the demo teaches it a shape that it has never seen,
under a word that it has never read (`hyimg.demo.concept`). Every command runs in a process of its own and is printed
as it could be typed.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hyimg.cache.atomic import atomic_write_text
from hyimg.cache.own_files import is_link, make_folder, remove_leftovers, remove_tree
from hyimg.config.tools import DemoConfig
from hyimg.demo.concept import (
    HALF_WAY,
    NAME,
    NUM_EPOCHS,
    NUM_KNOWN,
    NUM_PICTURES,
    TRIGGER,
    DemoFolder,
    check_micro_model,
    copy_micro_model,
    write_concept,
    write_known,
)
from hyimg.distributed.launch import run_command
from hyimg.errors import HyimgError, RunError
from hyimg.report import Reporter, duration_text

DATASET = """\
[general]
caption_extension = ".txt"

[[datasets]]
resolution = 128
batch_size = 4
validation_split = 0.2

  # what is new
  [[datasets.subsets]]
  image_dir = "{images}"
  num_repeats = 3

  # what is to stay as it is
  [[datasets.subsets]]
  image_dir = "{known}"
  is_reg = true
"""
PROMPTS = f"""\
# a prompt a line, with its seed and no guidance; flags override the command line
a large red {TRIGGER} in the middle, yellow background --d 1 --l 1
a large white {TRIGGER} in the middle, blue background --d 2 --l 1
a large green triangle at the top, black background --d 3 --l 1
a large blue ring at the bottom, orange background --d 4 --l 1
"""
TRAINING = (
    "train --dit {dit} --dataset_config {dataset} --output_dir {run} --network_dim 8 --network_alpha 8"
    f" --network_dropout 0.1 --output_name {NAME} --learning_rate 1e-3 --lr_scheduler cosine"
    f" --max_train_epochs {NUM_EPOCHS}"
    f" --save_every_n_epochs {HALF_WAY} --validate_every_n_epochs {HALF_WAY // 2}"
)
COMMANDS = (
    "dataset {dataset} --vae {vae} --text_encoder {text_encoder} --byt5 {byt5} --contact_sheet {crops}",
    "cache-latents --dataset_config {dataset} --vae {vae}",
    "cache-text --dataset_config {dataset} --text_encoder {text_encoder} --byt5 {byt5} --sample_prompts {prompts}",
    TRAINING
    + " --seed 1 --vae {vae} --sample_prompts {prompts}"
    + f" --sample_every_n_epochs {HALF_WAY} --log_with tensorboard",
    "sample --dit {dit} --vae {vae} --cache_dir {cache} --sample_prompts {prompts} --lora_weight {half_way} {lora}"
    " --image_size 128 128 --output_dir {sample}",
    "infer --dit {dit} --text_encoder {text_encoder} --byt5 {byt5} --vae {vae} --lora_weight {lora}"
    " --lora_multiplier 1.0 --image_size 128 128 --guidance_scale 1 --seed 3 --prompt"
    f" 'a large orange {TRIGGER} in the middle, green background'"
    " --save_path {picture}",
    "convert-comfy {lora} {comfy_lora}",
    "check {comfy_lora} --dit {dit}",
)

# Threads of a parallel region wait for each other: measured in float32 with AVX2, two threads train the micro model no
# faster than one on idle cores (18 steps/s), and 30 times slower on cores that other programs use as well
_THREADS = "OMP_NUM_THREADS"


def demo(config: DemoConfig, report: Reporter) -> Path:
    """Runs the pipeline in the folder and returns the contact sheet's path.

    Raises HyimgError where the folder holds something else or the micro model is not installed, RunError where a
    command fails.
    """
    folder = DemoFolder(config.demo.directory)
    check_micro_model()
    _claim(folder, overwrite=config.demo.overwrite)
    started = time.monotonic()
    copy_micro_model(folder.model, root=folder.directory)
    _write_dataset(folder)
    report.note(f"# the micro model is in {folder.model.directory}: plain shapes, 128x128 (docs/micro.md)")
    report.note(
        f"# {NUM_PICTURES} pictures of a shape that it does not know are in {folder.images}; the word for it is "
        f"`{TRIGGER}`; {NUM_KNOWN} of shapes that it knows are in {folder.known}"
    )
    environment = _environment(report)
    for command in command_lines(folder):
        _run(command, environment, report)
    report.note("")
    report.note(f"done in {duration_text(time.monotonic() - started)}")
    report.note(f"LoRA: {folder.lora}, for ComfyUI {folder.comfy_lora}")
    report.note(f"picture: {folder.picture}")
    report.note(
        f"before and after (rows prompts; columns the base, the LoRA half way and at the end): {folder.sheet}"
    )
    return folder.sheet


def command_lines(folder: DemoFolder) -> list[list[str]]:
    """The arguments of each command in turn."""
    # split first, so that a folder's name may hold blanks
    return [[word.format_map(folder.places()) for word in shlex.split(line)] for line in COMMANDS]


def _claim(folder: DemoFolder, *, overwrite: bool) -> None:
    """Removes an earlier demo's files; any other folder that is not empty is left alone."""
    directory = folder.directory
    if directory.is_dir() and any(directory.iterdir()):
        if not folder.marker.is_file() or is_link(folder.marker):
            raise HyimgError(f"`{directory}` is not empty and no earlier demo", hint="choose a new folder")
        if not overwrite:
            raise HyimgError(
                f"`{directory}` holds an earlier demo", hint="give `--overwrite`, or a new folder"
            )
        for path in folder.contents():
            remove_tree(path, root=directory)
        remove_leftovers(directory, {path.name for path in folder.contents()}.__contains__, root=directory)
    text = "made by `hyimg demo`; `hyimg demo --overwrite` replaces what it made in this folder\n"
    atomic_write_text(folder.marker, text, root=directory)


def _write_dataset(folder: DemoFolder) -> None:
    for pictures, write in ((folder.images, write_concept), (folder.known, write_known)):
        make_folder(pictures, root=folder.directory)
        write(pictures)
    atomic_write_text(folder.dataset, dataset_text(folder), root=folder.directory)
    atomic_write_text(folder.prompts, PROMPTS, root=folder.directory)


def dataset_text(folder: DemoFolder) -> str:
    """The demo's dataset file."""
    return DATASET.format(
        **{name: getattr(folder, name).absolute().as_posix() for name in ("images", "known")}
    )


def _environment(report: Reporter) -> dict[str, str]:
    """The commands' environment: one thread for each, unless the user has set another number."""
    if _THREADS in os.environ:
        return dict(os.environ)
    report.note(f"# {_THREADS}=1 for each command: matrices this small gain nothing from more threads")
    return {**os.environ, _THREADS: "1"}


def _run(arguments: Sequence[str], environment: Mapping[str, str], report: Reporter) -> None:
    report.note("")
    report.note(f"$ hyimg {shlex.join(arguments)}")
    done = run_command(arguments, environment=environment)
    if done.returncode != 0:
        raise RunError(
            f"`hyimg {arguments[0]}` ended with exit code {done.returncode}", hint="its message stands above"
        )
