"""Samples during training (previews): the prompts of a file rendered with the current adapters.

Rendered by the code of `hyimg sample` with the run's own DiT; only the VAE is loaded, and only for decoding. Prompt
embeddings come from the text cache. The prompt file is read again each time, so that prompts can be added to a
running training once `cache-text --sample_prompts` has encoded them.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hyimg.cache.entries import DamagedEntryError, MissingEntryError
from hyimg.cache.prompt_embeddings import PromptEmbedding, TextStore
from hyimg.checkpoints.architecture import DiTArch
from hyimg.config.models import Compute, VAEFile
from hyimg.config.rendering import PRESETS, Sampling
from hyimg.config.run_options import Validation
from hyimg.distributed.processes import Processes
from hyimg.encoders.glyph import glyph_prompt
from hyimg.errors import HyimgError
from hyimg.memory.precision import Precision
from hyimg.model.dit import DiT
from hyimg.plugins import Plugins
from hyimg.rendering.decoding import decode_image, save_png
from hyimg.rendering.prompts import PromptSpec, RenderSpec, check_size, load_prompts
from hyimg.rendering.render_plan import free_memory, load_decoder
from hyimg.rendering.renderer import (
    Renderer,
    decide,
    prompts_to_encode,
    render_defaults,
    resolve_samplers,
    settings_of,
)
from hyimg.report import Reporter

# Fewer than in `infer`: training waits for its samples, and they only need to show progress
DEFAULT_STEPS = 20


@dataclass(frozen=True)
class PreviewPlan:
    """The prompt file of a run, and the defaults of its prompts: size, steps and a fixed seed."""

    path: Path
    arch: DiTArch
    options: Sampling
    seed: int
    plugins: Plugins
    require_room: Callable[[Sequence[RenderSpec]], None] = lambda specs: None
    """Raises HyimgError for an image that needs more memory than this machine has."""

    def read(self, report: Reporter | None = None) -> list[RenderSpec]:
        """The prompts currently in the file. Raises HyimgError for mistakes in them."""
        defaults = render_defaults(self.options, self.arch)
        if self.options.infer_steps is None and not self.arch.guidance_embed:
            defaults = replace(defaults, steps=DEFAULT_STEPS)
        prompts: Sequence[PromptSpec] = load_prompts(self.path, report)
        specs = decide(prompts, replace(defaults, seed=self.seed), self.plugins)
        for spec in specs:
            check_size(spec.height, "height")
            check_size(spec.width, "width")
        self.samplers(specs)
        self.require_room(specs)
        return specs

    def samplers(self, specs: Sequence[RenderSpec]) -> Mapping[str, Callable[..., Tensor]]:
        """The samplers that the prompts name."""
        return resolve_samplers(
            self.plugins, [s.sampler for s in specs], self.options.sampler_args, self.arch
        )


def sampling_of(options: Validation, image_size: tuple[int, int] | None = None) -> Sampling:
    """The rendering defaults of samples; `image_size` is (height, width)."""
    preset = {} if options.sample_preset is None else PRESETS[options.sample_preset]
    own = {"preset": options.sample_preset, "sampler": options.sampler, "sampler_args": options.sampler_args}
    sampling = Sampling(**{**{name: value for name, value in preset.items() if value is not None}, **own})
    return sampling if image_size is None else replace(sampling, image_size=image_size)


def preview_prompts(options: Validation) -> list[str]:
    """All prompts and negative prompts that samples need from the text cache."""
    return [] if options.sample_prompts is None else prompts_to_encode(load_prompts(options.sample_prompts))


def sample_prompt_flags(options: Validation) -> str:
    """The flag with which cache-text caches them too."""
    path = options.sample_prompts
    return "" if path is None else f" --sample_prompts {shlex.quote(str(path))}"


def require_prompts(options: Validation, vae: Path | None) -> None:
    """Raises HyimgError if samples are requested without a prompt file, or without a VAE to decode them."""
    for name in ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"):
        if getattr(options, name) and options.sample_prompts is None:
            raise HyimgError(f"`--{name}` without `--sample_prompts`", hint="give a prompt file")
    if options.sample_prompts is not None and vae is None:
        raise HyimgError("`--sample_prompts` needs `--vae`", hint="give the VAE that decodes the samples")


class PreviewRenderer:
    """Renders the samples of a run; does not change weights, adapters or random generators."""

    def __init__(
        self,
        plan: PreviewPlan,
        dit: DiT,
        store: TextStore,
        vae: VAEFile,
        compute: Compute,
        precision: Precision,
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
        self.precision = precision
        self.dit_path = dit_path

    def render(self, path_of: Callable[[int], Path], root: Path, report: Reporter) -> dict[int, Path]:
        """Renders this process's share of the prompts; returns the files by prompt number, from 1.

        An invalid prompt file, or a prompt without a cache entry, is a warning: training continues.
        """
        try:
            specs = self.plan.read()[self.processes.rank :: self.processes.world]
        except HyimgError as error:
            report.warning(f"no samples: {error.message}")
            return {}
        states: dict[str, PromptEmbedding] = {}
        known: list[RenderSpec] = []
        for spec in specs:
            try:
                states |= {text: self.store.read(text) for text in (spec.prompt, spec.negative_prompt)}
                known.append(spec)
            except (MissingEntryError, DamagedEntryError) as error:
                report.warning(f"no sample of prompt {spec.index + 1}: {error.message}; {error.hint}")
        latents = self._latents(known, states, report)
        vae = load_decoder(self.vae, self.compute, self.precision)
        saved = {}
        for spec, latent_BCHW in zip(known, latents, strict=True):
            path = path_of(spec.index + 1)
            settings = settings_of(spec, self.plan.options, self.precision.mixed_precision, self.dit_path, [])
            settings["text_encoder_dtype"] = self.store.dtype
            save_png(decode_image(vae, latent_BCHW), path, settings, root=root)
            saved[spec.index + 1] = path
        del vae
        free_memory(self.dit.device)
        return saved

    @torch.no_grad()
    def _latents(
        self, specs: Sequence[RenderSpec], states: Mapping[str, PromptEmbedding], report: Reporter
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
