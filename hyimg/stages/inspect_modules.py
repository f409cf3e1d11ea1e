"""`hyimg inspect-modules`: what a LoRA can train, under which names, with which rank and rate. No torch."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from hyimg.config.commands import InspectModulesConfig
from hyimg.errors import HyimgError
from hyimg.lora.inspection import Inspection, inspect
from hyimg.model.architecture import DIT_2_1, DIT_2_1_DISTILLED, DIT_TINY, DIT_TINY_FULL, DiTArch
from hyimg.model.header_check import read_dit_arch
from hyimg.report import Reporter, size_text

ARCHITECTURES = {"2.1": DIT_2_1, "2.1-distilled": DIT_2_1_DISTILLED, "tiny": DIT_TINY, "full": DIT_TINY_FULL}


def inspect_modules(config: InspectModulesConfig, report: Reporter) -> Inspection:
    """Prints the modules of a checkpoint (its header only) or of a known architecture; 2.1 where neither is given."""
    found = inspect(
        _architecture(config),
        dim=config.network.network_dim,
        alpha=config.network.network_alpha,
        learning_rate=config.rate.unet_lr if config.rate.unet_lr is not None else config.rate.learning_rate,
        network_args=config.network.network_args,
        pattern=config.inspection.pattern,
        strict=config.network.strict_patterns,
    )
    for warning in found.warnings:
        report.warning(warning)
    if config.dit.dit is None and config.inspection.arch is None:
        report.note("HunyuanImage-2.1, since neither `--dit` nor `--arch` was given")
    if not found.rows:
        report.warning(f"no module matches `{config.inspection.pattern}`")
    if config.inspection.json:
        _print_json(found)
    else:
        _print_table(found)
    return found


def _architecture(config: InspectModulesConfig) -> DiTArch:
    dit, arch = config.dit.dit, config.inspection.arch
    if dit is not None and arch is not None:
        raise HyimgError("`--dit` and `--arch` were both given", hint="one of them says what to list")
    return read_dit_arch(dit) if dit is not None else ARCHITECTURES[arch or "2.1"]


def _print_json(found: Inspection) -> None:
    modules = []
    for row in found.rows:
        entry = asdict(row)
        entry["in"], entry["out"] = entry.pop("in_features"), entry.pop("out_features")
        modules.append(entry)
    document = {
        "modules": modules,
        "totals": asdict(found.totals),
        "patterns": [asdict(p) for p in found.patterns],
        "warnings": list(found.warnings),
    }
    json.dump(document, sys.stdout, indent=2)
    print()


def _print_table(found: Inspection) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("module", no_wrap=True, overflow="fold")
    for heading in ("in", "out", "parameters", "rank", "alpha", "rate"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found.rows:
        rank = str(row.rank) if row.rank else "-"
        rate = f"{row.learning_rate:g}" if row.learning_rate is not None else "-"
        cells = (row.in_features, row.out_features, f"{row.parameters:,}", rank, f"{row.alpha:g}", rate)
        table.add_row(row.name, *map(str, cells))
    console.print(table)
    for pattern in found.patterns:
        console.print(
            f"{pattern.option} {pattern.pattern}={pattern.value:g}: {pattern.num_modules} modules",
            markup=False,
        )
    totals = found.totals
    console.print(
        f"{totals.adapted_modules} of {totals.modules} modules adapted, {totals.trainable_parameters:,} trainable "
        f"parameters, LoRA file {size_text(totals.file_bytes)} in float32, "
        f"AdamW state {size_text(totals.optimizer_bytes)}"
    )
    console.print("a pattern may also match a LoRA name, such as lora_unet_double_blocks_0_img_attn_qkv")
