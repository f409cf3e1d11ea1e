"""`hyimg sample`: a prompt file times one or more LoRA files, as images and one contact sheet.

Rows are prompts, columns the base model and the LoRA files; a row has one seed, so that columns compare. What an
earlier run has rendered with the same settings is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from hyimg.cache.atomic import require_writable_folder, sole_process
from hyimg.cache.index import Index
from hyimg.cache.own_files import remove_file, remove_leftovers, require_no_links, temporary_stem
from hyimg.cache.prompt_embeddings import PromptEmbedding, TextStore
from hyimg.checkpoints.architecture import VAEArch
from hyimg.config.commands import SampleConfig
from hyimg.config.image_file import opened_image
from hyimg.config.option import warn_of_idle
from hyimg.config.rendering import LoRAFiles, SheetOptions
from hyimg.data.caching import text_store_for_training
from hyimg.errors import HyimgError, RunError, first_few, work_has_begun
from hyimg.lora.files.foreign import is_peft_folder
from hyimg.memory.out_of_memory import explain_oom, vae_changes
from hyimg.model.loading import check_vae
from hyimg.rendering.cells import LATENT_FOLDER, Cell, Column, cells_of, columns_of, with_kept_seeds
from hyimg.rendering.decoding import Rendered, decode_image, read_latent, save_png, write_latent
from hyimg.rendering.loras import check_values, multipliers_of
from hyimg.rendering.prompts import PromptSpec, RenderSpec, load_prompts
from hyimg.rendering.render_plan import (
    RenderPlan,
    encode_states,
    encoder_changes,
    free_memory,
    load_decoder,
    open_encoders,
    plan_renders,
)
from hyimg.rendering.renderer import prompts_to_encode
from hyimg.report import Reporter, count_text
from hyimg.reports.sheets import MAX_TILE, can_write, contact_sheet
from hyimg.training.run_folder import run_checkpoints

SHEET_NAME = "sheet.png"
LOCK_NAME = ".sheet.lock"


def sample(config: SampleConfig, report: Reporter) -> Path:
    """Renders every prompt with every column, but what is there already, and returns the contact sheet's path.

    Raises HyimgError for wrong input before a weight is read, and RunError for an image that is not finite.
    """
    sheet = config.sheet
    vae_arch = check_vae(config.vae.vae)
    prompts = load_prompts(sheet.sample_prompts, report)
    plan = _plan(config, prompts, report)
    warn_of_idle(config, report, **plan.option_facts(prompts), on_gpu=plan.dit.device.type != "cpu")
    columns = columns_of(plan.loras, with_base=not sheet.no_base)
    require_writable_folder(sheet.output_dir)
    busy = HyimgError(
        f"another process is rendering into `{sheet.output_dir}`",
        hint="wait for it, or choose another `--output_dir`",
    )
    require_no_links(sheet.output_dir / LATENT_FOLDER, root=sheet.output_dir)
    with sole_process(sheet.output_dir / LOCK_NAME, busy, root=sheet.output_dir):
        return _make_sheet(config, plan, prompts, columns, vae_arch, report)


def _make_sheet(
    config: SampleConfig,
    plan: RenderPlan,
    prompts: Sequence[PromptSpec],
    columns: Sequence[Column],
    vae_arch: VAEArch,
    report: Reporter,
) -> Path:
    """Renders what is missing in the folder, and then the sheet."""
    folder = config.sheet.output_dir
    plan = with_kept_seeds(_with_cached_text(config, plan), prompts, columns, folder, vae_arch)
    cells = cells_of(plan, columns, folder)
    todo = _to_make(cells, report)
    to_render = [cell for cell in todo if not cell.is_rendered(vae_arch)]
    if to_render:
        check_values([lora for cell in to_render for lora in cell.column.loras], plan.arch)
        from_cache = config.sheet.cache_dir is not None
        models = ["DiT", "VAE"] if from_cache else ["DiT", "VAE", "text encoder", "byT5"]
        cached = str(plan.facts["text_encoder_dtype"]) if from_cache else None
        plan.precision.log(report, *models, cached_text=cached)
        states = _states(config, plan, prompts_to_encode([cell.spec for cell in to_render]), report)
        with explain_oom(plan.changes_for_memory):
            _render(plan, columns, to_render, states, folder, report)
        free_memory(plan.dit.device)
    if todo:
        _decode(config, plan, todo, vae_arch, report)
    _remove_latents(cells, folder)
    sheet_path = folder / SHEET_NAME
    if not _write_sheet(cells, columns, sheet_path):
        report.warning("no installed font has Chinese, Japanese and Korean glyphs: labels show boxes")
    report.note(f"saved {count_text(len(todo), 'image')} and {sheet_path}")
    return sheet_path


def _plan(config: SampleConfig, prompts: Sequence[PromptSpec], report: Reporter) -> RenderPlan:
    sheet = config.sheet
    return plan_renders(
        prompts,
        dit=config.dit.dit,
        encoders=config.encoders,
        vae=config.vae,
        sampling=config.sampling,
        memory=config.memory,
        compute=config.compute,
        lora=_lora_files(sheet, report),
        plugins=config.common.plugin,
        report=report,
    )


def _lora_files(sheet: SheetOptions, report: Reporter) -> LoRAFiles:
    """The files that are named, and those of the run folders that are not among them, with their multipliers.

    A multiplier belongs to a path as it was given: all checkpoints of a folder have that of the folder.
    """
    paths = [*sheet.lora_weight, *sheet.run]
    multipliers = multipliers_of(
        paths, sheet.lora_multiplier, report, option="--lora_multiplier", files_option="--lora_weight"
    )
    files: list[tuple[Path, float]] = []
    num_named = len(sheet.lora_weight)
    for path, multiplier in zip(sheet.lora_weight, multipliers[:num_named], strict=True):
        is_run = path.is_dir() and not is_peft_folder(path)
        files += [(file, multiplier) for file in (run_checkpoints(path) if is_run else [path])]
    known = {file.resolve() for file, _ in files}
    for run, multiplier in zip(sheet.run, multipliers[num_named:], strict=True):
        files += [(file, multiplier) for file in run_checkpoints(run) if file.resolve() not in known]
    return LoRAFiles(
        lora_weight=tuple(file for file, _ in files),
        lora_multiplier=tuple(multiplier for _, multiplier in files),
    )


def _to_make(cells: Sequence[Cell], report: Reporter) -> list[Cell]:
    """The cells without a picture of the wanted settings; says what is kept and what is made again, and why."""
    changes = {cell.path: cell.changes() for cell in cells}
    kept = [path for path, changed in changes.items() if changed == []]
    again = {path.name: changed for path, changed in changes.items() if changed}
    if kept:
        report.note(f"{count_text(len(kept), 'image')} kept, made with the same settings")
    if again:
        keys = dict.fromkeys(f"`{key}`" for changed in again.values() for key in changed)
        report.note(f"rendered again: {first_few(list(again))}, made with other {', '.join(keys)}")
    return [cell for cell in cells if cell.path not in kept]


def _with_cached_text(config: SampleConfig, plan: RenderPlan) -> RenderPlan:
    """The plan, whose pictures say in which type the cached texts were computed that they are rendered from."""
    if config.sheet.cache_dir is None:
        return plan
    with suppress(HyimgError):  # raised again where the texts are needed: for a complete sheet they are not
        store = _text_store(config, plan, prompts_to_encode(plan.specs))
        return replace(plan, facts={**plan.facts, "text_encoder_dtype": store.dtype})
    return plan


def _text_store(config: SampleConfig, plan: RenderPlan, prompts: list[str]) -> TextStore:
    """The text cache's store with the prompts; encoders that are named too say which one is meant."""
    files, cache_dir = config.encoders, config.sheet.cache_dir
    assert cache_dir is not None
    index = Index(cache_dir if cache_dir.is_dir() else None)
    preferred = plan.facts["text_encoder_dtype"]
    dtypes = sorted(plan.precision.text_entries, key=lambda name: name != preferred)
    identities = None
    if files.text_encoder is not None and files.byt5 is not None:
        encoders = open_encoders(files, config.compute, plan.precision, memo=index)
        identities = [encoders.identity for encoders in encoders.in_dtypes(dtypes)]
    return text_store_for_training(
        cache_dir / "text", [], prompts, index=index, identities=identities, dtypes=dtypes
    )


