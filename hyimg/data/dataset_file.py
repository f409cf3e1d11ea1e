"""The dataset file: TOML or JSON in the reference tool's form, read into frozen dataclasses.

    dataset_file = load_dataset_file(path, defaults={"batch_size": train_batch_size})
    for note in dataset_file.notes: reporter.warning(note)

`[general]`, `[[datasets]]` and `[[datasets.subsets]]` may all hold a key, the inner value winning, and
`defaults` (flags) stand under all of them. Everything that is wrong with a file is one error that lists it.
What keys there are stands in `hyimg.data.dataset_keys`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hyimg.data.buckets import BucketSizes, Size
from hyimg.data.captions import CaptionSettings
from hyimg.data.dataset import Dataset, DatasetFile, Subset
from hyimg.data.dataset_keys import KEYS, Level
from hyimg.errors import HyimgError, nearest

_SHOWN_CHARS = 200
_NO_DEFAULTS: Mapping[str, object] = MappingProxyType({})
_OUTER_PLACES = ("[general]", "the command line")
_FOLDER_ONLY = ("is_reg", "class_tokens", "caption_extension")


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
    if len({dataset.resolution for dataset in datasets}) > 1:
        reader.notes.append(
            f"`{path.name}` trains at several resolutions, for which the base model was not trained"
        )
    return DatasetFile(path, tuple(datasets), tuple(reader.notes))


def _read_document(path: Path) -> object:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        if path.is_dir():
            raise HyimgError(
                f"`{path}` is a folder, not a dataset file",
                hint="give a TOML file that names the folder of images as its `image_dir` (docs/dataset.md)",
            ) from None
        raise HyimgError(f"cannot read the dataset file `{path}`: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise HyimgError(f"the dataset file `{path}` is not UTF-8 (byte {error.start})") from error
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except ValueError as error:
            raise HyimgError(f"`{path}` is not valid JSON: {error}") from error
        except RecursionError as error:
            raise HyimgError(f"`{path}` is nested too deeply") from error
    import tomli

    try:
        return tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise HyimgError(f"`{path}` is not valid TOML: {error}") from error
    except RecursionError as error:
        raise HyimgError(f"`{path}` is nested too deeply") from error


def _all_problems(path: Path, problems: list[str]) -> HyimgError:
    if len(problems) == 1:
        return HyimgError(f"`{path}`, {problems[0]}")
    listing = "".join(f"\n  {problem}" for problem in problems)
    return HyimgError(f"`{path}` has {len(problems)} problems:{listing}")


def _is_there(path: Path) -> bool:
    """Whether a path leads to something; raises OSError for a name too long and for links in a circle."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _shown(value: object) -> str:
    """A value as JSON, cut where it is long."""
    try:
        text = json.dumps(value, default=str)
    except ValueError:
        return "a number of very many digits"
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


