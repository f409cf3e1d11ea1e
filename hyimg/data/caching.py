"""What a dataset needs of the caches: the entries to make, the stores that training reads, and pruning.

A caching stage makes the tasks whose keys have no undamaged entry:

    tasks = latent_tasks(samples, store)             # or text_tasks
    check = check_entries(store, tasks, config.upkeep, report, processes)
    todo = [task for key, task in tasks.items() if key not in check.good]

Training opens complete stores with `latent_store_for_training` and `text_store_for_training`, which raise an error with
the command to run where entries are missing.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hyimg.cache.entries import EntryCheck, EntryStore
from hyimg.cache.index import Index
from hyimg.cache.latents import LatentStore
from hyimg.cache.prompt_embeddings import ENCODERS, TextStore
from hyimg.config.dataset_options import CacheUpkeep, DatasetFileOptions
from hyimg.data.buckets import Size
from hyimg.data.captions import CaptionTransforms
from hyimg.data.samples import EMPTY_PROMPT, LatentTask, Sample, gc_disabled
from hyimg.data.workspace import Workspace, samples_for
from hyimg.distributed.processes import Processes
from hyimg.errors import HyimgError, RunError, first_few
from hyimg.report import Reporter, size_text

StoreT = TypeVar("StoreT", bound=EntryStore)
CacheTask = TypeVar("CacheTask")

YOUNG_SECONDS = 600.0
"""Entries younger than this are not pruned: another process may be filling the cache for another dataset."""

_MOST_LISTED = 20


@dataclass(frozen=True)
class CacheSummary:
    """What a caching stage did: entries made now, and entries that were there already.

    Of those made, `num_damaged` replaced damaged ones; `num_pruned` were removed.
    """

    num_made: int
    num_kept: int
    num_damaged: int = 0
    num_pruned: int = 0


# what to make -----------------------------------------------------------------------------------------------


@gc_disabled()
def latent_tasks(samples: Iterable[Sample], store: LatentStore) -> dict[str, LatentTask]:
    """key in `store` -> (sample, `flipped`), for every latent that training on `samples` may read."""
    return {
        store.key(sample.recipe(flipped)): (sample, flipped)
        for sample in samples
        for flipped in sample.flip_variants
    }


def latent_batches(tasks: Iterable[LatentTask], batch_size: int) -> list[list[LatentTask]]:
    """Tasks in batches of one bucket each, the largest bucket first, so that too little memory shows at once."""
    by_bucket: defaultdict[Size, list[LatentTask]] = defaultdict(list)
    for task in tasks:
        by_bucket[task[0].bucket].append(task)
    return [
        own[start : start + batch_size]
        for _, own in sorted(by_bucket.items(), key=lambda item: (-item[0][0] * item[0][1], item[0]))
        for start in range(0, len(own), batch_size)
    ]


def prompts_of(samples: Iterable[Sample], extra_prompts: Iterable[str] = ()) -> list[str]:
    """Every distinct prompt that training on `samples` may use, the empty one first, then `extra_prompts`."""
    from_samples = dict.fromkeys(prompt for sample in samples for prompt in sample.prompts)
    return list(dict.fromkeys([EMPTY_PROMPT, *from_samples, *extra_prompts]))


@gc_disabled()
def text_tasks(
    samples: Iterable[Sample], store: TextStore, extra_prompts: Iterable[str] = ()
) -> dict[str, str]:
    """key in `store` -> prompt, for `prompts_of`."""
    return {store.key(prompt): prompt for prompt in prompts_of(samples, extra_prompts)}


@gc_disabled()
def missing_tasks(store: EntryStore, tasks: Mapping[str, CacheTask]) -> list[CacheTask]:
    """The tasks (by key) without an undamaged entry."""
    good = store.good(tasks)
    return [task for key, task in tasks.items() if key not in good]


def check_entries(
    store: EntryStore, keys: Collection[str], upkeep: CacheUpkeep, report: Reporter, processes: Processes
) -> EntryCheck:
    """`EntryStore.check_entries`; with `--verify` every entry is read, with progress.

    Only the main process looks, so that all processes agree on what to make while others fill the cache.
    """
    check = EntryCheck(set(), {})
    if processes.is_main:
        if upkeep.verify:
            with report.task(f"verify {store.kind} cache", len(keys), unit="entry") as task:
                check = store.check_entries(keys, verify=True, progress=task.advance)
        else:
            check = store.check_entries(keys)
        if check.good:
            # a run without model files finds entries by `model.json`
            with suppress(HyimgError):
                store.name_the_model()
    if processes.world == 1:
        return check
    shared = processes.broadcast({"todo": [k for k in keys if k not in check.good], "damaged": check.damaged})
    todo = set(shared["todo"])
    if not todo <= set(keys):
        raise RunError("the dataset changed while the processes started", hint="run the same command again")
    return EntryCheck({key for key in keys if key not in todo}, shared["damaged"])


def warn_damaged(damaged: Mapping[str, str], name: Callable[[str], str], report: Reporter) -> None:
    """Warns of damaged entries (key -> reason) that will be made again; `name` describes a key's entry."""
    if damaged:
        lines = [f"{name(key)}: {reason}" for key, reason in damaged.items()]
        listed = first_few(lines, limit=_MOST_LISTED, separator="; ")
        entries = "1 entry is damaged and" if len(damaged) == 1 else f"{len(damaged)} entries are damaged and"
        report.warning(f"{entries} will be made again: {listed}")


