"""What of a dataset is cached, by which models, and the disk that the rest will take. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from hyimg.cache.entries import EntryStore
from hyimg.cache.entry_file import RawTensor, pack
from hyimg.cache.index import Index
from hyimg.cache.latents import LatentStore
from hyimg.cache.text import TextStore
from hyimg.data.plan import LatentTask, latent_tasks, prompts_of
from hyimg.data.report import CacheState, StoreState
from hyimg.data.sample import Sample
from hyimg.model.architecture import SPATIAL_FACTOR

_ITEM_BYTES = {"F16": 2, "BF16": 2, "F32": 4}
_NO_MODEL = ""

Store = TypeVar("Store", bound=EntryStore)
What = TypeVar("What")
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""The tensors of an entry: name -> (dtype as safetensors names it, shape)."""


def latent_cache_state(
    folder: Path,
    samples: Sequence[Sample],
    *,
    index: Index,
    identity: str | None,
    channels: int,
    basis: str,
) -> CacheState:
    """The state of the latent cache; of the VAE `identity` only, where it is given.

    `channels` are the VAE's latent channels, for the size of missing entries, and `basis` says how they are
    known.
    """

    def entries(store: LatentStore) -> dict[str, LatentTask]:
        return latent_tasks(samples, store)

    def size(task: LatentTask) -> int:
        return entry_bytes(_latent_shapes(task, channels), vars(task.recipe))

    return _state(LatentStore, folder, index, identity, entries, size, basis)


def text_cache_state(
    folder: Path,
    samples: Sequence[Sample],
    extra_prompts: Iterable[str],
    *,
    index: Index,
    identity: str | None,
    shapes: Callable[[str], Shapes | None],
    basis: str,
) -> CacheState:
    """The state of the text cache; of the encoders `identity` only, where it is given.

    `shapes` are the tensors that a prompt is encoded to, None where that is not known; `basis` says how.
    """
    prompts = prompts_of(samples, extra_prompts)

    def entries(store: TextStore) -> dict[str, str]:
        return {store.key(prompt): prompt for prompt in prompts}

    def size(prompt: str) -> int | None:
        tensors = shapes(prompt)
        return None if tensors is None else entry_bytes(tensors, {"prompt": prompt})

    return _state(TextStore, folder, index, identity, entries, size, basis)


def entry_bytes(shapes: Shapes, recipe: Mapping[str, object]) -> int:
    """The size of an entry's file, to within 100 bytes (the digits of the offsets in its header)."""
    tensors = {name: RawTensor(dtype, shape, b"") for name, (dtype, shape) in shapes.items()}
    body = 0
    for dtype, shape in shapes.values():
        count = 1
        for length in shape:
            count *= length
        body += count * _ITEM_BYTES[dtype]
    return len(pack("0" * 64, tensors, recipe)) + body


def _latent_shapes(task: LatentTask, channels: int) -> Shapes:
    width, height = (side // SPATIAL_FACTOR for side in task.sample.bucket)
    shapes = dict.fromkeys(("mean", "std"), ("F16", (channels, height, width)))
    if task.recipe.mask is None:
        return shapes
    return {**shapes, "alpha_mask": ("F16", (height, width))}


def _state(
    store_type: type[Store],
    folder: Path,
    index: Index,
    identity: str | None,
    entries: Callable[[Store], Mapping[str, What]],
    size: Callable[[What], int | None],
    basis: str,
) -> CacheState:
    """A state for each model that has entries, or the named one's; `entries` are what is wanted, by key."""
    identities = store_type.identities(folder) if identity is None else [identity]
    states: list[StoreState] = []
    for known in identities or [_NO_MODEL]:
        store = store_type(folder, known, index=index)
        wanted = entries(store)
        good = store.good(wanted) if known else set()
        states.append(
            StoreState(
                identity=known or None,
                named=identity is not None,
                cached=len(good),
                missing=len(wanted) - len(good),
                bytes_cached=sum(_file_bytes(store.path(key)) for key in good),
                bytes_missing=_total(size(what) for key, what in wanted.items() if key not in good),
            )
        )
    num_entries = states[0].cached + states[0].missing
    return CacheState(folder=str(folder), entries=num_entries, basis=basis, stores=tuple(states))


def _total(sizes: Iterable[int | None]) -> int | None:
    total = 0
    for size in sizes:
        if size is None:
            return None
        total += size
    return total


def _file_bytes(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0