class _Reader:
    """Walks a document, keeping every problem and note that it meets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.unread: set[tuple[str, str]] = set()  # (place, key) of values that are wrong, not missing

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
            resolution=values["resolution"],
            batch_size=values.get("batch_size", KEYS["batch_size"].default),
            bucket_sizes=bucket_sizes,
            network_multiplier=values.get("network_multiplier", KEYS["network_multiplier"].default),
            prior_loss_weight=values.get("prior_loss_weight", KEYS["prior_loss_weight"].default),
            subsets=tuple(self._without_duplicates(subsets, place)),
        )

    def _bucket_sizes(self, values: Mapping[str, Any], place: str) -> BucketSizes:
        resolution: Size = values["resolution"]
        # the defaults give way to the resolution; what was typed and contradicts it is a problem
        min_reso = values.get("min_bucket_reso", min(256, min(resolution) // 2))
        max_reso = values.get("max_bucket_reso", max(1024, *resolution))
        if not values.get("enable_bucket", False):
            if values.get("bucket_no_upscale"):
                self.notes.append(f"{place}: `bucket_no_upscale` has no effect without `enable_bucket`")
            return BucketSizes(resolution)
        no_upscale = values.get("bucket_no_upscale", False)
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
        return BucketSizes(resolution, steps, max(min_reso, steps), max_reso, no_upscale)

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
        caption = {f.name: values[f.name] for f in fields(CaptionSettings) if f.name in values}
        plain = {f.name: values[f.name] for f in fields(Subset) if f.name in values}
        for name in ("image_dir", "metadata_file", "conditioning_data_dir"):
            if name in own:
                plain[name] = self._path(own[name], name, place)
        if "caption_extension" in values:
            plain["caption_extensions"] = (values["caption_extension"],)
        return Subset(**plain, caption=CaptionSettings(**caption))

    def _path(self, typed: str, name: str, place: str) -> Path:
        """The absolute path of a file or folder that must be there."""
        try:
            given = Path(typed).expanduser()
            candidates = [given.absolute(), (self.folder / given).absolute()]
            found = next((path for path in candidates if _is_there(path)), None)
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            self.problems.append(f"{place}: `{name}` {_shown(typed)} cannot be read: {reason}")
            return Path(typed)
        if found is None:
            looked = " and ".join(f"`{folder}`" for folder in dict.fromkeys([Path.cwd(), self.folder]))
            where = "" if given.is_absolute() else f" (looked for in {looked})"
            self.problems.append(f"{place}: `{name}` `{typed}` does not exist{where}")
            return candidates[0]
        if found.is_dir() == (name == "metadata_file"):
            self.problems.append(f"{place}: `{name}` `{typed}` is a {'folder' if found.is_dir() else 'file'}")
        elif name == "metadata_file" and not found.is_file():
            self.problems.append(f"{place}: `{name}` `{typed}` is a device or a pipe")
        return found

    def _without_duplicates(self, subsets: Iterable[Subset | None], place: str) -> list[Subset]:
        """The first subset of each folder (with its masks) or metadata file, as the reference tool; without
        those that are shown no times."""
        kept: dict[tuple[Path, Path | None], Subset] = {}
        for subset in subsets:
            if subset is None:
                continue
            if subset.num_repeats == 0:
                self.notes.append(f"{place}: `{subset.source}` is left out (`num_repeats = 0`)")
            elif (subset.source, subset.conditioning_data_dir) in kept:
                self.notes.append(f"{place}: `{subset.source}` is there twice; the first one counts")
            else:
                kept[subset.source, subset.conditioning_data_dir] = subset
        return list(kept.values())

    def _values(self, table: object, level: Level, place: str, below: str) -> dict[str, Any]:
        """The parsed values of a table; `below` is the key of its inner tables."""
        if not isinstance(table, Mapping):
            self.problems.append(f"{place} must be a table")
            return {}
        allowed = [key.name for key in KEYS.values() if level == "subset" or key.inherited]
        if level == "subset":
            allowed = [name for name in allowed if KEYS[name].level == "subset"]
        own = {name: value for name, value in table.items() if name != below}
        self._refuse_unknown(own, allowed, place)
        values: dict[str, Any] = {}
        for name in (name for name in own if name in allowed):
            key = KEYS[name]
            try:
                value = key.parse(own[name])
            except ValueError as error:
                self.problems.append(f"{place}: `{name}` {error}, not {_shown(own[name])}")
                self.unread.add((place, name))
                continue
            if key.refusal is not None and value != key.default:
                self.problems.append(f"{place}: `{name}` cannot be used: {key.refusal}")
            values[name] = value
        return values

    def _refuse_unknown(self, table: Mapping[str, object], allowed: Iterable[str], place: str) -> None:
        names = list(allowed)
        for name in table:
            if name in names:
                continue
            if name in KEYS:
                where = (
                    "[[datasets.subsets]]" if KEYS[name].level == "subset" else "[[datasets]] or [general]"
                )
                self.problems.append(f"{place}: `{name}` belongs in {where}")
            else:
                close = nearest(name, names, limit=1)
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
