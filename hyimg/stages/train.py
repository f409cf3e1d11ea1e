"""`hyimg train`: trains a LoRA on a frozen DiT from cached latents and texts; reads no image and no text encoder.

In order: check everything, open the caches, load the DiT, attach the network, run the loop.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from hyimg.cache.atomic import NO_ROOM, WriteError
from hyimg.cache.hashing import file_identity
from hyimg.cache.own_files import require_no_links
from hyimg.cache.prompt_embeddings import TextStore
from hyimg.config.commands import TrainConfig
from hyimg.config.load import replace as with_config
from hyimg.config.values import plain_name_problem
from hyimg.data.batches import BatchLoader, TrainingData, lost_workers_explained
from hyimg.data.caching import latent_store_for_training, text_store_for_training
from hyimg.data.captions import caption_transform_flags
from hyimg.data.samples import Sample, epoch_batches
from hyimg.data.workspace import Workspace
from hyimg.distributed.collectives import process_group
from hyimg.distributed.launch import asks_for_launch, launch
from hyimg.distributed.processes import without_settings
from hyimg.errors import DivergedError, FullMemory, StoppedError, Terminated, work_has_begun
from hyimg.hookspecs import Stateful
from hyimg.memory.out_of_memory import explain_oom, training_changes
from hyimg.memory.swap import max_blocks_to_swap
from hyimg.report import Reporter, count_text
from hyimg.reports.timestep_plot import show_timesteps
from hyimg.training.ema import AdapterEMA, averaged_weights
from hyimg.training.evaluation import Evaluation
from hyimg.training.fingerprint import run_fingerprint
from hyimg.training.loop import train_loop
from hyimg.training.metadata import describe_datasets, fixed_metadata, hash_metadata
from hyimg.training.metrics import MetricsLog
from hyimg.training.network_setup import describe_rates, merging_placement
from hyimg.training.objective import (
    Objective,
    OutputPreservation,
    class_caption_flags,
    class_captions_to_read,
    preservation_terms,
    prompt_reader,
)
from hyimg.training.preparation import Preparation, open_encoders, open_training_workspace, prepare
from hyimg.training.previews import preview_prompts, sample_prompt_flags
from hyimg.training.resume import LATEST, OptimizerPart, generators_part, network_part
from hyimg.training.run import Run
from hyimg.training.saving import check_space_of_run, is_finished, resumable_error, warn_of_unreached_saves
from hyimg.training.stepping import NonFiniteGuard
from hyimg.training.steps import Schedule, epochs_between_saves, initial_step
from hyimg.training.trackers import WANDB, TrackedRun, start_trackers, tracker_names

# torch's default for gloo; the 10 for NCCL are few when one process saves to a slow disk
_MINUTES_TO_WAIT = 30


@dataclass(frozen=True)
class TrainResult:
    """The files of a run in the order of saving, its number of steps, and its seed."""

    saved: list[Path]
    num_steps: int
    seed: int


def train(config: TrainConfig, report: Reporter, *, prepared: Preparation | None = None) -> TrainResult:
    """Trains a LoRA. `prepared` is the result of `prepare`, if that was called before.

    Raises HyimgError for wrong input, a used output name or missing cache entries before the DiT is read, and
    RunError if the run fails.
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
            show_timesteps(config.flow, prepared.timestep_sampler, prepared.seed, report)
        return TrainResult([], 0, prepared.seed)
    with processes.main_first():  # it reads the model files for their hashes, and caches those
        workspace = open_training_workspace(config, report, prepared.caption_transforms)
        loader, texts = _open_data(prepared, workspace, report)
    samples, schedule = workspace.found.samples, _schedule(prepared, workspace.found.samples)
    config = with_config(
        config,
        save_every_n_epochs=epochs_between_saves(config.saving, schedule),
        save_n_epoch_ratio=None,
        text_encoder_dtype=texts.dtype,  # of the entries that are read, so that the run file repeats the run
    )
    prepared, first_step = replace(prepared, config=config), initial_step(config.duration, schedule)
    fingerprint = run_fingerprint(config, loader.data, schedule)
    resumed = prepared.resumed
    if resumed is not None:
        resumed.check(fingerprint, processes)
        if processes.broadcast(is_finished(resumed, folder, config.saving, schedule)):
            if processes.is_main:
                folder.clean_up()
            report.note(
                f"nothing left to train: `{resumed.saved.path}` is the state of the last step, {resumed.step}; "
                "raise `--max_train_steps` or `--max_train_epochs` to train on"
            )
            return TrainResult([], resumed.step, prepared.seed)
    prepared.optimization.check_length(schedule.max_steps, report)
    warn_of_unreached_saves(config.saving, schedule.max_steps, report)
    _log_summary(prepared, samples, texts, schedule, report)
    metadata = fixed_metadata(
        config,
        samples,
        describe_datasets(workspace.dataset_file, samples),
        report,
        num_validation_images=len(workspace.found.validation),
        hashes=hash_metadata(config.dit.dit, config.vae.vae, workspace.index),
    )

    processes.wait()  # until all have seen the folder as it was
    with ExitStack() as stack:
        if processes.is_main:
            stack.enter_context(_claim(prepared, texts))
        stack.enter_context(lost_workers_explained())
        stack.enter_context(explain_oom(partial(_changes_for_memory, prepared)))
        timeout = timedelta(minutes=config.hub.ddp_timeout or _MINUTES_TO_WAIT)
        stack.enter_context(process_group(processes, prepared.device, timeout))
        run = _load_run(prepared, schedule, loader, texts, fingerprint, metadata, report)
        if resumed is None:
            run.skip_to(first_step)
        evaluation = Evaluation(run, workspace)
        processes.wait()  # one may have read the model much faster than another
        check_space_of_run(run)
        _run_loop(run, evaluation)
    return TrainResult(run.saved, run.step, run.seed)


