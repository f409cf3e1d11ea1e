"""A training run: how long, what is saved, what is logged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hyimg.config.option import MAX_SEED, option

_TRAINING = "leave it out for now"
_FRESH = "the learning rate goes on from there too; weights and optimiser start anew"
_NO_DDP = "changes nothing: the adapter's gradients are summed in one piece, without torch's DDP"


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Length of the run."""

    max_train_steps: int | None = option(
        None, minimum=1, help="steps (not given: 1600, unless epochs are given)"
    )
    max_train_epochs: int | None = option(None, minimum=1, help="epochs; wins over the steps")
    train_batch_size: int | None = option(
        None, minimum=1, help="batch size where the dataset file does not give one (not given: 1)"
    )
    seed: int | None = option(
        None, minimum=0, maximum=MAX_SEED, help="seed of all randomness (not given: drawn, and recorded)"
    )
    num_processes: int = option(
        1, minimum=1, help="processes that train together, one a device; under a launcher, leave it out"
    )
    initial_step: int | None = option(
        None,
        minimum=0,
        help="begin as if so many steps had been done: data order, learning rate and file names go on from there",
        note=_FRESH,
    )
    initial_epoch: int | None = option(
        None,
        minimum=1,
        help="the same by epoch: the one to begin with (1: the first); a step given wins",
        note=_FRESH,
    )


