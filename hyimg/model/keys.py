"""The names that checkpoints give to the model's tensors: original, ComfyUI's and diffusers'. No torch.

The original names are this project's own; one table tells the other two. Where diffusers splits a tensor (q,
k, v) its parts are rows, in order, and its final adaLN has scale before shift. golden/keymap.json lists all.
A fourth form, original names with split tensors, is what Tencent's code has in memory (`hyimage/models/hunyuan/
modules/models.py`), and so what its fp8 files, which are loaded as they are, must hold.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from hyimg.model.architecture import DiTArch

# What the names of a whole model may begin with; the last is nothing
_DIT_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_VAE_PREFIXES = ("vae.", "first_stage_model.", "")

# The table's columns; `*` is a block's number, braces hold the parts of a split tensor, and a module stands
# for its weight and its bias
_FORMATS = ("original", "comfyui", "diffusers")
_NAMES_OUTSIDE = """
    byt5_in.layernorm       byt5_in.layernorm       context_embedder_2.norm
    byt5_in.fc1             byt5_in.fc1             context_embedder_2.linear_1
    byt5_in.fc2             byt5_in.fc2             context_embedder_2.linear_2
    byt5_in.fc3             byt5_in.fc3             context_embedder_2.linear_3
    img_in.proj             img_in.proj             x_embedder.proj
    time_in.mlp.0           time_in.in_layer        time_guidance_embed.timestep_embedder.linear_1
    time_in.mlp.2           time_in.out_layer       time_guidance_embed.timestep_embedder.linear_2
    time_r_in.mlp.0         time_r_in.in_layer      time_guidance_embed.timestep_embedder_r.linear_1
    time_r_in.mlp.2         time_r_in.out_layer     time_guidance_embed.timestep_embedder_r.linear_2
    guidance_in.mlp.0       guidance_in.in_layer    time_guidance_embed.guidance_embedder.linear_1
    guidance_in.mlp.2       guidance_in.out_layer   time_guidance_embed.guidance_embedder.linear_2
    final_layer.linear      final_layer.linear      proj_out
    final_layer.adaLN_modulation.1  final_layer.adaLN_modulation.1  norm_out.linear
"""
_NAMES_IN_TEXT_INPUT = """
    input_embedder          input_embedder          proj_in
    t_embedder.mlp.0        t_embedder.in_layer     time_text_embed.timestep_embedder.linear_1
    t_embedder.mlp.2        t_embedder.out_layer    time_text_embed.timestep_embedder.linear_2
    c_embedder.linear_1     c_embedder.in_layer     time_text_embed.text_embedder.linear_1
    c_embedder.linear_2     c_embedder.out_layer    time_text_embed.text_embedder.linear_2
"""
_NAMES_IN_REFINER_BLOCK = """
    norm1                   norm1                   norm1
    self_attn_qkv           self_attn.qkv           attn.to_{q,k,v}
    self_attn_proj          self_attn.proj          attn.to_out.0
    norm2                   norm2                   norm2
    mlp.fc1                 mlp.0                   ff.net.0.proj
    mlp.fc2                 mlp.2                   ff.net.2
    adaLN_modulation.1      adaLN_modulation.1      norm_out.linear
"""
_NAMES_IN_DOUBLE_BLOCK = """
    img_mod.linear          img_mod.lin                     norm1.linear
    img_attn_qkv            img_attn.qkv                    attn.to_{q,k,v}
    img_attn_q_norm.weight  img_attn.norm.query_norm.scale  attn.norm_q.weight
    img_attn_k_norm.weight  img_attn.norm.key_norm.scale    attn.norm_k.weight
    img_attn_proj           img_attn.proj                   attn.to_out.0
    img_mlp.fc1             img_mlp.0                       ff.net.0.proj
    img_mlp.fc2             img_mlp.2                       ff.net.2
    txt_mod.linear          txt_mod.lin                     norm1_context.linear
    txt_attn_qkv            txt_attn.qkv                    attn.add_{q,k,v}_proj
    txt_attn_q_norm.weight  txt_attn.norm.query_norm.scale  attn.norm_added_q.weight
    txt_attn_k_norm.weight  txt_attn.norm.key_norm.scale    attn.norm_added_k.weight
    txt_attn_proj           txt_attn.proj                   attn.to_add_out
    txt_mlp.fc1             txt_mlp.0                       ff_context.net.0.proj
    txt_mlp.fc2             txt_mlp.2                       ff_context.net.2
