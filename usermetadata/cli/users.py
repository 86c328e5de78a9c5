"""The commands for one user: get, set, update, clear, erase."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

import click

from usermetadata.cli.group import UserCommand, functions_of, with_storage
from usermetadata.cli.parsing import argument_or_input, parse
from usermetadata.codec import encode_metadata

if TYPE_CHECKING:
    from usermetadata.codec import Metadata
    from usermetadata.storage import Storage


@click.command(cls=UserCommand)
@click.argument("user_id")
@partial(with_storage, must_exist=True)
def get(storage: Storage, user_id: str) -> None:
    """Show the metadata of USER_ID, {} if there is none."""
    _show(functions_of(storage).get_user_metadata(user_id, {}).metadata)


@click.command("set", cls=UserCommand)
@click.argument("user_id")
@click.argument("metadata", required=False)
@partial(with_storage, indexed=True)
def set_(storage: Storage, user_id: str, metadata: str | None) -> None:
    """Replace the metadata of USER_ID, and show it.

    METADATA is a JSON object.
    """
    parsed = parse(argument_or_input(metadata), "metadata")
    _show(functions_of(storage).set_user_metadata(user_id, parsed, {}).metadata)


@click.command(cls=UserCommand)
@click.argument("user_id")
@click.argument("update", required=False)
@partial(with_storage, indexed=True)
def update(storage: Storage, user_id: str, update: str | None) -> None:
    """Merge UPDATE into the metadata of USER_ID, and show it.

    UPDATE is a JSON object. Root-level properties are overwritten; those that are null are removed.
    """
    parsed = parse(argument_or_input(update), "metadata_update")
    _show(functions_of(storage).update_user_metadata(user_id, parsed, {}).metadata)


@click.command(cls=UserCommand)
@click.argument("user_id")
@with_storage
def clear(storage: Storage, user_id: str) -> None:
    """Remove all metadata of USER_ID."""
    functions_of(storage).clear_user_metadata(user_id, {})


@click.command(cls=UserCommand)
@click.argument("user_id")
@click.option("--all-apps", is_flag=True, help="Erase the user in all apps of the storage.")
@partial(with_storage, must_exist=True)
def erase(storage: Storage, user_id: str, *, all_apps: bool) -> None:
    """Remove all metadata of USER_ID, and show what it was.

    It is shown by app.
    """
    _show(functions_of(storage).erase_user(user_id, all_apps, {}).by_app)


def _show(metadata: Metadata) -> None:
    # A row of another program may hold a lone surrogate, which only an escape can express.
    is_ascii = encode_metadata(metadata).isascii()
    click.echo(json.dumps(metadata, ensure_ascii=is_ascii, indent=2))
