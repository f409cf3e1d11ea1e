"""`hyimg infer`: prompts to pictures. Texts are encoded first, then one DiT renders all, then one VAE decodes.

The three models are never in memory together, but with `--interactive`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from hyimg.cache.atomic import require_file_name, require_writable_folder
from hyimg.config.commands import InferConfig
from hyimg.config.load import require_no_input
from hyimg.config.option import groups_of, options_of
from hyimg.encoders.text import TextEncoders
from hyimg.errors import HyimgError
from hyimg.flow.interactive import Session, prompt_lines
from hyimg.flow.latents import Rendered, read_latent, write_latent
from hyimg.flow.loras import check_values
from hyimg.flow.pictures import decode_image, save_png
from hyimg.flow.plan import (
    RenderPlan,
    encode_states,
    encoder_changes,
    free_memory,
    load_decoder,
    open_encoders,
    plan_renders,
)
from hyimg.flow.prompts import PromptSpec, load_prompts
from hyimg.flow.renderer import PromptStates, prompts_to_encode
from hyimg.flow.repetition import check_repetition
from hyimg.flow.result_files import (
    LATENT,
    PNG,
    SUFFIXES,
    ResultFiles,
    is_folder,
    result_files,
    write_result,
)
from hyimg.lora.merged_file import refuse_merging_into_fp8, save_merged
from hyimg.memory.out_of_memory import explained, vae_changes
from hyimg.model.loading import check_vae
from hyimg.report import Reporter


def infer(config: InferConfig, report: Reporter) -> list[Path]:
    """Renders the prompts, or decodes the latents, and returns the files that were written.

    Raises HyimgError for wrong input before a weight is read, and RunError for an image that is not finite.
    """
    if config.output.split_attn:
        report.note("note: `--split_attn` changes nothing: one image at a time has no mask")
    if config.output.latent_path:
        return _decode_latents(config, report)
    renders = _has_prompts(config)
    _check_required(config, renders)
    plan = _plan(config, report)
    check_values(plan.loras, plan.arch)
    if config.prompt.from_image is not None:
        check_repetition(config.prompt.from_image, plan, report)
    merged_path = _merged_path(config, plan)
    if not renders:
        return [_save_merged(plan, merged_path, report)] if merged_path is not None else []

    assert config.vae.vae is not None
    check_vae(config.vae.vae)
    encoders = open_encoders(config.encoders, config.compute)
    results = _results(config, len(plan.specs))
    if merged_path is not None and any(merged_path in files.values() for files in results):
        raise HyimgError(
            f"`--save_merged_model` and `--save_path` are both `{merged_path}`", hint="name another file"
        )
    written = [] if merged_path is None else [_save_merged(plan, merged_path, report)]
    if config.prompt.interactive:
        return written + _interact(config, plan, encoders, report)
    with explained(encoder_changes(config.encoders)):
        states = encode_states(encoders, prompts_to_encode(plan.specs), report)
    rendered = _render(plan, states, report)
    free_memory(plan.device)
    return written + _write(config, rendered, results, report)


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


def _results(config: InferConfig, count: int) -> list[ResultFiles]:
    """Where results go; raises HyimgError where they would replace what is read."""
    results = result_files(config.output, count)
    for files in results:
        for path in files.values():
            require_no_input(config, path, "`--save_path`")
    return results


def _plan(config: InferConfig, report: Reporter) -> RenderPlan:
    assert config.dit.dit is not None
    return plan_renders(
        _prompts(config),
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


def _prompts(config: InferConfig) -> list[PromptSpec]:
    if config.prompt.from_file is not None:
        return load_prompts(config.prompt.from_file)
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
        plan.dit, "`--save_merged_model`", "merge into the bf16 file, and quantise that with `--fp8_scaled`"
    )
    if path.suffix.lower() != LATENT:
        raise HyimgError(f"`--save_merged_model` `{path}` is not the name of a `.safetensors` file")
    require_file_name(path)
    require_writable_folder(path.parent)
    require_no_input(config, path, "`--save_merged_model`")
    if path.resolve().parent == plan.dit.resolve():
        raise HyimgError(
            f"`--save_merged_model` `{path}` is in the folder of the `--dit`, which holds one model",
            hint="name another folder",
        )
    if path.exists() and not config.output.overwrite:
        raise HyimgError(f"`{path}` exists", hint="name another `--save_merged_model`, or give `--overwrite`")
    return path


def _save_merged(plan: RenderPlan, path: Path, report: Reporter) -> Path:
    networks = [(lora.read(plan.arch), lora.multiplier) for lora in plan.loras]
    save_merged(plan.dit, path, networks, [lora.record for lora in plan.loras], report)
    report.note(f"saved {path}")
    return path


# ---- rendering


def _render(plan: RenderPlan, states: Mapping[str, PromptStates], report: Reporter) -> list[Rendered]:
    """Every prompt with all LoRAs; the DiT is let go on return."""
    with explained(plan.changes_for_memory):
        renderer = plan.load_renderer(states, report, loras=plan.loras)
        rendered = []
        with report.task("render", sum(spec.steps for spec in plan.specs), unit="step") as task:
            for spec in plan.specs:
                latent_BCHW = renderer.render(spec, lambda step, x, denoised: task.advance())
                rendered.append(Rendered(latent_BCHW, plan.settings(spec, plan.loras)))
    return rendered


def _interact(config: InferConfig, plan: RenderPlan, encoders: TextEncoders, report: Reporter) -> list[Path]:
    """Pictures for each line of the user's; what is wrong with one is told, and the next is asked for."""
    session = Session(config, plan, encoders, report)
    report.note(
        f"the DiT and the VAE stay loaded on {plan.device}; the text encoders are read layer by layer for each new "
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
            free_memory(plan.device)
    return written


# ---- latents and pictures on disk


def _write(
    config: InferConfig, rendered: Sequence[Rendered], results: Sequence[ResultFiles], report: Reporter
) -> list[Path]:
    written = []
    suffixes = SUFFIXES[config.output.output_type]
    if config.output.no_metadata:
        rendered = [Rendered(one.latent_BCHW, None) for one in rendered]
    if LATENT in suffixes:
        for one, files in zip(rendered, results, strict=True):
            written.append(write_result(config.output, files, LATENT, partial(write_latent, one)))
    if PNG in suffixes:
        decoding = explained(partial(vae_changes, config.vae, picture="picture (`--image_size`)"))
        with decoding, report.task("decode", len(rendered), unit="image") as task:
            vae = load_decoder(config.vae, config.compute)
            for one, files in zip(rendered, results, strict=True):
                save = partial(save_png, decode_image(vae, one.latent_BCHW), settings=one.settings)
                written.append(write_result(config.output, files, PNG, save))
                task.advance()
    for path in written:
        report.note(f"saved {path}")
    return written


def _decode_latents(config: InferConfig, report: Reporter) -> list[Path]:
    """Pictures of latents that were saved before; nothing is encoded or rendered."""
    _check_latents_only(config)
    _require_output(config)
    assert config.vae.vae is not None
    vae_arch = check_vae(config.vae.vae)
    rendered = [read_latent(path, vae_arch) for path in config.output.latent_path]
    return _write(config, rendered, _results(config, len(rendered)), report)


def _check_latents_only(config: InferConfig) -> None:
    """Refuses what cannot act on latents that are rendered already; the model files may be in a shared config."""
    given = [
        option.label
        for name, group in groups_of(InferConfig).items()
        if name in ("prompt", "lora", "sampling")
        for option in options_of(group)
        if getattr(getattr(config, name), option.name) != option.default
    ]
    if given:
        raise HyimgError(
            f"`--latent_path` decodes latents that are rendered already and takes no {', '.join(given)}",
            hint="leave one of them out",
        )
    if config.output.output_type != "images":
        raise HyimgError("`--latent_path` gives images", hint="leave out `--output_type`")
