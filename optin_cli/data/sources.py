"""Resolve a DATA argument to a `datasets.Dataset` of one split."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optin_cli.artefacts.files import disk_is_full, nearest_path
from optin_cli.data import docs, glue, hub, prose, squad
from optin_cli.data.audio_folders import holds_recordings, open_recordings
from optin_cli.data.folders import SUFFIXES, image_mask_pairs, names_of, split_folder
from optin_cli.data.metadata import check_metadata
from optin_cli.data.separated import SEPARATORS, check_encoding, check_header, separated
from optin_cli.data.usual_names import NAMES
from optin_cli.errors import InputError, UsageError, first_line, param

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

log = logging.getLogger("optin")

BUILTIN_DOCS, BUILTIN_PROSE = "builtin:docs", "builtin:prose"
_BUILTIN = {BUILTIN_PROSE: prose.split_paragraphs, BUILTIN_DOCS: docs.split_sentences}
IN_MEMORY = "memory:"
"""Begins the spec of data that the caller holds: it can't be opened by name."""
_READERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
# data sets whose old name without an organisation is still what everyone types
_HUB_HOMES = {"glue": glue.HOME, "super_glue": "aps/super_glue", "imdb": "stanfordnlp/imdb"}


@dataclass(frozen=True)
class DataSpec:
    """The data that the user asked for: a DATA argument with its options."""

    spec: str = field(
        metadata={
            "name": "data",
            "metavar": "DATA",
            "help": "Hub data set (glue/sst2), CSV, JSONL, Parquet, image or audio folder, or builtin:prose.",
        }
    )
    split: str = field(default="train", metadata={"help": "Split of the data."})
    config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    text: tuple[str, ...] = field(
        default=(), metadata={"metavar": "A[,B]", "help": "Text column, or two of them."}
    )
    label: str | None = field(
        default=None,
        metadata={
            "metavar": "A[,B..]",
            "help": "Label column; of multi-label models perhaps one each.",
        },
    )
    image: str | None = field(
        default=None, metadata={"help": f"Image column (or folder, beside {param('mask')})."}
    )
    stream: bool = field(
        default=False,
        metadata={"help": "Sample from the first rows, reading no more: data larger than the disk."},
    )
    workers: int | None = field(
        default=None,
        metadata={
            "panel": "Machine",
            "help": "Processes that decode files (default: up to 4, by cores; 0 for none).",
        },
    )
    """Changes no result."""
    mask: str | None = field(
        default=None, metadata={"help": "Column (or folder) of label maps, for segmentation models."}
    )
    ignore_index: int = field(
        default=255, metadata={"help": "Id of a label map's pixels that count nothing."}
    )
    audio: str | None = field(default=None, metadata={"help": "Column of recordings, or of their paths."})
    held: Any = field(default=None, compare=False, repr=False)
    """The caller's object instead of a name: a `Dataset`, an `IterableDataset`, or a `BatchStore`."""

    def beside(self, path: str) -> str:
        """A path as the data has it, from where the data is."""
        here = Path(self.spec).expanduser()
        return path if "://" in path else str((here if here.is_dir() else here.parent) / path)

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise UsageError(
                f"{param('workers', self.workers)}: at least 0 is needed", "0 decodes in this process"
            )


def open_split(data: DataSpec) -> Dataset:
    """Open one split of `builtin:prose` or `builtin:docs`, a CSV, JSONL, Parquet or text file (a row a line), a folder
    of them, an image or audio folder, a folder written by `datasets`, or a hub data set.

    Raises `UsageError` for what does not exist and `InputError` for what can't be read.
    """
    with reading(data):
        return _open(data)


def open_stream(data: DataSpec) -> IterableDataset:
    """The same for data too large to be copied: rows come one after the other, images undecoded.

    Whatever iterates over it does so within `reading`: files are opened on the way.
    """
    import datasets

    with reading(data):
        opened = _open(data)
        stream = opened if isinstance(opened, datasets.IterableDataset) else opened.to_iterable_dataset()
        return stream.decode(False) if stream.features else stream


