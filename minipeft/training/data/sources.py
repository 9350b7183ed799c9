"""Where rows come from: files, folders, data sets on disk or on the Hub, whole or as a stream."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import datasets  # type: ignore[import-untyped]
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value

from minipeft.errors import DataError, MinipeftError, hint, shown, told_error
from minipeft.training.data.readers import VERSION, columns_of, is_json, json_rows, text_runs
from minipeft.training.data.rows import COLUMNS, kind_of, used_columns

Rows: TypeAlias = "Dataset | IterableDataset"
TABLES = {".parquet": "parquet", ".csv": "csv"}
SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
SPLITS |= {"dev": "validation", "eval": "validation", "test": "test"}
HELD_OUT_SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Source:
    """Rows, and what they are."""

    name: str  # of the rows in a message
    rows: Rows  # with the columns of the kind, and perhaps others
    # ``"run"`` for pieces of a text, ``"line"`` for its lines, ``"text"`` for documents, ``"prompt"`` for prompts
    # with completions, ``"chat"`` for conversations
    kind: str
    ignored: tuple[str, ...] = ()  # columns that are not used
    columns: tuple[str, ...] = ("text",)  # those that are used

    @property
    def streaming(self) -> bool:
        """Whether the rows are read one after the other, and their number is unknown."""
        return isinstance(self.rows, IterableDataset)


def open_source(
    data: str | os.PathLike[str],
    config: str | None = None,
    split: str = "train",
    *,
    streaming: bool = False,
    lines: bool = False,
) -> Source:
    """Rows to train or to evaluate on.

    Args:
        data: a file, a folder or the name of a data set on the Hub. A file is JSON (``.json``, ``.jsonl``), a table
            (``.parquet``, ``.csv``) or else plain text; JSON and text may be compressed (``.gz``). A folder is what
            ``save_to_disk`` wrote, or holds files of one kind; the names of the files or of their folders may tell the
            split (train, validation, test).
        config: of a data set on the Hub that has several.
        split: which part to read.
        streaming: read while training, for data larger than memory and disk.
        lines: the rows of a data set with ``text`` are consecutive lines, not documents.

    Raises:
        DataError: the data is not there, cannot be read or lacks the split, or its columns make no example.
    """
    path = Path(data)
    if config is not None and path.exists():
        raise DataError(f"{data} is a path, which has no configurations such as {config!r}; leave it out.")
    splits = _splits(path, str(data), config)
    if split not in splits:
        raise DataError(f"{data} has no split {split!r}{hint(split, splits)}; it has {shown(splits)}.")
    source = splits[split](streaming=streaming)
    if lines and source.kind == "text":
        return replace(source, kind="line")
    if lines and source.kind != "run":
        raise DataError(
            f"{data}: lines=True is for a column 'text', but these columns make examples of kind {source.kind}."
        )
    return source


def split_names(data: str | os.PathLike[str], config: str | None = None) -> list[str]:
    """Names of the splits that `open_source` would find; a file or a single saved data set has only ``train``."""
    return list(_splits(Path(data), str(data), config))


def held_out_split(data: str | os.PathLike[str], config: str | None = None) -> str | None:
    """The split to evaluate on, if there is one: validation, else test."""
    names = split_names(data, config)
    return next((name for name in HELD_OUT_SPLITS if name in names), None)


def _splits(path: Path, name: str, config: str | None) -> dict[str, Callable[..., Source]]:
    """What opens each split, by the split's name."""
    if path.is_file():
        return {"train": partial(_from_files, [path], name)}
    if any(
        (path / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")
    ):  # `save_to_disk` writes them
        saved = _attempt(partial(datasets.load_from_disk, str(path)), name)
        found = saved if isinstance(saved, DatasetDict) else {"train": saved}
        return {split: partial(_from_saved, rows, name) for split, rows in found.items()}
    if path.is_dir():
        return {split: partial(_from_files, files, name) for split, files in _files_by_split(path).items()}
    names = _attempt(partial(datasets.get_dataset_split_names, name, config), name)
    return {split: partial(_from_hub, name, config, split) for split in names}


def _from_saved(rows: Dataset, name: str, *, streaming: bool) -> Source:
    return _from_rows(rows.to_iterable_dataset() if streaming else rows, name)


def _from_hub(name: str, config: str | None, split: str, *, streaming: bool) -> Source:
    load = partial(datasets.load_dataset, name, config, split=split, streaming=streaming)
    return _from_rows(_attempt(load, name), name)


def _from_files(paths: list[Path], name: str, *, streaming: bool) -> Source:
    kinds = {"JSON" if is_json(path) else TABLES.get(path.suffix.lower(), "text") for path in paths}
    if len(kinds) > 1:
        raise DataError(f"{name} holds files of more than one kind ({', '.join(sorted(kinds))}); give one kind.")
    for path in paths:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty; give a file with text in it.")
    kind = kinds.pop()
    if kind in TABLES.values():
        # In a csv, an empty or "NA" cell is text, not a missing value.
        options = {"keep_default_na": False} if kind == "csv" else {}
        files = [str(path) for path in paths]
        load = partial(datasets.load_dataset, kind, data_files=files, split="train", streaming=streaming, **options)
        return _from_rows(_attempt(load, name), name)
    files = [str(path.resolve()) for path in paths]
    stamps = tuple((path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    values: dict[str, Any] = {"files": files, "stamps": (VERSION, *stamps)}
    if kind == "text":
        return Source(name, _generated(text_runs, ("text",), values, name, streaming), "run")
    keys = columns_of(paths[0])
    row_kind = kind_of(keys, name)
    rows = _generated(json_rows, COLUMNS[row_kind], values | {"kind": row_kind}, name, streaming)
    return Source(name, rows, row_kind, _unused(keys, row_kind), COLUMNS[row_kind])


def _generated(
    generator: Callable[..., Any], columns: Iterable[str], values: dict[str, Any], name: str, streaming: bool
) -> Rows:
    features = Features({column: Value("string") for column in columns})
    if streaming:
        return IterableDataset.from_generator(generator, features=features, gen_kwargs=values)
    return _attempt(partial(Dataset.from_generator, generator, features=features, gen_kwargs=values), name)


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """Files in and under a folder by the split that their path names; not hidden ones, README or LICENSE."""
    splits: dict[str, list[Path]] = {}
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        parts = path.relative_to(folder).parts
        if any(part.startswith(".") for part in parts) or path.name.upper().startswith(("README", "LICENSE")):
            continue
        words = [word for part in parts for word in re.split(r"[^a-z]+", part.lower())]
        named = next((SPLITS[word] for word in words if word in SPLITS), "")
        splits.setdefault(named, []).append(path)
    if not splits:
        raise DataError(f"{folder} holds no file to read; name a file, or a folder that has some.")
    if "" in splits and len(splits) > 1:
        raise DataError(
            f"{folder}: {splits[''][0].name} does not name its split, as other files there do; name one file or rename it."
        )
    return {name or "train": files for name, files in splits.items()}


def _from_rows(rows: Rows, name: str) -> Source:
    columns = rows.column_names or list(next(iter(rows), {}))
    if not columns or (isinstance(rows, Dataset) and len(rows) == 0):
        raise DataError(f"{name} is empty; give data with at least one row.")
    kind = kind_of(columns, name)
    return Source(name, rows, kind, _unused(columns, kind), used_columns(kind, columns))


def _unused(columns: Iterable[str], kind: str) -> tuple[str, ...]:
    columns = list(columns)
    return tuple(column for column in columns if column not in used_columns(kind, columns))


def _attempt(read: Callable[[], Any], name: str) -> Any:
    """Call what may fail in datasets, pyarrow, the Hub or the file system, with one message for all of them."""
    try:
        return read()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MinipeftError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        reason = told_error(error.__cause__ or error)
        advice = "no such file or folder; for the Hub, check the name, the configuration and the network"
        advice = "check what it holds" if Path(name).exists() else advice
        raise DataError(f"{name} cannot be read ({reason}); {advice}.") from None
