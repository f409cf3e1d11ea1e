"""`hyimg cache-text`: every caption of a dataset through both text encoders, once, to disk."""

from __future__ import annotations

import time
from functools import partial

import torch

from hyimg.cache.atomic import require_writable_folder
from hyimg.cache.summary import CacheSummary
from hyimg.cache.text import TextEntry, TextStore
from hyimg.config.commands import CacheTextConfig
from hyimg.data.caption_transforms import CaptionTransforms
from hyimg.data.class_captions import class_captions
from hyimg.data.plan import TextPlan, text_tasks
from hyimg.data.upkeep import kept_samples, prune_unused, survey, tell_damaged
from hyimg.data.workspace import open_workspace
from hyimg.encoders.byt5 import check_byt5
from hyimg.encoders.progress import encode_prompts
from hyimg.encoders.qwen_checkpoint import check_qwen
from hyimg.encoders.text import TextEncoders
from hyimg.flow.prompts import load_prompts
from hyimg.memory.device import resolve_device
from hyimg.memory.launch import asks_for_launch, launch
from hyimg.memory.out_of_memory import explained, text_encoder_changes
from hyimg.memory.processes import Processes
from hyimg.report import Reporter, count_text, duration_text


def cache_text(config: CacheTextConfig, report: Reporter) -> CacheSummary:
    """Encodes the prompts that have no good entry yet: captions with their variants, the empty prompt, those of
    `--sample_prompts` with their negative prompts, and the captions of the class of `--trigger_word`.

    Raises HyimgError for wrong input before a weight is read.
    """
    files = config.encoders
    assert files.text_encoder is not None
    assert files.byt5 is not None
    if asks_for_launch(config.processes.num_processes):
        check_qwen(files.text_encoder)
        check_byt5(files.byt5)
        return launch(cache_text, config, report, num_processes=config.processes.num_processes)
    processes = Processes.current()
    device = torch.device("cpu") if files.text_encoder_cpu else resolve_device(config.compute.device, report)
    extra = _sample_prompts(config)
    transforms = CaptionTransforms.of(config.dataset, config.common.plugin)
    with processes.main_first():
        workspace = open_workspace(config.dataset, report, transforms=transforms)
        encoders = TextEncoders.open(
            files.text_encoder,
            files.byt5,
            files.tokenizer,
            device=device,
            fp8=files.fp8_vl,
            batch_size=files.text_encoder_batch_size,
            mmap=not config.compute.disable_mmap_load_safetensors,
            memo=workspace.index,
        )
        identity = encoders.identity
    extra += class_captions(workspace.all_samples, config.class_captions)
    kept = (
        kept_samples(config.upkeep, config.dataset, workspace.index, transforms) if processes.is_main else []
    )
    store = TextStore(workspace.text_dir, identity, index=workspace.index)
    tasks = text_tasks(workspace.all_samples, store, extra)
    plan = TextPlan.of(tasks, survey(store, tasks, config.upkeep, report, processes))
    tell_damaged(plan.damaged, report)
    if plan.todo:
        with explained(partial(text_encoder_changes, files)):
            _encode(encoders, plan, store, report, processes)
    else:
        report.note(f"text: all {plan.num_done} prompts are cached in {workspace.text_dir}")
    num_pruned = 0
    if config.upkeep.prune and processes.is_main:
        keep = tasks.keys() | text_tasks(kept, store).keys()
        num_pruned = prune_unused(store, keep, workspace, report)
    return CacheSummary(len(plan.todo), plan.num_done, len(plan.damaged), num_pruned)


def _encode(
    encoders: TextEncoders, plan: TextPlan, store: TextStore, report: Reporter, processes: Processes
) -> None:
    """This process's share of the plan; returns when all have done theirs."""
    require_writable_folder(store.folder)
    started = time.monotonic()
    share = plan.share(rank=processes.rank, world=processes.world)
    with processes.one_voice(report) as voice:
        for prompt, encoded in encode_prompts(encoders, share, voice):
            store.write(prompt, TextEntry(encoded.text_TD, encoded.byt5_SE))
    seconds = duration_text(time.monotonic() - started)
    made = count_text(len(plan.todo), "prompt")
    report.note(f"text: {made} made in {seconds}, {plan.num_done} kept, in {store.folder}")


def _sample_prompts(config: CacheTextConfig) -> list[str]:
    if config.caching.sample_prompts is None:
        return []
    specs = load_prompts(config.caching.sample_prompts)
    return [text for spec in specs for text in (spec.prompt, spec.negative_prompt or "")]