@contextmanager
def reading(data: DataSpec) -> Iterator[None]:
    """Turn what the libraries raise for unusable data into one sentence."""
    import datasets

    try:
        yield
    except (UsageError, InputError):
        raise
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, IndexError) as error:
        # a file with a header alone, and a saved data set without rows
        if "corresponds to no data" in str(error) or isinstance(error, IndexError):
            raise InputError(f"{data.spec} ({data.split}) is empty") from error
        if disk_is_full(error):
            raise InputError(
                f"the disk is full: {data.spec} could not be put into the cache of `datasets`",
                "free some space, or point HF_DATASETS_CACHE at another disk",
            ) from error
        if failed := _in_cache(error):
            raise InputError(
                f"the cache of `datasets` can't be written: {failed}",
                "point HF_HOME, or HF_DATASETS_CACHE, at a folder that you can write to",
            ) from error
        cause = error.__cause__ or error
        if (isinstance(cause, UnicodeDecodeError) or "UTF8" in str(cause)) and Path(data.spec).is_file():
            check_encoding(Path(data.spec), all_of_it=True)
        raise InputError(
            f"{data.spec} can't be read as data: {first_line(cause)}", _to_check(Path(data.spec))
        ) from error


def _in_cache(error: BaseException | None) -> OSError | None:
    """The failure of a file operation in the cache of `datasets` that an error comes from, if it does."""
    import datasets

    homes = [str(datasets.config.HF_CACHE_HOME), str(datasets.config.HF_DATASETS_CACHE)]
    while error is not None:
        if isinstance(error, OSError) and str(error.filename or "").startswith(tuple(homes)):
            return error
        error = error.__cause__ or error.__context__
    return None


def _to_check(path: Path) -> str | None:
    if path.is_file():
        return f"check that the contents are what the suffix says: {', '.join(_READERS)}"
    return f"a folder holds images, recordings, or files of {', '.join(_READERS)}" if path.is_dir() else None


