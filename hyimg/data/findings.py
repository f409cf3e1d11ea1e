"""What the dataset report, caching and training report about a dataset.

findings = Findings(dataset_file.path.parent)
findings.add("image_in_subfolder", path)                             # skipped or assumed: every command warns
findings.problem("cannot read the image", path, about=reason)        # stops the command
findings.items += sample_findings(samples, index, transformed=False)
for line in warning_lines(findings.items, findings.name): reporter.warning(line)
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hyimg.cache.entry_file import canonical_json
from hyimg.cache.hashing import hash_bytes
from hyimg.cache.index import Index
from hyimg.data.buckets import CROP_LIMIT
from hyimg.data.captions import is_damaged
from hyimg.data.images import traits_of
from hyimg.data.pixels import image_memory, load_mask
from hyimg.data.samples import Sample
from hyimg.errors import HyimgError, first_few, first_lines, printable, raise_system_limit
from hyimg.report import count_text

_MOST_CHARACTERS = 60
_MOST_LINES = 20


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something about captions or images that a user may want to know, with the files that it is about.

    `kind` is a key of `FINDING_KINDS`, `texts` are quotes or the names of other files, `count` is how much is cut or
    dropped: tokens, bytes, lines, or percent of an image (None for other kinds).
    """

    kind: str
    images: tuple[str, ...]
    texts: tuple[str, ...] = ()
    count: int | None = None


WARNED_KINDS = {
    "image_in_subfolder": "image in a subfolder, skipped (`recursive = true` takes subfolders)",
    "hidden_image": "hidden image, skipped",
    "image_without_entry": "image that the metadata file does not name, skipped",
    "entry_without_image": "entry of `metadata.jsonl` without an image in the subset, skipped",
    "caption_without_image": "caption file without an image",
    "caption_near_miss": "text file named almost like the caption of an image, skipped",
    "second_caption": "image with several captions; the first is used",
    "shared_caption": "images that differ only in format and share a caption",
    "caption_lines_dropped": "caption of several lines: the first is used (`multiline_caption = true` uses all)",
    "linked_caption": "caption that is a link out of the dataset's folder: used, but not written into the LoRA's "
    "metadata",
    "damaged_text": "caption with control or replacement characters, probably from a wrong encoding",
    "caption_emptied": "caption that `--caption_transform` leaves empty",
    "mask_without_image": "mask without an image",
    "second_mask": "image with several masks; the first is used",
    "linked_mask": "mask that is a link out of the dataset's folder",
    "blank_mask": "image that trains nothing: its mask is black, or it is transparent under `alpha_mask`",
    "mask_in_colors": "mask in colours, whose red channel is used",
    "mask_with_transparency": "mask with transparency, which is taken as white",
    "opaque_image": "image without transparency under `alpha_mask`, trained with full weight",
    "transparent_image": "image with transparency, composited on white (`alpha_mask = true` uses it as a mask)",
    "first_frame": "image of several frames or pages; the first is used",
    "unusable_profile": "image with an unusable colour profile, taken as sRGB",
    "cmyk_without_profile": "CMYK image without a colour profile, converted without one",
    "cropped": f"image that loses more than {CROP_LIMIT:.0%} to the crop",
    "duplicate_image": "same image more than once in a dataset",
    "other_file": "file that is neither an image nor a caption, skipped",
}
"""Kind -> heading, for what is skipped or assumed, which every command warns about."""

FINDING_KINDS = {
    **WARNED_KINDS,
    "empty_caption": "caption is empty",
    "tokens_cut": "caption over 1024 tokens, truncated",
    "quoted_text": "text in quotes, encoded by byT5",
    "quoted_text_cut": "text in quotes over byT5's limit of 127 bytes, truncated",
    "single_quoted_text": "text in single quotes, ignored by byT5",
    "special_token": "special token in a caption, encoded as such",
    "leading_newline": "caption that begins with a newline, which merges with the prompt template's",
    "duplicate_caption": "caption of several images",
}
"""Kind -> heading, for every kind, in the order of the report."""

_UNITS = {"tokens_cut": "token", "quoted_text_cut": "byte", "caption_lines_dropped": "line"}


