"""Random weights: sensible in scale, and a function of seed and name alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hyimg.checkpoints.architecture import DIT_TINY, DIT_TINY_FULL, VAE_TINY, DiTArch
from hyimg.checkpoints.names import linear_modules
from hyimg.model.dit import DiT, collate
from hyimg.model.loading import init_random
from hyimg.model.vae import VAE


@pytest.mark.parametrize("arch", [DIT_TINY, DIT_TINY_FULL], ids=["tiny", "full"])
def test_a_random_dit_has_outputs_of_order_one_and_gradients_everywhere(arch: DiTArch) -> None:
    model = DiT(arch)
    init_random(model, seed=3)
    generator = torch.Generator().manual_seed(0)
    text = collate([(torch.randn(6, 64, generator=generator), torch.randn(4, 48, generator=generator))])
    out = model(torch.randn(1, 16, 4, 6, generator=generator), torch.tensor([500.0]), text)
    assert 0.3 < out.std() < 3
    out.square().mean().backward()
    for module in linear_modules(arch):
        gradient = model.get_parameter(f"{module.name}.weight").grad
        assert gradient is not None
        assert gradient.norm() > 1e-4


def test_random_weights_depend_only_on_seed_and_name() -> None:
    first, other = DiT(DIT_TINY), DiT(DIT_TINY)
    init_random(first, seed=3)
    init_random(other, seed=4)
    # A shallower model draws the same numbers for the blocks that both have
    second = DiT(replace(DIT_TINY, num_single=2))
    init_random(second, seed=3)
    shallow = second.state_dict()
    assert all(torch.equal(first.state_dict()[name], weight) for name, weight in shallow.items())
    assert not torch.equal(first.img_in.proj.weight, other.img_in.proj.weight)
    assert not torch.equal(
        first.double_blocks[0].img_mlp.fc1.weight, first.double_blocks[0].txt_mlp.fc1.weight
    )


def test_a_random_vae_has_outputs_of_order_one_and_small_deviations() -> None:
    vae = VAE(VAE_TINY)
    init_random(vae, seed=3)
    with torch.no_grad():
        mean, std = vae.encode(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1)
        image = vae.decode(mean)
    assert 0.3 < mean.std() < 3
    assert std.mean() < 0.5
    assert 0.3 < image.std() < 3
