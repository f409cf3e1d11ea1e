"""Images on their way to the VAE: decoded, resized and cut ahead of it, in threads.

Shapes: B batch, C channels, H W pixels, h w latent pixels (32 of the former). RGB is float32 in -1..1.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from hyimg.cache.latents import LatentEntry, LatentStore
from hyimg.data.buckets import SIZE_MULTIPLE
from hyimg.data.images import Pixels
from hyimg.data.plan import LatentTask
from hyimg.data.view import load_view

_BATCHES_AHEAD = 2
_MOST_THREADS = 8


@dataclass(frozen=True)
class ImageBatch:
    """Images of one bucket to encode; `masks_hw` are their loss masks in 0..1, None for those without."""

    tasks: Sequence[LatentTask]
    image_BCHW: torch.Tensor
    masks_hw: Sequence[torch.Tensor | None]

    def write(self, store: LatentStore, mean_BChw: torch.Tensor, std_BChw: torch.Tensor) -> None:
        """Writes the entries of the batch: its posteriors, already scaled. Raises as `LatentStore.write`."""
        for task, mean_Chw, std_Chw, mask_hw in zip(
            self.tasks, mean_BChw, std_BChw, self.masks_hw, strict=True
        ):
            store.write(task.recipe, LatentEntry(mean_Chw, std_Chw, mask_hw))


def image_batches(
    batches: Iterable[Sequence[LatentTask]], *, num_threads: int | None = None
) -> Iterator[ImageBatch]:
    """Loads `LatentPlan.batches`, in order, some ahead of the one in use.

    Raises `HyimgError` where an image cannot be read, or is no longer what was scanned.
    """
    threads = min(_MOST_THREADS, os.cpu_count() or 1) if num_threads is None else num_threads
    with ThreadPoolExecutor(max(1, threads)) as pool:
        rest = iter(batches)

        def start(tasks: Sequence[LatentTask]) -> tuple[Sequence[LatentTask], list[Future[_Loaded]]]:
            return tasks, [pool.submit(_load, task) for task in tasks]

        waiting = deque(start(tasks) for tasks in islice(rest, _BATCHES_AHEAD))
        try:
            while waiting:
                tasks, futures = waiting.popleft()
                loaded = [future.result() for future in futures]
                waiting.extend(start(more) for more in islice(rest, 1))
                image_BCHW = torch.stack([one.image_CHW for one in loaded])
                yield ImageBatch(tasks, image_BCHW, [one.mask_hw for one in loaded])
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()


@dataclass(frozen=True)
class _Loaded:
    image_CHW: torch.Tensor
    mask_hw: torch.Tensor | None


def _load(task: LatentTask) -> _Loaded:
    view = load_view(task.sample, flipped=task.flipped)
    image_CHW = torch.from_numpy(view.rgb_HWC).permute(2, 0, 1).float().div(127.5).sub(1.0)
    return _Loaded(image_CHW, None if view.mask_HW is None else _latent_mask(view.mask_HW))


def _latent_mask(mask_HW: Pixels) -> torch.Tensor:
    """A mask at latent size, each value the mean of its 32x32 pixels, in 0..1."""
    height, width = mask_HW.shape
    blocks = mask_HW.reshape(height // SIZE_MULTIPLE, SIZE_MULTIPLE, width // SIZE_MULTIPLE, SIZE_MULTIPLE)
    return torch.from_numpy(blocks.mean(axis=(1, 3), dtype=np.float32) / np.float32(255))
