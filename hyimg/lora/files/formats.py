"""How the tools that train this model name a LoRA's tensors: the table of formats and its parser.

A tensor's key is `prefix + module + "." + role`. The formats differ in the prefix, in the layout of the module
names (the model's own, ComfyUI's, or diffusers', which splits fused weights by rows: `BLOCK_LINEARS`), in whether
dots become underscores, and in the name of a role. A new format is one entry of `FORMATS`.

    kohya      lora_unet_double_blocks_0_img_mlp_fc1.lora_down.weight        .lora_up.weight, .alpha
    comfy      lora_unet_double_blocks_0_img_mlp_0.lora_down.weight          .lora_up.weight, .alpha
    peft       diffusion_model.double_blocks.0.img_mlp.0.lora_A.weight       .lora_B.weight
    diffusers  transformer.transformer_blocks.0.ff.net.0.proj.lora_A.weight  .lora_B.weight

The parser accepts more: any prefix, layout and role below, in any combination.

The names agree with tests/golden/keymap.json and tests/golden/lora_*.safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from hyimg.checkpoints.model_files import unwrapped
from hyimg.checkpoints.names import BLOCK_LINEARS, DIFFUSERS_BLOCKS, BlockLinear

Layout = Literal["original", "comfy", "diffusers"]


@dataclass(frozen=True)
class Format:
    """How one tool writes a LoRA of this model."""

    name: str
    title: str
    """Its name in messages."""
    prefix: str
    separator: Literal[".", "_"]
    layout: Literal["original", "comfy", "diffusers"]
    down: str
    up: str
    has_alpha: bool
    """Whether an `.alpha` tensor scales the product by alpha/rank; without one the scale is folded into `up`."""
    has_lycoris: bool
    """Whether its readers support the tensors of LoHa and LoKr."""
    magnitude: str | None
    """Its name for a DoRA's magnitudes; None if its readers do not support DoRA."""
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Metadata that its readers expect."""

    def role_name(self, role: str) -> str | None:
        """The end of a key: `lora_down.weight` for the role `down`; None where the format has no such tensor."""
        if role == "alpha" and not self.has_alpha:
            return None
        if role in LOHA_ROLES | LOKR_ROLES and not self.has_lycoris:
            return None
        return {"down": self.down, "up": self.up, "magnitude": self.magnitude}.get(role, role)

    @property
    def splits_rows(self) -> bool:
        """Whether each row range of a fused weight is a module of its own."""
        return self.layout == "diffusers"

    def module_name(self, linear: BlockLinear, index: int, part: int = 0) -> str:
        """A module's name with the prefix. `part` numbers the row ranges, for the diffusers layout."""
        if self.layout == "diffusers":
            block, rest = DIFFUSERS_BLOCKS[linear.block], linear.diffusers[part]
        else:
            block, rest = linear.block, linear.comfy if self.layout == "comfy" else linear.original
        return self.prefix + f"{block}.{index}.{rest}".replace(".", self.separator)


