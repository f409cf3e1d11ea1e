"""Names of the model's tensors in checkpoints (original, ComfyUI's, diffusers'), and a DiT's shapes. No torch.

The model uses the original names; one table maps the others to them. Where diffusers splits a tensor (q, k, v), its
parts are rows in order, and its final adaLN has scale before shift; golden/keymap.json lists all. A fourth layout,
original names with split tensors, is how Tencent's code holds them in memory (`hyimage/models/hunyuan/modules/
models.py`), and so how its fp8 files store them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from hyimg.checkpoints.architecture import DiTArch, Shapes

# Prefixes that the names of a full model may have
_DIT_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_VAE_PREFIXES = ("vae.", "first_stage_model.", "")

# The table's columns; `*` is a block's number, braces enclose the parts of a split tensor, and a module means its
# weight and its bias
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
# The prefixes of each part of the table in the three layouts
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
    """How to build an original tensor: concatenate the file's `parts` by rows, then maybe swap the halves."""

    parts: tuple[str, ...]
    swap_halves: bool = False

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of the joined parts, given that none is missing."""
        first = shapes[self.parts[0]]
        return (sum(shapes[part][0] for part in self.parts), *first[1:]) if first else first


Width = tuple[int, int]
"""A width as (hidden sizes, MLP sizes): `linear1` has (3, 1) output features, that is 3*hidden + mlp."""
_HIDDEN, _MLP = (1, 0), (0, 1)

# (input features, output features of each fused part) of every Linear of a block; without the prefix `img_` or `txt_`
_WIDTHS: Mapping[str, tuple[Width, tuple[Width, ...]]] = {
    "mod.linear": (_HIDDEN, ((6, 0),)),
    "attn_qkv": (_HIDDEN, (_HIDDEN, _HIDDEN, _HIDDEN)),
    "attn_proj": (_HIDDEN, (_HIDDEN,)),
    "mlp.fc1": (_HIDDEN, (_MLP,)),
    "mlp.fc2": (_MLP, (_HIDDEN,)),
    "linear1": (_HIDDEN, (_HIDDEN, _HIDDEN, _HIDDEN, _MLP)),
    "linear2": ((1, 1), (_HIDDEN,)),
    "modulation.linear": (_HIDDEN, ((3, 0),)),
}


@dataclass(frozen=True)
class BlockLinear:
    """A Linear of the double or single blocks, with its names below the block in each layout.

    `diffusers` and `split` (Tencent's code in memory) have a name for each of the row ranges that are fused in the
    weight, whose heights are `part_widths`; `split` is empty where it is `original`.
    """

    block: str
    original: str
    comfy: str
    diffusers: tuple[str, ...]
    split: tuple[str, ...]
    in_width: Width
    part_widths: tuple[Width, ...]

    @property
    def out_width(self) -> Width:
        return (sum(width[0] for width in self.part_widths), sum(width[1] for width in self.part_widths))


def _block_linears() -> Iterator[BlockLinear]:
    for text, (prefix, _, _) in _DIT_TABLE[-2:]:
        for line in text.strip().splitlines():
            original, comfy, diffusers = line.split()
            if not original.endswith(".weight"):
                split = _SPLIT.get(f".{original}.", "").strip(".")
                yield BlockLinear(
                    prefix.partition(".")[0],
                    original,
                    comfy,
                    _expand_braces(diffusers),
                    _expand_braces(split) if split else (),
                    *_WIDTHS[re.sub("^(img|txt)_", "", original)],
                )


@dataclass(frozen=True)
class ModuleInfo:
    """A Linear of a block, by its original name."""

    name: str
    in_features: int
    out_features: int


def dit_key_map(names: Collection[str]) -> dict[str, Source]:
    """Maps original DiT names to the tensors of a file with `names`.

    Uses the layout and prefix that match most names. A name outside the layout maps to itself, so that it is reported
    as unknown; missing parts of a split tensor are still listed.
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
    """`dit_key_map` for a VAE; diffusers numbers layers consecutively across levels."""
    prefix = next((p for p in _VAE_PREFIXES if any(name.startswith(p) for name in names)), "")
    bare = {name.removeprefix(prefix): name for name in names}
    if any(name.startswith("encoder.down_blocks.") for name in bare):
        samplers = (n for n in range(len(bare)) if f"encoder.down_blocks.{n}.conv.weight" in bare)
        layers = next(samplers, 0)
        return {_vae_name_from_diffusers(name, layers): Source((full,)) for name, full in bare.items()}
    return {name: Source((full,)) for name, full in bare.items()}


def linear_modules(arch: DiTArch) -> list[ModuleInfo]:
    """The Linears of the double and single blocks, which a LoRA can adapt, in model order."""

    def features(width: Width) -> int:
        return width[0] * arch.hidden + width[1] * arch.mlp_hidden

    counts = {"double_blocks": arch.num_double, "single_blocks": arch.num_single}
    return [
        ModuleInfo(
            f"{block}.{index}.{linear.original}", features(linear.in_width), features(linear.out_width)
        )
        for block, count in counts.items()
        for index in range(count)
        for linear in BLOCK_LINEARS
        if linear.block == block
    ]


def _lookup(column: int) -> dict[str, tuple[str, Source]]:
    """Maps each name template of a layout to the original template and its source."""
    lookup = {}
    for row in _table_rows():
        original, source = row[0], row[column]
        parts = _expand_braces(source)
        swap = _FORMATS[column] == "diffusers" and original.startswith(_SWAPPED)
        lookup.update(dict.fromkeys(parts, (original, Source(parts, swap))))
    return lookup


def _split_lookup() -> dict[str, tuple[str, Source]]:
    """`_lookup` for the original names with split tensors."""
    lookup = {}
    for original, *_ in _table_rows():
        source = original
        for joined, split in _SPLIT.items():
            source = source.replace(joined, split)
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


BLOCK_LINEARS: tuple[BlockLinear, ...] = tuple(_block_linears())
"""In model order."""
DIFFUSERS_BLOCKS: Mapping[str, str] = {
    original.partition(".")[0]: diffusers.partition(".")[0] for _, (original, _, diffusers) in _DIT_TABLE[-2:]
}


_VAE_MID = {
    "resnets.0.": "block_1.",
    "resnets.1.": "block_2.",
    "attentions.0.to_": "attn_1.",
    "attentions.0.proj.": "attn_1.proj_out.",
    "attentions.0.norm.": "attn_1.norm.",
}


def _vae_name_from_diffusers(name: str, layers_per_block: int) -> str:
    """The original name; names that diffusers does not have are returned unchanged."""
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


# Sinusoidal features of a timestep, in all three embedders
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
