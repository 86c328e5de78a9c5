"""The command that serves SuperTokens' SDKs over HTTP."""

from __future__ import annotations

import logging
import signal
import sys
from typing import TYPE_CHECKING

import click

from usermetadata.cli.group import with_storage

if TYPE_CHECKING:
    from usermetadata.storage import Storage

_GRACE = 30  # seconds for the requests under way, after SIGTERM


class _Keys(click.types.StringParamType):
    envvar_list_splitter = ","


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
    type=click.FloatRange(0, min_open=True),
    default=20.0,
    show_default=True,
    help="In seconds: for a request to arrive.",
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
    log_level: str,
) -> None:
    """Serve user metadata over HTTP to SuperTokens' SDKs, as a core does."""
    from usermetadata.server import create_app, is_loopback

    if not api_keys and not is_loopback(host):
        raise click.UsageError(
            f"--host {host!r} can be reached from elsewhere: set USERMETADATA_API_KEYS, or listen"
            " on 127.0.0.1"
        )

    try:
        import uvicorn
    except ImportError as error:
        raise ImportError(
            "serve needs uvicorn; pip install 'uvicorn>=0.30' 'httptools>=0.6'"
        ) from error
    from usermetadata.cli.connections import MAX_HEAD, OncePerSecond, limited, most_connections

    keys = [key.strip() for key in api_keys]
    app = create_app(
        storage,
        api_keys=keys,
        max_body_size=max_body_size,
        max_metadata_size=max_metadata_size,
    )
    connections = most_connections()
    storage.read([])  # an error of the storage is shown before the first request
    logging.basicConfig(format="%(levelname)s:     %(message)s")
    logging.getLogger("usermetadata").setLevel(log_level.upper())
    logging.getLogger("uvicorn.error").addFilter(OncePerSecond())
    # uvicorn sends itself this signal again when it has stopped; then the storage is closed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        uvicorn.run(
            app,
            host=host,
            port=port,
            access_log=False,
            server_header=False,
            log_level=log_level,
            http=limited(connections, request_timeout),
            ws="none",
            h11_max_incomplete_event_size=2 * MAX_HEAD,  # the protocol refuses it before
            backlog=max(1, connections // 2),  # so many may be accepted before one is counted
            timeout_graceful_shutdown=_GRACE,
        )
    except SystemExit as error:
        if error.code:  # its log has the cause
            text = f"cannot listen at --host {host!r} --port {port}; choose another"
            raise click.ClickException(text) from error
        raise
