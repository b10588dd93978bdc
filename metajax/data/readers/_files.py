"""Reads rows of labelled text from untrusted files."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

MAX_BYTES = 2**30  # of one file, unpacked
_PARTS = ("train", "val", "test")


class Row(NamedTuple):
    """One labelled text.

    Attributes:
      text: the text in the file.
      label: the label in the file, "" if no column of labels is requested.
      where: the place of the row, for error messages.
      domain: the domain in the file, "" if no column of domains is requested.
    """

    text: str
    label: str
    where: str
    domain: str = ""


# (content, file, columns by argument, parts) -> the place of each row and its values, in the order of the columns
_Reader = Callable[[str, str, Mapping[str, str], Sequence[str] | None], Iterator[tuple[str, list[Any]]]]


def regular_file(argument: str, path: Any) -> pathlib.Path:
    """Returns the path of an existing file.

    Raises:
      ValueError: `path` is not a path, does not exist, or is not a regular file (but a folder, a pipe, a device).

    >>> regular_file("files", "no/such/file.tsv")
    Traceback (most recent call last):
      ...
    ValueError: files must name regular files, got 'no/such/file.tsv', which does not exist
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"{argument} must name regular files, got {path!r}")
    if not os.path.isfile(path):
        what = "is not one" if os.path.lexists(path) else "does not exist"
        raise ValueError(f"{argument} must name regular files, got {os.fspath(path)!r}, which {what}")
    return pathlib.Path(path)


def text_files(files: Any) -> tuple[pathlib.Path, ...]:
    """Returns the paths of one or several files that `read_rows` can read.

    Raises:
      ValueError: there are no files, or a file does not exist, is listed twice or has another extension.
    """
    listed = files if isinstance(files, Sequence) and not isinstance(files, str) else [files]
    paths = tuple(regular_file("files", path) for path in listed)
    if not paths:
        raise ValueError(f"files must name one file at least, got {files!r}")
    seen = set()
    for path in paths:
        if _kind(path) not in _READERS:
            raise ValueError(f"files must end in {', '.join(_READERS)} (or in these and .gz), got {str(path)!r}")
        if path.resolve() in seen:  # the same text could be in both support and query
            raise ValueError(f"files names {str(path)!r} twice")
        seen.add(path.resolve())
    return paths


def read_rows(paths: Sequence[pathlib.Path], columns: Mapping[str, str], parts: Sequence[str] | None) -> list[Row]:
    """Reads labelled texts.

    Args:
      paths: the paths that `text_files` returns.
      columns: names of columns by the argument that sets them: "text", and optionally "label" and "domain".
      parts: keys of the .json files, or None for "train", "val" and "test".

    Raises:
      ValueError: a file is too large, not UTF-8, damaged or has no rows; columns or parts are missing; a row has
        another number of fields than the header, is not a JSON object, or has an empty text, label or domain.
    """
    _check_parts(parts, paths)
    rows: list[Row] = []
    for path in paths:
        before = len(rows)
        for where, values in _READERS[_kind(path)](read_content(path), repr(str(path)), columns, parts):
            found = zip(columns.items(), values, strict=True)
            checked = {argument: _value(where, argument, column, value) for (argument, column), value in found}
            rows.append(Row(where=where, **{"label": "", **checked}))
        if len(rows) == before:
            raise ValueError(f"{str(path)!r} has no rows")
    return rows


def parts_of(path: pathlib.Path) -> tuple[str, ...]:
    """Returns the keys of a .json file whose values are non-empty lists; () for a file of another kind.

    Raises:
      ValueError: as for `read_content`, or the file is not a JSON object.
    """
    if _kind(path) != ".json":
        return ()
    found = _object(read_content(path), repr(str(path)))
    return tuple(part for part, rows in found.items() if isinstance(rows, list) and rows)


def has_column(path: pathlib.Path, column: str) -> bool:
    """Returns whether a file has a column of this name, in the header of a table or in any line of .jsonl.

    For a .json file of lists the result is True: every text has a label, and columns have no names.

    Raises:
      ValueError: as for `read_content`, or a line is damaged.
    """
    content, kind, file = read_content(path), _kind(path), repr(str(path))
    if kind == ".jsonl":
        return any(column in row for _, row in json_lines(content, file))
    if kind == ".json":
        return True
    _, header = next(_records(content, file) if kind == ".csv" else _fields(content), (1, []))
    return column in header


def read_content(path: pathlib.Path) -> str:
    """Reads a text file.

    Raises:
      ValueError: the file is too large, not UTF-8 or damaged.
    """
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error})") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"{str(path)!r} has more than {MAX_BYTES} bytes, unpacked, which is the limit")
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line} of {str(path)!r} is not UTF-8 ({error.reason})") from error


def read_json(path: pathlib.Path) -> Any:
    """Reads a JSON file.

    Raises:
      ValueError: the file is too large, not UTF-8, damaged or not JSON.
    """
    return _json(read_content(path), repr(str(path)))


