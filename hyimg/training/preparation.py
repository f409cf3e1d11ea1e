"""Everything about a run that can be known, and refused, before a weight or a cache entry is read."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from hyimg.cache.atomic import require_writable_folder
from hyimg.config.commands import TrainConfig
from hyimg.config.load import replace
from hyimg.data.caption_transforms import CaptionTransforms
from hyimg.data.workspace import Workspace, open_workspace
from hyimg.encoders.text import TextEncoders
from hyimg.errors import HyimgError
from hyimg.flow.timesteps import TimestepSampler
from hyimg.flow.weighting import idle_weighting
from hyimg.lora.plan import ModulePlan
from hyimg.memory.device import compute_dtype, resolve_device
from hyimg.memory.dit import DiTOptions
from hyimg.memory.processes import Processes
from hyimg.model.architecture import DiTArch
from hyimg.model.loading import check_dit, check_vae
from hyimg.plugins import Plugins, bind_arguments, load_plugins, parse_arguments
from hyimg.randomness import keyed_seed
from hyimg.report import Reporter
from hyimg.training.hub import download_state
from hyimg.training.identity import options_identity
from hyimg.training.network_setup import NetworkSetup, prepare_network
from hyimg.training.objective import Loss
from hyimg.training.optimization import Optimization, prepare_optimization
from hyimg.training.preservation import check_preservation, terms_of
from hyimg.training.resume import Resumed, find_state
from hyimg.training.run_folder import RunFolder
from hyimg.training.samples import SamplePlan, require_prompts, sampling_of
from hyimg.training.saving import warn_of_idle_saving
from hyimg.training.state_folder import read_state
from hyimg.training.trackers import check_trackers
from hyimg.training.uploads import Uploads, prepare_uploads
from hyimg.training.validation import require_held_back

_HUBER_OPTIONS = ("huber_c", "huber_scale", "huber_schedule")


@dataclass(frozen=True)
class Preparation:
    """A checked run: `config` has its seed and its number of processes decided, `network` says what each module
    gets and starts with, `resumed` is the state to go on from."""

    config: TrainConfig
    seed: int
    device: torch.device
    arch: DiTArch
    dit_options: DiTOptions
    network: NetworkSetup
    loss: Loss
    timestep_sampler: TimestepSampler
    optimization: Optimization
    plugins: Plugins
    caption_transforms: CaptionTransforms
    sample_plan: SamplePlan | None
    folder: RunFolder
    processes: Processes
    resumed: Resumed | None = None
    uploads: Uploads | None = None

    @property
    def plan(self) -> tuple[ModulePlan, ...]:
        return self.network.plan

    @property
    def logging_dir(self) -> Path:
        """Where trackers write: `--logging_dir`, or `logs` in the run folder."""
        return self.config.logging.logging_dir or self.folder.directory / "logs"


def prepare(config: TrainConfig, report: Reporter) -> Preparation:
    """Checks everything about a run that needs no base weight, no image and no cache; leaves nothing on disk.

    Raises HyimgError for the first thing that is wrong.
    """
    processes = Processes.current()
    if config.logging.logging_dir is not None and config.logging.log_with is None:
        config = replace(config, log_with="tensorboard")  # as in the reference tool
    device = resolve_device(config.compute.device, report)
    _check_processes(config, device, processes)
    assert config.dit.dit is not None
    arch = check_dit(config.dit.dit)
    dit_options = DiTOptions.of(config.memory, config.training_memory)
    dit_options.check(config.dit.dit, device, compute_dtype(config.compute.mixed_precision))
    if config.vae.vae is not None:
        check_vae(config.vae.vae)
    _check_flow(config, arch, report)
    require_prompts(config.validation, config.vae.vae)
    plugins = load_plugins(config.common.plugin)
    sampling = plugins.canonical("timestep_samplers", config.flow.timestep_sampling)
    idle = idle_weighting(config.flow.weighting_scheme, sampling, config.flow.model_prediction_type)
    if idle is not None:
        report.warning(idle)
    network = prepare_network(config, arch, plugins, report)
    check_preservation(config, report)
    optimization = prepare_optimization(
        config,
        plugins,
        network.plan,
        device=device,
        report=report,
        loraplus_lr_ratio=network.args.loraplus_lr_ratio,
    )
    _check_together(config, network, optimization)
    assert config.saving.output_dir is not None
    folder = RunFolder(
        config.saving.output_dir,
        config.saving.output_name,
        network.kind.save_format(config.saving.save_format, network.plan, report),
    )
    resumed = _resumed(config, folder, report, processes)
    folder.check(overwrite=config.saving.overwrite, resumed=resumed.saved.path if resumed else None)
    if config.logging.logging_dir is not None:
        require_writable_folder(config.logging.logging_dir)
    check_trackers(config.logging, report)
    seed = config.duration.seed
    if seed is None:
        drawn = resumed.seed if resumed is not None else keyed_seed(time.time_ns()) % 2**32
        seed = int(processes.broadcast(drawn))
    # what repeats the run: a drawn seed, and how many processes a launcher has started
    config = replace(config, seed=seed, num_processes=processes.world)
    if resumed is not None:
        resumed.check_options(options_identity(config))
    warn_of_idle_saving(config, report)
    trains = not config.logging.output_config and config.flow.show_timesteps is None
    return Preparation(
        config=config,
        seed=seed,
        device=device,
        arch=arch,
        dit_options=dit_options,
        network=network,
        loss=_loss(plugins, config),
        timestep_sampler=_timestep_sampler(plugins, sampling, config),
        optimization=optimization,
        plugins=plugins,
        caption_transforms=CaptionTransforms.of(config.dataset, plugins),
        sample_plan=_sample_plan(config, arch, plugins),
        folder=folder,
        processes=processes,
        resumed=resumed,
        uploads=prepare_uploads(config, report) if trains else None,  # last: it may make a repository
    )


def open_training_workspace(
    config: TrainConfig, report: Reporter, transforms: CaptionTransforms | None = None
) -> Workspace:
    """The dataset and its caches as `train` sees them; raises HyimgError for what cannot be trained yet."""
    workspace = open_workspace(
        config.dataset,
        report,
        transforms=transforms,
        batch_size=config.duration.train_batch_size,
        prior_loss_weight=config.loss.prior_loss_weight,
        validation_split=config.validation.validation_split,
        validation_seed=config.validation.validation_seed,
    )
    require_held_back(config.validation, workspace.found.validation)
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
    return TextEncoders.open(files.text_encoder, files.byt5, files.tokenizer, fp8=files.fp8_vl, memo=memo)


def _check_processes(config: TrainConfig, device: torch.device, processes: Processes) -> None:
    """Raises HyimgError for what several processes cannot do."""
    if processes.world == 1:
        return
    if config.optimizer.fused_backward_pass:
        raise HyimgError(
            "`--fused_backward_pass` cannot be used in several processes: "
            "a gradient is used up before those of the others are added to it",
            hint="leave one of the two out",
        )
    name = config.compute.device
    if device.type == "mps" or (device.type == "cuda" and name is not None and ":" in name):
        raise HyimgError(
            f"`--device {name or device}` is one device, and there are {processes.world} processes",
            hint="leave `--device` out to give each process a GPU of its own, or start one process",
        )


def _check_together(config: TrainConfig, network: NetworkSetup, optimization: Optimization) -> None:
    """Raises HyimgError for options that each work, and not with one another."""
    if config.optimizer.fused_backward_pass and terms_of(config):
        raise HyimgError(
            "`--fused_backward_pass` cannot be used with output preservation, whose loss comes in a pass of its own",
            hint="leave one of the two out",
        )
    if config.saving.ema_decay and optimization.averages_weights:
        raise HyimgError(
            f"`--ema_decay` with `{config.optimizer.optimizer_type}`, which averages the weights itself",
            hint="leave `--ema_decay` out",
        )
    if config.memory.torch_compile and (
        network.dropout.any or any(module.dora or module.parts for module in network.plan)
    ):
        raise HyimgError(
            "`--torch_compile` cannot be used with dropout of adapters, DoRA or `split_qkv`",
            hint="leave one of the two out",
        )


def _sample_plan(config: TrainConfig, arch: DiTArch, plugins: Plugins) -> SamplePlan | None:
    """The samples that are asked for, their prompts read once so that what is wrong with them is found now."""
    path = config.validation.sample_prompts
    if path is None:
        return None
    assert config.duration.seed is not None
    plan = SamplePlan(path, arch, sampling_of(config.validation), config.duration.seed, plugins)
    plan.read()
    return plan


def _resumed(
    config: TrainConfig, folder: RunFolder, report: Reporter, processes: Processes
) -> Resumed | None:
    """The state that the main process finds, in every process."""
    saving = config.saving
    if saving.resume is None:
        if saving.resume_force:
            report.warning("`--resume_force` has no effect without `--resume`")
        if config.hub.resume_from_huggingface:
            raise HyimgError(
                "`--resume_from_huggingface` without `--resume`",
                hint="name the state: `--resume OWNER/NAME/PATH`",
            )
        return None
    saved = None
    if processes.is_main:
        given = saving.resume
        if config.hub.resume_from_huggingface:
            given = str(download_state(given, config.hub.huggingface_token))
        saved = find_state(given, folder, report, overwrite=saving.overwrite)
    path = processes.broadcast(str(saved.path) if saved is not None else None)
    if path is not None and saved is None:
        saved = read_state(Path(path))
    return Resumed(saved, saving.resume_force, report) if saved is not None else None


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


def _timestep_sampler(plugins: Plugins, name: str, config: TrainConfig) -> TimestepSampler:
    sampler = plugins.resolve("timestep_samplers", name)
    option = "--timestep_sampling_args"
    arguments = parse_arguments(config.flow.timestep_sampling_args, option)
    return partial(sampler, **bind_arguments(sampler, arguments, option=option, name=name))
