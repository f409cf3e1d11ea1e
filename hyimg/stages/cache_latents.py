"""`hyimg cache-latents`: every image of a dataset through the VAE, once, to disk."""

from __future__ import annotations

import time
from collections import Counter

import torch

from hyimg.cache.atomic import require_writable_folder
from hyimg.cache.identity import file_identity
from hyimg.cache.latents import LatentStore
from hyimg.cache.summary import CacheSummary
from hyimg.config.commands import CacheLatentsConfig
from hyimg.data.pixels import image_batches
from hyimg.data.plan import plan_latents
from hyimg.data.workspace import open_workspace
from hyimg.memory.device import resolve_device, vae_dtype
from hyimg.model.loading import check_vae, load_vae
from hyimg.report import Reporter, duration_text


def cache_latents(config: CacheLatentsConfig, report: Reporter) -> CacheSummary:
    """Encodes the images that have no good entry yet. A VAE whose work is all done is not loaded.

    Raises HyimgError for wrong input before the VAE is read.
    """
    vae_path = config.vae.vae
    assert vae_path is not None
    device = resolve_device(config.compute.device)
    check_vae(vae_path)
    workspace = open_workspace(config.dataset, report)
    store = LatentStore(
        workspace.latents_dir, file_identity(vae_path, workspace.index), index=workspace.index
    )
    plan = plan_latents(workspace.all_samples, store)
    if not plan.todo:
        report.note(f"latents: all {plan.num_done} are cached in {workspace.latents_dir}")
        return CacheSummary(0, plan.num_done)

    require_writable_folder(workspace.latents_dir)
    dtype = vae_dtype(config.compute.mixed_precision, device)
    vae = load_vae(
        vae_path, device=device, dtype=dtype, mmap=not config.compute.disable_mmap_load_safetensors
    )
    buckets = Counter(task.sample.bucket for task in plan.todo)
    listing = ", ".join(f"{width}x{height}: {count}" for (width, height), count in sorted(buckets.items()))
    report.note(f"buckets (width x height: images): {listing}")
    started = time.monotonic()
    with (
        torch.no_grad(),
        report.task(
            "cache latents", len(plan.todo) + plan.num_done, unit="image", done=plan.num_done
        ) as task,
    ):
        for batch in image_batches(plan.batches(config.caching.vae_batch_size)):
            posterior = vae.encode(batch.image_BCHW.to(device, dtype))
            batch.write(store, posterior.mean_BCHW.float(), posterior.std_BCHW.float())
            task.advance(len(batch.tasks))
    report.note(
        f"latents: {len(plan.todo)} made in {duration_text(time.monotonic() - started)}, {plan.num_done} kept, "
        f"in {workspace.latents_dir}"
    )
    return CacheSummary(len(plan.todo), plan.num_done)