_PT = MappingProxyType({"format": "pt"})

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "kohya": Format(
            name="kohya",
            title="the reference tool's format",
            prefix="lora_unet_",
            separator="_",
            layout="original",
            down="lora_down.weight",
            up="lora_up.weight",
            has_alpha=True,
            has_lycoris=True,
            magnitude="dora_scale",
        ),
        "comfy": Format(
            name="comfy",
            title="ComfyUI's format",
            prefix="lora_unet_",
            separator="_",
            layout="comfy",
            down="lora_down.weight",
            up="lora_up.weight",
            has_alpha=True,
            has_lycoris=True,
            magnitude="dora_scale",
        ),
        "peft": Format(
            name="peft",
            title="diffusion-pipe's format",
            prefix="diffusion_model.",
            separator=".",
            layout="comfy",
            down="lora_A.weight",
            up="lora_B.weight",
            has_alpha=False,
            has_lycoris=False,
            magnitude=None,
            metadata=_PT,
        ),
        "diffusers": Format(
            name="diffusers",
            title="diffusers' format",
            prefix="transformer.",
            separator=".",
            layout="diffusers",
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
"""The tensors of LyCORIS's adapters, under its own names."""

# The names of each role. PEFT puts the adapter's name, usually `default`, between name and `.weight`
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
_PREFIX = re.compile(
    r"^(?:(?:lora_unet_|lora_transformer_|lycoris_)(?:module_)?"
    r"|(?:(?:base_model\.model|model|diffusion_model|transformer|unet)\.)*)"
)
_MODULE = re.compile(
    r"(?P<block>(?:double|single)_blocks|(?:single_)?transformer_blocks)"
    r"[._](?P<index>\d+)[._](?P<rest>.+)"
)


def _module_table() -> dict[tuple[str, str], tuple[BlockLinear, int | None]]:
    """(block, rest of the name with underscores) -> Linear and part (None: all rows), in every layout."""
    table: dict[tuple[str, str], tuple[BlockLinear, int | None]] = {}
    for linear in BLOCK_LINEARS:
        for rest in (linear.original, linear.comfy):
            table[linear.block, rest.replace(".", "_")] = (linear, None)
        for block, names in (
            (DIFFUSERS_BLOCKS[linear.block], linear.diffusers),
            (linear.block, linear.split),
        ):
            for part, rest in enumerate(names):
                table[block, rest.replace(".", "_")] = (linear, part if len(names) > 1 else None)
    return table


_MODULE_TABLE = _module_table()


@dataclass(frozen=True)
class TensorKey:
    """A parsed tensor name. `part` is the row range of a split module, None for one that covers all rows.

    `text` is the name, `stem` the part of it that names the module, prefix included.
    """

    text: str
    stem: str
    linear: BlockLinear
    index: int
    part: int | None
    role: str

    @property
    def suffix(self) -> str:
        """The part of the name that stands for the role: `.lora_down.weight`."""
        return self.text[len(self.stem) :]

    @property
    def module(self) -> str:
        """The model's own name of the module: `double_blocks.0.img_attn_qkv`."""
        return f"{self.linear.block}.{self.index}.{self.linear.original}"

    def renamed(self, format: Format, part: int | None = None, role: str | None = None) -> str | None:
        """The name of the tensor in a format, None where the format has none for its role.

        `part` and `role` replace the key's own.
        """
        end = format.role_name(role or self.role)
        number = (part if part is not None else self.part) or 0
        return None if end is None else f"{format.module_name(self.linear, self.index, number)}.{end}"


def bare_module(stem: str) -> str:
    """A module's name in a file without prefixes, and without what torch.compile and other wrappers insert."""
    # in the reference tool's form a compiled model's dots are underscores too
    name = unwrapped(f"{stem}.").removesuffix(".").replace("_orig_mod_", "")
    return _PREFIX.sub("", name)


def parse_key(text: str) -> TensorKey | None:
    """Parses a tensor's name in any format or combination of them; None if it belongs to no module of this model.

    Dots and underscores are equivalent, since no two modules differ in them alone.
    """
    if (key := _KEY.fullmatch(text)) is None:
        return None
    if (module := _MODULE.fullmatch(bare_module(key["module"]))) is None:
        return None
    rest = module["rest"].replace(".processor.", ".").replace(".", "_")
    found = _MODULE_TABLE.get((module["block"], rest))
    role = key.lastgroup
    if found is None or role is None:
        return None
    return TensorKey(text, key["module"], found[0], int(module["index"]), found[1], role)


def matching_formats(keys: Iterable[TensorKey]) -> list[str]:
    """The names of the formats in which every one of `keys` is written exactly as it is.

    Two, kohya and comfy, for a file that holds only modules with one name in both (the attention layers);
    none for a file of another tool.
    """
    names = list(FORMATS)
    for key in keys:
        names = [name for name in names if _is_written_so(FORMATS[name], key)]
    return names


def _is_written_so(format: Format, key: TensorKey) -> bool:
    if key.part is None and format.splits_rows and len(key.linear.diffusers) > 1:
        return False
    return key.renamed(format) == key.text


def lora_name(module: str) -> str:
    """The reference tool's name: `lora_unet_double_blocks_0_img_mlp_fc1` for `double_blocks.0.img_mlp.fc1`."""
    return "lora_unet_" + module.replace(".", "_")
