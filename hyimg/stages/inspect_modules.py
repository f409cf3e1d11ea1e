"""`hyimg inspect-modules`: what a LoRA can train, under which names, with which rank and rate. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from hyimg.checkpoints.architecture import DIT_2_1, DIT_2_1_DISTILLED, DIT_TINY, DIT_TINY_FULL, DiTArch
from hyimg.checkpoints.header_check import open_dit
from hyimg.config.commands import InspectModulesConfig
from hyimg.config.option import warn_of_idle
from hyimg.errors import HyimgError, shortened
from hyimg.lora.inspection import Inspection, ModuleRow, block_ranges, inspect, leaves
from hyimg.report import Reporter, count_text, plain_console, say_json, size_text

if TYPE_CHECKING:
    from rich.table import Table

ARCHITECTURES = {"2.1": DIT_2_1, "2.1-distilled": DIT_2_1_DISTILLED, "tiny": DIT_TINY, "full": DIT_TINY_FULL}


def inspect_modules(config: InspectModulesConfig, report: Reporter) -> Inspection:
    """Prints the modules of a checkpoint (its header only) or of a known architecture; 2.1 where neither is given."""
    if config.inspection.tree and config.inspection.json:
        raise HyimgError(
            "`--tree` and `--json` were both given", hint="JSON lists every module: leave one out"
        )
    found = inspect(
        _architecture(config),
        dim=config.network.network_dim,
        alpha=config.network.network_alpha,
        learning_rate=config.rate.unet_lr if config.rate.unet_lr is not None else config.rate.learning_rate,
        network_args=config.network.network_args,
        pattern=config.inspection.pattern,
        strict=config.network.strict_patterns,
        names=config.inspection.names,
        optimizer=config.forecast.optimizer_type,
        save_precision=config.forecast.save_precision,
    )
    for warning in found.warnings:
        report.warning(warning)
    warn_of_idle(config, report, has_patterns=bool(found.patterns))
    if config.dit.dit is None and config.inspection.arch is None:
        report.note("HunyuanImage-2.1, since neither `--dit` nor `--arch` was given")
    if not found.rows:
        report.warning(f"no module matches `{config.inspection.pattern}`")
    if config.inspection.json:
        _print_json(found, config)
    else:
        _print_table(found, config)
    return found


def _architecture(config: InspectModulesConfig) -> DiTArch:
    dit, arch = config.dit.dit, config.inspection.arch
    if dit is not None and arch is not None:
        raise HyimgError("`--dit` and `--arch` were both given", hint="one of them says what to list")
    return open_dit(dit).arch if dit is not None else ARCHITECTURES[arch or "2.1"]


def _print_json(found: Inspection, config: InspectModulesConfig) -> None:
    modules = []
    for row in found.rows:
        entry = asdict(row)
        entry["in"], entry["out"] = entry.pop("in_features"), entry.pop("out_features")
        if config.inspection.names is None:
            del entry["names"]
        modules.append(entry)
    forecast = asdict(config.forecast)
    document = {
        "modules": modules,
        "totals": asdict(found.totals) | forecast,
        "patterns": [asdict(p) for p in found.patterns],
        "warnings": list(found.warnings),
    }
    say_json(document)


def _print_table(found: Inspection, config: InspectModulesConfig) -> None:
    console = plain_console()
    if not console.is_terminal:
        console.width = 200  # for a program that reads lines: no name is broken
    rows = _tree_rows(found.rows) if config.inspection.tree else _plain_rows(found.rows)
    console.print(_table(rows))
    for pattern in found.patterns:
        console.print(
            f"{pattern.option} {shortened(pattern.pattern)}={pattern.value:g}: "
            f"{count_text(pattern.num_modules, 'module')}"
        )
    totals, forecast = found.totals, config.forecast
    memory = "not known" if totals.optimizer_bytes is None else size_text(totals.optimizer_bytes)
    console.print(
        f"{totals.adapted_modules} of {totals.modules} modules adapted, "
        f"{totals.trainable_parameters:,} trainable parameters"
    )
    console.print(
        f"LoRA file {size_text(totals.file_bytes)} in {forecast.save_precision}, "
        f"{shortened(forecast.optimizer_type)} state {memory}"
    )
    console.print("a pattern may match a LoRA name too: lora_unet_double_blocks_0_img_attn_qkv")


def _table(rows: Iterable[tuple[str, ...]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    # the one column that a narrow terminal breaks
    table.add_column("module", overflow="fold")
    for heading in ("in", "out", "parameters", "rank", "alpha", "rate"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, *cells in rows:
        table.add_row(Text(name), *cells)
    return table


def _plain_rows(rows: Iterable[ModuleRow]) -> Iterator[tuple[str, ...]]:
    """A line for each name; the other columns are filled once per module."""
    for row in rows:
        first, *others = row.names
        yield first, *_cells(row)
        yield from ((name,) for name in others)


def _tree_rows(rows: Iterable[ModuleRow]) -> Iterator[tuple[str, ...]]:
    """Equal blocks under one title, with their total number of parameters."""
    for block in block_ranges(rows):
        parameters = block.count * sum(row.parameters for row in block.rows)
        count = f"  x{block.count}" if block.count > 1 else ""
        yield block.title + count, "", "", f"{parameters:,}"
        shown = None
        for branch, row, end in leaves(block):
            yield branch + end, *(_cells(row) if row is not shown else ())
            shown = row


def _cells(row: ModuleRow) -> tuple[str, ...]:
    rank = str(row.rank) if row.rank else "-"
    alpha = f"{row.alpha:g}" if row.rank else "-"
    rate = f"{row.learning_rate:g}" if row.rank and row.learning_rate is not None else "-"
    return str(row.in_features), str(row.out_features), f"{row.parameters:,}", rank, alpha, rate
