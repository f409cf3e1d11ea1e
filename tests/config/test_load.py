"""Options: one declaration, read from flags and a run file; all problems in one answer."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import tomli

from hyimg.config import commands
from hyimg.config.command_table import COMMAND_TABLE, config_of
from hyimg.config.dataset_options import dataset_toml
from hyimg.config.load import check_inputs, flatten, make, select
from hyimg.config.option import all_options
from hyimg.config.values import check_plain_name
from hyimg.errors import HyimgError

TRAIN = {"dit": "dit.safetensors", "dataset_config": "data.toml", "output_dir": "out"}
CONFIGS = [config_of(command) for command in COMMAND_TABLE]


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.toml"

    def write(text):
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_flags_win_over_the_file_and_the_file_over_the_defaults(run_file):
    path = run_file('network_dim = 8\nnetwork_alpha = 2\n[anything]\nlearning-rate = 3e-4\ndit = "of-file"\n')
    config = make(commands.TrainConfig, {**TRAIN, "network_dim": "32"}, run_file=path)
    assert config.network.network_dim == 32
    assert config.network.network_alpha == 2.0
    assert config.rate.learning_rate == 3e-4
    assert config.dit.dit == Path("dit.safetensors")
    assert config.optimizer.max_grad_norm == 1.0


def test_aliases_are_the_option():
    config = make(
        commands.TrainConfig,
        {**TRAIN, "dit": None, "pretrained_model_name_or_path": "x", "attn_mode": "sdpa"},
    )
    assert config.dit.dit == Path("x")
    assert config.memory.attn_mode == "torch"


def test_everything_wrong_is_said_at_once_with_the_nearest_name(run_file):
    path = run_file('netwrk_dim = 4\nmixed_precision = "bf61"\n')
    with pytest.raises(HyimgError) as caught:
        make(
            commands.TrainConfig,
            {"network_alpha": "0", "max_train_steps": "ten", "seed": "1.5"},
            run_file=path,
        )
    message = caught.value.message
    for part in (
        f"unknown key `netwrk_dim` in `{path}`; did you mean `network_dim`",
        f"`--mixed_precision` in `{path}` must be one of `auto`, `no`, `fp16`, `bf16`, got `bf61`; did you mean `bf16`",
        "`--network_alpha` must be above 0, got 0",
        "`--max_train_steps` must be a whole number, got `ten`",
        "`--seed` must be a whole number, got `1.5`",
        "`--dit` is required",
        "`--dataset_config` is required",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [("save_model_as", "ckpt", "pickle"), ("huber_schedule", "snr", "signal-to-noise")],
)
def test_values_that_cannot_be_honoured_are_refused_with_the_reason(name, value, reason):
    with pytest.raises(HyimgError, match=f"`--{name}` cannot be `{value}`: .*{reason}"):
        make(commands.TrainConfig, {**TRAIN, "loss_type": "huber", name: value})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = ", "not valid TOML"),
        ("seed = 1\n[x]\nseed = 2", "gives `seed` twice"),
        ("min_snr_gamma = 5", "not for this model"),
    ],
)
def test_a_bad_run_file_is_one_sentence(run_file, text, reason):
    with pytest.raises(HyimgError, match=reason):
        make(commands.TrainConfig, TRAIN, run_file=run_file(text))


def test_a_missing_run_file_is_named(tmp_path):
    with pytest.raises(HyimgError, match=re.escape(str(tmp_path / "none.toml"))):
        make(commands.TrainConfig, TRAIN, run_file=tmp_path / "none.toml")


def test_keys_of_the_reference_tool_are_translated_in_a_run_file(run_file):
    notes = []
    path = run_file("use_8bit_adam = true\nlowram = true\nxformers = false\n")
    config = make(commands.TrainConfig, TRAIN, run_file=path, notes=notes)
    assert config.optimizer.optimizer_type == "AdamW8bit"
    assert [n.split()[0] for n in notes] == ["`use_8bit_adam`", "`lowram`"]


def test_the_learning_rate_and_the_saved_precision_that_nobody_gives_are_those_ruled():
    config = make(commands.TrainConfig, TRAIN)  # the reference tool's are 2e-6 and float32
    assert (config.rate.learning_rate, config.rate.unet_lr, config.saving.save_precision) == (
        1e-4,
        None,
        "bf16",
    )


def test_a_config_survives_being_flattened_and_made_again():
    config = make(commands.TrainConfig, {**TRAIN, "network_args": ["a=1", "b=2"], "learning_rate": "1e-4"})
    again = make(commands.TrainConfig, {k: v for k, v in flatten(config).items() if v is not None})
    assert again == config


def test_select_carries_shared_options_to_another_command():
    config = make(commands.TrainConfig, {**TRAIN, "vae": "v", "device": "cpu", "vae_batch_size": 3})
    chosen = select(commands.CacheLatentsConfig, config)
    assert (chosen.vae.vae, chosen.compute.device, chosen.caching.vae_batch_size) == (Path("v"), "cpu", 3)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
def test_every_option_is_declared_well(config):
    options = list(all_options(config))
    names = [name for opt in options for name in opt.names]
    assert len(names) == len(set(names)), "one name, one option"
    for opt in options:
        assert opt.help
        if opt.choices and opt.default is not None:
            assert opt.default in opt.choices


# The names that the option list of the project gives `train`, beside those in `hyimg.config.legacy`
SPECIFIED_FOR_TRAIN = """
    pretrained_model_name_or_path text_encoder byt5 vae tokenizer tokenizer_cache_dir
    mixed_precision text_encoder_dtype attn_mode split_attn fp8_scaled fp8_vl text_encoder_cpu blocks_to_swap
    cpu_offload_checkpointing gradient_checkpointing vae_chunk_size torch_compile device
    disable_mmap_load_safetensors cache_dir cache_latents cache_latents_to_disk vae_batch_size
    cache_text_encoder_outputs cache_text_encoder_outputs_to_disk text_encoder_batch_size
    skip_cache_check latent_sampling caption_variants on_bad_image network_module network_dim
    network_alpha network_dropout network_args network_train_unet_only network_weights
    dim_from_weights base_weights base_weights_multiplier scale_weight_norms optimizer_type
    optimizer_args learning_rate unet_lr max_grad_norm lr_scheduler lr_scheduler_type
    lr_scheduler_args lr_warmup_steps lr_decay_steps lr_scheduler_num_cycles lr_scheduler_power
    lr_scheduler_min_lr_ratio lr_scheduler_timescale gradient_accumulation_steps
    fused_backward_pass full_bf16 full_fp16 timestep_sampling sigmoid_scale discrete_flow_shift
    model_prediction_type weighting_scheme logit_mean logit_std mode_scale min_timestep
    max_timestep loss_type huber_schedule huber_c huber_scale ip_noise_gamma
    ip_noise_gamma_random_strength masked_loss prior_loss_weight output_dir output_name
    save_model_as save_precision save_every_n_epochs save_every_n_steps save_last_n_epochs
    save_last_n_steps save_state save_state_on_train_end save_last_n_epochs_state
    save_last_n_steps_state resume max_train_epochs max_train_steps train_batch_size seed
    max_data_loader_n_workers persistent_data_loader_workers logging_dir log_with log_prefix
    log_tracker_name wandb_run_name log_config no_metadata training_comment metadata_title
    metadata_author metadata_description metadata_license metadata_tags huggingface_repo_id
    huggingface_repo_type huggingface_path_in_repo huggingface_token huggingface_repo_visibility
    save_state_to_huggingface resume_from_huggingface async_upload ddp_timeout
    ddp_gradient_as_bucket_view ddp_static_graph config config_file output_config validation_split
    validation_seed validate_every_n_steps validate_every_n_epochs max_validation_steps
    sample_prompts sample_every_n_steps sample_every_n_epochs sample_at_first plugin loss_args
    num_processes save_format resume_force on_nan ema_decay
