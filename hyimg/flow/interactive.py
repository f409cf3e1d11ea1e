"""`infer --interactive`: a prompt line at a time, answered by models that stay loaded."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from hyimg.config.commands import InferConfig
from hyimg.encoders.text import TextEncoders
from hyimg.flow.latents import Rendered, write_latent
from hyimg.flow.pictures import decode_image, save_png
from hyimg.flow.plan import RenderPlan, encode_states, encoder_changes, load_decoder
from hyimg.flow.prompts import parse_prompt_line
from hyimg.flow.renderer import PromptStates, prompts_to_encode
from hyimg.flow.result_files import LATENT, PNG, result_files, write_result
from hyimg.memory.out_of_memory import Changes, explained, vae_changes
from hyimg.report import OnceReporter, Reporter


def prompt_lines() -> Iterator[str]:
    """Lines of stdin up to an empty one or its end; a terminal is asked for each, with editing and history."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):  # not on Windows, whose console edits lines itself
            import readline  # noqa: F401
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input("prompt> " if is_terminal else "")
        except EOFError:
            if is_terminal:
                print()  # what follows begins on a line of its own
            return
        if not line.strip():
            return
        yield line


class Session:
    """The models of a session. The DiT and the VAE stay on the device, the states of each prompt on the CPU."""

    def __init__(
        self, config: InferConfig, plan: RenderPlan, encoders: TextEncoders, report: Reporter
    ) -> None:
        """Loads the DiT with its LoRAs, and the VAE; raises RunError where memory runs out."""
        self.config = config
        self.plan = plan
        self.encoders = encoders
        self.report = OnceReporter(report)  # a size that the model was not made for is told once
        self.states: dict[str, PromptStates] = {}
        with explained(plan.changes_for_memory):
            self.renderer = plan.load_renderer(self.states, report, loras=plan.loras)
        with explained(self._vae_changes):
            self.vae = load_decoder(config.vae, config.compute)

    def answer(self, line: str) -> list[Path]:
        """Renders a prompt line and gives the files; raises HyimgError for what is wrong with it."""
        (spec,) = self.plan.decide([parse_prompt_line(line)], self.report)
        output, (files,) = self.config.output, result_files(self.config.output, 1)
        new = [prompt for prompt in prompts_to_encode([spec]) if prompt not in self.states]
        if new:
            with explained(encoder_changes(self.config.encoders)):
                self.states.update(encode_states(self.encoders, new, self.report))
        renderer = replace(self.renderer, samplers=self.plan.samplers([spec]))
        with (
            explained(replace(self.plan, specs=[spec]).changes_for_memory),
            self.report.task("render", spec.steps, unit="step") as task,
        ):
            latent_BCHW = renderer.render(spec, lambda step, x, denoised: task.advance())
        settings = None if output.no_metadata else self.plan.settings(spec, self.plan.loras)
        written = []
        if LATENT in files:
            write = partial(write_latent, Rendered(latent_BCHW, settings))
            written.append(write_result(output, files, LATENT, write))
        if PNG in files:
            with explained(self._vae_changes):
                image = decode_image(self.vae, latent_BCHW)
            written.append(write_result(output, files, PNG, partial(save_png, image, settings=settings)))
        for path in written:
            self.report.note(f"saved {path}")
        return written

    @property
    def _vae_changes(self) -> Changes:
        return partial(vae_changes, self.config.vae, picture="picture (`--image_size`)")
