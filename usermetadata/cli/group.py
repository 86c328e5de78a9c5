"""The group of commands, and the options that say which storage a command uses."""

from __future__ import annotations

import errno
import functools
import io
import os
import sys
from contextlib import closing
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import click

from usermetadata._core.blocking_functions import BlockingFunctions
from usermetadata._core.runners import BlockingRunner
from usermetadata._core.urls import DEFAULT_URL, open_storage, path_of
from usermetadata.exceptions import (
    InvalidInputError,
    NotUniqueError,
    StorageError,
    UsageError,
)
from usermetadata.storage import IndexedStorage

if TYPE_CHECKING:
    from collections.abc import Callable

    from usermetadata.storage import Storage


class _Group(click.Group):
    """Shows the library's errors as click shows its own: one line, and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Show the commands in the order in which users need them, not sorted by name."""
        return list(self.commands)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show two commands to begin with, formatted for copying."""
        formatter.write_paragraph()
        formatter.write_text("To begin, store something about a user, and read it:")
        with formatter.indentation():
            for arguments in ('update alice \'{"theme": "dark"}\'', "get alice"):
                formatter.write_text(f"{ctx.command_path} {arguments}")

    def invoke(self, ctx: click.Context) -> Any:
        _check_streams()
        try:
            return super().invoke(ctx)
        except (InvalidInputError, NotUniqueError) as error:
            raise click.UsageError(str(error)) from error
        except MemoryError as error:
            raise click.UsageError("the input does not fit in memory; split it") from error
        except (StorageError, UsageError, ImportError) as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # click handles it
                raise
            if error.errno == errno.EBADF or isinstance(error, io.UnsupportedOperation):
                raise click.UsageError(
                    "standard input or output: it is closed; pass a file"
                ) from error
            raise click.ClickException(str(error)) from error


def _check_streams() -> None:
    """Refuse to run without standard output or error: a database may get their descriptors.

    Reading a closed standard input fails.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
            if name != "stdin":
                raise click.UsageError(f"{name}: it is closed; redirect it, for example to a file")


class UserCommand(click.Command):
    """A command whose user id may begin with a hyphen; with two, it comes after ``--``."""

    ignore_unknown_options = allow_extra_args = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse unknown options that begin with two hyphens, and further arguments."""
        known = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        for argument in takewhile(lambda each: each != "--", args):
            name = argument.partition("=")[0]
            if name.startswith("--") and name not in known:
                raise click.NoSuchOption(
                    name, f"No such option {name!r}. Before a user id that begins with --, write --"
                )
        rest = super().parse_args(ctx, args)
        if rest:  # click would quote them, and they may be metadata
            raise click.UsageError("too many arguments; put quotes around the JSON", ctx)
        return rest


@click.group(cls=_Group)
@click.version_option(package_name="usermetadata", prog_name="usermetadata")
def main() -> None:
    """Read and write one JSON object per user.

    JSON is read from an argument or from standard input and written to standard output. The exit
    code is 0 on success, 1 if the storage failed, 2 if the arguments are not valid, 3 if damaged
    rows or invalid lines were left out.
    """


storage_option = click.option(
    "--storage",
    "url",
    envvar="USERMETADATA_URL",
    default=DEFAULT_URL,
    show_default=True,
    show_envvar=True,
    help="Where the metadata is: a URL, or the path of an SQLite file.",
)


def with_storage(
    command: Callable[..., None], *, must_exist: bool = False, indexed: bool = False
) -> Callable[..., None]:
    """Pass a command the storage that its options name.

    Args:
        command: takes the storage and its own arguments.
        must_exist: whether a file that is missing is an error.
        indexed: whether the storage uses the indexes that the database has.
    """

    @storage_option
    @click.option("--app-id", help="The app of the users.  [default: from the URL, or public]")
    @functools.wraps(command)
    def command_with_storage(url: str, app_id: str | None, **arguments: object) -> None:
        if must_exist:
            check_exists(url)
        with closing(_with_indexes(url) if indexed else open_storage(url)) as storage:
            command(storage if app_id is None else storage.for_app(app_id), **arguments)

    return command_with_storage


def functions_of(storage: Storage) -> BlockingFunctions:
    """Return the blocking functions on a storage, without an override."""
    return BlockingFunctions(BlockingRunner(storage))


def counted(users: int) -> str:
    """Return how many users there are, in words."""
    return "1 user" if users == 1 else f"{users} users"


def check_exists(url: str) -> None:
    """Check that the file of an SQLite storage is there.

    Raises:
        InvalidInputError: it is not.
    """
    path = path_of(url)
    if path and not os.path.exists(path):
        raise InvalidInputError(f"--storage: there is no file {path}; name one that exists")


def _with_indexes(url: str) -> Storage:
    """Open a storage with the indexes that its database has."""
    storage = open_storage(url)
    path = path_of(url)
    is_new = path and not os.path.exists(path)  # then it stays so until something is stored
    if isinstance(storage, IndexedStorage) and not is_new:
        stored = storage.stored_indexes()
        if not set(stored) <= set(storage.indexes):
            storage.close()
            return open_storage(url, stored)
    return storage
