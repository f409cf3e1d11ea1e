"""`hyimg tags`: how often each tag stands in a dataset's captions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from hyimg.data.dataset_file import load_dataset_file
from hyimg.data.files import find_images
from hyimg.data.findings import Findings
from hyimg.errors import HyimgError


def tags(
    dataset_config: Annotated[Path, typer.Argument(help="the dataset file, TOML or JSON")],
    most: Annotated[int, typer.Option(help="how many to list", min=1)] = 20,
    json_: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Count the tags of a dataset's captions, the most frequent first."""
    counts: Counter[str] = Counter()
    findings = Findings()
    for dataset in load_dataset_file(dataset_config).datasets:
        for subset in dataset.subsets:
            for image in find_images(subset, findings):
                for line in image.caption.split("\n"):
                    counts.update(
                        t.strip() for t in line.split(subset.caption.caption_separator) if t.strip()
                    )
    if findings.problems:
        raise HyimgError(findings.problems[0], hint="`hyimg dataset` lists everything that is wrong")
    listed = counts.most_common(most)
    if json_:
        typer.echo(json.dumps(dict(listed), ensure_ascii=False, indent=2))
        return
    for tag, count in listed:
        typer.echo(f"{count:7} {tag}")
