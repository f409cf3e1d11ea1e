from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from hyimg.cache import entries
from hyimg.cache.atomic import atomic_path
from hyimg.cache.entries import DamagedEntryError, MissingEntryError
from hyimg.cache.entry_file import StoredTensor, unpack
from hyimg.cache.index import Index
from hyimg.cache.latents import LatentEntry, LatentRecipe, LatentStore
from hyimg.cache.own_files import LinkError, temporary_name
from hyimg.cache.prompt_embeddings import PromptEmbedding, TextStore
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
    store.write('a sign "café" 猫', PromptEmbedding(text_TD, byt5_SE))
    store.write("", PromptEmbedding(text_TD))
    back = store.read('a sign "café" 猫')
    assert back.byt5_SE is not None
    assert torch.equal(back.text_TD, text_TD)
    assert torch.equal(back.byt5_SE, byt5_SE)
    assert store.read("").byt5_SE is None


def test_everything_that_makes_an_entry_is_in_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    # entries of a release that would compute other numbers
    monkeypatch.setattr(entries, "FORMAT_VERSION", entries.FORMAT_VERSION + 1)
    assert store.key(RECIPE) not in keys


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
        assert not store.good([store.key(RECIPE)])


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


def test_an_entry_that_is_written_again_after_it_was_listed_is_not_removed(tmp_path: Path) -> None:
    store = TextStore(tmp_path, "encoder")
    for prompt in ("a cat", "a dog"):
        store.write(prompt, PromptEmbedding(torch.zeros(2, 4)))
    listed = store.listing()
    cat, dog = store.path(store.key("a cat")), store.path(store.key("a dog"))
    os.utime(cat)  # as by another process that needs it again
    assert set(store.remove(listed)) == {store.key("a dog")}
    assert cat.exists()
    assert not dog.exists()


def test_an_entry_under_a_wrong_name_is_damaged(tmp_path: Path) -> None:
    store = TextStore(tmp_path, "encoder")
    store.write("a cat", PromptEmbedding(torch.zeros(2, 4)))
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
        store.write(prompt, PromptEmbedding(torch.zeros(2, 4)))
    reads: list[str] = []
    original = TextStore.read_verified

    def read_verified(self: TextStore, key: str) -> dict[str, StoredTensor]:
        reads.append(key)
        return original(self, key)

    monkeypatch.setattr(TextStore, "read_verified", read_verified)
    assert store.good(keys) == set(keys)
    assert reads == []
    assert store.good(keys, verify=True) == set(keys)
    assert reads == keys
    assert TextStore(tmp_path / "text", "encoder").good(keys) == set(keys)  # without an index: reads them all
    assert len(reads) == 2 * len(keys)


def test_damage_that_verify_has_found_is_damage_for_a_plain_look_too(tmp_path: Path) -> None:
    """A run that is killed between finding and mending must not leave the index saying that all is well."""
    store = TextStore(tmp_path / "text", "encoder", index=Index(tmp_path))
    store.write("a cat", PromptEmbedding(torch.zeros(2, 4)))
    key = store.key("a cat")
    path, stat = store.path(key), store.path(key).stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert store.good([key]) == {key}
    assert "checksum" in store.check_entries([key], verify=True).damaged[key]
    assert store.good([key]) == set()


def test_removed_entries_are_forgotten_by_the_index_and_rewritten_ones_stay(tmp_path: Path) -> None:
    store = TextStore(tmp_path / "text", "encoder", index=Index(tmp_path))
    for prompt in ("a cat", "a dog"):
        store.write(prompt, PromptEmbedding(torch.zeros(2, 4)))
    cat, dog = store.key("a cat"), store.key("a dog")
    listed = store.listing()
    os.utime(store.path(dog), ns=(0, 0))  # as if another process had written it again
    assert store.remove(listed).keys() == {cat}
    assert store.good([cat, dog]) == {dog}
    assert set(Index(tmp_path).checked_entries(f"text/{store.entries_folder.name}")) == {dog}


def test_the_models_that_made_entries_are_known(tmp_path: Path) -> None:
    assert TextStore.identities(tmp_path) == []
    for identity in ("one", "two/../\n"):
        TextStore(tmp_path, identity).write("", PromptEmbedding(torch.zeros(1, 4)))
    assert sorted(TextStore.identities(tmp_path)) == ["one", "two/../\n"]


def test_values_that_are_not_finite_are_never_stored(tmp_path: Path) -> None:
    for image, name in ((None, RECIPE.image), (tmp_path / "a.png", tmp_path / "a.png")):
        with pytest.raises(RunError, match=re.escape(f"not finite for the image `{name}`")):
            LatentStore(tmp_path, "vae").write(
                RECIPE, LatentEntry(torch.full((1, 1, 1), 1e6), torch.ones(1, 1, 1)), image=image
            )
    with pytest.raises(RunError, match="not finite"):
        TextStore(tmp_path, "encoder").write("", PromptEmbedding(torch.tensor([[float("nan")]])))
    assert LatentStore.identities(tmp_path) == []


def test_what_a_killed_run_left_behind_is_removed_later(tmp_path: Path) -> None:
    store = TextStore(tmp_path, "encoder")
    store.write("", PromptEmbedding(torch.zeros(1, 4)))
    folder = store.path(store.key("")).parent
    name = f"{store.key('')}.safetensors"
    left = [folder / temporary_name(name), store.entries_folder / temporary_name("model.json")]
    theirs = folder / ".notes.1-0123456789abcdef.hyimg-tmp"
    for path in (*left, theirs):
        path.write_bytes(b"half")
    with atomic_path(folder / name) as living:
        store.good([])
        assert sorted(folder.iterdir()) == sorted([folder / name, living, theirs])
        living.write_bytes(b"")
    assert not any(path.exists() for path in left)


