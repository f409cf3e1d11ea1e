"""What lies on disk for a subset: its images, their captions, their masks.

Everything that is wrong is kept as a sentence, so that a user hears of all of it at once.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from hyimg.data.captions import caption_from_metadata, read_caption_file
from hyimg.data.dataset import Subset
from hyimg.data.images import IMAGE_SUFFIXES
from hyimg.errors import HyimgError

_MOST_LISTED = 10


class FoundImage(NamedTuple):
    """An image of a subset with its caption as written (lines joined by newlines) and its loss mask."""

    path: Path
    caption: str
    mask_path: Path | None = None


@dataclass
class Findings:
    """What was met on the way: `problems` stop the run, `notes` are told."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_images(subset: Subset, findings: Findings) -> list[FoundImage]:
    """The images of a subset, in order of their paths."""
    if subset.metadata_file is not None:
        captions = dict(sorted(_metadata_captions(subset, findings).items()))
    else:
        captions = _folder_captions(subset, findings)
    masks = _masks(subset, list(captions), findings)
    return [FoundImage(path, caption, masks.get(path)) for path, caption in captions.items()]


def _folder_captions(subset: Subset, findings: Findings) -> dict[Path, str]:
    folder = subset.source
    names = _names(folder)
    suffixes = {name: _suffix(name) for name in names}
    images = [name for name, suffix in suffixes.items() if suffix in IMAGE_SUFFIXES]
    if not images:
        findings.problems.append(f"there is no image in `{folder}`{_images_below(folder)}")
        return {}
    others = sorted(set(suffixes.values()) - IMAGE_SUFFIXES - _not_data(subset))
    if others:
        listed = ", ".join(f"`{suffix}`" for suffix in others)
        findings.notes.append(f"`{folder}` holds files that are not taken for images: {listed}")
    captions: dict[Path, str] = {}
    for name in sorted(images):
        try:
            captions[folder / name] = _caption(subset, name, names, findings)
        except HyimgError as error:
            findings.problems.append(error.message + (f" ({error.hint})" if error.hint else ""))
    return captions


def _caption(subset: Subset, image: str, names: set[str], findings: Findings) -> str:
    """The caption of the image file of that name; names, not paths, as there may be 100,000 of them."""
    folder, stem = subset.source, os.path.splitext(image)[0]
    found = [stem + ext for ext in subset.caption_extensions if stem + ext in names]
    if len(found) > 1:
        listed = " and ".join(f"`{name}`" for name in found)
        findings.notes.append(f"`{folder / image}` has two captions, {listed}; the first one counts")
    if found:
        return read_caption_file(os.path.join(folder, found[0]))
    if subset.class_tokens is not None:
        return subset.class_tokens
    wanted = " or ".join(f"`{stem}{ext}`" for ext in subset.caption_extensions)
    raise HyimgError(
        f"there is no caption for `{folder / image}`: no {wanted}, and the subset has no `class_tokens`"
    )


def _metadata_captions(subset: Subset, findings: Findings) -> dict[Path, str]:
    source = subset.source
    try:
        entries = _read_metadata(source)
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        findings.problems.append(f"cannot read `{source}`: {reason}")
        return {}
    if not entries:
        findings.problems.append(f"`{source}` names no image")
    captions: dict[Path, str] = {}
    for name, entry in entries.items():
        if subset.image_dir is None and not Path(name).is_absolute():
            findings.problems.append(f"`{source}`: `{name}` is relative, and the subset has no `image_dir`")
            continue
        path = (subset.image_dir or Path()) / name
        try:
            captions[path] = caption_from_metadata(entry, subset.caption)
        except ValueError as error:
            findings.problems.append(f"`{source}`: `{name}`: {error}")
        if not path.is_file():
            findings.problems.append(f"`{source}`: there is no image `{path}`")
            captions.pop(path, None)
    if subset.image_dir is not None and captions:
        unnamed = [name for name in _names(subset.image_dir) if _is_image(name)]
        left_out = sum(subset.image_dir / name not in captions for name in unnamed)
        if left_out:
            findings.notes.append(f"{left_out} images in `{subset.image_dir}` are not named in `{source}`")
    return captions


def _read_metadata(path: Path) -> dict[str, dict[str, object]]:
    """image name -> its entry, from `{name: {...}}` or from JSON lines with an `image_path` each."""
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        if not all(isinstance(line, dict) and isinstance(line.get("image_path"), str) for line in lines):
            raise ValueError("a line has no `image_path`")
        return {line["image_path"]: line for line in lines}
    entries = json.loads(text)
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError("it must map each image to a table with `caption` or `tags`")
    return entries


def _masks(subset: Subset, images: list[Path], findings: Findings) -> dict[Path, Path]:
    """image -> the mask of the same name, in any image format."""
    folder = subset.conditioning_data_dir
    if folder is None:
        return {}
    by_stem = {Path(name).stem: folder / name for name in sorted(_names(folder)) if _is_image(name)}
    for image in images:
        if image.stem not in by_stem:
            findings.problems.append(f"there is no mask for `{image}` in `{folder}`")
    return {image: by_stem[image.stem] for image in images if image.stem in by_stem}


def _names(folder: Path) -> set[str]:
    """The names of the files in a folder; hidden ones, which systems and editors leave, are none."""
    try:
        with os.scandir(folder) as found:
            return {entry.name for entry in found if not entry.name.startswith(".") and _is_file(entry)}
    except OSError as error:
        raise HyimgError(f"cannot read the folder `{folder}`: {error.strerror}") from error


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or a link that leads nowhere, which is an error by its name once it is read."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # links in a circle
        return True


def _suffix(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def _is_image(name: str) -> bool:
    return _suffix(name) in IMAGE_SUFFIXES


def _not_data(subset: Subset) -> set[str]:
    """Endings of files that are expected beside images."""
    return {Path("x" + ext).suffix for ext in subset.caption_extensions} | {
        ".txt",
        ".caption",
        ".json",
        ".npz",
    }


def _images_below(folder: Path) -> str:
    """A remark where the images are one folder too deep."""
    for child in sorted(path for path in folder.iterdir() if path.is_dir()):
        if any(_is_image(name) for name in _names(child)):
            return f" itself (subfolders such as `{child.name}` are not searched; name them in `image_dir`)"
    return ""
