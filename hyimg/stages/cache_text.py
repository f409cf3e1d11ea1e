"""`hyimg cache-text`: encodes the captions of a dataset with both text encoders and caches the embeddings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch

from hyimg.cache.atomic import require_writable_folder
from hyimg.cache.prompt_embeddings import DTYPE, TextStore
from hyimg.config.commands import CacheTextConfig
from hyimg.config.option import warn_of_idle
from hyimg.data.caching import (
    CacheSummary,
    check_entries,
    kept_samples,
    prompt_name,
    prune,
    text_tasks,
    warn_damaged,
)
from hyimg.data.captions import CaptionTransforms
from hyimg.data.samples import class_captions
from hyimg.data.workspace import Workspace, open_workspace
from hyimg.distributed.launch import asks_for_launch, launch
from hyimg.distributed.processes import Processes
from hyimg.encoders.byt5 import check_byt5
from hyimg.encoders.qwen_checkpoint import check_qwen
from hyimg.encoders.text import TextEncoders, encode_prompts
from hyimg.errors import HyimgError, work_has_begun
from hyimg.memory.device import resolve_device
from hyimg.memory.out_of_memory import explain_oom, text_encoder_changes
from hyimg.memory.precision import Precision, agreed, decide_precision, multiplies_bf16
from hyimg.rendering.prompts import load_prompts
from hyimg.report import Reporter, count_text, duration_text

# Approximate time of emulated bfloat16 relative to float32
_SLOW_FACTOR = 30


def cache_text(config: CacheTextConfig, report: Reporter) -> CacheSummary:
    """Encodes the prompts that have no undamaged entry yet: captions with their variants, the empty prompt, the
    prompts and negative prompts of `--sample_prompts`, and the class captions of `--trigger_word`.

    Raises HyimgError for wrong input before a weight is read.
    """
    files = config.encoders
    if asks_for_launch(config.processes.num_processes):
        check_qwen(files.text_encoder)
        check_byt5(files.byt5)
        return launch(cache_text, config, report, num_processes=config.processes.num_processes)
    processes = Processes.current()
    device = torch.device("cpu") if files.text_encoder_cpu else resolve_device(config.compute.device, report)
    own = decide_precision(config.compute, device, text_encoder_dtype=files.text_encoder_dtype)
    precision = agreed(own, processes)
    extra = _sample_prompts(config, report)
    transforms = CaptionTransforms.of(config.dataset, config.common.plugin)
    with processes.main_first():
        workspace = open_workspace(config.dataset, report, transforms=transforms)
        encoders = TextEncoders.open(
            files.text_encoder,
            files.byt5,
            files.tokenizer,
            device=device,
            dtype=precision.text_encoder,
            fp8=files.fp8_vl,
            byt5_dtype=precision.byt5,
            batch_size=files.text_encoder_batch_size,
            mmap=not config.compute.disable_mmap_load_safetensors,
            memo=workspace.index,
        )
        encoders.identity  # noqa: B018 (hashes the files, the main process first, which remembers the hashes)
    warn_of_idle(config, report, random_captions=workspace.has_random_captions)
    extra += class_captions(workspace.all_samples, config.class_captions)
    kept = (
        kept_samples(config.upkeep, config.dataset, workspace.index, transforms) if processes.is_main else []
    )
    encoders = _encoders_to_use(encoders, precision, workspace, extra, processes)
    store = TextStore(workspace.text_dir, encoders.identity, index=workspace.index, about=encoders.about)
    tasks = text_tasks(workspace.all_samples, store, extra)
    check = check_entries(store, tasks, config.upkeep, report, processes)
    warn_damaged(check.damaged, lambda key: prompt_name(tasks[key]), report)
    todo, num_done = [prompt for key, prompt in tasks.items() if key not in check.good], len(check.good)
    if todo:
        precision = replace(precision, text_encoder=encoders.qwen.dtype, byt5=encoders.byt5.dtype)
        precision.log(report, "text encoder", "byT5")
        with explain_oom(partial(text_encoder_changes, files)):
            _encode(encoders, todo, num_done, store, report, processes)
    else:
        dtype = encoders.about[DTYPE]
        report.note(f"text: all {num_done} prompts are cached in {workspace.text_dir}, in {dtype}")
    num_pruned = 0
    if config.upkeep.prune and processes.is_main:
        keep = tasks.keys() | text_tasks(kept, store).keys()
        num_pruned = prune(store, keep, workspace, report)
    return CacheSummary(len(todo), num_done, len(check.damaged), num_pruned)


def _encoders_to_use(
    encoders: TextEncoders,
    precision: Precision,
    workspace: Workspace,
    extra: Sequence[str],
    processes: Processes,
) -> TextEncoders:
    """The encoders in the dtypes in which completing the cache costs least.

    These are their own dtypes, unless the user chose none and most prompts are cached in others, which will do too.
    """
    names = precision.text_entries[:1] if precision.text_encoder_asked else precision.text_entries
    variants = encoders.in_dtypes(names)
    if not processes.is_main:
        return variants[int(processes.broadcast(None))]
    known = TextStore.known_models(workspace.text_dir)
    costs = []
    for variant in variants:
        store = TextStore(workspace.text_dir, variant.identity, index=workspace.index, about=variant.about)
        if variant.identity in known:
            with suppress(HyimgError):  # a store from before `model.json` named the dtype
                store.name_the_model()
        tasks = text_tasks(workspace.all_samples, store, extra)
        slow = variant.qwen.dtype == torch.bfloat16 and not multiplies_bf16(variant.qwen.device)
        missing = len(tasks) - (len(store.good(tasks)) if variant.identity in known else 0)
        costs.append(missing * (_SLOW_FACTOR if slow else 1))
    return variants[int(processes.broadcast(costs.index(min(costs))))]


def _encode(
    encoders: TextEncoders,
    todo: Sequence[str],
    num_done: int,
    store: TextStore,
    report: Reporter,
    processes: Processes,
) -> None:
    """Encodes this process's share of `todo`; returns when all processes are done."""
    require_writable_folder(store.folder)
    started = time.monotonic()
    share = todo[processes.rank :: processes.world]
    with work_has_begun(), processes.rank0_reporter(report) as progress:
        for prompt, embedding in encode_prompts(encoders, share, progress):
            store.write(prompt, embedding)
    seconds = duration_text(time.monotonic() - started)
    made = count_text(len(todo), "prompt")
    report.note(f"text: {made} made in {seconds}, {num_done} kept, in {store.folder}")


def _sample_prompts(config: CacheTextConfig, report: Reporter) -> list[str]:
    if config.caching.sample_prompts is None:
        return []
    specs = load_prompts(config.caching.sample_prompts, report)
    return [text for spec in specs for text in (spec.prompt, spec.negative_prompt or "")]
