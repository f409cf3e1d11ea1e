"""`hyimg sample`: a prompt file times one or more LoRA files, as images and one contact sheet.

Rows are prompts, columns the base model and the LoRA files; a row has one seed, so that columns compare. What an
earlier run has rendered with the same settings is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from PIL import Image

from hyimg.cache.atomic import require_writable_folder
from hyimg.cache.index import Index
from hyimg.cache.lock import sole_process
from hyimg.config.commands import SampleConfig
from hyimg.config.rendering import LoRAFiles
from hyimg.data.plan import text_store_for_training
from hyimg.data.sheet import MAX_TILE, can_write, contact_sheet
from hyimg.errors import HyimgError
from hyimg.flow.cells import LATENT_FOLDER, Cell, Column, cells_of, columns_of, with_kept_seeds
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
from hyimg.flow.prompts import PromptSpec, RenderSpec, load_prompts
from hyimg.flow.renderer import PromptStates, prompts_to_encode
from hyimg.memory.out_of_memory import explained, vae_changes
from hyimg.model.architecture import VAEArch
from hyimg.model.loading import check_vae
from hyimg.report import Reporter, count_text
from hyimg.training.checkpoints import run_checkpoints

SHEET_NAME = "sheet.png"
LOCK_NAME = ".sheet.lock"


def sample(config: SampleConfig, report: Reporter) -> Path:
    """Renders every prompt with every column, but what is there already, and returns the contact sheet's path.

    Raises HyimgError for wrong input before a weight is read, and RunError for an image that is not finite.
    """
    sheet = config.sheet
    assert config.vae.vae is not None
    assert sheet.sample_prompts is not None
    assert sheet.output_dir is not None
    vae_arch = check_vae(config.vae.vae)
    prompts = load_prompts(sheet.sample_prompts)
    plan = _plan(config, prompts, report)
    columns = columns_of(plan.loras, with_base=not sheet.no_base)
    require_writable_folder(sheet.output_dir)
    busy = HyimgError(
        f"another process is rendering into `{sheet.output_dir}`",
        hint="wait for it, or choose another `--output_dir`",
    )
    with sole_process(sheet.output_dir / LOCK_NAME, busy):
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
    assert folder is not None
    plan = with_kept_seeds(plan, prompts, columns, folder, vae_arch)
    cells = cells_of(plan, columns, folder)
    todo = _to_make(cells, report)
    to_render = [cell for cell in todo if not cell.is_rendered(vae_arch)]
    if to_render:
        check_values([lora for cell in to_render for lora in cell.column.loras], plan.arch)
        states = _states(config, prompts_to_encode([cell.spec for cell in to_render]), report)
        with explained(plan.changes_for_memory):
            _render(plan, columns, to_render, states, report)
        free_memory(plan.device)
    if todo:
        _decode(config, todo, vae_arch, report)
    sheet_path = folder / SHEET_NAME
    if not _write_sheet(cells, columns, sheet_path):
        report.warning("no installed font has Chinese, Japanese and Korean glyphs: labels show boxes")
    report.note(f"saved {count_text(len(todo), 'image')} and {sheet_path}")
    return sheet_path


def _plan(config: SampleConfig, prompts: Sequence[PromptSpec], report: Reporter) -> RenderPlan:
    assert config.dit.dit is not None
    sheet = config.sheet
    return plan_renders(
        prompts,
        dit=config.dit.dit,
        encoders=config.encoders,
        vae=config.vae,
        sampling=config.sampling,
        memory=config.memory,
        compute=config.compute,
        lora=LoRAFiles(
            lora_weight=_lora_files(sheet.lora_weight, sheet.run), lora_multiplier=sheet.lora_multiplier
        ),
        plugins=config.common.plugin,
        report=report,
    )


def _lora_files(lora_weight: Sequence[Path], runs: Sequence[Path]) -> tuple[Path, ...]:
    """The files that are named, and those of the run folders that are not among them."""
    files: list[Path] = []
    for path in lora_weight:
        files += run_checkpoints(path) if path.is_dir() else [path]
    known = {path.resolve() for path in files}
    for run in runs:
        files += [path for path in run_checkpoints(run) if path.resolve() not in known]
    return tuple(files)


def _to_make(cells: Sequence[Cell], report: Reporter) -> list[Cell]:
    """The cells without a picture of the wanted settings; says what is kept and what is made again, and why."""
    changes = {cell.path: cell.changes() for cell in cells}
    kept = [path for path, changed in changes.items() if changed == []]
    again = {path.name: changed for path, changed in changes.items() if changed}
    if kept:
        report.note(f"{count_text(len(kept), 'image')} kept, made with the same settings")
    if again:
        keys = dict.fromkeys(f"`{key}`" for changed in again.values() for key in changed)
        more = f" and {len(again) - 1} more" if len(again) > 1 else ""
        report.note(f"rendered again: {next(iter(again))}{more}, made with other {', '.join(keys)}")
    return [cell for cell in cells if cell.path not in kept]


def _states(config: SampleConfig, prompts: list[str], report: Reporter) -> dict[str, PromptStates]:
    """The prompts' encoder states, from the text cache where a folder is named, else from the encoders.

    Encoders that are named too say which of the cache's stores is meant.
    """
    files, cache_dir = config.encoders, config.sheet.cache_dir
    named = files.text_encoder is not None and files.byt5 is not None
    if cache_dir is not None:
        index = Index(cache_dir if cache_dir.is_dir() else None)
        identity = open_encoders(files, config.compute, memo=index).identity if named else None
        store = text_store_for_training(cache_dir / "text", [], prompts, index=index, identity=identity)
        entries = {prompt: store.read(prompt) for prompt in prompts}
        return {prompt: (entry.text_TD, entry.byt5_SE) for prompt, entry in entries.items()}
    if not named:
        raise HyimgError(
            "`hyimg sample` needs the prompts' embeddings",
            hint="give `--text_encoder` and `--byt5`, or `--cache_dir` after `hyimg cache-text --sample_prompts`",
        )
    with explained(encoder_changes(files)):
        return encode_states(open_encoders(files, config.compute), prompts, report)


def _render(
    plan: RenderPlan,
    columns: Sequence[Column],
    cells: Sequence[Cell],
    states: dict[str, PromptStates],
    report: Reporter,
) -> None:
    """Writes the cells' latents, column by column; the DiT is let go on return."""
    renderer = plan.load_renderer(states, report)
    with report.task("render", sum(cell.spec.steps for cell in cells), unit="step") as task:
        for column in columns:
            own = [cell for cell in cells if cell.column == column]
            networks = [lora.attach(renderer.dit, report) for lora in column.loras if own]
            for cell in own:
                latent_BCHW = renderer.render(cell.spec, lambda step, x, denoised: task.advance())
                write_latent(Rendered(latent_BCHW, cell.settings), cell.latent_path)
            for network in networks:
                network.detach(renderer.dit)


