"""How the tools that train this model name a LoRA's tensors: the one table of formats, and its reader.

A tensor's key is `prefix + module + "." + role`. The formats differ in the prefix, in how they spell the
module (the model's own names, ComfyUI's, or diffusers' with fused weights split by rows), in whether the
dots become underscores, and in the name of a role. A new format is one line of `FORMATS`; a new spelling is
one more column of `TARGETS`.

    kohya      lora_unet_double_blocks_0_img_mlp_fc1.lora_down.weight        .lora_up.weight, .alpha
    comfy      lora_unet_double_blocks_0_img_mlp_0.lora_down.weight          .lora_up.weight, .alpha
    peft       diffusion_model.double_blocks.0.img_mlp.0.lora_A.weight       .lora_B.weight
    diffusers  transformer.transformer_blocks.0.ff.net.0.proj.lora_A.weight  .lora_B.weight

The names agree with tests/golden/keymap.json and tests/golden/lora_*.safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Spelling = Literal["original", "comfy", "diffusers"]
Width = tuple[int, int]
"""A width as (hidden sizes, MLP sizes): linear1 puts out (3, 1), that is 3*hidden + mlp."""

HIDDEN: Width = (1, 0)
MLP: Width = (0, 1)


@dataclass(frozen=True)
class Target:
    """A Linear of a block that a LoRA can stand on, in every spelling.

    `diffusers` has one name for each row range of the fused weight; `part_widths` are their heights.
    """

    block: str
    original: str
    comfy: str
    diffusers: tuple[str, ...]
    in_width: Width
    part_widths: tuple[Width, ...]

    @property
    def out_width(self) -> Width:
        return (sum(width[0] for width in self.part_widths), sum(width[1] for width in self.part_widths))


TARGETS: tuple[Target, ...] = (
    Target("double_blocks", "img_mod.linear", "img_mod.lin", ("norm1.linear",), HIDDEN, ((6, 0),)),
    Target(
        "double_blocks",
        "img_attn_qkv",
        "img_attn.qkv",
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        HIDDEN,
        (HIDDEN, HIDDEN, HIDDEN),
    ),
    Target("double_blocks", "img_attn_proj", "img_attn.proj", ("attn.to_out.0",), HIDDEN, (HIDDEN,)),
    Target("double_blocks", "img_mlp.fc1", "img_mlp.0", ("ff.net.0.proj",), HIDDEN, (MLP,)),
    Target("double_blocks", "img_mlp.fc2", "img_mlp.2", ("ff.net.2",), MLP, (HIDDEN,)),
    Target("double_blocks", "txt_mod.linear", "txt_mod.lin", ("norm1_context.linear",), HIDDEN, ((6, 0),)),
    Target(
        "double_blocks",
        "txt_attn_qkv",
        "txt_attn.qkv",
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        HIDDEN,
        (HIDDEN, HIDDEN, HIDDEN),
    ),
    Target("double_blocks", "txt_attn_proj", "txt_attn.proj", ("attn.to_add_out",), HIDDEN, (HIDDEN,)),
    Target("double_blocks", "txt_mlp.fc1", "txt_mlp.0", ("ff_context.net.0.proj",), HIDDEN, (MLP,)),
    Target("double_blocks", "txt_mlp.fc2", "txt_mlp.2", ("ff_context.net.2",), MLP, (HIDDEN,)),
    Target(
        "single_blocks",
        "linear1",
        "linear1",
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        HIDDEN,
        (HIDDEN, HIDDEN, HIDDEN, MLP),
    ),
    Target("single_blocks", "linear2", "linear2", ("proj_out",), (1, 1), (HIDDEN,)),
    Target("single_blocks", "modulation.linear", "modulation.lin", ("norm.linear",), HIDDEN, ((3, 0),)),
)

DIFFUSERS_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}


@dataclass(frozen=True)
class Format:
    """One tool's way to write a LoRA of this model."""

    name: str
    title: str
    """How a sentence to the user calls it."""
    prefix: str
    separator: Literal[".", "_"]
    spelling: Spelling
    down: str
    up: str
    has_alpha: bool
    """Whether an `.alpha` tensor scales the product by alpha/rank; else the scale is folded into `up`."""
    has_extras: bool
    """Whether the tensors of `EXTRA_ROLES` have a name in it."""
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """What its readers expect in the file's metadata."""

    def role_name(self, role: str) -> str:
        """The end of a key: `lora_down.weight` for the role `down`."""
        return {"down": self.down, "up": self.up}.get(role, role)

    def module_name(self, target: Target, index: int, part: int = 0) -> str:
        """A module's name with the prefix. `part` counts the row ranges, for the diffusers spelling."""
        if self.spelling == "diffusers":
            block, rest = DIFFUSERS_BLOCKS[target.block], target.diffusers[part]
        else:
            block, rest = target.block, target.comfy if self.spelling == "comfy" else target.original
        return self.prefix + f"{block}.{index}.{rest}".replace(".", self.separator)

    def key(self, target: Target, index: int, role: str, part: int = 0) -> str:
        """The whole key of a tensor."""
        return f"{self.module_name(target, index, part)}.{self.role_name(role)}"


