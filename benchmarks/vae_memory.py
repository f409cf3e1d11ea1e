"""Encoding and decoding a picture of 1024x1024: whole, in chunks of rows, in tiles.

A VAE of the true structure at half its width, float32 on a CPU (float16 on CUDA). Memory is what the call adds to
the model at its peak.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.figures import Figure, Options, apart, median
from benchmarks.peaks import DevicePeak


@dataclass(frozen=True)
class Way:
    """How the VAE runs: `None` is whole."""

    name: str
    chunk_rows: int | None = None
    tile_size: int | None = None


WAYS = (
    Way("whole"),
    Way("chunks of 16 rows", chunk_rows=16),
    Way("tiles of 512", tile_size=512),
    Way("tiles of 512, chunks of 16 rows", chunk_rows=16, tile_size=512),
    Way("tiles of 256", tile_size=256),
)


def measure(options: Options) -> Iterator[Figure]:
    """Each way of each direction."""
    for direction in ("encode", "decode"):
        whole: dict[str, float] = {}
        for way in WAYS:
            result = (run if options.toy else lambda *a: apart(run, *a))(way, direction, options)
            whole = whole or result
            time_ratio = result["seconds"] / whole["seconds"]
            memory_ratio = result["peak_mb"] / max(whole["peak_mb"], 1e-9)
            beside = (
                "" if way is WAYS[0] else f"{time_ratio:.2f} of the time, {memory_ratio:.2f} of the memory"
            )
            values = {**vars(way), **result, "time_of_whole": time_ratio, "memory_of_whole": memory_ratio}
            yield Figure(f"{direction}, {way.name}", result["seconds"], result["peak_mb"], beside, values)


def run(way: Way, direction: str, options: Options) -> dict[str, float]:
    """Median seconds of a call, and the memory that it adds."""
    import torch

    from hyimg.checkpoints.architecture import VAE_TINY, VAEArch
    from hyimg.model.loading import init_random
    from hyimg.model.vae import VAE

    arch = VAE_TINY if options.toy else VAEArch(channels=(64, 128, 256, 256, 512, 512), latent_channels=64)
    side = 64 if options.toy else 1024
    is_cuda = options.device.startswith("cuda")
    vae = VAE(arch).requires_grad_(False)
    init_random(vae, 0)
    vae = vae.to(options.device, torch.float16 if is_cuda else torch.float32)
    vae.set_chunk_rows(way.chunk_rows)
    vae.set_tile_size(way.tile_size)
    generator = torch.Generator().manual_seed(0)
    image_BCHW = torch.rand(1, 3, side, side, generator=generator).to(options.device) * 2 - 1
    latent_BCHW = torch.randn(1, arch.latent_channels, side // 32, side // 32, generator=generator)
    latent_BCHW = latent_BCHW.to(options.device)

    def call() -> None:
        if direction == "encode":
            vae.encode(image_BCHW)
        else:
            vae.decode(latent_BCHW)
        if is_cuda:
            torch.cuda.synchronize(options.device)

    with DevicePeak(options.device) as peak:
        held = torch.cuda.memory_allocated(options.device) if is_cuda else 0
        call()
    return {"seconds": median(call, 1, warm=True), "peak_mb": (peak.num_bytes - held) / 1e6}
