"""Where `infer` puts its results: `--save_path` as a file, as numbered files, or as a folder that is filled up."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from hyimg.cache.atomic import FileIsThereError, require_file_name, require_writable_folder
from hyimg.config.rendering import InferOutput
from hyimg.errors import HyimgError

PNG, LATENT = ".png", ".safetensors"

SUFFIXES = {"images": (PNG,), "latent": (LATENT,), "latent_images": (LATENT, PNG)}
"""What each `--output_type` leaves."""

_OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
_NUMBERED = re.compile(r"(\d{4,})\.(?:png|safetensors)", re.IGNORECASE)

ResultFiles = dict[str, Path]
"""The files of one result by suffix."""


def result_files(output: InferOutput, count: int) -> list[ResultFiles]:
    """The files of each of `count` results; their folder is tried, so that a render is not lost at its end.

    A folder is filled up after the highest number in it; a file is replaced with `--overwrite` only. Raises
    HyimgError for a folder that cannot be written, and for files that are there.
    """
    save_path = output.save_path
    assert save_path is not None
    suffixes = SUFFIXES[output.output_type]
    if is_folder(save_path):
        require_writable_folder(save_path)
        first = 1 + max(_numbers(save_path), default=0)
        return [
            {suffix: save_path / f"{number:04}{suffix}" for suffix in suffixes}
            for number in range(first, first + count)
        ]
    if save_path.suffix.lower() in _OTHER_PICTURES:
        raise HyimgError(f"`--save_path` `{save_path}`: pictures are saved as PNG", hint="name a `.png` file")
    require_writable_folder(save_path.parent)
    endings = [""] if count == 1 else [f"-{number:04}" for number in range(1, count + 1)]
    results = [{suffix: _beside(save_path, end, suffix) for suffix in suffixes} for end in endings]
    for path in (path for files in results for path in files.values()):
        require_file_name(path)
    there = [path for files in results for path in files.values() if path.exists()]
    if there and not output.overwrite:
        raise HyimgError(f"`{there[0]}` exists", hint="name another `--save_path`, or give `--overwrite`")
    return results


def write_result(output: InferOutput, files: ResultFiles, suffix: str, write: Callable[..., None]) -> Path:
    """Writes one of the files of a result, by `write(path, replace=...)`, and gives its path.

    Where another run has taken the number in the folder meanwhile, `files` become those of the next one.
    """
    assert output.save_path is not None
    while True:
        try:
            write(files[suffix], replace=not is_folder(output.save_path))
        except FileIsThereError:
            files.update(result_files(output, 1)[0])
        else:
            return files[suffix]


def is_folder(save_path: Path) -> bool:
    """Whether `--save_path` is a folder: one that is there, or a name without the suffix of a picture or latent."""
    # os.path's, which takes a name that is too long for one that is not there
    return os.path.isdir(save_path) or save_path.suffix.lower() not in (PNG, LATENT, *_OTHER_PICTURES)


def _numbers(folder: Path) -> Iterator[int]:
    """The numbers of results that lie in a folder, of any kind."""
    if folder.is_dir():
        for path in folder.iterdir():
            if match := _NUMBERED.fullmatch(path.name):
                yield int(match[1])


def _beside(save_path: Path, end: str, suffix: str) -> Path:
    """`--save_path` with `end` before its suffix, which keeps the user's spelling where it is the one wanted."""
    own = save_path.suffix
    return save_path.with_name(save_path.stem + end + (own if own.lower() == suffix else suffix))