def prompt_name(prompt: str) -> str:
    """How a message refers to a prompt."""
    return f"the prompt `{prompt[:60]}`" if prompt else "the empty prompt"


def outdated_text(num_entries: int) -> str:
    """A sentence about entries of `LatentStore.num_outdated`."""
    entries = "1 latent is" if num_entries == 1 else f"{num_entries} latents are"
    return f"{entries} from an older release, which resized images less exactly and rotated some TIFFs twice"


# stores for training ----------------------------------------------------------------------------------------


def latent_store_for_training(
    folder: Path,
    samples: Sequence[Sample],
    *,
    index: Index | None = None,
    identity: str | None = None,
    dataset_config: Path | None = None,
    skip_check: bool = False,
) -> LatentStore:
    """The store under `folder` (`<cache_dir>/latents`) with every latent of `samples`.

    With `identity` (a VAE is given) it must be that VAE's; without, exactly one VAE's entries must be complete. Raises
    `HyimgError` that names the first images without an entry, and the command to run. With `skip_check` no entry is
    looked for, and a missing one is an error when it is read.
    """

    def missing(store: LatentStore) -> list[str]:
        if skip_check:
            return []
        return [f"`{sample.image_path}`" for sample, _ in missing_tasks(store, latent_tasks(samples, store))]

    def outdated(store: LatentStore) -> str:
        tasks = latent_tasks(samples, store).values()
        num_entries = store.num_outdated(sample.recipe(flipped) for sample, flipped in tasks)
        return f": {outdated_text(num_entries)}" if num_entries else ""

    identities = LatentStore.identities(folder) if identity is None else [identity]
    return _complete_store(
        LatentStore,
        folder,
        missing,
        index,
        identities,
        dataset_config,
        has_models=identity is not None,
        reason=outdated,
    )


def text_store_for_training(
    folder: Path,
    samples: Sequence[Sample],
    extra_prompts: Iterable[str] = (),
    *,
    index: Index | None = None,
    identities: Sequence[str] | None = None,
    dtypes: Sequence[str] = ("bf16", "fp32"),
    first: str | None = None,
    dataset_config: Path | None = None,
    flags: str = "",
    skip_check: bool = False,
) -> TextStore:
    """The store under `folder` (`<cache_dir>/text`) with every prompt of `samples` and `extra_prompts`; otherwise as
    `latent_store_for_training`. `flags` are what cache-text needs to make the extra prompts.

    `identities` are those of the given encoders in each acceptable dtype, `dtypes` these dtypes; both in order of
    preference. `first` is an identity preferred to all others. Stores of the same encoders in other dtypes count as one
    model's.
    """
    extra = list(extra_prompts)
    found, known = TextStore.dtypes(folder), TextStore.known_models(folder)
    if identities is None:
        wanted = sorted((i for i in found if found[i] in dtypes), key=lambda i: dtypes.index(found[i]))
    else:
        there = [i for i in identities if i in found]
        wanted = there if there and skip_check else list(identities)
    wanted.sort(key=lambda i: i != first)
    if len(dtypes) == 1:
        flags += f" --text_encoder_dtype {dtypes[0]}"
        if not any(i in found for i in wanted) and (others := sorted(set(found.values()) - set(dtypes))):
            raise HyimgError(
                f"the text cache `{folder}` has entries in {' and '.join(others)}, but `--text_encoder_dtype` is "
                f"{dtypes[0]}",
                hint=f"remove the option, or run `{TextStore.command}{_dataset_flag(dataset_config)}{flags}` with "
                f"{TextStore.models}",
            )

    def missing(store: TextStore) -> list[str]:
        if skip_check:
            return []
        return [prompt_name(prompt) for prompt in missing_tasks(store, text_tasks(samples, store, extra))]

    def encoders(store: TextStore) -> str:
        """Equal for stores of the same encoders in other dtypes."""
        own = store.model_identity
        return "given" if identities is not None else known[own].get(ENCODERS, own)

    return _complete_store(
        TextStore,
        folder,
        missing,
        index,
        wanted,
        dataset_config,
        flags,
        has_models=identities is not None,
        model=encoders,
    )


