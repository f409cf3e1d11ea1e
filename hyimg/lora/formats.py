"""How the tools that train this model name a LoRA's tensors: the one table of formats, and its reader.

A tensor's key is `prefix + module + "." + role`. The formats differ in the prefix, in how they spell the
module (the model's own names, ComfyUI's, or diffusers' with fused weights split by rows), in whether the
dots become underscores, and in the name of a role. A new format is one line of `FORMATS`; a new spelling is
one more column of `TARGETS`.

    kohya      lora_unet_double_blocks_0_img_mlp_fc1.lora_down.weight        .lora_up.weight, .alpha
    comfy      lora_unet_double_blocks_0_img_mlp_0.lora_down.weight          .lora_up.weight, .alpha
    peft       diffusion_model.double_blocks.0.img_mlp.0.lora_A.weight       .lora_B.weight
    diffusers  transformer.transformer_blocks.0.ff.net.0.proj.lora_A.weight  .lora_B.weight

What is read is wider: any of the prefixes, spellings and roles below, in any mixture.

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

    `diffusers` has one name for each row range of the fused weight; `part_widths` are their heights. `official`
    names the same ranges as Tencent's code has them in memory, where it differs from `original`.
    """

    block: str
    original: str
    comfy: str
    diffusers: tuple[str, ...]
    in_width: Width
    part_widths: tuple[Width, ...]
    official: tuple[str, ...] = ()

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
        ("img_attn_q", "img_attn_k", "img_attn_v"),
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
        ("txt_attn_q", "txt_attn_k", "txt_attn_v"),
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
        ("linear1_q", "linear1_k", "linear1_v", "linear1_mlp"),
    ),
    Target("single_blocks", "linear2", "linear2", ("proj_out",), (1, 1), (HIDDEN,), ("linear2.fc",)),
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
    has_lycoris: bool
    """Whether its readers know the tensors of LoHa and LoKr."""
    magnitude: str | None
    """What it calls the row lengths of a DoRA; None where its readers know none."""
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """What its readers expect in the file's metadata."""

    def role_name(self, role: str) -> str:
        """The end of a key: `lora_down.weight` for the role `down`."""
        return {"down": self.down, "up": self.up, "magnitude": self.magnitude or role}.get(role, role)

    def holds(self, role: str) -> bool:
        """Whether it has a name for the role."""
        if role in LOHA_ROLES | LOKR_ROLES:
            return self.has_lycoris
        return {"alpha": self.has_alpha, "magnitude": self.magnitude is not None}.get(role, True)

    @property
    def splits_rows(self) -> bool:
        """Whether it has a module of its own for each row range of a fused weight."""
        return self.spelling == "diffusers"

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
            has_lycoris=True,
            magnitude="dora_scale",
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
            has_lycoris=True,
            magnitude="dora_scale",
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
            has_lycoris=False,
            magnitude=None,
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
            has_lycoris=False,
            magnitude="lora_magnitude_vector",
            metadata=_PT,
        ),
    }
)

LOHA_ROLES = frozenset(f"hada_{w}" for w in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
LOKR_ROLES = frozenset(f"lokr_{w}" for w in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2"))
"""Tensors of LyCORIS's adapters, in its own words."""

# A role's names. Between name and `.weight` PEFT puts the adapter's name, `default` unless told otherwise
_ROLE_NAMES = {
    "down": r"\.lora_down\.weight|\.lora_A(?:\.(?!bias)\w+)?|[._]lora\.down\.weight|\.lora_linear_layer\.down\.weight",
    "up": r"\.lora_up\.weight|\.lora_B(?:\.(?!bias)\w+)?|[._]lora\.up\.weight|\.lora_linear_layer\.up\.weight",
    "alpha": r"\.alpha",
    "magnitude": r"\.dora_scale|\.lora_magnitude_vector(?:\.\w+)?",
    **{role: rf"\.{role}(?:\.default)?" for role in (*sorted(LOHA_ROLES), *sorted(LOKR_ROLES))},
}
_KEY = re.compile(
    r"(?P<module>.+?)(?:"
    + "|".join(f"(?P<{role}>{names})" for role, names in _ROLE_NAMES.items())
    + r")(?:\.weight)?"
)
_MODULE = re.compile(
    r"(?:lora_unet_|lora_transformer_|lycoris_|(?:(?:base_model\.model|model|diffusion_model|transformer|unet)\.)*)"
    r"(?P<block>(?:double|single)_blocks|(?:single_)?transformer_blocks)"
    r"[._](?P<index>\d+)[._](?P<rest>.+)"
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
        for part, rest in enumerate(target.official):
            whole = len(target.official) == 1
            table[target.block, rest.replace(".", "_")] = (target, None if whole else part)
    return table


_TARGET_OF = _spellings()


@dataclass(frozen=True)
class Key:
    """What a tensor's name says. `part` is the row range of a split module, None for a whole one.

    `text` is the name, `stem` what of it names the module, with the prefix.
    """

    text: str
    stem: str
    target: Target
    index: int
    part: int | None
    role: str

    @property
    def suffix(self) -> str:
        """What of the name tells the role: `.lora_down.weight`."""
        return self.text[len(self.stem) :]

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
    rest = module["rest"].replace(".processor.", ".").replace(".", "_")
    found = _TARGET_OF.get((module["block"], rest))
    if found is None:
        return None
    target, part = found
    role = key.lastgroup
    assert role is not None
    return Key(text, key["module"], target, int(module["index"]), part, role)


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
    if key.part is None and format.splits_rows and len(key.target.diffusers) > 1:
        return False
    if not format.holds(key.role):
        return False
    return format.key(key.target, key.index, key.role, key.part or 0) == key.text


def lora_name(module: str) -> str:
    """The reference tool's: `lora_unet_double_blocks_0_img_mlp_fc1` for `double_blocks.0.img_mlp.fc1`."""
    return "lora_unet_" + module.replace(".", "_")
