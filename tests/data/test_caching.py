"""From a dataset file through the stores to the tensors of a batch, with stand-ins for VAE and encoders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hyimg.cache.index import Index
from hyimg.cache.latents import LatentStore
from hyimg.cache.text import TextEntry, TextStore
from hyimg.data.batches import epoch_batches
from hyimg.data.dataset import DatasetFile
from hyimg.data.pixels import image_batches
from hyimg.data.plan import (
    latent_store_for_training,
    plan_latents,
    plan_text,
    prompts_of,
    text_store_for_training,
)
from hyimg.data.sample import Sample
from hyimg.data.samples import scan
from hyimg.data.training_data import BatchLoader, TrainingData
from hyimg.errors import HyimgError

AddImage = Callable[..., Path]
MakeDataset = Callable[..., DatasetFile]


def stand_in(prompt: str) -> TextEntry:
    """A prompt's states, which no other prompt has."""
    number = sum(prompt.encode()) % 251  # bfloat16 holds whole numbers up to 256
    glyphs = torch.full((2, 6), float(number)).half() if '"' in prompt else None
    return TextEntry(torch.full((len(prompt), 8), float(number)).bfloat16(), glyphs)


class Caches:
    """Both stages in their plainest form: a latent is the mean colour of its 32x32 pixels."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def latents(self, samples: list[Sample], vae: str = "vae", batch_size: int = 2) -> list[str]:
        """Makes what is missing; the names of the images that were encoded."""
        store = LatentStore(self.folder / "latents", vae, index=Index(self.folder))
        encoded: list[str] = []
        for batch in image_batches(plan_latents(samples, store).batches(batch_size)):
            mean_BChw = torch.nn.functional.avg_pool2d(batch.image_BCHW, 32)
            batch.write(store, mean_BChw, torch.ones_like(mean_BChw))
            encoded += [task.sample.image_path.name for task in batch.tasks]
        return sorted(encoded)

    def text(self, samples: list[Sample], encoder: str = "encoder", *extra: str) -> list[str]:
        store = TextStore(self.folder / "text", encoder, index=Index(self.folder))
        todo = plan_text(samples, store, extra).todo
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
    for epoch in (1, 2):
        batches = epoch_batches(samples, seed=0, epoch=epoch)
        for one, other in zip(here.load(batches, epoch=epoch), there.load(batches, epoch=epoch), strict=True):
            assert torch.equal(one.mean_BCHW, other.mean_BCHW)
            assert (one.sample_keys, one.prompts) == (other.sample_keys, other.prompts)
    entry = data.latent_store.path(data.latent_store.key(samples[0].recipe()))
    entry.unlink()
    data.latent_store.path(data.latent_store.key(samples[0].recipe(flipped=True))).unlink()
    with pytest.raises(HyimgError, match=r"no latent cache entry.*0\.png") as told:
        list(there.load(epoch_batches(samples, seed=0, epoch=1), epoch=1))
    assert told.value.hint == "run `hyimg cache-latents`"


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
    with pytest.raises(HyimgError, match=r"no latent cache for `.*1\.png` \(and 1 more\)"):
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


def test_batches_to_encode_are_of_one_bucket_and_divided_without_rest(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset, caches: Caches
) -> None:
    for number in range(7):
        add_image(tmp_path / "images" / f"{number}.png", (64, 128) if number % 2 else (128, 64))
    samples = scan(dataset("resolution = 96\nenable_bucket = true")).samples
    assert {sample.bucket for sample in samples} == {(64, 128), (128, 64)}
    plan = plan_latents(samples, LatentStore(caches.folder / "latents", "vae"))
    batches = plan.batches(3)
    assert all(len({task.sample.bucket for task in batch}) == 1 for batch in batches)
    shares = [task for rank in range(2) for batch in plan.batches(3, rank=rank, world=2) for task in batch]
    assert {id(task) for task in shares} == {id(task) for task in plan.todo}
    assert len(shares) == 7


def test_an_image_that_changes_after_the_scan_is_not_cached_as_the_old_one(
    tmp_path: Path, add_image: AddImage, dataset: MakeDataset, caches: Caches
) -> None:
    path = add_image(tmp_path / "images" / "a.png")
    samples = scan(dataset()).samples
    add_image(path, seed=1)
    with pytest.raises(HyimgError, match=r"a\.png` was changed while"):
        caches.latents(samples)
    assert LatentStore.identities(caches.folder / "latents") == []
