"""The command that serves SuperTokens' SDKs over HTTP."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import click

from usermetadata.cli.group import with_storage

if TYPE_CHECKING:
    from usermetadata.storage import Storage


_log = logging.getLogger(__name__)


class _Keys(click.types.StringParamType):
    envvar_list_splitter = ","


class _Seconds(click.FloatRange):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value} is not a number of seconds.", param, ctx)
        return seconds


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=3567,
    show_default=True,
    help="The port to listen on.",
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    type=_Keys(),
    envvar="USERMETADATA_API_KEYS",
    show_envvar=True,
    help="A key that clients must send. Repeatable; in the variable, separated by commas."
    " Prefer the variable: other users can see options in the list of processes.",
)
@click.option(
    "--max-body-size", type=click.IntRange(0), default=2**20, show_default=True, help="In bytes."
)
@click.option(
    "--max-metadata-size",
    type=click.IntRange(0),
    default=2**20,
    show_default=True,
    help="In bytes: of a user's metadata after an update.",
)
@click.option(
    "--request-timeout",
    type=_Seconds(0, min_open=True),
    default=30.0,
    show_default=True,
    help="In seconds: for a request to arrive, headers and body.",
)
@click.option(
    "--keep-alive-timeout",
    type=_Seconds(0, min_open=True),
    default=120.0,
    show_default=True,
    help="In seconds: for an idle connection. It must be longer than clients and proxies keep one.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="debug logs each request.",
)
@with_storage
def serve(  # noqa: PLR0913, PLR0917 - they are options
    storage: Storage,
    host: str,
    port: int,
    api_keys: tuple[str, ...],
    max_body_size: int,
    max_metadata_size: int,
    request_timeout: float,
    keep_alive_timeout: float,
    log_level: str,
) -> None:
    """Serve SuperTokens' SDKs over HTTP, as a core does."""
    from usermetadata._core.http import Server
    from usermetadata.server import create_app, is_loopback

    if not api_keys and "USERMETADATA_API_KEYS" in os.environ:
        raise click.UsageError(
            "USERMETADATA_API_KEYS: it is empty; set a key, or unset it to serve without one"
        )
    if not api_keys and not is_loopback(host):
        raise click.UsageError(
            f"--host {host!r} can be reached from elsewhere: set USERMETADATA_API_KEYS, or listen"
            " on 127.0.0.1"
        )

    app = create_app(
        storage,
        api_keys=[key.strip() for key in api_keys],
        max_body_size=max_body_size,
        max_metadata_size=max_metadata_size,
    )
    storage.read([])  # an error of the storage is shown before the first request
    logging.basicConfig(format="%(levelname)s:     %(message)s")
    logging.getLogger("usermetadata").setLevel(log_level.upper())
    # A signal that comes before the server has started also closes the storage.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    server = Server(app, keep_alive_timeout=keep_alive_timeout, request_timeout=request_timeout)

    def started(addresses: list[Any]) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        for name, bound, *_ in addresses:
            shown = f"[{name}]" if ":" in name else name
            url, process = f"http://{shown}:{bound}", os.getpid()
            _log.info("running on %s (process %d; Ctrl-C stops it)", url, process)

    def stop(*_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # the second signal ends the process at once
        server.stop()

    try:
        server.run(started, host=host, port=port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        text = f"cannot listen at --host {host!r} --port {port}: {reason}; choose another"
        raise click.ClickException(text) from error
