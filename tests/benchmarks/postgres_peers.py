"""The alternatives on PostgreSQL, each written as its driver's documentation shows.

All use one server, with ``synchronous_commit`` on, separate tables with the same rows, and at most
ten connections. Each update is atomic, also for a user without a row, and returns the merged
object.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import asyncpg  # pyright: ignore[reportMissingTypeStubs]
import psycopg
from peers import APP, AsyncUsermetadata, Metadata, Usermetadata, merge
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import AsyncConnectionPool
from sqlalchemy import JSON, String, func, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from usermetadata import PostgresStorage, init

if TYPE_CHECKING:
    from collections.abc import Mapping

CONNECTIONS = 10
CREATE = """
CREATE TABLE IF NOT EXISTS by_psycopg (
    app_id varchar(64), user_id varchar(255), user_metadata text NOT NULL,
    PRIMARY KEY (app_id, user_id))
"""
LOCK = "SELECT pg_advisory_xact_lock(hashtext(%s))"
SELECT = "SELECT user_metadata FROM by_psycopg WHERE app_id = %s AND user_id = %s"
UPSERT = """
INSERT INTO by_psycopg VALUES (%s, %s, %s)
ON CONFLICT (app_id, user_id) DO UPDATE SET user_metadata = excluded.user_metadata
"""
CREATE_JSONB = """
CREATE TABLE by_asyncpg (
    app_id varchar(64), user_id varchar(255), user_metadata jsonb NOT NULL,
    PRIMARY KEY (app_id, user_id))
"""
SELECT_JSONB = "SELECT user_metadata FROM by_asyncpg WHERE app_id = $1 AND user_id = $2"
UPDATE_JSONB = """
INSERT INTO by_asyncpg AS stored VALUES ($1, $2, $3)
ON CONFLICT (app_id, user_id) DO UPDATE
SET user_metadata = (stored.user_metadata || excluded.user_metadata) - $4::text[]
RETURNING user_metadata
"""


class PostgresUsermetadata(Usermetadata):
    """This library, through ``usermetadata.syncio``."""

    def __init__(self, url: str) -> None:
        self.storage = PostgresStorage(url, max_connections=CONNECTIONS)
        init(self.storage)


class Core:
    """psycopg with the statements of SuperTokens' core: lock, select, upsert, commit."""

    name = "lock, select, upsert, commit"

    def __init__(self, url: str) -> None:
        self.connection = psycopg.connect(url, autocommit=True)
        self.connection.execute(CREATE)

    def get(self, user_id: str) -> Metadata:
        row = self.connection.execute(SELECT, [APP, user_id]).fetchone()
        return json.loads(row[0]) if row else {}

    def update(self, user_id: str, update: Metadata) -> Metadata:
        with self.connection.transaction():
            self.connection.execute(LOCK, [f"{APP}~{user_id}"])
            merged = merge(self.get(user_id), update)
            self.connection.execute(UPSERT, [APP, user_id, json.dumps(merged)])
        return merged

    def fill(self, users: Mapping[str, Metadata]) -> None:
        for user_id, metadata in users.items():
            self.update(user_id, metadata)

    def close(self) -> None:
        self.connection.close()


class AsyncPostgresUsermetadata(AsyncUsermetadata):
    """This library, through ``usermetadata.asyncio``."""

    async def open(self, place: Any) -> None:
        self.storage = PostgresStorage(place, table="ours", max_connections=CONNECTIONS)
        init(self.storage)


