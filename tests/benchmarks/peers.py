"""The alternatives, each written as its own documentation recommends.

Equal result: ``update`` returns the merged object and is atomic between threads and tasks. Equal
durability: an acknowledged update survives a power cut (WAL with ``synchronous=FULL``, or
``fsync``). If a library's default is weaker, the setting is changed here. Equal queueing: one lock
is around each writer, so that calls queue in it instead of polling in SQLite's busy handler.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal

import aiosqlite
import diskcache  # pyright: ignore[reportMissingTypeStubs]
import sqlite_utils
import sqlitedict  # pyright: ignore[reportMissingTypeStubs]
import tinydb
from key_value.aio.stores.disk import DiskStore
from sqlalchemy import JSON, Engine, String, create_engine, event, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from usermetadata import PostgresStorage, SQLiteStorage, UserMetadataRecipe, init, syncio
from usermetadata import asyncio as aio

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

Metadata = dict[str, Any]

CREATE = """
CREATE TABLE IF NOT EXISTS user_metadata (
    app_id TEXT NOT NULL, user_id TEXT NOT NULL, user_metadata TEXT NOT NULL,
    PRIMARY KEY (app_id, user_id))
"""
SELECT = "SELECT user_metadata FROM user_metadata WHERE app_id = ? AND user_id = ?"
SELECT_MANY = (
    "SELECT user_id, user_metadata FROM user_metadata"
    " WHERE app_id = ? AND user_id IN (SELECT value FROM json_each(?))"
)
UPSERT = (
    "INSERT INTO user_metadata VALUES (?, ?, ?)"
    " ON CONFLICT DO UPDATE SET user_metadata = excluded.user_metadata"
)
APP = "public"


def merge(old: Metadata, update: Metadata) -> Metadata:
    """Merge in the usual one line."""
    return {key: value for key, value in {**old, **update}.items() if value is not None}


class Usermetadata:
    """This library, through ``usermetadata.syncio``."""

    name = "usermetadata"
    storage: SQLiteStorage | PostgresStorage

    def __init__(self, folder: Path, synchronous: Literal["FULL", "NORMAL"] = "FULL") -> None:
        self.storage = SQLiteStorage(folder / "usermetadata.db", synchronous=synchronous)
        init(self.storage)

    def get(self, user_id: str) -> Metadata:
        return syncio.get_user_metadata(user_id).metadata

    def update(self, user_id: str, update: Metadata) -> Metadata:
        return syncio.update_user_metadata(user_id, update).metadata

    def get_many(self, user_ids: list[str]) -> dict[str, Metadata]:
        found = syncio.get_bulk_user_metadata(user_ids)
        return {user_id: result.metadata for user_id, result in found.items()}

    def fill(self, users: Mapping[str, Metadata]) -> None:
        syncio.update_bulk_user_metadata(users)

    def close(self) -> None:
        UserMetadataRecipe.reset()
        self.storage.close()


class Sqlite3:
    """The standard library's driver: a connection for each thread, and a lock for the writers."""

    name = "sqlite3 by hand"

    def __init__(self, folder: Path, synchronous: str = "FULL") -> None:
        self.path = folder / "sqlite3.db"
        self.synchronous = synchronous
        self.local = threading.local()
        self.lock = threading.Lock()
        self.opened: list[sqlite3.Connection] = []
        self.connection().execute(CREATE)

    def connection(self) -> sqlite3.Connection:
        try:
            connection: sqlite3.Connection = self.local.connection
        except AttributeError:
            connection = self.local.connection = sqlite3.connect(
                self.path, isolation_level=None, timeout=30, check_same_thread=False
            )
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {self.synchronous}")
            self.opened.append(connection)
        return connection

    def get(self, user_id: str) -> Metadata:
        row = self.connection().execute(SELECT, (APP, user_id)).fetchone()
        return json.loads(row[0]) if row else {}

    def update(self, user_id: str, update: Metadata) -> Metadata:
        execute = self.connection().execute
        with self.lock:
            execute("BEGIN IMMEDIATE")
            try:
                row = execute(SELECT, (APP, user_id)).fetchone()
                merged = merge(json.loads(row[0]) if row else {}, update)
                execute(UPSERT, (APP, user_id, json.dumps(merged)))
                execute("COMMIT")
            except BaseException:
                execute("ROLLBACK")
                raise
        return merged

    def get_many(self, user_ids: list[str]) -> dict[str, Metadata]:
        rows = self.connection().execute(SELECT_MANY, (APP, json.dumps(user_ids)))
        return {user_id: json.loads(text) for user_id, text in rows}

    def fill(self, users: Mapping[str, Metadata]) -> None:
        connection = self.connection()
        connection.execute("BEGIN")
        connection.executemany(UPSERT, [(APP, user, json.dumps(users[user])) for user in users])
        connection.execute("COMMIT")

    def close(self) -> None:
        for connection in self.opened:
            connection.close()


