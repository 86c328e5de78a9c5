"""Storages with one fault each, for the tests of the conformance suite.

The text that a failing test of the suite shows matches ``finds``, if a fault has that.
"""

# pyright: reportPrivateUsage=false
# A fault is put into what a storage does inside.

from __future__ import annotations

import asyncio
import contextlib
import copy
import fnmatch
import re
import sqlite3
import threading
import time
import unicodedata
from collections import defaultdict
from concurrent.futures import Future
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from json_file_storage import JSONFileStorage

from usermetadata import InMemoryStorage, UsageError
from usermetadata.changes import Clear, Merge, Modify, Replace, apply_in_order
from usermetadata.codec import decode_metadata, encode_metadata
from usermetadata.exceptions import (
    NotUniqueError,
    OutcomeUnknownError,
    StorageBusyError,
    StorageError,
    StorageUnavailableError,
)
from usermetadata.indexes import Index, matches
from usermetadata.testing import StorageConformance

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from typing import Self

    from usermetadata import Storage
    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.interfaces import Value
    from usermetadata.testing.proxy import Phase


class Meeting:
    """Lets two threads wait for each other, for a moment."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2)

    def wait(self) -> None:
        """Wait until the other one is here, but only for a moment and once."""
        with contextlib.suppress(threading.BrokenBarrierError):
            self._barrier.wait(timeout=1)

    def before(self, changes: Sequence[tuple[str, Change]]) -> list[tuple[str, Change]]:
        """Return changes that wait first."""

        def meet(change: Change, old: Metadata | None) -> Metadata | None:
            self.wait()
            return change(old)

        return [(user, partial(meet, change)) for user, change in changes]


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
        self._meeting = Meeting()

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        return super().write(self._meeting.before(changes))


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


class CallsChangesInACoroutine(InMemoryStorage):
    """Executes a write, with its changes, as one coroutine, which cannot raise StopIteration."""

    finds = "(?s)coroutine raised StopIteration.*Do not call changes where.*in a coroutine"

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        write = super().write

        async def execute() -> list[Metadata | None]:
            return write(changes)

        return asyncio.run(execute())


class TakesAChangesErrorForItsOwn(InMemoryStorage):
    """Translates the driver's errors and also those of the changes."""

    finds = "StorageError: the connection was lost"

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        try:
            return super().write(changes)
        except OSError as error:
            raise StorageError("the connection was lost") from error


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


class CreatesATableForEachApp(InMemoryStorage):
    """Creates a table for an app at once, which waits for the server."""

    finds = "for_app waits"

    def for_app(self, app_id: str) -> Self:
        time.sleep(0.001)
        return super().for_app(app_id)


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

    separator = ""
    prefix = "public"

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        found = super().read([self.prefix + user_id for user_id in user_ids])
        return {key[len(self.prefix) :]: metadata for key, metadata in found.items()}

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        return super().write([(self.prefix + user_id, change) for user_id, change in changes])

    def for_app(self, app_id: str) -> Self:
        other = copy.copy(self)
        other.prefix = app_id + self.separator
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

    def __init__(self) -> None:
        super().__init__()
        self._meeting = Meeting()

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        if [type(change) for _, change in changes] != [Merge]:
            return super().write(changes)
        [(user_id, change)] = changes
        old = self.read([user_id]).get(user_id)
        self._meeting.wait()
        new = change(old)
        return super().write([(user_id, Replace(new or {}))])


class ClosesItsOwnAppOnly(InMemoryStorage):
    """Leaves the storage of the first app open."""

    def for_app(self, app_id: str) -> Self:
        other = super().for_app(app_id)
        if app_id != "public":
            other._store = InMemoryStorage()._store
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


# Exactness.


class MergesAsDoubles(InMemoryStorage):
    """Merges in a database whose numbers are doubles, and whose empty list is an empty object."""

    finds = r"what write returned after one change"

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        return super().write([(user, self._natively(change)) for user, change in changes])

    def _natively(self, change: Change) -> Change:
        if not isinstance(change, Merge):
            return change
        return lambda old: self._rounded(change(old))

    def _rounded(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._rounded(each) for name, each in value.items()}
        if isinstance(value, list):
            return [self._rounded(each) for each in value] or {}
        return round_as_double(value)


class MergesByPath(InMemoryStorage):
    """Merges with a function of the database that takes a path, which a quote in a name ends."""

    finds = "after a merge of '\""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        return super().write([(user, self._natively(change)) for user, change in changes])

    def _natively(self, change: Change) -> Change:
        if not isinstance(change, Merge):
            return change
        return Merge({name.partition('"')[0]: value for name, value in change.update.items()})


