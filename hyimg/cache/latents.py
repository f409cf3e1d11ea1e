"""The latent cache: the mean and standard deviation of the VAE posterior of each cropped image.

    store = LatentStore(cache_dir / "latents", vae_identity, index=Index(cache_dir))
    recipe = LatentRecipe(sha256, bucket=(1024, 1024), resized=(1024, 1100), crop=(0, 38), filter="area")
    store.write(recipe, LatentEntry(mean_CHW, std_CHW))
    entry = store.read(recipe)

Shapes: C latent channels, H W latent height and width. Latents are already scaled (by 0.75289).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hyimg.cache.entries import EntryStore
from hyimg.errors import RunError

if TYPE_CHECKING:
    import torch


PIXELS_VERSION = 2
"""Raised whenever the same recipe gives the VAE other pixels.

1: `area` weighted whole pixels, and a TIFF with an orientation was rotated twice. 2: exact areas, rotated once.
"""


@dataclass(frozen=True)
class LatentRecipe:
    """Everything but the VAE that determines a latent entry. Sizes are (width, height) in pixels.

    `image` is the sha256 of the file; the image is resized to `resized` with `filter`, cropped to `bucket` at
    `crop` (left, top), and mirrored if `flipped`. `mask` is None, "alpha" (the image's own transparency),
    or the sha256 of a mask image's file.
    """

    image: str
    bucket: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int]
    filter: str
    flipped: bool = False
    mask: str | None = None


@dataclass(frozen=True)
class LatentEntry:
    """`mean_CHW` and `std_CHW` of the posterior, and the loss mask `alpha_mask_HW` in 0..1 or None; float16 if read."""

    mean_CHW: torch.Tensor
    std_CHW: torch.Tensor
    alpha_mask_HW: torch.Tensor | None = None


class LatentStore(EntryStore):
    kind = "latent"
    command = "hyimg cache-latents"
    models = "`--vae`"
    choice = "give `--vae`"
    train_flag = "--cache_latents"

    def key(self, recipe: LatentRecipe) -> str:
        return self.key_of({**vars(recipe), "pixels": PIXELS_VERSION})

    def num_outdated(self, recipes: Iterable[LatentRecipe]) -> int:
        """How many of these recipes have an entry made by an older release (`PIXELS_VERSION`), which is not used."""
        there = self.listing()
        return sum(self.key_of(vars(recipe)) in there for recipe in recipes)

    def write(self, recipe: LatentRecipe, entry: LatentEntry, *, image: object = None) -> None:
        """Writes an entry as float16; an error names the image by `image`, or else by its sha256.

        Raises `RunError` for a value that is not finite or too large for float16 (a broken VAE, or one that
        overflowed), and as `EntryStore.write_tensors`.
        """
        import torch

        tensors = {"mean": entry.mean_CHW, "std": entry.std_CHW}
        if entry.alpha_mask_HW is not None:
            tensors["alpha_mask"] = entry.alpha_mask_HW
        halves = {name: tensor.to("cpu", torch.float16) for name, tensor in tensors.items()}
        for name, half in halves.items():
            if not bool(torch.isfinite(half).all()):
                raise RunError(
                    f"the VAE gave a latent {name} that is not finite for the image `{image or recipe.image}`",
                    hint="run with `--mixed_precision no`",
                )
        self.write_tensors(self.key(recipe), halves, vars(recipe))

    def read(self, recipe: LatentRecipe) -> LatentEntry:
        """The entry of a recipe, float16 on the CPU; raises as `EntryStore.read_tensors`."""
        tensors = self.read_tensors(self.key(recipe), {"mean": 3, "std": 3}, {"alpha_mask": 2})
        return LatentEntry(tensors["mean"], tensors["std"], tensors.get("alpha_mask"))
