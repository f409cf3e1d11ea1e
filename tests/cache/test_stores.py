from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from hyimg.cache.entries import DamagedEntryError, MissingEntryError
from hyimg.cache.entry_file import RawTensor
from hyimg.cache.index import Index
from hyimg.cache.latents import LatentEntry, LatentRecipe, LatentStore
from hyimg.cache.text import TextEntry, TextStore
from hyimg.errors import RunError

RECIPE = LatentRecipe("ab" * 32, bucket=(64, 96), resized=(64, 100), crop=(0, 2), filter="area")


def latent(seed: int = 0) -> LatentEntry:
    generator = torch.Generator().manual_seed(seed)
    mean_CHW, std_CHW = torch.randn(2, 4, 3, 2, generator=generator)
    return LatentEntry(mean_CHW, std_CHW.abs())


def test_a_latent_comes_back_in_half_precision(tmp_path: Path) -> None:
    store = LatentStore(tmp_path, "vae")
    entry = dataclasses.replace(latent(), alpha_mask_HW=torch.rand(3, 2))
    store.write(RECIPE, entry)
    back = store.read(RECIPE)
    assert entry.alpha_mask_HW is not None
    assert back.alpha_mask_HW is not None
    assert torch.equal(back.mean_CHW, entry.mean_CHW.half())
    assert torch.equal(back.std_CHW, entry.std_CHW.half())
    assert torch.equal(back.alpha_mask_HW, entry.alpha_mask_HW.half())
    with safe_open(store.path(store.key(RECIPE)), "pt") as file:  # any tool can look at an entry
        assert torch.equal(file.get_tensor("mean"), back.mean_CHW)


def test_text_comes_back_as_it_was_and_without_an_empty_glyph_block(tmp_path: Path) -> None:
    store = TextStore(tmp_path, "encoder")
    text_TD, byt5_SE = torch.randn(5, 8).bfloat16(), torch.randn(2, 6).half()
    store.write('a sign "café" 猫', TextEntry(text_TD, byt5_SE))
    store.write("", TextEntry(text_TD))
    back = store.read('a sign "café" 猫')
    assert back.byt5_SE is not None
    assert torch.equal(back.text_TD, text_TD)
    assert torch.equal(back.byt5_SE, byt5_SE)
    assert store.read("").byt5_SE is None


def test_everything_that_makes_an_entry_is_in_its_key(tmp_path: Path) -> None:
    store = LatentStore(tmp_path, "vae")
    changes: list[dict[str, Any]] = [
        {"image": "cd" * 32},
        {"bucket": (96, 64)},
        {"resized": (65, 100)},
        {"crop": (0, 3)},
        {"filter": "lanczos"},
        {"flipped": True},
        {"mask": "alpha"},
    ]
    assert {name for change in changes for name in change} == {f.name for f in dataclasses.fields(RECIPE)}
    keys = {store.key(dataclasses.replace(RECIPE, **change)) for change in changes}
    keys |= {store.key(RECIPE), LatentStore(tmp_path, "another vae").key(RECIPE)}
    assert len(keys) == len(changes) + 2
    assert TextStore(tmp_path, "a").key("cat") != TextStore(tmp_path, "b").key("cat")


def test_every_flipped_bit_and_every_truncation_is_seen(tmp_path: Path) -> None:
    store = LatentStore(tmp_path, "vae")
    store.write(RECIPE, latent())
    path = store.path(store.key(RECIPE))
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(DamagedEntryError):
            store.read(RECIPE)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert not store.is_good(store.key(RECIPE))


def test_reading_a_bad_entry_names_the_command_and_a_stage_makes_it_again(tmp_path: Path) -> None:
    store = LatentStore(tmp_path / "latents", "vae", index=Index(tmp_path))
    key = store.key(RECIPE)
    with pytest.raises(MissingEntryError) as missing:
        store.read(RECIPE)
    assert "hyimg cache-latents" in (missing.value.hint or "")
    assert store.good([key]) == set()
    store.write(RECIPE, latent())
    assert store.good([key]) == {key}
    path = store.path(key)
    # dated back, so that damage within the clock's tick of writing has another mtime
    assert time.time_ns() - path.stat().st_mtime_ns > 2_000_000_000
    path.write_bytes(path.read_bytes()[:-3] + b"\x00\x00\x01")  # right after writing, and of the same size
    assert store.good([key]) == set()
    with pytest.raises(DamagedEntryError, match="checksum") as damaged:
        store.read(RECIPE)
    assert "hyimg cache-latents" in (damaged.value.hint or "")
    store.write(RECIPE, latent())
    assert store.good([key]) == {key}


def test_an_entry_under_a_wrong_name_is_damaged(tmp_path: Path) -> None:
    store = TextStore(tmp_path, "encoder")
    store.write("a cat", TextEntry(torch.zeros(2, 4)))
    right, wrong = store.path(store.key("a cat")), store.path(store.key("a dog"))
    wrong.parent.mkdir(exist_ok=True)
    os.replace(right, wrong)
    with pytest.raises(DamagedEntryError, match="another name"):
        store.read("a dog")


