"""The command line: ``python -m usermetadata``, and ``sqlite-utils usermetadata``."""

from __future__ import annotations

import errno
import functools
import ipaddress
import json
import logging
import os
import shlex
import signal
import sys
from contextlib import closing, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import click

from usermetadata.changes import Replace
from usermetadata.exceptions import InvalidInputError, StorageError, UsageError
from usermetadata.identifiers import check_user_id
from usermetadata.json import copy_metadata, encode_metadata
from usermetadata.recipe import UserMetadataRecipe, open_storage
from usermetadata.storage import ListingStorage

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sized

    from usermetadata.json import Metadata
    from usermetadata.storage import Storage

Batch = TypeVar("Batch", bound="Sized")

_BATCH = 1000  # users that are written, or read, together
_LINE_START = b'{"userId":'
_GRACE = 30  # seconds for the requests under way, when the server is told to stop


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
            if error.errno == errno.EPIPE:  # click itself knows what to do
                raise
            raise click.ClickException(str(error)) from error


class _Keys(click.types.StringParamType):
    envvar_list_splitter = ","


@click.group(cls=_Group)
@click.version_option(package_name="usermetadata", prog_name="usermetadata")
def main() -> None:
    """Read and write the JSON object that is kept about each user.

    JSON is given as an argument or on standard input, and comes back on standard output. The exit
    code is 0 if it was done, 1 if the storage failed, 2 if what was asked for is not valid.
    """


def _with_storage(command: Callable[..., None], *, must_exist: bool = False) -> Callable[..., None]:
    """Let a command have the storage that its options name."""

    @click.option(
        "--storage",
        "url",
        envvar="USERMETADATA_URL",
        default="sqlite:///usermetadata.db",
        show_default=True,
        show_envvar=True,
        help="Where the metadata is: a URL, or the path of an SQLite file.",
    )
    @click.option("--app-id", default="public", show_default=True, help="The users' app.")
    @functools.wraps(command)
    def with_storage(url: str, app_id: str, **arguments: object) -> None:
        path = url.removeprefix("sqlite:///")
        if must_exist and not ("://" in path or path == ":memory:" or os.path.exists(path)):
            raise InvalidInputError(f"--storage: there is no file {path}")
        with closing(open_storage(url)) as storage:
            command(storage.for_app(app_id), **arguments)

    return with_storage


@main.command()
@click.argument("user_id")
@functools.partial(_with_storage, must_exist=True)
def get(storage: Storage, user_id: str) -> None:
    """Show the metadata of USER_ID, {} if there is none."""
    _show(_functions(storage).get_user_metadata(user_id, {}).metadata)


@main.command("set")
@click.argument("user_id")
@click.argument("metadata", required=False)
@_with_storage
def set_(storage: Storage, user_id: str, metadata: str | None) -> None:
    """Replace the metadata of USER_ID by METADATA, a JSON object; show it."""
    parsed = _parse(_given(metadata), "metadata")
    _show(_functions(storage).set_user_metadata(user_id, parsed, {}).metadata)


@main.command()
@click.argument("user_id")
@click.argument("update", required=False)
@_with_storage
def update(storage: Storage, user_id: str, update: str | None) -> None:
    """Merge UPDATE, a JSON object, into the metadata of USER_ID; show the result.

    Root-level properties are overwritten; those that are null are removed.
    """
    parsed = _parse(_given(update), "metadata_update")
    _show(_functions(storage).update_user_metadata(user_id, parsed, {}).metadata)


@main.command()
@click.argument("user_id")
@_with_storage
def clear(storage: Storage, user_id: str) -> None:
    """Remove everything that is stored about USER_ID."""
    _functions(storage).clear_user_metadata(user_id, {})


