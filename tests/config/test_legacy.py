"""Flags of the reference tool: every one of its trainer for this model is answered, and what each becomes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hyimg.cli.argv import read_arguments
from hyimg.cli.flag_names import Requests
from hyimg.config import legacy
from hyimg.config.commands import InferConfig, TrainConfig
from hyimg.config.load import make
from hyimg.config.option import ABSENT, SAME, all_options
from hyimg.data.dataset_keys import KEYS
from hyimg.errors import HyimgError

# Every option of kohya-ss/sd-scripts' hunyuan_image_train_network.py (16 February 2026), its parsers' functions read
# for `add_argument`
REFERENCE_FLAGS = """
console_log_level console_log_file console_log_simple v2 v_parameterization pretrained_model_name_or_path
tokenizer_cache_dir metadata_title metadata_author metadata_description metadata_license metadata_tags
metadata_usage_hint metadata_thumbnail metadata_merged_from metadata_trigger_phrase metadata_preprocessor
metadata_is_negative_embedding train_data_dir cache_info shuffle_caption caption_separator caption_extension
caption_extention keep_tokens keep_tokens_separator secondary_separator enable_wildcard caption_prefix
caption_suffix color_aug flip_aug face_crop_aug_range random_crop debug_dataset resolution cache_latents
vae_batch_size cache_latents_to_disk skip_cache_check enable_bucket min_bucket_reso max_bucket_reso
bucket_reso_steps bucket_no_upscale resize_interpolation token_warmup_min token_warmup_step alpha_mask
dataset_class caption_dropout_rate caption_dropout_every_n_epochs caption_tag_dropout_rate reg_data_dir in_json
dataset_repeats output_dir output_name huggingface_repo_id huggingface_repo_type huggingface_path_in_repo
huggingface_token huggingface_repo_visibility save_state_to_huggingface resume_from_huggingface async_upload
save_precision save_every_n_epochs save_every_n_steps save_n_epoch_ratio save_last_n_epochs
save_last_n_epochs_state save_last_n_steps save_last_n_steps_state save_state save_state_on_train_end resume
train_batch_size max_token_length mem_eff_attn torch_compile dynamo_backend xformers sdpa vae max_train_steps
max_train_epochs max_data_loader_n_workers persistent_data_loader_workers seed gradient_checkpointing
gradient_accumulation_steps mixed_precision full_fp16 full_bf16 fp8_base ddp_timeout ddp_gradient_as_bucket_view
ddp_static_graph clip_skip logging_dir log_with log_prefix log_tracker_name wandb_run_name log_tracker_config
wandb_api_key log_config noise_offset noise_offset_random_strength multires_noise_iterations ip_noise_gamma
ip_noise_gamma_random_strength multires_noise_discount adaptive_noise_scale zero_terminal_snr min_timestep
max_timestep loss_type huber_schedule huber_c huber_scale lowram highvram sample_every_n_steps sample_at_first
sample_every_n_epochs sample_prompts sample_sampler config_file output_config prior_loss_weight
conditioning_data_dir masked_loss deepspeed zero_stage offload_optimizer_device offload_optimizer_nvme_path
offload_param_device offload_param_nvme_path zero3_init_flag zero3_save_16bit_model
fp16_master_weights_and_gradients optimizer_type use_8bit_adam use_lion_optimizer learning_rate max_grad_norm
optimizer_args lr_scheduler_type lr_scheduler_args lr_scheduler lr_warmup_steps lr_decay_steps
lr_scheduler_num_cycles lr_scheduler_power fused_backward_pass lr_scheduler_timescale lr_scheduler_min_lr_ratio
dataset_config min_snr_gamma scale_v_pred_loss_like_noise_pred v_pred_like_loss debiased_estimation_loss
weighted_captions cpu_offload_checkpointing no_metadata save_model_as unet_lr text_encoder_lr fp8_base_unet
network_weights network_module network_dim network_alpha network_dropout network_args network_train_unet_only
network_train_text_encoder_only training_comment dim_from_weights scale_weight_norms base_weights
base_weights_multiplier no_half_vae skip_until_initial_step initial_epoch initial_step validation_seed
validation_split validate_every_n_steps validate_every_n_epochs max_validation_steps cache_text_encoder_outputs
cache_text_encoder_outputs_to_disk text_encoder_batch_size disable_mmap_load_safetensors weighting_scheme
logit_mean logit_std mode_scale blocks_to_swap text_encoder byt5 timestep_sampling sigmoid_scale
model_prediction_type discrete_flow_shift fp8_scaled fp8_vl text_encoder_cpu vae_chunk_size attn_mode split_attn
""".split()

TRAIN = {"dit": "d", "dataset_config": "s", "output_dir": "o"}
OWN = frozenset(name for opt in all_options(TrainConfig) for name in opt.names)


def test_no_flag_of_the_reference_tool_is_unknown():
    # how the run file is named is the command line's own business
    answered = OWN | legacy.LEGACY.keys() | {"config_file"}
    assert [name for name in REFERENCE_FLAGS if name not in answered] == []


def test_no_flag_is_both_an_option_and_answered_otherwise():
    assert sorted(OWN & legacy.LEGACY.keys()) == []


@pytest.mark.parametrize(
    ("given", "sampler"),
    [
        ("euler", "euler"),
        ("k_euler", "euler"),
        ("ddim", "euler"),
        ("euler_a", "euler"),
        ("heun", "heun"),
        ("dpmsolver++", "dpm++2m"),
        ("dpm++_2m", "dpm++2m"),
        ("of_a_plugin", "of_a_plugin"),
    ],
)
def test_a_sampler_of_the_reference_tool_becomes_one_of_ours(given, sampler):
    notes: list[str] = []
    assert read_arguments("infer", ["--sample_sampler", given], Requests(), notes) == {"sampler": sampler}
    assert "`--sample_sampler` is `--sampler` here" in notes[0]
    assert legacy.translate_mapping({"sample_sampler": given}, OWN, [], notes) == {"sampler": sampler}


def test_a_secret_is_in_the_config_and_in_nothing_made_of_it():
    from hyimg.config.load import flatten, replace, secrets_of

    config = make(TrainConfig, {**TRAIN, "huggingface_token": "hf_1", "wandb_api_key": "w_1"})
    assert replace(config, seed=3).hub.huggingface_token == "hf_1"
    assert sorted(secrets_of(config)) == ["hf_1", "w_1"]
    assert not {"huggingface_token", "wandb_api_key"} & flatten(config).keys()


@pytest.mark.parametrize("name", ["huggingface_repo_type", "huggingface_repo_visibility", "log_with"])
def test_a_wrong_choice_is_refused_with_the_right_ones(name):
    with pytest.raises(HyimgError, match=f"`--{name}` must be one of"):
        make(TrainConfig, {**TRAIN, name: "pubic"})


def test_values_that_change_nothing_are_taken_with_one_note(tmp_path):
    path = tmp_path / "kohya.toml"
    path.write_text(
        'sample_prompts = ""\ntext_encoder_lr = 0.0\nhuber_schedule = "snr"\nclip_skip = 1\nmax_token_length = 75\n'
        "max_train_epochs = 0\nfp8_base = true\nfp8_scaled = true\nmin_snr_gamma = 0\nmultires_noise_discount = 0.3\n"
        'keep_tokens = 0\ncaption_extension = ".txt"\nlr_scheduler_type = ""\nsave_every_n_steps = 0\n',
        encoding="utf-8",
    )
    notes: list[str] = []
    config = make(TrainConfig, TRAIN, run_file=path, notes=notes)
    assert config.memory.fp8_scaled
    assert config.duration.max_train_epochs is None
    assert config.validation.sample_prompts is None
    assert config.loss.huber_schedule == "constant"
    (taken,) = notes
    assert "huber_schedule" not in config.given
    assert taken.startswith("ignored, since it changes nothing in this run: ")
    assert taken.count("`") == 2 * 12 + 4
    assert "`text_encoder_lr = 0.0`, `clip_skip = 1`, `max_token_length = 75`" in taken
    assert '`sample_prompts = ""`' in taken
    assert taken.endswith("`--huber_schedule snr` (with `--loss_type l2`)")


@pytest.mark.parametrize(
    "flags",
    [
        ["--clip_skip", "1"],
        ["--max_token_length=75"],
        ["--text_encoder_lr", "0", "0.0"],
        ["--fp8_base", "--fp8_scaled"],
        ["--noise_offset_random_strength"],
        ["--token_warmup_min", "1"],
        ["--min_snr_gamma", "0.0"],
        ["--clip_l_dropout_rate", "0"],
        ["--t5xxl", ""],
    ],
)
def test_flags_at_values_that_change_nothing_are_taken_with_a_note(flags):
    notes: list[str] = []
    given = read_arguments("train", flags, Requests(), notes)
    assert given == ({"fp8_scaled": True} if "--fp8_scaled" in flags else {})
    (note,) = notes
    assert note.startswith("ignored")
    assert flags[0].partition("=")[0] in note


@pytest.mark.parametrize(
    "flags",
    [
        ["--clip_skip", "2"],
        ["--max_token_length", "225"],
        ["--text_encoder_lr", "0", "1e-5"],
        ["--fp8_base"],
        ["--noise_offset", "0.1", "--noise_offset_random_strength"],
        ["--token_warmup_step", "3"],
        ["--t5xxl", "t5.safetensors"],
        ["--apply_t5_attn_mask"],
    ],
)
def test_flags_at_values_that_would_count_are_refused(flags):
    with pytest.raises(HyimgError, match="not for this model"):
        read_arguments("train", flags, Requests(), [])


def test_a_value_that_would_count_is_refused_in_a_run_file_too(tmp_path):
    path = tmp_path / "kohya.toml"
    path.write_text("clip_skip = 2\ntext_encoder_lr = [0.0, 1e-5]\n", encoding="utf-8")
    with pytest.raises(HyimgError) as caught:
        make(TrainConfig, TRAIN, run_file=path)
    assert "`clip_skip` is not for this model" in caught.value.message
    assert "`text_encoder_lr` is not for this model" in caught.value.message


def test_zero_on_the_command_line_is_not_given_where_other_tools_write_it():
    notes: list[str] = []
    assert (
        make(TrainConfig, {**TRAIN, "max_train_epochs": "0"}, notes=notes).duration.max_train_epochs is None
    )
    assert notes == ["ignored, since it changes nothing in this run: `--max_train_epochs 0`"]


def test_zero_on_the_command_line_wins_over_a_run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("lr_warmup_steps = 100\nsave_every_n_steps = 5\nblocks_to_swap = 8\n", encoding="utf-8")
    notes: list[str] = []
    zeros = dict.fromkeys(("lr_warmup_steps", "save_every_n_steps", "blocks_to_swap"), "0")
    config = make(TrainConfig, {**TRAIN, **zeros}, run_file=path, notes=notes)
    assert (config.optimizer.lr_warmup_steps, config.memory.blocks_to_swap) == (0, 0)
    assert config.saving.save_every_n_steps is None
    assert config.given == TRAIN.keys()
    assert notes == ["ignored, since it changes nothing in this run: `--save_every_n_steps 0`"], (
        "0 is the default of the others"
    )


REFERENCE_DEFAULTS = json.loads(
    (Path(__file__).parent / "reference_defaults.json").read_text(encoding="utf-8")
)
"""Every option of the same parsers with its default, the same day; `infer` is hunyuan_image_minimal_inference.py."""


@pytest.mark.parametrize(("command", "config"), [("train", TrainConfig), ("infer", InferConfig)])
def test_every_default_that_differs_from_the_reference_tools_is_declared(command, config):
    reference = REFERENCE_DEFAULTS[command]
    # what stands for "not given" there, or is decided later to the same value
    same = {
        "max_timestep",
        "max_train_steps",
        "train_batch_size",
        "optimizer_type",
        "attn_mode",
        "lora_multiplier",
    }
    same |= {"infer_steps", "guidance_scale", "flow_shift"}
    off = ([], None, False, "", 0)
    for opt in all_options(config):
        declared = opt.reference_default
        if opt.name not in reference:
            assert declared in (SAME, ABSENT) or opt.name in REFERENCE_DEFAULTS["train"], opt.name
            continue
        default = list(opt.default) if isinstance(opt.default, tuple) else opt.default
        theirs = reference[opt.name]
        if declared is not SAME:
            assert declared == theirs, opt.name
            assert opt.differs, opt.name
        elif opt.name not in same:
            assert default == theirs or (default in off and theirs in off), opt.name


def test_the_reference_tools_defaults_of_dataset_keys_exist():
    declared = [key for key in KEYS.values() if key.reference_default is not SAME]
    assert len(declared) == 4
    for key in declared:
        assert REFERENCE_DEFAULTS["train"][key.name] == key.reference_default
