"""Models to measure with: DiTs with random weights, their LoRAs, inputs, and one training step of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hyimg.checkpoints.architecture import DIT_2_1, DIT_TINY, DiTArch

if TYPE_CHECKING:
    import torch

    from hyimg.lora.network import AdapterNetwork
    from hyimg.model.dit import DiT, TextCondition
    from hyimg.model.loading import WeightPlacement

FULL = DIT_2_1
# 230 million parameters: large enough that products, not Python, take the time of a step
MID = replace(
    DIT_2_1,
    hidden=768,
    heads=6,
    num_double=6,
    num_single=12,
    mlp_hidden=3072,
    text_dim=1024,
    byt5_dim=256,
    byt5_hidden=512,
)
# A billion parameters: 2 GB in bf16
TWO_GB = replace(MID, hidden=1536, heads=12, num_double=6, num_single=14, mlp_hidden=6144)
TOY = DIT_TINY
# Deep enough for a few streamed blocks
TOY_DEEP = replace(DIT_TINY, num_double=4, num_single=8)

RANK = 16
NUM_TEXT = 128


def random_dit(arch: DiTArch, placement: WeightPlacement, seed: int = 0) -> DiT:
    """A DiT whose weights are made in place, one at a time, on the placement's device and then put where it says.

    Every product keeps its input's order of magnitude.
    """
    import torch

    from hyimg.model.dit import DiT

    with torch.device("meta"):
        dit = DiT(arch)
    generator = torch.Generator(placement.device).manual_seed(seed)
    for name, shape in [(name, parameter.shape) for name, parameter in dit.named_parameters()]:
        values = torch.empty(shape, dtype=placement.dtype, device=placement.device)
        if len(shape) > 1:
            values.normal_(0, 1 / math.sqrt(shape[1]), generator=generator)
        else:
            values.fill_(1.0 if "norm" in name and name.endswith(".weight") else 0.01)
        placement.put(dit, name, values)
    return dit.eval().requires_grad_(False)


def write_dit(path: Path, arch: DiTArch) -> None:
    """A file of a random DiT in bf16, in original names."""
    import torch
    from safetensors.torch import save_file

    from hyimg.model.loading import WeightPlacement

    save_file(random_dit(arch, WeightPlacement("cpu", torch.bfloat16)).state_dict(), path)


def attach_lora(dit: DiT, rank: int = RANK) -> AdapterNetwork:
    """A LoRA on every Linear of the blocks, on the DiT's device, as `train` makes it."""
    from hyimg.lora.network import AdapterNetwork

    network = AdapterNetwork.create(dit, rank=rank, alpha=rank).to(dit.device)
    network.attach(dit)
    return network


def inputs(
    dit: DiT, side: int, num_text: int = NUM_TEXT, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, TextCondition]:
    """A noisy latent of `side` x `side` (as many image tokens), its timestep and a text, batch 1."""
    import torch

    from hyimg.model.dit import TextCondition

    generator = torch.Generator().manual_seed(seed)
    latent_BCHW = torch.randn(1, dit.arch.latent_channels, side, side, generator=generator)
    text_BTW = torch.randn(1, num_text, dit.arch.text_dim, generator=generator)
    text = TextCondition(text_BTW, torch.ones(1, num_text, dtype=torch.bool))
    return latent_BCHW.to(dit.device), torch.tensor([500.0], device=dit.device), text.to(dit.device)


def training_step(
    dit: DiT, network: AdapterNetwork, side: int, num_text: int = NUM_TEXT
) -> Callable[[], float]:
    """One step on a fixed batch: forward, loss, backward, AdamW on the LoRA. It returns the loss.

    On CUDA the optimiser is bitsandbytes' 8-bit AdamW, the usual one where memory is short; torch's without it.
    """
    import torch
    import torch.nn.functional as F

    latent_BCHW, timestep_B, text = inputs(dit, side, num_text)
    target_BCHW, _, _ = inputs(dit, side, num_text, seed=1)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    if dit.device.type == "cuda":
        with contextlib.suppress(ImportError):
            from bitsandbytes.optim import AdamW8bit

            optimizer = AdamW8bit(network.parameters(), lr=1e-4)

    def step() -> float:
        velocity_BCHW = dit(latent_BCHW, timestep_B, text)
        loss = F.mse_loss(velocity_BCHW.float(), target_BCHW)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
