"""The conformance suite: every storage passes it, and every planted fault fails it."""

from __future__ import annotations

import contextlib
import copy
import sqlite3
import threading
import time
import unicodedata
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from postgres_server import empty_schema, server_url
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlite_utils import Database

from usermetadata import InMemoryStorage, PostgresStorage, SQLiteStorage, UsageError
from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.codec import decode_metadata, encode_metadata
from usermetadata.testing import BreakingProxy, StorageConformance

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from pathlib import Path
    from typing import Self

    from usermetadata import Storage
    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.testing.process import OtherProcess


KINDS = [
    *("memory", "memory, indexed", "sqlite file, indexed", "sqlite memory", "sqlite borrowed"),
    *("postgres", "postgres, indexed"),
]


class TestEveryStorage(StorageConformance):
    """All storages keep all promises; those of a server also if connections break."""

    @pytest.fixture(params=KINDS)
    def opened(
        self,
        request: pytest.FixtureRequest,
        tmp_path: Path,
        usermetadata_process: OtherProcess,
        proxy: BreakingProxy,
    ) -> Generator[Opened, None, None]:
        with contextlib.ExitStack() as stack:
            kind, _, indexed = request.param.partition(", ")
            arguments: dict[str, Any] = {"indexes": self.indexes} if indexed else {}
            opened = Opened(InMemoryStorage(**arguments))
            if kind == "sqlite file":
                path = tmp_path / "users.db"
                opened = Opened(
                    SQLiteStorage(path, **arguments),
                    lambda: usermetadata_process.open(SQLiteStorage, path, **arguments),
                )
            elif kind == "sqlite memory":
                opened = Opened(SQLiteStorage(":memory:", **arguments))
            elif kind == "sqlite borrowed":
                connection = sqlite3.connect(":memory:", check_same_thread=False)
                stack.enter_context(contextlib.closing(connection))
                opened = Opened(SQLiteStorage(Database(connection), **arguments))
            elif kind == "postgres":
                arguments["schema"] = stack.enter_context(empty_schema())
                opened = Opened(
                    PostgresStorage(through(proxy), **arguments),
                    lambda: usermetadata_process.open(PostgresStorage, server_url(), **arguments),
                    proxy,
                )
            stack.enter_context(contextlib.closing(opened.storage))
            yield opened

    @pytest.fixture
    def storage(self, opened: Opened) -> Storage:
        return opened.storage

    @pytest.fixture
    def second_storage(self, opened: Opened) -> Generator[Storage, None, None]:
        if opened.open_second is None:
            pytest.skip("no second storage can have these rows")
        with contextlib.closing(opened.open_second()) as storage:
            yield storage

    @pytest.fixture
    def break_connection(self, opened: Opened) -> Any:
        if opened.proxy is None:
            pytest.skip("there is no connection")
        return opened.proxy.break_connection


class Opened(NamedTuple):
    storage: Storage
    open_second: Callable[[], Storage] | None = None
    proxy: BreakingProxy | None = None


@pytest.fixture(scope="module")
def proxy() -> Generator[BreakingProxy, None, None]:
    """A network between the storage and the PostgreSQL server."""
    options = conninfo_to_dict(server_url())
    host, port = str(options.get("host") or "/var/run/postgresql"), options.get("port") or 5432
    unix = host.startswith("/")
    address = f"{host}/.s.PGSQL.{port}" if unix else (host, int(port))
    with contextlib.closing(BreakingProxy(address)) as proxy:
        yield proxy


def through(proxy: BreakingProxy) -> str:
    """Return the server's URL, with the proxy in between."""
    return make_conninfo(
        server_url(), host=proxy.host, port=proxy.port, sslmode="disable", gssencmode="disable"
    )


class AbsentIsEmpty(InMemoryStorage):
    """Returns ``{}`` for a user without a row."""

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        found = super().read(user_ids)
        return {user_id: found.get(user_id, {}) for user_id in user_ids}


class EmptyIsAbsent(InMemoryStorage):
    """Treats ``{}`` as no row."""

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        return {user_id: found for user_id, found in super().read(user_ids).items() if found}


class ClearsToEmpty(InMemoryStorage):
    """Stores ``{}`` instead of removing a row."""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        def at_least_empty(change: Change, old: Metadata | None) -> Metadata:
            return change(old) or {}

        return super().write([(user, partial(at_least_empty, change)) for user, change in changes])


class ReadsFewUsers(InMemoryStorage):
    """Stops reading after 500 users."""

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        return super().read(user_ids[:500])


