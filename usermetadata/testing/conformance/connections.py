"""Connections that break, for a storage whose tests define ``break_connection``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

import pytest

from usermetadata.changes import Merge, Modify, Replace
from usermetadata.exceptions import OutcomeUnknownError, StorageError
from usermetadata.testing.conformance.suite import COUNT, Suite
from usermetadata.testing.proxy import Phase

if TYPE_CHECKING:
    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.storage import Storage

BreakConnection = Callable[[Phase, int, Callable[[], object]], AbstractContextManager[object]]

_PHASES: list[Phase] = ["before sending", "after sending", "after the answer"]
_PHASE = pytest.mark.parametrize("phase", _PHASES)
_ROUND_TRIPS = 9  # of the longest write: connecting, beginning, a lock, reads, stores, COMMIT
_ATTEMPTS = 10


class ConnectionConformance(Suite):
    """A write whose connection breaks is never done twice and never in part."""

    @_PHASE
    def test_a_broken_connection_does_nothing_twice(
        self, storage: Storage, break_connection: BreakConnection, phase: Phase
    ) -> None:
        """Acknowledged writes are done once; refused writes are not done.

        ``OutcomeUnknownError`` is the error of a write that may have been done. A storage may
        repeat a write that was not done.
        """
        count = Modify(lambda metadata: {"n": metadata.get("n", 0) + 1})
        changes: dict[str, tuple[Change, Callable[[int], Metadata]]] = {
            "modify": (count, lambda at: {"n": at}),
            "callable": (lambda old: {"n": (old or {}).get("n", 0) + 1}, lambda at: {"n": at}),
        }
        for kind, (change, expected) in changes.items():
            for number in range(_ROUND_TRIPS):
                # Others in each round: a server may do late what was sent in the one before.
                users = [f"{kind} {number} {name}" for name in ("alice", "bob")]
                storage.write([(user, change) for user in users])
                write = partial(storage.write, [(user, change) for user in users])
                outcome = _break(break_connection, phase, number, write)
                found = _read_again(storage, users)
                where = f"{phase}, round trip {number}, {kind}: {_SAID[outcome]}"
                assert found[users[0]] == found[users[1]], f"{where}, and half of it was done"
                times = found[users[0]].get("n", 0) - 1
                assert times in _TIMES[outcome], f"{where}, and it was done {times} times"
                assert found[users[0]] == expected(1 + times)

    @_PHASE
    @pytest.mark.parametrize("change", [Merge, Replace])
    def test_a_broken_connection_writes_all_or_nothing(
        self,
        storage: Storage,
        break_connection: BreakConnection,
        phase: Phase,
        change: type[Merge | Replace],
    ) -> None:
        """The same applies to changes that a storage does natively, of one or several users."""
        new: Metadata = {"n": 1}
        for number in range(_ROUND_TRIPS):
            for count in (1, 2):
                # Others in each round: a server may do late what was sent in the one before.
                users = [f"{number} {count} {name}" for name in ("alice", "bob")[:count]]
                before: dict[str, Metadata] = {user: {} for user in users}
                storage.write([(user, Merge({})) for user in users])
                write = partial(storage.write, [(user, change(new)) for user in users])
                outcome = _break(break_connection, phase, number, write)
                found = _read_again(storage, users)
                where = f"{phase}, round trip {number}: {_SAID[outcome]}"
                after = dict.fromkeys(users, new)
                possible = {"done": [after], "nothing": [before], "unknown": [before, after]}
                assert found in possible[outcome], f"{where}, and this is stored"

    def test_what_may_have_been_done_is_not_repeated(
        self, storage: Storage, second_storage: Storage, break_connection: BreakConnection
    ) -> None:
        """A write whose answer was lost does not overwrite what another process wrote later."""
        for number in range(_ROUND_TRIPS):
            for kind in (Merge, Replace):
                # Others in each round: a server may do late what was sent in the one before.
                user = f"{kind.__name__} {number}"
                second_storage.write([(user, Replace({"n": 0}))])
                _read_again(storage, [user])  # connects; a write could meet the last break
                written_later: list[bool] = []

                def write_later(user: str = user, done: list[bool] = written_later) -> None:
                    was_done = second_storage.read([user]) == {user: {"n": 1}}
                    second_storage.write([(user, Merge({"n": 2}))])
                    done.append(was_done)

                write = partial(storage.write, [(user, kind({"n": 1}))])
                _break(break_connection, "after sending", number, write, write_later)
                # A pool may be connecting anew: then that connection breaks, and maybe only now.
                is_overwritten = written_later == [True]
                found = _read_again(storage, [user])
                assert not is_overwritten or found == {user: {"n": 2}}, (
                    f"after sending, round trip {number}: the write was done, its answer was lost,"
                    " and the storage repeated it over a later write"
                )

    @_PHASE
    def test_a_read_survives_a_broken_connection(
        self, storage: Storage, break_connection: BreakConnection, phase: Phase
    ) -> None:
        """The read returns the stored rows, or raises ``StorageError``; later calls work again."""
        storage.write([("alice", Merge({"n": 1}))])
        for number in range(2):
            found: list[dict[str, Metadata]] = []
            _break(break_connection, phase, number, lambda: found.append(storage.read(["alice"])))  # noqa: B023 - called at once
            assert found in ([], [{"alice": {"n": 1}}])
            assert _read_again(storage, ["alice"]) == {"alice": {"n": 1}}

    @pytest.mark.parametrize("method", ["read", "write"])
    def test_an_error_while_connecting_is_translated(
        self, storage: Storage, break_connection: BreakConnection, method: str
    ) -> None:
        """A call that cannot connect works after another attempt, or raises ``StorageError``."""
        storage.write([("alice", Merge({"n": 1}))])
        calls: dict[str, Callable[[], object]] = {
            "read": lambda: storage.read(["alice"]),
            "write": lambda: storage.write([("alice", Merge({"n": 1}))]),
        }
        for number in range(_ROUND_TRIPS):
            _break(break_connection, "after the answer", 0, calls["read"])
            with break_connection("before sending", number, lambda: None):
                # The first call may only find out that the connection is lost.
                for _ in range(3):
                    _outcome(f"connecting again, round trip {number}", calls[method])
            assert _read_again(storage, ["alice"]) == {"alice": {"n": 1}}

    def test_threads_count_what_was_done(
        self, storage: Storage, break_connection: BreakConnection
    ) -> None:
        """Connections of several threads break; acknowledged writes are stored, refused ones not.

        A write with an unknown outcome may be stored.
        """
        storage.write([("alice", Merge({}))])
        outcomes: list[str] = []

        def write(_: int) -> None:
            outcomes.append(_outcome("a break", lambda: storage.write([("alice", COUNT)])))

        for phase in _PHASES:
            for number in range(3):
                with break_connection(phase, number, lambda: None):
                    self.in_rounds([write] * 4, 2)
        stored = _read_again(storage, ["alice"])["alice"].get("n", 0)
        done, unknown = outcomes.count("done"), outcomes.count("unknown")
        assert done <= stored <= done + unknown, (
            f"{stored} writes were done; {done} were acknowledged, the outcome of {unknown} unknown"
        )


# The outcome of a call, and how often the write may then have been done.
_SAID = {
    "done": "the write was acknowledged",
    "unknown": "the write raised OutcomeUnknownError",
    "nothing": "the write raised StorageError, which says that nothing was done",
}
_TIMES = {"done": {1}, "unknown": {0, 1}, "nothing": {0}}


def _break(
    break_connection: BreakConnection,
    phase: Phase,
    number: int,
    call: Callable[[], object],
    meanwhile: Callable[[], object] = lambda: None,
) -> str:
    """Call while the connection breaks; return the outcome of the call."""
    with break_connection(phase, number, meanwhile):
        return _outcome(f"{phase}, round trip {number}", call)


def _outcome(where: str, call: Callable[[], object]) -> str:
    try:
        call()
    except OutcomeUnknownError:
        return "unknown"
    except StorageError:
        return "nothing"
    except Exception as error:
        raise AssertionError(
            f"{where}: {type(error).__name__} came through; raise a StorageError from it"
        ) from error
    return "done"


def _read_again(storage: Storage, user_ids: list[str]) -> dict[str, Metadata]:
    """Read after a break; each connection of a pool may be broken."""
    for _ in range(_ATTEMPTS):
        found: list[dict[str, Metadata]] = []
        if _outcome("the next read", lambda: found.append(storage.read(user_ids))) == "done":  # noqa: B023 - called at once
            return found[0]
    pytest.fail(f"after a break, {_ATTEMPTS} reads failed: are broken connections thrown away?")
