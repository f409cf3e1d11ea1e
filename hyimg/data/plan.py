"""What is to be cached and what is there already: the questions that the stages ask of the stores.

cache-latents:

    plan = plan_latents(found.samples + found.validation, store)
    for batch in image_batches(plan.batches(vae_batch_size, rank=rank, world=world)):   # hyimg.data.pixels
        posterior = vae.encode(batch.image_BCHW.to(device))
        batch.write(store, posterior.mean_BCHW, posterior.std_BCHW)

cache-text:

    plan = plan_text(found.samples + found.validation, store, extra_prompts)
    for prompts in chunks(plan.share(rank=rank, world=world)):
        for prompt, encoded in zip(prompts, encoders.encode(prompts)):
            store.write(prompt, TextEntry(encoded.text_TD, encoded.byt5_SE))

train: `latent_store_for_training` and `text_store_for_training` open complete stores, or say what to run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from hyimg.cache.entries import EntryStore, Survey
from hyimg.cache.index import Index
from hyimg.cache.latents import LatentRecipe, LatentStore
from hyimg.cache.text import TextStore
from hyimg.data.buckets import Size
from hyimg.data.collector import collector_paused
from hyimg.data.sample import EMPTY_PROMPT, Sample
from hyimg.errors import HyimgError

Progress = Callable[[int], None]
Store = TypeVar("Store", bound=EntryStore)


@dataclass(frozen=True, slots=True)
class LatentTask:
    """One latent entry to make: a view (plain, or `flipped`) of a sample's image."""

    sample: Sample
    flipped: bool

    @property
    def recipe(self) -> LatentRecipe:
        return self.sample.recipe(self.flipped)


@dataclass(frozen=True)
class LatentPlan:
    """`todo` are the entries that are missing or damaged, each once; `num_done` those that are there.

    `damaged` says of each entry that is there and wrong whose it is and what is wrong with it.
    """

    todo: list[LatentTask]
    num_done: int
    damaged: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, tasks: Mapping[str, LatentTask], found: Survey) -> LatentPlan:
        """What is to be done of `tasks` (by key) after a look at the store."""
        damaged = [f"`{tasks[key].sample.image_path}`: {why}" for key, why in found.damaged.items()]
        todo = [task for key, task in tasks.items() if key not in found.good]
        return cls(todo, len(found.good), damaged)

    def batches(self, batch_size: int, *, rank: int = 0, world: int = 1) -> list[list[LatentTask]]:
        """The share of one process in batches of one bucket each, largest buckets first, so that a lack of
        memory shows at once."""
        by_bucket: defaultdict[Size, list[LatentTask]] = defaultdict(list)
        for task in self.todo:
            by_bucket[task.sample.bucket].append(task)
        batches = [
            tasks[start : start + batch_size]
            for _, tasks in sorted(by_bucket.items(), key=lambda item: (-item[0][0] * item[0][1], item[0]))
            for start in range(0, len(tasks), batch_size)
        ]
        return batches[rank::world]


@dataclass(frozen=True)
class TextPlan:
    """`todo` are the prompts without a good entry, each once; `num_done` those that have one; `damaged` as in
    `LatentPlan`."""

    todo: list[str] = field(default_factory=list)
    num_done: int = 0
    damaged: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, tasks: Mapping[str, str], found: Survey) -> TextPlan:
        """What is to be done of `tasks` (prompts by key) after a look at the store."""
        damaged = [f"{_prompt_name(tasks[key])}: {why}" for key, why in found.damaged.items()]
        todo = [prompt for key, prompt in tasks.items() if key not in found.good]
        return cls(todo, len(found.good), damaged)

    def share(self, *, rank: int = 0, world: int = 1) -> list[str]:
        """The prompts of one process."""
        return self.todo[rank::world]


@collector_paused()
def latent_tasks(samples: Iterable[Sample], store: LatentStore) -> dict[str, LatentTask]:
    """Every latent entry that training on `samples` may read, by its key in `store`."""
    return {
        store.key(sample.recipe(flipped)): LatentTask(sample, flipped)
        for sample in samples
        for flipped in sample.views
    }


@collector_paused()
def plan_latents(
    samples: Iterable[Sample], store: LatentStore, *, verify: bool = False, progress: Progress | None = None
) -> LatentPlan:
    """Which latent entries of `samples` are missing from `store`; see `EntryStore.survey`."""
    tasks = latent_tasks(samples, store)
    return LatentPlan.of(tasks, store.survey(tasks, verify=verify, progress=progress))


