"""`infer --interactive`: a prompt line at a time, answered by models that stay loaded."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from hyimg.cache.prompt_embeddings import PromptEmbedding
from hyimg.config.commands import InferConfig
from hyimg.encoders.text import TextEncoders
from hyimg.errors import HyimgError
from hyimg.memory.out_of_memory import Changes, explain_oom, vae_changes
from hyimg.rendering.decoding import Rendered, decode_image, latent_bytes, png_bytes
from hyimg.rendering.outputs import LATENT, PNG, result_files, write_result
from hyimg.rendering.prompts import MAX_CHARS, parse_prompt_line
from hyimg.rendering.render_plan import RenderPlan, encode_states, encoder_changes, load_decoder
from hyimg.rendering.renderer import prompts_to_encode
from hyimg.report import Reporter


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
            # a stream may have no end of line
            line = input("prompt> ") if is_terminal else sys.stdin.readline(MAX_CHARS + 2)
        except EOFError:
            print()  # what follows begins on a line of its own
            return
        if len(line) > MAX_CHARS + 1:  # with its end
            raise HyimgError(f"a line of the standard input has over {MAX_CHARS} characters")
        if not line.strip():
            return
        yield line.removesuffix("\n")


class Session:
    """The models of a session. The DiT and the VAE stay on the device, the states of each prompt on the CPU."""

    def __init__(
        self, config: InferConfig, plan: RenderPlan, encoders: TextEncoders, report: Reporter
    ) -> None:
        """Loads the DiT with its LoRAs, and the VAE; raises RunError where memory runs out."""
        self.config = config
        self.plan = plan
        self.encoders = encoders
        self.report = report
        self.states: dict[str, PromptEmbedding] = {}
        with explain_oom(plan.changes_for_memory):
            self.renderer = plan.load_renderer(self.states, report, loras=plan.loras)
        with explain_oom(self._vae_changes):
            self.vae = load_decoder(config.vae, config.compute, plan.precision)

    def answer(self, line: str) -> list[Path]:
        """Renders a prompt line and gives the files; raises HyimgError for what is wrong with it."""
        (spec,) = self.plan.decide([parse_prompt_line(line, self.report)], self.report)
        output, (files,) = self.config.output, result_files(self.config.output, 1)
        new = [prompt for prompt in prompts_to_encode([spec]) if prompt not in self.states]
        if new:
            with explain_oom(encoder_changes(self.config.encoders)):
                self.states.update(encode_states(self.encoders, new, self.report))
        renderer = replace(self.renderer, samplers=self.plan.samplers([spec]))
        with (
            explain_oom(replace(self.plan, specs=[spec]).changes_for_memory),
            self.report.task("render", spec.steps, unit="step") as task,
        ):
            latent_BCHW = renderer.render(spec, lambda step, x, denoised: task.advance())
        settings = None if output.no_metadata else self.plan.settings(spec, self.plan.loras)
        written = []
        if LATENT in files:
            data = latent_bytes(Rendered(latent_BCHW, settings))
            written.append(write_result(output, files, LATENT, data))
        if PNG in files:
            with explain_oom(self._vae_changes):
                image = decode_image(self.vae, latent_BCHW)
            written.append(write_result(output, files, PNG, png_bytes(image, settings)))
        for path in written:
            self.report.note(f"saved {path}")
        return written

    @property
    def _vae_changes(self) -> Changes:
        return partial(vae_changes, self.config.vae, size="image (`--image_size`)")
