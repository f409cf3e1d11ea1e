"""Everything about a run that can be known, and refused, before a weight or a cache entry is read."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.optim import Optimizer

from hyimg.cache.atomic import require_writable_folder
from hyimg.config.commands import TrainConfig
from hyimg.config.load import replace
from hyimg.data.workspace import Workspace, open_workspace
from hyimg.encoders.text import TextEncoders
from hyimg.errors import HyimgError
from hyimg.flow.timesteps import TimestepSampler
from hyimg.flow.weighting import idle_weighting
from hyimg.lora.plan import ModulePlan
from hyimg.memory.device import resolve_device
from hyimg.model.architecture import DiTArch
from hyimg.model.loading import check_dit, check_vae
from hyimg.plugins import Plugins, bind_arguments, load_plugins, parse_arguments
from hyimg.randomness import keyed_seed
from hyimg.report import Reporter
from hyimg.training.network_setup import NetworkSetup, prepare_network
from hyimg.training.objective import Loss
from hyimg.training.optimizers import Groups, resolve_optimizer
from hyimg.training.preservation import check_preservation
from hyimg.training.run_folder import RunFolder

_HUBER_OPTIONS = ("huber_c", "huber_scale", "huber_schedule")


@dataclass(frozen=True)
class Preparation:
    """A checked run: `config` has its seed decided, `network` what each module gets and starts with."""

    config: TrainConfig
    seed: int
    device: torch.device
    arch: DiTArch
    network: NetworkSetup
    loss: Loss
    timestep_sampler: TimestepSampler
    make_optimizer: Callable[[Groups, float], Optimizer]
    plugins: Plugins
    folder: RunFolder

    @property
    def plan(self) -> tuple[ModulePlan, ...]:
        return self.network.plan

    @property
    def learning_rate(self) -> float:
        """`--unet_lr`, or `--learning_rate`."""
        rate = self.config.rate
        return rate.unet_lr if rate.unet_lr is not None else rate.learning_rate

    @property
    def logging_dir(self) -> Path:
        """Where trackers write: `--logging_dir`, or `logs` in the run folder."""
        return self.config.logging.logging_dir or self.folder.directory / "logs"


def prepare(config: TrainConfig, report: Reporter) -> Preparation:
    """Checks everything about a run that needs no base weight, no image and no cache; leaves nothing on disk.

    Raises HyimgError for the first thing that is wrong.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise HyimgError(
            "training in several processes is not available yet",
            hint="start `hyimg train` without a launcher",
        )
    if config.logging.logging_dir is not None and config.logging.log_with is None:
        config = replace(config, log_with="tensorboard")  # as in the reference tool
    device = resolve_device(config.compute.device)
    assert config.dit.dit is not None
    arch = check_dit(config.dit.dit)
    if config.vae.vae is not None:
        check_vae(config.vae.vae)
    _check_flow(config, arch, report)
    plugins = load_plugins(config.common.plugin)
    sampling = plugins.canonical("timestep_samplers", config.flow.timestep_sampling)
    idle = idle_weighting(config.flow.weighting_scheme, sampling, config.flow.model_prediction_type)
    if idle is not None:
        report.warning(idle)
    network = prepare_network(config, arch, report)
    check_preservation(config, report)
    optimizer = config.optimizer
    make_optimizer = resolve_optimizer(plugins, optimizer.optimizer_type, optimizer.optimizer_args)
    assert config.saving.output_dir is not None
    folder = RunFolder(config.saving.output_dir, config.saving.output_name, config.saving.save_format)
    folder.check(overwrite=config.saving.overwrite)
    if config.logging.logging_dir is not None:
        require_writable_folder(config.logging.logging_dir)
    seed = config.duration.seed if config.duration.seed is not None else keyed_seed(time.time_ns()) % 2**32
    return Preparation(
        config=replace(config, seed=seed),  # a drawn seed is part of what repeats the run
        seed=seed,
        device=device,
        arch=arch,
        network=network,
        loss=_loss(plugins, config),
        timestep_sampler=plugins.resolve("timestep_samplers", sampling),
        make_optimizer=make_optimizer,
        plugins=plugins,
        folder=folder,
    )


def open_training_workspace(config: TrainConfig, report: Reporter) -> Workspace:
    """The dataset and its caches as `train` sees them; raises HyimgError for what cannot be trained yet."""
    workspace = open_workspace(
        config.dataset,
        report,
        batch_size=config.duration.train_batch_size,
        prior_loss_weight=config.loss.prior_loss_weight,
    )
    if workspace.found.validation:
        raise HyimgError(
            "`validation_split` is not available yet", hint="take it out of the dataset file, or set it to 0"
        )
    has_mask = any(s.subset.alpha_mask or s.mask_path is not None for s in workspace.found.samples)
    if config.loss.masked_loss and not has_mask:
        report.warning(
            "`--masked_loss` has no effect: the dataset has neither `alpha_mask` nor masks in a folder"
        )
    return workspace


def open_encoders(config: TrainConfig, workspace: Workspace | None = None) -> TextEncoders | None:
    """Both text encoders, headers checked, where they are named; else None."""
    files = config.encoders
    if files.text_encoder is None or files.byt5 is None:
        return None
    memo = workspace.index if workspace is not None else None
    return TextEncoders.open(files.text_encoder, files.byt5, files.tokenizer, memo=memo)


def _check_flow(config: TrainConfig, arch: DiTArch, report: Reporter) -> None:
    flow = config.flow
    if flow.min_timestep >= flow.max_timestep:
        raise HyimgError(
            f"`--min_timestep` {flow.min_timestep:g} is not below `--max_timestep` {flow.max_timestep:g}",
            hint="timesteps run from 0 (the image) to 1000 (noise)",
        )
    if arch.meanflow:
        report.warning(
            "this is a distilled checkpoint: LoRAs are better trained on the base, and work on both"
        )


def _loss(plugins: Plugins, config: TrainConfig) -> Loss:
    name = config.loss.loss_type
    loss = plugins.resolve("losses", name)
    arguments = parse_arguments(config.loss.loss_args, "--loss_args")
    takes = inspect.signature(loss).parameters
    own = {key: getattr(config.loss, key) for key in _HUBER_OPTIONS if key in takes}
    return partial(loss, **bind_arguments(loss, own | arguments, option="--loss_args", name=name))
