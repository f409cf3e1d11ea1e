"""Limits of the system, and what happens to files while a run is under way, are failures of the run (exit code 1)."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from itertools import islice

import pytest

from hyimg.cache.latents import LatentStore

TRAIN = ["train", "--dit", "{dit}", "--max_train_steps", "4", "--network_dim", "2", "--mixed_precision", "no"]


@pytest.fixture
def few_descriptors():
    """Leaves a number of descriptors free, until the end of the test."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit(num_free):
        used = {int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}
        free = (number for number in range(before[0]) if number not in used)
        resource.setrlimit(resource.RLIMIT_NOFILE, (next(islice(free, num_free, None)), before[1]))

    limit.end = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, before)
    yield limit
    limit.end()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_small_limit_of_descriptors_is_named(hyimg, model, own_dataset, tmp_path, few_descriptors):
    codes = []
    for num_free in (0, 2, 5):
        for index in (own_dataset.parent / "hyimg-cache").glob("index.sqlite*"):
            index.unlink()  # so that every image is read
        few_descriptors(num_free)
        code, out, err = hyimg("dataset", own_dataset, "--tokenizer", model.directory)
        few_descriptors.end()
        codes.append(code)
        assert code == (1 if "error: this process has too many open files" in err else 0), err
        assert "cannot be read" not in out + err
    assert 1 in codes


# Where the system gives no descriptor for a file (or a folder) whose name ends so -> the command
NO_DESCRIPTOR = {
    "images/3.png": "dataset",
    "images/2.txt": "dataset",
    "images": "dataset",
    "data.toml": "dataset",
    "metadata.jsonl": "dataset",
    "tokenizer.json": "dataset",
    "vae_fp16.safetensors": "cache-latents",
    "images/1.png": "cache-latents",
    "model.json": "train",
    "hunyuanimage2.1.safetensors": "train",
    "manifest.json": "train",
    "lora.safetensors": "check",
}


@pytest.mark.parametrize("name", NO_DESCRIPTOR)
def test_too_many_open_files_is_not_the_fault_of_a_file(
    hyimg, model, own_dataset, trained, tmp_path, monkeypatch, name
):
    arguments = {
        "dataset": ["dataset", own_dataset, "--tokenizer", model.directory],
        "cache-latents": ["cache-latents", "--vae", "{vae}", "--dataset_config", own_dataset],
        "check": ["check", trained / "lora.safetensors"],
        "train": [*TRAIN, "--dataset_config", own_dataset, "--output_dir", tmp_path / "run"],
    }[NO_DESCRIPTOR[name]]
    if name == "manifest.json":
        shutil.copytree(trained, tmp_path / "run")
        (tmp_path / "run" / "lora-state").mkdir()
        (tmp_path / "run" / "lora-state" / name).write_text("{}")
        arguments += ["--resume", "latest"]
    if name == "metadata.jsonl":
        (own_dataset.parent / "images" / name).write_text('{"file_name": "0.png", "text": "x"}')
    for index in (own_dataset.parent / "hyimg-cache").glob("index.sqlite*"):
        index.unlink()  # so that every image is read

    def refuse(call):
        def refusing(path, *arguments, **options):
            if isinstance(path, (str, os.PathLike)) and os.fspath(path).rstrip("/").endswith(name):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), os.fspath(path))
            return call(path, *arguments, **options)

        return refusing

    for module, function in (("builtins", "open"), ("io", "open"), ("os", "open"), ("os", "scandir")):
        monkeypatch.setattr(f"{module}.{function}", refuse(getattr(__import__(module), function)))
    code, out, err = hyimg(*arguments)
    assert code == 1, err
    assert "error: this process has too many open files" in err
    assert "cannot be read" not in out + err
    assert "hint: raise the limit" in err


def break_at(monkeypatch, number, break_it):
    """Calls `break_it` before the latent with that number is read."""
    read, calls = LatentStore.read, []

    def breaking(self, recipe):
        calls.append(recipe)
        if len(calls) == number:
            break_it()
        return read(self, recipe)

    monkeypatch.setattr(LatentStore, "read", breaking)


@pytest.mark.parametrize(
    "what", ["the cache is removed", "`comfy` becomes a file", "the run folder is removed"]
)
def test_a_failure_in_mid_run_is_a_failed_run(hyimg, own_dataset, tmp_path, monkeypatch, what):
    run = tmp_path / "run"

    def break_it():
        if what == "the cache is removed":
            shutil.rmtree(own_dataset.parent / "hyimg-cache")
        elif what == "the run folder is removed":
            shutil.rmtree(run)
        else:
            shutil.rmtree(run / "comfy", ignore_errors=True)
            (run / "comfy").write_bytes(b"")

    break_at(monkeypatch, 3, break_it)
    arguments = [
        *TRAIN,
        "--dataset_config",
        own_dataset,
        "--output_dir",
        run,
        "--max_data_loader_n_workers",
        "0",
    ]
    code, _, err = hyimg(*arguments)
    assert "unexpected" not in err
    assert code == (0 if what == "the run folder is removed" and "error" not in err else 1), err
    if what == "the cache is removed":
        assert "no latent cache entry" in err
        assert "hint: run `hyimg cache-latents`" in err
