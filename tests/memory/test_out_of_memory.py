"""Out of memory is recognised whoever says it, and answered with the two changes that are left and worth most."""

from __future__ import annotations

import errno
from dataclasses import replace
from functools import partial

import pytest
import torch

from hyimg.config.models import Memory, TextEncoderFiles, TrainingMemory, VAEFile
from hyimg.errors import HyimgError, RunError
from hyimg.memory.out_of_memory import (
    Place,
    explained,
    general_changes,
    out_of_memory_place,
    rendering_changes,
    text_encoder_changes,
    training_changes,
    vae_changes,
)

CUDA_TEXT = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 7.79 GiB of which"
CPU_TEXT = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
)


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (torch.OutOfMemoryError(CUDA_TEXT), Place.DEVICE),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."), Place.DEVICE),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), Place.DEVICE),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), Place.DEVICE),
        (RuntimeError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"), Place.DEVICE),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), Place.DEVICE),
        (RuntimeError(CPU_TEXT + "allocate 4096 bytes. Error code 12"), Place.HOST),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), Place.HOST),
        (MemoryError(), Place.HOST),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Place.HOST),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (KeyError("CUDA out of memory"), None),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, place: Place | None) -> None:
    assert out_of_memory_place(error) is place


def test_torchs_own_refusal_of_host_memory_is_recognised() -> None:
    refused = pytest.raises(RunError, match=r"^out of memory: tried to allocate \d+ bytes")
    with refused as raised, explained(general_changes):
        torch.empty(1 << 60, dtype=torch.uint8)
    assert raised.value.exit_code == 1
    assert isinstance(raised.value.__cause__, RuntimeError), "the traceback still shows where"


def test_the_message_says_how_much_was_asked_for_and_two_changes() -> None:
    changes = partial(training_changes, Memory(), TrainingMemory(), most_blocks=37)
    with pytest.raises(RunError) as raised, explained(changes):
        raise torch.OutOfMemoryError(CUDA_TEXT)
    assert raised.value.message == "out of GPU memory: tried to allocate 2.50 GiB"
    assert raised.value.hint == "try `--gradient_checkpointing` or `--fp8_scaled`"


@pytest.mark.parametrize("error", [ValueError("x"), HyimgError("a sentence"), KeyboardInterrupt()])
def test_other_errors_pass_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, explained(general_changes):
        raise error
    assert raised.value is error


TRAINING = [
    (Memory(), TrainingMemory(), ["gradient_checkpointing", "fp8_scaled"]),
    (Memory(), TrainingMemory(gradient_checkpointing=True), ["fp8_scaled", "blocks_to_swap 9"]),
    (Memory(), TrainingMemory(checkpoint_keep="attention"), ["fp8_scaled", "blocks_to_swap 9"]),
    (
        Memory(fp8_scaled=True, blocks_to_swap=9),
        TrainingMemory(gradient_checkpointing=True),
        ["blocks_to_swap 18", "cpu_offload_checkpointing"],
    ),
    (
        Memory(fp8_scaled=True, blocks_to_swap=20),
        TrainingMemory(checkpoint_keep="attention"),
        ["blocks_to_swap 32", "leaving out `--checkpoint_keep`"],
    ),
    (
        Memory(fp8_scaled=True, blocks_to_swap=37),
        TrainingMemory(cpu_offload_checkpointing=True),
        ["batch_size", "resolution"],
    ),
]


@pytest.mark.parametrize(("memory", "training", "expected"), TRAINING)
def test_training_is_told_what_is_not_done_yet(
    memory: Memory, training: TrainingMemory, expected: list[str]
) -> None:
    changes = training_changes(memory, training, Place.DEVICE, most_blocks=37)
    for change, part in zip(changes, expected, strict=False):
        assert part in change, changes


def test_a_small_model_is_not_told_to_stream_more_than_it_has() -> None:
    swap = partial(training_changes, training=TrainingMemory(gradient_checkpointing=True), place=Place.DEVICE)
    fp8 = Memory(fp8_scaled=True)
    assert swap(fp8, most_blocks=3)[0] == "`--blocks_to_swap 3`"
    assert swap(replace(fp8, blocks_to_swap=3), most_blocks=3)[0] == "`--cpu_offload_checkpointing`"


def test_a_file_that_is_fp8_is_not_to_be_quantised_again() -> None:
    training = partial(training_changes, Memory(), TrainingMemory(), Place.DEVICE, most_blocks=37)
    rendering = partial(rendering_changes, Memory(), Place.DEVICE, most_blocks=37)
    for advise in (training, rendering):
        assert any("fp8" in change for change in advise())
        assert not any("fp8" in change for change in advise(is_fp8_file=True))


def test_a_full_host_is_told_to_move_less_there() -> None:
    training = TrainingMemory(gradient_checkpointing=True, cpu_offload_checkpointing=True)
    changes = training_changes(Memory(blocks_to_swap=37), training, Place.HOST, most_blocks=37)
    assert changes[:2] == ["`--fp8_scaled`", "fewer `--blocks_to_swap` than 37"]
    assert "leaving out `--cpu_offload_checkpointing`" in changes
    changes = rendering_changes(Memory(fp8_scaled=True, blocks_to_swap=9), Place.HOST, most_blocks=37)
    assert changes[0] == "fewer `--blocks_to_swap` than 9"


def test_on_the_cpu_nothing_is_moved_to_the_host() -> None:
    changes = training_changes(Memory(), TrainingMemory(), Place.HOST, most_blocks=37, on_cpu=True)
    assert changes[:2] == ["`--gradient_checkpointing`", "`--fp8_scaled`"]
    assert not any("swap" in change or "offload" in change for change in changes)


def test_the_vae_is_told_of_batches_tiles_and_chunks() -> None:
    assert vae_changes(VAEFile(), Place.DEVICE)[:2] == ["`--vae_tile_size 512`", "`--vae_chunk_size 16`"]
    assert vae_changes(VAEFile(), Place.DEVICE, batch_size=4)[0] == "`--vae_batch_size 1`"
    done = VAEFile(vae_tile_size=256, vae_chunk_size=16)
    assert vae_changes(done, Place.DEVICE, picture="`--image_size`")[0] == "a smaller `--image_size`"
    assert vae_changes(replace(done, vae_tile_size=512), Place.DEVICE)[0] == "`--vae_tile_size 256`"


def test_the_text_encoder_is_told_of_fp8_and_the_cpu() -> None:
    files = TextEncoderFiles()
    assert text_encoder_changes(files, Place.DEVICE)[:2] == ["`--fp8_vl`", "`--text_encoder_cpu`"]
    assert text_encoder_changes(replace(files, fp8_vl=True), Place.HOST)[0] == "`--text_encoder_batch_size 1`"


def test_two_images_at_a_time_are_the_first_thing_to_give_up() -> None:
    changes = rendering_changes(Memory(), Place.DEVICE, most_blocks=37, joined=True)
    assert changes[:2] == ["`--batch_cond_uncond off`", "`--fp8_scaled`"]
    assert "`--batch_cond_uncond off`" not in rendering_changes(Memory(), Place.DEVICE, most_blocks=37)
