"""The dataset report as values and as text.

The names of the values are the keys of `hyimg dataset --json` (docs/dataset.md). Sizes are [width, height] in pixels,
paths absolute, byte counts those of files; datasets are numbered from 1 in the order of the dataset file. The text's
tables fit in 80 columns.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hyimg.data.buckets import CROP_LIMIT, Size
from hyimg.data.findings import FINDING_KINDS, WARNED_KINDS, Finding, by_kind, describe
from hyimg.errors import first_lines, shown
from hyimg.report import size_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


JSON_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SubsetRow:
    """A subset: its images for training (each `num_repeats` times per epoch) and for validation."""

    source: str
    images: int
    validation: int
    num_repeats: int
    is_reg: bool


@dataclass(frozen=True, kw_only=True)
class DatasetRow:
    """A dataset; `buckets` is `enable_bucket`."""

    dataset: int
    resolution: Size
    batch_size: int
    buckets: bool
    subsets: tuple[SubsetRow, ...]


@dataclass(frozen=True, kw_only=True)
class BucketRow:
    """A bucket of one dataset. `turns` are its images times their repeats, `cost` is that of one image
    relative to 2048x2048, `native` whether the size is one of the model's five."""

    dataset: int
    size: Size
    native: bool
    images: int
    validation: int
    turns: int
    batches: int
    upscaled: int
    cropped: int
    tokens: int
    cost: float


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """An image that `--on_bad_image skip` skips."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Images:
    """Counts, and the paths of images that cannot be read (skipped), are upscaled, or lose more than a fifth to the
    crop."""

    training: int
    validation: int
    regularisation: int
    unreadable: tuple[Unreadable, ...]
    upscaled: tuple[str, ...]
    cropped: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EpochCost:
    """`turns` are images times repeats; `cost` is their total, in images of 2048x2048."""

    turns: int
    batches: int
    steps: int
    gradient_accumulation_steps: int
    cost: float


@dataclass(frozen=True, kw_only=True)
class StoreState:
    """The dataset's entries in a cache made by one model.

    `identity` is the model's (None: there is no cache yet), `named` whether its files were given. `bytes_missing`
    is None if the size of the missing entries is unknown.
    """

    identity: str | None
    named: bool
    cached: int
    missing: int
    bytes_cached: int
    bytes_missing: int | None


@dataclass(frozen=True, kw_only=True)
class CacheState:
    """`entries` is the number that the dataset needs; `basis` says what `bytes_missing` is computed from."""

    folder: str
    entries: int
    basis: str
    stores: tuple[StoreState, ...]


@dataclass(frozen=True, kw_only=True)
class Captions:
    """`prompts` are the distinct texts that are encoded (variants of the captions, and the empty one).

    `tokenizer` is where the tokenizer was found; if there is none it is None, and `not_counted` says why. Tokens are
    those that the DiT gets.
    """

    distinct: int
    prompts: int
    tokenizer: str | None
    not_counted: str | None
    mean_tokens: float | None
    longest_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """`format` is 1; it is raised if a key changes its meaning or is removed. New keys may be added without that."""

    format: int
    dataset_config: str
    cache_dir: str
    images: Images
    epoch: EpochCost
    datasets: tuple[DatasetRow, ...]
    buckets: tuple[BucketRow, ...]
    latents: CacheState
    text: CacheState
    captions: Captions
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


_MOST_LISTED = 5


def print_report(report: DatasetReport, console: Console) -> None:
    """Prints a report; lists are cut after a few lines (the JSON has all of them)."""
    _Printer(report, console).print()


class _Printer:
    def __init__(self, report: DatasetReport, console: Console) -> None:
        self.report = report
        self.console = console
        self._folder = str(Path(report.dataset_config).absolute().parent) + os.sep
        self._several = len(report.datasets) > 1

    def print(self) -> None:
        self._totals()
        self._datasets()
        self._heading("buckets")
        self.console.print(self._buckets())
        self._line("cost: one image against one of 2048x2048, in operations of a training step")
        self._heading("caches")
        self.console.print(self._caches())
        for name, state in (("latents", self.report.latents), ("text", self.report.text)):
            if any(store.missing for store in state.stores):
                self._line(f"{name} to write: {state.basis}")
        self._captions()
        self._skipped()
        self._notes()

    # sections -------------------------------------------------------------------------------------------

    def _totals(self) -> None:
        images, epoch = self.report.images, self.report.epoch
        self._line(self.report.dataset_config, style="bold")
        counts = [f"{images.training} to train on"]
        if images.regularisation:
            counts.append(f"{images.regularisation} for regularisation")
        if images.validation:
            counts.append(f"{images.validation} for validation")
        if images.upscaled:
            counts.append(f"{len(images.upscaled)} upscaled")
        if images.cropped:
            counts.append(f"{len(images.cropped)} cropped by more than {CROP_LIMIT:.0%}")
        if images.unreadable:
            counts.append(f"{len(images.unreadable)} skipped")
        self._line(f"images: {', '.join(counts)}")
        per_step = epoch.gradient_accumulation_steps
        self._line(
            f"an epoch: {epoch.turns} images with repeats, {_count(epoch.batches, 'batch', 'batches')}, "
            f"{_count(epoch.steps, 'step')}"
            + (f" of {per_step} batches" if per_step > 1 else "")
            + f"; the compute of {epoch.cost:.4g} images of 2048x2048"
        )

    def _datasets(self) -> None:
        for row in self.report.datasets:
            self._heading(
                f"dataset {row.dataset}: {_size(row.resolution)}, batch size {row.batch_size}"
                + ("" if row.buckets else ", without buckets")
            )
            for subset in row.subsets:
                held_back = f", {subset.validation} for validation" if subset.validation else ""
                kind = ", regularisation" if subset.is_reg else ""
                self._line(
                    f"  {self._name(subset.source)}: {_count(subset.images, 'image')} x "
                    f"{subset.num_repeats}{held_back}{kind}"
                )

    def _buckets(self) -> Table:
        validation = any(row.validation for row in self.report.buckets)
        headings = ["size", "images", "valid.", "an epoch", "batches", "upscaled", "tokens", "cost"]
        shown = [heading for heading in headings if heading != "valid." or validation]
        table = _table(["dataset", *shown] if self._several else shown)
        for row in self.report.buckets:
            cells = [
                _size(row.size) + (" *" if row.native else ""),
                row.images,
                *([row.validation] if validation else []),
                row.turns,
                row.batches,
                row.upscaled or "-",
                row.tokens,
                f"{row.cost:.3f}",
            ]
            table.add_row(*map(str, [row.dataset, *cells] if self._several else cells))
        return table

    def _caches(self) -> Table:
        table = _table(["cache", "made by", "cached", "missing", "on disk", "to write"])
        for name, state in (("latents", self.report.latents), ("text", self.report.text)):
            for store in state.stores:
                table.add_row(name, *_store_cells(store))
        return table

    def _captions(self) -> None:
        captions = self.report.captions
        self._heading("captions")
        counted = f"not counted: {captions.not_counted}"
        if captions.longest_tokens is not None and captions.mean_tokens is not None:
            counted = f"{captions.mean_tokens:.0f} on average, {captions.longest_tokens} at most"
        prompts = _count(captions.prompts, "prompt")
        self._line(f"{captions.distinct} distinct, {prompts} to encode; tokens {counted}")
        self._findings(kind for kind in FINDING_KINDS if kind not in WARNED_KINDS)

    def _skipped(self) -> None:
        """The findings that every command warns about."""
        images = self.report.images
        if images.unreadable or any(finding.kind in WARNED_KINDS for finding in self.report.findings):
            self._heading("skipped or assumed")
        if images.unreadable:
            self._line(f"image that cannot be read, skipped ({len(images.unreadable)})", style="yellow")
            self._some(f"{self._name(image.path)}: {image.reason}" for image in images.unreadable)
        self._findings(WARNED_KINDS)

    def _findings(self, kinds: Iterable[str]) -> None:
        found = by_kind(self.report.findings)
        for kind in kinds:
            if kind in found:
                heading = f"{FINDING_KINDS[kind]} ({len(found[kind])})"
                self._line(heading, style=None if kind == "quoted_text" else "yellow")
                self._some(describe(finding, self._name) for finding in found[kind])

    def _notes(self) -> None:
        images = self.report.images
        if images.upscaled:
            self._heading("upscaled images")
            self._some(self._name(path) for path in images.upscaled)
        if self.report.notes:
            self._heading("notes")
            for note in self.report.notes:
                self._line(f"  {note}")

    # lines ----------------------------------------------------------------------------------------------

    def _some(self, lines: Iterable[str]) -> None:
        every = list(lines)
        *listed, last = first_lines(every, limit=_MOST_LISTED)
        for line in listed:
            self._line(f"  {line}")
        self._line(f"  {last}" + " (`--json` lists all)" * (len(every) > _MOST_LISTED + 1))

    def _name(self, path: str) -> str:
        """A path relative to the dataset file's folder."""
        return path.removeprefix(self._folder)

    def _heading(self, text: str) -> None:
        self._line("")
        self._line(text, style="bold")

    def _line(self, text: str, style: str | None = None) -> None:
        # the terminal wraps long lines, so that paths can be copied
        self.console.print(shown(text), style=style, soft_wrap=True)


def _store_cells(store: StoreState) -> Sequence[str]:
    made_by = "-" if store.identity is None else store.identity[:12]
    on_disk = size_text(store.bytes_cached) if store.cached else "-"
    to_write = "unknown" if store.bytes_missing is None else size_text(store.bytes_missing)
    return made_by, str(store.cached), str(store.missing), on_disk, to_write if store.missing else "-"


def _table(headings: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    words = ("dataset", "size", "cache", "made by")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in words else "right", no_wrap=True)
    return table


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _size(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
