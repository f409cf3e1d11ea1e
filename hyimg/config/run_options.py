"""A training run: its length, what it saves, logs, validates and uploads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hyimg.config.option import ABSENT, MAX_SEED, REQUIRED, Fact, Given, Never, Only, Unless, option
from hyimg.config.rendering import PRESETS

_FRESH = "the learning-rate schedule continues from there; weights and optimiser start fresh"
_FROM_THE_START = (Fact("starts_fresh", "the run resumes from a state, which has its step"),)
_WITH_REPOSITORY = (Given("huggingface_repo_id"),)
_WITH_TRACKER = (Given("log_with", "logging_dir"),)
_WITH_WANDB = (Only("log_with", "wandb", "all"),)
_WITH_METADATA = (Unless("no_metadata"),)
_WITH_SAMPLES = (Given("sample_prompts"),)
_NO_DDP = (Never("the adapter's gradients are all-reduced directly, without torch's DDP"),)


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Length of the run."""

    max_train_steps: int | None = option(
        None,
        minimum=1,
        help="number of steps (not given: 1600, unless epochs are given)",
        needs=(Unless("max_train_epochs"),),
    )
    max_train_epochs: int | None = option(
        None, minimum=1, help="number of epochs; wins over the steps", means_nothing=(0,)
    )
    train_batch_size: int | None = option(
        None,
        minimum=1,
        help="batch size where the dataset file sets none (not given: 1)",
        needs=(Fact("left_to_flags", "the dataset file sets it everywhere"),),
    )
    seed: int | None = option(
        None, minimum=0, maximum=MAX_SEED, help="seed of all randomness (not given: random, and recorded)"
    )
    num_processes: int = option(
        1, minimum=1, help="number of training processes, one per device; omit it under a launcher"
    )
    initial_step: int | None = option(
        None,
        minimum=0,
        help="start as if this many steps had been done: data order, learning rate and file names continue from there",
        needs=_FROM_THE_START,
        note=_FRESH,
    )
    initial_epoch: int | None = option(
        None,
        minimum=1,
        help="the epoch to start with (1: the first), like `--initial_step`, which wins",
        needs=(Unless("initial_step"), *_FROM_THE_START),
        note=_FRESH,
    )


