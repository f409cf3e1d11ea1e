"""Images of samples as the VAE sees them: decoded, resized, cropped and perhaps mirrored, with their loss masks.

    for tasks, image_BCHW, masks_hw in image_batches(latent_batches(tasks, batch_size)): ...

Shapes: B batch, C channels, H W pixels, h w latent pixels (32x32 pixels each). Only `image_batches` imports torch.

Decoding waits for memory (`image_memory`), so that a few huge images in parallel threads do not fill it.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

from hyimg.cache.hashing import hash_bytes
from hyimg.cache.latents import LatentRecipe
from hyimg.config.documents import read_bounded, require_regular
from hyimg.data.buckets import SIZE_MULTIPLE
from hyimg.data.images import IMAGE_BYTES, DecodedImage, Pixels, decode, decoding_bytes, resize_and_crop
from hyimg.data.samples import LatentTask, Sample
from hyimg.errors import HyimgError
from hyimg.report import size_text

if TYPE_CHECKING:
    import torch

_BATCHES_AHEAD = 2
_MOST_THREADS = 8


def load_pixels(sample: Sample, *, flipped: bool = False) -> tuple[Pixels, Pixels | None]:
    """(`rgb_HWC`, `mask_HW`) of a sample at its bucket's size, uint8; a mask of 255 has full weight, None no mask.

    Raises `HyimgError` if a file cannot be read or has changed since the scan.
    """
    recipe = sample.recipe(flipped)
    with _decoded(sample.image_path, sample.image_hash) as image:
        if sample.subset.alpha_mask:
            return _place(image.rgb_HWC, recipe), _place(_alpha_mask(image), recipe)
        rgb_HWC = _place(image.over_white().rgb_HWC, recipe)
    return rgb_HWC, _mask_of_file(sample, recipe)


def load_mask(sample: Sample) -> Pixels | None:
    """Only the mask of `load_pixels`, not mirrored; raises as it does."""
    if not sample.subset.alpha_mask:
        return _mask_of_file(sample, sample.recipe())
    with _decoded(sample.image_path, sample.image_hash) as image:
        return _place(_alpha_mask(image), sample.recipe())


def _alpha_mask(image: DecodedImage) -> Pixels:
    """An image's opacity; an image without transparency has full weight, as in the reference tool."""
    if image.alpha_HW is None:
        return np.full(image.rgb_HWC.shape[:2], 255, np.uint8)
    return image.alpha_HW


def _mask_of_file(sample: Sample, recipe: LatentRecipe) -> Pixels | None:
    if sample.mask_path is None:
        return None
    assert sample.mask_hash is not None
    with _decoded(sample.mask_path, sample.mask_hash) as mask:
        return _place(mask.over_white().rgb_HWC[:, :, 0], recipe)  # the red channel, as in the reference tool


@contextmanager
def _decoded(path: Path, sha256: str) -> Iterator[DecodedImage]:
    """A decoded file that was scanned; its memory stays reserved within the block."""
    with ExitStack() as stack:
        try:
            stack.enter_context(image_memory(path))
            data = read_bounded(path, IMAGE_BYTES)
            if hash_bytes(data) != sha256:
                raise HyimgError(
                    f"the image `{path}` changed during the command", hint="run the command again"
                )
            image = decode(data)
            del data
        except OSError as error:
            raise HyimgError(f"cannot read the image `{path}`: {error.strerror}") from error
        except ValueError as error:
            raise HyimgError(f"cannot read the image `{path}`: {error}") from error
        yield image


def _place(pixels: Pixels, recipe: LatentRecipe) -> Pixels:
    placed = resize_and_crop(
        pixels, resized=recipe.resized, crop=recipe.crop, bucket=recipe.bucket, filter_name=recipe.filter
    )
    # a copy: Pillow's arrays are read-only, which torch does not accept
    return np.array(placed[:, ::-1] if recipe.flipped else placed)


