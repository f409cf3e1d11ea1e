"""`hyimg check LORA`: what is in a LoRA file, who loads how much of it, and what would be left in an fp8 model."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from hyimg.config.commands import CheckConfig
from hyimg.errors import HyimgError
from hyimg.flow.renderer import check_contents
from hyimg.lora.consumers import CONSUMERS, Verdict
from hyimg.lora.contents import LoRAContents
from hyimg.lora.file_report import LoRAReport, report_file
from hyimg.lora.fp8_survival import Survival, survival
from hyimg.lora.updates import AnyUpdate, read_updates
from hyimg.memory.device import resolve_device
from hyimg.memory.fp8 import require_fp8_device
from hyimg.memory.fp8_report import layer_kind
from hyimg.model.loading import check_dit, read_dit_tensors
from hyimg.report import Reporter, count_text


def check(config: CheckConfig, report: Reporter) -> LoRAReport:
    """Prints which programs load a LoRA file, its ranks, alphas and norms; with `--fp8`, what merging would leave.

    Raises HyimgError for what is no LoRA of this model, or not of this `--dit`.
    """
    path, dit = config.check.lora, config.dit.dit
    assert path is not None
    if config.check.fp8 and dit is None:
        raise HyimgError("`--fp8` needs the base model", hint="give its file with `--dit`")
    contents = LoRAContents.open(path, allow_partial=True)
    if dit is not None:
        check_contents(contents, check_dit(dit))
    device = resolve_device(config.check.device)
    if config.check.fp8:
        require_fp8_device(device)
    updates = read_updates(contents)
    _warn(contents, updates, report)
    survivals: Mapping[str, Survival] = {}
    if config.check.fp8:
        assert dit is not None
        survivals = _survivals(dit, [update for update in updates if update.is_finite], device, report)
    found = report_file(contents, updates, survivals)
    if config.check.json:
        json.dump(found.as_json(), sys.stdout, indent=2)
        print()
    else:
        _print(found, path)
    return found


def _warn(contents: LoRAContents, updates: Sequence[AnyUpdate], report: Reporter) -> None:
    path = contents.path
    not_finite = [update.name for update in updates if not update.is_finite]
    if not_finite:
        report.warning(
            f"{count_text(len(not_finite), 'module')} of `{path}` have values that are no numbers: "
            + _names(not_finite)
        )
    if contents.unmapped:
        report.warning(
            f"{count_text(len(contents.unmapped), 'tensor')} of `{path}` stand on no module that a LoRA of this "
            f"model can, and count for nothing here: {_names(contents.unmapped)}"
        )


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


def _print(found: LoRAReport, path: Path) -> None:
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
    lines = [
        f"format: {', '.join(found.formats) or 'names of another tool'}",
        "adapters: " + _counts(found.adapters),
        "tensors: " + _counts(found.dtypes),
    ]
    if found.zero:
        lines.append(f"{count_text(len(found.zero), 'module')} change nothing (zeros): {_names(found.zero)}")
    for verdict in found.consumers:
        lines += _verdict_lines(verdict, found, path)
    lines += [f"{name}: {value}" for name, value in found.training.items()]
    if found.all.fp8 is not None:
        lines.append(
            f"{found.all.fp8.share:.1%} of the update would survive being merged into an fp8 model (squared cosine "
            "between what changes and what should); applied beside it, as `hyimg infer` does, all of it acts"
        )
    for line in lines:
        console.print(line, markup=False)


def _verdict_lines(verdict: Verdict, found: LoRAReport, path: Path) -> list[str]:
    """How much of the file a program applies and, under it, why not all and how to change that."""
    num_modules = len(verdict.applied) + len(verdict.dropped)
    lines = [f"{verdict.title}: applies {len(verdict.applied)} of {num_modules} modules"]
    if verdict.dropped:
        if verdict.applied:
            lines.append(f"  drops {', '.join(sorted({layer_kind(name) for name in verdict.dropped}))}")
        lines.append(f"  it {next(iter(verdict.dropped.values()))}")
    lines += [f"  {note}" for note in verdict.notes]
    if verdict.loads != "all":
        (format,) = (consumer.format for consumer in CONSUMERS if consumer.name == verdict.consumer)
        if found.formats != (format,):
            converted = path.with_name(f"{path.stem}-{format}.safetensors")
            command = shlex.join(["hyimg", "convert-comfy", str(path), str(converted), "--to", format])
            lines.append(f"  a file for it: {command}")
    return lines


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:3]) + (", ..." if len(names) > 3 else "")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _listed(values: Iterable[float]) -> str:
    listed = [f"{value:g}" for value in values]
    return ", ".join(listed) if len(listed) <= 3 else f"{listed[0]} to {listed[-1]}"
