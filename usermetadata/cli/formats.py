"""The files that ``import`` reads: what ``export`` writes, and the exports of other products.

A format splits a file into records. Each record is parsed separately, so the records after an
invalid one can still be read. Only a JSON array is read into memory as a whole, as text.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar, cast

from usermetadata._core.parsing import parse_json
from usermetadata.cli.parsing import parse
from usermetadata.exceptions import InvalidInputError
from usermetadata.validation import check_user_id

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping

    from usermetadata.codec import Metadata

    Source = io.BufferedReader[io.RawIOBase] | gzip.GzipFile
    User = tuple[str, Metadata | None]

Value = TypeVar("Value")


class Record(NamedTuple):
    """One user of a file.

    Attributes:
        number: the line on which the record begins; in a JSON array, its place from 1 on.
        where: the place of the record, for error messages.
        read: returns the user id and the metadata; ``None`` if the user has no metadata in the
            file. It raises ``InvalidInputError`` if the record is not one of the format.
    """

    number: int
    where: str
    read: Callable[[], User]


@contextmanager
def unpacked(file: BinaryIO) -> Generator[Source, None, None]:
    """Yield the content of the file, which may be compressed with gzip; do not close the file."""
    source = io.BufferedReader(cast("io.RawIOBase", file))
    try:
        if source.peek(len(_GZIP)).startswith(_GZIP):
            with gzip.GzipFile(fileobj=source) as content:
                yield content
        else:
            yield source
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InvalidInputError(f"the file: damaged gzip: {error}; copy it again") from error
    finally:
        source.detach()


# The formats.


def usermetadata(source: Source) -> Iterator[Record]:
    """Read JSON Lines as ``export`` writes them."""

    def read(line: bytes, where: str) -> tuple[str, Metadata]:
        user = parse(line, where)
        if not isinstance(user, dict) or set(user) != {"userId", "metadata"}:
            raise InvalidInputError(
                f'{where}: is not {{"userId": "...", "metadata": {{...}}}}, as export writes it;'
                " --format names another product's format"
            )
        metadata = user["metadata"]
        if not isinstance(metadata, dict):
            raise InvalidInputError(
                f"{where}: metadata: it is not an object; write {{}} for a user without metadata"
            )
        return check_user_id(user["userId"], f"{where}: userId"), metadata

    return _records(_lines(source), read)


def auth0(source: Source) -> Iterator[Record]:
    """Read a users export of Auth0, in JSON Lines or CSV, or an array of its Management API."""

    def read(user: Metadata, where: str) -> User:
        user_id = user.get("user_id", user.get("Id"))
        return (
            check_user_id(user_id, f"{where}: user_id"),
            _by_kind(user, _AUTH0_KINDS, where),
        )

    def read_row(row: dict[str, str], where: str) -> User:
        user: Metadata = {}
        for column, text in row.items():
            root, *_ = path = column.split(".")
            if root in {"user_id", "Id", *_AUTH0_KINDS}:
                _put(user, path, _auth0_value(text, f"{where}: {column}"), f"{where}: {column}")
        return read(user, where)

    if _begins_with(source, b"["):
        return _records(_array(source), _of_json(read))
    if _begins_with(source, b"{"):
        return _records(_lines(source), _of_json(read))
    columns, rows = _table(source)
    _column(columns, "user_id", "Id")
    if not any(column.startswith(("user_metadata.", "app_metadata.")) for column in columns):
        raise InvalidInputError(
            "line 1: no column is a field of user_metadata or app_metadata; add each field to the"
            " export, or export JSON"
        )
    return _records(rows, _of_cells(columns, read_row))


def clerk(source: Source) -> Iterator[Record]:
    """Read the JSON array that Clerk's command line or its Backend API writes."""

    def read(user: Metadata, where: str) -> User:
        return check_user_id(user.get("id"), f"{where}: id"), _by_kind(user, _CLERK_KINDS, where)

    if not _begins_with(source, b"["):
        raise InvalidInputError(
            "the file: it is not a JSON array; the dashboard's CSV has no metadata, so export with"
            " clerk migrate export clerk"
        )
    return _records(_array(source), _of_json(read))


def firebase(source: Source) -> Iterator[Record]:
    """Read what ``firebase auth:export`` writes, JSON or CSV: the custom claims."""

    def read(user: Metadata, where: str) -> User:
        claims = user.get("customAttributes") or None
        if isinstance(claims, str):
            claims = parse(claims, f"{where}: customAttributes")
        return (
            check_user_id(user.get("localId"), f"{where}: localId"),
            _object_or_none(claims, f"{where}: customAttributes"),
        )

    def read_row(cells: list[str], where: str) -> User:
        # The CLI ends each row with a comma, and does not escape all quotes.
        if len(cells) not in {_FIREBASE_COLUMNS, _FIREBASE_COLUMNS + 1}:
            raise InvalidInputError(
                f"{where}: has {len(cells)} columns, not {_FIREBASE_COLUMNS}; export JSON"
            )
        return read({"localId": cells[0], "customAttributes": cells[_FIREBASE_COLUMNS - 1]}, where)

    if _begins_with(source, b"{["):
        return _records(_array(source), _of_json(read))
    return _records(_rows(source), read_row)


