"""The rows of `inspect-modules` as blocks, those that are alike and follow each other told once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from hyimg.lora.inspection import ModuleRow


@dataclass(frozen=True)
class BlockRange:
    """Blocks `first` to `last` of a stack, of which each has `rows`, given as those of the first."""

    stack: str
    first: int
    last: int
    rows: tuple[ModuleRow, ...]

    @property
    def count(self) -> int:
        return self.last - self.first + 1

    @property
    def title(self) -> str:
        """What the names of all its rows begin with, in their spelling: `double_blocks.0..19`."""
        head, _ = _split(self.rows[0].names[0])
        return re.sub(r"\d+$", self._numbers, head)

    @property
    def _numbers(self) -> str:
        return f"{self.first}..{self.last}" if self.count > 1 else str(self.first)


def block_ranges(rows: Iterable[ModuleRow]) -> list[BlockRange]:
    """The blocks of `rows` (in model order); a range ends where a block has other modules, ranks, alphas or rates."""
    ranges: list[BlockRange] = []
    for (stack, number), group in groupby(rows, key=lambda row: row.block):
        block = tuple(group)
        last = ranges[-1] if ranges else None
        if (
            last is not None
            and (last.stack, last.last) == (stack, number - 1)
            and _content(last.rows) == _content(block)
        ):
            ranges[-1] = replace(last, last=number)
        else:
            ranges.append(BlockRange(stack, number, number, block))
    return ranges


def ends(row: ModuleRow) -> tuple[str, ...]:
    """The row's names without the block: `img_attn_qkv`, or `attn.to_q`, `attn.to_k`, `attn.to_v`."""
    return tuple(_split(name)[1] for name in row.names)


def _content(rows: Sequence[ModuleRow]) -> list[ModuleRow]:
    """The rows with nothing left in them that tells the block."""
    return [replace(row, name=row.name.split(".", 2)[2], lora_name="", names=()) for row in rows]


def _split(name: str) -> tuple[str, str]:
    """A module's name, cut after the number of its block."""
    match = re.match(r"(.*?blocks[._]\d+)[._](.*)", name)
    assert match is not None, name
    return match[1], match[2]


def leaves(block: BlockRange) -> Iterator[tuple[str, ModuleRow, str]]:
    """(branch, row, name's end) for each line below the block's own; a split module has a line a part."""
    lines = [(row, end) for row in block.rows for end in ends(row)]
    for number, (row, end) in enumerate(lines):
        yield ("└── " if number == len(lines) - 1 else "├── "), row, end