class RoundsWhatIsMerged(MergesAsDoubles):
    """Only the update is rounded, and only by a native merge."""

    finds = r"stored by Merge: what write returned after one change"

    def _natively(self, change: Change) -> Change:
        return Merge(self._rounded(change.update)) if isinstance(change, Merge) else change


class RoundsWhatIsThere(MergesAsDoubles):
    """Only what another merge finds is rounded."""

    finds = r"stored by Merge: what write returned after a merge of another property"

    def _natively(self, change: Change) -> Change:
        if not isinstance(change, Merge):
            return change
        return lambda old: change({name: self._rounded(each) for name, each in (old or {}).items()})


def round_as_double(value: Any) -> Any:
    """Return an integer as a double has it."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return int(float(value)) if is_integer and abs(value) < 10**300 else value


class HasManyParameters(InMemoryStorage):
    """Sends each id as a parameter, of which a statement takes 65,535."""

    finds = "too many SQL variables"

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        with contextlib.closing(sqlite3.connect(":memory:")) as connection:
            connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 65_535)
            marks = ",".join("?" * len(user_ids))
            connection.execute(f"SELECT 1 WHERE 'x' IN ({marks})", user_ids)
        return super().read(user_ids)


class WritesFewUsers(InMemoryStorage):
    """Sends each row as parameters, of which a statement takes 65,535."""

    finds = "too many SQL variables"

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        with contextlib.closing(sqlite3.connect(":memory:")) as connection:
            connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 65_535)
            marks = ",".join(["(?,?)"] * len(changes))
            connection.execute(
                f"WITH rows AS (VALUES {marks}) SELECT 1 FROM rows",
                [each for user_id, _ in changes for each in (user_id, "{}")],
            )
        return super().write(changes)


class CutsIds(OtherIds):
    """Stores 254 characters of an id."""

    finds = "user 'xxxxx"

    @staticmethod
    def spelling(user_id: str) -> str:
        return user_id[:254]


class ComparesEmojiAlike(OtherIds):
    """Takes all characters beyond U+FFFF for the same, as MySQL's ``utf8mb4_general_ci`` does."""

    finds = r"user '\\U0001f600'"

    @staticmethod
    def spelling(user_id: str) -> str:
        return re.sub("[\U00010000-\U0010ffff]", "\ufffd", user_id)


class CutsApps(InMemoryStorage):
    """Stores 63 characters of an app id."""

    finds = "in app 'xxxxx"

    def for_app(self, app_id: str) -> Self:
        super().for_app(app_id)
        return super().for_app(app_id[:63])


class JoinsTheIdsByAColon(JoinsTheIds):
    """Uses ``app:user`` as the key."""

    separator = ":"
    finds = "in app 'a:b', user 'c'"


class JoinsTheIdsByASlash(JoinsTheIds):
    """Uses ``app/user`` as the key."""

    separator = "/"
    finds = "in app 'a/b', user 'c'"


class JoinsTheIdsByABar(JoinsTheIds):
    """Uses ``app|user`` as the key."""

    separator = "|"
    finds = r"in app 'a\|b', user 'c'"


class JoinsTheIdsByAControlCharacter(JoinsTheIds):
    """Uses the unit separator between app and user."""

    separator = "\x1f"
    finds = r"in app 'a\\x1fb', user 'c'"


class ReadsManyFromAllApps(InMemoryStorage):
    """Forgets the app in the query for several users."""

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        found = super().read(user_ids)
        if len(user_ids) > 1:
            found = {**InMemoryStorage.read(self.for_app("public"), user_ids), **found}
        return found


class SetsTheAppOfItsConnection(InMemoryStorage):
    """Sets the app in the one connection that all apps share, as with ``SET search_path``."""

    def __init__(self) -> None:
        super().__init__()
        self._connection = {"app": "public"}
        self._meeting = Meeting()

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        self._connection["app"] = self.app_id
        self._meeting.wait()
        return InMemoryStorage.write(self.for_app(self._connection["app"]), changes)


class OpensAfterClosing(InMemoryStorage):
    """Closes nothing before the first call, and opens at that."""

    is_open = False

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        self.is_open = True
        return super().write(changes)

    def close(self) -> None:
        if self.is_open:
            super().close()


# Locks, snapshots and caches. ``second`` returns the second storage.


class CommitsInChunks(InMemoryStorage):
    """Commits after each 10,000 changes of a write."""

    finds = "10000 users are stored: a write has to be one transaction"

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        chunks = [changes[start : start + 10_000] for start in range(0, len(changes), 10_000)]
        return [result for chunk in chunks for result in super(CommitsInChunks, self).write(chunk)]


