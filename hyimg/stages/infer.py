"""`hyimg infer`: prompts to pictures. Texts are encoded first, then one DiT renders all, then one VAE decodes.

The three models are never in memory together, but with `--interactive`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from hyimg.cache.atomic import require_file_name, require_writable_folder
from hyimg.cache.hashing import fingerprint
from hyimg.checkpoints.architecture import VAEArch
from hyimg.config.commands import InferConfig
from hyimg.config.load import require_no_input
from hyimg.config.option import groups_of, options_of, warn_of_idle
from hyimg.config.rendering import PRESETS
from hyimg.encoders.text import TextEncoders
from hyimg.encoders.tokenizer import MAX_TOKENS
from hyimg.errors import HyimgError, work_has_begun
from hyimg.lora.merging import refuse_merging_into_fp8, save_merged
from hyimg.memory.device import resolve_device
from hyimg.memory.out_of_memory import explain_oom, vae_changes
from hyimg.memory.precision import Precision, decide_precision
from hyimg.model.loading import check_vae
from hyimg.model.vae import VAE
from hyimg.rendering.decoding import Rendered, decode_image, latent_bytes, png_bytes, read_latent
from hyimg.rendering.interactive import Session, prompt_lines
from hyimg.rendering.loras import check_values
from hyimg.rendering.outputs import LATENT, PNG, SUFFIXES, RenderJob, is_folder
from hyimg.rendering.prompts import PromptSpec, load_prompts
from hyimg.rendering.render_plan import (
    RenderPlan,
    check_repetition,
    encode_states,
    encoder_changes,
    free_memory,
    load_decoder,
    open_encoders,
    plan_renders,
)
from hyimg.rendering.renderer import prompts_to_encode
from hyimg.report import Reporter

_MOST_STATE_BYTES = 2 * 2**30
_STATE_VALUE_BYTES = 4
"""Of the text encoder's states, float32 at the most."""


def infer(config: InferConfig, report: Reporter) -> list[Path]:
    """Renders the prompts, or decodes the latents, and returns the files that were written.

    Raises HyimgError for wrong input before a weight is read, and RunError for an image that is not finite.
    """
    if config.output.latent_path:
        return _decode_latents(config, report)
    renders = _has_prompts(config)
    _check_required(config, renders)
    prompts = _prompts(config, report)
    plan = _plan(config, prompts, report)
    warn_of_idle(config, report, **plan.option_facts(prompts), on_gpu=plan.dit.device.type != "cpu")
    check_values(plan.loras, plan.arch)
    if config.prompt.from_image is not None:
        check_repetition(config.prompt.from_image, plan, report)
    merged_path = _merged_path(config, plan)
    if not renders:
        return [_save_merged(config, plan, merged_path, report)] if merged_path is not None else []

    assert config.vae.vae is not None
    vae_arch = check_vae(config.vae.vae)
    encoders = open_encoders(config.encoders, config.compute, plan.precision)
    with _job(config, *_items(plan, prompts, merged_path), report) as job:
        if merged_path is not None and any(merged_path in files.values() for files in job.results):
            raise HyimgError(
                f"`--save_merged_model` and `--save_path` are both `{merged_path}`", hint="name another file"
            )
        # a run that is continued has saved it before its first picture
        saves = merged_path is not None and not job.is_continued
        written = [_save_merged(config, plan, merged_path, report)] if saves and merged_path else []
        plan.precision.log(report, "DiT", "text encoder", "byT5", "VAE")
        if config.prompt.interactive:
            return written + _interact(config, plan, encoders, report)
        seeded = [
            spec if seed is None else replace(spec, seed=seed)
            for spec, seed in zip(plan.specs, job.seeds, strict=True)
        ]
        plan = replace(plan, specs=seeded)
        with work_has_begun():
            for indices in _batches(plan, job.pending):
                with explain_oom(plan.changes_for_memory):
                    _render(plan, indices, job, encoders, config, report)
                free_memory(plan.dit.device)
                rendered = partial(_rendered, plan, job, vae_arch)
                written += _write(config, plan.precision, indices, job, rendered, report)
    return written


# ---- what is asked for


def _has_prompts(config: InferConfig) -> bool:
    """Whether there is something to render; false where models are merged only. Raises HyimgError for a muddle."""
    prompt = config.prompt
    others = [
        f"`--{name}`" for name in ("from_file", "interactive") if getattr(prompt, name) not in (None, False)
    ]
    if prompt.from_image is not None and others:
        raise HyimgError(
            f"`--from_image` brings its own prompt, and {others[0]} brings others", hint="leave one out"
        )
    given = ["`--prompt`"] * (prompt.prompt is not None) + others
    if len(given) > 1:
        raise HyimgError(f"give one of {' and '.join(given)}", hint="each brings its own prompts")
    if not given and config.lora.save_merged_model is None:
        raise HyimgError(
            "give one of `--prompt`, `--from_file`, `--from_image` and `--interactive`",
            hint="or `--latent_path` to decode latents",
        )
    return bool(given)


