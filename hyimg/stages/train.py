"""`hyimg train`: a frozen DiT and a LoRA on cached latents and texts. Reads no image and no encoder.

The story: check everything, open the caches, load the DiT, attach the network, run the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from hyimg.cache.identity import file_identity
from hyimg.cache.text import TextStore
from hyimg.config.commands import TrainConfig
from hyimg.data.batches import epoch_batches
from hyimg.data.caption_transforms import caption_transform_flags
from hyimg.data.describe import describe_datasets
from hyimg.data.plan import latent_store_for_training, text_store_for_training
from hyimg.data.training_data import BatchLoader, TrainingData
from hyimg.data.workspace import Workspace
from hyimg.errors import DivergedError, StoppedError, Terminated
from hyimg.memory.device import compute_dtype
from hyimg.memory.launch import asks_for_launch, launch
from hyimg.memory.out_of_memory import Place, explained, training_changes
from hyimg.memory.reduction import process_group
from hyimg.memory.swap_plan import max_blocks_to_swap
from hyimg.model.dit import DiT
from hyimg.model.header_check import read_dit
from hyimg.model.safetensors_file import Checkpoint
from hyimg.report import Reporter, count_text
from hyimg.training.ema import AdapterEMA
from hyimg.training.evaluation_setup import make_evaluation
from hyimg.training.evaluation_weights import averaged_weights
from hyimg.training.exchange import Exchange
from hyimg.training.identity import run_identity
from hyimg.training.length_options import begin_at, initial_step, with_epochs_between_saves
from hyimg.training.loop import train_loop
from hyimg.training.metadata import hash_metadata, training_metadata
from hyimg.training.metrics import MetricsLog
from hyimg.training.network_setup import describe_rates, merging_placement
from hyimg.training.nonfinite import NonFiniteGuard
from hyimg.training.objective import Objective
from hyimg.training.preparation import Preparation, open_encoders, open_training_workspace, prepare
from hyimg.training.preservation import (
    Preservation,
    class_caption_flags,
    class_captions_to_read,
    reader,
    terms_of,
)
from hyimg.training.resume import Stateful
from hyimg.training.run import Run
from hyimg.training.samples import prompts_of_samples, sample_prompt_flags
from hyimg.training.state_parts import OptimizerPart, generators_part, network_part
from hyimg.training.steps import Schedule
from hyimg.training.timestep_plot import show_timesteps
from hyimg.training.trackers import TrackedRun, start_trackers, tracker_names

# What torch gives gloo; its 10 for NCCL are little where one process saves to a slow disk
_MINUTES_TO_WAIT = 30

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
    if prepared is None and asks_for_launch(config.duration.num_processes):
        return launch(train, config, report, num_processes=config.duration.num_processes)
    prepared = prepared or prepare(config, report)
    config, folder, processes = prepared.config, prepared.folder, prepared.processes
    if config.logging.output_config:
        if processes.is_main:
            folder.write_config(config)
        report.note(f"wrote {folder.config_path}; nothing was trained")
        return TrainResult([], 0, prepared.seed)
    if config.flow.show_timesteps is not None:
        if processes.is_main:
            show_timesteps(prepared, report)
        return TrainResult([], 0, prepared.seed)
    with processes.main_first():  # which reads the models' files for their hashes, and remembers those
        workspace = open_training_workspace(config, report, prepared.caption_transforms)
        loader, texts = _open_data(prepared, workspace, report)
    schedule = _schedule(prepared, workspace)
    config = with_epochs_between_saves(config, schedule)
    prepared, first_step = replace(prepared, config=config), initial_step(config, schedule)
    identity = run_identity(config, loader.data, schedule)
    resumed = prepared.resumed
    if resumed is not None:
        resumed.check(identity, processes)
    prepared.optimization.check_length(schedule.max_steps, report)
    _tell(prepared, workspace, schedule, report)

    state_path = resumed.saved.path if resumed is not None else None
    processes.wait()  # until all have seen the folder as it was
    claimed: AbstractContextManager[None] = nullcontext()
    if processes.is_main:
        claimed = folder.claim(config, overwrite=config.saving.overwrite, resumed=state_path)
    timeout = timedelta(minutes=config.hub.ddp_timeout or _MINUTES_TO_WAIT)
    group = process_group(processes, prepared.device, timeout)
    with claimed, explained(partial(_changes_for_memory, prepared)), group:
        run = _make_run(prepared, workspace, loader, texts, schedule, identity, report)
        if resumed is None:
            begin_at(run, first_step)
        processes.wait()  # one may have read the model much faster than another
        try:
            _run_to_its_end(run)
        except (KeyboardInterrupt, Terminated):
            last = f"the last saved file is {run.last_saved}" if run.last_saved else "nothing was saved yet"
            report.warning(f"stopped after step {run.step} of {schedule.max_steps}; {last}")
            raise
        except (StoppedError, DivergedError):
            processes.wait()  # the first process that ends may end all: not before the main one has sent and told
            raise
    return TrainResult(run.saved, run.step, prepared.seed)


def _run_to_its_end(run: Run) -> None:
    """The loop, and what is under way after it: uploads, and what trackers still have to send."""
    try:
        with run.metrics, run.uploads or nullcontext():
            train_loop(run)
    finally:
        for tracker in run.accelerator.trackers:
            tracker.finish()


def _make_run(
    prepared: Preparation,
    workspace: Workspace,
    loader: BatchLoader,
    texts: TextStore,
    schedule: Schedule,
    identity: Mapping[str, Any],
    report: Reporter,
) -> Run:
    """Loads the DiT, attaches the network, and puts everything where the state to go on from has it."""
    config, resumed = prepared.config, prepared.resumed
    assert config.dit.dit is not None
    dit = _load_dit(prepared, report)
    optimization = prepared.optimization
    network = prepared.network.build(
        dit, seed=prepared.seed, device=prepared.device, dtype=optimization.adapter_dtype
    )
    groups = network.rate_groups(optimization.learning_rate, prepared.network.args.loraplus_lr_ratio)
    report.note(describe_rates(groups))
    stepper = optimization.stepper([group.options() for group in groups], schedule.max_steps)
    ema = AdapterEMA(network, config.saving.ema_decay) if config.saving.ema_decay else None
    objective = Objective(
        dit,
        prepared.loss,
        prepared.timestep_sampler,
        config.flow,
        prepared.seed,
        posterior_mean=config.caching.latent_sampling == "mean",
    )
    # made after the schedule, which has put the first step's rate into the optimiser's groups
    optimizer_part = OptimizerPart(stepper.optimizer, report).part
    log_name = _log_name(prepared)
    started = resumed.started if resumed is not None else time.time()
    run = Run(
        config=config,
        seed=prepared.seed,
        folder=prepared.folder,
        schedule=schedule,
        loader=loader,
        objective=objective,
        network=network,
        stepper=stepper,
        accelerator=_accelerator(prepared, log_name, started, report),
        plugins=prepared.plugins,
        metrics=MetricsLog(
            prepared.folder.metrics_path,
            resumed.saved.metrics() if resumed is not None else "",
            writes=prepared.processes.is_main,
        ),
        report=report,
        describe=_describer(config, workspace, started),
        save_dtype=_SAVE_DTYPES[config.saving.save_precision],
        preservation=Preservation(objective, network, terms_of(config), reader(texts)),
        ema=ema,
        guard=NonFiniteGuard(
            skip=config.saving.on_nan == "skip",
            image_paths={sample.key: sample.image_path for sample in workspace.found.samples},
        ),
        evaluation=make_evaluation(prepared, workspace, loader.data, objective),
        identity=identity,
        log_name=log_name,
        started=started,
        exchange=Exchange(prepared.processes, prepared.device),
        resumed=resumed,
        uploads=prepared.uploads,
    )
    _take_up(run, optimizer_part)
    return run


def _take_up(run: Run, optimizer_part: Stateful) -> None:
    """Gives the run its parts, which its states hold, each at once where the state to go on from has it."""
    if run.resumed is not None:
        run.step = run.resumed.step
        run.epoch = run.schedule.first_epoch(after_step=run.resumed.step, ended=run.resumed.epoch) - 1
    run.remember(network_part(run.network))
    run.remember(optimizer_part)
    for name, part in (("scheduler", run.stepper.scheduler), ("scaler", run.stepper.scaler)):
        if part is not None:
            run.remember(Stateful(name, part.state_dict, part.load_state_dict))
    if run.ema is not None:
        run.remember(Stateful("ema", run.ema.state_dict, run.ema.load_state_dict))
        run.evaluation_modes.append(run.ema.swapped_in)
    run.evaluation_modes.append(partial(averaged_weights, run.stepper.optimizer))
    run.remember(Stateful("losses", run.losses.state_dict, run.losses.load_state_dict))
    run.remember(Stateful("guard", run.guard.state_dict, run.guard.load_state_dict))
    run.remember(generators_part(run.exchange.device))


def _open_data(
    prepared: Preparation, workspace: Workspace, report: Reporter
) -> tuple[BatchLoader, TextStore]:
    """The caches, complete and each of one model; raises HyimgError with the command to run where they are not."""
    config, samples = prepared.config, workspace.found.samples
    encoders = open_encoders(config, workspace)
    latents = latent_store_for_training(
        workspace.latents_dir,
        workspace.all_samples,
        index=workspace.index,
        identity=file_identity(config.vae.vae, workspace.index) if config.vae.vae is not None else None,
        dataset_config=config.dataset.dataset_config,
        skip_check=config.caching.skip_cache_check,
    )
    texts = text_store_for_training(
        workspace.text_dir,
        workspace.all_samples,
        [*prompts_of_samples(config.validation), *class_captions_to_read(config, samples, report)],
        index=workspace.index,
        identity=encoders.identity if encoders is not None else None,
        dataset_config=config.dataset.dataset_config,
        flags=class_caption_flags(config)
        + sample_prompt_flags(config.validation)
        + caption_transform_flags(config.dataset, config.common.plugin),
        skip_check=config.caching.skip_cache_check,
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
        accumulation=prepared.config.optimizer.gradient_accumulation_steps * prepared.processes.world,
        max_train_steps=prepared.config.duration.max_train_steps,
        max_train_epochs=prepared.config.duration.max_train_epochs,
    )


def _tell(prepared: Preparation, workspace: Workspace, schedule: Schedule, report: Reporter) -> None:
    config, arch, samples = prepared.config, prepared.arch, workspace.found.samples
    report.note(
        f"model: {arch.num_double}+{arch.num_single} blocks, hidden {arch.hidden}, "
        f"{config.compute.mixed_precision} on {prepared.device}"
    )
    assert config.dit.dit is not None
    computes_in = compute_dtype(config.compute.mixed_precision)
    report.note(prepared.dit_options.describe(config.dit.dit, prepared.device, computes_in))
    report.note(f"network: {prepared.network.describe()}")
    report.note(
        f"data: {count_text(len(samples), 'image')}, {sum(s.num_repeats for s in samples)} an epoch with repeats, "
        f"{schedule.batches_per_epoch} batches"
    )
    if prepared.processes.world > 1:
        report.note(
            f"processes: {prepared.processes.world}, which share each step's {schedule.accumulation} batches"
        )
    report.note(
        f"run: {count_text(schedule.max_steps, 'step')} in {count_text(schedule.num_epochs, 'epoch')}, "
        f"seed {prepared.seed}"
    )
    if prepared.resumed is not None:
        report.note(
            f"resumed: {count_text(prepared.resumed.step, 'step')} done, from {prepared.resumed.saved.path}"
        )


def _load_dit(prepared: Preparation, report: Reporter) -> DiT:
    config = prepared.config
    assert config.dit.dit is not None
    return prepared.dit_options.load(
        config.dit.dit,
        prepared.device,
        compute_dtype(config.compute.mixed_precision),
        report,
        mmap=not config.compute.disable_mmap_load_safetensors,
        around=lambda placement: merging_placement(config, prepared.arch, placement, report),
    )


def _changes_for_memory(prepared: Preparation, place: Place) -> list[str]:
    """What to change where memory runs out."""
    config = prepared.config
    assert config.dit.dit is not None
    return training_changes(
        config.memory,
        config.training_memory,
        place,
        most_blocks=max_blocks_to_swap(prepared.arch),
        is_fp8_file=read_dit(Checkpoint.open(config.dit.dit)).quantization is not None,
        on_cpu=prepared.device.type == "cpu",
    )


def _log_name(prepared: Preparation) -> str:
    """The folder that trackers write into; a resumed run goes on in its own, where that is still there."""
    if prepared.resumed is not None and (prepared.logging_dir / prepared.resumed.log_name).is_dir():
        return prepared.resumed.log_name
    config = prepared.config
    return f"{config.logging.log_prefix}{config.saving.output_name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _accelerator(prepared: Preparation, log_name: str, started: float, report: Reporter) -> Accelerator:
    """Accelerate carries the device and the trackers.

    The loop calls backward itself and the precision is ours, so that nothing in a launcher's environment (its
    accumulation or mixed precision) changes a gradient.
    """
    set_seed(prepared.seed % 2**32)  # for what a plugin may draw from the global generators
    directory = prepared.logging_dir / log_name
    accelerator = Accelerator(
        cpu=prepared.device.type == "cpu",
        mixed_precision="no",
        log_with=tracker_names(prepared.config.logging) or None,
        project_dir=str(directory),
    )
    tracked = TrackedRun(prepared.config, log_name, directory, started, prepared.resumed)
    start_trackers(accelerator, tracked, report)
    return accelerator


def _describer(
    config: TrainConfig, workspace: Workspace, started: float
) -> Callable[[Run], Mapping[str, str]]:
    samples = workspace.found.samples
    datasets: list[dict[str, Any]] = describe_datasets(workspace.dataset_file, samples)
    return partial(
        training_metadata,
        samples=samples,
        dataset=datasets,
        started=started,
        num_validation_images=len(workspace.found.validation),
        hashes=hash_metadata(config.dit.dit, config.vae.vae, workspace.index),
    )
