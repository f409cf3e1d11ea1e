"""What a saved file tells about its run, and that it can keep silent."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from torch.nn import Parameter

from hyimg.checkpoints.safetensors_file import read_header
from hyimg.errors import HyimgError
from hyimg.plugins import load_plugins
from hyimg.training.metadata import _optimizer_text, dataset_dirs, fitting_subsets, most_frequent_tags
from hyimg.training.optimizers import resolve_optimizer


@pytest.fixture
def metadata(train):
    """Trains and gives the final file's metadata, in one of the two formats."""

    def call(folder="", **options):
        run = train(**options)
        return read_header(run.folder.directory / folder / "lora.safetensors").metadata

    return call


@pytest.mark.parametrize("folder", ["", "comfy"])
def test_no_metadata_leaves_nothing_that_tells_of_the_run(metadata, folder):
    kept = metadata(folder, no_metadata=True, training_comment="mine", metadata_author="me")
    assert {key for key in kept if not key.startswith("sshs_")} == set()


@pytest.mark.parametrize("folder", ["", "comfy"])
def test_numbers_of_the_run_are_told_as_they_were(metadata, folder):
    told = metadata(
        folder, max_train_steps=3, train_batch_size=3, seed=5, unet_lr=3e-4, max_grad_norm=0, network_dim=2
    )
    expected = {
        "ss_steps": "3",
        "ss_epoch": "1",  # two batches an epoch: the second is not complete
        "ss_num_epochs": "2",
        "ss_max_train_steps": "3",
        "ss_num_batches_per_epoch": "2",
        "ss_num_train_images": "4",
        "ss_num_reg_images": "0",
        "ss_seed": "5",
        "ss_unet_lr": "0.0003",
        "ss_max_grad_norm": "0.0",
        "ss_network_dim": "2",
        "modelspec.resolution": "64x64",
        "modelspec.title": "lora",
    }
    assert {key: told[key] for key in expected} == expected
    assert told["ss_training_finished_at"] > told["ss_training_started_at"]


def test_what_the_user_says_of_the_file_is_in_it(metadata):
    said = {"training_comment": "a comment", "metadata_title": "Cats", "metadata_author": "me"}
    said |= {
        "metadata_usage_hint": "write ohwx",
        "metadata_trigger_phrase": "ohwx",
        "metadata_merged_from": "x, y",
    }
    said |= {"metadata_description": "four cats", "metadata_license": "MIT", "metadata_tags": "cat, red"}
    told = metadata(**said)
    assert told["ss_training_comment"] == "a comment"
    for name in (key.removeprefix("metadata_") for key in said if key.startswith("metadata_")):
        assert told[f"modelspec.{name}"] == said[f"metadata_{name}"]


def test_optimiser_and_network_arguments_are_told(metadata):
    told = metadata(
        optimizer_type="SGDNesterov",
        optimizer_args=("momentum=0.5",),
        network_args=("network_reg_dims=img_attn_qkv=2", "loraplus_lr_ratio=4"),
    )
    assert told["ss_network_module"] == "networks.lora_hunyuan_image"
    assert told["ss_optimizer"] == "torch.optim.sgd.SGD(momentum=0.5)"
    # text, as the reference tool passes it on
    assert json.loads(told["ss_network_args"]) == {
        "network_reg_dims": "img_attn_qkv=2",
        "loraplus_lr_ratio": "4",
    }


@pytest.mark.parametrize(
    ("optimizer", "args", "text"),
    [
        ("AdamW", (), "torch.optim.adamw.AdamW"),
        (
            "AdamW",
            ("betas=0.9,0.99", "weight_decay=.1"),
            "torch.optim.adamw.AdamW(betas=(0.9, 0.99),weight_decay=0.1)",
        ),
        # which the reference tool passes whether given or not
        ("SGDNesterov", (), "torch.optim.sgd.SGD(momentum=0.9)"),
    ],
)
def test_the_optimizer_is_written_as_the_reference_tool_writes_it(optimizer, args, text):
    made = resolve_optimizer(load_plugins([]), optimizer, args)(
        [{"params": [Parameter(torch.zeros(2))]}], 1e-4
    )
    assert _optimizer_text(made, args) == text


