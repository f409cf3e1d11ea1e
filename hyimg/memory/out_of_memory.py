"""Out-of-memory errors, with the two changes that help most.

    with explain_oom(partial(training_changes, config.memory, config.training_memory, ...)):
        train_loop(run)

If the device's memory ran out, more of the model should be elsewhere; if the host's, less. The command line uses this
without torch, whose errors are recognised by name and text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from hyimg.config.models import Memory, PromptEncoders, TextEncoderFiles, TrainingMemory, VAEFile
from hyimg.errors import FullMemory, HyimgError, RunError, out_of_memory_place

# (where memory ran out) -> changes, the most useful first, each as the end of "try ..."
Changes = Callable[[FullMemory], Sequence[str]]

_ASKED_FOR = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)")

# The guide's numbers of streamed blocks for 24, 12 and 8 GB, and one in between
_SWAP_STEPS = (9, 18, 32, 37)
_CHUNK_ROWS = 16
_TILE_SIZES = (512, 256)
_OTHER_PROGRAMS = "closing other programs that use the same memory"


def out_of_memory_error(error: BaseException, place: FullMemory, changes: Sequence[str]) -> RunError:
    """The error, with the requested size if the allocator gave it, and the first two changes as a hint."""
    memory = "GPU memory" if place is FullMemory.DEVICE else "memory"
    asked = _ASKED_FOR.search(str(error))
    size = f": tried to allocate {asked[1]}" if asked else ""
    return RunError(f"out of {memory}{size}", hint=f"try {' or '.join(changes[:2])}")


@contextmanager
def explain_oom(changes: Changes) -> Iterator[None]:
    """Turns an out-of-memory error in the block into a RunError with the changes; other errors pass through."""
    try:
        yield
    except HyimgError:
        raise
    except Exception as error:
        place = out_of_memory_place(error)
        if place is None:
            raise
        raise out_of_memory_error(error, place, changes(place)) from error


# ---- changes that help, the most useful first, without those already made


def training_changes(
    memory: Memory,
    training: TrainingMemory,
    place: FullMemory,
    *,
    most_blocks: int,
    is_fp8_file: bool = False,
    on_cpu: bool = False,
) -> list[str]:
    """For `train`. `most_blocks` is the model's limit of `--blocks_to_swap`, `is_fp8_file` whether its DiT is fp8.

    With `on_cpu` the model is in host memory already, so that moving parts of it there saves nothing.
    """
    is_quantised = memory.fp8_scaled or is_fp8_file
    changes = []
    if place is FullMemory.HOST and not on_cpu:
        changes += ["`--fp8_scaled`"] * (not is_quantised)
        changes += [f"a lower `--blocks_to_swap` than {memory.blocks_to_swap}"] * bool(memory.blocks_to_swap)
        changes += ["removing `--cpu_offload_checkpointing`"] * training.cpu_offload_checkpointing
        return [*changes, _OTHER_PROGRAMS]
    changes += ["`--gradient_checkpointing`"] * (not training.checkpoints_blocks)
    changes += ["`--fp8_scaled`"] * (not is_quantised)
    if not on_cpu:
        changes += _more_blocks(memory.blocks_to_swap, most_blocks)
    changes += ["removing `--checkpoint_keep`"] * (training.checkpoint_keep is not None)
    if not on_cpu:
        changes += ["`--cpu_offload_checkpointing`"] * (not training.cpu_offload_checkpointing)
    return [*changes, "a smaller `batch_size`", "a smaller `resolution` of the dataset"]


def rendering_changes(
    memory: Memory,
    place: FullMemory,
    *,
    most_blocks: int,
    is_fp8_file: bool = False,
    on_cpu: bool = False,
    joined: bool = False,
) -> list[str]:
    """For the DiT in `infer` and `sample`; arguments as in `training_changes`.

    With `joined`, one call of the model computes both with and without the prompt.
    """
    is_quantised = memory.fp8_scaled or is_fp8_file
    changes = ["`--batch_cond_uncond off`"] * joined
    changes += ["`--fp8_scaled`"] * (not is_quantised)
    if place is FullMemory.DEVICE:
        changes += _more_blocks(memory.blocks_to_swap, most_blocks)
    elif memory.blocks_to_swap and not on_cpu:
        changes.append(f"a lower `--blocks_to_swap` than {memory.blocks_to_swap}")
    return [*changes, "a smaller image (`--image_size`)", _OTHER_PROGRAMS]


def vae_changes(
    vae: VAEFile, place: FullMemory, *, batch_size: int = 1, size: str = "`resolution`"
) -> list[str]:
    """For encoding and decoding; `size` names the option for the size of images."""
    changes = ["`--vae_batch_size 1`"] * (batch_size > 1)
    tile = vae.vae_tile_size
    smaller = next((size for size in _TILE_SIZES if tile is None or size < tile), None)
    changes += [f"`--vae_tile_size {smaller}`"] * (smaller is not None)
    if vae.vae_chunk_size is None or vae.vae_chunk_size > _CHUNK_ROWS:
        changes.append(f"`--vae_chunk_size {_CHUNK_ROWS}`")
    return [*changes, f"a smaller {size}", _OTHER_PROGRAMS]


def text_encoder_changes(encoders: PromptEncoders, place: FullMemory) -> list[str]:
    """For Qwen and byT5, which have two layers in memory at a time."""
    changes = ["`--fp8_vl`"] * (not encoders.fp8_vl)
    if place is FullMemory.DEVICE:
        changes += ["`--text_encoder_cpu`"] * (not encoders.text_encoder_cpu)
    if isinstance(encoders, TextEncoderFiles) and encoders.text_encoder_batch_size > 1:
        changes.append("`--text_encoder_batch_size 1`")
    return [*changes, "shorter captions", _OTHER_PROGRAMS]


def general_changes(place: FullMemory) -> list[str]:
    """If no more is known."""
    if place is FullMemory.DEVICE:
        return ["`--fp8_scaled` with `--blocks_to_swap`", "in training, `--gradient_checkpointing`"]
    return ["a smaller `batch_size` or image", _OTHER_PROGRAMS]


def _more_blocks(blocks_to_swap: int, most_blocks: int) -> list[str]:
    """The next number of streamed blocks that makes a difference, if there is one."""
    steps = sorted({min(step, most_blocks) for step in _SWAP_STEPS})
    following = next((step for step in steps if step > blocks_to_swap), None)
    return [] if following is None else [f"`--blocks_to_swap {following}`"]
