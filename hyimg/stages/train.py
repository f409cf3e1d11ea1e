"""`hyimg train`: a frozen DiT and a LoRA on cached latents and texts. Reads no image and no encoder.

The story: check everything, open the caches, load the DiT, attach the network, run the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim import Optimizer

from hyimg.cache.identity import file_identity
from hyimg.config.commands import TrainConfig
from hyimg.config.load import flatten, replace
from hyimg.config.optimizer import LearningRate
from hyimg.data.batches import epoch_batches
from hyimg.data.describe import describe_datasets
from hyimg.data.plan import latent_store_for_training, text_store_for_training
from hyimg.data.training_data import BatchLoader, TrainingData
from hyimg.data.workspace import Workspace, open_workspace
from hyimg.encoders.text import TextEncoders
from hyimg.errors import HyimgError
from hyimg.flow.renderer import check_loras
from hyimg.flow.weighting import idle_weighting
from hyimg.lora.network import LoRANetwork
from hyimg.lora.plan import ModulePlan, NetworkArgs, plan_network
from hyimg.memory.device import compute_dtype, resolve_device
from hyimg.model.architecture import DiTArch
from hyimg.model.dit import DiT
from hyimg.model.keys import linear_modules
from hyimg.model.loading import check_dit, load_dit
from hyimg.plugins import Plugins, bind_arguments, load_plugins, parse_arguments
from hyimg.randomness import keyed_seed
from hyimg.report import Reporter, count_text, size_text
from hyimg.training.loop import train_loop
from hyimg.training.metadata import training_metadata
from hyimg.training.metrics import MetricsLog
from hyimg.training.objective import Loss, Objective
from hyimg.training.optimizers import Groups, resolve_optimizer
from hyimg.training.run import Run, Schedule
from hyimg.training.run_folder import RunFolder

_SAVE_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_HUBER_LOSSES = ("huber", "smooth_l1")


@dataclass(frozen=True)
class TrainResult:
    """What a run left: its files in the order of saving, its length, and the seed that it used."""

    saved: list[Path]
    num_steps: int
    seed: int


@dataclass(frozen=True)
class Preparation:
    """Everything about a run that can be known before a weight or a cache entry is read."""

    config: TrainConfig
    seed: int
    device: torch.device
    arch: DiTArch
    plan: tuple[ModulePlan, ...]
    loss: Loss
    timestep_sampler: Callable[..., torch.Tensor]
    make_optimizer: Callable[[Groups, float], Optimizer]
    plugins: Plugins
    folder: RunFolder


def train(config: TrainConfig, report: Reporter, *, prepared: Preparation | None = None) -> TrainResult:
    """Trains a LoRA from start to end. `prepared` is what `prepare` gave, where that was called before.

    Raises HyimgError for wrong input, a used output name or missing cache entries before the DiT is read, and
    RunError where the run fails.
    """
    prepared = prepared or prepare(config, report)
    config = prepared.config
    if config.logging.output_config:
        prepared.folder.write_config(config)
        report.note(f"wrote {prepared.folder.config_path}; nothing was trained")
        return TrainResult([], 0, prepared.seed)
    workspace = open_workspace(
        config.dataset,
        report,
        batch_size=config.duration.train_batch_size,
        prior_loss_weight=config.loss.prior_loss_weight,
    )
    if workspace.found.validation:
        raise HyimgError(
            "`validation_split` is not available yet: validation comes with the training work",
            hint="take it out of the dataset file",
        )
    loader = _open_data(prepared, workspace)
    schedule = _schedule(prepared, workspace)
    _tell(prepared, workspace, schedule, report)

    dit = load_dit(
        _given(config.dit.dit),
        device=prepared.device,
        dtype=compute_dtype(config.compute.mixed_precision),
        mmap=not config.compute.disable_mmap_load_safetensors,
    )
    if config.training_memory.gradient_checkpointing:
        dit.enable_gradient_checkpointing()
    network = _network(prepared, dit)
    optimizer = prepared.make_optimizer(network.parameter_groups(_rate(config.rate)), _rate(config.rate))
    accelerator = _accelerator(config, prepared)

    prepared.folder.begin(config)
    started = time.time()
    with MetricsLog(prepared.folder.metrics_path) as metrics:
        run = Run(
            config=config,
            seed=prepared.seed,
            folder=prepared.folder,
            schedule=schedule,
            loader=loader,
            objective=Objective(
                dit,
                prepared.loss,
                prepared.timestep_sampler,
                config.flow,
                prepared.seed,
                posterior_mean=config.caching.latent_sampling == "mean",
            ),
            network=network,
            optimizer=optimizer,
            accelerator=accelerator,
            plugins=prepared.plugins,
            metrics=metrics,
            report=report,
            describe=_describer(workspace, started),
            save_dtype=_SAVE_DTYPES[config.saving.save_precision],
        )
        try:
            train_loop(run)
        except KeyboardInterrupt:
            last = f"the last saved file is {run.saved[-1]}" if run.saved else "nothing was saved yet"
            report.warning(f"stopped after step {run.step} of {schedule.max_steps}; {last}")
            raise
        finally:
            accelerator.end_training()
    return TrainResult(run.saved, run.step, prepared.seed)


def prepare(config: TrainConfig, report: Reporter) -> Preparation:
    """Checks everything about a run that needs no weight, no image and no cache; writes nothing but a test file.

    Raises HyimgError for the first thing that is wrong.
    """
    folder = RunFolder(_given(config.saving.output_dir), config.saving.output_name, config.saving.save_format)
    folder.check(overwrite=config.saving.overwrite)
    device = resolve_device(config.compute.device)
    arch = check_dit(_given(config.dit.dit))
    if config.network_training.network_weights is not None:
        check_loras([config.network_training.network_weights], arch)
    plugins = load_plugins(config.common.plugin)
    flow = config.flow
    if flow.min_timestep >= flow.max_timestep:
        raise HyimgError(
            f"`--min_timestep` {flow.min_timestep:g} is not below `--max_timestep` {flow.max_timestep:g}",
            hint="timesteps run from 0 (the image) to 1000 (noise)",
        )
    idle = idle_weighting(flow.weighting_scheme, flow.timestep_sampling, flow.model_prediction_type)
    if idle is not None:
        report.warning(idle)
    if arch.meanflow:
        report.warning(
            "this is a distilled checkpoint: LoRAs are better trained on the base, and work on both"
        )
    seed = config.duration.seed if config.duration.seed is not None else keyed_seed(time.time_ns()) % 2**32
    return Preparation(
        config=replace(config, seed=seed),  # a drawn seed is part of what repeats the run
        seed=seed,
        device=device,
        arch=arch,
        plan=_plan_network(config, arch, report),
        loss=_loss(plugins, config),
        timestep_sampler=plugins.resolve("timestep_samplers", flow.timestep_sampling),
        make_optimizer=resolve_optimizer(
            plugins, config.optimizer.optimizer_type, config.optimizer.optimizer_args
        ),
        plugins=plugins,
        folder=folder,
    )


def _plan_network(config: TrainConfig, arch: DiTArch, report: Reporter) -> tuple[ModulePlan, ...]:
    args = NetworkArgs.parse(config.network.network_args)
    modules = linear_modules(arch)
    for warning in args.warnings(modules, strict=config.network.strict_patterns):
        report.warning(f"{warning} (`hyimg inspect-modules` lists the names)")
    plan = plan_network(
        modules, dim=config.network.network_dim, alpha=config.network.network_alpha, args=args
    )
    if not any(module.rank for module in plan):
        raise HyimgError(
            "the network is empty: every module has the rank 0",
            hint="a pattern in `network_reg_dims` must leave at least one module a rank",
        )
    return plan


def _loss(plugins: Plugins, config: TrainConfig) -> Loss:
    name = config.loss.loss_type
    loss = plugins.resolve("losses", name)
    arguments = parse_arguments(config.loss.loss_args, "--loss_args")
    if name in _HUBER_LOSSES:
        own = {key: getattr(config.loss, key) for key in ("huber_c", "huber_scale", "huber_schedule")}
        arguments = own | arguments
    return partial(loss, **bind_arguments(loss, arguments, option="--loss_args", name=name))


def _open_data(prepared: Preparation, workspace: Workspace) -> BatchLoader:
    config, samples = prepared.config, workspace.found.samples
    dataset_config = _given(config.dataset.dataset_config)
    latents = latent_store_for_training(
        workspace.latents_dir,
        samples,
        index=workspace.index,
        identity=file_identity(config.vae.vae, workspace.index) if config.vae.vae is not None else None,
        dataset_config=dataset_config,
    )
    texts = text_store_for_training(
        workspace.text_dir,
        samples,
        index=workspace.index,
        identity=_encoder_identity(config, workspace),
        dataset_config=dataset_config,
    )
    data = TrainingData(samples, latents, texts, seed=prepared.seed)
    return BatchLoader(
        data,
        num_workers=config.caching.max_data_loader_n_workers,
        persistent_workers=config.caching.persistent_data_loader_workers,
    )


def _encoder_identity(config: TrainConfig, workspace: Workspace) -> str | None:
    files = config.encoders
    if files.text_encoder is None or files.byt5 is None:
        return None
    return TextEncoders.open(files.text_encoder, files.byt5, files.tokenizer, memo=workspace.index).identity


def _schedule(prepared: Preparation, workspace: Workspace) -> Schedule:
    return Schedule.plan(
        lambda epoch: epoch_batches(workspace.found.samples, seed=prepared.seed, epoch=epoch),
        accumulation=prepared.config.optimizer.gradient_accumulation_steps,
        max_train_steps=prepared.config.duration.max_train_steps,
        max_train_epochs=prepared.config.duration.max_train_epochs,
    )


def _tell(prepared: Preparation, workspace: Workspace, schedule: Schedule, report: Reporter) -> None:
    adapted = [module for module in prepared.plan if module.rank]
    parameters = sum(module.trainable_parameters for module in adapted)
    samples = workspace.found.samples
    arch = prepared.arch
    report.note(
        f"model: {arch.num_double}+{arch.num_single} blocks, hidden {arch.hidden}, "
        f"{prepared.config.compute.mixed_precision} on {prepared.device}"
    )
    report.note(
        f"network: {len(adapted)} of {len(prepared.plan)} modules, {parameters:,} parameters "
        f"({size_text(4 * parameters)} in float32), rank {prepared.config.network.network_dim}, "
        f"alpha {prepared.config.network.network_alpha:g}"
    )
    report.note(
        f"data: {len(samples)} images, {sum(s.num_repeats for s in samples)} an epoch with repeats, "
        f"{schedule.batches_per_epoch} batches"
    )
    report.note(
        f"run: {count_text(schedule.max_steps, 'step')} in {count_text(schedule.num_epochs, 'epoch')}, "
        f"seed {prepared.seed}"
    )


def _network(prepared: Preparation, dit: DiT) -> LoRANetwork:
    network = LoRANetwork.create(dit, seed=prepared.seed, plan=prepared.plan)
    weights = prepared.config.network_training.network_weights
    if weights is not None:
        network.load_state(LoRANetwork.from_file(weights, dit).state())
    network.to(prepared.device)
    network.attach(dit)
    return network


def _accelerator(config: TrainConfig, prepared: Preparation) -> Accelerator:
    """Accelerate carries the device and the trackers; the frozen base is never wrapped."""
    set_seed(prepared.seed)  # for what a plugin may draw from the global generators
    logging_dir = config.logging.logging_dir or prepared.folder.directory / "logs"
    accelerator = Accelerator(
        cpu=prepared.device.type == "cpu", log_with=config.logging.log_with, project_dir=str(logging_dir)
    )
    if config.logging.log_with is not None:
        logged = {k: str(v) for k, v in flatten(config).items()} if config.logging.log_config else None
        accelerator.init_trackers(
            f"{config.logging.log_prefix}{config.logging.log_tracker_name}", config=logged
        )
    return accelerator


def _describer(workspace: Workspace, started: float) -> Callable[[Run], Mapping[str, str]]:
    samples = workspace.found.samples
    datasets: list[dict[str, Any]] = describe_datasets(workspace.dataset_file, samples)
    return lambda run: training_metadata(run, samples, datasets, started)


def _rate(rate: LearningRate) -> float:
    return rate.unet_lr if rate.unet_lr is not None else rate.learning_rate


def _given(path: Path | None) -> Path:
    assert path is not None, "the config's REQUIRED options were checked"
    return path
