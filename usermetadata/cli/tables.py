"""The command that makes the table before the first write: create-table."""

from __future__ import annotations

from contextlib import closing

import click

from usermetadata._core.urls import open_storage
from usermetadata.cli.group import storage_option
from usermetadata.exceptions import UsageError


@click.command("create-table")
@click.option("--distributed", is_flag=True, help="Let Citus distribute it over its servers.")
@storage_option
def create_table(url: str, *, distributed: bool) -> None:
    """Create the table; --distributed is for Citus.

    The first write also creates it. With --distributed, Citus keeps the rows on its workers, by
    user id. Existing rows are moved; writers wait until that is done.
    """
    with closing(open_storage(url)) as storage:
        if distributed:
            distribute = getattr(storage, "distribute", None)
            if distribute is None:
                raise UsageError(
                    f"--distributed: {type(storage).__name__} has one server; name a PostgreSQL"
                    " database with Citus"
                )
            for line in distribute():
                click.echo(line)
        else:
            storage.write([])
            click.echo(f"{storage!r}: the table exists")