class SqliteUtils:
    """sqlite-utils: an upsert inside a transaction."""

    name = "sqlite-utils"

    def __init__(self, folder: Path) -> None:
        connection = sqlite3.connect(
            folder / "sqlite_utils.db", isolation_level=None, check_same_thread=False
        )
        self.database = sqlite_utils.Database(connection)
        self.database.enable_wal()
        connection.execute("PRAGMA synchronous = FULL")
        self.table = self.database.table("user_metadata", pk="user_id")
        self.table.create({"user_id": str, "user_metadata": str}, pk="user_id")
        self.lock = threading.Lock()

    def get(self, user_id: str) -> Metadata:
        with self.lock:
            return self.read(user_id)

    def read(self, user_id: str) -> Metadata:
        try:
            text = self.table.get(user_id)["user_metadata"]
        except sqlite_utils.db.NotFoundError:
            return {}
        metadata: Metadata = json.loads(text)
        return metadata

    def update(self, user_id: str, update: Metadata) -> Metadata:
        with self.lock, self.database.atomic():
            merged = merge(self.read(user_id), update)
            self.table.upsert({"user_id": user_id, "user_metadata": merged})
        return merged

    def get_many(self, user_ids: list[str]) -> dict[str, Metadata]:
        with self.lock:
            rows = self.table.rows_where(
                "user_id IN (SELECT value FROM json_each(?))", [json.dumps(user_ids)]
            )
            return {row["user_id"]: json.loads(row["user_metadata"]) for row in rows}

    def fill(self, users: Mapping[str, Metadata]) -> None:
        self.table.upsert_all({"user_id": user, "user_metadata": users[user]} for user in users)

    def close(self) -> None:
        self.database.close()


class Base(DeclarativeBase):
    """SQLAlchemy's declarations."""


class Row(Base):
    """A user's row, with SQLAlchemy's JSON column."""

    __tablename__ = "user_metadata"
    app_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    user_id: Mapped[str] = mapped_column(String(255), primary_key=True)
    user_metadata: Mapped[Metadata] = mapped_column(JSON)


def tune(engine: Engine) -> None:
    """Begin transactions as writers, as SQLAlchemy's page on SQLite shows."""

    @event.listens_for(engine, "connect")
    def connect(connection: Any, record: object) -> None:
        connection.isolation_level = None
        with closing(connection.cursor()) as cursor:
            cursor.execute("PRAGMA journal_mode = WAL")
            cursor.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        if connection.get_execution_options().get("isolation_level") != "AUTOCOMMIT":
            connection.exec_driver_sql("BEGIN IMMEDIATE")


class SQLAlchemy:
    """SQLAlchemy 2: a session and a JSON column."""

    name = "SQLAlchemy 2"

    def __init__(self, folder: Path) -> None:
        self.engine = create_engine(f"sqlite:///{folder}/sqlalchemy.db")
        tune(self.engine)
        self.reading = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        Base.metadata.create_all(self.engine)
        self.lock = threading.Lock()

    def get(self, user_id: str) -> Metadata:
        with Session(self.reading) as session:
            row = session.get(Row, (APP, user_id))
            return row.user_metadata if row else {}

    def update(self, user_id: str, update: Metadata) -> Metadata:
        with self.lock, Session(self.engine) as session, session.begin():
            row = session.get(Row, (APP, user_id))
            if row is None:
                row = Row(app_id=APP, user_id=user_id, user_metadata={})
                session.add(row)
            row.user_metadata = merged = merge(row.user_metadata, update)
            return merged

    def get_many(self, user_ids: list[str]) -> dict[str, Metadata]:
        with Session(self.reading) as session:
            query = select(Row).where(Row.app_id == APP, Row.user_id.in_(user_ids))
            return {row.user_id: row.user_metadata for row in session.scalars(query)}

    def fill(self, users: Mapping[str, Metadata]) -> None:
        with Session(self.engine) as session, session.begin():
            session.add_all(
                Row(app_id=APP, user_id=user, user_metadata=users[user]) for user in users
            )

    def close(self) -> None:
        self.engine.dispose()