class StoresInChunks(InMemoryStorage):
    """Calls all changes, and then sends 10,000 rows at a time, each time as one transaction."""

    finds = "a read returned half of a write: a write has to be one transaction"

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        rows = self.read([user for user, _ in changes])
        results = applied(changes, rows)
        stored = stored_as_they_are(rows, changes)
        for start in range(0, len(stored), 10_000):
            super().write(stored[start : start + 10_000])
            threading.Event().wait(0.05)  # a reader in this pause sees the fault
        return results


class WritesTogether(InMemoryStorage):
    """Stores the writes of several threads together, and all of them fail if one does."""

    finds = "each has to be undone, and to raise, by itself"

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[tuple[Sequence[tuple[str, Change]], Future[Any]]] = []
        self._turn = threading.Lock()

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        mine: Future[list[Metadata | None]] = Future()
        self._waiting.append((changes, mine))
        threading.Event().wait(0.002)  # others join in this pause
        with self._turn:
            batch, self._waiting = self._waiting, []
            try:
                results = iter(super().write([each for changes, _ in batch for each in changes]))
                for those, future in batch:
                    future.set_result(list(islice(results, len(those))))
            except LookupError as error:
                for _, future in batch:
                    future.set_exception(error)
        return mine.result()


class Twice(InMemoryStorage):
    """The base of faults that two storages over the same rows have; it has none itself."""

    def second(self) -> Storage:
        """Return the second storage."""
        other = copy.copy(self)
        other.begin()
        return other

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.begin()

    def begin(self) -> None:
        """Make what each of the two has for itself."""


class LocksTheFirstUser(Twice):
    """Locks the first user of a write, reads all, calls the changes, and stores."""

    finds = "a user of a write was not locked, nor compared"

    def __init__(self) -> None:
        super().__init__()
        self._locks: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        with self._locks[changes[0][0]]:
            return write_in_steps(self, changes)


def applied(
    changes: Sequence[tuple[str, Change]], rows: dict[str, Metadata]
) -> list[Metadata | None]:
    """Apply the changes to the rows, and return the results."""
    return apply_in_order(
        changes, rows, decode=lambda _, row: copy.deepcopy(row), encode=copy.deepcopy
    )


def stored_as_they_are(
    rows: dict[str, Metadata], changes: Sequence[tuple[str, Change]]
) -> list[tuple[str, Change]]:
    """Return changes that store these rows, whatever is there."""

    def replace(row: Metadata | None, _: Metadata | None) -> Metadata | None:
        return row

    return [(user, partial(replace, rows.get(user))) for user, _ in changes]


def write_in_steps(
    storage: InMemoryStorage, changes: Sequence[tuple[str, Change]]
) -> list[Metadata | None]:
    """Read, call the changes, and store, without a lock."""
    rows = InMemoryStorage.read(storage, [user for user, _ in changes])
    results = applied(changes, rows)
    InMemoryStorage.write(storage, stored_as_they_are(rows, changes))
    return results


class LocksOneInstance(Twice):
    """Has a lock of its own, which another instance does not know."""

    finds = "the row was not locked"

    def begin(self) -> None:
        self._lock = threading.RLock()

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        with self._lock:
            return write_in_steps(self, changes)


class LocksOneInstanceLong(LocksOneInstance):
    """Takes a while between reading and storing."""

    finds = "writes are lost: a write has to hold the lock"

    def __init__(self) -> None:
        super().__init__()
        self._meeting = Meeting()

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        return super().write(self._meeting.before(changes))


_process_lock = threading.Lock()


class LocksOneProcess(JSONFileStorage):
    """Locks a file's writers with a lock of this process."""

    finds = "the row was not locked"

    @contextlib.contextmanager
    def _locked(self) -> Generator[None, None, None]:
        with _process_lock:
            yield


class Repeats(Twice):
    """Compares when it stores, and repeats; the base of faults, without one."""

    starts_anew = True

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        users = [user for user, _ in changes]
        staged = self.read(users)
        while True:
            before = self.read(users)
            if self.starts_anew:
                staged = copy.deepcopy(before)
            results = applied(changes, staged)
            if self._swap(before, staged, changes):
                return results

    def _swap(
        self,
        before: dict[str, Metadata],
        after: dict[str, Metadata],
        changes: Sequence[tuple[str, Change]],
    ) -> bool:
        with self._store.lock:
            if self.read([user for user, _ in changes]) != before:
                return False
            super().write(stored_as_they_are(after, changes))
            return True


