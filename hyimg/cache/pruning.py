"""Removing the entries that nothing refers to any more.

    pruned = prune(store, keys_of_every_dataset_that_counts)

Only entries of the store's own model are touched: what another model made may be wanted again when that
model is, and is only counted (`other_models`). Entries younger than `YOUNG_SECONDS` stay, since another
process may be filling the cache at this moment for a dataset that is not known here. Whatever is removed
by mistake costs the time to make it again, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from hyimg.cache.entries import EntryStore

YOUNG_SECONDS = 600.0


@dataclass(frozen=True)
class Pruned:
    """How many entries were removed and the bytes they took; how many were too young to be."""

    num_removed: int
    num_bytes: int
    num_young: int


@dataclass(frozen=True)
class OtherModel:
    """The entries that another model made in the same cache."""

    folder: Path
    num_entries: int
    num_bytes: int


def prune(store: EntryStore, keep: Collection[str], *, young_seconds: float = YOUNG_SECONDS) -> Pruned:
    """Removes the entries of `store` whose keys are not in `keep`. Raises `HyimgError` where it may not."""
    young_ns = time.time_ns() - int(young_seconds * 1e9)
    unused = {key: stat for key, stat in store.listing().items() if key not in keep}
    old = {key: stat for key, stat in unused.items() if stat[1] < young_ns}
    removed = store.remove(old)
    return Pruned(len(removed), sum(size for size, _ in removed.values()), len(unused) - len(old))


def other_models(store: EntryStore) -> list[OtherModel]:
    """The entries beside the store's own, by the model that made them."""
    found = []
    for identity in type(store).identities(store.folder):
        other = type(store)(store.folder, identity)
        if other.entries_folder != store.entries_folder and (entries := other.listing()):
            sizes = [size for size, _ in entries.values()]
            found.append(OtherModel(other.entries_folder, len(entries), sum(sizes)))
    return found
