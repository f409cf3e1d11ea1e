"""The dataset file: TOML or JSON in the reference tool's form, read into frozen dataclasses.

    dataset_file = load_dataset_file(path, defaults={"batch_size": train_batch_size})
    for note in dataset_file.notes: reporter.warning(note)

`[general]`, `[[datasets]]` and `[[datasets.subsets]]` may all hold a key, the inner value winning, and
`defaults` (flags) are below all of them. All problems of a file are listed in one error. The keys are declared in
`hyimg.data.dataset_keys`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hyimg.config.dataset_options import DATASET_PATHS
from hyimg.config.documents import DOCUMENT_BYTES, parse_document, read_bounded
from hyimg.config.values import check_value, shown_value
from hyimg.data.buckets import BucketSizes, Size
from hyimg.data.captions import CaptionSettings
from hyimg.data.dataset_keys import (
    KEYS,
    LEVEL_KEYS,
    OWN_KEYS,
    UNSUPPORTED_KEYS,
    Dataset,
    DatasetFile,
    Level,
    Subset,
    fields_given,
)
from hyimg.errors import HyimgError, first_few, first_lines, nearest

_NO_DEFAULTS: Mapping[str, object] = MappingProxyType({})
_OUTER_PLACES = ("[general]", "the command line")
_BUCKET_BOUNDS = ("min_bucket_reso", "max_bucket_reso")
_FOLDER_ONLY = ("is_reg", "caption_extension", "recursive")


def load_dataset_file(path: Path | str, defaults: Mapping[str, object] = _NO_DEFAULTS) -> DatasetFile:
    """Reads and checks a dataset file.

    `defaults` are values by key (say `resolution`, `batch_size`) for what the file leaves out. A relative
    path is looked for from the current folder, as the reference tool does, and then from the file's own.
    Raises `HyimgError` that lists every problem of the file.
    """
    path = Path(path)
    return parse_dataset(_read_document(path), path, defaults)


def parse_dataset(document: object, path: Path, defaults: Mapping[str, object] = _NO_DEFAULTS) -> DatasetFile:
    """As `load_dataset_file`, from the document itself; `path` is its name, and where paths start."""
    reader = _Reader(path.absolute().parent)
    datasets = reader.read(document, defaults)
    if reader.problems:
        raise _all_problems(path, reader.problems)
    notes = reader.notes
    if len({dataset.resolution for dataset in datasets}) > 1:
        notes.append(f"`{path.name}` trains at several resolutions, for which the base model was not trained")
    return DatasetFile(path, tuple(datasets), tuple(notes))


def _read_document(path: Path) -> object:
    try:
        text = read_bounded(path, DOCUMENT_BYTES).decode("utf-8-sig")
    except OSError as error:
        if path.is_dir():
            raise HyimgError(
                f"`{path}` is a folder, not a dataset file",
                hint="give a TOML file that names the folder of images as its `image_dir` (docs/dataset.md)",
            ) from None
        raise HyimgError(f"cannot read the dataset file `{path}`: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise HyimgError(f"the dataset file `{path}` is not UTF-8 (byte {error.start})") from error
    return parse_document(text, path, "dataset file", path_keys=DATASET_PATHS)


# More problems than these are of another kind of file, and their names would fill the screen
_LISTED_PROBLEMS = 12


def _all_problems(path: Path, problems: list[str]) -> HyimgError:
    if len(problems) == 1:
        return HyimgError(f"`{path}`, {problems[0]}")
    listing = first_lines(problems, limit=_LISTED_PROBLEMS)
    return HyimgError(f"`{path}` has {len(problems)} problems:", details=listing)


def _is_there(path: Path) -> bool:
    """Whether a path leads to something; raises OSError for a name too long and for links in a circle."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


