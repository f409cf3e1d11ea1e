"""The shape of every tensor of a DiT, from its sizes alone: what a header is checked against without torch."""

from __future__ import annotations

from collections.abc import Iterator

from hyimg.model.architecture import DiTArch, Shapes
from hyimg.model.keys import linear_modules

# The sinusoid that a timestep becomes, in all three embedders
_FREQUENCIES = 256


def dit_shapes(arch: DiTArch) -> Shapes:
    """Original name -> shape of each parameter of `hyimg.model.dit.DiT(arch)`."""
    hidden = arch.hidden
    shapes: dict[str, tuple[int, ...]] = {
        "img_in.proj.weight": (hidden, arch.latent_channels, 1, 1),
        "img_in.proj.bias": (hidden,),
        "byt5_in.layernorm.weight": (arch.byt5_dim,),
        "byt5_in.layernorm.bias": (arch.byt5_dim,),
    }
    for name, in_features, out_features in _linears(arch):
        shapes[f"{name}.weight"] = (out_features, in_features)
        shapes[f"{name}.bias"] = (out_features,)
    for block in range(arch.refiner_depth):
        for norm in ("norm1", "norm2"):
            for leaf in ("weight", "bias"):
                shapes[f"txt_in.individual_token_refiner.blocks.{block}.{norm}.{leaf}"] = (hidden,)
    head = (arch.head_dim,)
    for block in range(arch.num_double):
        for side in ("img", "txt"):
            shapes[f"double_blocks.{block}.{side}_attn_q_norm.weight"] = head
            shapes[f"double_blocks.{block}.{side}_attn_k_norm.weight"] = head
    for block in range(arch.num_single):
        shapes[f"single_blocks.{block}.q_norm.weight"] = head
        shapes[f"single_blocks.{block}.k_norm.weight"] = head
    return shapes


def _linears(arch: DiTArch) -> Iterator[tuple[str, int, int]]:
    """(name, in_features, out_features) of every Linear."""
    hidden = arch.hidden
    for module in linear_modules(arch):
        yield module.name, module.in_features, module.out_features
    embedders = ["time_in", "txt_in.t_embedder"]
    embedders += ["time_r_in"] * arch.meanflow + ["guidance_in"] * arch.guidance_embed
    for embedder in embedders:
        yield f"{embedder}.mlp.0", _FREQUENCIES, hidden
        yield f"{embedder}.mlp.2", hidden, hidden
    yield "txt_in.input_embedder", arch.text_dim, hidden
    yield "txt_in.c_embedder.linear_1", arch.text_dim, hidden
    yield "txt_in.c_embedder.linear_2", hidden, hidden
    for block in range(arch.refiner_depth):
        prefix = f"txt_in.individual_token_refiner.blocks.{block}"
        yield f"{prefix}.self_attn_qkv", hidden, 3 * hidden
        yield f"{prefix}.self_attn_proj", hidden, hidden
        yield f"{prefix}.mlp.fc1", hidden, arch.mlp_hidden
        yield f"{prefix}.mlp.fc2", arch.mlp_hidden, hidden
        yield f"{prefix}.adaLN_modulation.1", hidden, 2 * hidden
    yield "byt5_in.fc1", arch.byt5_dim, arch.byt5_hidden
    yield "byt5_in.fc2", arch.byt5_hidden, arch.byt5_hidden
    yield "byt5_in.fc3", arch.byt5_hidden, hidden
    yield "final_layer.linear", hidden, arch.latent_channels
    yield "final_layer.adaLN_modulation.1", hidden, 2 * hidden
