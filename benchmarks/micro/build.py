"""`python -m benchmarks.micro build`: makes the four files of the micro model from nothing, and a manifest.

In order: text encoders, which are random; the VAE; the set's pictures, encoded; the DiT. What is done is kept, and a
build that was stopped or killed goes on there.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from benchmarks.micro.dit import DiTLoss, EncodedPictures, Fitting, StepLoss, encode_pictures, make_dit
from benchmarks.micro.recipe import Recipe
from benchmarks.micro.text_encoders import open_text_encoders, write_text_encoders
from benchmarks.micro.vae import VAELoss, make_vae
from hyimg import __version__
from hyimg.cache.atomic import atomic_write_bytes, atomic_write_text
from hyimg.cache.hashing import file_identity
from hyimg.checkpoints.model_files import ModelFolder
from hyimg.checkpoints.safetensors_file import read_header
from hyimg.errors import HyimgError
from hyimg.memory.precision import auto_precision
from hyimg.model.loading import load_vae
from hyimg.report import Reporter, size_text

CPU = torch.device("cpu")
RECIPE, MANIFEST = "recipe.json", "manifest.json"
WORK, PICTURES = "work", "pictures.safetensors"
"""Folder of states and encoded pictures, which may be removed when the manifest is there."""


def build(
    directory: Path, recipe: Recipe, report: Reporter, *, resume: bool = False, device: torch.device = CPU
) -> ModelFolder:
    """Makes the model in `directory`, and returns its files.

    Raises HyimgError where the folder holds something and `resume` is not asked for, and where what it holds was begun
    with another recipe; RunError for a loss that is not finite.
    """
    folder = ModelFolder(directory)
    _claim(directory, recipe, resume=resume)
    if (directory / MANIFEST).is_file():
        report.note(f"all is built in {directory}")
        return folder
    if not folder.tokenizer.is_file():  # which is written last
        write_text_encoders(folder, recipe.seed)
    if not folder.vae.is_file():
        _fit_vae(folder, recipe, report, device)
    if not folder.dit.is_file():
        _fit_dit(folder, recipe, report, device)
    _write_manifest(folder, recipe, device)
    for option, path in folder.files().items():
        report.note(f"--{option} {path} ({size_text(path.stat().st_size)})")
    return folder


def _claim(directory: Path, recipe: Recipe, *, resume: bool) -> None:
    """Makes the folder this recipe's; refuses one that is another's."""
    path, text = directory / RECIPE, json.dumps(asdict(recipe), indent=1) + "\n"
    if directory.is_dir() and any(directory.iterdir()):
        if not path.is_file():
            raise HyimgError(f"`{directory}` is not empty and no earlier build", hint="choose a new folder")
        if not resume:
            raise HyimgError(
                f"`{directory}` holds a build", hint="go on with `--resume`, or choose a new folder"
            )
        if path.read_text(encoding="utf-8") != text:
            raise HyimgError(
                f"`{directory}` was begun with another recipe, which stands in `{path.name}`",
                hint="give its options again, or choose a new folder",
            )
        return
    atomic_write_text(path, text, root=directory)


def _fit_vae(folder: ModelFolder, recipe: Recipe, report: Reporter, device: torch.device) -> None:
    vae = make_vae(recipe).to(device)
    _fitting(folder, "vae", vae, recipe, VAELoss(vae, recipe), report).run()
    _write(folder, folder.vae, vae, torch.float16)


def _fit_dit(folder: ModelFolder, recipe: Recipe, report: Reporter, device: torch.device) -> None:
    # the VAE as everyone will load it, rounded to its file's type
    vae = load_vae(folder.vae, device=device, dtype=torch.float32)
    path = folder.directory / WORK / PICTURES
    if not path.is_file():
        encode_pictures(vae, recipe.num_pictures, path, report, root=folder.directory)
    pictures = EncodedPictures.load(path)
    dit = make_dit(recipe.seed).to(device)
    loss = DiTLoss(dit, pictures, open_text_encoders(folder), recipe)
    _fitting(folder, "dit", dit, recipe, loss, report).run()
    _write(folder, folder.dit, dit, torch.bfloat16)


def _fitting(
    folder: ModelFolder, name: str, model: nn.Module, recipe: Recipe, loss: StepLoss, report: Reporter
) -> Fitting:
    return Fitting(
        name,
        model,
        getattr(recipe, name),
        loss,
        folder=folder.directory / WORK,
        log_path=folder.directory / f"{name}.jsonl",
        report=report,
    )


def _write(folder: ModelFolder, path: Path, model: nn.Module, dtype: torch.dtype) -> None:
    """The model in the real file's type."""
    state = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    atomic_write_bytes(path, save(state), root=folder.directory, verify=read_header)


def _write_manifest(folder: ModelFolder, recipe: Recipe, device: torch.device) -> None:
    """How the files were made; written last."""
    files = [*folder.files().values(), folder.tokenizer]
    manifest = {
        "command": "python -m benchmarks.micro build",
        "recipe": asdict(recipe),
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": file_identity(path)} for path in files},
        "hyimg": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "device": str(device),
        "precision": auto_precision(device),
        "threads": torch.get_num_threads(),
    }
    text = json.dumps(manifest, indent=1) + "\n"
    atomic_write_text(folder.directory / MANIFEST, text, root=folder.directory)