def prompts_of(samples: Iterable[Sample], extra_prompts: Iterable[str] = ()) -> list[str]:
    """Every distinct prompt that training on `samples` may show, the empty one first, and the extra ones."""
    from_samples = dict.fromkeys(prompt for sample in samples for prompt in sample.prompts)
    return list(dict.fromkeys([EMPTY_PROMPT, *from_samples, *extra_prompts]))


@collector_paused()
def text_tasks(
    samples: Iterable[Sample], store: TextStore, extra_prompts: Iterable[str] = ()
) -> dict[str, str]:
    """`prompts_of` by their keys in `store`."""
    return {store.key(prompt): prompt for prompt in prompts_of(samples, extra_prompts)}


@collector_paused()
def plan_text(
    samples: Iterable[Sample],
    store: TextStore,
    extra_prompts: Iterable[str] = (),
    *,
    verify: bool = False,
    progress: Progress | None = None,
) -> TextPlan:
    """Which prompts of `samples` (all variants), which extra ones (say of sample renders), and whether the
    empty one are missing from `store`; see `EntryStore.survey`."""
    tasks = text_tasks(samples, store, extra_prompts)
    return TextPlan.of(tasks, store.survey(tasks, verify=verify, progress=progress))


def _prompt_name(prompt: str) -> str:
    return f"the prompt `{prompt[:60]}`" if prompt else "the empty prompt"


def latent_store_for_training(
    folder: Path,
    samples: Sequence[Sample],
    *,
    index: Index | None = None,
    identity: str | None = None,
    dataset_config: Path | None = None,
    skip_check: bool = False,
) -> LatentStore:
    """The store under `folder` (`<cache_dir>/latents`) that holds every latent of `samples`.

    With `identity` (a VAE is given) it must be that VAE's; without, exactly one VAE's entries must be
    complete. Raises `HyimgError` that names the first image without an entry, and the command to run. With
    `skip_check` every entry is taken to be there, and one that is not is an error when it is read.
    """

    def missing(store: LatentStore) -> list[str]:
        return (
            []
            if skip_check
            else [f"`{task.sample.image_path}`" for task in plan_latents(samples, store).todo]
        )

    return _complete_store(LatentStore, folder, missing, index, identity, dataset_config)


def text_store_for_training(
    folder: Path,
    samples: Sequence[Sample],
    extra_prompts: Iterable[str] = (),
    *,
    index: Index | None = None,
    identity: str | None = None,
    dataset_config: Path | None = None,
    flags: str = "",
    skip_check: bool = False,
) -> TextStore:
    """The store under `folder` (`<cache_dir>/text`) that holds every prompt of `samples` and the extra ones;
    otherwise as `latent_store_for_training`. `flags` are what cache-text needs to make the extra ones."""
    extra = list(extra_prompts)

    def missing(store: TextStore) -> list[str]:
        return (
            [] if skip_check else [_prompt_name(prompt) for prompt in plan_text(samples, store, extra).todo]
        )

    return _complete_store(TextStore, folder, missing, index, identity, dataset_config, flags)


def _complete_store(
    store_type: type[Store],
    folder: Path,
    missing: Callable[[Store], list[str]],
    index: Index | None,
    identity: str | None,
    dataset_config: Path | None,
    flags: str = "",
) -> Store:
    command = store_type.command + (f" --dataset_config {dataset_config}" if dataset_config else "") + flags
    hint = f"run `{command}` with {store_type.models}"
    identities = store_type.identities(folder) if identity is None else [identity]
    lacks = {
        store: missing(store) for store in (store_type(folder, known, index=index) for known in identities)
    }
    complete = [store for store, lack in lacks.items() if not lack]
    if len(complete) == 1:
        return complete[0]
    if complete:
        raise HyimgError(
            f"the {store_type.kind} cache `{folder}` was made by {len(complete)} models",
            hint="name the model files, so that it is clear which is meant",
        )
    if not lacks:
        raise HyimgError(f"there is no {store_type.kind} cache in `{folder}`", hint=hint)
    fewest = min(lacks.values(), key=len)
    more = f" (and {len(fewest) - 1} more)" if len(fewest) > 1 else ""
    raise HyimgError(f"no {store_type.kind} cache for {fewest[0]}{more} in `{folder}`", hint=hint)
