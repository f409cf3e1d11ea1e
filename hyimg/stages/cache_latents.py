"""`hyimg cache-latents`: encodes the images of a dataset with the VAE and caches the latents."""

from __future__ import annotations

import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from hyimg.cache.atomic import require_writable_folder
from hyimg.cache.hashing import file_identity
from hyimg.cache.latents import LatentEntry, LatentStore
from hyimg.config.commands import CacheLatentsConfig
from hyimg.data.caching import (
    CacheSummary,
    check_entries,
    kept_samples,
    latent_batches,
    latent_tasks,
    outdated_text,
    prune,
    warn_damaged,
)
from hyimg.data.pixels import image_batches
from hyimg.data.samples import LatentTask
from hyimg.data.workspace import open_workspace
from hyimg.distributed.launch import asks_for_launch, launch
from hyimg.distributed.processes import Processes
from hyimg.errors import work_has_begun
from hyimg.memory.device import resolve_device
from hyimg.memory.out_of_memory import explain_oom, vae_changes
from hyimg.memory.precision import decide_precision
from hyimg.model.loading import check_vae, load_vae
from hyimg.plugins import load_plugins
from hyimg.report import Reporter, duration_text


def cache_latents(config: CacheLatentsConfig, report: Reporter) -> CacheSummary:
    """Encodes the images that have no undamaged entry yet; without any, the VAE is not loaded.

    Raises HyimgError for wrong input before the VAE is read.
    """
    load_plugins(config.common.plugin)
    vae_path = config.vae.vae
    check_vae(vae_path)
    if asks_for_launch(config.processes.num_processes):
        return launch(cache_latents, config, report, num_processes=config.processes.num_processes)
    processes = Processes.current()
    device = resolve_device(config.compute.device, report)
    with processes.main_first():
        workspace = open_workspace(config.dataset, report)
        identity = file_identity(vae_path, workspace.index)
    kept = kept_samples(config.upkeep, config.dataset, workspace.index) if processes.is_main else []
    store = LatentStore(workspace.latents_dir, identity, index=workspace.index)
    tasks = latent_tasks(workspace.all_samples, store)
    check = check_entries(store, tasks, config.upkeep, report, processes)
    warn_damaged(check.damaged, lambda key: f"`{tasks[key][0].image_path}`", report)
    todo, num_done = [task for key, task in tasks.items() if key not in check.good], len(check.good)
    if num_outdated := store.num_outdated(sample.recipe(flipped) for sample, flipped in todo):
        report.note(f"{outdated_text(num_outdated)}, and will be made again")
    if todo:
        with explain_oom(partial(vae_changes, config.vae, batch_size=config.caching.vae_batch_size)):
            _encode(config, vae_path, device, todo, num_done, store, report, processes)
    else:
        report.note(f"latents: all {num_done} are cached in {workspace.latents_dir}")
    num_pruned = 0
    if config.upkeep.prune and processes.is_main:
        keep = tasks.keys() | latent_tasks(kept, store).keys()
        num_pruned = prune(store, keep, workspace, report)
    return CacheSummary(len(todo), num_done, len(check.damaged), num_pruned)


def _encode(
    config: CacheLatentsConfig,
    vae_path: Path,
    device: torch.device,
    todo: list[LatentTask],
    num_done: int,
    store: LatentStore,
    report: Reporter,
    processes: Processes,
) -> None:
    """Encodes this process's share of `todo`; returns when all processes are done."""
    require_writable_folder(store.folder)
    precision = decide_precision(config.compute, device)
    precision.log(report, "VAE")
    dtype = precision.vae
    vae = load_vae(
        vae_path,
        device=device,
        dtype=dtype,
        mmap=not config.compute.disable_mmap_load_safetensors,
        chunk_rows=config.vae.vae_chunk_size,
        tile_size=config.vae.vae_tile_size,
    )
    buckets = Counter(sample.bucket for sample, _ in todo)
    listing = ", ".join(f"{width}x{height}: {count}" for (width, height), count in sorted(buckets.items()))
    report.note(f"buckets (width x height: images): {listing}")
    share = latent_batches(todo, config.caching.vae_batch_size)[processes.rank :: processes.world]
    started = time.monotonic()
    made = processes.tally()
    with (
        work_has_begun(),
        torch.no_grad(),
        processes.rank0_reporter(report) as progress,
        progress.task("cache latents", len(todo) + num_done, unit="image", done=num_done) as task,
    ):
        for tasks, image_BCHW, masks_hw in image_batches(share):
            posterior = vae.encode(image_BCHW.to(device, dtype))
            rows = zip(tasks, posterior.mean_BCHW.float(), posterior.std_BCHW.float(), masks_hw, strict=True)
            for (sample, flipped), mean_Chw, std_Chw, mask_hw in rows:
                entry = LatentEntry(mean_Chw, std_Chw, mask_hw)
                store.write(sample.recipe(flipped), entry, image=sample.image_path)
            task.advance(made.add(len(tasks)))
        processes.wait()
        task.advance(made.add(0))
    report.note(
        f"latents: {len(todo)} made in {duration_text(time.monotonic() - started)}, "
        f"{num_done} kept, in {store.folder}"
    )
