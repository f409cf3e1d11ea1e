"""Batches as tensors, read from the caches: what the training loop gets of the data.

    data = TrainingData(samples, latent_store, text_store, seed=seed)
    loader = BatchLoader(data, num_workers=2)
    for batch in loader.load(epoch_batches(samples, seed=seed, epoch=epoch)[rank::world], epoch=epoch):
        latent_BCHW = batch.mean_BCHW + batch.std_BCHW * keyed_noise

Shapes: B batch, C latent channels, H W latent height and width, T text tokens, D text width, S glyph tokens,
E byT5 width. Latents are already scaled (by 0.75289).
"""

from __future__ import annotations

import errno
import io
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hyimg.cache.entries import DamagedEntryError, MissingEntryError
from hyimg.cache.latents import LatentEntry, LatentStore
from hyimg.cache.prompt_embeddings import PromptEmbedding, TextStore
from hyimg.data.samples import Batch, Sample, choose
from hyimg.errors import HyimgError, RunError, system_limit


@dataclass(frozen=True)
class LoadedBatch:
    """One batch on the CPU.

    `mean_BCHW` and `std_BCHW` are the latents' posteriors, float32. `text` has each sample's prompt embedding, in the
    cache's dtypes. `weights_B` are factors of the losses (float32; `prior_loss_weight` for regularisation images).
    `alpha_mask_BHW` weights the loss, 0..1 (float32, 1 for samples without a mask), and is None if no sample has a
    mask. `sample_keys` and `repeats` are the keys of each sample's randomness.
    """

    mean_BCHW: torch.Tensor
    std_BCHW: torch.Tensor
    text: list[PromptEmbedding]
    weights_B: torch.Tensor
    alpha_mask_BHW: torch.Tensor | None
    sample_keys: tuple[str, ...]
    repeats: tuple[int, ...]
    prompts: tuple[str, ...]
    network_multiplier: float
    custom_attributes: tuple[Mapping[str, object] | None, ...]

    def __len__(self) -> int:
        return len(self.sample_keys)


class TrainingData(torch.utils.data.Dataset[LoadedBatch]):
    """Reads batches of `samples` from the stores, indexed by (epoch, batch).

    With `plain` a sample is always the same: the first variant of its caption, not mirrored.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        latent_store: LatentStore,
        text_store: TextStore,
        *,
        seed: int,
        plain: bool = False,
    ) -> None:
        self.samples = samples
        self.plain = plain
        self.latent_store = latent_store
        self.text_store = text_store
        self.seed = seed

    def __getitem__(self, request: tuple[int, Batch]) -> LoadedBatch:
        """Raises `MissingEntryError` or `DamagedEntryError`, whose hint is the command that makes the entry."""
        epoch, batch = request
        samples = [self.samples[place] for place in batch.samples]
        choices = [
            (sample.prompts[0], False)
            if self.plain
            else choose(sample, seed=self.seed, epoch=epoch, repeat=repeat)
            for sample, repeat in zip(samples, batch.repeats, strict=True)
        ]
        latents: list[LatentEntry] = []
        text: list[PromptEmbedding] = []
        for sample, (prompt, flipped) in zip(samples, choices, strict=True):
            try:
                latents.append(self.latent_store.read(sample.recipe(flipped)))
                text.append(self.text_store.read(prompt))
            except (MissingEntryError, DamagedEntryError) as error:
                where = f"{error.message} (needed for `{sample.image_path}`)"
                raise type(error)(where, hint=error.hint) from error
        mean_BCHW = torch.stack([entry.mean_CHW for entry in latents]).float()
        return LoadedBatch(
            mean_BCHW=mean_BCHW,
            std_BCHW=torch.stack([entry.std_CHW for entry in latents]).float(),
            text=text,
            weights_B=torch.tensor([sample.weight for sample in samples], dtype=torch.float32),
            alpha_mask_BHW=_stack_masks([entry.alpha_mask_HW for entry in latents], mean_BCHW),
            sample_keys=tuple(sample.key for sample in samples),
            repeats=batch.repeats,
            prompts=tuple(prompt for prompt, _ in choices),
            network_multiplier=samples[0].dataset.network_multiplier,
            custom_attributes=tuple(sample.subset.custom_attributes for sample in samples),
        )


class BatchLoader:
    """Loads batches in order, ahead of use if there are worker processes.

    `num_workers` 0 reads in this process; `persistent_workers` keeps the processes between epochs. They are always
    kept if processes are not forked (Windows, macOS, Python 3.14 and later), since each would import torch again and
    receive the whole dataset.

    Workers send batches as bytes through pipes. Torch would put them in shared memory, of which containers have 64 MB,
    in a thread of the worker; if that thread gets no memory or no descriptor, the batch is lost and this process
    waits for it forever.
    """

    def __init__(self, data: TrainingData, *, num_workers: int = 0, persistent_workers: bool = False) -> None:
        self.data = data
        self._requests = _Requests()
        self._loader: torch.utils.data.DataLoader[bytes | LoadedBatch | HyimgError] = (
            torch.utils.data.DataLoader(
                _WithErrors(data),
                batch_size=None,
                sampler=self._requests,
                num_workers=num_workers,
                persistent_workers=num_workers > 0 and (persistent_workers or _start_method() != "fork"),
                worker_init_fn=_ignore_interrupts,
                # torch draws a seed for its workers at every epoch: not from the global generator
                generator=torch.Generator(),
            )
        )

    def keys(self, batch: Batch) -> list[str]:
        """The keys of a batch's samples, without loading the batch."""
        return [self.data.samples[place].key for place in batch.samples]

    def load(self, batches: Iterable[Batch], *, epoch: int) -> Iterator[LoadedBatch]:
        """The tensors of `batches`, in order; `epoch` counts from 1.

        Raises as `TrainingData`, and RunError if worker processes cannot be started; `lost_workers_explained` handles
        those that die.
        """
        self._requests.requests = [(epoch, batch) for batch in batches]
        try:
            from_workers = iter(self._loader)
        except OSError as error:
            _end_workers(error)
            raise _cannot_start(error, self._loader.num_workers) from error
        for loaded in from_workers:
            if isinstance(loaded, HyimgError):
                raise loaded
            yield pickle.loads(loaded) if isinstance(loaded, bytes) else loaded