class Findings:
    """Collected while reading a dataset: `problems` stop the command, `notes` and `items` are reported.

    Paths are shown relative to `folder`.
    """

    def __init__(self, folder: Path | None = None, notes: Iterable[str] = ()) -> None:
        self.notes = list(notes)
        self.items: list[Finding] = []
        self._folder = "" if folder is None else str(folder.absolute()) + os.sep
        self._problems: dict[tuple[str, str], list[tuple[str, str]]] = {}

    def name(self, path: Path | str) -> str:
        """The path as it is shown, in backticks."""
        return f"`{str(path).removeprefix(self._folder)}`"

    def add(self, kind: str, *paths: Path | str, texts: Iterable[str] = (), count: int | None = None) -> None:
        self.items.append(Finding(kind=kind, images=tuple(map(str, paths)), texts=tuple(texts), count=count))

    def problem(self, what: str, path: Path | str | None = None, why: str = "", *, about: str = "") -> None:
        """Adds a problem: the sentence `what` `path` `why`. Problems that differ only in `path` and `about` become one
        line."""
        files = self._problems.setdefault((what, why), [])
        if path is not None:
            files.append((self.name(path), about))

    @property
    def problems(self) -> list[str]:
        """A line for each kind of problem, with the first few paths."""
        return [_problem_line(what, why, files) for (what, why), files in self._problems.items()]

    @property
    def listing(self) -> list[str]:
        """The problems as lines, or the first of them if there are many."""
        return first_lines(self.problems, limit=_MOST_LINES)


def _problem_line(what: str, why: str, files: Sequence[tuple[str, str]]) -> str:
    line = what
    if len(files) == 1:
        ((name, about),) = files
        line += f" {name}" + (f": {about}" if about else "")
    elif files:
        line += f" {first_few([name + (f' ({about})' if about else '') for name, about in files])}"
    return line + why


def warning_lines(items: Iterable[Finding], name: Callable[[str], str]) -> list[str]:
    """One line for each of the `WARNED_KINDS` found; `name` formats a path."""
    found = by_kind(items)
    return [
        f"{heading} ({len(found[kind])}): {first_few([describe(one, name) for one in found[kind]])}"
        for kind, heading in WARNED_KINDS.items()
        if kind in found
    ]


def by_kind(items: Iterable[Finding]) -> dict[str, list[Finding]]:
    """kind -> its findings, the highest count first."""
    found: defaultdict[str, list[Finding]] = defaultdict(list)
    for item in items:
        found[item.kind].append(item)
    return {kind: sorted(own, key=lambda one: -(one.count or 0)) for kind, own in found.items()}


def describe(finding: Finding, name: Callable[[str], str]) -> str:
    """A finding in one line: its files, and what is quoted or truncated."""
    names = first_few([name(path) for path in finding.images])
    if finding.kind == "duplicate_caption":
        return f"`{_short(finding.texts[0])}`: {names}"
    texts = [f"`{_short(text)}`" for text in finding.texts]
    if finding.kind in WARNED_KINDS:
        listed = f" ({first_few(texts)})" if texts else ""
    else:
        listed = f": {' '.join(texts)}" if texts else ""
    return f"{names}{listed}" + (f" ({_cut(finding)})" if finding.count is not None else "")


def _cut(finding: Finding) -> str:
    assert finding.count is not None
    unit = _UNITS.get(finding.kind)
    return f"{finding.count}%" if unit is None else f"{count_text(finding.count, unit)} cut"


def _short(text: str) -> str:
    line = printable(text[:_MOST_CHARACTERS])
    return line if len(text) <= _MOST_CHARACTERS >= len(line) else line[: _MOST_CHARACTERS - 1] + "…"


# findings of samples ---------------------------------------------------------------------------------------

_MOST_THREADS = 8
_NOTHING: frozenset[str] = frozenset()
_KINDS_OF_IMAGES = {"frames": "first_frame", "profile": "unusable_profile", "cmyk": "cmyk_without_profile"}
_KINDS_OF_MASKS = {"colors": "mask_in_colors", "transparent": "mask_with_transparency"}


def sample_findings(samples: Sequence[Sample], index: Index, *, transformed: bool) -> Iterator[Finding]:
    """The findings of the `WARNED_KINDS` about samples; `transformed` if captions went through a transform.

    A file in several datasets is reported once, with the highest count. With a warm `index` no image is read.
    """
    counts: dict[tuple[str, str], int | None] = {}
    traits = _traits(samples, index)
    for sample in samples:
        for kind, count in (*_of_caption(sample, transformed), *_of_image(sample, traits)):
            key = (kind, str(sample.image_path))
            counts[key] = count if count is None else max(count, counts.get(key) or 0)
    for (kind, path), count in counts.items():
        yield Finding(kind=kind, images=(path,), count=count)
    yield from _duplicate_images(samples)