class MergesDeeply(InMemoryStorage):
    """Merges natively, and wrongly: as in RFC 7396."""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        def patched(change: Change) -> Change:
            if isinstance(change, Merge):
                return lambda old: self._patch(old or {}, change.update)
            return change

        return super().write([(user_id, patched(change)) for user_id, change in changes])

    def _patch(self, old: Any, update: Any) -> Any:
        if not isinstance(update, dict):
            return update
        patched = dict(old) if isinstance(old, dict) else {}
        for name, value in update.items():
            patched[name] = self._patch(patched.get(name), value)
        return {name: value for name, value in patched.items() if value is not None}


class ReplaceMerges(InMemoryStorage):
    """Treats ``Replace`` as ``Merge``."""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        return super().write(
            [
                (user_id, Merge(change.metadata) if isinstance(change, Replace) else change)
                for user_id, change in changes
            ]
        )


class ModifiesNothing(InMemoryStorage):
    """Passes ``{}`` to every ``Modify``."""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        def of_nothing(change: Change, old: Metadata | None) -> Metadata | None:
            return change({} if isinstance(change, Modify) else old)

        return super().write([(user, partial(of_nothing, change)) for user, change in changes])


class KnowsOnlyItsChanges(InMemoryStorage):
    """Does not call changes of unknown classes."""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        known = (Merge, Replace, Clear, Modify)
        return super().write(
            [
                (user_id, change if isinstance(change, known) else (lambda old: old))
                for user_id, change in changes
            ]
        )


class WritesBackwards(InMemoryStorage):
    """Applies the last change first."""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        return super().write(changes[::-1])[::-1]


class OneChangePerUser(InMemoryStorage):
    """Passes the state before the write to all changes."""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        before = self.read([user_id for user_id, _ in changes])

        def of_before(user_id: str, change: Change, old: Metadata | None) -> Metadata | None:
            return change(before.get(user_id))

        return super().write(
            [(user_id, partial(of_before, user_id, change)) for user_id, change in changes]
        )


class FailsOnNothing(InMemoryStorage):
    """Fails on an empty write."""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        return super().write([changes[0], *changes[1:]])


