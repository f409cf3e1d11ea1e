"""Where stages are chained: `train` may fill the caches first."""

from __future__ import annotations

from hyimg.config.commands import CacheLatentsConfig, CacheTextConfig, TrainConfig
from hyimg.config.load import select
from hyimg.errors import HyimgError
from hyimg.report import Reporter
from hyimg.stages.cache_latents import cache_latents
from hyimg.stages.cache_text import cache_text
from hyimg.stages.train import TrainResult, prepare
from hyimg.stages.train import train as train_stage


def train(config: TrainConfig, report: Reporter) -> TrainResult:
    """`hyimg train`: with `--cache_latents` or `--cache_text_encoder_outputs` those stages run before it.

    The training itself is checked first, so that no encoding is done for a run that could not start.
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
    prepared = prepare(config, report)
    if latents:
        cache_latents(select(CacheLatentsConfig, config), report)
    if text:
        cache_text(select(CacheTextConfig, config), report)
    return train_stage(config, report, prepared=prepared)
