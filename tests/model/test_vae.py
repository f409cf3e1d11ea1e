"""The VAE against tests/golden/vae_tiny and against diffusers' class on equal weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from hyimg.checkpoints.architecture import VAE_2_1, VAE_TINY, VAEArch
from hyimg.errors import HyimgError
from hyimg.model.loading import init_random, load_vae
from hyimg.model.vae import SCALING_FACTOR, VAE

# 6e-6 seen between four implementations; the README's own figure
TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def golden(golden_tensors: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    return golden_tensors("vae_tiny")


@pytest.fixture(scope="module")
def vae(golden: dict[str, Tensor], under: Any) -> VAE:
    weights = {name: weight.float() for name, weight in under(golden, "weights.").items()}
    model = VAE(VAEArch.from_shapes({name: tuple(weight.shape) for name, weight in weights.items()}))
    model.load_state_dict(weights)
    return model.requires_grad_(False)


@pytest.mark.parametrize("case", ["a", "b"])
def test_encoding_and_decoding_agree_with_the_golden_file(
    golden: dict[str, Tensor], vae: VAE, case: str
) -> None:
    def close(found: Tensor, name: str) -> None:
        expected = golden[f"{case}.{name}"]
        # 3e-5 where numbers are about 1, as the README says; moments reach further, and so does their rounding
        atol = TOLERANCE * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)

    close(vae.encode_moments(golden[f"{case}.image"]), "moments")
    mean, std = vae.encode(golden[f"{case}.image"])
    close(mean, "mean_scaled")
    close(mean + std * golden[f"{case}.eps"], "sample_scaled")
    close(std / SCALING_FACTOR, "std")
    close(vae.decode(golden[f"{case}.mean_scaled"]), "decode_mean")


def test_the_decoded_image_is_not_clamped(golden: dict[str, Tensor], vae: VAE) -> None:
    assert vae.decode(golden["a.mean_scaled"]).abs().max() > 1


def test_log_variance_is_clamped(vae: VAE, monkeypatch: Any) -> None:
    moments = torch.cat([torch.zeros(1, 16, 1, 1), torch.tensor(1000.0).expand(1, 16, 1, 1)], dim=1)
    monkeypatch.setattr(vae, "encode_moments", lambda image: moments)
    std = vae.encode(torch.zeros(1, 3, 32, 32)).std_BCHW
    torch.testing.assert_close(std, torch.full_like(std, SCALING_FACTOR * 2.718281828**10))


def test_the_full_model_has_exactly_the_real_checkpoints_tensors(golden_json: Callable[[str], Any]) -> None:
    expected = golden_json("vae_keys")["keys"]
    with torch.device("meta"):
        model = VAE(VAE_2_1)
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert VAEArch.from_shapes({name: tuple(shape) for name, shape in expected.items()}) == VAE_2_1


def test_diffusers_model_gives_the_same_numbers_on_its_own_file(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=16, block_out_channels=(32, 64, 64, 128, 64, 64),
        layers_per_block=2, spatial_compression_ratio=32, sample_size=384,
    ).eval()  # fmt: skip
    save_file(theirs.state_dict(), tmp_path / "vae.safetensors")
    ours = load_vae(tmp_path / "vae.safetensors")
    image, latent = torch.rand(1, 3, 64, 32) * 2 - 1, torch.randn(1, 16, 1, 2)
    with torch.no_grad():
        distribution = theirs.encode(image).latent_dist
        posterior = ours.encode(image)
        torch.testing.assert_close(posterior.mean_BCHW / SCALING_FACTOR, distribution.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(posterior.std_BCHW / SCALING_FACTOR, distribution.std, rtol=0, atol=1e-5)
        decoded = theirs.decode(latent).sample
        torch.testing.assert_close(ours.decode(latent * SCALING_FACTOR), decoded, rtol=0, atol=1e-5)


def test_image_sides_must_be_multiples_of_32(vae: VAE) -> None:
    with pytest.raises(HyimgError, match="an image of 48x64 cannot be encoded"):
        vae.encode(torch.zeros(1, 3, 64, 48))


@pytest.mark.parametrize(
    ("channels", "latent_channels", "message"),
    [
        ((32, 32, 32, 32, 64), 16, "5 levels"),
        ((32, 32, 32, 32, 32, 48), 16, "multiples of 32"),
        ((32, 32, 32, 32, 96, 64), 16, "factors that its shortcuts"),
        (VAE_TINY.channels, 24, "24 latent channels"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    channels: tuple[int, ...], latent_channels: int, message: str
) -> None:
    with pytest.raises(HyimgError, match=message):
        VAEArch(channels=channels, latent_channels=latent_channels)


@pytest.mark.parametrize("chunk_rows", [1, 3, 16])
def test_chunks_of_rows_give_the_same_image(chunk_rows: int) -> None:
    vae = VAE(VAE_TINY)
    init_random(vae, 0)
    image_BCHW = torch.rand(1, 3, 96, 64) * 2 - 1
    whole, mean = vae.encode_moments(image_BCHW), vae.encode(image_BCHW).mean_BCHW
    decoded = vae.decode(mean)
    vae.set_chunk_rows(chunk_rows)
    # a convolution's kernel may sum in another order for another height
    torch.testing.assert_close(vae.encode_moments(image_BCHW), whole, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(vae.decode(mean), decoded, atol=2e-5, rtol=1e-5)


def test_a_chunk_reads_only_its_rows_and_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = VAE(VAE_TINY)
    init_random(vae, 0)
    seen: list[int] = []
    convolve = F.conv2d

    def watched(input: Tensor, *args: object, **kwargs: object) -> Tensor:
        if args and isinstance(args[0], Tensor) and args[0].shape[-1] == 3:
            seen.append(input.shape[2])
        return convolve(input, *args, **kwargs)  # type: ignore[arg-type]

    vae.set_chunk_rows(8)
    monkeypatch.setattr(F, "conv2d", watched)
    vae.decode(torch.zeros(1, VAE_TINY.latent_channels, 4, 4))
    assert max(seen) == 10, "eight rows and a neighbour on either side"
