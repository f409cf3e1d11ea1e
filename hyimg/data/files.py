"""The files of a subset: images, captions and masks. Problems are collected in `Findings`, to be reported together.

Metadata files (`metadata_file`, and `metadata.jsonl` in a folder of images) have two forms: a JSON object
`{name: {"caption": ..., "tags": ...}}`, and JSON lines with the image's name under `file_name` (as in Hugging Face's
image folders) or `image_path`, and its caption under `text` or `caption`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hyimg.cache.own_files import is_link
from hyimg.config.documents import parse_json, read_bounded
from hyimg.data.captions import caption_from_metadata, caption_of_file
from hyimg.data.dataset_keys import DEFAULT_CAPTION_EXTENSIONS, Subset
from hyimg.data.findings import Findings
from hyimg.data.images import IMAGE_SUFFIXES
from hyimg.errors import HyimgError, SystemLimitError, first_few, raise_system_limit

FOLDER_METADATA = "metadata.jsonl"
"""The metadata file that is read if it is in a folder of images."""

METADATA_BYTES = 500_000_000
"""Size limit of a metadata file: a million captions of 500 bytes."""
_NAME_KEYS = ("file_name", "image_path")
_READ_KEYS = frozenset({*_NAME_KEYS, "caption", "text", "tags"})

MetadataEntry = Mapping[str, object]

_TEXT_SUFFIXES = (*DEFAULT_CAPTION_EXTENSIONS, ".text", ".cap")
_SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})


class FoundImage(NamedTuple):
    """An image of a subset with its caption (after `CaptionSettings.clean`) and its loss mask.

    `caption_is_private`: the caption's file is a link to outside of the subset's folder.
    """

    path: Path
    caption: str
    mask_path: Path | None = None
    caption_is_private: bool = False


_Caption = tuple[str, bool]
"""(text, is_private), the latter as in `FoundImage`."""


class _Names(NamedTuple):
    """Files in a folder and below it, relative to it. `linked` are links, and files in linked folders."""

    folder: Path
    names: list[str]
    linked: Collection[str]

    def target_outside(self, name: str) -> str | None:
        """The real path of a file if it is outside of the folder, else None."""
        if name not in self.linked:
            return None
        real = os.path.realpath(self.folder / name)
        return None if Path(real).is_relative_to(os.path.realpath(self.folder)) else real


def find_images(
    subset: Subset, findings: Findings, *, ignored: Collection[Path] = frozenset()
) -> list[FoundImage]:
    """The images of a subset, sorted by path.

    `ignored` are files and folders with another purpose (the dataset file, masks, other subsets).
    """
    skip = {str(path) for path in ignored}
    if subset.metadata_file is not None:
        captions = dict(sorted(_metadata_captions(subset, skip, findings).items()))
    else:
        captions = _folder_captions(subset, skip, findings)
    masks = _masks(subset, list(captions), findings)
    return [
        FoundImage(path, text, masks.get(path), is_private) for path, (text, is_private) in captions.items()
    ]


# captions of a folder ------------------------------------------------------------------------------------


def _folder_captions(subset: Subset, skip: Collection[str], findings: Findings) -> dict[Path, _Caption]:
    folder = subset.source
    found = _names(folder, skip, findings, recursive=subset.recursive)
    names = found.names
    below: list[str] = []
    if not subset.recursive:
        below = sorted(name for name in names if os.sep in name and _is_image(name))
        names = [name for name in names if os.sep not in name]
    images = sorted(name for name in names if _is_image(name))
    if not images:
        subfolders = [f"`{name}`" for name in dict.fromkeys(os.path.dirname(name) for name in below)]
        hint = f", but in its subfolders ({first_few(subfolders)}): set `recursive = true`, or name them in `image_dir`"
        findings.problem("there is no image in", folder, hint if subfolders else "")
        return {}
    for name in below:
        findings.add("image_in_subfolder", folder / name)
    entries = _folder_entries(subset, names, images, findings)
    files = _CaptionFiles.of(subset, names, images)
    captions = _captions_of(
        subset, images, files, entries, _private_files(found, files, entries, findings), findings
    )
    for stem, formats in _groups(images, _stem).items():
        if len(formats) > 1 and stem in files.by_stem:
            findings.add("shared_caption", *(folder / name for name in formats))
    for name in sorted(files.unused):
        near = files.near_images.get(name)
        kind = "caption_without_image" if near is None else "caption_near_miss"
        findings.add(kind, folder / name, texts=() if near is None else (near,))
    expected = {*images, *files.used, *files.unused, *files.seconds}
    for name in sorted(set(names) - expected):
        if os.path.basename(name).lower() not in _SYSTEM_FILES | {FOLDER_METADATA}:
            findings.add("other_file", folder / name)
    return captions


class _CaptionFiles(NamedTuple):
    """The text files of a folder: captions by the stem of their image (the first is used), and the rest.

    `near_images` are the images that files of a similar name or ending are probably meant for.
    """

    by_stem: Mapping[str, Sequence[str]]
    used: Collection[str]
    seconds: Collection[str]
    unused: Collection[str]
    near_images: Mapping[str, str]

    @staticmethod
    def of(subset: Subset, names: Sequence[str], images: Sequence[str]) -> _CaptionFiles:
        """Classifies the text files of a folder; an ending may be in upper case."""
        stems = {_stem(image) for image in images}
        ranked: defaultdict[str, list[tuple[int, bool, str]]] = defaultdict(list)
        texts: list[str] = []
        for name in names:
            for rank, ending in enumerate(subset.caption_extensions):
                if name[-len(ending) :].lower() == ending.lower():
                    if name[: -len(ending)] in stems:
                        # `a.txt` before `a.TXT` if the ending is `.txt`
                        ranked[name[: -len(ending)]].append((rank, not name.endswith(ending), name))
                    else:
                        texts.append(name)
                    break
            else:
                if _suffix(name) in _TEXT_SUFFIXES:
                    texts.append(name)
        by_stem = {stem: [name for *_, name in sorted(found)] for stem, found in ranked.items()}
        like = {_plain(_stem(image)): image for image in reversed(images)}
        near = {name: like[plain] for name in texts if (plain := _plain(_text_stem(subset, name))) in like}
        used = {found[0] for found in by_stem.values()}
        seconds = {name for found in by_stem.values() for name in found[1:]}
        return _CaptionFiles(by_stem, used, seconds, set(texts), near)


def _captions_of(
    subset: Subset,
    images: Iterable[str],
    files: _CaptionFiles,
    entries: Mapping[str, tuple[Path, MetadataEntry]],
    private: Collection[Path],
    findings: Findings,
) -> dict[Path, _Caption]:
    """Each image's caption: its own file's, else its entry in `metadata.jsonl`, else `class_tokens`."""
    folder = subset.source
    near_names = {image: name for name, image in files.near_images.items()}
    captions: dict[Path, _Caption] = {}
    for image in images:
        own, entry = files.by_stem.get(_stem(image), ()), entries.get(image)
        if len(own) + (entry is not None) > 1:
            several = [os.path.basename(name) for name in own] + [FOLDER_METADATA] * (entry is not None)
            findings.add("second_caption", folder / image, texts=several)
        if own:
            try:
                text = caption_of_file(os.path.join(folder, own[0]), subset.caption)
                captions[folder / image] = (text, folder / own[0] in private)
            except ValueError as error:
                findings.problem("cannot use the caption file", folder / own[0], f": it {error}")
        elif entry is not None:
            caption = entry_caption(subset, entry[0], folder / image, entry[1], findings)
            if caption is not None:
                captions[folder / image] = (caption, entry[0] in private)
        elif subset.class_tokens is not None:
            captions[folder / image] = (subset.class_tokens, False)
        else:
            endings = " or ".join(f"`{ending}`" for ending in subset.caption_extensions)
            near = near_names.get(image)
            about = "" if near is None else f"found `{os.path.basename(near)}`"
            findings.problem(
                "there is no caption for",
                folder / image,
                f"; a caption file has the image's name and the ending {endings}; `class_tokens` gives a caption "
                "to images without",
                about=about,
            )
    return captions


def _private_files(
    found: _Names, files: _CaptionFiles, entries: Mapping[str, tuple[Path, MetadataEntry]], findings: Findings
) -> set[Path]:
    """The caption files that are links to outside of the folder; each is a finding."""
    private: set[Path] = set()
    metadata = {os.path.relpath(source, found.folder) for source, _ in entries.values()}
    for name in sorted({*files.used, *metadata}.intersection(found.linked)):
        if (target := found.target_outside(name)) is not None:
            private.add(found.folder / name)
            findings.add("linked_caption", found.folder / name, texts=(target,))
    return private


def _folder_entries(
    subset: Subset, names: Iterable[str], images: Collection[str], findings: Findings
) -> dict[str, tuple[Path, MetadataEntry]]:
    """image -> (`metadata.jsonl`, its entry there); names in the file are relative to the file's folder."""
    folder, known = subset.source, set(images)
    entries: dict[str, tuple[Path, MetadataEntry]] = {}
    for name in sorted(name for name in names if os.path.basename(name) == FOLDER_METADATA):
        source = folder / name
        for image, entry in read_entries(source, findings).items():
            path = os.path.normpath(os.path.join(os.path.dirname(name), image))
            if path in known:
                entries[path] = source, entry
            else:
                findings.add("entry_without_image", source, texts=(image,))
    return entries