class DiskCache:
    """diskcache: read, merge and store inside ``transact``."""

    name = "diskcache"

    def __init__(self, folder: Path) -> None:
        # By default synchronous=NORMAL, and large values are separate files, without fsync.
        self.cache: Any = diskcache.Cache(
            str(folder / "diskcache"), sqlite_synchronous=2, disk_min_file_size=2**24
        )
        self.lock = threading.Lock()

    def get(self, user_id: str) -> Metadata:
        metadata: Metadata = self.cache.get(user_id, {})
        return metadata

    def update(self, user_id: str, update: Metadata) -> Metadata:
        with self.lock, self.cache.transact():
            self.cache[user_id] = merged = merge(self.cache.get(user_id, {}), update)
        return merged

    def get_many(self, user_ids: list[str]) -> dict[str, Metadata]:
        with self.cache.transact():
            return {user_id: self.cache[user_id] for user_id in user_ids}

    def fill(self, users: Mapping[str, Metadata]) -> None:
        with self.cache.transact():
            for user_id, metadata in users.items():
                self.cache[user_id] = metadata

    def close(self) -> None:
        self.cache.close()


class SqliteDict:
    """sqlitedict: a dictionary under a lock, with commits that wait for the disk."""

    name = "sqlitedict"

    def __init__(self, folder: Path) -> None:
        self.dict: Any = sqlitedict.SqliteDict(
            str(folder / "sqlitedict.db"),
            journal_mode="WAL",
            encode=json.dumps,
            decode=json.loads,
        )
        self.dict.conn.execute("PRAGMA synchronous = FULL")  # it switches synchronous off
        self.lock = threading.Lock()

    def get(self, user_id: str) -> Metadata:
        metadata: Metadata = self.dict.get(user_id, {})
        return metadata

    def update(self, user_id: str, update: Metadata) -> Metadata:
        with self.lock:
            self.dict[user_id] = merged = merge(self.dict.get(user_id, {}), update)
            self.dict.commit(blocking=True)
        return merged

    def get_many(self, user_ids: list[str]) -> dict[str, Metadata]:
        return {user_id: self.dict[user_id] for user_id in user_ids}

    def fill(self, users: Mapping[str, Metadata]) -> None:
        self.dict.update(users)
        self.dict.commit(blocking=True)

    def close(self) -> None:
        self.dict.close()


class TinyDB:
    """TinyDB: a JSON file that each update rewrites, under a lock."""

    name = "TinyDB"

    def __init__(self, folder: Path) -> None:
        self.database = tinydb.TinyDB(folder / "tinydb.json")
        self.lock = threading.Lock()

    def get(self, user_id: str) -> Metadata:
        with self.lock:
            return self.read([user_id]).get(user_id, {})

    def read(self, user_ids: Iterable[str]) -> dict[str, Metadata]:
        wanted = set(user_ids)
        is_wanted: Any = wanted.__contains__
        found = self.database.search(tinydb.where("user_id").test(is_wanted))
        return {row["user_id"]: row["user_metadata"] for row in found}

    def update(self, user_id: str, update: Metadata) -> Metadata:
        with self.lock:
            merged = merge(self.read([user_id]).get(user_id, {}), update)
            self.database.upsert(
                {"user_id": user_id, "user_metadata": merged}, tinydb.where("user_id") == user_id
            )
        return merged

    def get_many(self, user_ids: list[str]) -> dict[str, Metadata]:
        with self.lock:
            return self.read(user_ids)

    def fill(self, users: Mapping[str, Metadata]) -> None:
        self.database.insert_multiple(
            {"user_id": user, "user_metadata": users[user]} for user in users
        )

    def close(self) -> None:
        self.database.close()


BLOCKING: list[Any] = [
    Usermetadata,
    Sqlite3,
    SqliteUtils,
    SQLAlchemy,
    DiskCache,
    SqliteDict,
    TinyDB,
]


class AsyncUsermetadata:
    """This library, through ``usermetadata.asyncio``."""

    name = "usermetadata"
    storage: SQLiteStorage | PostgresStorage

    async def open(self, place: Any) -> None:
        self.storage = SQLiteStorage(place / "usermetadata.db")
        init(self.storage)

    async def get(self, user_id: str) -> Metadata:
        return (await aio.get_user_metadata(user_id)).metadata

    async def update(self, user_id: str, update: Metadata) -> Metadata:
        return (await aio.update_user_metadata(user_id, update)).metadata

    async def close(self) -> None:
        UserMetadataRecipe.reset()
        self.storage.close()


