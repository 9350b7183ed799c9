"""Files to rows: plain text in runs of whole lines, JSON object by object; gzip is unpacked on the way."""

from __future__ import annotations

import contextlib
import gzip
import json
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

from minipeft.errors import DataError, told_error
from minipeft.training.data.rows import check_row, kind_of

VERSION = 2  # of the readers; cached rows of another version are not used
RUN_CHARACTERS = 1 << 16  # long, so few runs end inside a paragraph; short, so many fit in memory
JSON_SUFFIXES = {".json", ".jsonl", ".ndjson"}


def is_json(path: Path) -> bool:
    """Whether the name says JSON, compressed or not."""
    return Path(path.name.removesuffix(".gz")).suffix.lower() in JSON_SUFFIXES


def text_runs(files: list[str], stamps: tuple[object, ...]) -> Iterator[dict[str, str]]:
    r"""The text of the files in runs of about `RUN_CHARACTERS`, each ending with a line.

    Joined, the runs of a file are the file, with ``\n`` for any kind of line end, and one at its end. `stamps` only make the
    cache of datasets notice that a file has changed.

    Raises:
        DataError: a file cannot be read or is not UTF-8.
    """
    for file in files:
        with _opened(Path(file)) as stream:
            run = ""
            for piece in iter(partial(stream.readline, RUN_CHARACTERS), ""):
                # Cut an endless line rather than hold it in memory.
                if len(run) >= RUN_CHARACTERS and (run.endswith("\n") or len(run) >= 2 * RUN_CHARACTERS):
                    yield {"text": run}
                    run = ""
                run += piece
            if run:
                yield {"text": run if run.endswith("\n") else run + "\n"}


def json_rows(files: list[str], stamps: tuple[object, ...], kind: str) -> Iterator[dict[str, str]]:
    """The rows of JSON files, checked: one object per line, or one list of objects, which is read as a whole.

    Raises:
        DataError: a file cannot be read, or a row is not JSON or not of this kind; the message names the line.
    """
    for file in files:
        for where, row in _objects(Path(file)):
            yield check_row(kind, row, where)


def columns_of(path: Path) -> list[str]:
    """The keys of the first row of a JSON file."""
    where, row = next(_objects(path), (str(path), None))
    if not isinstance(row, dict):
        raise DataError(f'{where} holds no row; each must be a JSON object such as {{"text": "..."}}.')
    kind_of(row, where)
    return list(row)


def _objects(path: Path) -> Iterator[tuple[str, object]]:
    with _opened(path) as stream:
        start = stream.readline()
        while start.isspace():
            start = stream.readline()
        stream.seek(0)
        if start.lstrip().startswith("["):
            rows = _parsed(stream.read(), str(path))
            for number, row in enumerate(rows if isinstance(rows, list) else []):
                yield f"{path}, row {number}", row
        else:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield f"{path}, line {number}", _parsed(line, f"{path}, line {number}")


def _parsed(text: str, where: str) -> object:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); each line must be one object, or the file one list.") from None
    return value


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig") as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}); convert it.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({told_error(error)}).") from None