@main.command()
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True), default="-")
@click.option("--resume", is_flag=True, help="Go on after the last line of FILE.part.")
@functools.partial(_with_storage, must_exist=True)
def export(storage: Storage, file: str, *, resume: bool) -> None:
    """Write all users as JSON Lines to FILE, or to standard output.

    Each line is {"userId": "...", "metadata": {...}}. A thousand users at a time are read as of one
    moment. Until all are written, they are in FILE.part.
    """
    # What is there and no ordinary file, a terminal or a pipe, is written to directly.
    is_direct = file == "-" or (os.path.exists(file) and not os.path.isfile(file))
    if resume and is_direct:
        raise InvalidInputError("--resume needs a FILE")
    target = file if is_direct else os.path.realpath(file)
    part = target if is_direct else f"{target}.part"
    after = _cut_after_last_line(part) if resume else ""
    is_shown = is_direct and sys.stdout.isatty()
    with (
        click.open_file(part, "a" if resume else "w", encoding="utf-8") as output,
        _resumable(lambda: "--resume" if after and not is_direct else ""),
    ):
        for batch in _watched(_users(storage, after), "Exporting", hidden=is_shown):
            for user_id, metadata in batch.items():
                line = encode_metadata({"userId": user_id, "metadata": metadata})
                output.write(line + "\n")
            output.flush()
            after = list(batch)[-1]
    if not is_direct:
        os.replace(part, target)


@main.command("import")
@click.argument("file", type=click.File("rb"), default="-")
@click.option(
    "--from-line",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Leave out the lines before it.",
)
@_with_storage
def import_(storage: Storage, file: BinaryIO, from_line: int) -> None:
    """Store all users of FILE, or of standard input, which is what export writes.

    Who is stored already is replaced. A thousand users at a time are stored, all or none; after an
    error, --from-line goes on where the message says.
    """
    numbered = islice(enumerate(file, 1), from_line - 1, None)
    lines = ((number, line) for number, line in numbered if line.strip())
    batches = iter(lambda: list(islice(lines, _BATCH)), [])
    done = from_line - 1
    with _resumable(lambda: f"--from-line {done + 1}" if done >= from_line else ""):
        for batch in _watched(batches, "Importing"):
            storage.write([_parse_line(line, number) for number, line in batch])
            done = batch[-1][0]


@main.command()
@click.argument("dsn")
@click.option("--table", default="user_metadata", show_default=True, help="The core's table.")
@click.option("--schema", help="The schema it is in, if not the first of the search path.")
@click.option("--core-app-id", default="public", show_default=True, help="The core's app.")
@click.option("--after", default="", help="The user id after which to go on.")
@_with_storage
def import_supertokens(  # noqa: PLR0913, PLR0917 - they are options
    storage: Storage, dsn: str, table: str, schema: str | None, core_app_id: str, after: str
) -> None:
    """Copy the users of a SuperTokens core, whose PostgreSQL database is at DSN.

    Who is stored already is replaced. The core may go on running; what it writes about users who
    have been copied is not copied again.
    """
    from usermetadata.storage.postgres import PostgresStorage

    with (
        closing(PostgresStorage(dsn, table=table, schema=schema, app_id=core_app_id)) as source,
        _resumable(lambda: f"--after {shlex.quote(after)}" if after else ""),
    ):
        if not source.read_after("", 1):
            raise UsageError(
                f"{source!r} has no table {table!r}, or no users in it: are --schema, --table and"
                " --core-app-id the core's?"
            )
        for batch in _watched(_users(source, after), "Copying"):
            storage.write([(user_id, Replace(batch[user_id])) for user_id in batch])
            after = list(batch)[-1]


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=3567,
    show_default=True,
    help="The port to listen at.",
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    type=_Keys(),
    envvar="USERMETADATA_API_KEYS",
    show_envvar=True,
    help="A key that clients must show; may be given several times, in the variable with commas.",
)
@click.option(
    "--max-body-size", type=click.IntRange(0), default=2**20, show_default=True, help="In bytes."
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="With debug, a line for each request.",
)
@_with_storage
def serve(  # noqa: PLR0913, PLR0917 - they are options
    storage: Storage,
    host: str,
    port: int,
    api_keys: tuple[str, ...],
    max_body_size: int,
    log_level: str,
) -> None:
    """Answer SuperTokens' SDKs, in any language, as a core would: user metadata, over HTTP."""
    if not api_keys and not _is_loopback(host):
        raise click.UsageError(
            f"--host {host!r} can be reached from elsewhere: give --api-key, or listen at 127.0.0.1"
        )
    from usermetadata.server import create_app

    try:
        import uvicorn
    except ImportError as error:
        raise ImportError("serve needs uvicorn: pip install 'usermetadata[server]'") from error

    keys = [key.strip() for key in api_keys]
    app = create_app(storage, api_keys=keys, max_body_size=max_body_size)
    storage.read([])  # or why it cannot be read, before anybody asks
    logging.basicConfig(format="%(levelname)s:     %(message)s")
    logging.getLogger("usermetadata").setLevel(log_level.upper())
    # uvicorn sends itself this signal again when it has stopped; the storage is to be closed then.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        uvicorn.run(
            app,
            host=host,
            port=port,
            access_log=False,
            server_header=False,
            log_level=log_level,
            timeout_graceful_shutdown=_GRACE,
        )
    except SystemExit as error:
        if error.code:  # its log says why
            text = f"cannot listen at --host {host!r} --port {port}"
            raise click.ClickException(text) from error
        raise