def _check_required(config: InferConfig, renders: bool) -> None:
    save_path = config.output.save_path
    if config.dit.dit is None:
        raise HyimgError("`--dit` is required", hint="or give `--latent_path` to decode saved latents")
    if renders:
        _require_output(config)
    if config.prompt.interactive and save_path is not None and not is_folder(save_path):
        raise HyimgError(
            f"`--interactive` makes many pictures, and `--save_path` `{save_path}` is one file",
            hint="name a folder",
        )


def _require_output(config: InferConfig) -> None:
    """What pictures need, whatever they are made of."""
    given = {"`--vae`": config.vae.vae, "`--save_path`": config.output.save_path}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise HyimgError(f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} required")


def _job(
    config: InferConfig, items: Sequence[Mapping[str, object]], seeds: Sequence[int | None], report: Reporter
) -> RenderJob:
    """The job of a command; raises HyimgError where its results would replace what is read."""
    job = RenderJob(config.output, items, seeds, report)
    for files in job.results:
        for path in files.values():
            require_no_input(config, path, "`--save_path`")
    return job


def _items(
    plan: RenderPlan, prompts: Sequence[PromptSpec], merged_path: Path | None
) -> tuple[list[Mapping[str, object]], list[int | None]]:
    """What each picture is made with, without the seeds that were drawn for it; and those."""
    is_drawn = [prompt.seed is None and plan.defaults.seed is None for prompt in prompts]
    settings = [plan.settings(spec, plan.loras) for spec in plan.specs]
    items: list[Mapping[str, object]] = [
        {**own, "seed": None} if drawn else own for own, drawn in zip(settings, is_drawn, strict=True)
    ]
    seeds = [spec.seed if drawn else None for spec, drawn in zip(plan.specs, is_drawn, strict=True)]
    return items, seeds


def _plan(config: InferConfig, prompts: Sequence[PromptSpec], report: Reporter) -> RenderPlan:
    assert config.dit.dit is not None
    return plan_renders(
        prompts,
        dit=config.dit.dit,
        encoders=config.encoders,
        vae=config.vae,
        sampling=config.sampling,
        memory=config.memory,
        compute=config.compute,
        lora=config.lora,
        plugins=config.common.plugin,
        report=report,
        negative_prompt=config.prompt.negative_prompt,
    )


def _prompts(config: InferConfig, report: Reporter) -> list[PromptSpec]:
    if config.prompt.from_file is not None:
        return load_prompts(config.prompt.from_file, report)
    return [] if config.prompt.prompt is None else [PromptSpec(prompt=config.prompt.prompt)]


# ---- the model with LoRAs merged, as a file


def _merged_path(config: InferConfig, plan: RenderPlan) -> Path | None:
    """The file of `--save_merged_model`, if one is asked for; raises HyimgError where it cannot be made."""
    path = config.lora.save_merged_model
    if path is None:
        return None
    if not plan.loras:
        raise HyimgError("`--save_merged_model` without `--lora_weight`", hint="name the LoRA files to merge")
    if config.memory.fp8_scaled:
        raise HyimgError(
            "`--save_merged_model` writes weights in the types of their file, not in those of `--fp8_scaled`",
            hint="leave `--fp8_scaled` out, and give it where the merged file is used",
        )
    refuse_merging_into_fp8(
        plan.dit.opened,
        "`--save_merged_model`",
        "merge into the bf16 file, and quantise that with `--fp8_scaled`",
    )
    if path.suffix.lower() != LATENT:
        raise HyimgError(f"`--save_merged_model` `{path}` is not the name of a `.safetensors` file")
    require_file_name(path)
    require_writable_folder(path.parent)
    require_no_input(config, path, "`--save_merged_model`")
    if path.resolve().parent == plan.dit.opened.path.resolve():
        raise HyimgError(
            f"`--save_merged_model` `{path}` is in the folder of the `--dit`, which holds one model",
            hint="name another folder",
        )
    return path


def _save_merged(config: InferConfig, plan: RenderPlan, path: Path, report: Reporter) -> Path:
    if path.exists() and not config.output.overwrite:
        raise HyimgError(f"`{path}` exists", hint="name another `--save_merged_model`, or give `--overwrite`")
    networks = [(lora.read(plan.arch), lora.multiplier) for lora in plan.loras]
    save_merged(plan.dit.opened.path, path, networks, [lora.record for lora in plan.loras], report)
    report.note(f"saved {path}")
    return path


# ---- rendering


def _batches(plan: RenderPlan, indices: Sequence[int]) -> Iterator[list[int]]:
    """The pictures in batches whose prompts' states fit in memory at once; each model is loaded once a batch."""
    batch: list[int] = []
    size = 0
    for index in indices:
        # a token is at least a byte of text
        prompts = prompts_to_encode([plan.specs[index]])
        tokens = sum(min(len(prompt.encode("utf-8", "replace")), MAX_TOKENS) for prompt in prompts)
        own = tokens * plan.arch.text_dim * _STATE_VALUE_BYTES
        if batch and size + own > _MOST_STATE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(index)
        size += own
    if batch:
        yield batch


