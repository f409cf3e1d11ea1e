"""`hyimg train` on cached data: what it leaves, that it repeats itself, what it reads and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import tomli
import torch
from PIL import Image
from safetensors.torch import load_file

from hyimg.cache import hashing
from hyimg.checkpoints.safetensors_file import Checkpoint, read_header
from hyimg.training.metrics import COST_FIELDS


def metrics(folder, name="lora"):
    lines = (folder / f"{name}.metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in COST_FIELDS} for line in lines]


@pytest.fixture
def train(hyimg, cached_dataset, tmp_path):
    """Trains into a fresh folder as the `trained` fixture does; gives its folder."""
    runs = iter(range(100))

    def call(*extra, dataset=cached_dataset):
        folder = tmp_path / f"run{next(runs)}"
        code, _, err = hyimg(
            *("train", "--dit", "{dit}", "--dataset_config", dataset, "--output_dir", folder),
            *"--max_train_epochs 2 --seed 7 --network_dim 4 --network_alpha 4 --learning_rate 1e-2".split(),
            *"--mixed_precision no --save_precision float".split(),
            *extra,
        )
        assert code == 0, err
        return folder

    return call


def test_a_run_leaves_every_file_that_it_promises(trained):
    names = {str(p.relative_to(trained)) for p in trained.rglob("*") if p.is_file() and "logs" not in p.parts}
    loras = {"lora.safetensors", "lora-000001.safetensors"}
    loras |= {"lora-step00000003.safetensors", "lora-step00000006.safetensors"}
    assert names == loras | {f"comfy/{n}" for n in loras} | {"lora.metrics.jsonl", "lora.run.toml"}
    assert list((trained / "logs").rglob("events.out.tfevents.*")), "TensorBoard was asked for"
    lines = metrics(trained)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 for line in lines)


def test_the_file_is_the_reference_tools_with_its_metadata(trained):
    header = read_header(trained / "lora.safetensors")
    assert {name.split(".", 1)[1] for name in header.tensors} == {
        "lora_down.weight",
        "lora_up.weight",
        "alpha",
    }
    assert len(header.tensors) == 3 * 32
    metadata = header.metadata
    assert metadata["ss_network_module"] == "networks.lora_hunyuan_image"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "4.0")
    assert (metadata["ss_steps"], metadata["ss_epoch"], metadata["ss_seed"]) == ("8", "2", "7")
    assert json.loads(metadata["ss_tag_frequency"])["images"]["a cat"] == 1
    assert metadata["modelspec.architecture"] == "hunyuan-image-2.1/lora"
    assert len(metadata["sshs_model_hash"]) == 64
    assert str(trained.parent) not in json.dumps(metadata), "no path of the trainer's machine goes out"
    assert read_header(trained / "lora-000001.safetensors").metadata["ss_steps"] == "4"


def test_training_changes_the_up_matrices_and_repeats_itself_bit_for_bit(trained, train):
    again = train()
    first, second = load_file(trained / "lora.safetensors"), load_file(again / "lora.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(bool(t.any()) for name, t in first.items() if name.endswith("lora_up.weight"))
    assert metrics(trained) == metrics(again)


def test_checkpointing_and_loader_workers_change_no_bit(trained, train):
    other = train("--gradient_checkpointing", "--max_data_loader_n_workers", "1")
    assert metrics(other) == metrics(trained)
    first, second = load_file(trained / "lora.safetensors"), load_file(other / "lora.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_run_file_repeats_the_run(trained, train, hyimg, tmp_path):
    written = tomli.loads((trained / "lora.run.toml").read_text(encoding="utf-8"))
    assert written["learning_rate"] == 0.01
    folder = tmp_path / "repeated"
    code, _, err = hyimg("train", "--config", trained / "lora.run.toml", "--output_dir", folder)
    assert code == 0, err
    assert metrics(folder) == metrics(trained)
    assert "has no effect" not in err, "nobody gave the defaults that the file lists"


def test_a_drawn_seed_is_written_and_repeats_the_run(hyimg, cached_dataset, tmp_path):
    arguments = ["train", "--dit", "{dit}", "--dataset_config", cached_dataset, "--max_train_steps", "2"]
    code, _, err = hyimg(*arguments, "--output_dir", tmp_path / "first")
    assert code == 0, err
    run_file = tmp_path / "first" / "lora.run.toml"
    code, _, err = hyimg("train", "--config", run_file, "--output_dir", tmp_path / "second")
    assert code == 0, err
    assert metrics(tmp_path / "first") == metrics(tmp_path / "second")
    assert hyimg("train", "--config", run_file)[0] == 2, "repeated in place it would replace itself"


def test_output_config_writes_the_options_and_trains_nothing(hyimg, cached_dataset, tmp_path, monkeypatch):
    arguments = [
        "train",
        "--dit",
        "{dit}",
        "--dataset_config",
        cached_dataset,
        "--output_dir",
        tmp_path / "out",
    ]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    code, _, err = hyimg(*arguments, "--network_dim", "12", "--output_config")
    assert code == 0, err
    assert re.search(r"`--mixed_precision` of `hyimg train` applies \(`(bf16|no)`\)", err), (
        "what `auto` chose"
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["lora.run.toml"]
    assert tomli.loads((tmp_path / "out" / "lora.run.toml").read_text(encoding="utf-8"))["network_dim"] == 12
    for wrong in (["--config", tmp_path / "other.toml"], ["other.toml"]):
        code, _, err = hyimg(*arguments, "--overwrite", "--output_config", *wrong)
        assert (code, "other.toml" in err) == (2, True)
        assert "`--output_config` " in err
        assert "writes `OUTPUT_NAME.run.toml` into `--output_dir`" in err


def test_accumulation_is_the_mean_over_the_steps_images(train):
    # the same five images as batches of one: every step of two batches is the mean over its two images
    whole = metrics(train("--optimizer_type", "SGDNesterov", "--gradient_accumulation_steps", "4"))
    assert [line["samples"] for line in whole] == [5, 5]
    assert [line["step"] for line in whole] == [1, 2]


def test_a_warm_start_reads_no_image_no_encoder_and_no_vae(train, own_dataset, model, monkeypatch):
    weights_read = set()

    def refuse(*args, **kwargs):
        raise AssertionError("an image was opened, or a model's file hashed")

    def listen(checkpoint, *args):
        weights_read.add(checkpoint.path)
        return read(checkpoint, *args)

    files = ["--vae", model.vae, "--text_encoder", model.text_encoder, "--byt5", model.byt5]
    options = [*files, "--cache_latents", "--cache_text_encoder_outputs"]
    train(*options, dataset=own_dataset)  # the copied files are measured once
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", listen)
    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr(hashing, "_read_hash", refuse)
    train(*options, dataset=own_dataset)
    assert weights_read == {model.dit}


def test_start_weights_are_where_training_starts(trained, train):
    start = trained / "comfy" / "lora.safetensors"
    folder = train("--network_weights", start, "--learning_rate", "0")
    first, second = load_file(trained / "lora.safetensors"), load_file(folder / "lora.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "extra", [["--optimizer_type", "AdamW8bit"], ["--optimizer_type", "torch.optim.RMSprop"]]
)
def test_other_optimisers_train(train, extra):
    losses = [line["loss"] for line in metrics(train(*extra, "--learning_rate", "1e-3"))]
    assert losses != sorted(losses) or losses[0] != losses[-1]


def test_the_guides_adafactor_line_trains(train):
    folder = train(
        *("--optimizer_type", "adafactor", "--max_grad_norm", "0.0"),
        *("--optimizer_args", "relative_step=False", "scale_parameter=False", "warmup_init=False"),
    )
    assert metrics(folder)[-1]["learning_rate"] == 0.01


@pytest.mark.parametrize(
    "extra",
    [
        ["--timestep_sampling", "flux_shift", "--loss_type", "huber", "--huber_schedule", "exponential"],
        ["--timestep_sampling", "uniform", "--loss_type", "l1", "--ip_noise_gamma", "0.1"],
        ["--timestep_sampling", "sigmoid", "--loss_type", "smooth_l1", "--min_timestep", "500"],
        [
            "--timestep_sampling",
            "shift",
            "--latent_sampling",
            "mean",
            "--model_prediction_type",
            "sigma_scaled",
        ],
    ],
)
def test_flow_options_reach_the_loss(trained, train, extra):
    default, other = (
        metrics(trained),
        metrics(train("--max_train_steps", "1", "--max_train_epochs", "1", *extra)),
    )
    assert other[0]["loss"] != default[0]["loss"]


def test_rates_and_ranks_by_pattern(train):
    folder = train(
        *(
            "--network_args",
            "network_reg_dims=img_attn_qkv=2,single_blocks=0",
            "network_reg_lrs=txt_mlp=0,img_mlp=1e-3",
        )
    )
    state = load_file(folder / "lora.safetensors")
    assert not any("single_blocks" in name for name in state)
    assert state["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape[0] == 2
    assert not state["lora_unet_double_blocks_0_txt_mlp_fc1.lora_up.weight"].any()
    assert {line["learning_rate"] for line in metrics(folder)} == {0.01}
    assert {line["learning_rate_1"] for line in metrics(folder)} == {0.001}


def test_a_used_name_is_refused_unless_overwritten(trained, hyimg, cached_dataset):
    before = (trained / "lora.safetensors").read_bytes()
    arguments = ["train", "--dit", "{dit}", "--dataset_config", cached_dataset, "--output_dir", trained]
    code, _, err = hyimg(*arguments)
    assert code == 2
    assert "holds a run named `lora` already" in err
    assert "--overwrite" in err
    assert (trained / "lora.safetensors").read_bytes() == before


def test_only_the_runs_own_files_are_replaced(train, hyimg, cached_dataset):
    folder = train("--save_every_n_epochs", "1")
    (folder / "lora-of-a-friend.safetensors").write_bytes(b"keep me")
    arguments = [
        "--dit",
        "{dit}",
        "--dataset_config",
        cached_dataset,
        "--output_dir",
        folder,
        "--max_train_steps",
        "1",
    ]
    assert hyimg("train", *arguments, "--overwrite")[0] == 0
    assert (folder / "lora-of-a-friend.safetensors").read_bytes() == b"keep me"
    assert not (folder / "lora-000001.safetensors").exists()


def test_an_edited_caption_is_noticed_and_named(own_dataset, hyimg, tmp_path):
    (own_dataset.parent / "images" / "4.txt").write_text("a dog", encoding="utf-8")
    code, _, err = hyimg(
        "train", "--dit", "{dit}", "--dataset_config", own_dataset, "--output_dir", tmp_path / "out"
    )
    assert code == 2
    assert "no text cache for the prompt `a dog`" in err
    assert "hyimg cache-text" in err


def test_caches_are_filled_first_when_asked(own_dataset, hyimg, tmp_path):
    (own_dataset.parent / "images" / "4.txt").write_text("a dog", encoding="utf-8")
    code, _, err = hyimg(
        *("train", "--dit", "{dit}", "--dataset_config", own_dataset, "--output_dir", tmp_path / "out"),
        *("--vae", "{vae}", "--text_encoder", "{text_encoder}", "--byt5", "{byt5}", "--max_train_steps", "1"),
        *("--cache_latents", "--cache_text_encoder_outputs_to_disk"),
    )
    assert code == 0, err
    assert "latents: all 5 are cached" in err
    assert "text: 1 prompt made" in err
    assert (tmp_path / "out" / "lora.safetensors").is_file()


# ---- what a failed, refused or second run leaves


def files(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def nan_plugin(tmp_path, first_bad_step):
    """A plugin whose loss is NaN from that step on."""
    file = tmp_path / "nan.py"
    file.write_text(
        "from hyimg.hookspecs import hookimpl\ncalls = []\n"
        "def bad(prediction, target, context):\n"
        "    calls.append(1)\n"
        "    loss_B = (prediction - target).square().flatten(1).mean(1)\n"
        f"    return loss_B * float('nan') if len(calls) >= {first_bad_step} else loss_B\n"
        "@hookimpl\ndef hyimg_losses():\n    return {'bad': bad}\n",
        encoding="utf-8",
    )
    return ["--plugin", file, "--loss_type", "bad"]


def test_a_failed_run_gives_back_what_it_was_to_replace(train, hyimg, tmp_path, cached_dataset):
    folder = train()
    before = files(folder)
    again = ["--dit", "{dit}", "--dataset_config", cached_dataset, "--output_dir", folder, "--overwrite"]
    code, _, err = hyimg("train", *again, *nan_plugin(tmp_path, 1))
    assert code == 1
    assert "not finite at step 1" in err
    assert files(folder) == before
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_a_run_that_fails_later_keeps_what_it_saved(hyimg, tmp_path, cached_dataset):
    folder = tmp_path / "out"
    arguments = ["--dit", "{dit}", "--dataset_config", cached_dataset, "--output_dir", folder]
    code, _, err = hyimg("train", *arguments, "--save_every_n_steps", "2", *nan_plugin(tmp_path, 4))
    assert code == 1
    assert "not finite at step 4" in err
    assert {p.name for p in folder.glob("*.safetensors")} == {"lora-step00000002.safetensors"}
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]


def test_two_runs_of_one_name_at_once_are_refused(train, hyimg, cached_dataset, tmp_path):
    from filelock import FileLock

    folder = tmp_path / "shared"
    folder.mkdir()
    with FileLock(folder / ".lora.lock"):
        arguments = ["--dit", "{dit}", "--dataset_config", cached_dataset, "--output_dir", folder]
        code, _, err = hyimg("train", *arguments)
    assert code == 2
    assert "another process is training `lora`" in err


def test_files_set_aside_by_a_killed_run_come_back(train, hyimg, cached_dataset):
    folder = train()
    before = files(folder)
    aside = folder / ".lora.replaced"
    (aside / "comfy").mkdir(parents=True)
    for name in ("lora.safetensors", "comfy/lora.safetensors", "lora.metrics.jsonl", "lora.run.toml"):
        (folder / name).rename(aside / name)
    arguments = ["--dit", "{dit}", "--dataset_config", cached_dataset, "--output_dir", folder]
    assert hyimg("train", *arguments)[0] == 2, "the name is still used"
    assert files(folder) == before


def test_a_launchers_environment_changes_no_gradient(trained, train, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert metrics(train()) == metrics(trained)


@pytest.mark.parametrize("pair", ["betas=1", "weight_decay=foo", "lr=1", "weight_decay=-1"])
def test_optimiser_arguments_are_tried_before_the_model_is_read(hyimg, cached_dataset, tmp_path, pair):
    arguments = ["--dit", "{dit}", "--dataset_config", cached_dataset, "--output_dir", tmp_path / "out"]
    code, _, err = hyimg("train", *arguments, "--optimizer_args", pair)
    assert code == 2
    assert "--optimizer_args" in err
    assert not (tmp_path / "out" / "lora.run.toml").exists()


def test_start_weights_that_do_not_fit_are_refused(trained, hyimg, cached_dataset, tmp_path):
    arguments = ["--dit", "{dit}", "--dataset_config", cached_dataset, "--output_dir", tmp_path / "out"]
    arguments += ["--network_weights", trained / "lora.safetensors"]
    code, _, err = hyimg("train", *arguments, "--network_dim", "8")
    assert code == 2
    assert "does not fit the network" in err
    code, _, err = hyimg("train", *arguments, "--network_dim", "4", "--max_train_steps", "1")
    assert code == 0
    assert "alpha is 4, from" in err


def test_weights_that_do_not_fit_the_saved_type_are_not_saved(hyimg, cached_dataset, tmp_path):
    arguments = ["--dit", "{dit}", "--dataset_config", cached_dataset, "--output_dir", tmp_path / "out"]
    huge = ["--learning_rate", "1e6", "--save_precision", "fp16", "--max_train_steps", "1"]
    code, _, err = hyimg("train", *arguments, *huge)
    assert code == 1
    assert "is not finite as torch.float16" in err
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_logging_folder_means_tensorboard(hyimg, cached_dataset, tmp_path):
    arguments = ["--dit", "{dit}", "--dataset_config", cached_dataset, "--output_dir", tmp_path / "out"]
    logs = ["--logging_dir", tmp_path / "logs", "--max_train_steps", "1"]
    assert hyimg("train", *arguments, *logs)[0] == 0
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))


def test_adafactors_own_rate_is_not_overridden_and_told(train):
    lines = metrics(
        train(
            "--optimizer_type", "Adafactor", "--optimizer_args", "scale_parameter=False", "warmup_init=True"
        )
    )
    # 1e-6 * step: arXiv 1804.04235, algorithm 5, in its warm-up
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-6 * n for n in range(1, 9)])


def test_warnings_about_the_dataset_are_said_once(own_dataset, hyimg, tmp_path):
    (own_dataset.parent / "images" / "0.caption").write_text("another caption", encoding="utf-8")
    code, _, err = hyimg(
        *("train", "--dit", "{dit}", "--dataset_config", own_dataset, "--output_dir", tmp_path / "out"),
        *("--vae", "{vae}", "--text_encoder", "{text_encoder}", "--byt5", "{byt5}", "--max_train_steps", "1"),
        *("--cache_latents", "--cache_text_encoder_outputs"),
    )
    assert code == 0, err
    assert sum("several captions" in line and "`images/0.png`" in line for line in err.splitlines()) == 1, err


@pytest.mark.long
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs a mount namespace of Linux")
def test_data_workers_need_no_shared_memory_but_for_their_locks(model, cached_dataset, tmp_path):
    def train_with(num_workers):
        own_shm = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
        command = ["unshare", "-rm", "sh", "-c", own_shm, "sh", sys.executable, "-m", "hyimg", "train"]
        command += ["--dit", model.dit, "--dataset_config", cached_dataset, "--max_train_steps", "2"]
        command += [
            "--output_dir",
            tmp_path / str(num_workers),
            "--max_data_loader_n_workers",
            str(num_workers),
        ]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)

    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    assert train_with(1).returncode == 0
    ended = train_with(8)
    assert ended.returncode == 1
    assert "cannot start 8 data loader processes: No space left on device in `/dev/shm`" in ended.stderr
    assert "Traceback" not in ended.stderr
