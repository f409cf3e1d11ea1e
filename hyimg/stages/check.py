"""`hyimg check LORA`: what is in a LoRA file, and what would be left of it in an fp8 model."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from hyimg.config.commands import CheckConfig
from hyimg.errors import HyimgError
from hyimg.flow.renderer import check_loras
from hyimg.lora.contents import LoRAContents
from hyimg.lora.fp8_survival import Survival, survival, total
from hyimg.lora.updates import AnyUpdate, read_updates
from hyimg.memory.device import resolve_device
from hyimg.memory.fp8 import require_fp8_device
from hyimg.memory.fp8_report import layer_kind
from hyimg.model.loading import check_dit, read_dit_tensors
from hyimg.report import Reporter, count_text


@dataclass(frozen=True)
class KindReport:
    """The modules of one kind (`linear1`), or all of them; `fp8` where that was asked for."""

    kind: str
    num_modules: int
    ranks: Mapping[int, int]
    alphas: Mapping[float, int]
    norm: float
    fp8: Survival | None


@dataclass(frozen=True)
class LoRAReport:
    """What `check` found; `not_finite` are the modules with values that are no numbers."""

    formats: tuple[str, ...]
    kinds: tuple[KindReport, ...]
    all: KindReport
    not_finite: tuple[str, ...]


def check(config: CheckConfig, report: Reporter) -> LoRAReport:
    """Prints ranks, alphas and norms of a LoRA file by layer kind; with `--fp8`, what merging would leave.

    Raises HyimgError for what is no LoRA of this model, or not of this `--dit`.
    """
    path, dit = config.check.lora, config.dit.dit
    assert path is not None
    if config.check.fp8 and dit is None:
        raise HyimgError("`--fp8` needs the base model", hint="give its file with `--dit`")
    contents = LoRAContents.open(path)
    if dit is not None:
        check_loras([path], check_dit(dit))
    device = resolve_device(config.check.device)
    if config.check.fp8:
        require_fp8_device(device)
    updates = read_updates(path)
    not_finite = tuple(update.name for update in updates if not update.is_finite)
    if not_finite:
        report.warning(
            f"{count_text(len(not_finite), 'module')} of `{path}` have values that are no numbers: "
            + ", ".join(f"`{name}`" for name in not_finite[:3])
            + (", ..." if len(not_finite) > 3 else "")
        )
    finite = [update for update in updates if update.name not in not_finite]
    survivals: Mapping[str, Survival] = {}
    if config.check.fp8:
        assert dit is not None
        survivals = _survivals(dit, finite, device, report)
    by_kind = sorted(finite, key=lambda update: layer_kind(update.name))
    kinds = tuple(
        _report(kind, list(group), survivals)
        for kind, group in groupby(by_kind, key=lambda update: layer_kind(update.name))
    )
    found = LoRAReport(contents.formats, kinds, _report("all", finite, survivals), not_finite)
    if config.check.json:
        _print_json(found, path)
    else:
        _print_table(found)
    return found


def _survivals(
    dit: Path, updates: Sequence[AnyUpdate], device: torch.device, report: Reporter
) -> dict[str, Survival]:
    """By module, reading one base weight at a time."""
    survivals = {}
    with report.task("merging into fp8", len(updates), unit="module") as task:
        weights = read_dit_tensors(dit, [f"{update.name}.weight" for update in updates], device=device)
        for update, (_, weight_OI) in zip(updates, weights, strict=True):
            survivals[update.name] = survival(weight_OI, update)
            task.advance()
    return survivals


def _report(kind: str, updates: Sequence[AnyUpdate], survivals: Mapping[str, Survival]) -> KindReport:
    return KindReport(
        kind,
        len(updates),
        dict(sorted(Counter(update.rank for update in updates).items())),
        dict(sorted(Counter(update.alpha for update in updates).items())),
        sum(update.norm() ** 2 for update in updates) ** 0.5,
        total(survivals[update.name] for update in updates) if survivals else None,
    )


def _print_json(found: LoRAReport, path: Path) -> None:
    document = {
        "file": str(path),
        "formats": list(found.formats),
        "kinds": [_as_json(kind) for kind in found.kinds],
        "all": _as_json(found.all),
        "not_finite": list(found.not_finite),
    }
    json.dump(document, sys.stdout, indent=2)
    print()


def _as_json(kind: KindReport) -> dict[str, object]:
    entry: dict[str, object] = {
        "kind": kind.kind,
        "modules": kind.num_modules,
        "ranks": {str(rank): count for rank, count in kind.ranks.items()},
        "alphas": {f"{alpha:g}": count for alpha, count in kind.alphas.items()},
        "norm": kind.norm,
    }
    if kind.fp8 is not None:
        entry["fp8"] = {"survives": kind.fp8.share, "relative_error": kind.fp8.relative_error}
    return entry


def _print_table(found: LoRAReport) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    has_fp8 = found.all.fp8 is not None
    table = Table(box=None, pad_edge=False)
    table.add_column("layers", no_wrap=True)
    for heading in ("modules", "rank", "alpha", "norm", *(("survives fp8", "error") if has_fp8 else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind in (*found.kinds, found.all):
        cells = [str(kind.num_modules), _listed(kind.ranks), _listed(kind.alphas), f"{kind.norm:.4g}"]
        if kind.fp8 is not None:
            cells += [f"{kind.fp8.share:.1%}", f"{kind.fp8.relative_error:.0%}"]
        table.add_row(kind.kind, *cells)
    console.print(table)
    console.print(f"format: {', '.join(found.formats) or 'names of another tool'}")
    if found.all.fp8 is not None:
        console.print(
            f"{found.all.fp8.share:.1%} of the update would survive being merged into an fp8 model (squared cosine "
            "between what changes and what should); applied beside it, as `hyimg infer` does, all of it acts"
        )


def _listed(values: Iterable[float]) -> str:
    listed = [f"{value:g}" for value in values]
    return ", ".join(listed) if len(listed) <= 3 else f"{listed[0]} to {listed[-1]}"