class ThreadHop:
    """sqlite3 by hand: each call hops to one of two threads, a reader and a writer.

    An executor's queue is the lock: from 8 tasks on, it is faster than ``asyncio.to_thread`` with a
    ``threading.Lock`` or an ``asyncio.Lock``.
    """

    name = "sqlite3, a thread hop per call"

    async def open(self, folder: Path) -> None:
        self.blocking = Sqlite3(folder)
        self.reader, self.writer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    async def get(self, user_id: str) -> Metadata:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.reader, self.blocking.get, user_id)

    async def update(self, user_id: str, update: Metadata) -> Metadata:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.writer, self.blocking.update, user_id, update)

    async def close(self) -> None:
        self.reader.shutdown()
        self.writer.shutdown()
        self.blocking.close()


class AioSqlite:
    """aiosqlite by hand: one connection to read, and one to write under a lock."""

    name = "aiosqlite"

    async def open(self, folder: Path) -> None:
        self.reader = await self.connect(folder)
        self.writer = await self.connect(folder)
        self.lock = asyncio.Lock()
        await self.writer.execute(CREATE)

    async def connect(self, folder: Path) -> aiosqlite.Connection:
        connection = await aiosqlite.connect(folder / "aiosqlite.db", isolation_level=None)
        await connection.execute("PRAGMA journal_mode = WAL")
        await connection.execute("PRAGMA synchronous = FULL")
        return connection

    async def get(self, user_id: str) -> Metadata:
        rows = list(await self.reader.execute_fetchall(SELECT, (APP, user_id)))
        return json.loads(rows[0][0]) if rows else {}

    async def update(self, user_id: str, update: Metadata) -> Metadata:
        async with self.lock:
            await self.writer.execute("BEGIN IMMEDIATE")
            try:
                rows = list(await self.writer.execute_fetchall(SELECT, (APP, user_id)))
                merged = merge(json.loads(rows[0][0]) if rows else {}, update)
                await self.writer.execute(UPSERT, (APP, user_id, json.dumps(merged)))
                await self.writer.execute("COMMIT")
            except BaseException:
                await self.writer.execute("ROLLBACK")
                raise
            return merged

    async def close(self) -> None:
        await self.reader.close()
        await self.writer.close()


class AsyncSQLAlchemy:
    """SQLAlchemy's asyncio session over aiosqlite."""

    name = "SQLAlchemy 2"

    async def open(self, folder: Path) -> None:
        # SQLite allows one writer at a time: without the lock the others fail, or poll.
        self.engine = create_async_engine(f"sqlite+aiosqlite:///{folder}/sqlalchemy.db")
        tune(self.engine.sync_engine)
        self.reading = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        self.lock = asyncio.Lock()
        async with self.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)

    async def get(self, user_id: str) -> Metadata:
        async with AsyncSession(self.reading) as session:
            row = await session.get(Row, (APP, user_id))
            return row.user_metadata if row else {}

    async def update(self, user_id: str, update: Metadata) -> Metadata:
        async with self.lock, AsyncSession(self.engine) as session, session.begin():
            row = await session.get(Row, (APP, user_id))
            if row is None:
                row = Row(app_id=APP, user_id=user_id, user_metadata={})
                session.add(row)
            row.user_metadata = merged = merge(row.user_metadata, update)
            return merged

    async def close(self) -> None:
        await self.engine.dispose()


class KeyValue:
    """py-key-value-aio's disk store, which has no atomic update: under a lock."""

    name = "py-key-value-aio"

    async def open(self, folder: Path) -> None:
        cache = diskcache.Cache(
            str(folder / "key_value"), sqlite_synchronous=2, disk_min_file_size=2**24
        )
        self.store = DiskStore(disk_cache=cache)
        self.lock = asyncio.Lock()

    async def get(self, user_id: str) -> Metadata:
        return await self.store.get(user_id) or {}

    async def update(self, user_id: str, update: Metadata) -> Metadata:
        async with self.lock:
            merged = merge(await self.get(user_id), update)
            await self.store.put(user_id, merged)
        return merged

    async def close(self) -> None:
        await self.store.close()


CONCURRENT: list[Any] = [AsyncUsermetadata, ThreadHop, AioSqlite, AsyncSQLAlchemy, KeyValue]
