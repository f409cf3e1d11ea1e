"""`hyimg infer`: prompts to pictures. Texts are encoded first, then one DiT renders all, then one VAE decodes.

The three models are never in memory together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from hyimg.cache.atomic import atomic_write_bytes, require_writable_folder
from hyimg.config.commands import InferConfig
from hyimg.config.option import groups_of, options_of
from hyimg.errors import HyimgError
from hyimg.flow.pictures import METADATA_KEY, decode_image, save_png
from hyimg.flow.plan import RenderPlan, encode_states, free_memory, load_decoder, open_encoders, plan_renders
from hyimg.flow.prompts import PromptSpec, load_prompts
from hyimg.flow.renderer import PromptStates, attach_lora, prompts_to_encode
from hyimg.memory.out_of_memory import explained, text_encoder_changes, vae_changes
from hyimg.model.architecture import VAEArch
from hyimg.model.loading import check_vae
from hyimg.model.safetensors_file import Checkpoint
from hyimg.report import Reporter

LATENT_KEY = "latent"
PNG, LATENT = ".png", ".safetensors"

# What each `--output_type` leaves
_SUFFIXES = {"images": (PNG,), "latent": (LATENT,), "latent_images": (LATENT, PNG)}
_OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
_NUMBERED = re.compile(r"(\d{4,})\.(?:png|safetensors)", re.IGNORECASE)

# The files of one result by suffix
Target = dict[str, Path]


@dataclass(frozen=True)
class Rendered:
    """A latent (batch 1, scaled, float32, CPU), and what it was made with as its files tell it (None: nothing)."""

    latent_BCHW: Tensor
    settings: Mapping[str, object] | None


def infer(config: InferConfig, report: Reporter) -> list[Path]:
    """Renders the prompts, or decodes the latents, and returns the files that were written.

    Raises HyimgError for wrong input before a weight is read, and RunError for an image that is not finite.
    """
    assert config.vae.vae is not None
    vae_arch = check_vae(config.vae.vae)
    if config.output.split_attn:
        report.note("note: `--split_attn` changes nothing: one image at a time has no mask")
    if config.output.latent_path:
        _check_latents_only(config)
        rendered = [_read_latent(path, vae_arch) for path in config.output.latent_path]
        targets = _targets(config, len(rendered))
    else:
        plan = _plan(config, report)
        encoders = open_encoders(config.encoders, config.compute)
        targets = _targets(config, len(plan.specs))
        with explained(partial(text_encoder_changes, config.encoders)):
            states = encode_states(encoders, prompts_to_encode(plan.specs), report)
        rendered = _render(plan, states, report)
        free_memory(plan.device)
    return _write(config, rendered, targets, report)


def _plan(config: InferConfig, report: Reporter) -> RenderPlan:
    if config.dit.dit is None:
        raise HyimgError("`--dit` is required", hint="or give `--latent_path` to decode saved latents")
    return plan_renders(
        _prompts(config),
        dit=config.dit.dit,
        sampling=config.sampling,
        memory=config.memory,
        compute=config.compute,
        lora_weight=config.lora.lora_weight,
        lora_multiplier=config.lora.lora_multiplier,
        plugins=config.common.plugin,
        report=report,
        negative_prompt=config.prompt.negative_prompt,
    )


def _prompts(config: InferConfig) -> list[PromptSpec]:
    prompt, from_file = config.prompt.prompt, config.prompt.from_file
    if (prompt is None) == (from_file is None):
        raise HyimgError(
            "give one of `--prompt` and `--from_file`", hint="or `--latent_path` to decode latents"
        )
    if from_file is not None:
        return load_prompts(from_file)
    assert prompt is not None
    return [PromptSpec(prompt=prompt)]


def _render(plan: RenderPlan, states: Mapping[str, PromptStates], report: Reporter) -> list[Rendered]:
    """Every prompt with all LoRAs; the DiT is let go on return."""
    with explained(plan.changes_for_memory):
        renderer = plan.load_renderer(states, report)
        for lora in plan.loras:
            attach_lora(renderer.dit, lora.path, lora.multiplier, report)
        rendered = []
        with report.task("render", sum(spec.steps for spec in plan.specs), unit="step") as task:
            for spec in plan.specs:
                latent_BCHW = renderer.render(spec, lambda step, x, denoised: task.advance())
                rendered.append(Rendered(latent_BCHW, plan.settings(spec, plan.loras)))
    return rendered


# ---- where results go


def _targets(config: InferConfig, count: int) -> list[Target]:
    """The files of each result; their folder is tried, so that a render is not lost at its end.

    A folder is filled up after the highest number in it; a file is replaced with `--overwrite` only. Raises
    HyimgError for a folder that cannot be written, and for files that are there.
    """
    save_path = config.output.save_path
    assert save_path is not None
    suffixes = _SUFFIXES[config.output.output_type]
    if save_path.is_dir() or save_path.suffix.lower() not in (PNG, LATENT, *_OTHER_PICTURES):
        require_writable_folder(save_path)
        first = 1 + max(_numbers(save_path), default=0)
        return [
            {suffix: save_path / f"{number:04}{suffix}" for suffix in suffixes}
            for number in range(first, first + count)
        ]
    if save_path.suffix.lower() in _OTHER_PICTURES:
        raise HyimgError(f"`--save_path` `{save_path}`: pictures are saved as PNG", hint="name a `.png` file")
    require_writable_folder(save_path.parent)
    endings = [""] if count == 1 else [f"-{number:04}" for number in range(1, count + 1)]
    targets = [{suffix: _beside(save_path, end, suffix) for suffix in suffixes} for end in endings]
    there = [path for target in targets for path in target.values() if path.exists()]
    if there and not config.output.overwrite:
        raise HyimgError(f"`{there[0]}` exists", hint="name another `--save_path`, or give `--overwrite`")
    return targets


def _numbers(folder: Path) -> Iterator[int]:
    """The numbers of results that lie in a folder, of any kind."""
    if folder.is_dir():
        for path in folder.iterdir():
            if match := _NUMBERED.fullmatch(path.name):
                yield int(match[1])


def _beside(save_path: Path, end: str, suffix: str) -> Path:
    """`--save_path` with `end` before its suffix, which keeps the user's spelling where it is the one wanted."""
    own = save_path.suffix
    return save_path.with_name(save_path.stem + end + (own if own.lower() == suffix else suffix))


