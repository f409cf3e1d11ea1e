"""Chains of stages: `train` may fill the caches first, and `--dry_run` prints the dataset report instead.

Stages are imported when they run, so that a dry run needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hyimg.config.commands import CacheLatentsConfig, CacheTextConfig, DatasetConfig, TrainConfig
from hyimg.config.load import select
from hyimg.errors import HyimgError
from hyimg.report import Reporter

if TYPE_CHECKING:
    from hyimg.data.caching import CacheSummary
    from hyimg.stages.train import TrainResult


def cache_latents(config: CacheLatentsConfig, report: Reporter) -> CacheSummary | None:
    """`hyimg cache-latents`; with `--dry_run` prints the report and returns None."""
    if config.report.dry_run:
        _dry_run(config, report)
        return None
    from hyimg.stages.cache_latents import cache_latents

    return cache_latents(config, report)


def cache_text(config: CacheTextConfig, report: Reporter) -> CacheSummary | None:
    """`hyimg cache-text`; with `--dry_run` prints the report and returns None."""
    if config.report.dry_run:
        _dry_run(config, report)
        return None
    from hyimg.stages.cache_text import cache_text

    return cache_text(config, report)


def train(config: TrainConfig, report: Reporter) -> TrainResult | None:
    """`hyimg train`; `--cache_latents` and `--cache_text_encoder_outputs` run those stages first.

    Everything is checked before anything is encoded, so that no encoding is wasted on a run that cannot start. With
    `--dry_run` prints the report and returns None.
    """
    caching = config.caching
    latents = caching.cache_latents or caching.cache_latents_to_disk
    text = caching.cache_text_encoder_outputs or caching.cache_text_encoder_outputs_to_disk
    if latents and config.vae.vae is None:
        raise HyimgError("`--cache_latents` needs `--vae`", hint="give the VAE, or remove the option")
    if text and (config.encoders.text_encoder is None or config.encoders.byt5 is None):
        raise HyimgError(
            "`--cache_text_encoder_outputs` needs `--text_encoder` and `--byt5`",
            hint="give both, or remove the option",
        )
    if config.report.dry_run:
        _dry_run(config, report)
        return None
    from hyimg.distributed.launch import asks_for_launch, launch

    if asks_for_launch(config.duration.num_processes):
        return launch(train, config, report, num_processes=config.duration.num_processes)
    from hyimg.stages.train import train as train_stage
    from hyimg.training.preparation import open_encoders, open_training_workspace, prepare

    prepared = prepare(config, report)
    if latents or text:
        open_training_workspace(config, report, prepared.caption_transforms)
    if text:
        open_encoders(config.encoders, prepared.precision)
    if latents:
        cache_latents(select(CacheLatentsConfig, config), report)
    if text:
        cache_text(select(CacheTextConfig, config), report)
    return train_stage(config, report, prepared=prepared)


def _dry_run(config: CacheLatentsConfig | CacheTextConfig | TrainConfig, report: Reporter) -> None:
    from hyimg.stages.dataset import dataset

    dataset(select(DatasetConfig, config), report)