class RepeatsOnItsOwnResults(Repeats):
    """Repeats a write with the rows as the attempt before has left them: 3 for 2 calls."""

    starts_anew = False
    finds = "not with the results of the attempt before"


class ComparesVersions(Twice):
    """Compares numbers of versions when it stores, and repeats; the base of faults."""

    finds = "what Replace or Clear had removed is there again"

    def __init__(self) -> None:
        super().__init__()
        self._versions: dict[str, int] = {}

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        users = {user for user, _ in changes}
        while True:
            versions = {user: self._versions.get(user) for user in users}
            rows = self.read([*users])
            results = applied(changes, rows)
            with self._store.lock:
                if versions == {user: self._versions.get(user) for user in users}:
                    super().write(stored_as_they_are(rows, changes))
                    self.number(rows, changes)
                    return results

    def number(self, rows: dict[str, Metadata], changes: Sequence[tuple[str, Change]]) -> None:
        """Give what was stored new versions."""
        raise NotImplementedError


class BeginsVersionsAnew(ComparesVersions):
    """Removes the version with the row, so that the next row has the first version again."""

    def number(self, rows: dict[str, Metadata], changes: Sequence[tuple[str, Change]]) -> None:
        for user, _ in changes:
            if user in rows:
                self._versions[user] = self._versions.get(user, 0) + 1
            else:
                self._versions.pop(user, None)


class KeepsTheVersion(ComparesVersions):
    """Replaces a row without a new version."""

    def number(self, rows: dict[str, Metadata], changes: Sequence[tuple[str, Change]]) -> None:
        for user, change in changes:
            if not isinstance(change, Replace):
                self._versions[user] = self._versions.get(user, 0) + 1


class ShowsHalf(Twice):
    """Stores each user by itself."""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        return [write_in_steps(self, [change])[0] for change in changes]


class LocksInTheOrderOfTheCall(Twice):
    """Locks one row after the other; the database ends a deadlock with an error."""

    patience = 0.3
    finds = "deadlock detected"

    def __init__(self) -> None:
        super().__init__()
        self._locks: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)
        self._meeting = Meeting()

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        with contextlib.ExitStack() as held:

            def hold(user: str, change: Change, old: Metadata | None) -> Metadata | None:
                if not self._locks[user].acquire(timeout=self.patience):
                    raise StorageBusyError("deadlock detected")
                held.callback(self._locks[user].release)
                self._meeting.wait()
                return change(old)

            return write_in_steps(
                self, [(user, partial(hold, user, each)) for user, each in changes]
            )


class HangsInADeadlock(LocksInTheOrderOfTheCall):
    """The database does not notice a deadlock."""

    patience = 30
    finds = r"(?s)the test hangs.*Thread 'of the test'.*hold"


class ReplacesInTheOrderOfTheCall(LocksInTheOrderOfTheCall):
    """Locks rows in one order, except if it need not read them."""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        is_blind = all(isinstance(change, Replace) for _, change in changes)
        return super().write(changes if is_blind else sorted(changes, key=itemgetter(0)))


class KeepsResults(Repeats):
    """Also returns the results of the attempts that were not stored."""

    finds = "the results are not those of the attempt that was stored"

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        results: list[Metadata | None] = []

        def keep(change: Change, old: Metadata | None) -> Metadata | None:
            results.append(change(old))
            return results[-1]

        super().write([(user, partial(keep, change)) for user, change in changes])
        return results


class ReadsInChunks(Twice):
    """Reads 1,000 users at a time, without a snapshot."""

    finds = "several queries need one snapshot"
    chunk = 1000

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        found: dict[str, Metadata] = {}
        for start in range(0, len(user_ids), self.chunk):
            found.update(super().read(user_ids[start : start + self.chunk]))
            threading.Event().wait(0.002)  # other writes in this pause are the fault
        return found


class ReadsInLongChunks(ReadsInChunks):
    """Reads as many users at a time as a statement of SQLite has parameters."""

    chunk = 32_000


class LeaksWhenClosed(InMemoryStorage):
    """Lets the driver's error through where a call is under way when it is closed."""

    finds = "Cannot operate on a closed database"

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        try:
            return super().write(changes)
        except UsageError:
            raise sqlite3.ProgrammingError("Cannot operate on a closed database.") from None


class StopsItsThread(InMemoryStorage):
    """Runs calls in a thread of its own, which ``close`` ends: the others wait for ever."""

    finds = "(?s)the test hangs.*under way when another thread closes"
    _is_stopped = False

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        results = super().write(changes)
        if self._is_stopped:
            threading.Event().wait()
        return results

    def close(self) -> None:
        self._is_stopped = True
        super().close()


