"""What a saved file tells about its run, and that it can keep silent."""

from __future__ import annotations

import json

import pytest

from hyimg.model.safetensors_file import read_header


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
    said |= {"metadata_description": "four cats", "metadata_license": "MIT", "metadata_tags": "cat, red"}
    told = metadata(**said)
    assert told["ss_training_comment"] == "a comment"
    for name in ("title", "author", "description", "license", "tags"):
        assert told[f"modelspec.{name}"] == said[f"metadata_{name}"]


def test_optimiser_and_network_arguments_are_told(metadata):
    told = metadata(
        optimizer_type="SGDNesterov",
        optimizer_args=("momentum=0.5",),
        network_args=("network_reg_dims=img_attn_qkv=2",),
    )
    assert told["ss_optimizer"] == "torch.optim.sgd.SGD(momentum=0.5)"
    assert json.loads(told["ss_network_args"]) == {"network_reg_dims": "img_attn_qkv=2"}
