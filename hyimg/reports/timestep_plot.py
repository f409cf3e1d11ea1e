"""`--show_timesteps FILE.png`: a histogram of the timesteps that a run would draw."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hyimg.cache.atomic import atomic_path
from hyimg.checkpoints.architecture import SPATIAL_FACTOR
from hyimg.config.training import FlowMatching
from hyimg.flow.timesteps import TimestepContext, TimestepSampler, draw, sample_sigmas
from hyimg.report import Reporter
from hyimg.training.metrics import BANDS, band_name, band_of
from hyimg.training.objective import timestep_context

NUM_DRAWS = 20_000
NUM_BARS = 50
_WIDTH, _HEIGHT, _MARGIN, _BASE = 900, 420, 40, 360
_BAR, _LINE, _TEXT = (70, 110, 180), (200, 200, 200), (30, 30, 30)


def show_timesteps(flow: FlowMatching, sampler: TimestepSampler, seed: int, report: Reporter) -> None:
    """Writes the plot for an image of 2048x2048 pixels, and reports the share of each band."""
    assert flow.show_timesteps is not None
    side = 2048 // SPATIAL_FACTOR
    timestep_B = draw_timesteps(
        sampler,
        timestep_context(flow, side, side),
        seed=seed,
        min_timestep=flow.min_timestep,
        max_timestep=flow.max_timestep,
    )
    plot_timesteps(timestep_B, flow.show_timesteps, f"--timestep_sampling {flow.timestep_sampling}")
    shares = ", ".join(f"{band[1:]} {share:.1%}" for band, share in band_shares(timestep_B).items())
    report.note(f"timesteps: {shares}; wrote {flow.show_timesteps}; nothing was trained")


def draw_timesteps(
    sampler: TimestepSampler,
    context: TimestepContext,
    *,
    seed: int,
    min_timestep: float,
    max_timestep: float,
    num_draws: int = NUM_DRAWS,
) -> Tensor:
    """The timesteps (0..1000, float32) that so many images of a run would get."""
    images = [(f"image {number}", 0) for number in range(num_draws)]
    sigma_B = sample_sigmas(
        sampler,
        draw(seed, "plot", images),
        context,
        min_timestep=min_timestep,
        max_timestep=max_timestep,
    )
    return sigma_B * 1000


def band_shares(timestep_B: Tensor) -> dict[str, float]:
    """The fraction of the draws in each band, by the band's name."""
    counts = torch.bincount(torch.tensor([band_of(t) for t in timestep_B.tolist()]), minlength=len(BANDS))
    return {band_name(band): float(counts[band]) / len(timestep_B) for band in range(len(BANDS))}


def plot_timesteps(timestep_B: Tensor, path: Path, title: str) -> None:
    """Writes a histogram as a PNG. Raises HyimgError for a path that cannot be written."""
    counts = torch.histc(timestep_B, bins=NUM_BARS, min=0, max=1000)
    heights = (counts / counts.max() * (_BASE - 2 * _MARGIN)).round().int().tolist()
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    canvas = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)
    step = (_WIDTH - 2 * _MARGIN) / NUM_BARS
    for place, height in enumerate(heights):
        left = _MARGIN + place * step
        canvas.rectangle((left + 1, _BASE - height, left + step - 1, _BASE), fill=_BAR)
    for timestep in range(0, 1001, 125):
        x = _MARGIN + timestep / 1000 * (_WIDTH - 2 * _MARGIN)
        canvas.line((x, _BASE, x, _BASE + 6), fill=_TEXT)
        canvas.text((x, _BASE + 10), f"{timestep}", fill=_TEXT, font=font, anchor="mt")
    for band, share in enumerate(band_shares(timestep_B).values()):
        low, high = BANDS[band]
        x = _MARGIN + (low + high) / 2000 * (_WIDTH - 2 * _MARGIN)
        canvas.text((x, _MARGIN), f"{share:.1%}", fill=_TEXT, font=font, anchor="mm")
        if band:
            edge = _MARGIN + low / 1000 * (_WIDTH - 2 * _MARGIN)
            canvas.line((edge, _MARGIN, edge, _BASE), fill=_LINE)
    canvas.text((_MARGIN, 10), title, fill=_TEXT, font=font)
    canvas.text(
        (_WIDTH - _MARGIN, _BASE + 34), "timestep: 0 image, 1000 noise", fill=_TEXT, font=font, anchor="rm"
    )
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")