def test_links_in_a_cache_lead_nowhere(tmp_path: Path) -> None:
    """In a cache that came with somebody's dataset: the hash of the model, and so each name, is predictable."""
    victim = tmp_path / "victim"
    (victim / "ab").mkdir(parents=True)
    names = ["model.json", "0" * 64 + ".safetensors", temporary_name("0" * 64 + ".safetensors")]
    for name in (*names, *(f"ab/{name}" for name in names)):
        (victim / name).write_text("theirs")
    cache = tmp_path / "cache"
    store = TextStore(cache / "text", "encoder")
    key = store.key("")
    store.write("", PromptEmbedding(torch.zeros(1, 4)))
    data = store.path(key).read_bytes()

    # files: missing until they are replaced
    for path in (store.path(key), store.entries_folder / "model.json"):
        path.unlink()
        path.symlink_to(victim / "model.json")
    (store.path(key).parent / f"{'0' * 64}.safetensors").symlink_to(victim / names[1])
    assert store.listing() == {}
    assert TextStore.identities(cache / "text") == []
    assert store.good([key]) == set()
    with pytest.raises(MissingEntryError):
        store.read("")
    store = TextStore(cache / "text", "encoder")
    store.write("", PromptEmbedding(torch.zeros(1, 4)))
    assert store.path(key).read_bytes() == data
    assert TextStore.identities(cache / "text") == ["encoder"]

    # folders whose names are not ours are none of our business; the others are an error
    (store.entries_folder / "my").symlink_to(victim)
    (store.entries_folder / "ABC").symlink_to(victim)
    (cache / "text" / "0123456789abcdef").symlink_to(victim)
    assert store.listing().keys() == {key}
    assert TextStore.identities(cache / "text") == ["encoder"]
    (store.entries_folder / ("00" if key[:2] != "00" else "01")).symlink_to(victim / "ab")
    with pytest.raises(LinkError, match="is a link"):
        store.listing()
    for folder in (store.path(key).parent, store.entries_folder, store.folder):
        folder.rename(tmp_path / f"moved {folder.name}")
        folder.symlink_to(victim)
        for use in (
            store.listing,
            lambda: store.write("", PromptEmbedding(torch.zeros(1, 4))),
            lambda: store.remove({key: (0, 0)}),
        ):
            with pytest.raises(LinkError, match="is a link"):
                use()
        folder.unlink()
        (tmp_path / f"moved {folder.name}").rename(folder)
    assert {path.read_text() for path in victim.rglob("*") if path.is_file()} == {"theirs"}
    assert len(list(victim.rglob("*"))) == 7


def _fill(folder: Path, first: int) -> None:
    torch.set_num_threads(1)
    store = TextStore(folder / "text", "encoder", index=Index(folder))
    for number in range(60):
        prompt = str((number + first) % 60)
        store.write(prompt, PromptEmbedding(torch.full((2, 4), float(prompt))))
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
    TextStore(folder / "text", "encoder", index=index).write("a cat", PromptEmbedding(torch.ones(2, 4)))
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


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"mean": (4, 3, 2)}, "`std` is missing"),
        ({"mean": (4, 3, 2), "std": (4, 6)}, "`std` has 2 dimensions"),
        ({"mean": (4, 3, 2), "std": (4, 2, 3)}, "`mean` and `std` differ in shape"),
        ({"mean": (4, 3, 2), "std": (4, 3, 2), "alpha_mask": (1, 3, 2)}, "`alpha_mask` has 3 dimensions"),
    ],
)
def test_an_entry_with_a_right_checksum_and_wrong_tensors_is_damaged(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], reason: str
) -> None:
    store = LatentStore(tmp_path, "vae")
    zeros = {name: torch.zeros(shape) for name, shape in tensors.items()}
    store.write_tensors(store.key(RECIPE), zeros, {})
    with pytest.raises(DamagedEntryError, match=reason) as damaged:
        store.read(RECIPE)
    assert "--verify" in str(damaged.value.hint)


HEADERS = {
    "deep": '{"__metadata__":{},"a":' + "[" * 100_000 + "]" * 100_000 + "}",
    "twice": '{"__metadata__":{"checksum":"%s"},"__metadata__":{}}' % ("0" * 64),
    "three offsets": '"data_offsets":[0,8,8],"dtype":"F32","shape":[2]',
    "no offsets": '"dtype":"F32","shape":[2]',
    "beyond the file": '"data_offsets":[8,16],"dtype":"F32","shape":[2]',
    "another size": '"data_offsets":[0,8],"dtype":"F32","shape":[3]',
    "infinite": '"data_offsets":[0,1e999],"dtype":"F32","shape":[2]',
    "an unknown dtype": '"data_offsets":[0,8],"dtype":"F64","shape":[1]',
    "many dimensions": '"data_offsets":[0,8],"dtype":"F32","shape":[2%s]' % (",1" * 70),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_forged_header_is_damage(kind: str) -> None:
    text = HEADERS[kind]
    if not text.startswith("{"):
        text = f'{{"__metadata__":{{"checksum":"{"0" * 64}","key":"k"}},"a":{{{text}}}}}'
    data = len(text).to_bytes(8, "little") + text.encode() + bytes(8)
    checksum = hashlib.sha256(data).hexdigest()
    forged = data.replace(b'"checksum":"' + b"0" * 64, f'"checksum":"{checksum}'.encode())
    with pytest.raises(ValueError, match="header"):
        unpack("k", forged)