def supertokens(source: Source) -> Iterator[Record]:
    """Read the JSON of SuperTokens' bulk import, or the core's table ``user_metadata`` as CSV."""
    apps: dict[str, str] = {}

    def read(user: Metadata, where: str) -> User:
        user_id = user.get("externalUserId")
        if user_id is None:
            raise InvalidInputError(
                f"{where}: it has no externalUserId, so the core chooses the user id when it"
                " imports the user; import the core's table afterwards"
            )
        return (
            check_user_id(user_id, f"{where}: externalUserId"),
            _object_or_none(user.get("userMetadata"), f"{where}: userMetadata"),
        )

    def read_row(row: dict[str, str], where: str) -> User:
        if apps.setdefault("first", row.get("app_id", "")) != row.get("app_id", ""):
            raise InvalidInputError(
                f"{where}: app_id: it is not that of the rows before; export one app at a time"
            )
        name = f"{where}: user_metadata"
        return (
            check_user_id(row.get("user_id", ""), f"{where}: user_id"),
            _object_or_none(parse(row.get("user_metadata", "null"), name), name),
        )

    if _begins_with(source, b"{["):
        return _records(_array(source), _of_json(read))
    columns, rows = _table(source)
    _column(columns, "user_id")
    _column(columns, "user_metadata")
    return _records(rows, _of_cells(columns, read_row))


def csv_table(source: Source, json_columns: Iterable[str] = ()) -> Iterator[Record]:
    """Read CSV whose columns are properties.

    Args:
        source: the file; its first line names the columns.
        json_columns: the columns whose values are JSON; values of other columns are text.
    """
    columns, rows = _table(source)
    id_column = _column(columns, "user_id", "userId", "id")
    of_json = {_column(columns, name) for name in json_columns}

    def read(row: dict[str, str], where: str) -> User:
        metadata = {
            column: parse(text, f"{where}: {column}") if column in of_json else text
            for column, text in row.items()
            if column != id_column
        }
        return check_user_id(row.get(id_column, ""), f"{where}: {id_column}"), metadata or None

    return _records(rows, _of_cells(columns, read))


FORMATS: dict[str, Callable[[Source], Iterator[Record]]] = {
    "usermetadata": usermetadata,
    "auth0": auth0,
    "clerk": clerk,
    "firebase": firebase,
    "supertokens": supertokens,
    "csv": csv_table,
}


# Splitting a file. Each function yields the number, the place and the content of each record.


def _records(
    split: Iterable[tuple[int, str, Value]],
    read: Callable[[Value, str], User],
) -> Iterator[Record]:
    return (Record(number, where, partial(read, value, where)) for number, where, value in split)


def _lines(source: Source) -> Iterator[tuple[int, str, bytes]]:
    for number, line in enumerate(source, 1):
        if line.strip():
            yield number, f"line {number}", line


def _array(source: Source) -> Iterator[tuple[int, str, bytes]]:
    """Split a JSON array of users, or an object that has only ``users``, or several of them."""
    text = source.read().decode("utf-8-sig", "surrogateescape")
    number = place = 0
    while opening := _OPENING.match(text, place):
        place = opening.end()
        while (gap := _GAP.match(text, place)) and not text.startswith("]", gap.end()):
            number += 1
            try:
                _, place = _decoder.raw_decode(text, gap.end())
            except json.JSONDecodeError as error:
                raise InvalidInputError(
                    f"user {number}: it is not JSON: {error.msg} at character {error.pos + 1} of"
                    " the file"
                ) from error
            except RecursionError as error:
                raise InvalidInputError(f"user {number}: {error}") from error
            user = text[gap.end() : place]
            yield number, f"user {number}", user.encode("utf-8", "surrogateescape")
        place = text.index("]", place) + 1
    if text[place:].strip(_BLANKS_AND_BRACE):
        raise InvalidInputError(
            f'the file: expected a JSON array of users, or {{"users": [...]}}, at character'
            f" {place + 1}; check --format"
        )


def _text_lines(source: Source) -> Iterator[str]:
    for number, line in enumerate(source):
        yield line.decode("utf-8" if number else "utf-8-sig", "surrogateescape")