@dataclass(frozen=True, kw_only=True)
class ProcessCount:
    """Processes."""

    num_processes: int = option(
        1, minimum=1, help="processes that share the work, one a device; under a launcher, leave it out"
    )


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Saving."""

    output_dir: Path | None = option(None, help="run folder")
    output_name: str = option("lora", is_name=True, help="name of the files in it")
    overwrite: bool = option(False, help="replace an earlier run of that name")
    save_model_as: str = option(
        "safetensors",
        choices=("safetensors", "ckpt", "pt"),
        help="file type; only safetensors",
        refused=dict.fromkeys(
            ("ckpt", "pt"), "it is a pickle, which can run code when it is opened; leave the option out"
        ),
    )
    save_format: str = option(
        "both",
        choices=("both", "kohya", "comfy"),
        help="names in the LoRA file: the reference tool's, ComfyUI's (under `comfy/`), or a file of each",
    )
    save_precision: str = option(
        "bf16",
        choices=("float", "fp16", "bf16"),
        synonyms={"fp32": "float"},
        help="type of the saved weights",
    )
    save_every_n_epochs: int | None = option(None, minimum=1, help="save after every so many epochs")
    save_every_n_steps: int | None = option(None, minimum=1, help="save after every so many steps")
    save_n_epoch_ratio: int | None = option(
        None,
        minimum=1,
        help="how many saves by epoch there are to be, at least: sets `--save_every_n_epochs` to epochs divided by it",
        note="it sets `--save_every_n_epochs`",
    )
    save_last_n_epochs: int | None = option(
        None, minimum=1, help="keep only the last so many of the files saved by epoch (states too)"
    )
    save_last_n_steps: int | None = option(
        None,
        minimum=1,
        help="keep only those files saved by step that are at most so many steps old (states too)",
    )
    save_state: bool = option(
        False, help="save with every LoRA, the final one too, a state that `--resume` goes on from"
    )
    save_state_on_train_end: bool = option(False, help="save a state at the end of the run")
    save_last_n_epochs_state: int | None = option(
        None, minimum=1, help="for the states, in place of `--save_last_n_epochs`"
    )
    save_last_n_steps_state: int | None = option(
        None, minimum=1, help="for the states, in place of `--save_last_n_steps`"
    )
    resume: str | None = option(
        None,
        help="go on from a state: its folder, or `latest` for the newest whole one of this run "
        "(a run that has none yet starts at its first step)",
    )
    resume_force: bool = option(
        False, help="resume although settings differ from the state's; which ones is said"
    )
    ema_decay: float | None = option(
        None, minimum=0, maximum=1, help="save a moving average of the adapter; 0.999 is usual"
    )
    on_nan: str = option(
        "stop",
        choices=("stop", "skip"),
        help="a loss or gradient that is not finite: stop the run, or leave the step out "
        "(and stop after 10 in a row)",
    )


@dataclass(frozen=True, kw_only=True)
class Logging:
    """Logging."""

    logging_dir: Path | None = option(None, help="where trackers write (not given: `logs` in the run folder)")
    log_with: str | None = option(
        None,
        choices=("tensorboard", "wandb", "all"),
        help="tracker, beside `NAME.metrics.jsonl`, which is always written; `all` is both",
    )
    log_prefix: str = option("", is_name=True, help="prefix of the tracker's run folder")
    log_tracker_name: str = option("hyimg", is_name=True, help="name of the tracker's project")
    wandb_run_name: str | None = option(None, help="name of the W&B run (not given: that of its folder)")
    wandb_api_key: str | None = option(
        None, is_secret=True, help="W&B's key, for this run; better `wandb login` or `WANDB_API_KEY`"
    )
    log_config: bool = option(False, help="give the tracker the resolved options")
    output_config: bool = option(
        False, help="write the resolved options to the run folder, and train nothing"
    )


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Metadata of the LoRA file."""

    no_metadata: bool = option(False, help="save no training metadata")
    training_comment: str | None = option(None, help="comment kept in the file")
    metadata_title: str | None = option(None, help="title (not given: the output name)")
    metadata_author: str | None = option(None, help="author")
    metadata_description: str | None = option(None, help="description")
    metadata_license: str | None = option(None, help="licence")
    metadata_tags: str | None = option(None, help="tags, separated by commas")
    metadata_usage_hint: str | None = option(None, help="a very short word on how to use it")
    metadata_trigger_phrase: str | None = option(None, help="what to write in a prompt")
    metadata_merged_from: str | None = option(None, help="what it was merged from")


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Validation and samples."""

    validation_split: float | None = option(
        None,
        minimum=0,
        maximum=0.9,
        help="share of each subset's images that is held back, where the dataset file does not say it",
    )
    validation_seed: int | None = option(None, minimum=0, help="which images these are (not given: 0)")
    validate_every_n_steps: int | None = option(None, minimum=1, help="validate after every so many steps")
    validate_every_n_epochs: int | None = option(
        None, minimum=1, help="validate after every so many epochs (neither given: each epoch)"
    )
    max_validation_steps: int | None = option(
        None, minimum=1, help="batches of held-back images, and of training images beside them, at most"
    )
    sample_prompts: Path | None = option(
        None,
        is_input=True,
        help="prompt file for samples while training: txt, toml or json; `cache-text --sample_prompts` encodes them",
    )
    sample_every_n_steps: int | None = option(None, minimum=1, help="samples after every so many steps")
    sample_every_n_epochs: int | None = option(
        None, minimum=1, help="samples after every so many epochs (nothing given: each epoch)"
    )
    sample_at_first: bool = option(False, help="samples before the first step")
    sampler: str = option("euler", help="sampler of the samples: euler, heun, dpm++2m, or a plugin's name")
    sampler_args: tuple[str, ...] = option((), help='arguments of a plugin\'s sampler: `"name=value"`')


@dataclass(frozen=True, kw_only=True)
class Hub:
    """Hub and several processes."""

    huggingface_repo_id: str | None = option(
        None, help="repository to which every saved LoRA is uploaded, `OWNER/NAME`; made where there is none"
    )
    huggingface_repo_type: str = option(
        "model", choices=("model", "dataset", "space"), help="what kind of repository it is"
    )
    huggingface_path_in_repo: str | None = option(None, help="folder in it (not given: its top)")
    huggingface_token: str | None = option(
        None, is_secret=True, help="access token; better `hf auth login` or `HF_TOKEN`"
    )
    huggingface_repo_visibility: str | None = option(
        None,
        choices=("public", "private"),
        help="who may see it (not given: a new one is private)",
    )
    save_state_to_huggingface: bool = option(False, help="upload the states that are saved, too")
    resume_from_huggingface: bool = option(
        False, help="`--resume` names a state on the hub: `OWNER/NAME/PATH[:REVISION[:TYPE]]`"
    )
    async_upload: bool = option(
        False, help="upload while training goes on; the run's end waits for what is under way"
    )
    ddp_timeout: int | None = option(
        None, minimum=1, help="minutes that a process waits for the others before it fails (not given: 30)"
    )
    ddp_gradient_as_bucket_view: bool = option(False, help="accepted, without effect", note=_NO_DDP)
    ddp_static_graph: bool = option(False, help="accepted, without effect", note=_NO_DDP)