def _run_loop(run: Run, evaluation: Evaluation) -> None:
    """The loop, then pending uploads and trackers; errors and signals are reported with the way to continue."""
    try:
        try:
            with work_has_begun(), run.metrics, run.uploads or nullcontext():
                train_loop(run, evaluation)
        finally:
            for tracker in run.accelerator.trackers:
                tracker.finish()
    except (WriteError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_ROOM:
            raise
        raise resumable_error(run, error, run.prepared.logging_dir) from error
    except (KeyboardInterrupt, Terminated):
        last = f"the last saved file is {run.last_saved}" if run.last_saved else "nothing was saved yet"
        run.report.warning(f"stopped after step {run.step} of {run.schedule.max_steps}; {last}")
        raise
    except (StoppedError, DivergedError):
        run.processes.wait()  # the first to end may end all: the main process must have uploaded and reported first
        raise


def _claim(prepared: Preparation, texts: TextStore) -> AbstractContextManager[None]:
    """Claims the run folder; the run file states the precision of the run."""
    config, resumed = prepared.config, prepared.resumed
    line = prepared.precision.line(*prepared.models_run, cached_text=texts.dtype)
    return replace(prepared.folder, heading=line).claim(
        config,
        overwrite=config.saving.overwrite,
        resumed=resumed.saved.path if resumed is not None else None,
        restarts=config.saving.resume == LATEST,
    )


def _load_run(
    prepared: Preparation,
    schedule: Schedule,
    loader: BatchLoader,
    texts: TextStore,
    fingerprint: Mapping[str, Any],
    metadata: Mapping[str, str],
    report: Reporter,
) -> Run:
    """Loads the DiT, attaches the network, and restores everything from the state of a resumed run."""
    config, resumed, optimization = prepared.config, prepared.resumed, prepared.optimization
    dit = prepared.dit.load(
        report,
        around=lambda placement: merging_placement(config.network_training, prepared.arch, placement, report),
    )
    network = prepared.network.build(
        dit, seed=prepared.seed, device=prepared.device, dtype=prepared.precision.adapters
    )
    groups = network.rate_groups(optimization.learning_rate, prepared.network.args.loraplus_lr_ratio)
    report.note(describe_rates(groups))
    stepper = optimization.stepper([group.options() for group in groups], schedule.max_steps)
    objective = Objective(
        dit,
        prepared.loss,
        prepared.timestep_sampler,
        config.flow,
        prepared.seed,
        posterior_mean=config.caching.latent_sampling == "mean",
    )
    # after the LR scheduler, which has put the first step's rate into the optimiser's groups
    optimizer_part = OptimizerPart(stepper.optimizer, report).part
    log_name = _log_name(prepared)
    started = resumed.started if resumed is not None else time.time()
    run = Run(
        prepared=prepared,
        report=report,
        schedule=schedule,
        loader=loader,
        objective=objective,
        network=network,
        stepper=stepper,
        accelerator=_accelerator(prepared, log_name, started, report),
        metrics=MetricsLog(
            prepared.folder.metrics_path,
            resumed.restore_log if resumed is not None else None,
            writes=prepared.processes.is_main,
        ),
        preservation=OutputPreservation(
            objective,
            network,
            preservation_terms(config.preservation, config.class_captions),
            prompt_reader(texts),
        ),
        guard=NonFiniteGuard(
            skip=config.saving.on_nan == "skip",
            image_paths={sample.key: sample.image_path for sample in loader.data.samples},
            is_fp16=prepared.precision.mixed_precision == "fp16",
        ),
        fingerprint=fingerprint,
        metadata=metadata,
        log_name=log_name,
        started=started,
        ema=AdapterEMA(network, config.saving.ema_decay) if config.saving.ema_decay else None,
    )
    _restore(run, optimizer_part)
    return run


def _restore(run: Run, optimizer_part: Stateful) -> None:
    """Registers the parts of the run's states, each of which is restored at once in a resumed run."""
    if run.resumed is not None:
        run.step = run.resumed.step
        run.validation_seed = run.resumed.validation_seed
        run.epoch = run.schedule.first_epoch(after_step=run.resumed.step, ended=run.resumed.epoch) - 1
    run.register_state(network_part(run.network))
    run.register_state(optimizer_part)
    for name, part in (
        ("scheduler", run.stepper.scheduler),
        ("scaler", run.stepper.scaler),
        ("ema", run.ema),
        ("losses", run.losses),
        ("guard", run.guard),
    ):
        if part is not None:
            run.register_state(Stateful(name, part.state_dict, part.load_state_dict))
    run.register_state(generators_part(run.device))
    if run.ema is not None:
        run.evaluation_modes.append(run.ema.swapped_in)
    run.evaluation_modes.append(partial(averaged_weights, run.optimizer))


def _open_data(
    prepared: Preparation, workspace: Workspace, report: Reporter
) -> tuple[BatchLoader, TextStore]:
    """The caches; raises HyimgError, with the command to run, unless they are complete and each of one model."""
    config, samples = prepared.config, workspace.found.samples
    dtypes = prepared.precision.text_entries
    encoders = open_encoders(config.encoders, prepared.precision, workspace.index)
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
        [
            *preview_prompts(config.validation),
            *class_captions_to_read(config.preservation, config.class_captions, samples, report),
        ],
        index=workspace.index,
        identities=[own.identity for own in encoders.in_dtypes(dtypes)] if encoders is not None else None,
        dtypes=dtypes,
        first=prepared.resumed.text_cache if prepared.resumed is not None else None,
        dataset_config=config.dataset.dataset_config,
        flags=class_caption_flags(config.preservation, config.class_captions)
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


def _schedule(prepared: Preparation, samples: Sequence[Sample]) -> Schedule:
    seed, duration = prepared.seed, prepared.config.duration
    return Schedule.plan(
        lambda epoch: epoch_batches(samples, seed=seed, epoch=epoch),
        accumulation=prepared.config.optimizer.gradient_accumulation_steps * prepared.processes.world,
        max_train_steps=duration.max_train_steps,
        max_train_epochs=duration.max_train_epochs,
    )


def _log_summary(
    prepared: Preparation, samples: Sequence[Sample], texts: TextStore, schedule: Schedule, report: Reporter
) -> None:
    """Reports the model, precision, memory, network, data and length of the run."""
    arch = prepared.arch
    report.note(
        f"model: {arch.num_double}+{arch.num_single} blocks, hidden {arch.hidden}, on {prepared.device}"
    )
    prepared.precision.log(report, *prepared.models_run, cached_text=texts.dtype)
    report.note(prepared.dit.describe())
    report.note(f"network: {prepared.network.describe()}")
    report.note(
        f"data: {count_text(len(samples), 'image')}, {sum(s.num_repeats for s in samples)} per epoch with repeats, "
        f"{schedule.batches_per_epoch} batches"
    )
    if prepared.processes.world > 1:
        report.note(
            f"processes: {prepared.processes.world}, sharing each step's {schedule.accumulation} batches"
        )
    report.note(
        f"run: {count_text(schedule.max_steps, 'step')} in {count_text(schedule.num_epochs, 'epoch')}, "
        f"seed {prepared.seed}"
    )
    if prepared.resumed is not None:
        report.note(
            f"resumed after {count_text(prepared.resumed.step, 'step')} from {prepared.resumed.saved.path}"
        )


def _changes_for_memory(prepared: Preparation, place: FullMemory) -> list[str]:
    """What to change when memory runs out."""
    return training_changes(
        prepared.config.memory,
        prepared.config.training_memory,
        place,
        most_blocks=max_blocks_to_swap(prepared.arch),
        is_fp8_file=prepared.dit.is_fp8_file,
        on_cpu=prepared.device.type == "cpu",
    )


def _log_name(prepared: Preparation) -> str:
    """The folder that trackers write into; a resumed run keeps its own if that still exists."""
    if prepared.resumed is not None:
        # a state may come from anyone: its name must not lead to another folder
        name = prepared.resumed.log_name
        if plain_name_problem(name) is None and (prepared.logging_dir / name).is_dir():
            return name
    config = prepared.config
    return f"{config.logging.log_prefix}{config.saving.output_name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _accelerator(prepared: Preparation, log_name: str, started: float, report: Reporter) -> Accelerator:
    """Accelerate provides the trackers.

    The loop calls backward itself and sets its own precision, so that nothing in a launcher's environment
    (accumulation, mixed precision) changes a gradient.
    """
    set_seed(prepared.seed % 2**32)  # for plugins that use the global generators
    directory = prepared.logging_dir / log_name
    logging, root = prepared.config.logging, prepared.config.logging.logging_dir or prepared.folder.directory
    for name in (logging.log_tracker_name, WANDB) if tracker_names(logging) else ():
        require_no_links(directory / name, root=root)
    with without_settings():
        accelerator = Accelerator(
            cpu=prepared.device.type == "cpu",
            mixed_precision="no",
            log_with=tracker_names(prepared.config.logging) or None,
            project_dir=str(directory),
        )
    resumed_step = prepared.resumed.step if prepared.resumed is not None else None
    tracked = TrackedRun(prepared.config, log_name, directory, started, resumed_step)
    start_trackers(accelerator, tracked, report)
    return accelerator
