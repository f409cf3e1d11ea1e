from __future__ import annotations

import pytest
import torch

from hyimg.flow.targets import initial_noise, ip_noise_strength, latent_noise
from hyimg.randomness import keyed_seed

SHAPE = (16, 4, 6)


def test_every_part_of_the_key_gives_other_noise_and_the_same_key_the_same() -> None:
    keys = [
        (1, 0, "cat", 0, "noise"),
        (2, 0, "cat", 0, "noise"),
        (1, 1, "cat", 0, "noise"),
        (1, "validation", "cat", 0, "noise"),
        (1, 0, "dog", 0, "noise"),
        (1, 0, "cat", 1, "noise"),
        (1, 0, "cat", 0, "posterior"),
        (1, 0, "cat", 0, "ip_noise"),
    ]
    draws = [latent_noise(SHAPE, *key) for key in keys]
    assert torch.equal(draws[0], latent_noise(SHAPE, 1, 0, "cat", 0))
    assert draws[0].dtype == torch.float32
    for i, one in enumerate(draws):
        for other in draws[i + 1 :]:
            # independent noise of 384 numbers: correlation 0, standard deviation 0.05
            assert torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].abs() < 0.3


def test_keys_make_the_same_draws_in_every_release_and_their_parts_stay_apart() -> None:
    """Other draws would end resumed runs in other weights."""
    assert keyed_seed(7, 1, "image", 0, "noise") == 1904154629238586509
    assert keyed_seed(1, 23, "image") != keyed_seed(12, 3, "image")


def test_noise_does_not_touch_or_follow_the_global_generator() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = latent_noise(SHAPE, 1, 0, "cat", 0), initial_noise(SHAPE, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(9)
    assert torch.equal(latent_noise(SHAPE, 1, 0, "cat", 0), first[0])
    assert torch.equal(initial_noise(SHAPE, 5), first[1])


def test_initial_noise_rounds_to_what_the_official_pipeline_draws() -> None:
    shape = (1, 64, 5, 7)
    official = torch.randn(shape, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(542017))
    assert torch.equal(initial_noise(shape, 542017).bfloat16(), official)


def test_input_perturbation_is_constant_or_drawn_for_each_sample() -> None:
    assert ip_noise_strength(0.1, 1, 0, "cat", 0) == 0.1
    strengths = [ip_noise_strength(0.1, 1, 0, f"cat {i}", 0, random=True) for i in range(300)]
    assert len(set(strengths)) == 300
    assert 0 <= min(strengths) < 0.005
    assert 0.095 < max(strengths) <= 0.1
    assert sum(strengths) / 300 == pytest.approx(0.05, abs=0.01)