class RoundsNumbers(InMemoryStorage):
    """Keeps numbers as JavaScript would."""

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        return {user_id: self._round(found) for user_id, found in super().read(user_ids).items()}

    def _round(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._round(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self._round(item) for item in value]
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**53:
            return float(value)
        return value


class CutsLargeObjects(InMemoryStorage):
    """Keeps 1,000 properties."""

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        found = super().read(user_ids)
        return {user_id: dict(list(found[user_id].items())[:1000]) for user_id in found}


class OtherIds(InMemoryStorage):
    """Stores ids in another representation."""

    spelling: Callable[[str], str] = str.lower

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        found = super().read([type(self).spelling(user_id) for user_id in user_ids])
        spelt = {user_id: type(self).spelling(user_id) for user_id in user_ids}
        return {user_id: found[key] for user_id, key in spelt.items() if key in found}

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        return super().write(
            [(type(self).spelling(user_id), change) for user_id, change in changes]
        )


class TrimsIds(OtherIds):
    """Stores ids without leading and trailing blanks."""

    spelling = str.strip


class NormalisesIds(OtherIds):
    """Stores ids in a Unicode normal form."""

    spelling = partial(unicodedata.normalize, "NFC")


class Unlocked:
    """Keeps rows in a dict without any lock; the base of faults of concurrency."""

    def __init__(self) -> None:
        self._rows: dict[str, str] = {}

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        return {user: decode_metadata(self._rows[user]) for user in user_ids if user in self._rows}

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        results: list[Metadata | None] = []
        for user_id, change in changes:
            new = change(self.read([user_id]).get(user_id))
            if new is None:
                self._rows.pop(user_id, None)
            else:
                self._rows[user_id] = encode_metadata(new)
            results.append(new)
        return results

    def for_app(self, app_id: str) -> Self:
        return self

    def close(self) -> None:
        pass


class HalfLocked(Unlocked):
    """Holds a lock during a write, but not against readers."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        with self._lock:
            return super().write(changes)


class LetsWritersMeet(Unlocked):
    """Lets two writers read before either writes."""

    def __init__(self) -> None:
        super().__init__()
        self._meeting = threading.Barrier(2)

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        def meet(change: Change, old: Metadata | None) -> Metadata | None:
            with contextlib.suppress(threading.BrokenBarrierError):
                self._meeting.wait(timeout=1)
            return change(old)

        return super().write([(user_id, partial(meet, change)) for user_id, change in changes])


class LeavesItselfLocked(InMemoryStorage):
    """Refuses writes after one has failed."""

    failed = False

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        assert not self.failed, "a lock that is never released"
        self.failed = True
        results = super().write(changes)
        self.failed = False
        return results


class WrapsErrors(InMemoryStorage):
    """Replaces a change's exception by another error."""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        try:
            return super().write(changes)
        except LookupError as error:
            raise LookupError("a change failed") from error


class BoundToOneThread(InMemoryStorage):
    """Works only in the thread that created it, as an SQLite connection does by default."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        if threading.get_ident() != self._thread:
            return []
        return super().write(changes)


class AcknowledgesEarly(InMemoryStorage):
    """Answers at once, and stores with the next call that writes."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[tuple[str, Change]] = []

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        super().write(self._waiting)
        self._waiting = list(changes)
        stored = self.read([user_id for user_id, _ in changes])
        return [change(stored.get(user_id)) for user_id, change in changes]


class NeverCommits(InMemoryStorage):
    """Shows what was written only to the thread that wrote it."""

    def __init__(self) -> None:
        super().__init__()
        self._of_thread: dict[int, InMemoryStorage] = {}

    def _own(self) -> InMemoryStorage:
        return self._of_thread.setdefault(threading.get_ident(), InMemoryStorage())

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        return self._own().read(user_ids)

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        return self._own().write(changes)


class AnswersWhatWasDropped(InMemoryStorage):
    """Does not notice that its database keeps the rows it has, as a trigger may do."""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        stored = self.read([user_id for user_id, _ in changes])
        super().write([change for change in changes if change[0] not in stored])
        return [change(stored.get(user_id)) for user_id, change in changes]


class ReadsElsewhere(InMemoryStorage):
    """Says that it never waits, and a read waits as for a server."""

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        time.sleep(0.001)
        return super().read(user_ids)


class WritesElsewhere(InMemoryStorage):
    """Says that it never waits, and a write waits as for a disk."""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        time.sleep(0.001)
        return super().write(changes)


class SharesWithin(InMemoryStorage):
    """Returns one list where two that are equal were stored."""

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        found = super().read(user_ids)
        for metadata in found.values():
            lists = {repr(value): value for value in metadata.values()}
            metadata.update({name: lists[repr(value)] for name, value in metadata.items()})
        return found


class SharesObjects(Unlocked):
    """Keeps the objects themselves instead of copies."""

    def __init__(self) -> None:
        super().__init__()
        self._objects: dict[str, Metadata] = {}

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        return {user: self._objects[user] for user in user_ids if user in self._objects}

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        results: list[Metadata | None] = []
        for user_id, change in changes:
            new = change(self._objects.get(user_id))
            if new is not None:
                self._objects[user_id] = new
            results.append(new)
        return results


class DecodesOnce(InMemoryStorage):
    """Returns the result of each user's last change without copying it."""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        metadata: dict[str, Any] = {}
        results: list[Metadata | None] = []
        for result, (user_id, _) in zip(super().write(changes), changes, strict=True):
            results.append({**result, **metadata.get(user_id, {})} if result else result)
            metadata[user_id] = results[-1]
        return results


class ForgetsApps(InMemoryStorage):
    """Shows every app the same rows."""

    def for_app(self, app_id: str) -> Self:
        super().for_app(app_id)
        return self


class ForgetsWhichApp(InMemoryStorage):
    """Makes a new store for every app, each time."""

    def for_app(self, app_id: str) -> Self:
        super().for_app(app_id)
        return type(self)()


class TakesAnyApp(Unlocked):
    """Does not check app ids."""


class JoinsTheIds(InMemoryStorage):
    """Uses the concatenation of app id and user id as the key."""

    prefix = "public"

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        found = super().read([self.prefix + user_id for user_id in user_ids])
        return {key[len(self.prefix) :]: metadata for key, metadata in found.items()}

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        return super().write([(self.prefix + user_id, change) for user_id, change in changes])

    def for_app(self, app_id: str) -> Self:
        other = copy.copy(self)
        other.prefix = app_id
        return other


class FoldsApps(InMemoryStorage):
    """Ignores the case of app ids."""

    def for_app(self, app_id: str) -> Self:
        return super().for_app(app_id.lower())


class ReadsOneByOne(InMemoryStorage):
    """Pauses between the users of a read."""

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        found: dict[str, Metadata] = {}
        for user_id in user_ids:
            found.update(super().read([user_id]))
            threading.Event().wait(0.002)  # other writes in this pause are the fault
        return found


class StoresWhatWasInterrupted(Unlocked):
    """Undoes a write after errors, but not after interrupts."""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        before = dict(self._rows)
        try:
            return super().write(changes)
        except Exception:
            self._rows = before
            raise


class MergesByItself(InMemoryStorage):
    """Executes ``Merge`` in two steps, a read and a write."""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        if [type(change) for _, change in changes] != [Merge]:
            return super().write(changes)
        [(user_id, change)] = changes
        old = self.read([user_id]).get(user_id)
        self._meet()
        new = change(old)
        return super().write([(user_id, Replace(new or {}))])

    def __init__(self) -> None:
        super().__init__()
        self._meeting = threading.Barrier(2)

    def _meet(self) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            self._meeting.wait(timeout=1)


class ClosesItsOwnAppOnly(InMemoryStorage):
    """Leaves the storage of the first app open."""

    def for_app(self, app_id: str) -> Self:
        other = super().for_app(app_id)
        if app_id != "public":
            other._store = InMemoryStorage()._store  # pyright: ignore[reportPrivateUsage]
        return other


class NeverCloses(InMemoryStorage):
    """Works after ``close``."""

    def close(self) -> None:
        pass


class ClosesOnce(InMemoryStorage):
    """Cannot be closed twice."""

    def close(self) -> None:
        self.read([])
        super().close()


# The tests of the suite, and the faulty storages that must fail each.
PLANTED_FAULTS: dict[str, list[Callable[[], Storage]]] = {
    "test_a_user_without_a_row_is_absent": [AbsentIsEmpty],
    "test_an_empty_object_is_a_row": [EmptyIsAbsent],
    "test_none_removes_the_row": [ClearsToEmpty],
    "test_read_takes_any_number_of_users": [ReadsFewUsers],
    "test_merge_overwrites_root_properties": [MergesDeeply],
    "test_replace_forgets_what_was_there": [ReplaceMerges],
    "test_modify_is_given_the_stored_metadata": [ModifiesNothing],
    "test_any_callable_is_a_change": [KnowsOnlyItsChanges],
    "test_changes_apply_in_order": [WritesBackwards, OneChangePerUser],
    "test_writing_nothing_is_nothing": [FailsOnNothing],
    "test_values_come_back_exactly": [RoundsNumbers],
    "test_large_objects_come_back_exactly": [CutsLargeObjects],
    "test_user_ids_are_told_apart": [OtherIds, TrimsIds, NormalisesIds],
    "test_a_failing_change_undoes_the_whole_write": [
        Unlocked,
        WrapsErrors,
        StoresWhatWasInterrupted,
    ],
    "test_a_storage_works_after_a_failed_write": [LeavesItselfLocked],
    "test_no_write_comes_between": [Unlocked],
    "test_a_reader_sees_all_of_a_write_or_nothing": [HalfLocked],
    "test_any_thread_may_use_the_storage": [BoundToOneThread],
    "test_what_was_acknowledged_is_stored": [
        AcknowledgesEarly,
        NeverCommits,
        AnswersWhatWasDropped,
    ],
    "test_concurrent_writes_are_all_kept": [LetsWritersMeet],
    "test_a_storage_that_never_waits_does_not_block": [ReadsElsewhere, WritesElsewhere],
    "test_what_appears_twice_is_two": [SharesWithin],
    "test_what_read_returns_is_the_callers": [SharesObjects],
    "test_what_write_returns_is_the_callers": [SharesObjects],
    "test_results_share_nothing": [DecodesOnce],
    "test_what_a_change_returned_is_its_own": [SharesObjects],
    "test_what_a_change_is_given_is_its_own": [SharesObjects],
    "test_two_first_merges_both_survive": [MergesByItself],
    "test_a_read_is_of_one_moment": [ReadsOneByOne],
    "test_apps_are_told_apart": [JoinsTheIds, FoldsApps],
    "test_apps_never_see_each_others_rows": [ForgetsApps],
    "test_an_app_is_found_again": [ForgetsWhichApp],
    "test_an_app_id_is_checked": [TakesAnyApp],
    "test_a_closed_storage_says_so": [NeverCloses, ClosesOnce, ClosesItsOwnAppOnly],
}
# The arguments besides ``storage``, if a test has any.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "test_values_come_back_exactly": {"value": 2**53 + 1},
    "test_no_write_comes_between": {"row": True},
    "test_a_failing_change_undoes_the_whole_write": {"error": LookupError()},
    "test_a_closed_storage_says_so": {"which": "the other"},
}
# The arguments with which only one fault is found.
SPECIAL: dict[Any, dict[str, Any]] = {
    StoresWhatWasInterrupted: {"error": KeyboardInterrupt()},
}


@pytest.mark.parametrize(
    ("test", "fault"),
    [(test, fault) for test, faults in PLANTED_FAULTS.items() for fault in faults],
)
def test_a_planted_fault_fails_the_suite(test: str, fault: Callable[[], Storage]) -> None:
    """The suite finds a storage that breaks a promise, by the test for that promise."""
    with pytest.raises((AssertionError, IndexError, UsageError, pytest.fail.Exception)):
        getattr(StorageConformance(), test)(fault(), **SPECIAL.get(fault, ARGUMENTS.get(test, {})))


def test_every_promise_has_a_planted_fault() -> None:
    """Every test of the suite can fail."""
    tests = {name for name in vars(StorageConformance) if name.startswith("test_")}
    assert tests == set(PLANTED_FAULTS)
