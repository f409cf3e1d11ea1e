"""Upkeep of a cache, as both caching stages do it: what was damaged is told, what nothing refers to removed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress

from hyimg.cache.entries import EntryStore, Survey
from hyimg.cache.index import Index
from hyimg.cache.pruning import other_models, prune
from hyimg.config.dataset import CacheUpkeep, DatasetOptions
from hyimg.data.caption_transforms import CaptionTransforms
from hyimg.data.sample import Sample
from hyimg.data.workspace import Workspace, samples_for
from hyimg.errors import HyimgError, RunError
from hyimg.memory.processes import Processes
from hyimg.report import Reporter, size_text

_MOST_LISTED = 20


def kept_samples(
    upkeep: CacheUpkeep,
    options: DatasetOptions,
    index: Index,
    transforms: CaptionTransforms | None = None,
) -> list[Sample]:
    """The samples of the `--keep_for` dataset files, read before any work so that a wrong file is found early.

    Raises HyimgError for what is wrong with them, and for `--keep_for` without `--prune`.
    """
    if upkeep.keep_for and not upkeep.prune:
        raise HyimgError(
            "`--keep_for` says what `--prune` is to keep, and `--prune` is not given",
            hint="give both, or neither",
        )
    return [sample for path in upkeep.keep_for for sample in samples_for(path, options, index, transforms)]


def survey(
    store: EntryStore, keys: Collection[str], upkeep: CacheUpkeep, report: Reporter, processes: Processes
) -> Survey:
    """Which of `keys` have a good entry in `store`; with `--verify` every one is read, with progress.

    The main process looks, and all know: so they agree on what is to be done whoever else fills the cache.
    """
    found = _look(store, keys, upkeep, report) if processes.is_main else Survey(set(), {})
    if processes.world == 1:
        return found
    told = processes.broadcast({"todo": [k for k in keys if k not in found.good], "damaged": found.damaged})
    todo = set(told["todo"])
    if not todo <= set(keys):
        raise RunError("the dataset changed while the processes started", hint="run the same command again")
    return Survey({key for key in keys if key not in todo}, told["damaged"])


def _look(store: EntryStore, keys: Collection[str], upkeep: CacheUpkeep, report: Reporter) -> Survey:
    if upkeep.verify:
        with report.task(f"verify {store.kind} cache", len(keys), unit="entry") as task:
            found = store.survey(keys, verify=True, progress=task.advance)
    else:
        found = store.survey(keys)
    if found.good:
        # entries without a word on their model cannot be found by a run that is given none
        with suppress(HyimgError):
            store.name_the_model()
    return found


def tell_damaged(damaged: Sequence[str], report: Reporter) -> None:
    """Warns of entries that are damaged and are made again."""
    if damaged:
        lines = [f"\n  {one}" for one in damaged[:_MOST_LISTED]]
        if (more := len(damaged) - _MOST_LISTED) > 0:
            lines.append(f"\n  and {more} more")
        entries = "1 entry is" if len(damaged) == 1 else f"{len(damaged)} entries are"
        report.warning(f"{entries} damaged and made again:{''.join(lines)}")


def prune_unused(
    store: EntryStore,
    keep: Collection[str],
    workspace: Workspace,
    report: Reporter,
) -> int:
    """Removes the entries of `store` whose keys are not in `keep`, and tells; the number removed.

    Nothing is removed where an image was left out as unreadable, since its entries cannot be told from
    unused ones.
    """
    if workspace.found.skipped:
        report.warning(
            f"nothing was pruned: {len(workspace.found.skipped)} images cannot be read, and which entries are "
            "theirs is not known"
        )
        return 0
    pruned = prune(store, keep)
    young = f"; {pruned.num_young} unused ones stay, made in the last minutes" if pruned.num_young else ""
    report.note(
        f"{store.kind} cache: {pruned.num_removed} unused entries removed, "
        f"{size_text(pruned.num_bytes)} freed{young}"
    )
    for other in other_models(store):
        report.note(
            f"{other.num_entries} entries of another model stay ({size_text(other.num_bytes)}); "
            f"remove `{other.folder}` if it is not used any more"
        )
    return pruned.num_removed
