"""What `hyimg dataset` tells, as values: their names are the keys of its JSON (docs/dataset.md).

Sizes are [width, height] in pixels, paths absolute, byte counts of files; datasets are numbered from 1 as
they stand in the dataset file.
"""

from __future__ import annotations

from dataclasses import dataclass

from hyimg.data.buckets import Size

JSON_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SubsetRow:
    """A subset: how many images it gives to training and validation, each `num_repeats` times an epoch."""

    source: str
    images: int
    validation: int
    num_repeats: int
    is_reg: bool


@dataclass(frozen=True, kw_only=True)
class DatasetRow:
    """A dataset; `buckets` is `enable_bucket`."""

    dataset: int
    resolution: Size
    batch_size: int
    buckets: bool
    subsets: tuple[SubsetRow, ...]


@dataclass(frozen=True, kw_only=True)
class BucketRow:
    """A bucket of one dataset. `turns` are its images times their repeats, `cost` is that of one image
    relative to 2048x2048, `native` whether the size is one of the model's five."""

    dataset: int
    size: Size
    native: bool
    images: int
    validation: int
    turns: int
    batches: int
    upscaled: int
    tokens: int
    cost: float


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """An image that `--on_bad_image skip` leaves out."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Images:
    """Counts, and by path the images that cannot be read (left out) and those that are upscaled."""

    training: int
    validation: int
    regularisation: int
    unreadable: tuple[Unreadable, ...]
    upscaled: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """`turns` are images times repeats; `cost` is that of all of them, in images of 2048x2048."""

    turns: int
    batches: int
    steps: int
    gradient_accumulation_steps: int
    cost: float


@dataclass(frozen=True, kw_only=True)
class StoreState:
    """What a cache made by one model holds of the dataset's entries.

    `identity` is the model's (None: there is no cache yet), `named` whether its files were given. `bytes_missing`
    is None where the size of the missing entries is not known.
    """

    identity: str | None
    named: bool
    cached: int
    missing: int
    bytes_cached: int
    bytes_missing: int | None


@dataclass(frozen=True, kw_only=True)
class CacheState:
    """`entries` are all that the dataset needs; `basis` is what `bytes_missing` is computed from."""

    folder: str
    entries: int
    basis: str
    stores: tuple[StoreState, ...]


@dataclass(frozen=True, kw_only=True)
class Captions:
    """`prompts` are the distinct texts that are encoded (variants of the captions, and the empty one).

    `tokenizer` is where the tokenizer was found; None where there is none, `not_counted` saying why. Tokens
    are those the DiT sees.
    """

    distinct: int
    prompts: int
    tokenizer: str | None
    not_counted: str | None
    mean_tokens: float | None
    longest_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something about captions or images that a user may want to know, with the images it is about.

    `kind` is one of the table below, `texts` what is quoted, typed or shared, `count` how many tokens or bytes are
    cut (None for other kinds).
    """

    kind: str
    images: tuple[str, ...]
    texts: tuple[str, ...] = ()
    count: int | None = None


FINDING_KINDS = {
    "empty_caption": "caption is empty",
    "tokens_cut": "caption is over 1024 tokens, and its end is cut",
    "quoted_text": "text in quotes, which byT5 will see",
    "quoted_text_cut": "text in quotes is longer than byT5 reads (127 bytes), and its end is cut",
    "single_quoted_text": "text in single quotes, which byT5 will not see",
    "special_token": "special token in the text: it acts as one",
    "leading_newline": "caption begins with a newline, which joins the prompt template's own",
    "duplicate_caption": "caption of several images",
    "duplicate_image": "same image more than once in a dataset",
}
"""Every kind of finding, in the order of the report -> its heading."""


@dataclass(frozen=True, kw_only=True)
class DatasetReport:
    """`format` is 1; it is raised when a key changes its meaning or goes away, and new keys may come any time."""

    format: int
    dataset_config: str
    cache_dir: str
    images: Images
    epoch: Epoch
    datasets: tuple[DatasetRow, ...]
    buckets: tuple[BucketRow, ...]
    latents: CacheState
    text: CacheState
    captions: Captions
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
