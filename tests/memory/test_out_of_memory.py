"""Out of memory is recognised whoever says it, and answered with the two changes that are left and worth most."""

from __future__ import annotations

import errno
from dataclasses import replace
from functools import partial

import pytest
import torch

from hyimg.config.models import Memory, TextEncoderFiles, TrainingMemory, VAEFile
from hyimg.errors import FullMemory, HyimgError, RunError, out_of_memory_place
from hyimg.memory.out_of_memory import (
    explain_oom,
    general_changes,
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
        (torch.OutOfMemoryError(CUDA_TEXT), FullMemory.DEVICE),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."), FullMemory.DEVICE),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            FullMemory.DEVICE,
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), FullMemory.DEVICE),
        (RuntimeError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"), FullMemory.DEVICE),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), FullMemory.DEVICE),
        (RuntimeError(CPU_TEXT + "allocate 4096 bytes. Error code 12"), FullMemory.HOST),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
            FullMemory.HOST,
        ),
        (RuntimeError("std::bad_alloc"), FullMemory.HOST),
        (RuntimeError("could not create a primitive"), FullMemory.HOST),
        (RuntimeError("could not create a primitive descriptor for the matmul primitive"), None),
        (MemoryError(), FullMemory.HOST),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), FullMemory.HOST),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (KeyError("CUDA out of memory"), None),
    ],
)
def test_out_of_memory_errors_are_recognised(error: Exception, place: FullMemory | None) -> None:
    assert out_of_memory_place(error) is place


def test_torchs_own_refusal_of_host_memory_is_recognised() -> None:
    refused = pytest.raises(RunError, match=r"^out of memory: tried to allocate \d+ bytes")
    with refused as raised, explain_oom(general_changes):
        torch.empty(1 << 60, dtype=torch.uint8)
    assert raised.value.exit_code == 1
    assert isinstance(raised.value.__cause__, RuntimeError), "the traceback still shows where"


def test_the_message_has_the_requested_size_and_two_changes() -> None:
    changes = partial(training_changes, Memory(), TrainingMemory(), most_blocks=37)
    with pytest.raises(RunError) as raised, explain_oom(changes):
        raise torch.OutOfMemoryError(CUDA_TEXT)
    assert raised.value.message == "out of GPU memory: tried to allocate 2.50 GiB"
    assert raised.value.hint == "try `--gradient_checkpointing` or `--fp8_scaled`"


@pytest.mark.parametrize("error", [ValueError("x"), HyimgError("a sentence"), KeyboardInterrupt()])
def test_other_errors_pass_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, explain_oom(general_changes):
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
        ["blocks_to_swap 32", "removing `--checkpoint_keep`"],
    ),
    (
        Memory(fp8_scaled=True, blocks_to_swap=37),
        TrainingMemory(cpu_offload_checkpointing=True),
        ["batch_size", "resolution"],
    ),
]


@pytest.mark.parametrize(("memory", "training", "expected"), TRAINING)
def test_training_gets_options_that_are_not_used_yet(
    memory: Memory, training: TrainingMemory, expected: list[str]
) -> None:
    changes = training_changes(memory, training, FullMemory.DEVICE, most_blocks=37)
    for change, part in zip(changes, expected, strict=False):
        assert part in change, changes


def test_the_advice_respects_the_models_limit_of_streamed_blocks() -> None:
    swap = partial(
        training_changes, training=TrainingMemory(gradient_checkpointing=True), place=FullMemory.DEVICE
    )
    fp8 = Memory(fp8_scaled=True)
    assert swap(fp8, most_blocks=3)[0] == "`--blocks_to_swap 3`"
    assert swap(replace(fp8, blocks_to_swap=3), most_blocks=3)[0] == "`--cpu_offload_checkpointing`"


def test_fp8_is_not_advised_for_an_fp8_file() -> None:
    training = partial(training_changes, Memory(), TrainingMemory(), FullMemory.DEVICE, most_blocks=37)
    rendering = partial(rendering_changes, Memory(), FullMemory.DEVICE, most_blocks=37)
    for advise in (training, rendering):
        assert any("fp8" in change for change in advise())
        assert not any("fp8" in change for change in advise(is_fp8_file=True))


def test_a_full_host_gets_advice_to_move_less_there() -> None:
    training = TrainingMemory(gradient_checkpointing=True, cpu_offload_checkpointing=True)
    changes = training_changes(Memory(blocks_to_swap=37), training, FullMemory.HOST, most_blocks=37)
    assert changes[:2] == ["`--fp8_scaled`", "a lower `--blocks_to_swap` than 37"]
    assert "removing `--cpu_offload_checkpointing`" in changes
    changes = rendering_changes(Memory(fp8_scaled=True, blocks_to_swap=9), FullMemory.HOST, most_blocks=37)
    assert changes[0] == "a lower `--blocks_to_swap` than 9"


def test_streaming_and_offloading_are_not_advised_on_the_cpu() -> None:
    changes = training_changes(Memory(), TrainingMemory(), FullMemory.HOST, most_blocks=37, on_cpu=True)
    assert changes[:2] == ["`--gradient_checkpointing`", "`--fp8_scaled`"]
    assert not any("swap" in change or "offload" in change for change in changes)


def test_advice_for_the_vae_is_batches_tiles_and_chunks() -> None:
    assert vae_changes(VAEFile(), FullMemory.DEVICE)[:2] == ["`--vae_tile_size 512`", "`--vae_chunk_size 16`"]
    assert vae_changes(VAEFile(), FullMemory.DEVICE, batch_size=4)[0] == "`--vae_batch_size 1`"
    done = VAEFile(vae_tile_size=256, vae_chunk_size=16)
    assert vae_changes(done, FullMemory.DEVICE, size="`--image_size`")[0] == "a smaller `--image_size`"
    assert vae_changes(replace(done, vae_tile_size=512), FullMemory.DEVICE)[0] == "`--vae_tile_size 256`"


def test_advice_for_the_text_encoder_is_fp8_and_the_cpu() -> None:
    files = TextEncoderFiles()
    assert text_encoder_changes(files, FullMemory.DEVICE)[:2] == ["`--fp8_vl`", "`--text_encoder_cpu`"]
    assert (
        text_encoder_changes(replace(files, fp8_vl=True), FullMemory.HOST)[0]
        == "`--text_encoder_batch_size 1`"
    )


def test_two_images_at_a_time_are_the_first_thing_to_give_up() -> None:
    changes = rendering_changes(Memory(), FullMemory.DEVICE, most_blocks=37, joined=True)
    assert changes[:2] == ["`--batch_cond_uncond off`", "`--fp8_scaled`"]
    assert "`--batch_cond_uncond off`" not in rendering_changes(Memory(), FullMemory.DEVICE, most_blocks=37)