class _Reader:
    """Walks a document, keeping every problem and note that it meets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self._notes: dict[str, dict[str, None]] = {}
        self._num_unknown = 0
        self._missing: dict[tuple[str, str], tuple[int, list[str]]] = {}
        self.unread: set[tuple[str, str]] = set()  # (place, key) of values that are wrong, not missing

    @property
    def notes(self) -> list[str]:
        """A line for each thing to note, with the first places or names."""
        return [f"{what}: {first_few(list(where))}" for what, where in self._notes.items()]

    def _note(self, what: str, where: str) -> None:
        self._notes.setdefault(what, {})[where] = None

    def read(self, document: object, defaults: Mapping[str, object]) -> list[Dataset]:
        if not isinstance(document, dict):
            self.problems.append("the top level must be tables `general` and `datasets`")
            return []
        self._refuse_unknown(document, ("general", "datasets"), "the top level")
        general = self._values(document.get("general", {}), "dataset", _OUTER_PLACES[0], "datasets")
        outer = {**self._values(defaults, "dataset", _OUTER_PLACES[1], ""), **general}
        tables = self._tables(document, "datasets", "the file")
        read = [self._dataset(table, f"[[datasets]] {n}", outer) for n, table in enumerate(tables, 1)]
        return [dataset for dataset in read if dataset is not None]

    def _dataset(self, table: object, place: str, outer: Mapping[str, Any]) -> Dataset | None:
        own = self._values(table, "dataset", place, "subsets")
        values = {**outer, **own}
        tables = self._tables(table, "subsets", place) if isinstance(table, dict) else []
        subsets = [self._subset(sub, f"{place}, subset {n}", values) for n, sub in enumerate(tables, 1)]
        if "resolution" not in values:
            if not {(where, "resolution") for where in (place, *_OUTER_PLACES)} & self.unread:
                self.problems.append(f"{place}: `resolution` is missing")
            return None
        bucket_sizes = self._bucket_sizes(values, place)
        return Dataset(
            **fields_given(Dataset, values),
            bucket_sizes=bucket_sizes,
            subsets=tuple(self._without_duplicates(subsets, place)),
        )

    def _bucket_sizes(self, values: Mapping[str, Any], place: str) -> BucketSizes:
        resolution: Size = values["resolution"]
        # the defaults give way to the resolution; what was typed and contradicts it is a problem
        min_reso = values.get("min_bucket_reso", min(256, min(resolution) // 2))
        max_reso = values.get("max_bucket_reso", max(1024, *resolution))
        if not values.get("enable_bucket", False):
            self._note_idle(
                values,
                (*_BUCKET_BOUNDS, "bucket_reso_steps", "bucket_no_upscale"),
                place,
                "there is no `enable_bucket`",
            )
            return BucketSizes(resolution)
        no_upscale = values.get("bucket_no_upscale", False)
        if no_upscale:
            self._note_idle(
                values, _BUCKET_BOUNDS, place, "buckets follow the images with `bucket_no_upscale`"
            )
        if not no_upscale and min_reso > min(resolution):
            self._contradiction(place, "min_bucket_reso", min_reso, "over the resolution", min(resolution))
            min_reso = min(resolution)
        if not no_upscale and max_reso < max(resolution):
            self._contradiction(place, "max_bucket_reso", max_reso, "under the resolution", max(resolution))
            max_reso = max(resolution)
        steps = values.get("bucket_reso_steps", KEYS["bucket_reso_steps"].default)
        if not no_upscale and steps > min(resolution):
            self.problems.append(
                f"{place}: `bucket_reso_steps` {steps} is over the resolution's shorter side"
            )
            steps = min(resolution)
        sizes = BucketSizes(resolution, steps, max(min_reso, steps), max_reso, no_upscale)
        for name, used in zip(_BUCKET_BOUNDS, sizes.bounds, strict=True):
            if not no_upscale and values.get(name, used) != used:
                self._note(f"`{name}` {values[name]} is taken as {used}, a multiple of {steps}", place)
        return sizes

    def _note_idle(self, values: Mapping[str, Any], names: Iterable[str], place: str, why: str) -> None:
        """Notes those of the keys that are given and change nothing."""
        idle = [f"`{name}`" for name in names if values.get(name, KEYS[name].default) != KEYS[name].default]
        if idle:
            self._note(f"{first_few(idle, limit=4)} without effect ({why})", place)

    def _contradiction(self, place: str, name: str, value: int, how: str, bound: int) -> None:
        self.problems.append(f"{place}: `{name}` {value} is {how} {bound}")

    def _subset(self, table: object, place: str, outer: Mapping[str, Any]) -> Subset | None:
        own = self._values(table, "subset", place, "")
        values = {**outer, **own}
        if "image_dir" not in own and "metadata_file" not in own:
            self.problems.append(f"{place}: `image_dir` (or `metadata_file`) is missing")
            return None
        if "metadata_file" in own:
            for name in _FOLDER_ONLY:
                if name in own:
                    self.problems.append(f"{place}: `{name}` cannot be combined with `metadata_file`")
        if values.get("alpha_mask") and "conditioning_data_dir" in own:
            self.problems.append(f"{place}: `alpha_mask` and `conditioning_data_dir` are two masks; take one")
        if own.get("is_reg") and own.get("validation_split"):
            self._note("`validation_split` without effect (regularisation images are never held back)", place)
        if not (values.get("shuffle_caption") or values.get("caption_tag_dropout_rate")):
            self._note_idle(values, ("keep_tokens",), place, "no tag is shuffled or dropped")
        self._note_idle(values, ("token_warmup_min",), place, "there is no token warm-up")
        plain = fields_given(Subset, values)
        for name in ("image_dir", "metadata_file", "conditioning_data_dir"):
            if name in own:
                plain[name] = self._path(own[name], name, place)
        if "caption_extension" in values:
            ending = values["caption_extension"]
            if ending.isalnum():
                self._note(f'`caption_extension = "{ending}"` is taken as `.{ending}`', place)
                ending = f".{ending}"
            plain["caption_extension"] = ending
        return Subset(**plain, caption=CaptionSettings(**fields_given(CaptionSettings, values)))

    def _path(self, given: Path, name: str, place: str) -> Path:
        """The absolute path of a file or folder that must exist."""
        try:
            candidates = [given.absolute(), (self.folder / given).absolute()]
            found = next((path for path in candidates if _is_there(path)), None)
        except OSError as error:
            self.problems.append(
                f"{place}: `{name}` {shown_value(str(given))} cannot be read: {error.strerror}"
            )
            return given
        if found is None:
            looked = " and ".join(f"`{folder}`" for folder in dict.fromkeys([Path.cwd(), self.folder]))
            where = "" if given.is_absolute() else f" (looked for in {looked})"
            self._add_missing(f"`{name}`", f"`{given}`", f"does not exist{where}", place)
            return candidates[0]
        if found.is_dir() == (name == "metadata_file"):
            self.problems.append(f"{place}: `{name}` `{given}` is a {'folder' if found.is_dir() else 'file'}")
        elif name == "metadata_file" and not found.is_file():
            self.problems.append(f"{place}: `{name}` `{given}` is a device or a pipe")
        return found

    def _add_missing(self, name: str, typed: str, what: str, place: str) -> None:
        """Adds a path that is not there to the line of those that differ in the path and its place only."""
        position, files = self._missing.setdefault((name, what), (len(self.problems), []))
        files.append(f"{typed} ({place})")
        if len(files) == 1:
            self.problems.append(f"{place}: {name} {typed} {what}")
        else:
            self.problems[position] = f"{name} {what}: {first_few(files)}"

    def _without_duplicates(self, subsets: Iterable[Subset | None], place: str) -> list[Subset]:
        """The first subset of each folder (with its masks) or metadata file, as the reference tool; without
        those that are shown no times."""
        kept: dict[tuple[Path, Path | None], Subset] = {}
        for subset in subsets:
            if subset is None:
                continue
            if subset.num_repeats == 0:
                self._note("subset with `num_repeats = 0`, skipped", f"`{subset.source}`")
            elif (subset.source, subset.conditioning_data_dir) in kept:
                self._note(
                    f"subset that is there twice in {place}, of which the first counts", f"`{subset.source}`"
                )
            else:
                kept[subset.source, subset.conditioning_data_dir] = subset
        return list(kept.values())

    def _values(self, table: object, level: Level, place: str, below: str) -> dict[str, Any]:
        """The parsed values of a table; `below` is the key of its inner tables."""
        if not isinstance(table, Mapping):
            self.problems.append(f"{place} must be a table")
            return {}
        allowed = list(LEVEL_KEYS["subset"]) if level == "subset" else [n for n in KEYS if n not in OWN_KEYS]
        own = {name: value for name, value in table.items() if name != below}
        self._refuse_unknown(own, allowed, place)
        values: dict[str, Any] = {}
        for name in (name for name in own if name in allowed):
            try:
                values[name] = check_value(KEYS[name], own[name], typed=True)
            except ValueError as error:
                self.problems.append(f"{place}: `{name}` {error}")
                self.unread.add((place, name))
                continue
            if name in UNSUPPORTED_KEYS and values[name] != KEYS[name].default:
                self.problems.append(f"{place}: `{name}` is not supported: {UNSUPPORTED_KEYS[name]}")
        return values

    def _refuse_unknown(self, table: Mapping[str, object], allowed: Iterable[str], place: str) -> None:
        names = list(allowed)
        for name in table:
            if name in names:
                continue
            if name in KEYS:
                where = (
                    "[[datasets.subsets]]" if name in LEVEL_KEYS["subset"] else "[[datasets]] or [general]"
                )
                self.problems.append(f"{place}: `{name}` belongs in {where}")
            else:
                self._num_unknown += 1  # names are compared for those that may be listed
                close = nearest(name, names, limit=1) if self._num_unknown <= _LISTED_PROBLEMS else []
                meant = f"; did you mean `{close[0]}`?" if close else ""
                self.problems.append(f"{place}: unknown key `{name}`{meant}")

    def _tables(self, table: Mapping[str, object], name: str, place: str) -> list[object]:
        tables = table.get(name, [])
        if not isinstance(tables, list) or not tables:
            self.problems.append(
                f"{place} needs at least one `[[{'datasets.' * (name == 'subsets')}{name}]]`"
            )
            return []
        return tables