@contextmanager
def lost_workers_explained() -> Iterator[None]:
    """Turns torch's error about a dead worker process, which may come anywhere in the block, into a RunError."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        # killed, for example for its memory; other errors in a worker arrive as a value or with their traceback
        raise RunError(
            f"a data loader process died ({_ended(error)})",
            hint=f"run with more memory, or give {_NO_WORKERS}",
        ) from error


def _ended(error: RuntimeError) -> str:
    """ "killed by signal: Killed", if torch's sentence about a dead worker or its cause says so."""
    for sentence in (str(error), str(error.__cause__)):
        if (reason := sentence.partition(" is killed by signal: ")[2]) != "":
            return f"killed by signal: {reason.partition('.')[0]}"
    return "unexpectedly"


def _end_workers(error: OSError) -> None:
    """Ends the workers started before the one that failed; torch's own cleanup needs all of them to have started."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        iterator = frame.f_locals.get("self")
        if isinstance(iterator, torch.utils.data.dataloader._MultiProcessingDataLoaderIter):
            for worker in getattr(iterator, "_workers", ()):
                worker.terminate()
                worker.join()
            iterator._shutdown = True


_NO_WORKERS = "`--max_data_loader_n_workers 0`, which reads in the training process"


def _cannot_start(error: OSError, num_workers: int) -> HyimgError:
    """The error for a failed start: workers' locks are files in `/dev/shm`, their queues need descriptors."""
    message = f"cannot start {num_workers} data loader processes: {error.strerror or error}"
    hint = f"give {_NO_WORKERS}"
    if error.errno == errno.ENOSPC:
        message += " in `/dev/shm`"
        hint = f"enlarge it (`docker run --shm-size 1g`), or {hint}"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        hint = f"raise the limit with `ulimit -n`, or {hint}"
    return RunError(message, hint=hint)


def _start_method() -> str:
    """How worker processes are started; looked up without fixing it."""
    return multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C and a closed terminal signal all processes; the training process decides what happens to the workers."""
    for number in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):
        signal.signal(number, signal.SIG_IGN)


class _WithErrors(torch.utils.data.Dataset["bytes | LoadedBatch | HyimgError"]):
    """Returns user errors as values (raised in a worker they would arrive as the text of a traceback), and batches
    from workers as bytes (see `BatchLoader`)."""

    def __init__(self, data: TrainingData) -> None:
        self.data = data

    def __getitem__(self, request: tuple[int, Batch]) -> bytes | LoadedBatch | HyimgError:
        try:
            batch = self.data[request]
        except HyimgError as error:
            return system_limit(error) or error  # an error's cause is not pickled with it
        return batch if torch.utils.data.get_worker_info() is None else _packed(batch)


def _packed(batch: LoadedBatch) -> bytes:
    out = io.BytesIO()
    _Pickler(out, protocol=5).dump(batch)
    return out.getvalue()


class _Pickler(pickle.Pickler):
    """Pickles tensors as their bytes."""

    def reducer_override(self, value: object) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        array = value.contiguous().view(-1).view(torch.uint8).numpy()
        return _tensor, (array, value.dtype, tuple(value.shape))


def _tensor(array: npt.NDArray[np.uint8], dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(array).view(dtype).view(shape)


class _Requests(torch.utils.data.Sampler[tuple[int, Batch]]):
    """The (epoch, batch) pairs to load; torch takes a new iterator each epoch."""

    def __init__(self) -> None:
        self.requests: list[tuple[int, Batch]] = []

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


def _stack_masks(masks: Sequence[torch.Tensor | None], mean_BCHW: torch.Tensor) -> torch.Tensor | None:
    if all(mask is None for mask in masks):
        return None
    height, width = mean_BCHW.shape[-2:]
    whole_HW = torch.ones(height, width)
    return torch.stack([whole_HW if mask is None else mask.float() for mask in masks])