def _functions(storage: Storage) -> Any:
    return UserMetadataRecipe(storage).blocking_implementation


def _show(metadata: Metadata) -> None:
    # Encoded twice, as other programs' rows may hold what only an escape can say.
    is_ascii = encode_metadata(metadata).isascii()
    click.echo(json.dumps(metadata, ensure_ascii=is_ascii, indent=2))


def _given(text: str | None) -> str | bytes:
    """Return what was given as an argument, or on standard input."""
    if text is not None and text != "-":
        return text
    return sys.stdin.buffer.read()


def _parse(text: str | bytes, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at character {error.pos + 1}"
        raise InvalidInputError(f"{name}: it is not JSON: {where}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{name}: {error}") from error


def _parse_line(line: bytes, number: int) -> tuple[str, Replace]:
    parsed = _parse(line, f"line {number}")
    if not isinstance(parsed, dict) or set(parsed) != {"userId", "metadata"}:
        raise InvalidInputError(
            f'line {number}: is not {{"userId": "...", "metadata": {{...}}}}, as export writes it'
        )
    user_id = check_user_id(parsed["userId"], f"line {number}: userId")
    return user_id, Replace(copy_metadata(parsed["metadata"], f"line {number}: metadata"))


def _users(storage: Storage, after: str) -> Iterator[dict[str, Metadata]]:
    """Read all users in batches, in the storage's order, from the one after ``after`` on."""
    if not isinstance(storage, ListingStorage):
        raise UsageError(f"{type(storage).__name__} cannot list its users: it has no read_after")
    while batch := storage.read_after(after, _BATCH):
        yield batch
        after = list(batch)[-1]


def _watched(batches: Iterable[Batch], label: str, *, hidden: bool = False) -> Iterator[Batch]:
    """Show on a terminal how many users have been done."""
    done = 0
    with click.progressbar(
        batches,
        label=label,
        file=sys.stderr,
        hidden=hidden or not sys.stderr.isatty(),
        item_show_func=lambda _: f"{done} users",
    ) as bar:
        for batch in bar:
            yield batch
            done += len(batch)
    click.echo(f"{done} users", err=True)


@contextmanager
def _resumable(how: Callable[[], str]) -> Generator[None, None, None]:
    try:
        yield
    except (StorageError, InvalidInputError, OSError, KeyboardInterrupt):
        if how():
            click.echo(f"What came before is stored. Go on with {how()} after this:", err=True)
        raise


def _cut_after_last_line(file: str) -> str:
    """Cut off a line that was not written to its end; return the last user, if there is one."""
    if not os.path.exists(file):
        return ""
    last, number, end, rest = b"", 0, 0, b""
    with open(file, "r+b") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                last, number, end = line, number + 1, end + len(line)
            else:
                rest = line
        after = _parse_line(last, number)[0] if last else ""
        if rest[: len(_LINE_START)] != _LINE_START[: len(rest)]:
            raise InvalidInputError(f"{file}: its last line is not one that export writes")
        lines.truncate(end)
    return after


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
