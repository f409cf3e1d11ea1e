"""Which other model a LoRA is for, by the names in it, so that a refusal can say what was given."""

from __future__ import annotations

import re
from collections.abc import Iterable

# The first that fits the start of a module's name, behind any prefix; from the tools' own files
_MARKS: tuple[tuple[str, str], ...] = (
    (r"joint_(transformer_)?blocks[._]\d", "Stable Diffusion 3"),
    (r"(input|output)_blocks[._]\d|middle_block[._]", "Stable Diffusion XL or 1.5"),
    (r"(down|up)_blocks[._]\d|mid_block[._]", "Stable Diffusion XL or 1.5"),
    (r"blocks[._]\d+[._](self_attn|cross_attn|ffn)[._]", "Wan"),
    (r"transformer_blocks[._]\d+[._](img_mlp[._]net|txt_mlp[._]net|img_mod[._]1|txt_mod[._]1)", "Qwen-Image"),
    (r"double_stream_blocks[._]\d|single_stream_blocks[._]\d", "HiDream"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"transformer_blocks[._]\d+[._](attn1|attn2|scale_shift)", "PixArt or LTX-Video"),
    (r"(layers|noise_refiner|context_refiner)[._]\d+[._](attention|feed_forward)", "Lumina 2 or Z-Image"),
    (r"layers[._]\d+[._](self_attn|mlp)[._]", "a language model"),
    (r"text_model[._]encoder|te\d?[._]|text_encoder", "a text encoder"),
)
_PREFIX = (
    r"(?:lora_(?:unet|transformer|prior_unet)_+|lycoris_|lora_(?=te)"
    r"|(?:(?:base_model\.model|model|diffusion_model|transformer|unet)\.)*)"
)


def looks_like(names: Iterable[str]) -> str | None:
    """The model that tensors of these names are for, None where nothing tells it."""
    names = list(names)
    for mark, model in _MARKS:
        pattern = re.compile(_PREFIX + f"(?:{mark})")
        if any(pattern.match(name) for name in names):
            return model
    return None