class AsyncPsycopg:
    """psycopg's pool: lock, select, upsert, commit."""

    name = "psycopg, async pool"

    async def open(self, url: str) -> None:
        self.pool = AsyncConnectionPool(
            url, min_size=CONNECTIONS, kwargs={"autocommit": True}, open=False
        )
        await self.pool.open(wait=True)
        async with self.pool.connection() as connection:
            await connection.execute(CREATE)

    async def get(self, user_id: str) -> Metadata:
        async with self.pool.connection() as connection:
            return await self.read(connection, user_id)

    async def read(self, connection: psycopg.AsyncConnection[Any], user_id: str) -> Metadata:
        found = await connection.execute(SELECT, [APP, user_id])
        row = await found.fetchone()
        return json.loads(row[0]) if row else {}

    async def update(self, user_id: str, update: Metadata) -> Metadata:
        async with self.pool.connection() as connection, connection.transaction():
            await connection.execute(LOCK, [f"{APP}~{user_id}"])
            merged = merge(await self.read(connection, user_id), update)
            await connection.execute(UPSERT, [APP, user_id, json.dumps(merged)])
        return merged

    async def close(self) -> None:
        await self.pool.close()


class Base(DeclarativeBase):
    """SQLAlchemy's declarations."""


class Row(Base):
    """A user's row, with SQLAlchemy's JSON column."""

    __tablename__ = "by_sqlalchemy"
    app_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    user_id: Mapped[str] = mapped_column(String(255), primary_key=True)
    user_metadata: Mapped[Metadata] = mapped_column(JSON)


class AsyncSQLAlchemy:
    """SQLAlchemy's asyncio session over asyncpg: lock, get, change, commit."""

    name = "SQLAlchemy 2, asyncpg"

    async def open(self, url: str) -> None:
        self.engine = create_async_engine(
            "postgresql+asyncpg://",
            connect_args=address(url),
            pool_size=CONNECTIONS,
            max_overflow=0,
        )
        async with self.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)

    async def get(self, user_id: str) -> Metadata:
        async with AsyncSession(self.engine) as session:
            row = await session.get(Row, (APP, user_id))
            return row.user_metadata if row else {}

    async def update(self, user_id: str, update: Metadata) -> Metadata:
        async with AsyncSession(self.engine) as session, session.begin():
            key = func.hashtext(f"{APP}~{user_id}")
            await session.execute(select(func.pg_advisory_xact_lock(key)))
            row = await session.get(Row, (APP, user_id))
            if row is None:
                row = Row(app_id=APP, user_id=user_id, user_metadata={})
                session.add(row)
            row.user_metadata = merged = merge(row.user_metadata, update)
            return merged

    async def close(self) -> None:
        await self.engine.dispose()


class AsyncPG:
    """asyncpg's pool and one statement, of the type jsonb: the fastest hand-written code."""

    name = "asyncpg, one statement"

    async def open(self, url: str) -> None:
        self.pool: Any = await asyncpg.create_pool(
            **address(url), min_size=CONNECTIONS, max_size=CONNECTIONS
        )
        await self.pool.execute(CREATE_JSONB)

    async def get(self, user_id: str) -> Metadata:
        text = await self.pool.fetchval(SELECT_JSONB, APP, user_id)
        return json.loads(text) if text else {}

    async def update(self, user_id: str, update: Metadata) -> Metadata:
        kept = {key: value for key, value in update.items() if value is not None}
        removed = [key for key, value in update.items() if value is None]
        text = await self.pool.fetchval(UPDATE_JSONB, APP, user_id, json.dumps(kept), removed)
        merged: Metadata = json.loads(text)
        return merged

    async def close(self) -> None:
        await self.pool.close()


CONCURRENT: list[Any] = [AsyncPostgresUsermetadata, AsyncPsycopg, AsyncSQLAlchemy, AsyncPG]


def address(url: str) -> dict[str, Any]:
    """Return the address and search path in asyncpg's form."""
    options: dict[str, Any] = conninfo_to_dict(url)
    names = {"host": "host", "port": "port", "user": "user", "password": "password"}
    names["dbname"] = "database"
    found = {theirs: options[ours] for ours, theirs in names.items() if options.get(ours)}
    path = options["options"].partition("search_path=")[2]
    return {**found, "server_settings": {"search_path": path}}
