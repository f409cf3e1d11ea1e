"""Files to measure with: a LoRA as large as the real model's, and a few pictures."""

from __future__ import annotations

from pathlib import Path

LORA_BYTES = 400_000_000


def write_lora(path: Path) -> None:
    """A LoRA of the real model's modules in the reference tool's names, of a rank that makes the file large."""
    import torch

    from hyimg.checkpoints.architecture import DIT_2_1
    from hyimg.checkpoints.names import linear_modules
    from hyimg.lora.files.conversion import save_lora
    from hyimg.lora.files.formats import lora_name

    modules = linear_modules(DIT_2_1)
    rank = LORA_BYTES // sum(2 * (m.in_features + m.out_features) for m in modules)
    state = {}
    for module in modules:
        name = lora_name(module.name)
        state[f"{name}.lora_down.weight"] = torch.randn(rank, module.in_features, dtype=torch.bfloat16)
        state[f"{name}.lora_up.weight"] = torch.randn(module.out_features, rank, dtype=torch.bfloat16)
        state[f"{name}.alpha"] = torch.tensor(1.0, dtype=torch.bfloat16)
    save_lora(path, state, {"ss_network_dim": str(rank)})


def write_images(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture number {number}\n", encoding="utf-8")
