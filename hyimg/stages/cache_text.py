"""`hyimg cache-text`: every caption of a dataset through both text encoders, once, to disk."""

from __future__ import annotations

import time

import torch

from hyimg.cache.atomic import require_writable_folder
from hyimg.cache.summary import CacheSummary
from hyimg.cache.text import TextEntry, TextStore
from hyimg.config.commands import CacheTextConfig
from hyimg.data.plan import plan_text
from hyimg.data.workspace import open_workspace
from hyimg.encoders.progress import encode_prompts
from hyimg.encoders.text import TextEncoders
from hyimg.flow.prompts import load_prompts
from hyimg.memory.device import resolve_device
from hyimg.report import Reporter, count_text, duration_text


def cache_text(config: CacheTextConfig, report: Reporter) -> CacheSummary:
    """Encodes the prompts that have no good entry yet: captions with their variants, the empty prompt, and
    those of `--sample_prompts` with their negative prompts.

    Raises HyimgError for wrong input before a weight is read.
    """
    files = config.encoders
    assert files.text_encoder is not None
    assert files.byt5 is not None
    device = torch.device("cpu") if files.text_encoder_cpu else resolve_device(config.compute.device)
    extra = _sample_prompts(config)
    workspace = open_workspace(config.dataset, report)
    encoders = TextEncoders.open(
        files.text_encoder,
        files.byt5,
        files.tokenizer,
        device=device,
        batch_size=files.text_encoder_batch_size,
        mmap=not config.compute.disable_mmap_load_safetensors,
        memo=workspace.index,
    )
    store = TextStore(workspace.text_dir, encoders.identity, index=workspace.index)
    plan = plan_text(workspace.all_samples, store, extra)
    if not plan.todo:
        report.note(f"text: all {plan.num_done} prompts are cached in {workspace.text_dir}")
        return CacheSummary(0, plan.num_done)

    require_writable_folder(workspace.text_dir)
    started = time.monotonic()
    for prompt, encoded in encode_prompts(encoders, plan.todo, report):
        store.write(prompt, TextEntry(encoded.text_TD, encoded.byt5_SE))
    seconds = duration_text(time.monotonic() - started)
    made = count_text(len(plan.todo), "prompt")
    report.note(f"text: {made} made in {seconds}, {plan.num_done} kept, in {workspace.text_dir}")
    return CacheSummary(len(plan.todo), plan.num_done)


def _sample_prompts(config: CacheTextConfig) -> list[str]:
    if config.caching.sample_prompts is None:
        return []
    specs = load_prompts(config.caching.sample_prompts)
    return [text for spec in specs for text in (spec.prompt, spec.negative_prompt or "")]