# ---- latents and pictures on disk


def _write(
    config: InferConfig, rendered: Sequence[Rendered], targets: Sequence[Target], report: Reporter
) -> list[Path]:
    written = []
    suffixes = _SUFFIXES[config.output.output_type]
    told = [None if config.output.no_metadata else one.settings for one in rendered]
    if LATENT in suffixes:
        for one, settings, target in zip(rendered, told, targets, strict=True):
            _write_latent(one.latent_BCHW, target[LATENT], settings)
            written.append(target[LATENT])
    if PNG in suffixes:
        assert config.vae.vae is not None
        decoding = explained(partial(vae_changes, config.vae, picture="picture (`--image_size`)"))
        with decoding, report.task("decode", len(rendered), unit="image") as task:
            vae = load_decoder(config.vae, config.compute)
            for one, settings, target in zip(rendered, told, targets, strict=True):
                save_png(decode_image(vae, one.latent_BCHW), target[PNG], settings)
                written.append(target[PNG])
                task.advance()
    for path in written:
        report.note(f"saved {path}")
    return written


def _write_latent(latent_BCHW: Tensor, path: Path, settings: Mapping[str, object] | None) -> None:
    metadata = None
    if settings is not None:
        metadata = {METADATA_KEY: json.dumps(settings, ensure_ascii=False, default=str)}
    atomic_write_bytes(path, save({LATENT_KEY: latent_BCHW.contiguous()}, metadata=metadata))


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


def _read_latent(path: Path, vae: VAEArch) -> Rendered:
    """A saved latent; raises HyimgError for a file without one, or with one that the VAE cannot decode."""
    checkpoint = Checkpoint.open(path)
    info = checkpoint.tensors.get(LATENT_KEY)
    if info is None or len(info.shape) != 4 or info.shape[0] != 1 or 0 in info.shape:
        raise HyimgError(
            f"`{path}` holds no latent", hint="`hyimg infer --output_type latent` writes such files"
        )
    if info.shape[1] != vae.latent_channels:
        raise HyimgError(
            f"the latent in `{path}` has {info.shape[1]} channels, and the VAE's have {vae.latent_channels}",
            hint="give the `--vae` of the model that it was rendered with",
        )
    latent_BCHW = checkpoint.read(LATENT_KEY).float()
    if not torch.isfinite(latent_BCHW).all():
        raise HyimgError(f"the latent in `{path}` is not finite (NaN or infinity)", hint="render it anew")
    return Rendered(latent_BCHW, _read_settings(checkpoint))


def _read_settings(checkpoint: Checkpoint) -> Mapping[str, object] | None:
    text = checkpoint.metadata.get(METADATA_KEY)
    try:
        settings = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        settings = text
    if settings is None or isinstance(settings, dict):
        return settings
    raise HyimgError(f"`{METADATA_KEY}` in the metadata of `{checkpoint.path}` is not a table of settings")
