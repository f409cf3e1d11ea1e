"""Options about the model files, memory and precision."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hyimg.config.option import Fact, Given, Unless, option, required

# In `train`, the encoders and the VAE may be given only to identify the cache
_ENCODES_TEXT = (Given("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"),)
_USES_VAE = (
    Given("cache_latents", "cache_latents_to_disk", "sample_prompts"),
    Unless("output_type", "latent"),
)
_RUNS_DIT = (
    Unless("latent_path"),
    Given("prompt", "from_file", "from_image", "interactive", "dataset_config", "sample_prompts"),
)


@dataclass(frozen=True, kw_only=True)
class DiTFile:
    """Model files."""

    dit: Path | None = option(
        None,
        is_input=True,
        pipeline_part="transformer",
        aliases=("pretrained_model_name_or_path",),
        help="DiT: a `.safetensors` file or a sharded folder with its index; original, ComfyUI or diffusers names",
    )


@dataclass(frozen=True, kw_only=True)
class RequiredDiT(DiTFile):
    """Model files."""

    dit: Path = required(DiTFile, "dit")


@dataclass(frozen=True, kw_only=True)
class PromptEncoders:
    """Text encoders."""

    text_encoder: Path | None = option(
        None,
        is_input=True,
        pipeline_part="text_encoder",
        help="Qwen2.5-VL-7B: a single `.safetensors` file (ComfyUI layout) or a Hugging Face folder",
    )
    byt5: Path | None = option(
        None,
        is_input=True,
        pipeline_part="text_encoder_2",
        help="byT5 glyph encoder: a `.safetensors` file or a Hugging Face folder",
    )
    tokenizer: Path | None = option(
        None,
        is_input=True,
        pipeline_part="tokenizer",
        aliases=("tokenizer_cache_dir",),
        help="folder with the Qwen tokenizer's files, or a `qwen.tiktoken` ranks file "
        "(not given: next to the encoder, then the package dashscope, then the hub)",
    )
    text_encoder_cpu: bool = option(False, help="run the text encoders on the CPU", needs=_ENCODES_TEXT)
    fp8_vl: bool = option(
        False,
        help="hold Qwen2.5-VL's layers in scaled fp8 (e4m3) on the device: halves the memory of the two layers there "
        "at a time; hidden states differ by a few percent and have a separate cache",
        needs=(Given("text_encoder"),),
    )
    text_encoder_dtype: str = option(
        "auto",
        choices=("auto", "bf16", "fp32"),
        synonyms={"bfloat16": "bf16", "float32": "fp32", "float": "fp32"},
        refused=dict.fromkeys(("fp16", "float16"), "the hidden states of Qwen2.5-VL overflow in float16"),
        help="compute type of Qwen2.5-VL; `auto` follows `--mixed_precision no` or `bf16`, else it is bf16 on devices "
        "that support it in hardware and float32 elsewhere. `auto` accepts cached texts of any type, `bf16` and `fp32` "
        "only those of their own",
    )


@dataclass(frozen=True, kw_only=True)
class TextEncoderFiles(PromptEncoders):
    """Text encoders."""

    text_encoder_batch_size: int = option(
        8,
        minimum=1,
        help="captions of equal length encoded together",
        needs=_ENCODES_TEXT,
        means_nothing=(0,),
        reference_default=None,
        differs="the dataset's batch size there",
    )


@dataclass(frozen=True, kw_only=True)
class RequiredTextEncoders(TextEncoderFiles):
    """Text encoders."""

    text_encoder: Path = required(TextEncoderFiles, "text_encoder")
    byt5: Path = required(TextEncoderFiles, "byt5")


@dataclass(frozen=True, kw_only=True)
class VAEFile:
    """VAE."""

    vae: Path | None = option(
        None,
        is_input=True,
        pipeline_part="vae",
        help="HunyuanImage-2.1 VAE: a `.safetensors` file or a diffusers folder; original or diffusers names",
    )
    vae_chunk_size: int | None = option(
        None,
        minimum=1,
        help="run VAE convolutions in chunks of this many rows, to save memory (16 is a good value)",
        needs=_USES_VAE,
        means_nothing=(0,),
    )
    vae_tile_size: int | None = option(
        None,
        minimum=128,
        multiple_of=32,
        help="run the VAE in overlapping tiles of this many pixels a side (512 is a good value): needs the least "
        "memory and, for images larger than a tile, about twice the time; equal up to rounding",
        needs=_USES_VAE,
        means_nothing=(0,),
    )


@dataclass(frozen=True, kw_only=True)
class RequiredVAE(VAEFile):
    """VAE."""

    vae: Path = required(VAEFile, "vae")


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Device and precision."""

    device: str | None = option(
        None, help="cuda, cuda:N, xpu, xpu:N, mps or cpu (not given: the best available)"
    )
    mixed_precision: str = option(
        "auto",
        reference_default="no",
        differs="float32 takes twice the memory of bf16",
        choices=("auto", "no", "fp16", "bf16"),
        help="compute type of the models; `no` is float32; fp16 trains with loss scaling; `auto` is bf16 on devices "
        "that support it in hardware, else float32 on a CPU and fp16 on a GPU",
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
        help="attention backend; all but torch need an extra package; sageattn cannot train",
        needs=_RUNS_DIT,
        means_nothing=("",),
    )
    fp8_scaled: bool = option(
        False,
        help="hold the DiT's block weights in scaled fp8 (e4m3), half the memory of bf16",
        needs=_RUNS_DIT,
    )
    blocks_to_swap: int = option(
        0,
        minimum=0,
        help="block units kept in host memory and streamed to the GPU before use, up to 37; "
        "a unit is one double block or two single blocks",
        needs=(*_RUNS_DIT, Fact("on_gpu", "the DiT is on the CPU")),
        means_nothing=(0,),
    )
    torch_compile: bool = option(
        False,
        help="compile the blocks: the first steps take a minute or so, later ones are faster",
        needs=_RUNS_DIT,
    )


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Memory in training."""

    split_attn: bool = option(
        False, help="compute attention one image at a time, even where a batch's lengths are equal"
    )
    gradient_checkpointing: bool = option(
        False,
        help="recompute the blocks in the backward pass to save memory",
        needs=(Unless("checkpoint_keep"), Unless("cpu_offload_checkpointing")),
    )
    checkpoint_keep: str | None = option(
        None,
        choices=("attention",),
        help="what gradient checkpointing stores: with `attention`, attention is not recomputed, for some memory "
        "(implies checkpointing)",
    )
    cpu_offload_checkpointing: bool = option(
        False,
        help="offload what gradient checkpointing stores to host memory (implies checkpointing)",
        needs=(Fact("on_gpu", "activations are in host memory already"),),
    )

    @property
    def checkpoints_blocks(self) -> bool:
        """Whether blocks are recomputed in the backward pass."""
        return (
            self.gradient_checkpointing or self.checkpoint_keep is not None or self.cpu_offload_checkpointing
        )