"""


def test_every_option_of_the_specification_is_known():
    train = {name for opt in all_options(commands.TrainConfig) for name in opt.names}
    for name in SPECIFIED_FOR_TRAIN.split():
        assert name in train, name


# What the specification says of an option that is not given (its decisions ruled `auto` for the precision); the rest is
# off or not given
SPECIFIED_DEFAULTS = {
    **{"mixed_precision": "auto", "attn_mode": "torch", "blocks_to_swap": 0, "latent_sampling": "sample"},
    **{"caption_variants": 8, "on_bad_image": "error", "network_module": "lora", "network_dim": 4},
    **{
        "network_alpha": 1,
        "network_train_unet_only": True,
        "timestep_sampling": "sigma",
        "sigmoid_scale": 1.0,
    },
    **{"discrete_flow_shift": 5.0, "model_prediction_type": "raw", "weighting_scheme": "uniform"},
    **{"logit_mean": 0, "logit_std": 1, "mode_scale": 1.29, "min_timestep": 0, "max_timestep": 1000},
    **{"loss_type": "l2", "huber_schedule": "constant", "huber_c": 0.1, "huber_scale": 1.0},
    **{"prior_loss_weight": 1.0, "save_model_as": "safetensors", "save_format": "both", "on_nan": "stop"},
    **{"num_processes": 1, "ip_noise_gamma_random_strength": False, "masked_loss": False},
    **dict.fromkeys(("fp8_scaled", "fp8_vl", "text_encoder_cpu", "cpu_offload_checkpointing"), False),
    **dict.fromkeys(("gradient_checkpointing", "torch_compile", "split_attn", "no_metadata"), False),
    **dict.fromkeys(("ip_noise_gamma", "scale_weight_norms", "ema_decay", "vae_chunk_size", "seed")),
    **{"network_dropout": 0, "disable_mmap_load_safetensors": False, "resume_force": False},
}


def test_defaults_are_those_of_the_specification():
    defaults = {opt.name: opt.default for opt in all_options(commands.TrainConfig)}
    assert {name: defaults[name] for name in SPECIFIED_DEFAULTS} == SPECIFIED_DEFAULTS


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"network_dim": "99999"}, "must be at most 4096, got 99999: the layers are 3584 wide"),
        ({"caption_variants": 2**63}, "every variant is encoded and stored"),
        ({"network_train_unet_only": False}, "cannot be `false`: the text encoders are never trained"),
    ],
)
def test_values_that_would_fail_later_are_refused_at_once(given, reason):
    with pytest.raises(HyimgError, match=reason):
        make(commands.TrainConfig, {**TRAIN, **given})


@pytest.mark.parametrize("option", ["output_name", "log_tracker_name", "log_prefix"])
@pytest.mark.parametrize(
    "name", [".", "..", "a/b", "a\\b", "a:b", "what?", "NUL", "com1.txt", "x" * 201, "a.", "a\tb", " "]
)
def test_names_that_some_system_cannot_hold_are_refused(option, name):
    with pytest.raises(HyimgError, match=f"`--{option}` must be a plain name"):
        make(commands.TrainConfig, {**TRAIN, option: name})


@pytest.mark.parametrize("name", ["lora", "my lora v1.5", "猫", "console", "x" * 200])
def test_plain_names_are_taken(name):
    assert make(commands.TrainConfig, {**TRAIN, "output_name": name}).saving.output_name == name
    check_plain_name(name, "--output_name")


def test_a_name_is_refused_with_its_option_and_hint():
    with pytest.raises(HyimgError, match="`--output_name` `a/b` must be a plain name: it holds `/`\nhint: x"):
        check_plain_name("a/b", "--output_name", hint="x")


def test_a_run_file_cannot_name_another(run_file):
    path = run_file('config = "other.toml"\n')
    with pytest.raises(HyimgError, match="`config` in .*: a run file cannot name another"):
        make(commands.TrainConfig, TRAIN, run_file=path)


def test_a_run_file_that_is_no_file_or_nested_without_end_is_a_sentence(run_file, tmp_path):
    with pytest.raises(HyimgError, match="nested too deeply|not valid TOML"):
        make(commands.TrainConfig, TRAIN, run_file=run_file("a = " + "[" * 200_000))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(HyimgError, match="it is a pipe, not a file"):
            make(commands.TrainConfig, TRAIN, run_file=tmp_path / "pipe")


def test_inputs_that_are_no_files_are_named_with_their_options(tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    given = {"dit": tmp_path / "circle", "dataset_config": "x" * 5000, "output_dir": "o"}
    with pytest.raises(HyimgError) as told:
        check_inputs(make(commands.TrainConfig, given))
    assert "`--dit`: `" in told.value.message
    assert "cannot be read" in told.value.message
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(HyimgError, match="`--dit`: .* is a device or a pipe"):
            check_inputs(make(commands.TrainConfig, {**given, "dit": tmp_path / "pipe"}))


def test_what_is_always_so_is_noted_for_the_flag_alone(run_file):
    notes = []
    make(commands.TrainConfig, {**TRAIN, "network_train_unet_only": True}, notes=notes)
    assert notes == [
        "`--network_train_unet_only`: always on: the text encoders are never trained for this model"
    ]
    notes = []
    path = run_file("network_train_unet_only = true\n")
    make(commands.TrainConfig, TRAIN, run_file=path, notes=notes)
    assert notes == []  # a run's own file says it, and nobody typed it


def test_dataset_keys_in_a_run_file_are_answered_with_a_dataset_file(run_file):
    path = run_file("resolution = 512\nenable_bucket = true\nflip_aug = false\nseed = 1.5\n")
    with pytest.raises(HyimgError) as told:
        make(commands.TrainConfig, TRAIN, run_file=path)
    assert "`resolution`, `enable_bucket`: the dataset is described in a file" in told.value.message
    assert "flip_aug" not in told.value.message
    assert "`--seed`" in told.value.message


def test_a_dataset_file_made_from_flags_can_be_read(tmp_path):
    for name in ("10_ohwx man", "3_dog", "other"):
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "reg").mkdir()
    given = {
        "train_data_dir": str(tmp_path / "train"),
        "reg_data_dir": str(tmp_path / "reg"),
        "resolution": "1024,768",
        "enable_bucket": "",
        "keep_tokens": "2",
        "caption_dropout_rate": "0.1",
        "keep_tokens_separator": "|||",
    }
    document = tomli.loads("\n".join(dataset_toml(given)))
    assert document["general"] == {
        "enable_bucket": True,
        "keep_tokens": 2,
        "caption_dropout_rate": 0.1,
        "keep_tokens_separator": "|||",
    }
    (dataset,) = document["datasets"]
    assert dataset["resolution"] == [1024, 768]
    assert dataset["subsets"] == [
        {"image_dir": str(tmp_path / "train" / "10_ohwx man"), "num_repeats": 10, "class_tokens": "ohwx man"},
        {"image_dir": str(tmp_path / "train" / "3_dog"), "num_repeats": 3, "class_tokens": "dog"},
        {"image_dir": str(tmp_path / "reg"), "is_reg": True},
    ]


@pytest.mark.parametrize(
    ("text", "typed", "named"),
    [
        ('plugin = ["mine.py", "theirs"]', {}, ["`mine.py` (`plugin`)", "`theirs` (`plugin`)"]),
        ('optimizer_type = "package.Class"', {}, ["`package.Class` (`optimizer_type`)"]),
        ('lr_scheduler_type = "package.Class"', {}, ["`package.Class` (`lr_scheduler_type`)"]),
        ('optimizer_type = "Lion"\nplugin = []', {}, []),
        ('optimizer_type = "package.Class"', {"optimizer_type": "Lion"}, []),
        ('plugin = ["mine.py"]', {"plugin": ["own.py"]}, []),
        ("network_dim = 8", {"plugin": ["own.py"], "optimizer_type": "package.Class"}, []),
    ],
)
def test_code_that_a_run_file_brings_is_named_in_one_line(tmp_path, text, typed, named):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    notes = []
    make(commands.TrainConfig, {**TRAIN, **typed}, run_file=path, notes=notes)
    lines = [note for note in notes if "import code" in note]
    assert lines == [f"`{path}` makes this command import code: {', '.join(named)}"] * bool(named)


def test_every_option_that_imports_code_says_so():
    """An option that takes a place in code and is not declared so would stay unsaid."""
    found = {
        opt.name
        for config in CONFIGS
        for opt in all_options(config)
        if "package.Class" in opt.help or "module's name" in opt.help
    }
    assert found == {opt.name for config in CONFIGS for opt in all_options(config) if opt.imports is not None}
    assert {"plugin", "optimizer_type", "lr_scheduler_type"} == found