def test_a_warm_check_reads_no_entry_and_verify_reads_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["", "a cat", "a dog"]
    store = TextStore(tmp_path / "text", "encoder", index=Index(tmp_path))
    keys = [store.key(prompt) for prompt in prompts]
    for prompt in prompts:
        store.write(prompt, TextEntry(torch.zeros(2, 4)))
    reads: list[str] = []
    original = TextStore.read_raw

    def read_raw(self: TextStore, key: str) -> dict[str, RawTensor]:
        reads.append(key)
        return original(self, key)

    monkeypatch.setattr(TextStore, "read_raw", read_raw)
    assert store.good(keys) == set(keys)
    assert reads == []
    assert store.good(keys, verify=True) == set(keys)
    assert reads == keys
    assert TextStore(tmp_path / "text", "encoder").good(keys) == set(keys)  # without an index: reads them all
    assert len(reads) == 2 * len(keys)


def test_damage_that_verify_has_found_is_damage_for_a_plain_look_too(tmp_path: Path) -> None:
    """A run that is killed between finding and mending must not leave the index saying that all is well."""
    store = TextStore(tmp_path / "text", "encoder", index=Index(tmp_path))
    store.write("a cat", TextEntry(torch.zeros(2, 4)))
    key = store.key("a cat")
    path, stat = store.path(key), store.path(key).stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert store.good([key]) == {key}
    assert "checksum" in store.survey([key], verify=True).damaged[key]
    assert store.good([key]) == set()


def test_the_models_that_made_entries_are_known(tmp_path: Path) -> None:
    assert TextStore.identities(tmp_path) == []
    for identity in ("one", "two/../\n"):
        TextStore(tmp_path, identity).write("", TextEntry(torch.zeros(1, 4)))
    assert sorted(TextStore.identities(tmp_path)) == ["one", "two/../\n"]


def test_values_that_are_not_finite_are_never_stored(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not finite"):
        LatentStore(tmp_path, "vae").write(
            RECIPE, LatentEntry(torch.full((1, 1, 1), 1e6), torch.ones(1, 1, 1))
        )
    with pytest.raises(RunError, match="not finite"):
        TextStore(tmp_path, "encoder").write("", TextEntry(torch.tensor([[float("nan")]])))
    assert LatentStore.identities(tmp_path) == []


def test_what_a_killed_run_left_behind_is_removed_later(tmp_path: Path) -> None:
    store = TextStore(tmp_path, "encoder")
    store.write("", TextEntry(torch.zeros(1, 4)))
    folder = store.path(store.key("")).parent
    old, young = folder / ".a.1-2.hyimg-tmp", folder / ".b.1-2.hyimg-tmp"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    store.good([])
    assert not old.exists()
    assert young.exists()


def _fill(folder: Path, first: int) -> None:
    torch.set_num_threads(1)
    store = TextStore(folder / "text", "encoder", index=Index(folder))
    for number in range(60):
        prompt = str((number + first) % 60)
        store.write(prompt, TextEntry(torch.full((2, 4), float(prompt))))
        store.good([store.key(prompt)])


def test_two_processes_fill_one_cache(tmp_path: Path) -> None:
    processes = [multiprocessing.Process(target=_fill, args=(tmp_path, first)) for first in (0, 30)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    store = TextStore(tmp_path / "text", "encoder", index=Index(tmp_path))
    assert len(store.good(store.key(str(number)) for number in range(60))) == 60
    assert all(store.read(str(number)).text_TD[0, 0] == number for number in range(60))


def test_a_cache_that_cannot_be_written_can_be_read(
    tmp_path: Path, without_write_permission: Callable[[Path, Callable[[], bool]], bool]
) -> None:
    folder = tmp_path / "cache"
    index = Index(folder)
    TextStore(folder / "text", "encoder", index=index).write("a cat", TextEntry(torch.ones(2, 4)))
    index.close()

    def reads() -> bool:
        store = TextStore(folder / "text", "encoder", index=Index(folder))
        good = store.good([store.key("a cat")], verify=True)
        return len(good) == 1 and store.read("a cat").text_TD.shape == (2, 4)

    assert without_write_permission(folder, reads)


def test_damage_that_only_the_reader_sees_is_made_again(tmp_path: Path) -> None:
    store = LatentStore(tmp_path / "latents", "vae", index=Index(tmp_path))
    store.write(RECIPE, latent())
    key = store.key(RECIPE)
    path, stat = store.path(key), store.path(key).stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert store.good([key]) == {key}, "size and time are those of the entry that was right"
    with pytest.raises(DamagedEntryError, match="checksum"):
        store.read(RECIPE)
    assert store.good([key]) == set()
    store.write(RECIPE, latent())
    assert store.good([key]) == {key}


def test_a_folder_in_the_place_of_an_entry_is_damage_and_makes_way_for_one(tmp_path: Path) -> None:
    store = LatentStore(tmp_path, "vae", index=Index(None))
    key = store.key(RECIPE)
    store.path(key).mkdir(parents=True)
    (store.path(key) / "mine.txt").write_text("somebody's")
    assert store.good([key]) == set()
    with pytest.raises(DamagedEntryError, match="[Dd]irectory"):
        store.read(RECIPE)
    store.write(RECIPE, latent())
    assert store.good([key]) == {key}
    assert [p.read_text() for p in tmp_path.rglob("mine.txt")] == ["somebody's"], "set aside, not deleted"