class Caches(Twice):
    """Keeps what it has read until it writes the user itself."""

    finds = "does not read what another has written"

    def begin(self) -> None:
        self._cache: dict[tuple[str, str], Metadata | None] = {}

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        for user in user_ids:
            if (self.app_id, user) not in self._cache:
                self._cache[self.app_id, user] = super().read([user]).get(user)
        found = {user: self._cache[self.app_id, user] for user in user_ids}
        return {user: copy.deepcopy(row) for user, row in found.items() if row is not None}

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        for user, _ in changes:
            self._cache.pop((self.app_id, user), None)
        return super().write(changes)


class FillsItsCacheLate(Twice):
    """Puts into a cache what it has read, though a write may have removed it from there."""

    finds = "did a read that met the write put it into a cache"

    def begin(self) -> None:
        self._cache: dict[str, Metadata] = {}

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        cached = dict(self._cache)
        if not cached.keys() >= {*user_ids}:
            cached = super().read(user_ids)
            threading.Event().wait(0.002)  # a write in this pause is not noticed
            self._cache = dict(cached)
        return {user: copy.deepcopy(cached[user]) for user in user_ids if user in cached}

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        results = super().write(changes)
        self._cache = {}
        return results


class ReadsFromASnapshot(Twice):
    """Leaves the transaction of its first read open, in which rows stay as they were."""

    finds = "does not read what another has written"

    def begin(self) -> None:
        self._snapshot: dict[str, Metadata] | None = None

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        if self._snapshot is None:
            self._snapshot = self.read_after("", 1000)
        return {user: self._snapshot[user] for user in user_ids if user in self._snapshot}

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        with self._store.lock:
            keys = [user for app, user in self._store.rows() if app == self.app_id]
            return super().read(sorted(keys))

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        self._snapshot = None
        return super().write(changes)


class WritesFromItsCache(Caches):
    """Gives a change what it has read, whoever has written since."""

    finds = ""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        rows = self.read([user for user, _ in changes])

        def of_the_cache(user: str, change: Change, _: Metadata | None) -> Metadata | None:
            return change(rows.get(user))

        results = super().write(
            [(user, partial(of_the_cache, user, each)) for user, each in changes]
        )
        for (user, _), row in zip(changes, results, strict=True):
            self._cache[self.app_id, user] = row
        return results


class NumbersApps(Twice):
    """Gives each app a number, which only this instance knows."""

    def begin(self) -> None:
        self._numbers = {"public": "public"}

    def for_app(self, app_id: str) -> Self:
        number = self._numbers.setdefault(app_id, f"{id(self)}")
        return super().for_app(number)


class LeavesAProcessLocked(Twice):
    """Holds a lock of the database after a change has failed; its own connection passes it."""

    finds = "locked by another connection"

    def __init__(self) -> None:
        super().__init__()
        self._owner: list[object] = []

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        if self._owner and self._owner[0] is not self:
            raise StorageBusyError("locked by another connection")
        self._owner[:] = [self]
        results = super().write(changes)
        self._owner.clear()
        return results


class ClosesForAll(Twice):
    """Closes the connections of all instances."""


# Listing.


class BeginsPagesWithTheLast(Twice):
    """Begins a page with the last user of the one before."""

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        found = super().read([user_id]) if user_id else {}
        return dict(islice({**found, **super().read_after(user_id, limit)}.items(), limit))


class ListsAnyCase(Twice):
    """Compares ids without case, and sorts with it."""

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        rows = super().read_after("", 1000)
        return dict([each for each in rows.items() if each[0].lower() > user_id.lower()][:limit])


class NeedsTheLastUser(Twice):
    """Looks the last user up, and begins anew without a row."""

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        return super().read_after(user_id if self.read([user_id]) else "", limit)


class ListsAllApps(Twice):
    """Forgets the app in the query."""

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        rows = self._store.rows()
        apps = {app_id for app_id, _ in rows}
        found: dict[str, Metadata] = {}
        for app_id in apps:
            app: Any = self.for_app(app_id)
            found.update(InMemoryStorage.read_after(app, user_id, limit))
        return found


class PagesByOffset(Twice):
    """Remembers at which place a page has ended, as with ``OFFSET``."""

    finds = "a user is on no page|begins with|a user is on two pages"

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._places = {"": 0}

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        return self._page(super().read_after("", 1000), user_id, limit)

    def find(self, where: Mapping[str, Value], after: str, limit: int) -> dict[str, Metadata]:
        return self._page(super().find(where, "", 1000), after, limit)

    def _page(self, rows: dict[str, Metadata], after: str, limit: int) -> dict[str, Metadata]:
        place = self._places.get(after, 0)
        page = dict(islice(rows.items(), place, place + limit))
        if page:
            self._places[[*page][-1]] = place + len(page)
        return page