@dataclass(frozen=True, kw_only=True)
class ProcessCount:
    """Processes."""

    num_processes: int = option(
        1, minimum=1, help="number of processes that share the work, one per device; omit it under a launcher"
    )


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Saving."""

    output_dir: Path = option(REQUIRED, help="run folder")
    output_name: str = option(
        "lora",
        text="name",
        help="name of the files",
        means_nothing=("",),
        reference_default=None,
        differs="`last`, `epoch` and `at` there",
    )
    overwrite: bool = option(False, help="replace an earlier run of the same name")
    save_model_as: str = option(
        "safetensors",
        choices=("safetensors", "ckpt", "pt"),
        help="file type; only safetensors is supported",
        refused=dict.fromkeys(
            ("ckpt", "pt"), "it is a pickle, which can run code when opened; omit the option"
        ),
    )
    save_format: str = option(
        "both",
        reference_default=ABSENT,
        differs="only its own names",
        choices=("both", "kohya", "comfy"),
        help="key names in the LoRA file: the reference tool's, ComfyUI's (in `comfy/`), or one file of each",
    )
    save_precision: str = option(
        "bf16",
        choices=("float", "fp16", "bf16"),
        synonyms={"fp32": "float"},
        help="type of the saved weights",
        reference_default=None,
        differs="float32 there; bf16 is half the size, and what adapters are applied in",
    )
    save_every_n_epochs: int | None = option(
        None,
        minimum=1,
        help="save every N epochs",
        needs=(Unless("save_n_epoch_ratio"),),
        means_nothing=(0,),
    )
    save_every_n_steps: int | None = option(None, minimum=1, help="save every N steps", means_nothing=(0,))
    save_at_steps: tuple[int, ...] = option(
        (),
        minimum=1,
        help="also save after these steps (`500,800`); `--save_last_n_steps` does not remove these files",
    )
    save_n_epoch_ratio: int | None = option(
        None,
        minimum=1,
        help="minimum number of saves by epoch: sets `--save_every_n_epochs` to the epochs divided by it",
        means_nothing=(0,),
        note="it sets `--save_every_n_epochs`",
    )
    save_last_n_epochs: int | None = option(
        None,
        minimum=1,
        help="keep only the last N files saved by epoch (and states)",
        needs=(Given("save_every_n_epochs", "save_n_epoch_ratio"),),
        means_nothing=(0,),
    )
    save_last_n_steps: int | None = option(
        None,
        minimum=1,
        help="keep only files saved by step within the last N steps (and states)",
        needs=(Given("save_every_n_steps", "save_at_steps"),),
        means_nothing=(0,),
    )
    save_state: bool = option(
        False, help="save a state for `--resume` with every LoRA, including the final one"
    )
    state_dir: Path | None = option(None, help="folder of the states (not given: the run folder)")
    save_state_on_train_end: bool = option(
        False, help="save a state at the end of the run", needs=(Unless("save_state"),)
    )
    save_last_n_epochs_state: int | None = option(
        None,
        minimum=1,
        help="like `--save_last_n_epochs`, for the states",
        needs=(Given("save_every_n_epochs", "save_n_epoch_ratio"), Given("save_state")),
        means_nothing=(0,),
    )
    save_last_n_steps_state: int | None = option(
        None,
        minimum=1,
        help="like `--save_last_n_steps`, for the states",
        needs=(Given("save_every_n_steps", "save_at_steps"), Given("save_state")),
        means_nothing=(0,),
    )
    resume: str | None = option(
        None,
        help="resume from a state: its folder, or `latest` for the newest complete one of this run "
        "(without one, the run starts at the first step)",
        text="path",
    )
    resume_force: bool = option(
        False,
        help="resume even if settings differ from the state's; the differences are listed",
        needs=(Given("resume"),),
    )
    ema_decay: float | None = option(
        None, minimum=0, maximum=1, help="save an exponential moving average of the adapter; 0.999 is usual"
    )
    on_nan: str = option(
        "stop",
        choices=("stop", "skip"),
        help="what to do about a loss or gradient that is not finite: stop the run, or skip the step "
        "(and stop after 10 in a row)",
    )


@dataclass(frozen=True, kw_only=True)
class Logging:
    """Logging."""

    logging_dir: Path | None = option(
        None, help="folder of the trackers (not given: `logs` in the run folder)"
    )
    log_with: str | None = option(
        None,
        choices=("tensorboard", "wandb", "all"),
        help="tracker, in addition to `NAME.metrics.jsonl`, which is always written; `all` is both",
    )
    log_prefix: str = option("", text="name", help="prefix of the tracker's run folder", needs=_WITH_TRACKER)
    log_tracker_name: str = option(
        "hyimg",
        text="name",
        help="name of the tracker's project",
        needs=_WITH_TRACKER,
        means_nothing=("",),
        reference_default=None,
        differs="`network_train` there",
    )
    wandb_run_name: str | None = option(
        None, help="name of the W&B run (not given: that of its folder)", needs=_WITH_WANDB
    )
    wandb_api_key: str | None = option(
        None,
        text="secret",
        help="W&B API key for this run; prefer `wandb login` or `WANDB_API_KEY`",
        needs=_WITH_WANDB,
    )
    log_config: bool = option(False, help="send the resolved options to the tracker", needs=_WITH_TRACKER)
    output_config: bool = option(False, help="write the resolved options to the run folder and exit")


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Metadata of the LoRA file."""

    no_metadata: bool = option(False, help="save no training metadata")
    training_comment: str | None = option(None, help="comment to store in the file", needs=_WITH_METADATA)
    metadata_title: str | None = option(None, help="title (not given: the output name)", needs=_WITH_METADATA)
    metadata_author: str | None = option(None, help="author", needs=_WITH_METADATA)
    metadata_description: str | None = option(None, help="description", needs=_WITH_METADATA)
    metadata_license: str | None = option(None, help="licence", needs=_WITH_METADATA)
    metadata_tags: str | None = option(None, help="tags, separated by commas", needs=_WITH_METADATA)
    metadata_usage_hint: str | None = option(None, help="short usage hint", needs=_WITH_METADATA)
    metadata_trigger_phrase: str | None = option(
        None, help="trigger phrase to use in prompts", needs=_WITH_METADATA
    )
    metadata_merged_from: str | None = option(None, help="models it was merged from", needs=_WITH_METADATA)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Validation and samples."""

    validation_split: float | None = option(
        None,
        minimum=0,
        maximum=1,
        help="share of each subset's images held out for validation, where the dataset file sets none",
        needs=(Fact("left_to_flags", "the dataset file sets it everywhere"),),
    )
    validation_seed: int | None = option(
        None,
        minimum=0,
        maximum=MAX_SEED,
        help="seed of validation: its noise, and which images are held out where the dataset file does not set it "
        "(not given: 0, whatever `--seed` is)",
        needs=(Fact("validates", "no image is held out for validation"),),
        reference_default=None,
        differs="there it defaults to `--seed`, so that runs with different seeds are not comparable",
    )
    validate_every_n_steps: int | None = option(None, minimum=1, help="validate every N steps")
    validate_every_n_epochs: int | None = option(
        None, minimum=1, help="validate every N epochs (neither given: each epoch)"
    )
    max_validation_steps: int | None = option(
        None, minimum=1, help="maximum number of batches of held-out images, and of as many training images"
    )
    sample_prompts: Path | None = option(
        None,
        is_input=True,
        help="prompt file (txt, toml or json) for samples during training; `cache-text --sample_prompts` encodes them",
    )
    sample_every_n_steps: int | None = option(
        None, minimum=1, help="render samples every N steps", means_nothing=(0,)
    )
    sample_every_n_epochs: int | None = option(
        None,
        minimum=1,
        help="render samples every N epochs (nothing given: each epoch)",
        means_nothing=(0,),
        reference_default=None,
        differs="with `--sample_prompts` alone, samples after each epoch; there none",
    )
    sample_at_first: bool = option(False, help="render samples before the first step")
    sample_preset: str | None = option(
        None,
        choices=tuple(PRESETS),
        help="render samples as `infer --preset` does (comfyui: without APG)",
        needs=_WITH_SAMPLES,
    )
    sampler: str = option(
        "euler",
        help="sampler for the samples: euler, heun, dpm++2m, or a plugin's name",
        needs=_WITH_SAMPLES,
    )
    sampler_args: tuple[str, ...] = option(
        (), help='arguments of a plugin\'s sampler: `"name=value"`', needs=_WITH_SAMPLES
    )


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Hub and multiple processes."""

    huggingface_repo_id: str | None = option(
        None, help="repository to which every saved LoRA is uploaded, `OWNER/NAME`; created if missing"
    )
    huggingface_repo_type: str = option(
        "model",
        choices=("model", "dataset", "space"),
        help="type of the repository",
        needs=_WITH_REPOSITORY,
        means_nothing=("",),
        reference_default=None,
        differs="the only type for LoRAs",
    )
    huggingface_path_in_repo: str | None = option(
        None, help="folder in the repository (not given: its root)", needs=_WITH_REPOSITORY
    )
    huggingface_token: str | None = option(
        None,
        text="secret",
        help="access token; prefer `hf auth login` or `HF_TOKEN`",
        needs=(Given("huggingface_repo_id", "resume_from_huggingface"),),
    )
    huggingface_repo_visibility: str | None = option(
        None,
        choices=("public", "private"),
        help="visibility of the repository (not given: a new one is private)",
        needs=_WITH_REPOSITORY,
    )
    save_state_to_huggingface: bool = option(
        False,
        help="also upload the saved states",
        needs=(Given("save_state", "save_state_on_train_end"),),
    )
    resume_from_huggingface: bool = option(
        False, help="`--resume` names a state on the hub: `OWNER/NAME/PATH[:REVISION[:TYPE]]`"
    )
    async_upload: bool = option(
        False,
        help="upload during training; the run waits for unfinished uploads before it ends",
        needs=_WITH_REPOSITORY,
    )
    ddp_timeout: int | None = option(
        None,
        minimum=1,
        help="minutes that a process waits for the others before failing (not given: 30)",
        needs=(Fact("several_processes", "the run has one process"),),
        means_nothing=(0,),
    )
    ddp_gradient_as_bucket_view: bool = option(False, help="no effect", needs=_NO_DDP)
    ddp_static_graph: bool = option(False, help="no effect", needs=_NO_DDP)
