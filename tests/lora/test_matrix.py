"""From every form to every form: each module's whole delta stays what it is.

`pytest tests/lora/test_matrix.py -s` prints the figures: the largest absolute difference from golden/lora_deltas.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hyimg.lora.files.conversion import convert

FILE_OF = {"kohya": "lora_kohya", "comfy": "lora_comfy", "peft": "lora_dpipe", "diffusers": "lora_diffusers"}
TOLERANCE = 1e-6  # of golden/README-lora-math.md: float32 rounding of deltas up to 0.3

Load = Callable[[Path], tuple[dict[str, Tensor], dict[str, str]]]
Products = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def _whole(golden: Path, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Deltas by the file's names as deltas by the model's own, parts joined, by golden/keymap.json alone."""
    weights = json.loads((golden / "keymap.json").read_text())["weights"]
    whole = {}
    for weight in weights:
        original, comfy = (weight[form].removesuffix(".weight") for form in ("original", "comfyui"))
        parts = [f"transformer.{part['name'].removesuffix('.weight')}" for part in weight["diffusers"]]
        names = [f"lora_unet_{name.replace('.', '_')}" for name in (original, comfy)]
        for name in (*names, f"diffusion_model.{comfy}"):
            if name in found:
                whole[f"{original}.weight"] = found[name]
        if all(part in found for part in parts):
            whole[f"{original}.weight"] = torch.cat([found[part] for part in parts])
    return whole


def test_sixteen_ways_keep_every_delta(golden: Path, tmp_path: Path, load: Load, products: Products) -> None:
    expected, _ = load(golden / "lora_deltas.safetensors")
    figures: dict[tuple[str, str], float] = {}
    for source, file in FILE_OF.items():
        for target in FILE_OF:
            path = golden / f"{file}.safetensors"
            if source != target:
                convert(path, path := tmp_path / f"{source}-{target}.safetensors", to=target)
            deltas = _whole(golden, products(load(path)[0]))
            assert deltas.keys() == expected.keys(), (source, target)
            figures[source, target] = max(
                float((deltas[name] - delta).abs().max()) for name, delta in expected.items()
            )
    print(f"\n{'from / to':<12}" + "".join(f"{target:>12}" for target in FILE_OF))
    for source in FILE_OF:
        print(f"{source:<12}" + "".join(f"{figures[source, target]:>12.1e}" for target in FILE_OF))
    assert max(figures.values()) <= TOLERANCE
