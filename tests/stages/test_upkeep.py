"""`--verify` and `--prune` of both caching stages, through the command line."""

from __future__ import annotations

import os
import shutil
import time

import pytest
import torch

from hyimg.cache.latents import LatentEntry, LatentRecipe, LatentStore

STAGES = ["latents", "text"]


def age_all(dataset):
    for path in (dataset.parent / "hyimg-cache").rglob("*.safetensors"):
        os.utime(path, (time.time() - 3600, time.time() - 3600))


@pytest.mark.parametrize("stage", STAGES)
def test_verify_finds_damage_that_keeps_size_and_time_names_it_and_makes_it_again(
    hyimg, fill, entries, own_dataset, stage
):
    path = entries(own_dataset, stage)[0]
    right, stat = path.read_bytes(), path.stat()
    assert hyimg(*fill(stage, own_dataset))[0] == 0  # what was copied is known from here on
    path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    _, _, err = hyimg(*fill(stage, own_dataset))
    assert "all " in err
    assert "damaged" not in err  # nothing shows it but reading
    code, _, err = hyimg(*fill(stage, own_dataset, "--verify"))
    assert code == 0
    assert "1 entry is damaged and will be made again:" in err
    assert ("images/" if stage == "latents" else "prompt") in err
    assert "its checksum does not match its content" in err
    assert path.read_bytes() == right
    _, _, err = hyimg(*fill(stage, own_dataset, "--verify"))
    assert "damaged" not in err


@pytest.mark.parametrize("stage", STAGES)
def test_prune_removes_what_the_dataset_files_do_not_refer_to(hyimg, fill, entries, own_dataset, stage):
    folder = own_dataset.parent
    shutil.copytree(folder / "images", folder / "more")
    for number in range(3):
        (folder / "more" / f"{number}.png").unlink()
        (folder / "more" / f"{number}.txt").unlink()
    other = folder / "other.toml"
    other.write_text(own_dataset.read_text().replace('"images"', '"more"'), encoding="utf-8")
    all_entries = entries(own_dataset, stage)
    age_all(own_dataset)
    for number in (0, 4):
        (folder / "images" / f"{number}.png").unlink()
        (folder / "images" / f"{number}.txt").unlink()
    code, _, err = hyimg(*fill(stage, own_dataset, "--prune", "--keep_for", other))
    assert code == 0
    assert "1 unused entries removed" in err
    assert " kB freed" in err or " B freed" in err
    left = entries(own_dataset, stage)
    assert len(left) == len(all_entries) - 1
    age_all(own_dataset)
    assert "1 unused entries removed" in hyimg(*fill(stage, own_dataset, "--prune"))[2]
    code, _, err = hyimg(*fill(stage, own_dataset))
    assert (code, " made " in err) == (0, False)


def test_prune_keeps_the_prompts_that_are_named_with_it_and_young_entries(
    hyimg, fill, entries, own_dataset, tmp_path
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a sample prompt --n bad quality\n", encoding="utf-8")
    hyimg(*fill("text", own_dataset, "--sample_prompts", prompts))
    num_entries = len(entries(own_dataset, "text"))
    _, _, err = hyimg(*fill("text", own_dataset, "--prune"))
    assert "0 unused entries removed" in err
    assert "2 unused ones kept, made in the last minutes" in err
    age_all(own_dataset)
    hyimg(*fill("text", own_dataset, "--prune", "--sample_prompts", prompts))
    assert len(entries(own_dataset, "text")) == num_entries
    hyimg(*fill("text", own_dataset, "--prune"))
    assert len(entries(own_dataset, "text")) == num_entries - 2


def test_prune_keeps_and_counts_the_entries_of_other_models(hyimg, fill, entries, own_dataset):
    store = LatentStore(own_dataset.parent / "hyimg-cache" / "latents", "another VAE")
    recipe = LatentRecipe("ab" * 32, bucket=(64, 64), resized=(64, 64), crop=(0, 0), filter="area")
    store.write(recipe, LatentEntry(torch.zeros(1, 2, 2), torch.ones(1, 2, 2)))
    age_all(own_dataset)
    num_entries = len(entries(own_dataset, "latents"))
    code, _, err = hyimg(*fill("latents", own_dataset, "--prune"))
    assert code == 0
    assert "latent cache: 0 unused entries removed" in err
    assert "1 entries of another model kept" in err
    assert f"remove `{store.entries_folder}`" in err
    assert len(entries(own_dataset, "latents")) == num_entries


def test_prune_removes_nothing_where_an_image_cannot_be_read(hyimg, fill, entries, own_dataset):
    (own_dataset.parent / "images" / "1.png").write_bytes(b"no image")
    age_all(own_dataset)
    num_entries = len(entries(own_dataset, "latents"))
    code, _, err = hyimg(*fill("latents", own_dataset, "--prune", "--on_bad_image", "skip"))
    assert code == 0
    assert "nothing was pruned" in err
    assert len(entries(own_dataset, "latents")) == num_entries


def test_a_wrong_dataset_file_to_keep_for_is_found_before_any_work(hyimg, fill, entries, own_dataset):
    shutil.rmtree(own_dataset.parent / "hyimg-cache")
    code, _, err = hyimg(*fill("latents", own_dataset, "--prune", "--keep_for", "nowhere.toml"))
    assert code == 2
    assert "nowhere.toml" in err
    assert not entries(own_dataset, "latents")
    code, _, err = hyimg(*fill("latents", own_dataset, "--keep_for", own_dataset))
    assert code == 2
    assert "`--prune` is not given" in err


def test_latents_of_an_older_release_are_made_again_with_the_reason(
    hyimg, fill, own_dataset, entries, monkeypatch
):
    for entry in entries(own_dataset, "latents"):
        entry.unlink()
    with monkeypatch.context() as before:
        before.setattr(LatentStore, "key", lambda store, recipe: store.key_of(vars(recipe)))
        assert hyimg(*fill("latents", own_dataset))[0] == 0
    old = set(entries(own_dataset, "latents"))
    code, _, err = hyimg(*fill("latents", own_dataset))
    assert code == 0, err
    assert err.count(f"{len(old)} latents are from an older release") == 1
    assert old < set(entries(own_dataset, "latents")), "nothing is removed unasked"
    assert "older release" not in hyimg(*fill("latents", own_dataset))[2]
