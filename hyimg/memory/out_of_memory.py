"""Out of memory: how it is recognised, and the two changes that are worth most against it.

    with explained(partial(training_changes, config.memory, config.training_memory, ...)):
        train_loop(run)

Which memory ran out decides what helps: on the device, more of the model should go elsewhere; on the host, less
of it. No torch here, since the command line asks too: its errors are told by name and text.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto

from hyimg.config.models import Memory, TextEncoderFiles, TrainingMemory, VAEFile
from hyimg.errors import HyimgError, RunError


class Place(Enum):
    """Whose memory ran out."""

    DEVICE = auto()
    """That of a GPU."""
    HOST = auto()
    """The system's."""


# (where memory ran out) -> changes, the most useful first, each as the end of "try ..."
Changes = Callable[[Place], Sequence[str]]

_DEVICE_TEXTS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "MPS backend out of memory",
    "_ALLOC_FAILED",
    # NCCL's, which takes memory of its own
    "Cuda failure 2 'out of memory'",
    "Cuda failure 'out of memory'",
    "Failed to CUDA calloc",
)
# the first two are torch's allocator on Linux and Windows, the last the system's own words
_HOST_TEXTS = ("can't allocate memory", "not enough memory", "Cannot allocate memory")

# Not enough memory, out of memory, and a paging file that is too small
_WINDOWS_ERRORS = (8, 14, 1455)

_ASKED_FOR = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)")

# The guide's numbers of streamed blocks for 24, 12 and 8 GB, and one between
_SWAP_STEPS = (9, 18, 32, 37)
_CHUNK_ROWS = 16
_TILE_SIZES = (512, 256)
_OTHER_PROGRAMS = "closing other programs that use the same memory"


def out_of_memory_place(error: BaseException) -> Place | None:
    """Whose memory an error says is used up; None for an error of another kind.

    Known are torch's `OutOfMemoryError`, the CUDA runtime's and libraries' own refusals, Apple's, torch's
    allocator of host memory (a plain RuntimeError), Python's MemoryError, and the system's ENOMEM.
    """
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return Place.HOST
    if getattr(error, "winerror", None) in _WINDOWS_ERRORS:
        return Place.HOST
    if type(error).__name__ == "OutOfMemoryError":
        return Place.DEVICE
    if isinstance(error, RuntimeError):
        if any(part in text for part in _DEVICE_TEXTS):
            return Place.DEVICE
        if any(part in text for part in _HOST_TEXTS):
            return Place.HOST
    return None


def out_of_memory_error(error: BaseException, place: Place, changes: Sequence[str]) -> RunError:
    """One sentence with what the allocator says was asked for, and the first two of the changes as its hint."""
    memory = "GPU memory" if place is Place.DEVICE else "memory"
    asked = _ASKED_FOR.search(str(error))
    said = f": tried to allocate {asked[1]}" if asked else ""
    return RunError(f"out of {memory}{said}", hint=f"try {' or '.join(changes[:2])}")


@contextmanager
def explained(changes: Changes) -> Iterator[None]:
    """Raises RunError with what to change where memory runs out inside; other errors pass."""
    try:
        yield
    except HyimgError:
        raise
    except Exception as error:
        place = out_of_memory_place(error)
        if place is None:
            raise
        raise out_of_memory_error(error, place, changes(place)) from error


# ---- what helps, the most useful first, without what is done already


