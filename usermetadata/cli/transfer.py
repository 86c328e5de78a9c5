"""The commands for all users: export, import, import-supertokens."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from contextlib import closing, contextmanager, suppress
from functools import partial
from itertools import islice
from typing import IO, TYPE_CHECKING, BinaryIO, TypeVar

import click

from usermetadata.changes import Merge, Replace
from usermetadata.cli.formats import FORMATS, csv_table, unpacked
from usermetadata.cli.group import counted, with_storage
from usermetadata.cli.parsing import as_it_is
from usermetadata.codec import encode_metadata
from usermetadata.exceptions import (
    DamagedMetadataError,
    InvalidInputError,
    NotUniqueError,
    StorageError,
    UsageError,
)
from usermetadata.indexes import values_of
from usermetadata.storage import IndexedStorage, ListingStorage
from usermetadata.validation import check_after, check_user_id, copy_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized

    from usermetadata.cli.formats import Record
    from usermetadata.codec import Metadata
    from usermetadata.indexes import Index
    from usermetadata.storage import Storage

Batch = TypeVar("Batch", bound="Sized")

_BATCH = 1000  # users that are read, or written, together

_skip_damaged = click.option(
    "--skip-damaged",
    is_flag=True,
    help="Name and leave out rows that cannot be read; then the exit code is 3.",
)


class _SkippedError(click.ClickException):
    exit_code = 3


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True), default="-")
@_skip_damaged
@partial(with_storage, must_exist=True)
def export(storage: Storage, file: str, *, skip_damaged: bool) -> None:
    """Write all users as JSON Lines to FILE, or to standard output.

    Each line is {"userId": "...", "metadata": {...}}. Users are read a thousand at a time, each
    thousand in one consistent snapshot. FILE is replaced when all users are written; an error
    leaves it as it was.
    """
    with _reported(skip=skip_damaged) as report, _replaced_at_the_end(file) as output:
        is_shown = output is sys.stdout and sys.stdout.isatty()
        for batch in _watched(_users(storage, "", report), "Exporting", hidden=is_shown):
            for user_id, metadata in batch.items():
                output.write(encode_metadata({"userId": user_id, "metadata": metadata}) + "\n")
        output.flush()


@click.command("import")
@click.argument("file", type=click.File("rb"), default="-")
@click.option(
    "--format",
    "format_",
    type=click.Choice(list(FORMATS)),
    default="usermetadata",
    show_default=True,
    help="The product that exported it; usermetadata is the format of export.",
)
@click.option("--merge", is_flag=True, help="Merge, as update does, instead of replacing.")
@click.option("--skip-invalid", is_flag=True, help="Name invalid lines, and leave them out.")
@click.option(
    "--json",
    "json_columns",
    multiple=True,
    metavar="COLUMN",
    help="A column of --format csv whose values are JSON, not text. May be repeated.",
)
@click.option(
    "--from-line",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Skip the lines before this one; in a JSON array, the users before it.",
)
@partial(with_storage, indexed=True)
def import_(  # noqa: PLR0913 - they are options
    storage: Storage,
    file: BinaryIO,
    *,
    format_: str,
    merge: bool,
    skip_invalid: bool,
    json_columns: tuple[str, ...],
    from_line: int,
) -> None:
    """Store all users of FILE, or of standard input.

    The file may be compressed with gzip. The metadata of existing users is replaced, so an import
    can be repeated. Users are stored a thousand at a time, all or none of them; after an error, the
    message says with which --from-line to continue. With --skip-invalid, invalid lines are left
    out; then the exit code is 3.
    """
    if json_columns and format_ != "csv":
        raise UsageError("--json: only the columns of --format csv are text; leave it out")
    read = partial(csv_table, json_columns=json_columns) if json_columns else FORMATS[format_]
    change = partial(_change, merge=merge, exact=format_ == "usermetadata")
    done, empty = from_line - 1, 0
    with (
        _reported(skip=True) as report,
        _resumable(lambda: f"--from-line {done + 1}" if done >= from_line else ""),
        unpacked(file) as source,
    ):
        records = (record for record in read(source) if record.number >= from_line)
        indexes = storage.indexes if isinstance(storage, IndexedStorage) else ()
        users = _changes(records, change, indexes, report if skip_invalid else None)
        for batch in _watched(iter(lambda: list(islice(users, _BATCH)), []), "Importing"):
            changes = [(user_id, each) for _, user_id, each in batch if each is not None]
            try:
                storage.write(changes)
            except NotUniqueError as error:
                place = _refused(storage, error, changes)
                places = [record.where for record, _, each in batch if each is not None]
                where = "" if place is None else f"{places[place]}: "
                raise InvalidInputError(f"{where}{error}") from error
            done = batch[-1][0].number
            empty += len(batch) - len(changes)
        if empty:
            click.echo(f"{counted(empty)} without metadata: nothing stored for them", err=True)


@click.command(short_help="Copy the users of a SuperTokens core.")
@click.argument("dsn")
@click.option("--table", default="user_metadata", show_default=True, help="The core's table.")
@click.option("--schema", help="Its schema, if not the first of the search path.")
@click.option("--core-app-id", default="public", show_default=True, help="The core's app.")
@click.option("--after", default="", help="Skip the users up to this user id.")
@_skip_damaged
@partial(with_storage, indexed=True)
def import_supertokens(  # noqa: PLR0913 - they are options
    storage: Storage,
    dsn: str,
    *,
    table: str,
    schema: str | None,
    core_app_id: str,
    after: str,
    skip_damaged: bool,
) -> None:
    """Copy the users of a SuperTokens core, whose PostgreSQL database is at DSN.

    Existing users are overwritten. The core may keep running, but changes to users that were
    already copied are not copied.
    """
    from usermetadata.storage.postgres import PostgresStorage

    after = check_after(after)
    with (
        closing(PostgresStorage(dsn, table=table, schema=schema, app_id=core_app_id)) as source,
        _reported(skip=skip_damaged) as report,
        _resumable(lambda: f"--after {shlex.quote(after)}" if after else ""),
    ):
        with suppress(DamagedMetadataError):  # the id belongs to a user of the file
            if not source.read_after("", 1):
                raise UsageError(
                    f"{source!r}: it has no table {table!r}, or no users in it; check --schema,"
                    " --table and --core-app-id"
                )
        for batch in _watched(_users(source, after, report), "Copying"):
            storage.write([(user_id, as_it_is(batch[user_id])) for user_id in batch])
            after = list(batch)[-1]


def _changes(
    records: Iterable[Record],
    change: Callable[[Metadata, str], Merge | Replace],
    indexes: Sequence[Index],
    report: Callable[[Exception], None] | None,
) -> Iterator[tuple[Record, str, Merge | Replace | None]]:
    """Read users; yield the record of each, the user id, and the change if there is metadata.

    Invalid records are reported and left out; without ``report`` their errors are raised.
    """
    for record in records:
        try:
            user_id, metadata = record.read()
            found = None if metadata is None else change(metadata, record.where)
            _check_values(metadata or {}, indexes, user_id, record.where)
        except InvalidInputError as error:
            if report is None:
                raise
            report(error)
        else:
            yield record, user_id, found


def _change(metadata: Metadata, where: str, *, merge: bool, exact: bool) -> Merge | Replace:
    if exact and not merge:
        return as_it_is(metadata)
    checked = copy_metadata(metadata, f"{where}: metadata")
    return Merge(checked) if merge else Replace(checked)


def _check_values(metadata: Metadata, indexes: Sequence[Index], user_id: str, where: str) -> None:
    try:
        values_of(metadata, indexes, user_id)
    except InvalidInputError as error:
        raise InvalidInputError(f"{where}: {error}") from error


def _refused(
    storage: Storage, error: NotUniqueError, changes: Sequence[tuple[str, Merge | Replace]]
) -> int | None:
    """Return the place of the change whose unique value belongs to another user."""
    name, owner = error.name, error.user_id
    values = {
        user_id: (
            (change.update if isinstance(change, Merge) else change.metadata).get(name),
            place,
        )
        for place, (user_id, change) in enumerate(changes)
    }
    taken: set[tuple[type, object]] = set()
    if owner is not None and owner not in values:
        value = storage.read([owner]).get(owner, {}).get(name)
        taken.add((type(value), value))
    for value, place in values.values():
        if isinstance(value, (str, int)):
            if (type(value), value) in taken:
                return place
            taken.add((type(value), value))
    return None


@contextmanager
def _replaced_at_the_end(file: str) -> Generator[IO[str], None, None]:
    """Open a temporary file beside ``file`` and rename it at the end, unless an error occurs."""
    if file == "-" or (os.path.exists(file) and not os.path.isfile(file)):
        # Standard output, a terminal or a pipe is written to directly.
        with click.open_file(file, "w", encoding="utf-8") as output:
            yield output
        return
    target = os.path.realpath(file)
    folder, name = os.path.split(target)
    handle, temporary = tempfile.mkstemp(prefix=f"{name}.", dir=folder)
    try:
        with open(handle, "w", encoding="utf-8") as output:
            if os.path.exists(target):
                os.chmod(temporary, os.stat(target).st_mode)
            yield output
            output.flush()
            os.fsync(output.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextmanager
def _reported(*, skip: bool) -> Generator[Callable[[Exception], None], None, None]:
    """Yield a function that shows or raises the error of a row that cannot be read.

    Raises:
        _SkippedError: at the end, if rows were left out.
    """
    count = 0

    def report(error: Exception) -> None:
        nonlocal count
        if not skip:
            raise StorageError(f"{error}; or leave it out with --skip-damaged") from error
        count += 1
        click.echo(str(error), err=True)

    yield report
    if count:
        raise _SkippedError(f"rows left out: {count}; all others are done")


def _users(
    storage: Storage, after: str, report: Callable[[Exception], None]
) -> Iterator[dict[str, Metadata]]:
    """Read all users after ``after`` in batches, in the storage's order.

    Rows that are damaged, or whose user id is not valid, are reported and left out.
    """
    if not isinstance(storage, ListingStorage):
        raise UsageError(
            f"{type(storage).__name__}: it cannot list its users; give it a method read_after"
        )
    limit = _BATCH
    while True:
        try:
            batch = storage.read_after(after, limit)
        except DamagedMetadataError as error:
            if limit > 1:  # smaller batches, up to the damaged row
                limit //= 2
                continue
            if error.user_id is None:
                raise
            report(error)
            after, limit = error.user_id, _BATCH
            continue
        if not batch:
            return
        after = list(batch)[-1]
        for user_id in list(batch):
            try:
                check_user_id(user_id, f"user {user_id!r}")
            except InvalidInputError as error:
                report(error)
                del batch[user_id]
        if batch:
            yield batch


def _watched(batches: Iterable[Batch], label: str, *, hidden: bool = False) -> Iterator[Batch]:
    """Show on a terminal the number of users that are done."""
    done = 0
    with click.progressbar(
        batches,
        label=label,
        file=sys.stderr,
        hidden=hidden or not sys.stderr.isatty(),
        item_show_func=lambda _: counted(done),
    ) as bar:
        for batch in bar:
            yield batch
            done += len(batch)
    click.echo(counted(done), err=True)


@contextmanager
def _resumable(how: Callable[[], str]) -> Generator[None, None, None]:
    try:
        yield
    except (StorageError, InvalidInputError, NotUniqueError, OSError, KeyboardInterrupt):
        if how():
            click.echo(f"Earlier users are stored. Go on with {how()} after this error:", err=True)
        raise