# captions of a metadata file ------------------------------------------------------------------------------


def _metadata_captions(subset: Subset, skip: Collection[str], findings: Findings) -> dict[Path, _Caption]:
    source, root = subset.source, subset.image_root
    captions: dict[Path, _Caption] = {}
    named: set[str] = set()
    for name, entry in read_entries(source, findings).items():
        path = root / name
        named.add(str(path))
        if not path.is_file():
            findings.problem("there is no image", path, f", which {findings.name(source)} names")
            continue
        caption = entry_caption(subset, source, path, entry, findings)
        if caption is not None:
            captions[path] = (caption, False)
    if subset.image_dir is not None and named:
        for name in sorted(_names(subset.image_dir, skip, findings).names):
            path = subset.image_dir / name
            if _is_image(name) and str(path) not in named:
                findings.add("image_without_entry", path)
    return captions


def read_entries(path: Path, findings: Findings) -> dict[str, MetadataEntry]:
    """image name -> its entry; problems and unused keys go to `findings`."""
    repeated: list[str] = []
    try:
        text = read_bounded(path, METADATA_BYTES).decode("utf-8-sig")
        entries = (_entries_of_lines if path.suffix.lower() == ".jsonl" else _entries_of_object)(
            text, repeated
        )
    except SystemLimitError:
        raise
    except HyimgError as error:
        findings.problem("cannot read", path, about=error.message)
        return {}
    except (OSError, ValueError) as error:
        raise_system_limit(error)
        findings.problem("cannot read", path, about=getattr(error, "strerror", None) or str(error))
        return {}
    if not entries:
        findings.problem("no image is named in", path)
    if repeated:
        findings.notes.append(
            f"{findings.name(path)}: names with several entries, of which the last is used: "
            f"{first_few([f'`{name}`' for name in dict.fromkeys(repeated)])}"
        )
    unread = sorted({str(key) for entry in entries.values() for key in entry} - _READ_KEYS)
    if unread:
        listed = first_few([f"`{key}`" for key in unread])
        findings.notes.append(f"{findings.name(path)}: unused keys: {listed}")
    return entries


