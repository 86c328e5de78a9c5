"""A complete storage: a model of Django's ORM, on SQLite or PostgreSQL.

In a project the model is in the ``models.py`` of an app, and ``migrate`` creates its table. Inside
``transaction.atomic`` a call is part of that transaction.
"""

import copy
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from django.db import DatabaseError, InterfaceError, connections, models
from django.db.transaction import atomic

from usermetadata import (
    DamagedMetadataError,
    OutcomeUnknownError,
    StorageBusyError,
    StorageError,
    StorageUnavailableError,
    UsageError,
)
from usermetadata.changes import Change, apply_in_order
from usermetadata.codec import Metadata, decode_metadata, encode_metadata
from usermetadata.validation import check_app_id

R = TypeVar("R")
ATTEMPTS, CHUNK, READ, WRITE = 8, 500, "REPEATABLE READ", "READ COMMITTED"
NEW = "new"  # the text of a user who has no row yet and is locked
BUSY, UNDONE = {5, "55P03"}, {"40001", "40P01"}  # the codes of SQLite and PostgreSQL


class UserMetadata(models.Model):
    app_id = models.CharField(max_length=64)
    user_id = models.CharField(max_length=255)
    metadata = models.TextField()

    class Meta:
        app_label = "metadata"
        constraints = (
            models.UniqueConstraint(fields=["app_id", "user_id"], name="one_row_per_user"),
        )


class UndoneError(StorageBusyError):
    """The database has undone the transaction; another attempt may succeed."""


@contextmanager
def our_errors(otherwise: type[StorageError] = StorageError) -> Generator[None]:
    try:
        yield
    except (DatabaseError, InterfaceError) as error:
        codes = {getattr(error.__cause__, name, None) for name in ("sqlite_errorcode", "sqlstate")}
        text = f"{type(error).__name__}, which is the cause of this error"
        if codes & BUSY:
            raise StorageBusyError(f"{text}: timed out waiting for a lock; repeat it") from error
        if codes & UNDONE:
            raise UndoneError(f"{text}: nothing was stored; repeat it") from error
        raise otherwise(f"{text}; check the database") from error


def decode(user_id: str, text: str) -> Metadata:
    try:
        return decode_metadata(text)
    except ValueError as error:
        raise DamagedMetadataError(f"row of user {user_id!r}: {error}", user_id) from error


def chunks(user_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (user_ids[start : start + CHUNK] for start in range(0, len(user_ids), CHUNK))


class DjangoStorage:
    """Keeps metadata in the table of ``UserMetadata``.

    Args:
        using: the alias of the database.
        app_id: the app whose rows these are.
    """

    reads_in_flight = writes_in_flight = 4

    def __init__(self, *, using: str = "default", app_id: str = "public") -> None:
        self._using, self._app_id = using, check_app_id(app_id)
        self._closed = threading.Event()

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        texts = self._in_transaction(READ, lambda: self._texts(user_ids))
        return {user_id: decode(user_id, text) for user_id, text in texts.items()}

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        later = self._rows(user_id__gt=user_id).order_by("user_id")[:limit]
        texts = self._in_transaction(READ, lambda: dict(later.values_list("user_id", "metadata")))
        return {user_id: decode(user_id, text) for user_id, text in texts.items()}

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        user_ids = sorted({user_id for user_id, _ in changes})  # one order, so no deadlocks

        def work() -> list[Metadata | None]:
            # Locks the users. One without a row gets one, which no other transaction sees.
            self._upsert("app_id", dict.fromkeys(user_ids, NEW))
            found = self._texts(user_ids)
            texts = {user_id: text for user_id, text in found.items() if text != NEW}
            results = apply_in_order(changes, texts, decode=decode, encode=encode_metadata)
            self._upsert("metadata", texts)
            with our_errors():
                for chunk in chunks([user_id for user_id in user_ids if user_id not in texts]):
                    self._rows(user_id__in=chunk).delete()
            return results

        return self._in_transaction(WRITE, work)

    def for_app(self, app_id: str) -> "DjangoStorage":
        other = copy.copy(self)
        other._app_id = check_app_id(app_id)
        return other

    def close(self) -> None:
        self._closed.set()  # the connections are Django's

    def _rows(self, **where: object) -> "models.QuerySet[UserMetadata]":
        return UserMetadata.objects.using(self._using).filter(app_id=self._app_id, **where)

    def _texts(self, user_ids: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        with our_errors():
            for chunk in chunks(user_ids):
                rows = self._rows(user_id__in=chunk)
                found.update(rows.values_list("user_id", "metadata"))
        return found

    def _upsert(self, column: str, texts: dict[str, str]) -> None:
        rows = [
            UserMetadata(app_id=self._app_id, user_id=user_id, metadata=texts[user_id])
            for user_id in texts
        ]
        with our_errors():
            UserMetadata.objects.using(self._using).bulk_create(
                rows,
                update_conflicts=True,
                unique_fields=["app_id", "user_id"],
                update_fields=[column],
            )

    def _in_transaction(self, level: str, work: Callable[[], R]) -> R:
        for attempt in range(1, ATTEMPTS):
            try:
                return self._try(level, work)
            except UndoneError:
                if connections[self._using].in_atomic_block:
                    raise  # the caller's transaction was undone
                time.sleep(random.uniform(0, 0.02 * attempt))
        return self._try(level, work)

    def _try(self, level: str, work: Callable[[], R]) -> R:
        if self._closed.is_set():
            raise UsageError("this DjangoStorage is closed")
        connection = connections[self._using]  # that of this thread
        was_open = connection.connection is not None
        is_outermost = not connection.in_atomic_block
        try:
            with our_errors(StorageUnavailableError):
                connection.ensure_connection()
            # What the statements raise was translated before: this is an error of COMMIT.
            with our_errors(OutcomeUnknownError), atomic(using=self._using):
                if is_outermost and connection.vendor == "postgresql":
                    with our_errors(), connection.cursor() as cursor:
                        cursor.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
                return work()
        finally:
            # Nothing closes the connections of the worker threads.
            if not was_open:
                connection.close_if_unusable_or_obsolete()