_PT = MappingProxyType({"format": "pt"})

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "kohya": Format(
            name="kohya",
            title="the reference tool's form",
            prefix="lora_unet_",
            separator="_",
            spelling="original",
            down="lora_down.weight",
            up="lora_up.weight",
            has_alpha=True,
            has_extras=True,
        ),
        "comfy": Format(
            name="comfy",
            title="ComfyUI's form",
            prefix="lora_unet_",
            separator="_",
            spelling="comfy",
            down="lora_down.weight",
            up="lora_up.weight",
            has_alpha=True,
            has_extras=True,
        ),
        "peft": Format(
            name="peft",
            title="diffusion-pipe's form",
            prefix="diffusion_model.",
            separator=".",
            spelling="comfy",
            down="lora_A.weight",
            up="lora_B.weight",
            has_alpha=False,
            has_extras=False,
            metadata=_PT,
        ),
        "diffusers": Format(
            name="diffusers",
            title="diffusers' form",
            prefix="transformer.",
            separator=".",
            spelling="diffusers",
            down="lora_A.weight",
            up="lora_B.weight",
            has_alpha=False,
            has_extras=False,
            metadata=_PT,
        ),
    }
)

EXTRA_ROLES = frozenset(
    {"dora_scale"}
    | {f"hada_{w}" for w in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
    | {f"lokr_{w}" for w in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
)
"""Tensors of DoRA, LoHa and LoKr. They are carried by a change of names and never computed with."""

_ROLES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A.default.weight": "down",
    "lora_B.default.weight": "up",
    "alpha": "alpha",
} | {role: role for role in EXTRA_ROLES}

_KEY = re.compile(r"(?P<module>.+?)\.(?P<role>" + "|".join(map(re.escape, _ROLES)) + ")")
_MODULE = re.compile(
    r"(?:lora_unet_|lora_transformer_|(?:base_model\.model\.)?(?:diffusion_model\.|transformer\.)?)"
    r"(?P<block>(?:double|single)_blocks|(?:single_)?transformer_blocks)"
    r"(?P<separator>[._])(?P<index>\d+)[._](?P<rest>.+)"
)


def _spellings() -> dict[tuple[str, str], tuple[Target, int | None]]:
    """(block, rest of the name with underscores) -> target and part, for every spelling."""
    table: dict[tuple[str, str], tuple[Target, int | None]] = {}
    for target in TARGETS:
        for rest in (target.original, target.comfy):
            table[target.block, rest.replace(".", "_")] = (target, None)
        for part, rest in enumerate(target.diffusers):
            whole = len(target.diffusers) == 1
            table[DIFFUSERS_BLOCKS[target.block], rest.replace(".", "_")] = (target, None if whole else part)
    return table


_TARGET_OF = _spellings()


@dataclass(frozen=True)
class Key:
    """What a tensor's name says. `part` is the row range of a split module, None for a whole one."""

    text: str
    target: Target
    index: int
    part: int | None
    role: str

    @property
    def module(self) -> str:
        """The model's own name of the module: `double_blocks.0.img_attn_qkv`."""
        return f"{self.target.block}.{self.index}.{self.target.original}"


def parse_key(text: str) -> Key | None:
    """Reads a tensor's name in any of the formats, or in a mixture of them; None where it is of no module.

    Wider than the formats that are written: any prefix goes with any spelling and any role name, so that
    files of other tools are understood. Dots and underscores are not told apart, since no two modules
    differ in them alone.
    """
    if (key := _KEY.fullmatch(text)) is None or (module := _MODULE.fullmatch(key["module"])) is None:
        return None
    found = _TARGET_OF.get((module["block"], module["rest"].replace(".", "_")))
    if found is None:
        return None
    target, part = found
    return Key(text, target, int(module["index"]), part, _ROLES[key["role"]])


def matching_formats(keys: Iterable[Key]) -> list[str]:
    """The names of the formats that spell every one of `keys` exactly so.

    Two, kohya and comfy, where a file holds only modules that both spell alike (the attention layers);
    none where another tool wrote the file.
    """
    names = list(FORMATS)
    for key in keys:
        names = [name for name in names if _spells(FORMATS[name], key)]
    return names


def _spells(format: Format, key: Key) -> bool:
    if key.part is None and format.spelling == "diffusers" and len(key.target.diffusers) > 1:
        return False
    return format.key(key.target, key.index, key.role, key.part or 0) == key.text


def lora_name(module: str) -> str:
    """The reference tool's: `lora_unet_double_blocks_0_img_mlp_fc1` for `double_blocks.0.img_mlp.fc1`."""
    return "lora_unet_" + module.replace(".", "_")
