"""Where stages are chained: `train` may fill the caches first."""

from __future__ import annotations

from hyimg.config.commands import CacheLatentsConfig, CacheTextConfig, TrainConfig
from hyimg.config.load import select
from hyimg.errors import HyimgError
from hyimg.report import OnceReporter, Reporter
from hyimg.stages.cache_latents import cache_latents
from hyimg.stages.cache_text import cache_text
from hyimg.stages.train import TrainResult
from hyimg.stages.train import train as train_stage
from hyimg.training.preparation import open_encoders, open_training_workspace, prepare


def train(config: TrainConfig, report: Reporter) -> TrainResult:
    """`hyimg train`: with `--cache_latents` or `--cache_text_encoder_outputs` those stages run before it.

    Everything is checked first, so that no encoding is done for a run that could not start.
    """
    caching = config.caching
    latents = caching.cache_latents or caching.cache_latents_to_disk
    text = caching.cache_text_encoder_outputs or caching.cache_text_encoder_outputs_to_disk
    if latents and config.vae.vae is None:
        raise HyimgError("`--cache_latents` needs `--vae`", hint="name the VAE, or leave the option out")
    if text and (config.encoders.text_encoder is None or config.encoders.byt5 is None):
        raise HyimgError(
            "`--cache_text_encoder_outputs` needs `--text_encoder` and `--byt5`",
            hint="name both, or leave the option out",
        )
    report = OnceReporter(report)
    prepared = prepare(config, report)
    if latents or text:
        open_training_workspace(config, report)
    if text:
        open_encoders(config)
    if latents:
        cache_latents(select(CacheLatentsConfig, config), report)
    if text:
        cache_text(select(CacheTextConfig, config), report)
    return train_stage(config, report, prepared=prepared)
