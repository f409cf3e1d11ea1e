"""The language model of a Qwen2.5-VL checkpoint: its sizes and the names of its tensors. No torch.

Names are those of the original release and ComfyUI's file (`model.layers.0...`) after a prefix, which is longer in
newer Hugging Face folders (`model.language_model.layers.0...`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyimg.checkpoints.header_check import check_tensors, refuse_other_kind
from hyimg.checkpoints.safetensors_file import Checkpoint, TensorInfo
from hyimg.config.documents import DOCUMENT_BYTES, parse_json, read_bounded
from hyimg.errors import HyimgError

# Head size of every Qwen2.5-VL (3B, 7B, 32B, 72B)
HEAD_DIM = 128
ROPE_THETA = 1e6
# transformers' default of 1e-5 causes a difference of 0.01 after 26 layers
RMS_EPS = 1e-6

# HunyuanImage uses `hidden_states[-3]`: the last layers, the final norm and the head are not run
NUM_UNUSED_LAYERS = 2

_EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class QwenArch:
    """The sizes of a Qwen2.5-VL language model, and the `prefix` of its tensors' names.

    `num_layers` counts all layers, of which the last two are never read.
    """

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    prefix: str = "model."
    rope_theta: float = ROPE_THETA
    rms_eps: float = RMS_EPS

    @property
    def num_read_layers(self) -> int:
        return self.num_layers - NUM_UNUSED_LAYERS

    @property
    def embedding_name(self) -> str:
        return self.prefix + _EMBEDDING

    def reads(self, name: str) -> bool:
        """Whether the tensor belongs to the embedding or to a layer that is run."""
        if layer := re.match(re.escape(self.prefix) + r"layers\.(\d+)\.", name):
            return int(layer[1]) < self.num_read_layers
        return name.startswith(self.prefix + "embed_tokens.")

    def layer_prefix(self, layer: int) -> str:
        return f"{self.prefix}layers.{layer}."

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer, by their names after `layer_prefix`."""
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "input_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (heads, self.hidden),
            "self_attn.q_proj.bias": (heads,),
            "self_attn.k_proj.weight": (kv_heads, self.hidden),
            "self_attn.k_proj.bias": (kv_heads,),
            "self_attn.v_proj.weight": (kv_heads, self.hidden),
            "self_attn.v_proj.bias": (kv_heads,),
            "self_attn.o_proj.weight": (self.hidden, heads),
            "post_attention_layernorm.weight": (self.hidden,),
            "mlp.gate_proj.weight": (self.intermediate, self.hidden),
            "mlp.up_proj.weight": (self.intermediate, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.intermediate),
        }

    def read_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that encoding reads, by its full name."""
        shapes: dict[str, tuple[int, ...]] = {self.embedding_name: (self.vocab, self.hidden)}
        for layer in range(self.num_read_layers):
            shapes.update({self.layer_prefix(layer) + k: shape for k, shape in self.layer_shapes().items()})
        return shapes


def check_qwen(path: Path | str) -> QwenArch:
    """The sizes of the language model in a file or folder; only headers are read.

    Raises `HyimgError` for a file of another kind, or that lists all missing, misshapen and unknown tensors among those
    that encoding reads.
    """
    return arch_of(Checkpoint.open(path))


def arch_of(checkpoint: Checkpoint) -> QwenArch:
    """As `check_qwen`, for an open checkpoint."""
    path, tensors = checkpoint.path, checkpoint.tensors
    refuse_other_kind(path, tensors, "qwen")
    arch = _arch_from(path, tensors, _head_dim(checkpoint))
    found = {name: info for name, info in tensors.items() if arch.reads(name)}
    check_tensors(path, arch.read_shapes(), found, model="the language model of Qwen2.5-VL")
    return arch


def _arch_from(path: Path, tensors: Mapping[str, TensorInfo], known_head_dim: int | None) -> QwenArch:
    """Sizes from the shapes; the caller checks that each tensor exists and fits."""
    prefixes = [name.removesuffix(_EMBEDDING) for name in tensors if name.endswith(_EMBEDDING)]
    if len(prefixes) != 1:
        raise HyimgError(f"`{path}` has {len(prefixes)} tensors `{_EMBEDDING}`, where a text encoder has one")
    prefix = prefixes[0]

    def shape(name: str) -> tuple[int, int]:
        info = tensors.get(prefix + name)
        if info is None or len(info.shape) != 2 or 0 in info.shape:
            raise HyimgError(f"`{path}` has no matrix `{prefix}{name}`, so its sizes cannot be read")
        return info.shape[0], info.shape[1]

    layer = re.compile(re.escape(prefix) + r"layers\.(\d+)\.")
    num_layers = 1 + max((int(m[1]) for name in tensors if (m := layer.match(name))), default=-1)
    num_layers = min(num_layers, len(tensors))  # a name may have a huge number
    if num_layers <= NUM_UNUSED_LAYERS:
        raise HyimgError(f"`{path}` has {num_layers} layers, but at least {NUM_UNUSED_LAYERS + 1} are needed")
    vocab, hidden = shape(_EMBEDDING)
    q_width, _ = shape("layers.0.self_attn.q_proj.weight")
    kv_width, _ = shape("layers.0.self_attn.k_proj.weight")
    head_dim = known_head_dim or HEAD_DIM
    if head_dim % 2 or q_width % head_dim or kv_width % head_dim or q_width % kv_width:
        raise HyimgError(
            f"`{path}` has queries of {q_width} and keys of {kv_width} values, which do not divide into "
            f"heads of {head_dim}",
            hint="give another number of heads in the file's metadata (`meta`) or in `config.json` next to it",
        )
    return QwenArch(
        hidden=hidden,
        num_layers=num_layers,
        num_heads=q_width // head_dim,
        num_kv_heads=kv_width // head_dim,
        head_dim=head_dim,
        intermediate=shape("layers.0.mlp.gate_proj.weight")[0],
        vocab=vocab,
        prefix=prefix,
    )


def _head_dim(checkpoint: Checkpoint) -> int | None:
    """The size of a head, which no shape shows: from the metadata or a folder's `config.json`, or None.

    The metadata holds `meta`, JSON with `{"config": {"hidden": 64, "heads": 4}}`; `config.json` is
    transformers', with the sizes at the top or in `text_config`.
    """
    try:
        if "meta" in checkpoint.metadata:
            config: dict[str, Any] = parse_json(checkpoint.metadata["meta"], "`meta`")["config"]
            return max(1, int(config["hidden"]) // int(config["heads"]))
        config_path = checkpoint.path / "config.json"
        if config_path.is_file():
            config = parse_json(read_bounded(config_path, DOCUMENT_BYTES), "it")
            config = config.get("text_config", config)
            return max(1, int(config["hidden_size"]) // int(config["num_attention_heads"]))
    except OSError as error:
        raise HyimgError(f"`{error.filename}` cannot be read: {error.strerror}") from None
    except (HyimgError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        raise HyimgError(f"the attention heads given in `{checkpoint.path}` cannot be read") from None
    return None
