"""Samples while training: the prompts of a file rendered with the adapters as they are.

The same code renders as in `hyimg sample`, with the run's own DiT: nothing is loaded but the VAE, and that for
the moment of decoding only. Prompts come as they are in the text cache; the file is read anew each time, so
that prompts can be added to a run that goes on (where `cache-text --sample_prompts` has seen them).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hyimg.cache.entries import DamagedEntryError, MissingEntryError
from hyimg.cache.text import TextStore
from hyimg.config.models import Compute, VAEFile
from hyimg.config.rendering import Sampling
from hyimg.config.run import Validation
from hyimg.encoders.glyph import glyph_prompt
from hyimg.errors import HyimgError
from hyimg.flow.pictures import decode_image, save_png
from hyimg.flow.plan import free_memory, load_decoder
from hyimg.flow.prompts import PromptSpec, RenderSpec, load_prompts
from hyimg.flow.renderer import (
    PromptStates,
    Renderer,
    decide,
    prompts_to_encode,
    render_defaults,
    resolve_samplers,
    settings_of,
)
from hyimg.flow.sizes import check_size
from hyimg.memory.processes import Processes
from hyimg.model.architecture import DiTArch
from hyimg.model.dit import DiT
from hyimg.plugins import Plugins
from hyimg.report import Reporter

# Fewer than `infer` takes: samples show where a run is going, and a run waits for them
DEFAULT_STEPS = 20


@dataclass(frozen=True)
class SampleCadence:
    """When samples are rendered."""

    every_n_steps: int | None
    every_n_epochs: int | None
    at_first: bool

    @classmethod
    def of(cls, options: Validation) -> SampleCadence:
        """As asked; after each epoch where a prompt file is given and nothing else is said."""
        cadence = cls(options.sample_every_n_steps, options.sample_every_n_epochs, options.sample_at_first)
        return cadence if cadence != cls(None, None, False) else cls(None, 1, False)

    def after_step(self, step: int) -> bool:
        return self.every_n_steps is not None and step % self.every_n_steps == 0

    def after_epoch(self, epoch: int) -> bool:
        return self.every_n_epochs is not None and epoch % self.every_n_epochs == 0


@dataclass(frozen=True)
class SamplePlan:
    """The prompt file of a run and what its prompts leave out: size, steps and a seed that stays the same."""

    path: Path
    arch: DiTArch
    options: Sampling
    seed: int
    plugins: Plugins

    def read(self) -> list[RenderSpec]:
        """The prompts as they are in the file now. Raises HyimgError for what is wrong with them."""
        defaults = render_defaults(self.options, self.arch)
        if self.options.infer_steps is None and not self.arch.guidance_embed:
            defaults = replace(defaults, steps=DEFAULT_STEPS)
        prompts: Sequence[PromptSpec] = load_prompts(self.path)
        specs = decide(prompts, replace(defaults, seed=self.seed), self.plugins)
        for spec in specs:
            check_size(spec.height, "height")
            check_size(spec.width, "width")
        self.samplers(specs)
        return specs

    def samplers(self, specs: Sequence[RenderSpec]) -> Mapping[str, Callable[..., Tensor]]:
        """The samplers that the prompts name."""
        return resolve_samplers(
            self.plugins, [s.sampler for s in specs], self.options.sampler_args, self.arch
        )


def sampling_of(options: Validation, image_size: tuple[int, int] | None = None) -> Sampling:
    """How samples are rendered where their prompts do not say it; `image_size` is (height, width)."""
    sampling = Sampling(sampler=options.sampler, sampler_args=options.sampler_args)
    return sampling if image_size is None else replace(sampling, image_size=image_size)


def prompts_of_samples(options: Validation) -> list[str]:
    """Every prompt and negative prompt that samples need from the text cache."""
    return [] if options.sample_prompts is None else prompts_to_encode(load_prompts(options.sample_prompts))


def sample_prompt_flags(options: Validation) -> str:
    """The flag with which cache-text caches them too."""
    path = options.sample_prompts
    return "" if path is None else f" --sample_prompts {shlex.quote(str(path))}"


def require_prompts(options: Validation, vae: Path | None) -> None:
    """Raises HyimgError where samples are asked for without a prompt file, or without a VAE to decode them."""
    for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"):
        if getattr(options, name) and options.sample_prompts is None:
            raise HyimgError(f"`--{name}` without `--sample_prompts`", hint="name a file with prompts")
    if options.sample_prompts is not None and vae is None:
        raise HyimgError("`--sample_prompts` needs `--vae`", hint="name the VAE that decodes the samples")


class SampleRenderer:
    """Renders the samples of a run; leaves weights, adapters and random generators as they were."""

    def __init__(
        self,
        plan: SamplePlan,
        dit: DiT,
        store: TextStore,
        vae: VAEFile,
        compute: Compute,
        dit_path: Path,
        *,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Processes()
        self.plan = plan
        self.dit = dit
        self.store = store
        self.vae = vae
        self.compute = compute
        self.dit_path = dit_path

    def render(self, path_of: Callable[[int], Path], report: Reporter) -> dict[int, Path]:
        """Renders this process's share of the prompts that can be; gives the files by number, from 1.

        A file that has become wrong, or a prompt that is not in the cache, is a warning: the run goes on.
        """
        try:
            specs = self.plan.read()[self.processes.rank :: self.processes.world]
        except HyimgError as error:
            report.warning(f"no samples: {error.message}")
            return {}
        states: dict[str, PromptStates] = {}
        known: list[RenderSpec] = []
        for spec in specs:
            try:
                states |= {text: self._states(text) for text in (spec.prompt, spec.negative_prompt)}
                known.append(spec)
            except (MissingEntryError, DamagedEntryError) as error:
                report.warning(f"no sample of prompt {spec.index + 1}: {error.message}; {error.hint}")
        latents = self._latents(known, states, report)
        vae = load_decoder(self.vae, self.compute)
        saved = {}
        for spec, latent_BCHW in zip(known, latents, strict=True):
            path = path_of(spec.index + 1)
            settings = settings_of(spec, self.plan.options, self.compute.mixed_precision, self.dit_path, [])
            save_png(decode_image(vae, latent_BCHW), path, settings)
            saved[spec.index + 1] = path
        del vae
        free_memory(self.dit.device)
        return saved

    @torch.no_grad()
    def _latents(
        self, specs: Sequence[RenderSpec], states: Mapping[str, PromptStates], report: Reporter
    ) -> list[Tensor]:
        renderer = Renderer(
            self.dit,
            self.plan.options,
            self.plan.samplers(specs),
            states,
            lambda prompt: glyph_prompt(prompt) is not None,
        )
        with report.task("samples", sum(spec.steps for spec in specs), unit="step") as task:
            return [renderer.render(spec, lambda step, x, denoised: task.advance()) for spec in specs]

    def _states(self, prompt: str) -> PromptStates:
        entry = self.store.read(prompt)
        return entry.text_TD, entry.byt5_SE