class SharesLists(Twice):
    """Keeps a page that it has returned."""

    def begin(self) -> None:
        self._pages: dict[str, dict[str, Metadata]] = {}
        self._found_users: dict[str, dict[str, Metadata]] = {}

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        return self._pages.setdefault(user_id, super().read_after(user_id, limit))

    def find(self, where: Mapping[str, Value], after: str, limit: int) -> dict[str, Metadata]:
        return self._found_users.setdefault(f"{where}{after}", super().find(where, after, limit))


class EmptyWhenClosed(Twice):
    """Lists, finds and erases nothing after ``close``, without an error."""

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        with contextlib.suppress(UsageError):
            return super().read_after(user_id, limit)
        return {}

    def find(self, where: Mapping[str, Value], after: str, limit: int) -> dict[str, Metadata]:
        with contextlib.suppress(UsageError):
            return super().find(where, after, limit)
        return {}

    def erase(self, user_id: str, check: Callable[[Metadata], None]) -> dict[str, Metadata]:
        with contextlib.suppress(UsageError):
            return super().erase(user_id, check)
        return {}


# Erasing.


class ErasesOneApp(Twice):
    """Erases in its own app."""

    def erase(self, user_id: str, check: Callable[[Metadata], None]) -> dict[str, Metadata]:
        removed = self.read([user_id])
        self.write([(user_id, Clear())])
        return {self.app_id: removed[user_id]} if removed else {}


class ErasesLike(Twice):
    """Looks the keys of a user up with a pattern, as with ``LIKE`` or ``SCAN``."""

    def erase(self, user_id: str, check: Callable[[Metadata], None]) -> dict[str, Metadata]:
        pattern = user_id.replace("%", "*").replace("_", "?")
        removed: dict[str, Metadata] = {}
        for _, each in list(self._store.rows()):
            if fnmatch.fnmatchcase(each, pattern):
                removed.update(super().erase(each, check))
        return removed


class ErasesBeforeItChecks(Twice):
    """Erases in one app after the other."""

    def erase(self, user_id: str, check: Callable[[Metadata], None]) -> dict[str, Metadata]:
        removed: dict[str, Metadata] = {}
        for app_id, each in list(self._store.rows()):
            if each == user_id:
                app = self.for_app(app_id)
                removed[app_id] = app.read([user_id])[user_id]
                app.write([(user_id, Clear())])
                check(removed[app_id])
        return removed


class ErasesWithoutALock(Twice):
    """Reads, checks and erases in three steps."""

    finds = "what was written during an erasure is lost"

    def erase(self, user_id: str, check: Callable[[Metadata], None]) -> dict[str, Metadata]:
        rows = self.read([user_id])
        for row in rows.values():
            check(row)
        self.write([(user_id, Clear())])
        return {self.app_id: rows[user_id]} if rows else {}


class SharesWhatWasErased(Twice):
    """Returns one object for rows that are equal."""

    def erase(self, user_id: str, check: Callable[[Metadata], None]) -> dict[str, Metadata]:
        removed = super().erase(user_id, check)
        return dict.fromkeys(removed, next(iter(removed.values())))


# Finding.


class Indexed(Twice):
    """The base of faults of finding; it has none itself."""

    def __init__(self) -> None:
        super().__init__(indexes=StorageConformance.indexes)


class PagesFoundByOffset(PagesByOffset, Indexed):
    """Remembers at which place a page has ended."""

    def __init__(self) -> None:
        Indexed.__init__(self)
        self._places = {"": 0}


class SharesWhatWasFound(SharesLists, Indexed):
    """Keeps what it has found."""


class EmptyIndexWhenClosed(EmptyWhenClosed, Indexed):
    """Finds nothing after ``close``, without an error."""


class Sifts(Indexed):
    """Reads all users, and picks those that match; the base of faults."""

    def matches(self, metadata: Metadata, where: Mapping[str, Value]) -> bool:
        """Tell whether a user is found."""
        return matches(metadata, where)

    def find(self, where: Mapping[str, Value], after: str, limit: int) -> dict[str, Metadata]:
        rows = self.read_after(after, 100_000)
        return dict([each for each in rows.items() if self.matches(each[1], where)][:limit])

    def count(self, where: Mapping[str, Value] | None) -> int:
        return super().count(None) if where is None else len(self.find(where, "", 100_000))