def entry_caption(
    subset: Subset, source: Path, image: Path, entry: MetadataEntry, findings: Findings
) -> str | None:
    """The caption of an entry, or the subset's `class_tokens` if it has none; None for a problem (in `findings`)."""
    where = findings.name(source)
    try:
        caption = caption_from_metadata(entry, subset.caption)
    except ValueError as error:
        findings.problem("cannot use the caption of", image, f" in {where}: it {error}")
        return None
    if caption is None and subset.class_tokens is None:
        why = f" in {where}; `class_tokens` gives a caption to images without"
        findings.problem("there is no caption for", image, why)
    return subset.class_tokens if caption is None else caption


def _entries_of_object(text: str, repeated: list[str]) -> dict[str, MetadataEntry]:
    document = parse_json(text, "it", kind=None, repeated=repeated)
    if not isinstance(document, dict) or not all(isinstance(entry, dict) for entry in document.values()):
        raise ValueError("it must map each image to a table with `caption` or `tags`")
    # keys within an entry may be repeated too
    repeated[:] = [name for name in repeated if name in document]
    return document


def _entries_of_lines(text: str, repeated: list[str]) -> dict[str, MetadataEntry]:
    entries: dict[str, MetadataEntry] = {}
    # not `splitlines`: JSON strings may contain Unicode line separators
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        entry = parse_json(line, f"line {number}", kind=None)
        names = [entry.get(key) for key in _NAME_KEYS] if isinstance(entry, dict) else []
        name = next((name for name in names if isinstance(name, str)), None)
        if name is None:
            raise ValueError(f"line {number} has neither `file_name` nor `image_path`")
        if name in entries:
            repeated.append(name)
        entries[name] = entry
    return entries