def _decode(config: SampleConfig, cells: Sequence[Cell], vae_arch: VAEArch, report: Reporter) -> None:
    """Makes pictures of the latents that wait, and removes them."""
    decoding = explained(partial(vae_changes, config.vae, picture="picture (`--image_size`)"))
    with decoding, report.task("decode", len(cells), unit="image") as task:
        vae = load_decoder(config.vae, config.compute)
        for cell in cells:
            latent_BCHW = read_latent(cell.latent_path, vae_arch).latent_BCHW
            save_png(decode_image(vae, latent_BCHW), cell.path, cell.settings)
            cell.latent_path.unlink()
            task.advance()
    with suppress(OSError):  # latents of other prompts or columns may wait there still
        (cells[0].path.parent / LATENT_FOLDER).rmdir()


def _write_sheet(cells: Sequence[Cell], columns: Sequence[Column], path: Path) -> bool:
    """Writes the sheet; false where labels need glyphs that no installed font has."""
    rows = [cells[i : i + len(columns)] for i in range(0, len(cells), len(columns))]
    tiles = [[_tile(cell.path) for cell in row] for row in rows]
    labels = [_row_label(row[0].spec) for row in rows]
    column_labels = [column.label for column in columns]
    save_png(contact_sheet(tiles, labels, column_labels), path, None)
    return all(can_write(label) for label in [*labels, *column_labels])


def _tile(path: Path) -> Image.Image:
    """A picture, small: a sheet may have hundreds."""
    with Image.open(path) as image:
        image.thumbnail((MAX_TILE, MAX_TILE))
        return image.copy()


def _row_label(spec: RenderSpec) -> str:
    return f"{spec.prompt}  (seed {spec.seed})"
