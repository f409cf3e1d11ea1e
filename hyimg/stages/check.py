"""`hyimg check LORA`: what is in a LoRA file, which programs load it, and what an fp8 model would keep of it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from hyimg.checkpoints.architecture import DiTArch
from hyimg.checkpoints.header_check import OpenedModel, open_dit
from hyimg.config.tools import CheckConfig
from hyimg.errors import HyimgError, first_few, shortened, shown
from hyimg.lora.files.compatibility import (
    Compatibility,
    LoRAReport,
    ModuleReport,
    Survival,
    report_file,
    report_module,
    survival,
)
from hyimg.lora.files.conversion import read_adapters
from hyimg.lora.files.foreign import what_is_unmapped
from hyimg.lora.files.stored import LoRAFile
from hyimg.memory.device import resolve_device
from hyimg.memory.fp8 import layer_kind, require_fp8_device
from hyimg.model.loading import read_dit_tensors
from hyimg.rendering.renderer import check_lora_file
from hyimg.report import Reporter, count_text, plain_console, say_json


def check(config: CheckConfig, report: Reporter) -> LoRAReport:
    """Prints which programs load a LoRA file, its ranks, alphas and norms; with `--fp8`, what merging into fp8 keeps.

    Raises HyimgError for a file that is not a LoRA of this model, or not of this `--dit`.
    """
    path, dit_path = config.check.lora, config.dit.dit
    if config.check.fp8 and dit_path is None:
        raise HyimgError("`--fp8` needs the base model", hint="give its file with `--dit`")
    file = LoRAFile.open(path, allow_partial=True)
    dit = open_dit(dit_path) if dit_path is not None else None
    if dit is not None:
        check_lora_file(file, dit.arch)
    device = resolve_device(config.check.device)
    if config.check.fp8:
        require_fp8_device(device)
    modules = [report_module(name, adapter) for name, adapter in read_adapters(file, report_only=True)]
    _warn(file, modules, report)
    survivals: Mapping[str, Survival] = {}
    if config.check.fp8:
        assert dit is not None
        survivals = _survivals(dit, file, [m.name for m in modules if m.norm is not None], device, report)
    found = report_file(file, modules, survivals)
    if config.check.json:
        say_json(found.as_json())
    else:
        _print(found, path)
    return found


def _warn(file: LoRAFile, modules: Sequence[ModuleReport], report: Reporter) -> None:
    path = file.path
    for warning in file.warnings():
        report.warning(warning)
    not_finite = [module.name for module in modules if module.norm is None]
    if not_finite:
        report.warning(
            f"NaN or infinite values in {count_text(len(not_finite), 'module')} of `{path}`: {_names(not_finite)}"
        )
    if file.unmapped:
        report.warning(
            f"{count_text(len(file.unmapped), 'tensor')} of `{path}` are not read and not counted here, "
            + what_is_unmapped(file.header.tensors, file.unmapped)
        )
    if by_column := file.column_doras():
        report.warning(
            f"{count_text(len(by_column), 'module')} of `{path}` are a DoRA by input columns (LyCORIS with "
            f"`wd_on_output=False`), which `infer`, `sample` and `train` refuse: {_names(by_column)}"
        )


def _survivals(
    dit: OpenedModel[DiTArch], file: LoRAFile, names: Sequence[str], device: torch.device, report: Reporter
) -> dict[str, Survival]:
    """By module, reading one base weight at a time."""
    survivals = {}
    with report.task("merging into fp8", len(names), unit="module") as task:
        adapters = ((name, a) for name, a in read_adapters(file, report_only=True) if name in names)
        weights = read_dit_tensors(dit, [f"{name}.weight" for name in names], device=device)
        for (name, adapter), (_, weight_OI) in zip(adapters, weights, strict=True):
            survivals[name] = survival(weight_OI, adapter)
            task.advance()
    return survivals


def _print(found: LoRAReport, path: Path) -> None:
    from rich.table import Table

    console = plain_console()
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
        lines.append(f"{count_text(len(found.zero), 'module')} have no effect (zeros): {_names(found.zero)}")
    for program in found.compatibility:
        lines += _compatibility_lines(program, found.formats, path)
    lines += [f"{name}: {shortened(value)}" for name, value in found.training.items()]
    if found.all.fp8 is not None:
        lines.append(
            f"{found.all.fp8.share:.1%} of the update would survive merging into an fp8 model (squared cosine between "
            "the actual and the intended change); `hyimg infer` applies it next to the weights, without loss"
        )
    for line in lines:
        console.print(shown(line))


def _compatibility_lines(found: Compatibility, formats: Sequence[str], path: Path) -> list[str]:
    """How much of the file a program applies and, if not all, why and what to do about it."""
    num_modules = len(found.applied) + len(found.dropped)
    lines = [f"{found.loader.title}: applies {len(found.applied)} of {num_modules} modules"]
    if found.dropped:
        if found.applied:
            lines.append(f"  drops {', '.join(sorted({layer_kind(name) for name in found.dropped}))}")
        lines.append(f"  it {next(iter(found.dropped.values()))}")
    lines += [f"  {note}" for note in found.notes]
    format = found.loader.format
    if found.loads != "all" and tuple(formats) != (format,):
        converted = path.with_name(f"{path.stem}-{format}.safetensors")
        command = shlex.join(["hyimg", "convert-comfy", str(path), str(converted), "--to", format])
        lines.append(f"  a file for it: {command}")
    return lines


def _names(names: Sequence[str]) -> str:
    return first_few([f"`{name}`" for name in names])


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _listed(values: Iterable[float]) -> str:
    listed = [f"{value:g}" for value in values]
    return ", ".join(listed) if len(listed) <= 3 else f"{listed[0]} to {listed[-1]}"