def _states(
    config: SampleConfig, plan: RenderPlan, prompts: list[str], report: Reporter
) -> dict[str, PromptEmbedding]:
    """The prompts' encoder states, from the text cache where a folder is named, else from the encoders."""
    files = config.encoders
    named = files.text_encoder is not None and files.byt5 is not None
    if config.sheet.cache_dir is not None:
        store = _text_store(config, plan, prompts)
        return {prompt: store.read(prompt) for prompt in prompts}
    if not named:
        raise HyimgError(
            "`hyimg sample` needs the prompts' embeddings",
            hint="give `--text_encoder` and `--byt5`, or `--cache_dir` after `hyimg cache-text --sample_prompts`",
        )
    with explain_oom(encoder_changes(files)):
        return encode_states(open_encoders(files, config.compute, plan.precision), prompts, report)


def _render(
    plan: RenderPlan,
    columns: Sequence[Column],
    cells: Sequence[Cell],
    states: dict[str, PromptEmbedding],
    folder: Path,
    report: Reporter,
) -> None:
    """Writes the cells' latents, column by column; the DiT is let go on return."""
    renderer = plan.load_renderer(states, report)
    with work_has_begun(), report.task("render", sum(cell.spec.steps for cell in cells), unit="step") as task:
        for column in columns:
            own = [cell for cell in cells if cell.column == column]
            networks = [lora.attach(renderer.dit, report) for lora in column.loras if own]
            for cell in own:
                latent_BCHW = renderer.render(cell.spec, lambda step, x, denoised: task.advance())
                write_latent(Rendered(latent_BCHW, cell.settings), cell.latent_path, root=folder)
            for network in networks:
                network.detach(renderer.dit)


