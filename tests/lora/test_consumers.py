"""Our files in the hands of another program: diffusers with PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hyimg.lora.file import convert
from hyimg.model.architecture import DiTArch


@pytest.mark.filterwarnings("ignore")
def test_diffusers_applies_every_module_of_a_converted_file(
    golden: Path, tmp_path: Path, load: Any, products: Any, lora_arch: DiTArch
) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is in the test extra")
    pytest.importorskip("peft", reason="peft is in the test extra")
    model = diffusers.HunyuanImageTransformer2DModel(
        in_channels=lora_arch.latent_channels,
        out_channels=lora_arch.latent_channels,
        num_attention_heads=lora_arch.heads,
        attention_head_dim=lora_arch.head_dim,
        num_layers=lora_arch.num_double,
        num_single_layers=lora_arch.num_single,
        num_refiner_layers=lora_arch.refiner_depth,
        text_embed_dim=lora_arch.text_dim,
        text_embed_2_dim=lora_arch.byt5_dim,
        rope_axes_dim=(16, 16),
    )
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    convert(golden / "lora_kohya.safetensors", tmp_path / "lora.safetensors", to="diffusers")
    model.load_lora_adapter(tmp_path, weight_name="lora.safetensors", prefix="transformer")
    model.fuse_lora()
    model.unload_lora()
    expected = products(load(golden / "lora_diffusers.safetensors")[0])
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {f"{module.removeprefix('transformer.')}.weight" for module in expected}
    for module, delta in expected.items():
        name = f"{module.removeprefix('transformer.')}.weight"
        # A delta of about 0.01 read off weights of about 0.1: float32 rounding of the sum
        torch.testing.assert_close(model.state_dict()[name] - before[name], delta, rtol=0, atol=1e-6)