class FindsByEquality(Sifts):
    """Compares as Python does, where ``1 == True``."""

    finds = "users with 0"

    def matches(self, metadata: Metadata, where: Mapping[str, Value]) -> bool:
        return all(name in metadata and metadata[name] == each for name, each in where.items())


class FindsByText(Sifts):
    """Compares texts, where 1 and "1" are the same."""

    finds = "users with 0"

    def matches(self, metadata: Metadata, where: Mapping[str, Value]) -> bool:
        texts = {name: str(each) for name, each in metadata.items()}
        return all(texts.get(name) == str(each) for name, each in where.items())


class FindsByDoubles(Sifts):
    """Compares numbers as doubles."""

    finds = "users with 900719925474099"

    def matches(self, metadata: Metadata, where: Mapping[str, Value]) -> bool:
        def rounded(values: Mapping[str, Any]) -> Metadata:
            return {name: round_as_double(each) for name, each in values.items()}

        return matches(rounded(metadata), rounded(where))


class FindsByTheFirst(Sifts):
    """Compares the indexed property only."""

    def matches(self, metadata: Metadata, where: Mapping[str, Value]) -> bool:
        name = next(name for name in where if name in {"plan", "customer"})
        return matches(metadata, {name: where[name]})


class IndexesAnything(InMemoryStorage):
    """Stores what it cannot index."""

    @property
    def indexes(self) -> tuple[Index, ...]:
        return tuple(StorageConformance.indexes)


class FindsFormerUsers(Indexed):
    """Does not take a user out of the index."""

    finds = "users with plan 'a' after Merge"

    def find(self, where: Mapping[str, Value], after: str, limit: int) -> dict[str, Metadata]:
        lookup = self._store.lookup
        return {user: {} for user in lookup.users(self.app_id, where)}

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        self._store.lookup.remove = lambda old, new: None  # type: ignore[method-assign] # pyright: ignore[reportPrivateUsage]
        return super().write(changes)


class CountsWrites(Indexed):
    """Counts users when they are written, also a second time."""

    number = 0

    def count(self, where: Mapping[str, Value] | None) -> int:
        return self.number if where is None else super().count(where)

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        results = super().write(changes)
        self.number += sum(1 if row is not None else -1 for row in results)
        return results


class FindsInTheOrderOfWriting(Indexed):
    """Returns found users in the order in which they were written."""

    def find(self, where: Mapping[str, Value], after: str, limit: int) -> dict[str, Metadata]:
        users = [user for _, user in self._store.rows()]
        begin = users.index(after) + 1 if after else 0
        return self.read(users[begin : begin + limit])


class FindsInTwoSteps(Indexed):
    """Finds users, and reads each by itself."""

    def find(self, where: Mapping[str, Value], after: str, limit: int) -> dict[str, Metadata]:
        found: dict[str, Metadata] = {}
        for user in super().find(where, after, limit):
            found.update(self.read([user]))
            threading.Event().wait(0.002)  # other writes in this pause are the fault
        return found


class FindsInAllApps(Indexed):
    """Forgets the app in the query."""

    def find(self, where: Mapping[str, Value], after: str, limit: int) -> dict[str, Metadata]:
        found: dict[str, Metadata] = {}
        for app_id in {app_id for app_id, _ in self._store.rows()}:
            found.update(InMemoryStorage.find(self.for_app(app_id), where, after, limit))
        return found


class ChecksNothing(Indexed):
    """Has unique indexes that are not unique."""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        self._store.lookup.check_unique = lambda values, changed, has: None  # type: ignore[method-assign] # pyright: ignore[reportPrivateUsage]
        return super().write(changes)


class ChecksEachChange(Indexed):
    """Checks uniqueness after each change, as a database does where a constraint is immediate."""

    finds = "NotUniqueError|has this value"

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        return [super(ChecksEachChange, self).write([change])[0] for change in changes]


class LooksBeforeItWrites(ChecksNothing):
    """Looks for a user who has the value, and then writes."""

    finds = "how many users got each value"

    def __init__(self) -> None:
        super().__init__()
        self._meeting = Meeting()

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        for user, change in changes:
            value = (change(None) or {}).get("customer")
            if value is not None and self.find({"customer": value}, "", 2).keys() - {user}:
                raise NotUniqueError("customer")
        self._meeting.wait()
        return super().write(changes)


