"""A complete storage: Redis, through redis-py.

An acknowledged write is on disk only if the server runs with ``appendonly yes`` and ``appendfsync
always``. The server must not evict: ``maxmemory-policy noeviction``, its default.
"""

import copy
import random
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError
from redis.retry import Retry

from usermetadata import (
    DamagedMetadataError,
    OutcomeUnknownError,
    StorageBusyError,
    StorageError,
    StorageUnavailableError,
    UsageError,
)
from usermetadata.changes import BLIND, Change, apply_in_order
from usermetadata.codec import Metadata, decode_metadata, encode_metadata
from usermetadata.validation import check_app_id

CHUNK = 10_000
# An app's rows are one hash, so no id can be taken for a part of another; a sorted set lists them.
# For each user: the id; the text that was read, which must still be there; the new text. An empty
# text stands for no row, and "*" for any.
COMPARE_AND_SET = """
for i = 1, #ARGV, 3 do
    local read = ARGV[i + 1]
    if read ~= '*' and read ~= (redis.call('HGET', KEYS[1], ARGV[i]) or '') then return 0 end
end
for i = 1, #ARGV, 3 do
    if ARGV[i + 2] == '' then
        redis.call('HDEL', KEYS[1], ARGV[i])
        redis.call('ZREM', KEYS[2], ARGV[i])
    else
        redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 2])
        redis.call('ZADD', KEYS[2], 0, ARGV[i])
    end
end
return 1
"""


@contextmanager
def our_errors(*, is_sent: bool = False) -> Generator[None]:
    """Translate redis-py's errors; ``is_sent``: a write was sent, and its answer is missing."""
    try:
        yield
    except BusyLoadingError as error:
        raise StorageUnavailableError("Redis: it is loading its data; repeat it") from error
    except (redis.ConnectionError, redis.TimeoutError) as error:
        if is_sent:
            text = "Redis: the connection was lost after a write was sent; read what was stored"
            raise OutcomeUnknownError(text) from error
        raise StorageUnavailableError(f"Redis: {error}; check that the server runs") from error
    except redis.RedisError as error:
        raise StorageError(f"Redis: {error}; check the server's settings") from error


def decode(user_id: str, text: bytes) -> Metadata:
    try:
        return decode_metadata(text.decode())
    except ValueError as error:
        reason = f"row of user {user_id!r}: {error}"
        raise DamagedMetadataError(reason, user_id) from error


class RedisStorage:
    """Keeps metadata in Redis.

    Args:
        url: ``redis://:password@host:6379/0``, ``rediss://...`` or ``unix://...``.
        timeout: seconds to wait for an answer, and for a quiet moment between other writers.
        app_id: the app whose rows these are.
    """

    reads_in_flight = writes_in_flight = 4

    def __init__(self, url: str, *, timeout: float = 30, app_id: str = "public") -> None:
        self._app_id, self._timeout = check_app_id(app_id), timeout
        # Nothing is repeated by the driver: a write that was sent may have been done. After a fork
        # the pool makes new connections.
        self._pool = redis.ConnectionPool.from_url(
            url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0)
        )
        self._closed = threading.Event()

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        texts = self._texts(user_ids)
        return {user_id: decode(user_id, text) for user_id, text in texts.items()}

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        after = f"({user_id}" if user_id else "-"
        with self._client() as client, our_errors():
            found: list[Any] = client.zrangebylex(self._keys[1], after, "+", 0, limit)
        return self.read([each.decode() for each in found])

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        read = list(
            dict.fromkeys(user for user, change in changes if not isinstance(change, BLIND))
        )
        written = list(dict.fromkeys(user for user, _ in changes))
        deadline = time.monotonic() + self._timeout
        pause = 0.001
        while True:
            before = self._texts(read)
            texts = dict(before)
            results = apply_in_order(
                changes, texts, decode=decode, encode=lambda new: encode_metadata(new).encode()
            )
            expected = dict.fromkeys(written, b"*") | dict.fromkeys(read, b"") | before
            if self._set({user: (expected[user], texts.get(user, b"")) for user in written}):
                return results
            if time.monotonic() > deadline:
                raise StorageBusyError("Redis: other writers were always quicker; repeat it")
            time.sleep(random.uniform(0, pause))
            pause = min(2 * pause, 0.1)

    def for_app(self, app_id: str) -> "RedisStorage":
        other = copy.copy(self)
        other._app_id = check_app_id(app_id)
        return other

    def close(self) -> None:
        self._closed.set()
        self._pool.disconnect(inuse_connections=False)  # a call that uses one closes it

    @property
    def _keys(self) -> tuple[str, str]:
        return f"usermetadata:rows:{self._app_id}", f"usermetadata:ids:{self._app_id}"

    @contextmanager
    def _client(self) -> Generator[redis.Redis]:
        if self._closed.is_set():
            raise UsageError("this RedisStorage is closed")
        try:
            yield redis.Redis(connection_pool=self._pool)
        finally:
            if self._closed.is_set():
                self.close()

    def _texts(self, user_ids: Sequence[str]) -> dict[str, bytes]:
        """Read rows, all as of one moment."""
        with self._client() as client, our_errors():
            pipeline = client.pipeline(transaction=True)
            for start in range(0, len(user_ids), CHUNK):
                pipeline.hmget(self._keys[0], user_ids[start : start + CHUNK])
            found = [text for chunk in pipeline.execute() for text in chunk]
        return {user: text for user, text in zip(user_ids, found, strict=True) if text is not None}

    def _set(self, rows: dict[str, tuple[bytes, bytes]]) -> bool:
        """Store rows if those that were read are unchanged."""
        arguments = [part for user, (read, new) in rows.items() for part in (user, read, new)]
        with self._client():
            with our_errors():
                connection = self._pool.get_connection()  # it connects, or finds a dead connection
            try:
                with our_errors(is_sent=True):
                    connection.send_command("EVAL", COMPARE_AND_SET, 2, *self._keys, *arguments)
                    return bool(connection.read_response())
            except BaseException:
                connection.disconnect()  # an answer may still come
                raise
            finally:
                self._pool.release(connection)
