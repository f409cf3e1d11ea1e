"""`hyimg cache-latents`: every image of a dataset through the VAE, once, to disk."""

from __future__ import annotations

import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch

from hyimg.cache.atomic import require_writable_folder
from hyimg.cache.identity import file_identity
from hyimg.cache.latents import LatentStore
from hyimg.cache.summary import CacheSummary
from hyimg.config.commands import CacheLatentsConfig
from hyimg.data.pixels import image_batches
from hyimg.data.plan import LatentPlan, latent_tasks
from hyimg.data.upkeep import kept_samples, prune_unused, survey, tell_damaged
from hyimg.data.workspace import open_workspace
from hyimg.memory.device import resolve_device, vae_dtype
from hyimg.memory.launch import asks_for_launch, launch
from hyimg.memory.out_of_memory import explained, vae_changes
from hyimg.memory.processes import Processes
from hyimg.model.loading import check_vae, load_vae
from hyimg.report import Reporter, duration_text


def cache_latents(config: CacheLatentsConfig, report: Reporter) -> CacheSummary:
    """Encodes the images that have no good entry yet. A VAE whose work is all done is not loaded.

    Raises HyimgError for wrong input before the VAE is read.
    """
    vae_path = config.vae.vae
    assert vae_path is not None
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
    plan = LatentPlan.of(tasks, survey(store, tasks, config.upkeep, report, processes))
    tell_damaged(plan.damaged, report)
    if plan.todo:
        with explained(partial(vae_changes, config.vae, batch_size=config.caching.vae_batch_size)):
            _encode(config, vae_path, device, plan, store, report, processes)
    else:
        report.note(f"latents: all {plan.num_done} are cached in {workspace.latents_dir}")
    num_pruned = 0
    if config.upkeep.prune and processes.is_main:
        keep = tasks.keys() | latent_tasks(kept, store).keys()
        num_pruned = prune_unused(store, keep, workspace, report)
    return CacheSummary(len(plan.todo), plan.num_done, len(plan.damaged), num_pruned)


def _encode(
    config: CacheLatentsConfig,
    vae_path: Path,
    device: torch.device,
    plan: LatentPlan,
    store: LatentStore,
    report: Reporter,
    processes: Processes,
) -> None:
    """This process's share of the plan; returns when all have done theirs."""
    require_writable_folder(store.folder)
    dtype = vae_dtype(config.compute.mixed_precision, device)
    vae = load_vae(
        vae_path,
        device=device,
        dtype=dtype,
        mmap=not config.compute.disable_mmap_load_safetensors,
        chunk_rows=config.vae.vae_chunk_size,
        tile_size=config.vae.vae_tile_size,
    )
    buckets = Counter(task.sample.bucket for task in plan.todo)
    listing = ", ".join(f"{width}x{height}: {count}" for (width, height), count in sorted(buckets.items()))
    report.note(f"buckets (width x height: images): {listing}")
    share = plan.batches(config.caching.vae_batch_size, rank=processes.rank, world=processes.world)
    started = time.monotonic()
    made = processes.tally()
    num_entries = len(plan.todo) + plan.num_done
    with (
        torch.no_grad(),
        processes.one_voice(report) as voice,
        voice.task("cache latents", num_entries, unit="image", done=plan.num_done) as task,
    ):
        for batch in image_batches(share):
            posterior = vae.encode(batch.image_BCHW.to(device, dtype))
            batch.write(store, posterior.mean_BCHW.float(), posterior.std_BCHW.float())
            task.advance(made.add(len(batch.tasks)))
        processes.wait()
        task.advance(made.add(0))
    report.note(
        f"latents: {len(plan.todo)} made in {duration_text(time.monotonic() - started)}, "
        f"{plan.num_done} kept, in {store.folder}"
    )
