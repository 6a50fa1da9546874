"""Raw rows from files and hub data sets, each with the place it came from.

JSON lines are read here and not through ``datasets``, whose errors do not name the
line. Places read ``file:line`` for JSON lines and ``file row N`` otherwise, N from 0.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from molora.errors import DataError
from molora.schema import nearest

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")

Placed = tuple[str, Any]


def is_local_file(source: str) -> bool:
    """Whether source names a local file, not a data set of the hub."""
    return Path(source).suffix.lower() in FILE_SUFFIXES


def read_raw(
    source: str, split: str, base_dir: str | Path | None, limit: int | None, task: str
) -> list[Placed]:
    """Read the rows of one source.

    Args:
        source: A .jsonl, .json or .parquet file, or a hub data set, ``name`` or
            ``name:config``.
        split: Split of a hub data set.
        base_dir: Folder that relative file paths start from; the working folder by
            default.
        limit: Read at most this many rows, from the first on.
        task: Name of the task, for messages.

    Returns:
        Pairs of place and raw row, in the order of the source.

    Raises:
        DataError: The source is missing, unreadable, malformed or empty.
    """
    if is_local_file(source):
        path = Path(base_dir or ".") / Path(source).expanduser()
        shown, rows = str(path), _read_file(path, task)
    else:
        shown, rows = repr(source), _read_hub(source, split, task)
    taken = list(itertools.islice(rows, limit))
    if not taken:
        raise DataError(f"task {task!r}: {shown} holds no rows")
    return taken


def _read_file(path: Path, task: str) -> Iterator[Placed]:
    if not path.is_file():
        raise DataError(f"task {task!r}: {_missing(path)}")
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path, task)
    return _read_json(path)


def _missing(path: Path) -> str:
    """Say that path is no file, and what stands near it."""
    if path.exists():
        return f"{path} is not a file"
    if not path.parent.is_dir():
        return f"no file {path}: the folder {path.parent} does not exist"
    names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    return f"no file {path}.{nearest(path.name, names)}"


def _read_json(path: Path) -> Iterator[Placed]:
    """A JSON array, or one JSON value a line (blank lines are passed over)."""
    with path.open("rb") as file:
        is_array = path.suffix.lower() == ".json" and _first_byte(file) == b"["
        file.seek(0)
        if is_array:
            array = _parse(_decode(file.read(), f"{path}"), f"{path}", 1)
            for index, raw in enumerate(array):
                yield f"{path} row {index}", raw
            return
        for number, line in enumerate(file, start=1):
            text = _decode(line, f"{path}:{number}").strip()
            if text:
                yield f"{path}:{number}", _parse(text, f"{path}", number)


def _first_byte(file: Iterable[bytes]) -> bytes:
    """First byte that is neither white space nor byte order mark; b"" if none."""
    for line in file:
        text = line.removeprefix(b"\xef\xbb\xbf").strip()
        if text:
            return text[:1]
    return b""


def _decode(line: bytes, where: str) -> str:
    try:
        # utf-8-sig: a byte order mark at the start of a file is no part of the text
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 (byte {error.start + 1}: {error.reason}); "
            "save the file as UTF-8"
        ) from None


def _parse(text: str, path: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{path}:{line}: invalid JSON, column {error.colno}: {error.msg}"
        ) from None


def _read_parquet(path: Path, task: str) -> Iterator[Placed]:
    # imported where used: datasets takes a second or more to import
    import datasets

    try:
        table = datasets.Dataset.from_parquet(str(path))
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        reason = error.__cause__ or error
        raise DataError(
            f"task {task!r}: {path} is not readable as Parquet: {reason}"
        ) from error
    return ((f"{path} row {index}", raw) for index, raw in enumerate(table))


def _read_hub(source: str, split: str, task: str) -> Iterator[Placed]:
    # imported where used: datasets takes a second or more to import
    import datasets

    name, _, config = source.partition(":")
    try:
        table = datasets.load_dataset(name, config or None, split=split)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise DataError(
            f"task {task!r}: cannot load data set {source!r}, split {split!r}: {error} "
            f"(local files end in {', '.join(FILE_SUFFIXES)})"
        ) from error
    place = f"task {task!r}, data set {source!r}, split {split!r}"
    return ((f"{place}, row {index}", raw) for index, raw in enumerate(table))
