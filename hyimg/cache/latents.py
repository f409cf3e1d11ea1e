"""The latent cache: for an image as it is cropped, the mean and deviation of its VAE posterior.

    store = LatentStore(cache_dir / "latents", vae_identity, index=Index(cache_dir))
    recipe = LatentRecipe(sha256, bucket=(1024, 1024), resized=(1024, 1100), crop=(0, 38), filter="area")
    store.write(recipe, LatentEntry(mean_CHW, std_CHW))
    entry = store.read(recipe)

Shapes: C latent channels, H W latent height and width. Latents are already scaled (by 0.75289).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hyimg.cache.entries import EntryStore
from hyimg.errors import RunError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LatentRecipe:
    """Everything but the VAE that makes a latent entry. Sizes are (width, height) in pixels.

    `image` is the sha256 of the file; the image is resized to `resized` with `filter`, cut to `bucket` at
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
    """`mean_CHW` and `std_CHW` of the posterior (float16 when read), `alpha_mask_HW` in 0..1 or None."""

    mean_CHW: torch.Tensor
    std_CHW: torch.Tensor
    alpha_mask_HW: torch.Tensor | None = None


class LatentStore(EntryStore):
    kind = "latent"
    command = "hyimg cache-latents"
    models = "`--vae`"

    def key(self, recipe: LatentRecipe) -> str:
        return self.key_of(vars(recipe))

    def write(self, recipe: LatentRecipe, entry: LatentEntry) -> None:
        """Writes an entry in half precision.

        Raises `RunError` where a value is not finite or too large for float16 (a broken VAE, or one that
        overflowed), and as `EntryStore.write_raw`.
        """
        import torch

        from hyimg.cache.tensors import to_raw

        tensors = {"mean": entry.mean_CHW, "std": entry.std_CHW}
        if entry.alpha_mask_HW is not None:
            tensors["alpha_mask"] = entry.alpha_mask_HW
        halves = {name: tensor.to("cpu", torch.float16) for name, tensor in tensors.items()}
        for name, half in halves.items():
            if not bool(torch.isfinite(half).all()):
                raise RunError(
                    f"the VAE gave a latent {name} that is not finite for the image with sha256 "
                    f"`{recipe.image[:12]}`",
                    hint="run with `--mixed_precision no`",
                )
        raw = {name: to_raw(half) for name, half in halves.items()}
        self.write_raw(self.key(recipe), raw, vars(recipe))

    def read(self, recipe: LatentRecipe) -> LatentEntry:
        """The entry of a recipe, float16 on the CPU; raises as `EntryStore.read_raw`."""
        from hyimg.cache.tensors import from_raw

        raw = self.read_raw(self.key(recipe))
        mask = from_raw(raw["alpha_mask"]) if "alpha_mask" in raw else None
        return LatentEntry(from_raw(raw["mean"]), from_raw(raw["std"]), mask)