def test_text_is_utf8_and_tags_are_written_once(metadata, make_dataset):
    told = metadata(dataset_config=make_dataset('caption_prefix = "猫 "'), training_comment="写")
    assert '"caption_prefix": "猫 "' in told["ss_datasets"]
    assert json.loads(told["ss_tag_frequency"]) == {"images": {"cat" * n: 1 for n in (1, 2, 3, 4)}}
    assert "catcat" not in told["ss_datasets"]


def test_tags_that_take_too_much_room_are_dropped_and_reported_before_the_first_step(
    metadata, report, monkeypatch
):
    monkeypatch.setattr("hyimg.training.metadata.MAX_TAG_BYTES", 44)  # the folder, `cat` and `catcat`
    notes: list[str] = []
    monkeypatch.setattr(report, "note", notes.append)
    told = metadata()
    assert json.loads(told["ss_tag_frequency"]) == {"images": {"cat": 1, "catcat": 1}}
    (told_of,) = [n for n, line in enumerate(notes) if "has room for 2 of the 4 tags" in line]
    assert told_of < next(n for n, line in enumerate(notes) if line.startswith("saved "))


def test_the_most_frequent_tags_are_kept_whatever_their_order():
    frequency = {"a": {"rare": 1, "often": 5}, "b": {"猫" * 50: 9, "twice": 2}}
    assert most_frequent_tags(frequency, 1000) == (frequency, 0)
    # `"often":5` and a comma and blanks are 12 bytes, a folder 9; the long one does not fit, and the next may
    assert most_frequent_tags(frequency, 45) == ({"a": {"often": 5}, "b": {"twice": 2}}, 2)
    folders = {f"folder {number}": {"tag": 1} for number in range(1000)}
    kept, num_dropped = most_frequent_tags(folders, 300)
    assert len(json.dumps(kept)) <= 300
    assert len(kept) == 1000 - num_dropped > 5


def test_subsets_that_take_too_much_room_are_dropped_and_reported(metadata, report, monkeypatch):
    notes: list[str] = []
    monkeypatch.setattr(report, "note", notes.append)
    monkeypatch.setattr("hyimg.training.metadata.MAX_DATASETS_BYTES", 500)
    told = metadata(max_train_steps=1)
    assert (told["ss_datasets"], told["ss_dataset_dirs"]) == ("[]", "{}")
    assert any(
        "`ss_dataset_dirs` have room for the first 0 of the 1 subsets (500 B at most)" in line
        for line in notes
    )


