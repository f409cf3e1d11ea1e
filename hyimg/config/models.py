"""The model files, and how the models are held and computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hyimg.config.option import option


@dataclass(frozen=True, kw_only=True)
class DiTFile:
    """Model files."""

    dit: Path | None = option(
        None,
        is_input=True,
        pipeline_part="transformer",
        aliases=("pretrained_model_name_or_path",),
        help="DiT, a `.safetensors` file or a sharded folder with its index; original, ComfyUI or diffusers names",
    )


@dataclass(frozen=True, kw_only=True)
class TextEncoderFiles:
    """Text encoders."""

    text_encoder: Path | None = option(
        None,
        is_input=True,
        pipeline_part="text_encoder",
        help="Qwen2.5-VL-7B, a single `.safetensors` file (ComfyUI layout) or a Hugging Face folder",
    )
    byt5: Path | None = option(
        None,
        is_input=True,
        pipeline_part="text_encoder_2",
        help="byT5 glyph encoder, a `.safetensors` file or a Hugging Face folder",
    )
    tokenizer: Path | None = option(
        None,
        is_input=True,
        pipeline_part="tokenizer",
        aliases=("tokenizer_cache_dir",),
        help="folder with the Qwen tokenizer's files, or a `qwen.tiktoken` ranks file "
        "(not given: beside the encoder, then the package dashscope, then the hub)",
    )
    text_encoder_cpu: bool = option(False, help="run the text encoders on the CPU")
    fp8_vl: bool = option(
        False,
        help="hold the layers of Qwen2.5-VL in scaled fp8 (e4m3) while they are used: half the memory of the two "
        "layers that are on the device at a time, for states that differ by some percent (and a cache of its own)",
    )
    text_encoder_batch_size: int = option(
        8,
        minimum=1,
        help="captions of equal length that are encoded together (prompts that are rendered: one by one, so that no "
        "picture depends on its company)",
    )


@dataclass(frozen=True, kw_only=True)
class VAEFile:
    """VAE."""

    vae: Path | None = option(
        None,
        is_input=True,
        pipeline_part="vae",
        help="HunyuanImage-2.1 VAE, a `.safetensors` file or diffusers' folder; original or diffusers names",
    )
    vae_chunk_size: int | None = option(
        None,
        minimum=1,
        help="VAE convolutions in chunks of so many rows, to save memory (16 is a good value)",
    )
    vae_tile_size: int | None = option(
        None,
        minimum=128,
        multiple_of=32,
        help="VAE in overlapping tiles of so many pixels a side (512 is a good value): takes the least memory and, for "
        "pictures larger than a tile, about twice as long; the result is the same but for rounding",
    )


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Device and precision."""

    device: str | None = option(None, help="cuda, cuda:N, mps or cpu (not given: the best one there is)")
    mixed_precision: str = option(
        "bf16",
        choices=("no", "fp16", "bf16"),
        help="type in which the models compute; `no` is float32; fp16 trains with a scaled loss",
    )
    disable_mmap_load_safetensors: bool = option(
        False, help="read model files instead of mapping them into memory"
    )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory and speed of the DiT."""

    attn_mode: str = option(
        "torch",
        choices=("torch", "xformers", "flash", "sageattn"),
        synonyms={"sdpa": "torch"},
        help="attention backend; each but torch is a package of its own, and sageattn cannot train",
    )
    fp8_scaled: bool = option(
        False, help="hold the DiT's block weights in scaled fp8 (e4m3): half the memory of bf16"
    )
    blocks_to_swap: int = option(
        0,
        minimum=0,
        help="block units that live in host memory and are streamed to the GPU ahead of use, up to 37; "
        "a unit is one double block or two single blocks",
    )
    torch_compile: bool = option(
        False, help="compile the blocks: faster steps after a minute or so at the first ones"
    )


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Memory in training."""

    split_attn: bool = option(
        False, help="attention one image at a time, also where a batch's lengths are equal"
    )
    gradient_checkpointing: bool = option(
        False, help="recompute the blocks in the backward pass, to save memory"
    )
    checkpoint_keep: str | None = option(
        None,
        choices=("attention",),
        help="what gradient checkpointing keeps: `attention` recomputes no attention, for some memory "
        "(and switches checkpointing on)",
    )
    cpu_offload_checkpointing: bool = option(
        False,
        help="keep what gradient checkpointing saves in host memory (and switch checkpointing on)",
    )
