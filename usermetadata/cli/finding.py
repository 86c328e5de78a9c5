"""The commands that find users, and that build indexes: list, count, find, index."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from usermetadata._core.urls import open_storage
from usermetadata.cli.group import check_exists, functions_of, storage_option, with_storage
from usermetadata.cli.parsing import parse_where
from usermetadata.codec import encode_metadata
from usermetadata.exceptions import UsageError
from usermetadata.indexes import Index
from usermetadata.storage import IndexedStorage

if TYPE_CHECKING:
    from usermetadata.storage import Storage

_PAGE = 1000  # users that are read together

_where = partial(
    click.option,
    "--where",
    "pairs",
    multiple=True,
    metavar="NAME=VALUE",
    help="A property and its value, as JSON or as a text. May be repeated.",
)


@click.command("list")
@_where()
@click.option("--limit", type=click.IntRange(1), help="The largest number of users to show.")
@click.option("--after", default="", help="Skip the users up to this user id.")
@partial(with_storage, must_exist=True, indexed=True)
def list_(storage: Storage, pairs: tuple[str, ...], limit: int | None, after: str) -> None:
    """Show users as JSON Lines: all, or those with given values.

    The format is that of export. At least one property of --where must have an index. Users are
    read a thousand at a time, each thousand in one consistent snapshot.
    """
    functions, where = functions_of(storage), _parsed(storage, pairs)
    left = limit
    while left is None or left > 0:
        size = _PAGE if left is None else min(left, _PAGE)
        page = functions.list_user_metadata(where, after, size, {})
        for user_id, found in page.items():
            click.echo(encode_metadata({"userId": user_id, "metadata": found.metadata}))
        if len(page) < size:
            break
        after = next(reversed(page))
        left = None if left is None else left - size


@click.command()
@_where()
@partial(with_storage, must_exist=True, indexed=True)
def count(storage: Storage, pairs: tuple[str, ...]) -> None:
    """Show the number of all users, or of those with given values."""
    click.echo(functions_of(storage).count_user_metadata(_parsed(storage, pairs), {}))


@click.command()
@_where(required=True)
@partial(with_storage, must_exist=True, indexed=True)
def find(storage: Storage, pairs: tuple[str, ...]) -> None:
    """Show the user who has a given value of a unique index."""
    where = _parsed(storage, pairs, unique=True)
    user_id = functions_of(storage).find_user_id(where or {}, {})
    if user_id is None:
        raise click.ClickException("no user has these values")
    click.echo(user_id)


@click.command()
@click.option("--index", "names", multiple=True, metavar="NAME", help="Build this index.")
@click.option("--unique", "unique", multiple=True, metavar="NAME", help="Build this unique index.")
@click.option("--drop", "dropped", multiple=True, metavar="NAME", help="Remove this index.")
@storage_option
def index(
    url: str, names: tuple[str, ...], unique: tuple[str, ...], dropped: tuple[str, ...]
) -> None:
    """Show the indexes; build some, or remove some.

    Programs may continue to write meanwhile. If values cannot be indexed or are not unique, their
    users are named, nothing is built, and the exit code is 1.
    """
    check_exists(url)
    wanted = [*(Index(name) for name in names), *(Index(name, unique=True) for name in unique)]
    with closing(open_storage(url, wanted)) as storage:
        if not isinstance(storage, IndexedStorage):
            raise UsageError(f"--storage: {type(storage).__name__} has no indexes")
        for name in dropped:
            storage.drop_index(name)
        hidden = not wanted or not sys.stderr.isatty()
        with click.progressbar(length=1, label="Indexing", file=sys.stderr, hidden=hidden) as bar:

            def show(done: int, of: int) -> None:
                bar.length = of
                bar.update(done - bar.pos)

            faults = storage.build_indexes(show) if wanted else []
        for fault in faults:
            click.echo(fault, err=True)
        if faults:
            raise click.ClickException(f"rows in the way: {len(faults)}; nothing was built")
        for each in storage.stored_indexes():
            click.echo(json.dumps({"name": each.name, "unique": each.unique}))


def _parsed(
    storage: Storage, pairs: tuple[str, ...], *, unique: bool = False
) -> dict[str, Any] | None:
    """Return the properties of --where; ``None`` without one.

    Raises:
        UsageError: none of them has an index, or a unique one where that is needed; the message
            names the command that builds it.
    """
    where = parse_where(pairs)
    indexes = storage.indexes if isinstance(storage, IndexedStorage) else ()
    usable = {index.name for index in indexes if index.unique or not unique}
    if where and usable.isdisjoint(where):
        kind, option = ("a unique index", "--unique") if unique else ("an index", "--index")
        name = shlex.quote(next(iter(where)))
        raise UsageError(
            f"--where: none of the properties has {kind}; build one, for example with"
            f" `python -m usermetadata index {option} {name}`"
        )
    return where