def test_the_first_subsets_are_kept():
    datasets = [
        {"resolution": [64, size], "subsets": [{"image_dir": f"{n}"} for n in range(100)]}
        for size in (64, 96)
    ]
    whole = len(json.dumps(datasets))
    assert fitting_subsets(datasets, whole + 10) == (datasets, 0)
    for room in (whole - 10, whole // 2, whole // 3, 50, 10):
        kept, num_dropped = fitting_subsets(datasets, room)
        assert len(json.dumps(kept)) <= room
        subsets = [subset for dataset in kept for subset in dataset["subsets"]]
        assert subsets == [subset for dataset in datasets for subset in dataset["subsets"]][: len(subsets)]
        assert len(subsets) == 200 - num_dropped
        assert num_dropped > 0


def test_metadata_that_no_header_holds_is_refused_before_the_model_is_read(train, monkeypatch):
    monkeypatch.setattr("hyimg.training.metadata.MAX_HEADER_BYTES", 10_020_000)
    monkeypatch.setattr("hyimg.memory.dit_loader.load_dit", lambda *a, **k: pytest.fail("the DiT is read"))
    with pytest.raises(HyimgError, match=r"`ss_training_comment` with 60\.0 kB") as caught:
        train(training_comment="写" * 20_000)
    assert "--no_metadata" in caught.value.hint


# What the reference tool's train_network.py and its trainer for this model write, but for the commit of its own
# repository and what it tells without a dataset file
REFERENCE_KEYS = """
adaptive_noise_scale base_model_version cache_latents caption_dropout_every_n_epochs caption_dropout_rate
caption_tag_dropout_rate clip_skip dataset_dirs datasets debiased_estimation discrete_flow_shift epoch
face_crop_aug_range fp8_base fp8_base_unet full_fp16 gradient_accumulation_steps gradient_checkpointing huber_c
huber_scale huber_schedule ip_noise_gamma ip_noise_gamma_random_strength learning_rate logit_mean logit_std
loss_type lowram lr_scheduler lr_warmup_steps max_grad_norm max_token_length max_train_steps max_validation_steps
min_snr_gamma mixed_precision mode_scale model_prediction_type multires_noise_discount multires_noise_iterations
network_alpha network_args network_dim network_dropout network_module new_sd_model_hash new_vae_hash noise_offset
noise_offset_random_strength num_batches_per_epoch num_epochs num_reg_images num_train_images
num_validation_images optimizer output_name prior_loss_weight resize_interpolation scale_weight_norms sd_model_hash
sd_model_name seed session_id sigmoid_scale steps tag_frequency text_encoder_lr timestep_sampling training_comment
training_finished_at training_started_at unet_lr v2 vae_hash vae_name validate_every_n_epochs
validate_every_n_steps validation_seed validation_split zero_terminal_snr
""".split()


def test_no_key_of_the_reference_tool_is_missing(metadata):
    # the last two only where there is something to say
    assert "ss_network_args" not in (told := metadata())
    assert [key for key in REFERENCE_KEYS if f"ss_{key}" not in told] == ["network_args", "vae_name"]


def test_models_are_told_by_name_and_by_the_hashes_that_are_known(metadata, models):
    told = metadata(vae=models[0].vae)
    # the caches were opened for this VAE, which was hashed for it; reading the DiT for this would take long
    assert told["ss_new_vae_hash"] == hashlib.sha256(models[0].vae.read_bytes()).hexdigest()
    assert told["ss_new_sd_model_hash"] == "None"
    for key, path in (("ss_vae_hash", models[0].vae), ("ss_sd_model_hash", models[0].dit)):
        assert told[key] == hashlib.sha256(path.read_bytes()[0x100000:0x110000]).hexdigest()[:8]


def test_the_dataset_is_told_as_its_file_says(metadata, make_dataset):
    dataset = make_dataset(
        "enable_bucket = true\nmin_bucket_reso = 64\nmax_bucket_reso = 128\nbucket_reso_steps = 32\n"
        "flip_aug = false\nkeep_tokens = 1\ncaption_dropout_rate = 0.25\nvalidation_split = 0.25\n"
    )
    told = metadata(dataset_config=dataset)
    assert (told["ss_num_train_images"], told["ss_num_validation_images"]) == ("3", "1")
    assert told["ss_caption_dropout_rate"] == "0.25"
    assert json.loads(told["ss_dataset_dirs"]) == {"images": {"n_repeats": 1, "img_count": 3}}
    (described,) = json.loads(told["ss_datasets"])
    expected = {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 128}
    assert {key: described[key] for key in expected} == expected
    assert described["bucket_info"] == {
        "buckets": {"0": {"resolution": [64, 64], "count": 3}},
        "mean_img_ar_error": 0.0,
    }
    (subset,) = described["subsets"]
    expected = {"keep_tokens": 1, "shuffle_caption": False, "caption_dropout_rate": 0.25, "color_aug": False}
    assert {key: subset[key] for key in expected} == expected


def test_a_folder_in_two_datasets_is_told_twice_and_regularisation_is_not():
    subsets = [
        {"metadata_file": None, "image_dir": name, "is_reg": is_reg} for name, is_reg in (("a", 0), ("r", 1))
    ]
    described = [
        {"subsets": [{**subset, "num_repeats": n, "img_count": 5} for subset in subsets]} for n in (1, 2)
    ]
    assert dataset_dirs(described) == {
        "a": {"n_repeats": 1, "img_count": 5},
        "a (2)": {"n_repeats": 2, "img_count": 5},
    }