def _complete_store(
    store_type: type[StoreT],
    folder: Path,
    missing: Callable[[StoreT], list[str]],
    index: Index | None,
    identities: Sequence[str],
    dataset_config: Path | None,
    flags: str = "",
    *,
    has_models: bool,
    model: Callable[[StoreT], str] = lambda store: store.model_identity,
    reason: Callable[[StoreT], str] = lambda store: "",
) -> StoreT:
    """The first complete store; raises HyimgError if there is none, or if complete ones are of several models.

    `has_models`: the command has the model files. `reason` adds to the error why a store lacks entries.
    """
    command = store_type.command + _dataset_flag(dataset_config) + flags
    hint = f"run `{command}` with {store_type.models}"
    if has_models:
        hint += f", or add `{store_type.train_flag}` to this command"
    lacks = {
        store: missing(store) for store in (store_type(folder, known, index=index) for known in identities)
    }
    complete = [store for store, lack in lacks.items() if not lack]
    num_models = len({model(store) for store in complete})
    if num_models == 1:
        return complete[0]
    if complete:
        raise HyimgError(
            f"the {store_type.kind} cache `{folder}` has complete entries of {num_models} models",
            hint=f"choose one: {store_type.choice}",
        )
    if not lacks:
        raise HyimgError(f"there is no {store_type.kind} cache in `{folder}`", hint=hint)
    fullest = min(lacks, key=lambda store: len(lacks[store]))
    raise HyimgError(
        f"no {store_type.kind} cache for {first_few(lacks[fullest])} in `{folder}`{reason(fullest)}",
        hint=hint,
    )


def _dataset_flag(dataset_config: Path | None) -> str:
    return f" --dataset_config {dataset_config}" if dataset_config else ""


# pruning ----------------------------------------------------------------------------------------------------


def kept_samples(
    upkeep: CacheUpkeep,
    options: DatasetFileOptions,
    index: Index,
    transforms: CaptionTransforms | None = None,
) -> list[Sample]:
    """The samples of the `--keep_for` dataset files, read before any work so that a wrong file is found early.

    Raises HyimgError for what is wrong with them, and for `--keep_for` without `--prune`.
    """
    if upkeep.keep_for and not upkeep.prune:
        raise HyimgError(
            "`--keep_for` tells `--prune` what to keep, but `--prune` is not given",
            hint="give both, or neither",
        )
    return [sample for path in upkeep.keep_for for sample in samples_for(path, options, index, transforms)]


def prune(
    store: EntryStore,
    keep: Collection[str],
    workspace: Workspace,
    report: Reporter,
) -> int:
    """Removes the entries of `store` whose keys are not in `keep`, and reports it; returns how many.

    Entries younger than `YOUNG_SECONDS` and those of other models are only counted. Nothing is removed if an image was
    skipped as unreadable, since its entries look unused.
    """
    if workspace.found.skipped:
        report.warning(
            f"nothing was pruned: {len(workspace.found.skipped)} images cannot be read, so their entries are unknown"
        )
        return 0
    young_ns = time.time_ns() - int(YOUNG_SECONDS * 1e9)
    unused = {key: stat for key, stat in store.listing().items() if key not in keep}
    old = {key: stat for key, stat in unused.items() if stat[1] < young_ns}
    removed = store.remove(old)
    num_young = len(unused) - len(old)
    young = f"; {num_young} unused ones kept, made in the last minutes" if num_young else ""
    report.note(
        f"{store.kind} cache: {len(removed)} unused entries removed, "
        f"{size_text(sum(size for size, _ in removed.values()))} freed{young}"
    )
    for identity in type(store).identities(store.folder):
        other = type(store)(store.folder, identity)
        if other.entries_folder != store.entries_folder and (entries := other.listing()):
            report.note(
                f"{len(entries)} entries of another model kept ({size_text(sum(n for n, _ in entries.values()))}); "
                f"remove `{other.entries_folder}` if it is no longer used"
            )
    return len(removed)