def _open(data: DataSpec) -> Any:
    """A `datasets.Dataset`, or with `data.stream` an `IterableDataset` where there is a choice."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs as an error, it raises as well
    if data.held is not None:
        return data.held
    if data.spec.startswith(IN_MEMORY):
        raise UsageError(f"the data was given in memory ({data.spec})", "give it again")
    if data.spec in _BUILTIN:
        if data.split not in prose.SPLITS:
            raise UsageError(f"{data.spec} has no split {data.split!r}", f"use {' or '.join(prose.SPLITS)}")
        return datasets.Dataset.from_dict({"text": _BUILTIN[data.spec](data.split)})
    if data.spec.startswith("builtin:"):
        raise UsageError(f"unknown built-in data {data.spec!r}", f"there is: {', '.join(_BUILTIN)}")
    if (task := glue.glue_task(data.spec, data.config)) is not None:
        data = replace(data, split=task.splits.get(data.split, data.split))
    path = Path(data.spec).expanduser()
    if path.is_file():
        return _load_files([path], data)
    if path.is_dir():
        tsv = task and glue.file_of(path, task, data.split)
        return glue.load(tsv, task) if task and tsv else _open_folder(path, data)
    if data.spec.startswith((".", "/", "~")) or path.suffix in _READERS or data.spec.count("/") > 1:
        raise UsageError(f"no data at {data.spec}", nearest_path(path) or None)
    return _load_hub(data)


def _load(reader: str, *config: str | None, stream: bool, **options: Any) -> Any:
    import datasets

    return datasets.load_dataset(reader, *config, **options, **({"streaming": True} if stream else {}))


def _load_files(files: list[Path], data: DataSpec) -> Any:
    suffixes = {file.suffix.lower() for file in files}
    reader = _READERS.get(files[0].suffix.lower())
    if reader is None or len(suffixes) > 1:
        raise UsageError(
            f"{files[0]} is of no known kind",
            f"known: {', '.join(_READERS)}, image and audio folders, hub data sets",
        )
    options: dict[str, Any] = {}
    if reader == "csv":
        options = {"keep_default_na": False}  # "None", "null" and "NA" are words
    if empty := [file for file in files if file.stat().st_size == 0]:
        raise InputError(f"{empty[0]} is empty")
    if reader == "csv":
        usual = "\t" if files[0].suffix.lower() == ".tsv" else ","
        table = separated(files[0], usual)
        check_header(table, files[0], NAMES, filter(None, (*data.text, data.label)))
        if table.separator != ",":
            options["sep"] = table.separator
        if table.separator != usual:
            log.info("%s is separated by %s", files[0], SEPARATORS[table.separator])
    elif reader in ("json", "text"):
        check_encoding(files[0])
    if reader == "json" and squad.looks_like(files[0]):
        return squad.load(files)
    paths = {data.split: [glob.escape(str(f)) for f in files]}  # `data[1].csv` is a name, not a pattern
    return _load(reader, data_files=paths, split=_slice_safe(data.split), stream=data.stream, **options)


def _slice_safe(split: str) -> str:
    if not split.replace("_", "").replace(".", "").isalnum():
        raise UsageError(
            f"{split!r} is not a name of a split", f"use a plain name and {param('samples')} for a part of it"
        )
    return split


def _open_folder(path: Path, data: DataSpec) -> Any:
    """Open `datasets` folders by that library's reader; images with masks; `<split>*.csv|jsonl|parquet`; else images or
    recordings by class folder."""
    import datasets

    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.DatasetDict):
            if data.split not in loaded:
                raise UsageError(f"{path} has no split {data.split!r}", f"it has {', '.join(loaded)}")
            return loaded[data.split]
        return loaded
    names = names_of(data.split)
    pairs = image_mask_pairs(path, data.split, data.image, data.mask)
    if pairs is not None:
        return datasets.Dataset.from_dict(pairs).cast(
            datasets.Features(dict.fromkeys(pairs, datasets.Image(decode=False)))
        )
    tables = sorted(f for f in path.rglob("*") if f.suffix in _READERS and f.stem != "metadata")
    # a readme or a list of labels is not data
    tables = [f for f in tables if f.suffix != ".txt" or f.stem in names]
    if tables:
        chosen = [f for f in tables if f.stem in names or f.stem.split("-")[0] in names]
        if not chosen:
            have = sorted({f.stem.split("-")[0] for f in tables})
            raise UsageError(f"{path} has no file for the split {data.split!r}", f"it has {', '.join(have)}")
        return _load_files(chosen, data)
    folder = split_folder(path, data.split)
    if holds_recordings(folder, SUFFIXES):
        return open_recordings(folder)
    try:
        return _load("imagefolder", data_dir=str(folder), split="train", stream=data.stream)
    except Exception:
        check_metadata(folder)  # `datasets` names neither the file nor the line
        raise


def _load_hub(data: DataSpec) -> Any:
    """`glue/sst2` is config sst2 of the data set glue; any other `a/b` is organisation and name."""
    import datasets

    first, _, rest = data.spec.partition("/")
    name, config = data.spec, data.config
    if first in _HUB_HOMES:
        name, config = _HUB_HOMES[first], rest or data.config
    if name == glue.HOME:
        config = glue.config_of(data.spec, data.config)
    try:
        return _load(name, config, split=_slice_safe(data.split), stream=data.stream)
    except OSError as error:  # `datasets` has tried again itself
        known = isinstance(error, datasets.exceptions.DatasetNotFoundError | ConnectionError)
        if not known and not hub.is_passing(error):
            raise
        raise InputError(
            f"{data.spec} is not a local path and can't be fetched from the hub: {hub.reason(error)}",
            nearest_path(Path(data.spec)) or "check the name and the network, or give a local file or folder",
        ) from error