def _of_caption(sample: Sample, transformed: bool) -> Iterator[tuple[str, int | None]]:
    if dropped := sample.subset.caption.num_dropped_lines(sample.caption):
        yield "caption_lines_dropped", dropped
    if is_damaged(sample.caption):
        yield "damaged_text", None
    if transformed and not sample.caption and sample.subset.class_tokens != "":
        yield "caption_emptied", None


def _of_image(sample: Sample, traits: Mapping[str, frozenset[str]]) -> Iterator[tuple[str, int | None]]:
    if sample.is_cropped:
        yield "cropped", round(100 * sample.placement.cropped_share)
    image = traits.get(_image_key(sample), _NOTHING)
    for trait in sorted(image):
        if trait in _KINDS_OF_IMAGES:
            yield _KINDS_OF_IMAGES[trait], None
    if sample.subset.alpha_mask and "transparent" not in image:
        yield "opaque_image", None
    elif not sample.subset.alpha_mask and "transparent" in image:
        yield "transparent_image", None
    if _has_mask(sample):
        for trait in sorted(traits.get(_mask_key(sample), _NOTHING)):
            if trait in _KINDS_OF_MASKS:
                yield _KINDS_OF_MASKS[trait], None
        if "blank" in traits.get(_crop_key(sample), _NOTHING):
            yield "blank_mask", None


def duplicate_captions(samples: Sequence[Sample]) -> list[Finding]:
    """Captions of several images."""
    by_caption: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for sample in samples:
        if sample.caption:
            by_caption[sample.caption].setdefault(sample.image_hash, str(sample.image_path))
    return [
        Finding(kind="duplicate_caption", images=tuple(paths.values()), texts=(caption,))
        for caption, paths in by_caption.items()
        if len(paths) > 1
    ]


def _duplicate_images(samples: Sequence[Sample]) -> list[Finding]:
    """Images that one dataset contains more than once; in several datasets (of other resolutions) that is intended."""
    by_content: defaultdict[tuple[int, str], list[str]] = defaultdict(list)
    for sample in samples:
        by_content[sample.dataset_index, sample.image_hash].append(str(sample.image_path))
    # the same copies in a second dataset are reported once
    copies = dict.fromkeys(tuple(paths) for paths in by_content.values() if len(paths) > 1)
    return [Finding(kind="duplicate_image", images=paths) for paths in copies]


def _has_mask(sample: Sample) -> bool:
    return sample.subset.alpha_mask or sample.mask_path is not None


def _image_key(sample: Sample) -> str:
    return f"image {sample.image_hash}"


def _mask_key(sample: Sample) -> str:
    return f"mask {sample.mask_hash}"


def _crop_key(sample: Sample) -> str:
    """A hash of everything that determines a sample's cropped mask."""
    return f"crop {hash_bytes(canonical_json(vars(sample.recipe())).encode())}"


def _traits(samples: Sequence[Sample], index: Index) -> dict[str, frozenset[str]]:
    """key -> traits of images, masks, and cropped masks. Files that the index does not know are read and remembered.

    Unreadable files are skipped; caching reports them.
    """
    wanted: dict[str, Sample] = {}
    for sample in samples:
        wanted[_image_key(sample)] = sample
        if sample.mask_path is not None:
            wanted[_mask_key(sample)] = sample
        if _has_mask(sample):
            wanted[_crop_key(sample)] = sample
    known = index.traits(list(wanted))
    unknown = [key for key in wanted if key not in known]
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        read = zip(unknown, pool.map(lambda key: _read_traits(key, wanted[key]), unknown), strict=True)
        new = {key: traits for key, traits in read if traits is not None}
    index.remember_traits(new)
    return {**known, **new}


def _read_traits(key: str, sample: Sample) -> frozenset[str] | None:
    """The traits of a sample's image, mask or cropped mask ("blank" if it is zero everywhere); None if unreadable."""
    try:
        if key == _image_key(sample):
            with image_memory(sample.image_path):
                return traits_of(sample.image_path)
        if sample.mask_path is not None and key == _mask_key(sample):
            with image_memory(sample.mask_path):
                return traits_of(sample.mask_path, is_mask=True)
        mask_HW = load_mask(sample)
        return frozenset() if mask_HW is None or bool(mask_HW.any()) else frozenset({"blank"})
    except (HyimgError, OSError, ValueError) as error:
        raise_system_limit(error)
        return None
