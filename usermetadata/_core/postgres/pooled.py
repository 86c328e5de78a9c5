"""The storage's pool and table; the table is described once, and created before a write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from psycopg.errors import FeatureNotSupported

from usermetadata._core.postgres.statements import OF_THE_TABLE
from usermetadata._core.postgres.transactions import PooledTransaction
from usermetadata.exceptions import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from psycopg import Connection

    from usermetadata._core.postgres.connections import Connections
    from usermetadata._core.postgres.statements import Table
    from usermetadata._core.postgres.transactions import Transaction

T = TypeVar("T")


class PooledConnections:
    """Reads and writes through the connections of a pool.

    Args:
        connections: the pool.
        table: the table.
        timeout: seconds that a write waits for row locks.

    Attributes:
        table: the table, as passed.
    """

    def __init__(self, connections: Connections, table: Table, timeout: float) -> None:
        self.connections = connections
        self.name = connections.name
        self.table = table
        self._timeout = str(round(timeout * 1000))

    def run(
        self, work: Callable[[Transaction], T], absent: T | None = None, *, is_write: bool = False
    ) -> T:
        """Return the result of ``work``, which may be called again where that is safe.

        Args:
            work: the work.
            absent: what to return if there is no table; without it, the table is created.
            is_write: whether the work writes.
        """
        length = self._prepare(create=absent is None)
        if not length and absent is not None:
            return absent

        def work_with(connection: Connection[Any]) -> T:
            return work(PooledTransaction(self.table, connection, self._timeout, length))

        was_portable = self.table.is_portable
        try:
            return self.connections.run(work_with, is_write=is_write)
        except StorageError as error:
            # No error of a table that was changed or dropped may outlive it.
            if isinstance(error.__cause__, OF_THE_TABLE):
                self.table.forget()
            if was_portable or not isinstance(error.__cause__, FeatureNotSupported):
                raise
            length = self._prepare(create=False)
            if not self.table.is_portable:
                raise
        # Citus refused PostgreSQL's statement, because the table was distributed meanwhile.
        return self.connections.run(work_with, is_write=is_write)

    def check_open(self) -> None:
        """Raise ``UsageError`` if the pool is closed."""
        self.connections.check_open()

    def close(self) -> None:
        """Close the pool, unless it is the caller's."""
        self.connections.close()

    def _prepare(self, *, create: bool) -> int:
        """Describe the table; return the length of the longest user id, 0 without a table."""
        # Another thread may forget the description at any time.
        length = self.table.user_id_length
        if not length:
            self.connections.run_first(self.table.describe)
            length = self.table.user_id_length
        while create and not length:
            # The table's creation is committed before the table is described.
            self.connections.run(self.table.create)
            self.connections.run(self.table.describe)
            length = self.table.user_id_length
        return length