def _rows(source: Source) -> Iterator[tuple[int, str, list[str]]]:
    """Split CSV into rows of cells."""
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(_text_lines(source))
    while True:
        number = reader.line_num + 1
        where = f"line {number}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InvalidInputError(f"{where}: it is not CSV: {error}") from error
        if cells:
            yield number, where, cells


def _table(
    source: Source,
) -> tuple[list[str], Iterator[tuple[int, str, list[str]]]]:
    """Split CSV into the columns, which its first line names, and the rows after it."""
    rows = _rows(source)
    _, where, columns = next(rows, (1, "line 1", []))
    _check_utf8(columns, where)
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if twice is not None:
        raise InvalidInputError(f"{where}: two columns are named {twice!r}; rename one")
    return columns, rows


# Finding the user id and the metadata. Each function returns one that reads a record's content.


def _of_json(
    read: Callable[[Metadata, str], User],
) -> Callable[[bytes, str], User]:
    """Take the JSON text of an object."""

    def read_json(text: bytes, where: str) -> User:
        user = parse(text, where)
        if not isinstance(user, dict):
            raise InvalidInputError(f"{where}: it is not an object; check --format")
        return read(user, where)

    return read_json


def _of_cells(
    columns: list[str], read: Callable[[dict[str, str], str], User]
) -> Callable[[list[str], str], User]:
    """Take the cells of a row; empty ones are left out."""

    def read_cells(cells: list[str], where: str) -> User:
        if len(cells) != len(columns):
            raise InvalidInputError(
                f"{where}: it has {len(cells)} values for {len(columns)} columns; put quotes"
                " around values that hold commas"
            )
        _check_utf8(cells, where)
        return read({name: cell for name, cell in zip(columns, cells, strict=True) if cell}, where)

    return read_cells


# Smaller parts.


def _begins_with(source: Source, characters: bytes) -> bool:
    start = source.peek(_START).removeprefix(codecs.BOM_UTF8).lstrip()
    return start[:1] != b"" and start[:1] in characters


def _check_utf8(cells: list[str], where: str) -> None:
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        raise InvalidInputError(f"{where}: it is not UTF-8; save the file as UTF-8") from None


def _column(columns: list[str], *names: str) -> str:
    """Return the first of the names that is a column."""
    for name in names:
        if name in columns:
            return name
    raise InvalidInputError(
        f"line 1: no column is named {' or '.join(names)}; name the columns there, separated by"
        " commas"
    )


def _object_or_none(value: object, name: str) -> Metadata | None:
    """Return an object, ``None`` if there is none or it is empty."""
    if value is not None and not isinstance(value, dict):
        raise InvalidInputError(f"{name}: it is not an object")
    return value or None


def _by_kind(user: Metadata, kinds: Mapping[str, Iterable[str]], where: str) -> Metadata | None:
    """Return the user's kinds of metadata, each as a property.

    Args:
        user: the user as the product exports it.
        kinds: the names of the properties, and for each the names that the product may use.
        where: where the user is, for error messages.
    """
    found: Metadata = {}
    for kind, names in kinds.items():
        for name in names:
            metadata = _object_or_none(user.get(name), f"{where}: {name}")
            if metadata is not None:
                found[kind] = metadata
    return found or None


def _auth0_value(text: str, name: str) -> Any:
    """Return the value of a cell: Auth0 writes an apostrophe before each string."""
    if text.startswith("'"):
        return text[1:]
    try:
        return parse_json(text, name)
    except InvalidInputError:
        raise
    except (ValueError, RecursionError):
        return text  # a date


def _put(user: Metadata, path: list[str], value: object, name: str) -> None:
    """Set a nested property."""
    *parents, last = path
    for parent in parents:
        user = user.setdefault(parent, {})
        if not isinstance(user, dict):
            raise InvalidInputError(f"{name}: another column holds {parent!r} as a whole")
    user[last] = value


_GZIP = b"\x1f\x8b"
_START = 1024
_LONGEST_CELL = 2**31 - 1  # the most that every platform accepts; by default it is 128 KiB
_AUTH0_KINDS = {kind: (kind,) for kind in ("user_metadata", "app_metadata")}
# Clerk's SDK for JavaScript has names in camel case.
_CLERK_KINDS = {
    f"{kind}_metadata": (f"{kind}_metadata", f"{kind}Metadata")
    for kind in ("public", "private", "unsafe")
}
_FIREBASE_COLUMNS = 28
_BLANKS_AND_BRACE = " \t\r\n}"
_OPENING = re.compile(r'[\s}]*(?:\{\s*"users"\s*:\s*)?\[')
_GAP = re.compile(r"[\s,]*")
# It only finds the end of each user, so it does not convert numbers.
_decoder = json.JSONDecoder(parse_int=str, parse_float=str)