def json_lines(content: str, file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the place of each line and its JSON object.

    Raises:
      ValueError: a line is not a JSON object.

    >>> list(json_lines('{"a": 1}', "'x.jsonl'"))
    [("line 1 of 'x.jsonl'", {'a': 1})]
    """
    for number, line in _lines(content):
        where = f"line {number} of {file}"
        record = _json(line, where)
        if not isinstance(record, dict):
            raise ValueError(f"{where} must be a JSON object, got a {type(record).__name__}")
        yield where, record


def a_text(where: str, value: Any, what: str) -> str:
    """Returns `value` if it is a non-empty text.

    Raises:
      ValueError: `value` is not a non-empty text; the message states its place and what it should be.

    >>> a_text("line 1", "hello", "question")
    'hello'
    """
    if not isinstance(value, str):
        raise ValueError(f"{where} must hold a text as {what}, got a {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{where} has an empty {what}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can contain half of a character
        raise ValueError(f"{where} has a {what} that is not Unicode ({error.reason})") from error
    return value


def _kind(path: pathlib.Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return os.path.splitext(name)[1]


def _check_parts(parts: Any, paths: Sequence[pathlib.Path]) -> None:
    if parts is None:
        return
    if isinstance(parts, str) or not parts or len(set(parts)) < len(parts):
        raise ValueError(f"parts must be a list of different keys, got {parts!r}")
    other = [path for path in paths if _kind(path) != ".json"]
    if other:
        raise ValueError(f"parts must be None for {str(other[0])!r}, since only .json files have parts, got {parts!r}")


def _lines(content: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(content.split("\n"), 1):  # splitlines would also split at U+2028 and others
        if line not in ("", "\r"):
            yield number, line.removesuffix("\r")


def _tsv(content: str, file: str, columns: Mapping[str, str], parts: object) -> Iterator[tuple[str, list[Any]]]:
    return _table(_fields(content), file, columns)


def _csv(content: str, file: str, columns: Mapping[str, str], parts: object) -> Iterator[tuple[str, list[Any]]]:
    return _table(_records(content, file), file, columns)


def _fields(content: str) -> Iterator[tuple[int, list[str]]]:
    return ((number, line.split("\t")) for number, line in _lines(content))


def _records(content: str, file: str) -> Iterator[tuple[int, list[str]]]:
    reader, number = csv.reader(io.StringIO(content, newline=""), strict=True), 1
    try:
        for fields in reader:
            if fields:
                yield number, fields
            number = reader.line_num + 1
    except csv.Error as error:
        if "field limit" in str(error):
            most = f"{csv.field_size_limit():,}"
            raise ValueError(f"line {number} of {file} must hold at most {most} characters in a field") from error
        raise ValueError(f"line {number} of {file} is no CSV as in RFC 4180 ({error})") from error


def _table(
    records: Iterator[tuple[int, list[str]]], file: str, columns: Mapping[str, str]
) -> Iterator[tuple[str, list[Any]]]:
    """Yields the rows below a header; each record comes with the number of its first line."""
    _, header = next(records, (1, []))
    for argument, column in columns.items():
        if header.count(column) != 1:
            times = "twice" if column in header else "not"
            raise ValueError(f"{argument} is {column!r}, which is {times} among the columns of {file}, {header}")
    places = [header.index(column) for column in columns.values()]
    for number, fields in records:
        if len(fields) != len(header):
            raise ValueError(f"line {number} of {file} has {len(fields)} fields, where the header has {len(header)}")
        yield f"line {number} of {file}", [fields[place] for place in places]


def _jsonl(content: str, file: str, columns: Mapping[str, str], parts: object) -> Iterator[tuple[str, list[Any]]]:
    for where, record in json_lines(content, file):
        for argument, column in columns.items():
            if column not in record:
                raise ValueError(f"{argument} is {column!r}, which is not among the keys of {where}, {list(record)}")
        yield where, [record[column] for column in columns.values()]


def _lists(
    content: str, file: str, columns: Mapping[str, str], parts: Sequence[str] | None
) -> Iterator[tuple[str, list[Any]]]:
    """Yields the rows of a file in the form of CLINC150: an object of lists of `[text, label]`."""
    if "domain" in columns:
        raise ValueError(
            f"domain must map domains to labels for {file}, whose rows have no columns, got {columns['domain']!r}"
        )
    whole = _object(content, file)
    chosen = [part for part in _PARTS if part in whole] if parts is None else parts
    missing = [part for part in chosen if part not in whole]
    if missing or not chosen:
        asked = "None" if parts is None else repr(missing[0])
        raise ValueError(f"parts is {asked}, but {file} has only {list(whole)}")
    for part in chosen:
        if not isinstance(whole[part], list):
            raise ValueError(f"part {part!r} of {file} must be a list, got a {type(whole[part]).__name__}")
        for number, entry in enumerate(whole[part], 1):
            where = f"row {number} of part {part!r} of {file}"
            if not isinstance(entry, list) or len(entry) != 2:
                raise ValueError(f"{where} must be [text, label]")
            yield where, entry


def _object(content: str, file: str) -> dict[str, Any]:
    whole = _json(content, file)
    if not isinstance(whole, dict):
        raise ValueError(f"{file} must be a JSON object of lists, got a {type(whole).__name__}")
    return whole


def _json(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error})") from error


def _value(where: str, argument: str, name: str, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and argument != "text":
        value = str(value)
    return a_text(where, value, f"{argument} ({name!r})")


_READERS: dict[str, _Reader] = {".jsonl": _jsonl, ".csv": _csv, ".tsv": _tsv, ".json": _lists}
