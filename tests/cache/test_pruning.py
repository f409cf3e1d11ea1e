"""Pruning: what nothing refers to goes, and nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from hyimg.cache.index import Index
from hyimg.cache.pruning import other_models, prune
from hyimg.cache.text import TextEntry, TextStore


def age(store: TextStore, prompt: str, seconds: float) -> None:
    past = time.time_ns() - int(seconds * 1e9)
    os.utime(store.path(store.key(prompt)), ns=(past, past))


@pytest.fixture
def store(tmp_path: Path) -> TextStore:
    store = TextStore(tmp_path / "text", "encoder", index=Index(tmp_path))
    for prompt in ("used", "unused", "young"):
        store.write(prompt, TextEntry(torch.ones(2, 4)))
    age(store, "used", 3600)
    age(store, "unused", 3600)
    return store


def test_what_nothing_refers_to_is_removed_and_counted(store: TextStore) -> None:
    size = store.path(store.key("unused")).stat().st_size
    pruned = prune(store, {store.key("used")})
    assert (pruned.num_removed, pruned.num_bytes, pruned.num_young) == (1, size, 1)
    assert [store.has(store.key(prompt)) for prompt in ("used", "unused", "young")] == [True, False, True]
    later = prune(store, {store.key("used")}, young_seconds=0.0)
    assert (later.num_removed, later.num_young) == (1, 0)


def test_the_index_forgets_what_was_removed(store: TextStore, tmp_path: Path) -> None:
    keys = [store.key(prompt) for prompt in ("used", "unused", "young")]
    assert store.good(keys) == set(keys)
    prune(store, {keys[0]})
    known = Index(tmp_path).checked_entries(f"text/{store.entries_folder.name}")
    assert set(known) == {keys[0], keys[2]}


def test_an_entry_that_another_process_writes_again_meanwhile_stays(store: TextStore) -> None:
    listed = {key: stat for key, stat in store.listing().items() if key == store.key("unused")}
    store.write("unused", TextEntry(torch.ones(2, 4)))
    assert store.remove(listed) == {}
    assert store.is_good(store.key("unused"))


def test_entries_of_other_models_are_only_counted(store: TextStore) -> None:
    other = TextStore(store.folder, "another encoder")
    other.write("unused", TextEntry(torch.ones(2, 4)))
    age(other, "unused", 3600)
    prune(store, set(), young_seconds=0.0)
    assert other.is_good(other.key("unused"))
    (told,) = other_models(store)
    assert (told.folder, told.num_entries) == (other.entries_folder, 1)
