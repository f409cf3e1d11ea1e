"""Golden files and the small models they belong to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from hyimg.checkpoints.architecture import DiTArch
from hyimg.model.dit import DiT, TextCondition, collate

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden files."""
    return GOLDEN


@pytest.fixture(scope="session")
def load() -> Callable[[Path], tuple[dict[str, Tensor], dict[str, str]]]:
    """Tensors and metadata of a file, by the safetensors library."""

    def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118

    return read


@pytest.fixture(scope="session")
def products() -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """alpha/rank * up @ down by a module's name as the file has it: what a file means, whatever its form."""

    def multiply(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        result = {}
        for name, down in state.items():
            for down_end, up_end in (
                (".lora_down.weight", ".lora_up.weight"),
                (".lora_A.weight", ".lora_B.weight"),
            ):
                if name.endswith(down_end):
                    module = name.removesuffix(down_end)
                    alpha = state.get(f"{module}.alpha", torch.tensor(float(len(down))))
                    up = state[module + up_end]
                    result[module] = alpha.float() / len(down) * (up.float() @ down.float())
        return result

    return multiply


@pytest.fixture(scope="session")
def lora_arch() -> DiTArch:
    """The sizes of the model that the golden LoRA files are for."""
    sizes = json.loads((GOLDEN / "lora_network.json").read_text())["tiny_dit"]
    return DiTArch(
        hidden=sizes["hidden"],
        heads=sizes["heads"],
        head_dim=sizes["hidden"] // sizes["heads"],
        num_double=sizes["double"],
        num_single=sizes["single"],
        mlp_hidden=4 * sizes["hidden"],
        latent_channels=sizes["channels"],
        text_dim=sizes["text_dim"],
        byt5_dim=sizes["byt5"][0],
        byt5_hidden=sizes["byt5"][1],
        refiner_depth=2,
    )


@pytest.fixture
def lora_dit(lora_arch: DiTArch) -> DiT:
    """A model of those sizes with random weights."""
    torch.manual_seed(0)
    dit = DiT(lora_arch).requires_grad_(False)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return dit


@pytest.fixture(scope="session")
def train_step(load: Callable[[Path], tuple[dict[str, Tensor], dict[str, str]]]) -> dict[str, Tensor]:
    """The tensors of the golden training step."""
    return load(GOLDEN / "train_step.safetensors")[0]


@pytest.fixture
def step_dit(train_step: dict[str, Tensor]) -> DiT:
    """The base model of the golden training step."""
    base = {name.removeprefix("base."): t for name, t in train_step.items() if name.startswith("base.")}
    dit = DiT(DiTArch.from_shapes({name: tuple(t.shape) for name, t in base.items()}))
    dit.load_state_dict(base)
    return dit.requires_grad_(False)


@pytest.fixture
def step_inputs(train_step: dict[str, Tensor]) -> tuple[Tensor, Tensor, TextCondition]:
    """Noisy latent, timestep and prompt of the golden training step."""
    text = TextCondition(
        train_step["in.text_states"],
        train_step["in.text_mask"].bool(),
        train_step["in.byt5_states"],
        train_step["in.byt5_mask"].bool(),
    )
    return train_step["noisy"], train_step["in.sigma"] * 1000, text


@pytest.fixture
def inputs(lora_arch: DiTArch) -> tuple[Tensor, Tensor, Any]:
    """Random inputs for `lora_dit`."""
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, lora_arch.latent_channels, 4, 6, generator=generator)
    text = [(torch.randn(n, lora_arch.text_dim, generator=generator), None) for n in (5, 5)]
    return latent, torch.tensor([300.0, 700.0]), collate(text)