def image_batches(
    batches: Iterable[Sequence[LatentTask]], *, num_threads: int | None = None
) -> Iterator[tuple[Sequence[LatentTask], torch.Tensor, list[torch.Tensor | None]]]:
    """Loads batches in order, some ahead of use: (tasks, `image_BCHW`, `mask_hw` of each).

    `image_BCHW` is float32 RGB in -1..1. `mask_hw` is float32 in 0..1 (the mean of each 32x32 pixels), or None for a
    sample without a mask. Raises as `load_pixels`.
    """
    import torch

    def load(task: LatentTask) -> tuple[torch.Tensor, torch.Tensor | None]:
        sample, flipped = task
        rgb_HWC, mask_HW = load_pixels(sample, flipped=flipped)
        image_CHW = torch.from_numpy(rgb_HWC).permute(2, 0, 1).float().div(127.5).sub(1.0)
        if mask_HW is None:
            return image_CHW, None
        height, width = (side // SIZE_MULTIPLE for side in mask_HW.shape)
        blocks = mask_HW.reshape(height, SIZE_MULTIPLE, width, SIZE_MULTIPLE)
        mean_hw = blocks.mean(axis=(1, 3), dtype=np.float32) / np.float32(255)
        return image_CHW, torch.from_numpy(mean_hw)

    threads = min(_MOST_THREADS, os.cpu_count() or 1) if num_threads is None else num_threads
    with ThreadPoolExecutor(max(1, threads)) as pool:
        rest = iter(batches)

        def start(
            tasks: Sequence[LatentTask],
        ) -> tuple[Sequence[LatentTask], list[Future[tuple[torch.Tensor, torch.Tensor | None]]]]:
            return tasks, [pool.submit(load, task) for task in tasks]

        waiting = deque(start(tasks) for tasks in islice(rest, _BATCHES_AHEAD))
        try:
            while waiting:
                tasks, futures = waiting.popleft()
                images, masks_hw = zip(*(future.result() for future in futures), strict=True)
                waiting.extend(start(more) for more in islice(rest, 1))
                yield tasks, torch.stack(images), list(masks_hw)
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()


# memory -----------------------------------------------------------------------------------------------------

_SMALL_BYTES = 64_000_000
# Limit, usage and statistics of a container, in control groups of version 2 and 1
_CGROUPS = (
    ("/sys/fs/cgroup/", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory/", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


class MemoryBudget:
    """Half of the memory that is free while nothing is reserved; a reservation that does not fit waits.

    One larger than that half waits until it is the only one, and one larger than all free memory is refused.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._reserved = 0
        self._total = 0

    @contextmanager
    def reserved(self, num_bytes: int) -> Iterator[None]:
        """Reserves the bytes for the block; a thread may hold one reservation at a time.

        Raises ValueError if that much memory is not free.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._fits(num_bytes))
            self._reserved += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self._reserved -= num_bytes
                self._changed.notify_all()

    def _fits(self, num_bytes: int) -> bool:
        if self._reserved:
            return self._reserved + num_bytes <= self._total
        if num_bytes > _SMALL_BYTES or not self._total:
            free = available_bytes()
            if num_bytes > free:
                raise ValueError(
                    f"decoding it takes about {size_text(num_bytes)} of memory, and {size_text(free)} are free"
                )
            self._total = free // 2
        return True


_BUDGET = MemoryBudget()


@contextmanager
def image_memory(path: str | os.PathLike[str]) -> Iterator[None]:
    """Reserves the memory for reading and decoding an image file, estimated from its size and header.

    Raises OSError if it is not a regular file or too large, ValueError if that much memory is not free.
    """
    require_regular(path, IMAGE_BYTES)
    with _BUDGET.reserved(os.stat(path).st_size):  # some decoders read the whole file for the header
        num_bytes = decoding_bytes(path)
    with _BUDGET.reserved(num_bytes):
        yield


def available_bytes() -> int:
    """The memory in bytes that this process could still use: of the machine (with swap), and of its container."""
    # of pages swapped in and out, which containers without /proc/vmstat lack and nothing here reads
    warnings.filterwarnings("ignore", message="'sin' and 'sout' swap memory", category=RuntimeWarning)
    free = int(psutil.virtual_memory().available + psutil.swap_memory().free)
    return min([free, *_cgroup_free_bytes()])


def _cgroup_free_bytes() -> Iterator[int]:
    """What each control group's limit leaves; the file cache does not count as used."""
    for folder, limit, usage in _CGROUPS:
        try:
            most, used = (int(Path(folder, name).read_text(encoding="ascii")) for name in (limit, usage))
            statistics = dict(
                map(str.split, Path(folder, "memory.stat").read_text(encoding="ascii").splitlines())
            )
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
        cached = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
        yield max(0, most - used + cached)