def training_changes(
    memory: Memory,
    training: TrainingMemory,
    place: Place,
    *,
    most_blocks: int,
    is_fp8_file: bool = False,
    on_cpu: bool = False,
) -> list[str]:
    """For a run of `train`: `most_blocks` is what the model lets be streamed, `is_fp8_file` that its DiT is fp8.

    `on_cpu` says that the model computes on the CPU, whose memory is the host's, so that moving a thing there
    saves nothing.
    """
    checkpoints = (
        training.gradient_checkpointing
        or training.checkpoint_keep is not None
        or training.cpu_offload_checkpointing
    )
    is_quantised = memory.fp8_scaled or is_fp8_file
    changes = []
    if place is Place.HOST and not on_cpu:
        changes += ["`--fp8_scaled`"] * (not is_quantised)
        changes += [f"fewer `--blocks_to_swap` than {memory.blocks_to_swap}"] * bool(memory.blocks_to_swap)
        changes += ["leaving out `--cpu_offload_checkpointing`"] * training.cpu_offload_checkpointing
        return [*changes, _OTHER_PROGRAMS]
    changes += ["`--gradient_checkpointing`"] * (not checkpoints)
    changes += ["`--fp8_scaled`"] * (not is_quantised)
    if not on_cpu:
        changes += _more_blocks(memory.blocks_to_swap, most_blocks)
    changes += ["leaving out `--checkpoint_keep`"] * (training.checkpoint_keep is not None)
    if not on_cpu:
        changes += ["`--cpu_offload_checkpointing`"] * (not training.cpu_offload_checkpointing)
    return [*changes, "a smaller `batch_size`", "a smaller `resolution` of the dataset"]


def rendering_changes(
    memory: Memory,
    place: Place,
    *,
    most_blocks: int,
    is_fp8_file: bool = False,
    on_cpu: bool = False,
    joined: bool = False,
) -> list[str]:
    """For the DiT in `infer` and `sample`; the fields as of `training_changes`.

    `joined` says that the model is called with and without the prompt together.
    """
    is_quantised = memory.fp8_scaled or is_fp8_file
    changes = ["`--batch_cond_uncond off`"] * joined
    changes += ["`--fp8_scaled`"] * (not is_quantised)
    if place is Place.DEVICE:
        changes += _more_blocks(memory.blocks_to_swap, most_blocks)
    elif memory.blocks_to_swap and not on_cpu:
        changes.append(f"fewer `--blocks_to_swap` than {memory.blocks_to_swap}")
    return [*changes, "a smaller picture (`--image_size`)", _OTHER_PROGRAMS]


def vae_changes(
    vae: VAEFile, place: Place, *, batch_size: int = 1, picture: str = "`resolution`"
) -> list[str]:
    """For encoding and decoding; `picture` names the option that its size comes from."""
    changes = ["`--vae_batch_size 1`"] * (batch_size > 1)
    tile = vae.vae_tile_size
    smaller = next((size for size in _TILE_SIZES if tile is None or size < tile), None)
    changes += [f"`--vae_tile_size {smaller}`"] * (smaller is not None)
    if vae.vae_chunk_size is None or vae.vae_chunk_size > _CHUNK_ROWS:
        changes.append(f"`--vae_chunk_size {_CHUNK_ROWS}`")
    return [*changes, f"a smaller {picture}", _OTHER_PROGRAMS]


def text_encoder_changes(encoders: TextEncoderFiles, place: Place) -> list[str]:
    """For Qwen and byT5, of which two layers are in memory at a time."""
    changes = ["`--fp8_vl`"] * (not encoders.fp8_vl)
    if place is Place.DEVICE:
        changes += ["`--text_encoder_cpu`"] * (not encoders.text_encoder_cpu)
    changes += ["`--text_encoder_batch_size 1`"] * (encoders.text_encoder_batch_size > 1)
    return [*changes, "shorter captions", _OTHER_PROGRAMS]


def general_changes(place: Place) -> list[str]:
    """Where no more is known than that memory ran out."""
    if place is Place.DEVICE:
        return ["`--fp8_scaled` with `--blocks_to_swap`", "in training, `--gradient_checkpointing`"]
    return ["a smaller `batch_size` or picture", _OTHER_PROGRAMS]


def _more_blocks(blocks_to_swap: int, most_blocks: int) -> list[str]:
    """The next number of streamed blocks that makes a difference; nothing where all that may be are streamed."""
    steps = sorted({min(step, most_blocks) for step in _SWAP_STEPS})
    following = next((step for step in steps if step > blocks_to_swap), None)
    return [] if following is None else [f"`--blocks_to_swap {following}`"]