class LooksInOneInstance(ChecksNothing):
    """Keeps the values that it has given away to itself."""

    finds = "how many users got each value"

    def begin(self) -> None:
        self._values: dict[Any, str] = {}

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        for user, change in changes:
            if self._values.setdefault((change(None) or {}).get("customer"), user) != user:
                raise NotUniqueError("customer")
        return super().write(changes)


# Connections.


class Remote(InMemoryStorage):
    """A storage with a connection that can break; the base of faults, without one."""

    def __init__(self) -> None:
        super().__init__()
        self._breaks: list[tuple[Phase, int, Callable[[], object]]] = []
        self.is_broken = False

    def second(self) -> Storage:
        """Return a storage with another connection."""
        other = copy.copy(self)
        other._breaks = []
        return other

    @contextlib.contextmanager
    def break_connection(
        self, phase: Phase, number: int, meanwhile: Callable[[], object]
    ) -> Generator[None, None, None]:
        """Break at the first round trip: there is no other."""
        self._breaks[:] = [] if number else [(phase, number, meanwhile)]
        yield
        self._breaks.clear()

    def send(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        """Write in the database, if the connection does not break."""
        phase, meanwhile = self._next_break()
        if phase == "before sending":
            meanwhile()
            raise BrokenPipeError
        results = super().write(changes)
        if phase == "after sending":
            meanwhile()
            raise ConnectionResetError
        return results

    def _next_break(self) -> tuple[str, Callable[[], object]]:
        with contextlib.suppress(IndexError):
            phase, _, meanwhile = self._breaks.pop()
            return phase, meanwhile
        return "", lambda: None

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        try:
            return self.send(changes)
        except BrokenPipeError as error:
            raise StorageUnavailableError("it was not sent") from error
        except ConnectionResetError as error:
            raise OutcomeUnknownError("no answer") from error

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        phase, _ = self._next_break()
        if phase in {"before sending", "after sending"}:
            raise StorageUnavailableError("no answer")
        return super().read(user_ids)


class RepeatsWhatWasDone(Remote):
    """Repeats a write whose answer was lost: it counts 3 for 2 calls."""

    finds = "it was done 2 times|writes were done; .* the outcome of 0 unknown"

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        try:
            return self.send(changes)
        except ConnectionError:
            return self.send(changes)


class RepeatsMerges(Remote):
    """Repeats a merge whose answer was lost, because "a merge can be repeated"."""

    finds = "the storage repeated it over a later write"

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        with contextlib.suppress(OutcomeUnknownError):
            return super().write(changes)
        return super().write(changes)


class SaysThatNothingWasDone(Remote):
    """Raises ``StorageUnavailableError`` for any lost connection."""

    finds = "the write raised StorageError, which says that nothing was done"

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        try:
            return self.send(changes)
        except ConnectionError as error:
            raise StorageUnavailableError("the connection is lost") from error


class LeaksTheDriversErrors(Remote):
    """Lets the driver's error through."""

    finds = "ConnectionResetError came through; raise a StorageError from it"

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        return self.send(changes)


class KeepsABrokenConnection(Remote):
    """Uses a broken connection again and again."""

    finds = "are broken connections thrown away"

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        if self.is_broken:
            raise StorageUnavailableError("the connection is lost")
        return super().read(user_ids)

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        try:
            return super().write(changes)
        except StorageError:
            self.is_broken = True
            raise


class CommitsEachUser(Remote):
    """Sends one request for each user."""

    finds = "half of it was done|the write raised OutcomeUnknownError"

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        return [super(CommitsEachUser, self).write([change])[0] for change in changes]


class AnswersWithoutWaiting(Remote):
    """Acknowledges what it has sent, without waiting for an answer."""

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        try:
            return super().write(changes)
        except StorageError:
            stored = super().read([user for user, _ in changes])
            return [change(stored.get(user)) for user, change in changes]


class LeaksErrorsOfReads(Remote):
    """Lets the driver's error of a read through."""

    finds = "TimeoutError came through"

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        if self._next_break()[0]:
            raise TimeoutError
        return super().read(user_ids)


class LeaksErrorsOfConnecting(Remote):
    """Connects, after a break, outside of what translates the driver's errors."""

    finds = "ConnectionRefusedError came through"
    _is_connected = True

    @contextlib.contextmanager
    def break_connection(
        self, phase: Phase, number: int, meanwhile: Callable[[], object]
    ) -> Generator[None, None, None]:
        with super().break_connection(phase, number, meanwhile):
            yield
        if phase == "after the answer":
            self._is_connected = False

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        self._connect()
        return super().read(user_ids)

    def _connect(self) -> None:
        if not self._is_connected and self._breaks:
            raise ConnectionRefusedError
        self._is_connected = True
