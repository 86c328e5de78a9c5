"""A storage in another process, used as if it were in this one."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import threading
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.testing.running import Running, other_processes, stacks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.connection import Connection, Listener

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.indexes import Index
    from usermetadata.interfaces import Value
    from usermetadata.storage import Storage

_PICKLED = (Merge, Replace, Clear)
_START = (
    "import json, sys; path, key = json.loads(sys.stdin.readline()); sys.path[:] = path;"
    "from usermetadata.testing import process; process.serve(bytes.fromhex(key))"
)
_SECONDS_FOR_STACKS = 5.0


class OtherProcess:
    """A process in which tests open storages; the fixture ``usermetadata_process`` gives it."""

    def __init__(self) -> None:
        self._key = os.urandom(32)
        self._process = subprocess.Popen(  # noqa: S603 - this Python
            [sys.executable, "-c", _START], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([sys.path, self._key.hex()]) + "\n")
        self._process.stdin.flush()
        self._address: str = json.loads(self._process.stdout.readline())
        self._idle: list[Connection] = []
        other_processes.add(self)

    def open(self, factory: Callable[..., Storage], *args: Any, **kwargs: Any) -> RemoteStorage:
        """Return the storage that ``factory(*args, **kwargs)`` opens in the other process.

        Args:
            factory: a module-level class or function. It and its arguments are pickled.
            *args: its positional arguments.
            **kwargs: its keyword arguments.

        Returns:
            A storage that any thread of this process may use. Functions in changes are called in
            this process. Close the storage like any other.
        """
        return RemoteStorage(self, self.call(0, "open", factory, args, kwargs))

    def call(
        self,
        storage: int,
        method: str,
        *args: object,
        functions: Sequence[Callable[..., object]] = (),
    ) -> Any:
        """Call a method of a storage there; the other process may call back ``functions``."""
        connection = self._idle.pop() if self._idle else self._connect()
        connection.send((storage, method, args))
        raised: BaseException | None = None
        while True:
            kind, value = connection.recv()
            if kind == "call":
                number, values = value
                try:
                    connection.send((True, functions[number](*values)))
                except BaseException as error:  # noqa: BLE001 - raised below
                    raised = error
                    connection.send((False, None))
                continue
            self._idle.append(connection)
            if kind == "returned":
                return value
            if value is None:
                assert raised is not None
                raise raised
            raise value

    def stacks(self) -> str:
        """Return the stacks of all threads of the process."""
        asking = Running(self._ask_for_stacks, _SECONDS_FOR_STACKS)
        asking.give_time(_SECONDS_FOR_STACKS)
        if asking.is_alive:
            return "The other process does not answer.\n"
        return f"In the other process:\n{asking.result()}"

    def close(self) -> None:
        """End the process."""
        for connection in self._idle:
            connection.close()
        self._process.communicate()

    def _ask_for_stacks(self) -> str:
        with contextlib.closing(self._connect()) as connection:
            connection.send((0, "stacks", ()))
            text: str = connection.recv()[1]
            return text

    def _connect(self) -> Connection:
        from multiprocessing.connection import Client

        return Client(self._address, authkey=self._key)


class RemoteStorage:
    """A storage in another process, with the methods of all protocols except ``within``."""

    def __init__(self, process: OtherProcess, number: int) -> None:
        self._process = process
        self._number = number

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        """See ``Storage``."""
        found: dict[str, Metadata] = self._call("read", user_ids)
        return found

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        """See ``Storage``."""
        functions: list[Callable[..., object]] = []
        sent: list[tuple[str, object]] = []
        for user_id, change in changes:
            if isinstance(change, _PICKLED):
                sent.append((user_id, change))
                continue
            is_modify = isinstance(change, Modify)
            sent.append((user_id, _Function(len(functions), is_modify=is_modify)))
            functions.append(change.function if isinstance(change, Modify) else change)
        results: list[Metadata | None] = self._call("write", sent, functions=functions)
        return results

    def for_app(self, app_id: str) -> RemoteStorage:
        """See ``Storage``."""
        return RemoteStorage(self._process, self._call("for_app", app_id))

    def close(self) -> None:
        """See ``Storage``."""
        self._call("close")

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        """See ``ListingStorage``."""
        found: dict[str, Metadata] = self._call("read_after", user_id, limit)
        return found

    def erase(self, user_id: str, check: Callable[[Metadata], None]) -> dict[str, Metadata]:
        """See ``ErasingStorage``."""
        function = _Function(0, is_modify=False)
        removed: dict[str, Metadata] = self._call("erase", user_id, function, functions=[check])
        return removed

    @property
    def indexes(self) -> tuple[Index, ...]:
        """See ``IndexedStorage``."""
        declared: tuple[Index, ...] = self._call("indexes")
        return declared

    def find(self, where: Mapping[str, Value], after: str, limit: int) -> dict[str, Metadata]:
        """See ``IndexedStorage``."""
        found: dict[str, Metadata] = self._call("find", where, after, limit)
        return found

    def count(self, where: Mapping[str, Value] | None) -> int:
        """See ``IndexedStorage``."""
        number: int = self._call("count", where)
        return number

    def stored_indexes(self) -> tuple[Index, ...]:
        """See ``IndexedStorage``."""
        stored: tuple[Index, ...] = self._call("stored_indexes")
        return stored

    def build_indexes(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """See ``IndexedStorage``."""
        functions = [] if progress is None else [progress]
        arguments = [_Function(at, is_modify=False) for at, _ in enumerate(functions)]
        in_the_way: list[str] = self._call("build_indexes", *arguments, functions=functions)
        return in_the_way

    def drop_index(self, name: str) -> None:
        """See ``IndexedStorage``."""
        self._call("drop_index", name)

    def _call(
        self, method: str, *args: object, functions: Sequence[Callable[..., object]] = ()
    ) -> Any:
        return self._process.call(self._number, method, *args, functions=functions)


@dataclass(frozen=True)
class _Function:
    """Stands for a function that the first process calls."""

    number: int
    is_modify: bool


class _RaisedThereError(Exception):
    """The function raised an exception, which stays in the first process."""


def serve(key: bytes) -> None:
    """Serve the parent process until it ends or closes the standard input."""
    from multiprocessing.connection import Listener

    listener = Listener(backlog=64)
    served = _Served(key)
    threading.Thread(target=served.accept, args=(listener,), daemon=True).start()
    sys.stdout.write(json.dumps(listener.address) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    listener.close()
    os._exit(0)


class _Served:
    """The storages that are open in this process."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._storages: list[Any] = [None]
        self._lock = threading.Lock()

    def accept(self, listener: Listener) -> None:
        while True:
            connection = listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        from multiprocessing.connection import answer_challenge, deliver_challenge

        with contextlib.suppress(EOFError, OSError):
            # Here, and not in the listener: a client that hangs meanwhile keeps out no other.
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            while True:
                request = connection.recv_bytes()
                try:
                    # An object that cannot be pickled is also an error of this call.
                    number, method, args = pickle.loads(request)  # noqa: S301 - needs the key
                    answer = pickle.dumps(("returned", self._do(connection, number, method, args)))
                except _RaisedThereError:
                    answer = pickle.dumps(("raised", None))
                except BaseException as error:  # noqa: BLE001 - sent to the first process
                    answer = _pickled(error, "In the other process:\n" + traceback.format_exc())
                connection.send_bytes(answer)

    def _do(self, connection: Connection, number: int, method: str, args: Any) -> object:
        if method == "stacks":
            return stacks()
        if method == "open":
            factory, arguments, keywords = args
            return self._add(factory(*arguments, **keywords))
        found = getattr(self._storages[number], method)
        if not callable(found):
            return found
        if method == "write":
            args = [[(user_id, self._change(connection, each)) for user_id, each in args[0]]]
        result = found(*(self._change(connection, each) for each in args))
        return self._add(result) if method == "for_app" else result

    def _add(self, storage: object) -> int:
        with self._lock:
            self._storages.append(storage)
            return len(self._storages) - 1

    def _change(self, connection: Connection, argument: Any) -> Any:
        if not isinstance(argument, _Function):
            return argument

        def call(*values: object) -> Any:
            connection.send(("call", (argument.number, values)))
            has_returned, returned = connection.recv()
            if not has_returned:
                raise _RaisedThereError
            return returned

        return Modify(call) if argument.is_modify else call


def _pickled(error: BaseException, note: str) -> bytes:
    """Return the answer that raises the error in the first process."""
    error.add_note(note)
    try:
        answer = pickle.dumps(("raised", error))
        # This fails if the exception's class takes other arguments than it passes to Exception.
        pickle.loads(answer)  # noqa: S301 - it was made here
    except Exception:  # noqa: BLE001 - any code of the exception's class
        stand_in = RuntimeError(f"{type(error).__name__}, which cannot be pickled, was raised")
        stand_in.add_note(note)
        answer = pickle.dumps(("raised", stand_in))
    return answer