# masks ----------------------------------------------------------------------------------------------------


def _masks(subset: Subset, images: Sequence[Path], findings: Findings) -> dict[Path, Path]:
    """image -> the mask of the same name (in the same subfolder), in any image format."""
    folder = subset.conditioning_data_dir
    if folder is None:
        return {}
    names = _names(folder, (), findings)
    masks = _groups(sorted(name for name in names.names if _is_image(name)), _stem)
    bare = _groups([str(image) for image in images], lambda path: Path(path).stem)
    found: dict[Path, Path] = {}
    used: set[str] = set()
    for image in images:
        stem = _stem(os.path.relpath(image, subset.image_root))
        # images of a metadata file may be anywhere, so a unique file name is enough
        if stem not in masks and not subset.recursive and len(bare[image.stem]) == 1:
            stem = image.stem
        if stem not in masks:
            findings.problem("there is no mask for", image, f" in {findings.name(folder)}")
            continue
        used.add(stem)
        found[image] = folder / masks[stem][0]
        if (target := names.target_outside(masks[stem][0])) is not None:
            findings.add("linked_mask", found[image], texts=(target,))
        if len(masks[stem]) > 1:
            findings.add("second_mask", image, texts=masks[stem])
    for stem in masks.keys() - used:
        for name in masks[stem]:
            findings.add("mask_without_image", folder / name)
    return found


# names ----------------------------------------------------------------------------------------------------


def _names(folder: Path, skip: Collection[str], findings: Findings, *, recursive: bool = True) -> _Names:
    """The files in a folder and below it.

    Hidden folders and paths in `skip` are skipped, hidden images are findings. Links to folders are followed, each
    folder once. Unless `recursive`, errors below the folder are ignored.
    """
    names: list[str] = []
    linked: set[str] = set()
    pending = [("", False)]
    seen: set[str] = set()
    while pending:
        prefix, by_link = pending.pop()
        where = os.path.join(folder, prefix)
        if (real := os.path.realpath(where)) in seen:
            continue
        seen.add(real)
        counts = recursive or not prefix
        try:
            with os.scandir(where) as found:
                entries = list(found)
        except OSError as error:
            raise_system_limit(error)
            if not counts:
                continue
            raise HyimgError(f"cannot read the folder `{where}`: {error.strerror}") from error
        for entry in entries:
            name = prefix + entry.name
            if skip and os.path.join(folder, name) in skip:
                continue
            if entry.name.startswith("."):
                # `._a.png` is what macOS keeps next to `a.png` on foreign disks
                if counts and _is_image(entry.name) and not entry.name.startswith("._"):
                    findings.add("hidden_image", entry.path)
            elif _is_file(entry):
                names.append(name)
                if by_link or entry.is_symlink():
                    linked.add(name)
            elif entry.is_dir():
                pending.append((name + os.sep, by_link or is_link(entry.path)))
    return _Names(folder, names, linked)


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or a link to nothing, which is reported by name once it is read."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # a circle of links
        return True


def _groups(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[key(name)].append(name)
    return groups


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _text_stem(subset: Subset, name: str) -> str:
    """The name of a text file without its ending and without an image's (`a.jpg.txt`)."""
    endings = [ending for ending in subset.caption_extensions if name.lower().endswith(ending.lower())]
    stem = name[: -len(endings[0])] if endings else _stem(name)
    return _stem(stem) if _is_image(stem) else stem


def _plain(stem: str) -> str:
    """A stem without the usual mistakes: case, and spaces around the name."""
    folder, name = os.path.split(stem)
    return os.path.join(folder, name.strip().casefold())


def _suffix(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 and os.sep not in name[dot:] else ""


def _is_image(name: str) -> bool:
    return _suffix(name) in IMAGE_SUFFIXES
