"""How the start of `train` grows with the dataset: 1,000, 10,000 and 100,000 samples, everything cached.

Images, captions, cache entries and the index are synthesised: small files in the right places, which a warm
start only looks at. Measured is `train --max_train_steps 1` of a tiny model: the whole process, one step and the
final save included.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import HYIMG, Figure, Options, apart, command

SIZES = (1_000, 10_000, 100_000)
SIDE = 64


def measure(options: Options) -> Iterator[Figure]:
    """One figure a size."""
    scratch, runs = options.scratch, options.runs
    model = scratch / "tiny"
    subprocess.run([*HYIMG, "make-tiny-model", model], check=True, stderr=subprocess.DEVNULL)
    for size in (20,) if options.toy else SIZES:
        folder = scratch / f"samples-{size}"
        dataset = apart(synthesise, folder, size)
        train = [
            "train",
            "--dit",
            str(model / "hunyuanimage2.1.safetensors"),
            "--max_train_steps",
            "1",
            "--overwrite",
        ]
        arguments = [*train, "--dataset_config", str(dataset), "--output_dir", str(folder / "run")]
        yield command(f"train, {size:,} cached samples, one step", arguments, runs, _GOALS.get(size, ""))


_GOALS = {100_000: "goal 10 s, 500 MB"}


def synthesise(
    folder: Path,
    num_samples: int,
    side: int = SIDE,
    latent_shape: tuple[int, int, int] = (16, 2, 2),
    text_shape: tuple[int, int] = (4, 64),
) -> Path:
    """A dataset of so many images with captions of their own, all cached; its dataset file's path.

    `side` in pixels; the shapes of cached latents (CHW) and texts (tokens, width) are the tiny model's by default.
    """
    import torch

    from hyimg.cache.hashing import FileStat, hash_bytes
    from hyimg.cache.index import Index
    from hyimg.cache.latents import LatentStore
    from hyimg.cache.prompt_embeddings import TextStore
    from hyimg.data.caching import latent_tasks, text_tasks
    from hyimg.data.dataset_file import load_dataset_file
    from hyimg.data.scan import scan
    from hyimg.data.workspace import cache_folder

    images = folder / "images"
    images.mkdir(parents=True)
    dataset = folder / "dataset.toml"
    dataset.write_text(
        f"[[datasets]]\nresolution = {side}\n[[datasets.subsets]]\nimage_dir = 'images'\n", encoding="utf-8"
    )
    cache_dir = cache_folder(None, dataset)
    index = Index(cache_dir)
    for number in range(num_samples):
        path = images / f"{number:06}.png"
        content = f"image {number}".encode()
        path.write_bytes(content)
        path.with_suffix(".txt").write_text(f"a caption of its own, number {number}", encoding="utf-8")
        index.remember_content_hash(str(path), FileStat.of(path.stat()), hash_bytes(content))
        index.remember_image_size(hash_bytes(content), (side, side))
    samples = scan(load_dataset_file(dataset), index).samples
    latent, text = (torch.zeros(shape, dtype=torch.float16) for shape in (latent_shape, text_shape))
    latents = LatentStore(cache_dir / "latents", "synthetic", index=index)
    for key, (sample, flipped) in latent_tasks(samples, latents).items():
        latents.write_tensors(key, {"mean": latent, "std": latent}, vars(sample.recipe(flipped)))
    texts = TextStore(cache_dir / "text", "synthetic", index=index)
    for key, prompt in text_tasks(samples, texts).items():
        texts.write_tensors(key, {"text": text}, {"prompt": prompt})
    index.close()
    return dataset


if __name__ == "__main__":
    # makes a dataset to look at with a profiler: python -m benchmarks.samples FOLDER NUMBER
    print(synthesise(Path(sys.argv[1]), int(sys.argv[2])))
