"""`prepare`: checks everything about a run that can be checked before a weight or a cache entry is read."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hyimg.cache.atomic import require_writable_folder
from hyimg.cache.hashing import Memo
from hyimg.cache.own_files import require_no_links
from hyimg.checkpoints.architecture import DiTArch
from hyimg.checkpoints.header_check import open_dit
from hyimg.config.commands import TrainConfig
from hyimg.config.load import replace
from hyimg.config.models import TextEncoderFiles
from hyimg.config.option import warn_of_idle
from hyimg.config.run_options import Hub, Logging, Saving, Validation
from hyimg.config.training import FlowMatching, LossOptions
from hyimg.data.captions import CaptionTransforms
from hyimg.data.samples import Sample
from hyimg.data.workspace import Workspace, open_workspace, options_left_to_flags
from hyimg.distributed.collectives import backend_for
from hyimg.distributed.processes import Processes, refuse_sharding, warn_of_accelerate
from hyimg.encoders.text import TextEncoders
from hyimg.errors import HyimgError
from hyimg.flow.timesteps import TimestepSampler
from hyimg.memory.device import resolve_device
from hyimg.memory.dit_loader import DiTSetup
from hyimg.memory.precision import DTYPES, Precision, agreed, decide_precision
from hyimg.model.loading import check_vae
from hyimg.plugins import Plugins, load_plugins
from hyimg.plugins.arguments import bind_arguments, parse_arguments
from hyimg.randomness import keyed_seed
from hyimg.rendering.render_plan import require_room
from hyimg.rendering.renderer import describe_preset
from hyimg.report import Reporter
from hyimg.training.fingerprint import options_fingerprint
from hyimg.training.hub import Uploads, download_state, prepare_uploads
from hyimg.training.network_setup import NetworkSetup, prepare_network
from hyimg.training.objective import Loss, check_preservation, preservation_terms
from hyimg.training.optimization import Optimization, prepare_optimization
from hyimg.training.previews import PreviewPlan, require_prompts, sampling_of
from hyimg.training.resume import LATEST, Resumed, find_state
from hyimg.training.run_folder import RunFolder
from hyimg.training.state import read_state
from hyimg.training.trackers import check_trackers

LOG_FOLDER = "logs"
_HUBER_OPTIONS = ("huber_c", "huber_scale", "huber_schedule")


@dataclass(frozen=True)
class Preparation:
    """A checked run, before a weight or a cache entry is read: `hyimg train` may fill the caches in between.

    `config` has the seed, the precision and the number of processes filled in, `network` says what each module gets and
    starts with, `resumed` is the state to continue from. `hyimg.training.run.Run` is the run once its model is loaded.
    """

    config: TrainConfig
    device: torch.device
    precision: Precision
    dit: DiTSetup
    network: NetworkSetup
    loss: Loss
    timestep_sampler: TimestepSampler
    optimization: Optimization
    plugins: Plugins
    caption_transforms: CaptionTransforms
    previews: PreviewPlan | None
    folder: RunFolder
    processes: Processes
    resumed: Resumed | None = None
    uploads: Uploads | None = None

    @property
    def seed(self) -> int:
        assert self.config.duration.seed is not None
        return self.config.duration.seed

    @property
    def arch(self) -> DiTArch:
        return self.dit.opened.arch

    @property
    def models_run(self) -> list[str]:
        """The models that compute in this run, as `Precision.line` names them."""
        return ["DiT", "adapters", *(["VAE"] if self.previews is not None else [])]

    @property
    def logging_dir(self) -> Path:
        """Where trackers write: `--logging_dir`, or `logs` in the run folder."""
        return self.config.logging.logging_dir or self.folder.directory / LOG_FOLDER


def prepare(config: TrainConfig, report: Reporter) -> Preparation:
    """Checks everything that needs no base weight, image or cache entry; leaves nothing on disk.

    Raises HyimgError for the first thing that is wrong.
    """
    refuse_sharding()
    processes = Processes.current()
    if config.logging.logging_dir is not None and config.logging.log_with is None:
        config = replace(config, log_with="tensorboard")  # as in the reference tool
    device = resolve_device(config.compute.device, report)
    _check_processes(config.compute.device, device, processes, fused=config.optimizer.fused_backward_pass)
    opened = open_dit(config.dit.dit, mmap=not config.compute.disable_mmap_load_safetensors)
    _check_models(config, opened.arch, report)
    plugins = load_plugins(config.common.plugin)
    timestep_sampler = _timestep_sampler(plugins, config.flow)
    network = prepare_network(config, opened.arch, plugins, report)
    check_preservation(config.preservation, config.class_captions, report)
    folder = _run_folder(config.saving, network, report)
    resumed = _find_resumed(config.saving, config.hub, folder, report, processes)
    precision = _decide_precision(config, device, resumed, processes)
    dit = DiTSetup(opened, config.memory, device, precision.dit, config.training_memory)
    warn_of_accelerate(
        report,
        mixed_precision=precision.mixed_precision,
        torch_compile=config.memory.torch_compile,
        gradient_accumulation_steps=config.optimizer.gradient_accumulation_steps,
    )
    dit.check()
    optimization = prepare_optimization(
        config, plugins, network.plan, precision, report, loraplus_lr_ratio=network.args.loraplus_lr_ratio
    )
    _check_combinations(config, network, optimization)
    _check_output(config.saving, config.logging, folder, resumed)
    # what repeats the run: the seed that was drawn, the precision chosen, the number of processes started
    seed = _seed(config.duration.seed, resumed, processes)
    repeated = {"mixed_precision": precision.mixed_precision, "num_processes": processes.world}
    config = replace(config, seed=seed, **repeated)
    if resumed is not None:
        resumed.check_options(options_fingerprint(config))
    loss = _loss(plugins, config.loss)
    warn_of_idle(
        config,
        report,
        read_by_loss=frozenset(loss.keywords),
        rate_is_used=not optimization.makes_own_rate,
        has_patterns=bool(network.args.network_reg_dims or network.args.network_reg_lrs),
        several_processes=processes.world > 1,
        starts_fresh=resumed is None,
        on_gpu=device.type != "cpu",
    )
    trains = not config.logging.output_config and config.flow.show_timesteps is None
    return Preparation(
        config=config,
        device=device,
        precision=precision,
        dit=dit,
        network=network,
        loss=loss,
        timestep_sampler=timestep_sampler,
        optimization=optimization,
        plugins=plugins,
        caption_transforms=CaptionTransforms.of(config.dataset, plugins),
        previews=_plan_previews(config, dit, plugins, precision, report),
        folder=folder,
        processes=processes,
        resumed=resumed,
        uploads=prepare_uploads(config.hub, report) if trains else None,  # last: it may create a repository
    )


def _check_output(saving: Saving, logging: Logging, folder: RunFolder, resumed: Resumed | None) -> None:
    """Raises HyimgError if the run must not write where it is to write, or cannot log where it is to log."""
    folder.check(
        overwrite=saving.overwrite,
        resumed=resumed.saved.path if resumed else None,
        restarts=saving.resume == LATEST,
    )
    if logging.logging_dir is not None:
        require_writable_folder(logging.logging_dir)
    elif logging.log_with is not None:
        require_no_links(folder.directory / LOG_FOLDER, root=folder.directory)
    check_trackers(logging)


def open_training_workspace(
    config: TrainConfig, report: Reporter, transforms: CaptionTransforms | None = None
) -> Workspace:
    """The dataset and its caches as `train` uses them; raises HyimgError for what cannot be trained."""
    workspace = open_workspace(
        config.dataset,
        report,
        transforms=transforms,
        batch_size=config.duration.train_batch_size,
        prior_loss_weight=config.loss.prior_loss_weight,
        validation_split=config.validation.validation_split,
        validation_seed=config.validation.validation_seed,
    )
    _require_validation_images(config.validation, workspace.found.validation)
    samples = workspace.found.samples
    warn_of_idle(
        config,
        report,
        has_masks=any(s.subset.alpha_mask or s.mask_path is not None for s in samples),
        has_regularisation=any(s.subset.is_reg for s in samples),
        random_captions=workspace.has_random_captions,
        validates=bool(workspace.found.validation),
        left_to_flags=options_left_to_flags(workspace.dataset_file.path),
    )
    return workspace


def _require_validation_images(options: Validation, images: Sequence[Sample]) -> None:
    """Raises HyimgError if validation is requested and no image is held back for it."""
    for name in ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"):
        if getattr(options, name) is not None and not images:
            raise HyimgError(
                f"`--{name}` is given, but no image is held back for validation",
                hint="give `--validation_split 0.1`, or `validation_split` in the dataset file",
            )


def open_encoders(
    files: TextEncoderFiles, precision: Precision, memo: Memo | None = None
) -> TextEncoders | None:
    """Both text encoders, with headers checked; None if they are not given."""
    if files.text_encoder is None or files.byt5 is None:
        return None
    return TextEncoders.open(
        files.text_encoder,
        files.byt5,
        files.tokenizer,
        dtype=precision.text_encoder,
        fp8=files.fp8_vl,
        byt5_dtype=precision.byt5,
        memo=memo,
    )


def _run_folder(saving: Saving, network: NetworkSetup, report: Reporter) -> RunFolder:
    save_format = network.kind.save_format(saving.save_format, network.plan, report)
    return RunFolder(saving.output_dir, saving.output_name, save_format, saving.state_dir)


def _seed(given: int | None, resumed: Resumed | None, processes: Processes) -> int:
    """The seed that was given, else that of the state, else one drawn by the main process."""
    if given is not None:
        return given
    drawn = resumed.seed if resumed is not None else keyed_seed(time.time_ns()) % 2**32
    return int(processes.broadcast(drawn))


def _decide_precision(
    config: TrainConfig, device: torch.device, resumed: Resumed | None, processes: Processes
) -> Precision:
    """The precision of the run, the same in every process.

    A run resumed with `--mixed_precision auto` keeps the precision that it started with, on any device: only so does
    it end with the same weights.
    """
    files, options = config.encoders, config.optimizer
    decided = decide_precision(
        config.compute,
        device,
        text_encoder_dtype=files.text_encoder_dtype,
        text_encoder_device=torch.device("cpu") if files.text_encoder_cpu else device,
        full_bf16=options.full_bf16,
        full_fp16=options.full_fp16,
    )
    precision = agreed(decided, processes)
    if resumed is None or config.compute.mixed_precision != "auto":
        return precision
    before, chosen = resumed.mixed_precision, precision.mixed_precision
    if before not in DTYPES or before == chosen:
        return precision
    resumed.report.note(
        f"resumed with `--mixed_precision {before}`, as the run started (`auto` would choose `{chosen}` here)"
    )
    return dataclasses.replace(precision, mixed_precision=before)


def _check_processes(
    device_option: str | None, device: torch.device, processes: Processes, *, fused: bool
) -> None:
    """Raises HyimgError for what several processes cannot do."""
    if processes.world == 1:
        return
    if fused:
        raise HyimgError(
            "`--fused_backward_pass` cannot be used with several processes: "
            "it frees each gradient before the gradients of the other processes are added",
            hint="use only one of the two",
        )
    if device.type == "mps" or (device_option is not None and ":" in device_option):
        raise HyimgError(
            f"`--device {device_option or device}` is one device, and there are {processes.world} processes",
            hint="leave out `--device` so that each process gets its own GPU, or start one process",
        )
    backend_for(device)


def _check_combinations(config: TrainConfig, network: NetworkSetup, optimization: Optimization) -> None:
    """Raises HyimgError for options that cannot be combined."""
    if config.optimizer.fused_backward_pass and preservation_terms(
        config.preservation, config.class_captions
    ):
        raise HyimgError(
            "`--fused_backward_pass` cannot be used with output preservation, whose loss needs a second backward pass",
            hint="use only one of the two",
        )
    if config.saving.ema_decay and optimization.averages_weights:
        wrapped = config.optimizer.optimizer_schedulefree_wrapper
        what = "--optimizer_schedulefree_wrapper" if wrapped else config.optimizer.optimizer_type
        raise HyimgError(
            f"`--ema_decay` cannot be used with `{what}`, which averages the weights itself",
            hint="leave out `--ema_decay`",
        )
    if config.memory.torch_compile and (
        network.dropout.any or any(module.dora or module.parts for module in network.plan)
    ):
        raise HyimgError(
            "`--torch_compile` cannot be used with adapter dropout, DoRA or `split_qkv`",
            hint="use only one of the two",
        )


def _plan_previews(
    config: TrainConfig, dit: DiTSetup, plugins: Plugins, precision: Precision, report: Reporter
) -> PreviewPlan | None:
    """The samples to render during training, their prompts read once to find mistakes early."""
    path = config.validation.sample_prompts
    if path is None:
        return None
    assert config.duration.seed is not None
    room = partial(require_room, dit=dit, vae=config.vae, precision=precision)
    plan = PreviewPlan(
        path, dit.opened.arch, sampling_of(config.validation), config.duration.seed, plugins, room
    )
    if line := describe_preset(plan.options, plan.read(report)):
        report.note(f"samples: {line}")
    return plan


def _find_resumed(
    saving: Saving, hub: Hub, folder: RunFolder, report: Reporter, processes: Processes
) -> Resumed | None:
    """The state to resume from, found by the main process and read by all."""
    given = saving.resume
    if given is None:
        if hub.resume_from_huggingface:
            raise HyimgError(
                "`--resume_from_huggingface` without `--resume`",
                hint="name the state: `--resume OWNER/NAME/PATH`",
            )
        return None
    saved = None
    if processes.is_main:
        if hub.resume_from_huggingface:
            given = str(download_state(given, hub.huggingface_token))
        saved = find_state(given, folder, report, overwrite=saving.overwrite)
    path = processes.broadcast(str(saved.path) if saved is not None else None)
    if path is not None and saved is None:
        saved = read_state(Path(path))
    return Resumed(saved, saving.resume_force, report) if saved is not None else None


def _check_models(config: TrainConfig, arch: DiTArch, report: Reporter) -> None:
    """Raises HyimgError for a wrong VAE, and for options that the models rule out."""
    if config.vae.vae is not None:
        check_vae(config.vae.vae)
    require_prompts(config.validation, config.vae.vae)
    low, high = config.flow.min_timestep, config.flow.max_timestep
    if low >= high:
        raise HyimgError(
            f"`--min_timestep` {low:g} is not below `--max_timestep` {high:g}",
            hint="timesteps range from 0 (the image) to 1000 (noise)",
        )
    if arch.meanflow:
        report.warning("this is a distilled checkpoint: train LoRAs on the base model; they work on both")


def _loss(plugins: Plugins, options: LossOptions) -> partial[Any]:
    loss = plugins.resolve("losses", options.loss_type)
    arguments = parse_arguments(options.loss_args, "--loss_args")
    takes = inspect.signature(loss).parameters
    own = {key: getattr(options, key) for key in _HUBER_OPTIONS if key in takes}
    return partial(
        loss, **bind_arguments(loss, own | arguments, option="--loss_args", name=options.loss_type)
    )


def _timestep_sampler(plugins: Plugins, flow: FlowMatching) -> TimestepSampler:
    name, option = plugins.canonical("timestep_samplers", flow.timestep_sampling), "--timestep_sampling_args"
    sampler = plugins.resolve("timestep_samplers", name)
    arguments = parse_arguments(flow.timestep_sampling_args, option)
    return partial(sampler, **bind_arguments(sampler, arguments, option=option, name=name))
