"""The VAE in tiles: the whole picture's numbers from parts of it, and never more at a time than a tile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hyimg.checkpoints.architecture import VAE_TINY
from hyimg.model.loading import init_random
from hyimg.model.vae import VAE, Conv3x3
from hyimg.model.vae_tiling import cut

HEIGHT, WIDTH = 160, 192
# Relative, of the norm. Random weights in float32: sums over tiles are rounded in another order (2e-6 seen for
# latents of smooth pictures, whose first norms enlarge small differences; 5e-7 otherwise)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def weights() -> VAE:
    vae = VAE(VAE_TINY)
    init_random(vae, 0)
    return vae.requires_grad_(False)


@pytest.fixture
def vae(weights: VAE) -> Iterator[VAE]:
    yield weights
    weights.set_tile_size(None)
    weights.set_chunk_rows(None)


def smooth_picture() -> Tensor:
    y, x = torch.meshgrid(torch.linspace(-1, 1, HEIGHT), torch.linspace(-1, 1, WIDTH), indexing="ij")
    return torch.stack([x, y, torch.sin(3 * x * y)])[None]


def noisy_picture() -> Tensor:
    return torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("picture", "tile_size"), [(smooth_picture, 128), (noisy_picture, 160)])
def test_tiles_give_the_same_image(vae: VAE, picture, tile_size: int) -> None:
    # two pictures of different contrast: each has statistics of its own
    image_BCHW = torch.cat([picture(), 0.3 * picture().flip(-1)])
    moments_BCHW, latent_BCHW = vae.encode_moments(image_BCHW), vae.encode(image_BCHW).mean_BCHW
    decoded_BCHW = vae.decode(latent_BCHW)
    vae.set_tile_size(tile_size)
    assert difference(vae.encode_moments(image_BCHW), moments_BCHW) < TOLERANCE
    tiled_BCHW = vae.decode(latent_BCHW)
    assert difference(tiled_BCHW, decoded_BCHW) < TOLERANCE
    no_seam = 1e-4 * float(decoded_BCHW.abs().max())
    assert float((tiled_BCHW - decoded_BCHW).abs().max()) < no_seam


def test_tiles_work_in_chunks_of_rows(vae: VAE) -> None:
    latent_BCHW = vae.encode(noisy_picture()).mean_BCHW
    whole_BCHW = vae.decode(latent_BCHW)
    vae.set_tile_size(128)
    vae.set_chunk_rows(16)
    assert difference(vae.decode(latent_BCHW), whole_BCHW) < TOLERANCE


def test_tiles_in_half_precision_differ_only_by_rounding(weights: VAE) -> None:
    vae = VAE(VAE_TINY)
    vae.load_state_dict(weights.state_dict())
    vae = vae.bfloat16().requires_grad_(False)
    latent_BCHW = weights.encode(noisy_picture()).mean_BCHW
    exact_BCHW, whole_BCHW = weights.decode(latent_BCHW), vae.decode(latent_BCHW)
    vae.set_tile_size(128)
    tiled_BCHW = vae.decode(latent_BCHW)
    assert tiled_BCHW.dtype == torch.bfloat16
    # tiles are no further from float32 than the whole picture in bfloat16 is
    assert difference(tiled_BCHW.float(), exact_BCHW) < 1.2 * difference(whole_BCHW.float(), exact_BCHW)


def test_an_image_that_fits_in_a_tile_is_bit_equal(vae: VAE) -> None:
    image_BCHW = noisy_picture()
    moments_BCHW, latent_BCHW = vae.encode_moments(image_BCHW), vae.encode(image_BCHW).mean_BCHW
    decoded_BCHW = vae.decode(latent_BCHW)
    vae.set_tile_size(WIDTH)
    assert torch.equal(vae.encode_moments(image_BCHW), moments_BCHW)
    assert torch.equal(vae.decode(latent_BCHW), decoded_BCHW)


def test_convolutions_near_the_image_run_on_tiles(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    latent_BCHW = vae.encode(noisy_picture()).mean_BCHW
    vae.set_tile_size(128)
    seen: dict[int, int] = {}
    last = len(vae.decoder.up) - 1
    levels = [*enumerate(vae.encoder.down), *((last - i, level) for i, level in enumerate(vae.decoder.up))]
    for depth, level in levels:
        for module in level.modules():
            if isinstance(module, Conv3x3):

                def watched(input: Tensor, depth: int = depth, module: Conv3x3 = module) -> Tensor:
                    seen[depth] = max(seen.get(depth, 0), *input.shape[-2:])
                    return Conv3x3.forward(module, input)

                monkeypatch.setattr(module, "forward", watched)
    vae.encode_moments(noisy_picture())
    vae.decode(latent_BCHW)
    for depth in range(3):
        assert seen[depth] <= 128 >> depth
    assert seen[3] == WIDTH >> 3, "farther in there is little to save"


def test_an_exception_in_a_tile_does_not_change_the_vae(vae: VAE, monkeypatch: pytest.MonkeyPatch) -> None:
    latent_BCHW = vae.encode(noisy_picture()).mean_BCHW
    whole_BCHW = vae.decode(latent_BCHW)
    vae.set_tile_size(128)

    def fail(input: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(vae.decoder.conv_out, "forward", fail)
        with pytest.raises(RuntimeError, match="memory"):
            vae.decode(latent_BCHW)
    vae.set_tile_size(None)
    assert torch.equal(vae.decode(latent_BCHW), whole_BCHW)


@pytest.mark.parametrize("margin", [2, 4, 8])
def test_cores_partition_the_input_and_tiles_respect_their_size(margin: int) -> None:
    side = 32
    for height, width in [(33, 7), (64, 64), (100, 31), (40, 200), (2 * (side - 2 * margin), 97)]:
        covered = torch.zeros(height, width, dtype=torch.int64)
        for tile in cut(height, width, side=side, margin=margin):
            covered[tile.core_rows, tile.core_columns] += 1
            for span, core, length in (
                (tile.rows, tile.core_rows, height),
                (tile.columns, tile.core_columns, width),
            ):
                assert span.stop - span.start <= side
                assert span.start % 2 == 0, "halving takes pixels in pairs"
                # a margin on each side, but where the picture ends
                assert span.start == max(0, core.start - margin) or span.stop - span.start == length
                assert span.stop == min(length, core.stop + margin)
        assert bool((covered == 1).all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_tiles_take_less_than_half_the_memory_for_the_same_picture() -> None:
    vae = VAE(VAE_TINY)
    init_random(vae, 0)
    vae = vae.to("cuda", torch.float16).requires_grad_(False)
    latent_BCHW = torch.randn(1, VAE_TINY.latent_channels, 32, 32, device="cuda")

    def decoded(tile_size: int | None) -> tuple[Tensor, int]:
        vae.set_tile_size(tile_size)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        image_BCHW = vae.decode(latent_BCHW).float().cpu()
        return image_BCHW, torch.cuda.max_memory_allocated() - held

    decoded(256)  # libraries take their workspace
    (whole_BCHW, whole_bytes), (tiled_BCHW, tiled_bytes) = decoded(None), decoded(256)
    # float16 rounds differently by shape: 6e-4 seen on a CPU
    assert difference(tiled_BCHW, whole_BCHW) < 5e-3
    assert tiled_bytes < whole_bytes / 2
