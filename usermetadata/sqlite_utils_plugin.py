"""The plugin of sqlite-utils: ``sqlite-utils usermetadata``, and the merge as an SQL function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlite_utils import hookimpl

from usermetadata._core.parsing import parse_json
from usermetadata.cli import main
from usermetadata.codec import encode_metadata
from usermetadata.merge import merge_metadata
from usermetadata.validation import copy_metadata

if TYPE_CHECKING:
    import sqlite3

    import click


@hookimpl
def register_commands(cli: click.Group) -> None:
    """Add the commands; ``--storage`` names the SQLite file."""
    cli.add_command(main, name="usermetadata")


@hookimpl
def prepare_connection(conn: sqlite3.Connection) -> None:
    """Add the SQL function ``merge_metadata(stored, update)`` to every connection."""
    conn.create_function("merge_metadata", 2, _merge, deterministic=True)


def _merge(stored: str | None, update: str) -> str:
    old: dict[str, Any] = {} if stored is None else parse_json(stored, "stored")
    checked = copy_metadata(parse_json(update, "update"), "update")
    return encode_metadata(merge_metadata(old, checked))
