"""The dataset report as text: tables that fit 80 columns, on a terminal or in a pipe."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hyimg.data.buckets import Size
from hyimg.data.report import FINDING_KINDS, DatasetReport, Finding, StoreState
from hyimg.report import size_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_MOST_LISTED = 5
_MOST_CHARACTERS = 60


def print_report(report: DatasetReport, console: Console) -> None:
    """Prints a report; lists are cut after a few lines (the JSON has them whole)."""
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
        if images.unreadable:
            counts.append(f"{len(images.unreadable)} left out")
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
        for kind, heading in FINDING_KINDS.items():
            found = [finding for finding in self.report.findings if finding.kind == kind]
            if found:
                self._line(f"{heading} ({len(found)})", style=None if kind == "quoted_text" else "yellow")
                self._some(self._finding(finding) for finding in found)

    def _notes(self) -> None:
        images = self.report.images
        if images.upscaled:
            self._heading("upscaled images")
            self._some(self._name(path) for path in images.upscaled)
        if images.unreadable:
            self._heading("images that cannot be read, and are left out")
            self._some(f"{self._name(image.path)}: {image.reason}" for image in images.unreadable)
        if self.report.notes:
            self._heading("notes")
            for note in self.report.notes:
                self._line(f"  {note}")

    # lines ----------------------------------------------------------------------------------------------

    def _finding(self, finding: Finding) -> str:
        names = ", ".join(self._name(path) for path in finding.images[:3])
        if (more := len(finding.images) - 3) > 0:
            names += f" and {more} more"
        if finding.kind == "duplicate_caption":
            return f"`{_short(finding.texts[0])}`: {names}"
        texts = "".join(f" `{_short(text)}`" for text in finding.texts)
        unit = "tokens" if finding.kind == "tokens_cut" else "bytes"
        cut = f" ({finding.count} {unit} cut)" if finding.count is not None else ""
        return f"{names}{':' * bool(texts)}{texts}{cut}"

    def _some(self, lines: Iterable[str]) -> None:
        every = list(lines)
        for line in every[:_MOST_LISTED]:
            self._line(f"  {line}")
        if (more := len(every) - _MOST_LISTED) > 0:
            self._line(f"  and {more} more (`--json` lists all)")

    def _name(self, path: str) -> str:
        """A path as seen from the dataset file's folder."""
        return path.removeprefix(self._folder)

    def _heading(self, text: str) -> None:
        self._line("")
        self._line(text, style="bold")

    def _line(self, text: str, style: str | None = None) -> None:
        # a long line is the terminal's to wrap, so that a path stays whole
        self.console.print(text, style=style, markup=False, soft_wrap=True)


def _store_cells(store: StoreState) -> Sequence[str]:
    made_by = "nobody yet" if store.identity is None else store.identity[:12]
    on_disk = size_text(store.bytes_cached) if store.cached else "-"
    to_write = "not known" if store.bytes_missing is None else size_text(store.bytes_missing)
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


def _short(text: str) -> str:
    line = text.replace("\n", "\\n")
    return line if len(line) <= _MOST_CHARACTERS else line[: _MOST_CHARACTERS - 1] + "…"
