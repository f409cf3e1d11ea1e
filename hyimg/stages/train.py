"""`hyimg train`: a frozen DiT and a LoRA on cached latents and texts. Reads no image and no encoder.

The story: check everything, open the caches, load the DiT, attach the network, run the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from hyimg.cache.identity import file_identity
from hyimg.cache.text import TextStore
from hyimg.config.commands import TrainConfig
from hyimg.config.load import flatten
from hyimg.data.batches import epoch_batches
from hyimg.data.describe import describe_datasets
from hyimg.data.plan import latent_store_for_training, text_store_for_training
from hyimg.data.training_data import BatchLoader, TrainingData
from hyimg.data.workspace import Workspace
from hyimg.memory.activations import enable_gradient_checkpointing
from hyimg.memory.device import compute_dtype
from hyimg.model.loading import Placement, load_dit
from hyimg.report import Reporter, count_text
from hyimg.training.ema import AdapterEMA
from hyimg.training.loop import train_loop
from hyimg.training.metadata import training_metadata
from hyimg.training.metrics import MetricsLog
from hyimg.training.network_setup import describe_rates, merging_placement
from hyimg.training.objective import Objective
from hyimg.training.preparation import Preparation, open_encoders, open_training_workspace, prepare
from hyimg.training.preservation import (
    Preservation,
    class_caption_flags,
    class_captions_to_read,
    reader,
    terms_of,
)
from hyimg.training.run import Run, Schedule

_SAVE_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainResult:
    """What a run left: its files in the order of saving, its length, and the seed that it used."""

    saved: list[Path]
    num_steps: int
    seed: int


def train(config: TrainConfig, report: Reporter, *, prepared: Preparation | None = None) -> TrainResult:
    """Trains a LoRA from start to end. `prepared` is what `prepare` gave, where that was called before.

    Raises HyimgError for wrong input, a used output name or missing cache entries before the DiT is read, and
    RunError where the run fails.
    """
    prepared = prepared or prepare(config, report)
    config, folder = prepared.config, prepared.folder
    if config.logging.output_config:
        folder.write_config(config)
        report.note(f"wrote {folder.config_path}; nothing was trained")
        return TrainResult([], 0, prepared.seed)
    workspace = open_training_workspace(config, report)
    loader, texts = _open_data(prepared, workspace, report)
    schedule = _schedule(prepared, workspace)
    _tell(prepared, workspace, schedule, report)

    with folder.claim(config, overwrite=config.saving.overwrite):
        assert config.dit.dit is not None
        placement = Placement(prepared.device, compute_dtype(config.compute.mixed_precision))
        dit = load_dit(
            config.dit.dit,
            placement=merging_placement(config, prepared.arch, placement, report),
            mmap=not config.compute.disable_mmap_load_safetensors,
        )
        if config.training_memory.gradient_checkpointing:
            enable_gradient_checkpointing(dit)
        network = prepared.network.build(dit, seed=prepared.seed, device=prepared.device)
        groups = network.rate_groups(prepared.learning_rate, prepared.network.args.loraplus_lr_ratio)
        report.note(describe_rates(groups))
        optimizer = prepared.make_optimizer([group.options() for group in groups], prepared.learning_rate)
        objective = Objective(
            dit,
            prepared.loss,
            prepared.timestep_sampler,
            config.flow,
            prepared.seed,
            posterior_mean=config.caching.latent_sampling == "mean",
        )
        accelerator = _accelerator(prepared)
        with MetricsLog(folder.metrics_path) as metrics:
            run = Run(
                config=config,
                seed=prepared.seed,
                folder=folder,
                schedule=schedule,
                loader=loader,
                objective=objective,
                network=network,
                optimizer=optimizer,
                accelerator=accelerator,
                plugins=prepared.plugins,
                metrics=metrics,
                report=report,
                describe=_describer(workspace, time.time()),
                save_dtype=_SAVE_DTYPES[config.saving.save_precision],
                preservation=Preservation(objective, network, terms_of(config), reader(texts)),
                ema=AdapterEMA(network, config.saving.ema_decay) if config.saving.ema_decay else None,
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


def _open_data(
    prepared: Preparation, workspace: Workspace, report: Reporter
) -> tuple[BatchLoader, TextStore]:
    """The caches, complete and each of one model; raises HyimgError with the command to run where they are not."""
    config, samples = prepared.config, workspace.found.samples
    encoders = open_encoders(config, workspace)
    latents = latent_store_for_training(
        workspace.latents_dir,
        samples,
        index=workspace.index,
        identity=file_identity(config.vae.vae, workspace.index) if config.vae.vae is not None else None,
        dataset_config=config.dataset.dataset_config,
    )
    texts = text_store_for_training(
        workspace.text_dir,
        samples,
        class_captions_to_read(config, samples, report),
        index=workspace.index,
        identity=encoders.identity if encoders is not None else None,
        dataset_config=config.dataset.dataset_config,
        flags=class_caption_flags(config),
    )
    loader = BatchLoader(
        TrainingData(samples, latents, texts, seed=prepared.seed),
        num_workers=config.caching.max_data_loader_n_workers,
        persistent_workers=config.caching.persistent_data_loader_workers,
    )
    return loader, texts


def _schedule(prepared: Preparation, workspace: Workspace) -> Schedule:
    return Schedule.plan(
        lambda epoch: epoch_batches(workspace.found.samples, seed=prepared.seed, epoch=epoch),
        accumulation=prepared.config.optimizer.gradient_accumulation_steps,
        max_train_steps=prepared.config.duration.max_train_steps,
        max_train_epochs=prepared.config.duration.max_train_epochs,
    )


def _tell(prepared: Preparation, workspace: Workspace, schedule: Schedule, report: Reporter) -> None:
    config, arch, samples = prepared.config, prepared.arch, workspace.found.samples
    report.note(
        f"model: {arch.num_double}+{arch.num_single} blocks, hidden {arch.hidden}, "
        f"{config.compute.mixed_precision} on {prepared.device}"
    )
    report.note(f"network: {prepared.network.describe()}")
    report.note(
        f"data: {count_text(len(samples), 'image')}, {sum(s.num_repeats for s in samples)} an epoch with repeats, "
        f"{schedule.batches_per_epoch} batches"
    )
    report.note(
        f"run: {count_text(schedule.max_steps, 'step')} in {count_text(schedule.num_epochs, 'epoch')}, "
        f"seed {prepared.seed}"
    )


def _accelerator(prepared: Preparation) -> Accelerator:
    """Accelerate carries the device and the trackers.

    The loop calls backward itself and the precision is ours, so that nothing in a launcher's environment (its
    accumulation or mixed precision) changes a gradient.
    """
    set_seed(prepared.seed % 2**32)  # for what a plugin may draw from the global generators
    config = prepared.config
    logging = config.logging
    run_name = f"{logging.log_prefix}{config.saving.output_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    accelerator = Accelerator(
        cpu=prepared.device.type == "cpu",
        mixed_precision="no",
        log_with=logging.log_with,
        project_dir=str(prepared.logging_dir / run_name),
    )
    if logging.log_with is not None:
        logged = {k: str(v) for k, v in flatten(config).items()} if logging.log_config else None
        accelerator.init_trackers(logging.log_tracker_name, config=logged)
    return accelerator


def _describer(workspace: Workspace, started: float) -> Callable[[Run], Mapping[str, str]]:
    samples = workspace.found.samples
    datasets: list[dict[str, Any]] = describe_datasets(workspace.dataset_file, samples)
    return lambda run: training_metadata(run, samples, datasets, started)