def _render(
    plan: RenderPlan,
    indices: Sequence[int],
    job: RenderJob,
    encoders: TextEncoders,
    config: InferConfig,
    report: Reporter,
) -> None:
    """Renders and keeps the latents of a batch that an earlier run has not kept; the DiT is let go on return."""
    assert config.vae.vae is not None
    vae_arch = check_vae(config.vae.vae)
    settings = {index: plan.settings(plan.specs[index], plan.loras) for index in indices}
    todo = [index for index in indices if not job.has_latent(index, settings[index], vae_arch)]
    if not todo:
        return
    specs = [plan.specs[index] for index in todo]
    with explain_oom(encoder_changes(config.encoders)):
        states = encode_states(encoders, prompts_to_encode(specs), report)
    renderer = plan.load_renderer(states, report, loras=plan.loras)
    with report.task("render", sum(spec.steps for spec in specs), unit="step") as task:
        for index, spec in zip(todo, specs, strict=True):
            latent_BCHW = renderer.render(spec, lambda step, x, denoised: task.advance())
            job.keep(index, Rendered(latent_BCHW, settings[index]))


def _rendered(plan: RenderPlan, job: RenderJob, vae_arch: VAEArch, index: int) -> Rendered:
    """A latent that was kept, with its settings in the order in which a run that is not stopped writes them."""
    return Rendered(job.latent(index, vae_arch), plan.settings(plan.specs[index], plan.loras))


def _interact(config: InferConfig, plan: RenderPlan, encoders: TextEncoders, report: Reporter) -> list[Path]:
    """Renders each line that the user types; a wrong line is reported, and the session continues."""
    session = Session(config, plan, encoders, report)
    report.note(
        f"the DiT and the VAE stay loaded on {plan.dit.device}; the text encoders are read layer by layer for each new "
        "prompt"
    )
    report.note(
        "a prompt a line, with its own --w --h --d --s --l --fs --n --ss; an empty line or Ctrl-D ends"
    )
    written: list[Path] = []
    for line in prompt_lines():
        try:
            written += session.answer(line)
        except HyimgError as error:
            report.warning(f"{error.message} ({error.hint})" if error.hint else error.message)
            free_memory(plan.dit.device)
    return written


# ---- latents and pictures on disk


def _write(
    config: InferConfig,
    precision: Precision,
    indices: Sequence[int],
    job: RenderJob,
    rendered_of: Callable[[int], Rendered],
    report: Reporter,
) -> list[Path]:
    """Completes the results of a batch; each is on disk as soon as it is decoded."""
    suffixes = SUFFIXES[config.output.output_type]
    written: list[Path] = []

    def complete(index: int, vae: VAE | None) -> None:
        one = rendered_of(index)
        if config.output.no_metadata:
            one = Rendered(one.latent_BCHW, None)
        contents = {LATENT: latent_bytes(one)} if LATENT in suffixes else {}
        if vae is not None:
            contents[PNG] = png_bytes(decode_image(vae, one.latent_BCHW), one.settings)
        for path in job.complete(index, contents):
            written.append(path)
            report.note(f"saved {path}")

    if PNG not in suffixes:
        for index in indices:
            complete(index, None)
        return written
    decoding = explain_oom(partial(vae_changes, config.vae, size="image (`--image_size`)"))
    with decoding, report.task("decode", len(indices), unit="image") as task:
        vae = load_decoder(config.vae, config.compute, precision)
        for index in indices:
            complete(index, vae)
            task.advance()
    return written


def _decode_latents(config: InferConfig, report: Reporter) -> list[Path]:
    """Pictures of latents that were saved before; nothing is encoded or rendered."""
    _check_latents_only(config)
    _require_output(config)
    assert config.vae.vae is not None
    vae_arch = check_vae(config.vae.vae)
    paths = config.output.latent_path
    for path in paths:
        read_latent(path, vae_arch)
    precision = decide_precision(config.compute, resolve_device(config.compute.device, report))
    decoder = {
        "vae": fingerprint(config.vae.vae),
        "dtype": str(precision.vae),
        "vae_chunk_size": config.vae.vae_chunk_size,
        "vae_tile_size": config.vae.vae_tile_size,
    }
    items = [{"latent": fingerprint(path), **decoder} for path in paths]
    with _job(config, items, [None] * len(items), report) as job:
        precision.log(report, "VAE")
        with work_has_begun():
            return _write(
                config, precision, job.pending, job, lambda index: read_latent(paths[index], vae_arch), report
            )


def _check_latents_only(config: InferConfig) -> None:
    """Refuses what cannot act on latents that are rendered already; the model files may be in a shared config."""
    set_by_preset = PRESETS.get(config.sampling.preset or "", {})
    given = [
        option.label
        for name, group in groups_of(InferConfig).items()
        if name in ("prompt", "lora", "sampling")
        for option in options_of(group)
        if getattr(getattr(config, name), option.name) != option.default and option.name not in set_by_preset
    ]
    if given:
        raise HyimgError(
            f"`--latent_path` decodes latents that are rendered already and takes no {', '.join(given)}",
            hint="leave one of them out",
        )
    if config.output.output_type != "images":
        raise HyimgError("`--latent_path` gives images", hint="leave out `--output_type`")
