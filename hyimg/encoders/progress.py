"""Encoding prompts under a user's eyes: progress in layers, since all prompts pass one layer before the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

from hyimg.encoders.text import EncodedText, TextEncoders
from hyimg.report import Reporter, Task


def encode_prompts(
    encoders: TextEncoders, prompts: Sequence[str], report: Reporter
) -> Iterator[tuple[str, EncodedText]]:
    """(prompt, its states) for each prompt, in the order of token length; a prompt that is cut is warned about."""
    with ExitStack() as stack:
        task: Task | None = None

        def on_layer(done: int, total: int) -> None:
            nonlocal task
            if task is None:
                title = f"encode {len(prompts)} prompt{'s' if len(prompts) > 1 else ''}"
                task = stack.enter_context(report.task(title, total, unit="layer"))
            task.advance()

        watched = replace(encoders, qwen=replace(encoders.qwen, on_layer=on_layer))
        for index, encoded in watched.encode_each(prompts):
            prompt = prompts[index]
            if encoded.num_cut:
                report.warning(
                    f"`{prompt[:60]}…` is too long: its last {encoded.num_cut} tokens are not seen"
                )
            if encoded.num_glyph_cut:
                report.warning(
                    f"`{prompt[:60]}…` quotes too much text: {encoded.num_glyph_cut} bytes are not drawn as letters"
                )
            yield prompt, encoded