def _decode(
    config: SampleConfig, plan: RenderPlan, cells: Sequence[Cell], vae_arch: VAEArch, report: Reporter
) -> None:
    """Makes pictures of the latents that wait, and removes them."""
    decoding = explain_oom(partial(vae_changes, config.vae, size="image (`--image_size`)"))
    folder = config.sheet.output_dir
    with work_has_begun(), decoding, report.task("decode", len(cells), unit="image") as task:
        vae = load_decoder(config.vae, config.compute, plan.precision)
        for cell in cells:
            latent_BCHW = read_latent(cell.latent_path, vae_arch).latent_BCHW
            save_png(decode_image(vae, latent_BCHW), cell.path, cell.settings, root=folder)
            remove_file(cell.latent_path, root=folder)
            task.advance()


def _remove_latents(cells: Sequence[Cell], folder: Path) -> None:
    """Removes latents whose picture is there: a run that was killed in between has left them."""
    for cell in cells:
        remove_file(cell.latent_path, root=folder)
    stems = {temporary_stem(cell.latent_path.name) for cell in cells}
    remove_leftovers(folder / LATENT_FOLDER, stems.__contains__, root=folder)
    with suppress(OSError):  # latents of other prompts or columns may wait there still
        (folder / LATENT_FOLDER).rmdir()


def _write_sheet(cells: Sequence[Cell], columns: Sequence[Column], path: Path) -> bool:
    """Writes the sheet; false where labels need glyphs that no installed font has."""
    rows = [cells[i : i + len(columns)] for i in range(0, len(cells), len(columns))]
    tiles = [[_tile(cell.path) for cell in row] for row in rows]
    labels = [_row_label(row[0].spec) for row in rows]
    column_labels = [column.label for column in columns]
    save_png(contact_sheet(tiles, labels, column_labels), path, None, root=path.parent)
    return all(can_write(label) for label in [*labels, *column_labels])


def _tile(path: Path) -> Image.Image:
    """A picture, small: a sheet may have hundreds."""
    try:
        with opened_image(path) as image:
            image.thumbnail((MAX_TILE, MAX_TILE))
            return image.copy()
    except ValueError as error:
        raise RunError(f"`{path}` cannot be read as a picture: {error}") from error


def _row_label(spec: RenderSpec) -> str:
    return f"{spec.prompt}  (seed {spec.seed})"
