"""The caller's PostgreSQL connection behind one interface, for three kinds of connections."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import AsyncCursor, errors
from psycopg.pq import PipelineStatus, TransactionStatus
from psycopg.rows import tuple_row

from usermetadata._core.joining import unsupported
from usermetadata._core.postgres.transactions import (
    Answer,
    PlainAsyncCursor,
    PlainCursor,
    answer,
    pipeline,
)
from usermetadata.exceptions import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from psycopg import AsyncConnection, Connection

    from usermetadata._core.joining import DriversConnection
    from usermetadata._core.postgres.transactions import Statement

_WHAT_WORKS = (
    "a connection of psycopg 3, a Session or Connection of SQLAlchemy with psycopg 3 or asyncpg, or"
    " Django's connection to PostgreSQL with psycopg 3"
)


class Channel(ABC):
    """Sends statements to the server through a connection of the caller's.

    Attributes:
        connection: the driver's connection.
    """

    connection: Any

    @property
    @abstractmethod
    def encoding(self) -> str:
        """The client's encoding, by Python's name."""

    @property
    @abstractmethod
    def is_closed(self) -> bool:
        """Whether the connection is closed or known to be broken."""

    @abstractmethod
    def enter(self) -> bool:
        """Prepare the connection; return whether it is idle and in autocommit mode."""

    @abstractmethod
    def exchange(self, statements: Sequence[Statement]) -> list[Answer]:
        """Execute the statements, in one round trip if the driver can.

        Raises:
            psycopg.Error: the first error; no later statement was executed.
        """


class _PsycopgChannel(Channel):
    def __init__(self, connection: Connection[Any]) -> None:
        self.connection = connection

    @property
    def encoding(self) -> str:
        return str(self.connection.info.encoding)

    @property
    def is_closed(self) -> bool:
        return bool(self.connection.closed)

    def enter(self) -> bool:
        if self.connection.pgconn.pipeline_status != PipelineStatus.OFF:
            try:
                self._synchronise()
            except psycopg.Error as error:
                raise StorageError(
                    "the caller's connection: an earlier statement in its pipeline has failed; roll"
                    " the transaction back and repeat it"
                ) from error
        status = self.connection.pgconn.transaction_status
        if status == TransactionStatus.INERROR:
            raise StorageError(
                "the caller's connection: an earlier statement in its transaction has failed; roll"
                " the transaction back, at least to a savepoint"
            )
        return bool(self.connection.autocommit) and status == TransactionStatus.IDLE

    def exchange(self, statements: Sequence[Statement]) -> list[Answer]:
        with pipeline(self.connection):
            # The caller may have set other cursor and row factories.
            cursors = [
                PlainCursor(self.connection, row_factory=tuple_row).execute(
                    text, parameters, prepare=_prepare(parameters)
                )
                for text, parameters in statements
            ]
        return [answer(cursor) for cursor in cursors]

    def _synchronise(self) -> None:
        with self.connection.pipeline() as pipeline:
            pipeline.sync()


def _prepare(parameters: object) -> bool | None:
    """Prepare only statements with parameters: psycopg's cache is limited, and others are fast."""
    return None if parameters else False


class _AsyncPsycopgChannel(_PsycopgChannel):
    def __init__(self, connection: AsyncConnection[Any], adapter: Any) -> None:
        self.connection = connection
        self._adapter = adapter

    def exchange(self, statements: Sequence[Statement]) -> list[Answer]:
        async def exchange(connection: AsyncConnection[Any]) -> list[Answer]:
            cursors: list[AsyncCursor[tuple[Any, ...]]] = []
            failed: psycopg.Error | None = None
            try:
                async with connection.pipeline():
                    try:
                        for text, parameters in statements:
                            cursor = PlainAsyncCursor(connection, row_factory=tuple_row)
                            cursors.append(
                                await cursor.execute(text, parameters, prepare=_prepare(parameters))
                            )
                    except psycopg.Error as error:
                        failed = error
            except psycopg.Error:
                if failed is None:
                    raise
            if failed is not None:
                raise failed
            return [
                Answer(
                    await cursor.fetchall() if cursor.description else [],
                    cursor.rowcount,
                    cursor.statusmessage,
                )
                for cursor in cursors
            ]

        answers: list[Answer] = self._adapter.run_async(exchange)
        return answers

    def _synchronise(self) -> None:
        async def synchronise(connection: AsyncConnection[Any]) -> None:
            async with connection.pipeline() as pipeline:
                await pipeline.sync()

        self._adapter.run_async(synchronise)


