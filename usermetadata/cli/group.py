"""The group of commands, and the options that say which storage a command uses."""

from __future__ import annotations

import errno
import functools
import os
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from usermetadata._core.urls import DEFAULT_URL, open_storage
from usermetadata.exceptions import InvalidInputError, StorageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable


class _Group(click.Group):
    """Shows the library's errors as click shows its own: one line, and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InvalidInputError as error:
            raise click.UsageError(str(error)) from error
        except (StorageError, UsageError, ImportError) as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # click handles it
                raise
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group)
@click.version_option(package_name="usermetadata", prog_name="usermetadata")
def main() -> None:
    """Read and write one JSON object per user.

    JSON is read from an argument or from standard input and written to standard output. The exit
    code is 0 on success, 1 if the storage failed, 2 if the arguments are not valid.
    """


def with_storage(command: Callable[..., None], *, must_exist: bool = False) -> Callable[..., None]:
    """Pass a command the storage that its options name.

    Args:
        command: takes the storage and its own arguments.
        must_exist: whether a file that is missing is an error.
    """

    @click.option(
        "--storage",
        "url",
        envvar="USERMETADATA_URL",
        default=DEFAULT_URL,
        show_default=True,
        show_envvar=True,
        help="Where the metadata is: a URL, or the path of an SQLite file.",
    )
    @click.option("--app-id", default="public", show_default=True, help="The app of the users.")
    @functools.wraps(command)
    def command_with_storage(url: str, app_id: str, **arguments: object) -> None:
        path = url.removeprefix("sqlite:///")
        if must_exist and not ("://" in path or path == ":memory:" or os.path.exists(path)):
            raise InvalidInputError(f"--storage: there is no file {path}; name one that exists")
        with closing(open_storage(url)) as storage:
            command(storage.for_app(app_id), **arguments)

    return command_with_storage
