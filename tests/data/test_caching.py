"""From a dataset file through the stores to the tensors of a batch, with stand-ins for VAE and encoders."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hyimg.cache.index import Index
from hyimg.cache.latents import LatentEntry, LatentStore
from hyimg.cache.prompt_embeddings import PromptEmbedding, TextStore
from hyimg.data import pixels
from hyimg.data.batches import BatchLoader, TrainingData, lost_workers_explained
from hyimg.data.caching import (
    latent_batches,
    latent_store_for_training,
    latent_tasks,
    missing_tasks,
    prompts_of,
    text_store_for_training,
    text_tasks,
)
from hyimg.data.dataset_file import parse_dataset
from hyimg.data.dataset_keys import DatasetFile
from hyimg.data.findings import sample_findings
from hyimg.data.pixels import image_batches, load_mask, load_pixels
from hyimg.data.samples import Batch, Sample, epoch_batches
from hyimg.data.scan import scan
from hyimg.errors import HyimgError, RunError

AddImage = Callable[..., Path]
MakeDataset = Callable[..., DatasetFile]


def stand_in(prompt: str) -> PromptEmbedding:
    """A prompt's states, which no other prompt has."""
    number = sum(prompt.encode()) % 251  # bfloat16 holds whole numbers up to 256
    glyphs = torch.full((2, 6), float(number)).half() if '"' in prompt else None
    return PromptEmbedding(torch.full((len(prompt), 8), float(number)).bfloat16(), glyphs)