class _AsyncpgChannel(Channel):
    def __init__(self, connection: Any, adapter: Any) -> None:
        self.connection = connection
        self._adapter = adapter

    @property
    def encoding(self) -> str:
        return "utf-8"  # asyncpg supports no other

    @property
    def is_closed(self) -> bool:
        return bool(self.connection.is_closed())

    def enter(self) -> bool:
        if self.connection.is_in_transaction():
            return False
        if self._adapter.autocommit:
            return True
        # SQLAlchemy begins the transaction together with its first statement.
        cursor = self._adapter.cursor()
        try:
            cursor.execute("SELECT")
        except self._adapter.dbapi.Error as error:
            raise self._translated(error.__cause__ or error) from None
        finally:
            cursor.close()
        return False

    def exchange(self, statements: Sequence[Statement]) -> list[Answer]:
        async def exchange(connection: Any) -> list[Answer]:
            answers: list[Answer] = []
            for parameters, texts in _grouped(statements):
                if parameters is None:
                    # The simple protocol takes several, and returns the last one's answer.
                    status = await connection.execute(b";".join(texts).decode())
                    answers += [Answer([], 0, status)] * len(texts)
                else:
                    kinds = tuple((name, type(value)) for name, value in parameters.items())
                    text, names = _numbered(texts[0], kinds)
                    rows = await connection.fetch(text, *[parameters[name] for name in names])
                    answers.append(Answer([tuple(row) for row in rows], len(rows), None))
            return answers

        import asyncpg  # pyright: ignore[reportMissingTypeStubs] # it has none

        try:
            answers: list[Answer] = self._adapter.run_async(exchange)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            raise self._translated(error) from None  # the text quotes rows
        return answers

    def _translated(self, error: BaseException) -> psycopg.Error:
        """Return psycopg's error for one of asyncpg's, or of the network's."""
        state = getattr(error, "sqlstate", None)
        text = str(error) or type(error).__name__
        if state:
            try:
                translated = errors.lookup(state)(text)
            except KeyError:
                return psycopg.DatabaseError(text)
            if isinstance(translated, errors.UniqueViolation):
                return _UniqueViolation(text, getattr(error, "detail", None))
            return translated
        is_lost = self.is_closed or isinstance(error, OSError)
        return psycopg.OperationalError(text) if is_lost else psycopg.ProgrammingError(text)


class _UniqueViolation(errors.UniqueViolation):
    """Another driver's error, with the server's detail."""

    def __init__(self, text: str, detail: str | None) -> None:
        super().__init__(text)
        self.detail = detail


def _grouped(
    statements: Sequence[Statement],
) -> Iterator[tuple[Mapping[str, object] | None, list[bytes]]]:
    """Join consecutive statements that have no parameters."""
    simple: list[bytes] = []
    for text, parameters in statements:
        if parameters is None:
            simple.append(text)
            continue
        if simple:
            yield None, simple
            simple = []
        yield parameters, [text]
    if simple:
        yield None, simple


_TYPES = {int: "bigint", list: "text[]"}


@lru_cache
def _numbered(template: bytes, kinds: tuple[tuple[str, type], ...]) -> tuple[str, list[str]]:
    """Return a statement with numbered parameters, and the names in the order of the numbers.

    Each is cast, so that no codec of the application's for JSON applies to it.
    """
    types = dict(kinds)
    names: list[str] = []

    def replace(found: re.Match[str]) -> str:
        name = found[1]
        if name is None:
            return "%"
        if name not in names:
            names.append(name)
        return f"${names.index(name) + 1}::{_TYPES.get(types[name], 'text')}"

    return re.sub(r"%%|%\((\w+)\)s", replace, template.decode()), names


def open_channel(found: DriversConnection) -> Channel:
    """Return the channel of a connection.

    Raises:
        InvalidInputError: the connection is not supported.
    """
    kind, connection, adapter, _ = found
    if kind == "psycopg.Connection":
        return _PsycopgChannel(connection)
    if kind == "psycopg.AsyncConnection":
        return _AsyncPsycopgChannel(connection, adapter)
    if kind == "asyncpg.connection.Connection":
        return _AsyncpgChannel(connection, adapter)
    raise unsupported(connection, _WHAT_WORKS)
