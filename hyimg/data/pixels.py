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
from pathlib import Path

import numpy as np
import torch

from hyimg.cache.identity import hash_bytes
from hyimg.cache.latents import LatentEntry, LatentStore
from hyimg.data.buckets import SIZE_MULTIPLE
from hyimg.data.images import DecodedImage, Pixels, decode, resize_and_crop
from hyimg.data.plan import LatentTask
from hyimg.errors import HyimgError

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
    sample = task.sample
    pixels = _decode_scanned(sample.image_path, sample.image_hash)
    if sample.subset.alpha_mask:
        height, width = pixels.rgb_HWC.shape[:2]
        # an image without transparency counts whole, as in the reference tool
        opaque_HW = np.full((height, width), 255, np.uint8)
        mask_HW = opaque_HW if pixels.alpha_HW is None else pixels.alpha_HW
    else:
        pixels = pixels.over_white()
        mask_HW = None
    if sample.mask_path is not None:
        assert sample.mask_hash is not None
        mask = _decode_scanned(sample.mask_path, sample.mask_hash)
        mask_HW = mask.over_white().rgb_HWC[:, :, 0]  # the red channel, as in the reference tool
    image_HWC = _place(pixels.rgb_HWC, task)
    image_CHW = torch.from_numpy(image_HWC.copy()).permute(2, 0, 1).float().div(127.5).sub(1.0)
    return _Loaded(image_CHW, None if mask_HW is None else _latent_mask(_place(mask_HW, task)))


def _decode_scanned(path: Path, sha256: str) -> DecodedImage:
    try:
        data = path.read_bytes()
        if hash_bytes(data) != sha256:
            raise HyimgError(
                f"the image `{path}` was changed while the command ran", hint="run the command again"
            )
        return decode(data)
    except OSError as error:
        raise HyimgError(f"cannot read the image `{path}`: {error.strerror}") from error
    except ValueError as error:
        raise HyimgError(f"cannot read the image `{path}`: {error}") from error


def _place(pixels: Pixels, task: LatentTask) -> Pixels:
    recipe = task.recipe
    placed = resize_and_crop(
        pixels, resized=recipe.resized, crop=recipe.crop, bucket=recipe.bucket, filter_name=recipe.filter
    )
    # a copy: what Pillow hands out is read-only, which torch does not take
    return np.array(placed[:, ::-1] if task.flipped else placed)


def _latent_mask(mask_HW: Pixels) -> torch.Tensor:
    """A mask at latent size, each value the mean of its 32x32 pixels, in 0..1."""
    height, width = mask_HW.shape
    blocks = mask_HW.reshape(height // SIZE_MULTIPLE, SIZE_MULTIPLE, width // SIZE_MULTIPLE, SIZE_MULTIPLE)
    return torch.from_numpy(blocks.mean(axis=(1, 3), dtype=np.float32) / np.float32(255))