class Caches:
    """Both stages in their plainest form: a latent is the mean colour of its 32x32 pixels."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def latents(self, samples: list[Sample], vae: str = "vae", batch_size: int = 2) -> list[str]:
        """Makes what is missing; the names of the images that were encoded."""
        store = LatentStore(self.folder / "latents", vae, index=Index(self.folder))
        encoded: list[str] = []
        todo = missing_tasks(store, latent_tasks(samples, store))
        for tasks, image_BCHW, masks_hw in image_batches(latent_batches(todo, batch_size)):
            mean_BChw = torch.nn.functional.avg_pool2d(image_BCHW, 32)
            for (sample, flipped), mean_Chw, mask_hw in zip(tasks, mean_BChw, masks_hw, strict=True):
                store.write(sample.recipe(flipped), LatentEntry(mean_Chw, torch.ones_like(mean_Chw), mask_hw))
                encoded.append(sample.image_path.name)
        return sorted(encoded)

    def text(self, samples: list[Sample], encoder: str = "encoder", *extra: str) -> list[str]:
        store = TextStore(self.folder / "text", encoder, index=Index(self.folder))
        todo = missing_tasks(store, text_tasks(samples, store, extra))
        for prompt in todo:
            store.write(prompt, stand_in(prompt))
        return todo

    def data(self, samples: list[Sample], seed: int = 0) -> TrainingData:
        latents = latent_store_for_training(self.folder / "latents", samples)
        text = text_store_for_training(self.folder / "text", samples)
        return TrainingData(samples, latents, text, seed=seed)


@pytest.fixture
def caches(tmp_path: Path) -> Caches:
    return Caches(tmp_path / "cache")


def test_everyone_who_decodes_waits_for_the_memory(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_image(tmp_path / "images" / "a.tif", (96, 64), mode="CMYK")
    add_image(tmp_path / "masks" / "a.png", (96, 64), caption=None)
    (sample,) = scan(dataset("resolution = 64", "conditioning_data_dir = 'masks'")).samples
    add_image(tmp_path / "images" / "b.png", (96, 64))
    monkeypatch.setattr(pixels, "_BUDGET", pixels.MemoryBudget())
    monkeypatch.setattr(pixels, "_SMALL_BYTES", 0)
    monkeypatch.setattr(pixels, "available_bytes", lambda: 96 * 64 * 8)  # and the file itself on top
    too_little = r"decoding it takes about \d.* of memory, and 49\.2 kB are free"
    with pytest.raises(HyimgError, match=too_little):
        scan(dataset())
    for look in (load_pixels, load_mask):
        with pytest.raises(HyimgError, match=too_little):
            look(sample)
    index = Index(tmp_path / "cache")
    seen = "cmyk_without_profile"
    assert seen not in [found.kind for found in sample_findings([sample], index, transformed=False)]
    monkeypatch.setattr(pixels, "available_bytes", lambda: 10**9)
    assert seen in [found.kind for found in sample_findings([sample], index, transformed=False)]


def test_what_was_cached_is_what_training_sees(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset, caches: Caches
) -> None:
    for number in range(5):
        add_image(tmp_path / "images" / f"{number}.png", (96, 64), caption=f'number "{number}"')
    samples = scan(dataset("resolution = [96, 64]\nbatch_size = 2")).samples
    caches.latents(samples)
    caches.text(samples)
    batches = epoch_batches(samples, seed=0, epoch=1)
    loaded = list(BatchLoader(caches.data(samples)).load(batches, epoch=1))
    assert [len(batch) for batch in loaded] == [len(batch) for batch in batches]
    for batch, order in zip(loaded, batches, strict=True):
        for row, place in enumerate(order.samples):
            pixels = np.asarray(Image.open(samples[place].image_path), np.float64) / 127.5 - 1
            colour = pixels.reshape(2, 32, 3, 32, 3).mean((1, 3)).transpose(2, 0, 1)
            # latents are kept in half precision: 11 bits
            np.testing.assert_allclose(batch.mean_BCHW[row].numpy(), colour, atol=1e-3)
            assert batch.sample_keys[row] == samples[place].key
            assert batch.prompts[row] == f'number "{samples[place].image_path.stem}"'
            text_TD, byt5_SE = batch.text[row]
            own = stand_in(batch.prompts[row])
            assert text_TD.dtype == torch.bfloat16
            assert torch.equal(text_TD, own.text_TD)
            assert byt5_SE is not None
            assert own.byt5_SE is not None
            assert torch.equal(byt5_SE, own.byt5_SE)
        assert batch.mean_BCHW.dtype == batch.std_BCHW.dtype == torch.float32
        assert batch.weights_B.tolist() == [1.0] * len(batch)
        assert batch.alpha_mask_BHW is None


def test_worker_processes_load_the_same_in_the_same_order(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset, caches: Caches
) -> None:
    for number in range(6):
        add_image(tmp_path / "images" / f"{number}.png", caption="a, b, c")
    samples = scan(dataset(subset_lines="shuffle_caption = true\nflip_aug = true")).samples
    caches.latents(samples)
    caches.text(samples)
    data = caches.data(samples)
    here, there = BatchLoader(data), BatchLoader(data, num_workers=2, persistent_workers=True)
    # a worker that is not forked (Windows, macOS, Python 3.14 and later) gets the data as a pickle
    unpickled = BatchLoader(pickle.loads(pickle.dumps(data)))
    for epoch in (1, 2):
        batches = epoch_batches(samples, seed=0, epoch=epoch)
        loaded = [loader.load(batches, epoch=epoch) for loader in (here, there, unpickled)]
        for one, *others in zip(*loaded, strict=True):
            for other in others:
                assert torch.equal(one.mean_BCHW, other.mean_BCHW)
                assert (one.sample_keys, one.prompts) == (other.sample_keys, other.prompts)
    entry = data.latent_store.path(data.latent_store.key(samples[0].recipe()))
    entry.unlink()
    data.latent_store.path(data.latent_store.key(samples[0].recipe(flipped=True))).unlink()
    with pytest.raises(HyimgError, match=r"no latent cache entry.*0\.png") as told:
        list(there.load(epoch_batches(samples, seed=0, epoch=1), epoch=1))
    assert told.value.hint == "run `hyimg cache-latents`"


@pytest.fixture
def training_data(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset, caches: Caches
) -> tuple[TrainingData, list[Batch]]:
    """Four samples and their batches."""
    for number in range(4):
        add_image(tmp_path / "images" / f"{number}.png", caption=f'{number} "sign"')
    samples = scan(dataset("resolution = 64\nbatch_size = 1")).samples
    caches.latents(samples)
    caches.text(samples)
    return caches.data(samples), epoch_batches(samples, seed=0, epoch=1)


@pytest.mark.skipif(
    multiprocessing.get_start_method() != "fork", reason="the workers are patched before they fork"
)
def test_batches_of_workers_need_no_shared_memory_and_no_descriptors(
    training_data: tuple[TrainingData, list[Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory (shm): No space left on device (28)")

    data, batches = training_data
    monkeypatch.setitem(ForkingPickler._extra_reducers, torch.Tensor, full)
    loaded = list(BatchLoader(data, num_workers=2).load(batches, epoch=1))
    assert len(loaded) == 4
    for batch, same in zip(loaded, BatchLoader(data).load(batches, epoch=1), strict=True):
        for (text_TD, byt5_SE), (same_TD, same_SE) in zip(batch.text, same.text, strict=True):
            assert (text_TD.dtype, byt5_SE.dtype) == (torch.bfloat16, torch.float16)
            assert torch.equal(text_TD, same_TD)
            assert torch.equal(byt5_SE, same_SE)
        batch.weights_B.mul_(0)  # and is the reader's own


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, ["No space left on device in `/dev/shm`", "--shm-size"]),
        (errno.EMFILE, ["Too many open files", "ulimit -n"]),
        (errno.EAGAIN, ["Resource temporarily unavailable", "--max_data_loader_n_workers 0"]),
    ],
)
def test_workers_that_cannot_start_say_which_limit_it_is(
    number: int,
    words: list[str],
    training_data: tuple[TrainingData, list[Batch]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = 0

    def start(process: multiprocessing.process.BaseProcess) -> None:
        nonlocal started
        started += 1
        if started == 2:
            raise OSError(number, os.strerror(number))
        original(process)

    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    original = multiprocessing.process.BaseProcess.start
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", start)
    data, batches = training_data
    with pytest.raises(RunError) as told:
        list(BatchLoader(data, num_workers=2).load(batches, epoch=1))
    for word in ["cannot start 2 data loader processes", *words]:
        assert word in str(told.value)
    del told
    gc.collect()
    assert not ignored  # of torch, which ends what was started
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_ends_the_run(training_data: tuple[TrainingData, list[Batch]]) -> None:
    data, batches = training_data

    def read() -> None:
        with lost_workers_explained():
            for _ in BatchLoader(data, num_workers=1).load(batches * 1000, epoch=1):
                for worker in multiprocessing.active_children():
                    worker.kill()

    with pytest.raises(RunError, match=r"died \((killed by signal: Killed|unexpectedly)\)"):
        read()


def test_an_edit_encodes_again_exactly_what_it_touches(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset, caches: Caches
) -> None:
    images = tmp_path / "images"
    for number in range(4):
        add_image(images / f"{number}.png", (128, 96), caption=f"caption {number}")
    index = Index(caches.folder)

    def run(
        dataset_lines: str = "resolution = 64", subset_lines: str = "", vae: str = "vae"
    ) -> tuple[int, int]:
        samples = scan(dataset(dataset_lines, subset_lines), index).samples
        return len(caches.latents(samples, vae)), len(caches.text(samples))

    assert run() == (4, 5)  # and the empty prompt
    assert run() == (0, 0)
    add_image(images / "1.png", (128, 96), caption="caption 1", seed=1)
    assert run() == (1, 0)
    (images / "2.txt").write_text("a new caption")
    assert run() == (0, 1)
    (images / "3.txt").write_text("a new caption")  # equal captions are stored once
    assert run() == (0, 0)
    assert run(subset_lines="flip_aug = true") == (4, 0)
    assert run(subset_lines="resize_interpolation = 'bicubic'") == (4, 0)
    assert run(subset_lines="caption_prefix = 'photo'") == (0, 3)
    assert run(subset_lines="num_repeats = 7\ncaption_dropout_rate = 0.1") == (0, 0)
    assert run("resolution = 96\nbatch_size = 3") == (4, 0)
    assert run(vae="another vae") == (4, 0)
    (images / "0.png").rename(images / "9.png")
    (images / "0.txt").rename(images / "9.txt")
    assert run() == (0, 0)


def test_damage_is_repaired_exactly_and_refused_by_training(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset, caches: Caches
) -> None:
    for number in range(4):
        add_image(tmp_path / "images" / f"{number}.png")
    samples = scan(dataset()).samples
    assert len(caches.latents(samples)) == 4
    caches.text(samples)
    data = caches.data(samples)
    truncated, flipped = (data.latent_store.path(data.latent_store.key(s.recipe())) for s in samples[1:3])
    os.truncate(truncated, 100)
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x77")
    with pytest.raises(HyimgError, match=r"needed for `.*[12]\.png`") as told:
        list(BatchLoader(data).load(epoch_batches(samples, seed=0, epoch=1), epoch=1))
    assert "hyimg cache-latents" in (told.value.hint or "")
    with pytest.raises(HyimgError, match=r"no latent cache for `.*1\.png`, `.*2\.png` in"):
        latent_store_for_training(caches.folder / "latents", samples)
    assert caches.latents(samples) == ["1.png", "2.png"]
    assert len(list(BatchLoader(data).load(epoch_batches(samples, seed=0, epoch=1), epoch=1))) == 4


def test_training_without_models_takes_the_one_complete_cache(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset, caches: Caches
) -> None:
    add_image(tmp_path / "images" / "a.png")
    samples = scan(dataset()).samples
    folder = caches.folder / "latents"
    with pytest.raises(HyimgError, match="there is no latent cache") as told:
        latent_store_for_training(folder, samples, dataset_config=Path("set.toml"))
    assert told.value.hint == "run `hyimg cache-latents --dataset_config set.toml` with `--vae`"
    caches.latents(samples, "old vae")
    assert latent_store_for_training(folder, samples).model_identity == "old vae"
    add_image(tmp_path / "images" / "b.png")
    samples = scan(dataset()).samples
    caches.latents(samples, "new vae")
    assert latent_store_for_training(folder, samples).model_identity == "new vae"
    with pytest.raises(HyimgError, match=r"no latent cache for `.*b\.png`"):
        latent_store_for_training(folder, samples, identity="old vae")
    caches.latents(samples, "old vae")
    with pytest.raises(HyimgError, match="2 models"):
        latent_store_for_training(folder, samples)


def test_latents_of_an_older_release_are_not_used_again(
    tmp_path: Path,
    add_image: AddImage,
    dataset: MakeDataset,
    caches: Caches,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add_image(tmp_path / "images" / "a.png", size=(100, 100))
    samples = scan(dataset()).samples
    with monkeypatch.context() as before:
        before.setattr(LatentStore, "key", lambda store, recipe: store.key_of(vars(recipe)))
        assert caches.latents(samples) == ["a.png"]
    with pytest.raises(HyimgError, match="no latent cache for .*: 1 latent is from an older release"):
        latent_store_for_training(caches.folder / "latents", samples)
    store = LatentStore(caches.folder / "latents", "vae")
    assert store.num_outdated(sample.recipe() for sample in samples) == 1
    assert caches.latents(samples) == ["a.png"]
    latent_store_for_training(caches.folder / "latents", samples)


def test_all_variants_the_empty_prompt_and_extra_prompts_are_planned_once(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset, caches: Caches
) -> None:
    add_image(tmp_path / "images" / "a.png", caption="a, b, c, d, e, f")
    add_image(tmp_path / "images" / "b.png", caption="plain")
    samples = scan(dataset(subset_lines="shuffle_caption = true"), caption_variants=5).samples
    assert len(set(samples[0].prompts)) == 5
    wanted = {"", "plain", "a sample prompt", *samples[0].prompts}
    assert set(prompts_of(samples, ["a sample prompt", "plain"])) == wanted
    assert set(caches.text(samples, "encoder", "a sample prompt", "plain")) == wanted
    assert caches.text(samples, "encoder", "another") == ["another"]
    with pytest.raises(HyimgError, match="no text cache for the prompt `never seen`"):
        text_store_for_training(caches.folder / "text", samples, ["never seen"])


def test_mirrored_views_and_masks_belong_together(
    tmp_path: Path, dataset: MakeDataset, caches: Caches
) -> None:
    image = Image.new("RGBA", (64, 32), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (32, 0, 64, 32))
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("red and nothing")
    lines = "flip_aug = true\nalpha_mask = true"
    samples = scan(dataset("resolution = [64, 32]", lines)).samples
    caches.latents(samples)
    store = latent_store_for_training(caches.folder / "latents", samples)
    for flipped in (False, True):
        entry = store.read(samples[0].recipe(flipped))
        red, blue = entry.mean_CHW[0, 0].tolist(), entry.mean_CHW[2, 0].tolist()
        assert entry.alpha_mask_HW is not None
        assert entry.alpha_mask_HW.tolist() == [[0.0, 1.0]] if flipped else [[1.0, 0.0]]
        # under a mask the hidden colour is kept, not painted over
        assert (red, blue) == (([-1.0, 1.0], [1.0, -1.0]) if flipped else ([1.0, -1.0], [-1.0, 1.0]))
    without = scan(dataset("resolution = [64, 32]")).samples
    caches.latents(without)
    entry = store.read(without[0].recipe())
    assert entry.alpha_mask_HW is None
    assert entry.mean_CHW[:, 0, 1].tolist() == [1.0, 1.0, 1.0]  # white


def test_an_image_without_a_mask_counts_whole_in_a_batch_with_masks(
    tmp_path: Path, add_image: AddImage, caches: Caches
) -> None:
    add_image(tmp_path / "plain" / "a.png")
    image = Image.open(add_image(tmp_path / "masked" / "b.png")).convert("RGBA")
    image.putalpha(0)
    image.save(tmp_path / "masked" / "b.png")
    subsets = [{"image_dir": "plain"}, {"image_dir": "masked", "alpha_mask": True}]
    document = {"datasets": [{"resolution": 64, "batch_size": 2, "subsets": subsets}]}
    samples = scan(parse_dataset(document, tmp_path / "set.toml")).samples
    caches.latents(samples)
    caches.text(samples)
    batches = epoch_batches(samples, seed=0, epoch=1, shuffle=False)
    (loaded,) = BatchLoader(caches.data(samples)).load(batches, epoch=1)
    assert loaded.alpha_mask_BHW is not None
    assert loaded.alpha_mask_BHW.tolist() == [[[1.0] * 2] * 2, [[0.0] * 2] * 2]


def test_batches_to_encode_have_one_bucket_each_and_contain_every_image(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset, caches: Caches
) -> None:
    for number in range(7):
        add_image(tmp_path / "images" / f"{number}.png", (64, 128) if number % 2 else (128, 64))
    samples = scan(dataset("resolution = 96\nenable_bucket = true")).samples
    assert {sample.bucket for sample in samples} == {(64, 128), (128, 64)}
    tasks = list(latent_tasks(samples, LatentStore(caches.folder / "latents", "vae")).values())
    batches = latent_batches(tasks, 3)
    assert all(len({sample.bucket for sample, _ in batch}) == 1 for batch in batches)
    assert sorted(len(batch) for batch in batches) == [1, 3, 3]
    assert {id(sample) for batch in batches for sample, _ in batch} == {id(sample) for sample in samples}


def test_an_image_that_changes_after_the_scan_is_not_cached_as_the_old_one(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset, caches: Caches
) -> None:
    path = add_image(tmp_path / "images" / "a.png")
    samples = scan(dataset()).samples
    add_image(path, seed=1)
    with pytest.raises(HyimgError, match=r"a\.png` changed during"):
        caches.latents(samples)
    assert LatentStore.identities(caches.folder / "latents") == []
