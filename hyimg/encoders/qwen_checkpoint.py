"""The language model of a Qwen2.5-VL checkpoint: its sizes and the names of the tensors that are read.

No torch. Names are those of the original release (`model.layers.0...`, which the single ComfyUI file keeps)
after a prefix, which newer Hugging Face folders lengthen (`model.language_model.layers.0...`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyimg.encoders.header_check import check_tensors, refuse_other_kind
from hyimg.errors import HyimgError
from hyimg.model.safetensors_file import Checkpoint, TensorInfo

# Width of an attention head in every Qwen2.5-VL (3B, 7B, 32B, 72B)
HEAD_DIM = 128
ROPE_THETA = 1e6
# transformers' default is 1e-5, and 0.01 off after 26 layers
RMS_EPS = 1e-6

# HunyuanImage takes `hidden_states[-3]`: these last layers, like the final norm and the head, are not run
NUM_UNUSED_LAYERS = 2

_EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class QwenArch:
    """The sizes of a Qwen2.5-VL language model; `prefix` stands before every tensor name.

    `num_layers` counts all layers of the model, of which the last two are never read.
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
        """Whether a tensor of this name belongs to the embedding or to a layer that is run."""
        if layer := re.match(re.escape(self.prefix) + r"layers\.(\d+)\.", name):
            return int(layer[1]) < self.num_read_layers
        return name.startswith(self.prefix + "embed_tokens.")

    def layer_prefix(self, layer: int) -> str:
        return f"{self.prefix}layers.{layer}."

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer, named as after `layer_prefix`."""
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
        """Every tensor that encoding reads, under its full name."""
        shapes: dict[str, tuple[int, ...]] = {self.embedding_name: (self.vocab, self.hidden)}
        for layer in range(self.num_read_layers):
            shapes.update({self.layer_prefix(layer) + k: shape for k, shape in self.layer_shapes().items()})
        return shapes


def check_qwen(path: Path | str) -> QwenArch:
    """The sizes of the language model in a file or folder, after a look at its headers only.

    Raises `HyimgError` for a file that is something else, and one that lists all tensors that are missing,
    misshapen or unknown among those that encoding reads.
    """
    return arch_of(Checkpoint.open(path))


def arch_of(checkpoint: Checkpoint) -> QwenArch:
    """As `check_qwen`, of a checkpoint that is open."""
    path, tensors = checkpoint.path, checkpoint.tensors
    refuse_other_kind(path, tensors, "qwen")
    arch = _arch_from(path, tensors, _head_dim(checkpoint))
    found = {name: info for name, info in tensors.items() if arch.reads(name)}
    check_tensors(path, arch.read_shapes(), found, model="the language model of Qwen2.5-VL")
    return arch


def _arch_from(path: Path, tensors: Mapping[str, TensorInfo], told_head_dim: int | None) -> QwenArch:
    """Sizes from the shapes; that each tensor is there and fits is checked afterwards."""
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
    if num_layers <= NUM_UNUSED_LAYERS:
        raise HyimgError(f"`{path}` has {num_layers} layers, and at least {NUM_UNUSED_LAYERS + 1} are needed")
    vocab, hidden = shape(_EMBEDDING)
    q_width, _ = shape("layers.0.self_attn.q_proj.weight")
    kv_width, _ = shape("layers.0.self_attn.k_proj.weight")
    head_dim = told_head_dim or HEAD_DIM
    if head_dim % 2 or q_width % head_dim or kv_width % head_dim or q_width % kv_width:
        raise HyimgError(
            f"`{path}` has queries of {q_width} and keys of {kv_width} values, which do not divide into "
            f"heads of {head_dim}",
            hint="a model with other heads says so in its metadata (`meta`) or in `config.json` beside it",
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
    """The width of a head, which no shape tells: from the metadata or a folder's `config.json`, or None.

    The metadata holds `meta`, JSON with `{"config": {"hidden": 64, "heads": 4}}`; `config.json` is
    transformers', with the sizes at the top or in `text_config`.
    """
    try:
        if "meta" in checkpoint.metadata:
            config: dict[str, Any] = json.loads(checkpoint.metadata["meta"])["config"]
            return max(1, int(config["hidden"]) // int(config["heads"]))
        config_path = checkpoint.path / "config.json"
        if config_path.is_file():
            config = json.loads(config_path.read_text(encoding="utf-8"))
            config = config.get("text_config", config)
            return max(1, int(config["hidden_size"]) // int(config["num_attention_heads"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        raise HyimgError(f"what `{checkpoint.path}` says about its attention heads cannot be read") from None
    return None