"""
_NAMES_IN_SINGLE_BLOCK = """
    linear1                 linear1                 {attn.to_q,attn.to_k,attn.to_v,proj_mlp}
    linear2                 linear2                 proj_out
    q_norm.weight           norm.query_norm.scale   attn.norm_q.weight
    k_norm.weight           norm.key_norm.scale     attn.norm_k.weight
    modulation.linear       modulation.lin          norm.linear
"""
# Where each part of the table stands in the three layouts
_REFINER_BLOCK = "txt_in.individual_token_refiner.blocks.*."
_DIT_TABLE = (
    (_NAMES_OUTSIDE, ("", "", "")),
    (_NAMES_IN_TEXT_INPUT, ("txt_in.", "txt_in.", "context_embedder.")),
    (
        _NAMES_IN_REFINER_BLOCK,
        (_REFINER_BLOCK, _REFINER_BLOCK, "context_embedder.token_refiner.refiner_blocks.*."),
    ),
    (_NAMES_IN_DOUBLE_BLOCK, ("double_blocks.*.", "double_blocks.*.", "transformer_blocks.*.")),
    (_NAMES_IN_SINGLE_BLOCK, ("single_blocks.*.", "single_blocks.*.", "single_transformer_blocks.*.")),
)
_SWAPPED = "final_layer.adaLN_modulation.1."
# What Tencent's code splits in the double and single blocks when it loads the original names
_SPLIT = {
    ".img_attn_qkv.": ".img_attn_{q,k,v}.",
    ".txt_attn_qkv.": ".txt_attn_{q,k,v}.",
    ".linear1.": ".linear1_{q,k,v,mlp}.",
    ".linear2.": ".linear2.fc.",
}

_BLOCK_NUMBER = re.compile(r"(?<=blocks\.)\d+(?=\.)")


@dataclass(frozen=True)
class Source:
    """How to make one original tensor: a file's `parts` joined by rows, then the halves swapped if told."""

    parts: tuple[str, ...]
    swap_halves: bool = False

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of the joined parts, given that none is missing."""
        first = shapes[self.parts[0]]
        return (sum(shapes[part][0] for part in self.parts), *first[1:]) if first else first


@dataclass(frozen=True)
class ModuleInfo:
    """A Linear of a block, by its original name."""

    name: str
    in_features: int
    out_features: int


def dit_key_map(names: Collection[str]) -> dict[str, Source]:
    """For each original DiT name that `names` tell of, where its tensor comes from.

    The layout and prefix that explain most of the names are taken. A name that the layout does not have is
    mapped to itself, so that it shows as left over; a part that a split tensor lacks is still listed.
    """
    lookups = [_lookup(column) for column in range(len(_FORMATS))] + [_split_lookup()]
    lookup, prefix = max(
        ((lookup, prefix) for prefix in _DIT_PREFIXES for lookup in lookups),
        key=lambda choice: _num_explained(names, *choice),
    )
    key_map = {}
    for name in names:
        template = _BLOCK_NUMBER.sub("*", name.removeprefix(prefix))
        if not name.startswith(prefix) or template not in lookup:
            key_map[name] = Source((name,))
            continue
        original, source = lookup[template]
        number = _BLOCK_NUMBER.search(name)
        block = number[0] if number else "*"
        parts = tuple(prefix + part.replace("*", block) for part in source.parts)
        key_map[original.replace("*", block)] = Source(parts, source.swap_halves)
    return key_map


def vae_key_map(names: Collection[str]) -> dict[str, Source]:
    """The same for a VAE; diffusers numbers the layers of all levels through."""
    prefix = next((p for p in _VAE_PREFIXES if any(name.startswith(p) for name in names)), "")
    bare = {name.removeprefix(prefix): name for name in names}
    if any(name.startswith("encoder.down_blocks.") for name in bare):
        samplers = (n for n in range(len(bare)) if f"encoder.down_blocks.{n}.conv.weight" in bare)
        layers = next(samplers, 0)
        return {_vae_name_from_diffusers(name, layers): Source((full,)) for name, full in bare.items()}
    return {name: Source((full,)) for name, full in bare.items()}


def linear_modules(arch: DiTArch) -> list[ModuleInfo]:
    """The Linears of the double and single blocks in model order: what a LoRA can adapt."""
    hidden, mlp = arch.hidden, arch.mlp_hidden
    stream = [
        ("mod.linear", hidden, 6 * hidden),
        ("attn_qkv", hidden, 3 * hidden),
        ("attn_proj", hidden, hidden),
        ("mlp.fc1", hidden, mlp),
        ("mlp.fc2", mlp, hidden),
    ]
    double = [(f"{side}_{name}", n_in, n_out) for side in ("img", "txt") for name, n_in, n_out in stream]
    single = [
        ("linear1", hidden, 3 * hidden + mlp),
        ("linear2", hidden + mlp, hidden),
        ("modulation.linear", hidden, 3 * hidden),
    ]
    stacks = [("double_blocks", arch.num_double, double), ("single_blocks", arch.num_single, single)]
    return [
        ModuleInfo(f"{stack}.{number}.{name}", n_in, n_out)
        for stack, count, block in stacks
        for number in range(count)
        for name, n_in, n_out in block
    ]


def _lookup(column: int) -> dict[str, tuple[str, Source]]:
    """For each name template of one layout: the original template and all parts of the source."""
    lookup = {}
    for row in _table_rows():
        original, source = row[0], row[column]
        parts = _expand_braces(source)
        swap = _FORMATS[column] == "diffusers" and original.startswith(_SWAPPED)
        lookup.update(dict.fromkeys(parts, (original, Source(parts, swap))))
    return lookup


def _split_lookup() -> dict[str, tuple[str, Source]]:
    """The same for the original names with split tensors."""
    lookup = {}
    for original, *_ in _table_rows():
        source = original
        for whole, split in _SPLIT.items():
            source = source.replace(whole, split)
        parts = _expand_braces(source)
        lookup.update(dict.fromkeys(parts, (original, Source(parts))))
    return lookup


def _table_rows() -> Iterator[tuple[str, ...]]:
    """The rows of the table as tensor names in three layouts."""
    for text, prefixes in _DIT_TABLE:
        for line in text.strip().splitlines():
            modules = [prefix + cell for prefix, cell in zip(prefixes, line.split(), strict=True)]
            is_tensor = modules[0].endswith(".weight")
            for suffix in ("",) if is_tensor else (".weight", ".bias"):
                yield tuple(module + suffix for module in modules)


def _expand_braces(name: str) -> tuple[str, ...]:
    start, brace, rest = name.partition("{")
    if not brace:
        return (name,)
    choices, _, end = rest.partition("}")
    return tuple(start + choice + end for choice in choices.split(","))


def _num_explained(names: Iterable[str], lookup: Mapping[str, object], prefix: str) -> int:
    return sum(
        name.startswith(prefix) and _BLOCK_NUMBER.sub("*", name.removeprefix(prefix)) in lookup
        for name in names
    )


_VAE_MID = {
    "resnets.0.": "block_1.",
    "resnets.1.": "block_2.",
    "attentions.0.to_": "attn_1.",
    "attentions.0.proj.": "attn_1.proj_out.",
    "attentions.0.norm.": "attn_1.norm.",
}


def _vae_name_from_diffusers(name: str, layers_per_block: int) -> str:
    """The original name; what diffusers does not have comes back as it is."""
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.(.*)", name):
        for theirs, ours in _VAE_MID.items():
            if match[2].startswith(theirs):
                return f"{match[1]}.mid.{ours}{match[2].removeprefix(theirs)}"
    elif match := re.fullmatch(r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(.*)", name):
        is_decoder = match[1] == "decoder.up"
        num_blocks = layers_per_block + is_decoder
        level, index = divmod(int(match[2]), num_blocks + 1)
        sampler = "upsample" if is_decoder else "downsample"
        layer = sampler if index == num_blocks else f"block.{index}"
        return f"{match[1]}.{level}.{layer}.{match[3]}"
    return name
