"""The functions of one store: blocking and for ``asyncio``, with an override applied."""

from __future__ import annotations

import copy
import threading
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, NoReturn, cast
from weakref import WeakSet

from usermetadata._core.blocking_functions import BlockingFunctions
from usermetadata._core.checks import Checks, validator_of
from usermetadata._core.forking import ForkHooks, watch
from usermetadata._core.loops import call_outside
from usermetadata._core.reentry import is_awaitable
from usermetadata._core.runners import AsyncioRunner, BlockingOverride, BlockingRunner
from usermetadata.exceptions import InvalidInputError, UsageError
from usermetadata.interfaces import RecipeInterface, UserMetadataOverrideConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from usermetadata._core.checks import Hook
    from usermetadata.storage import Storage


class Store(ForkHooks):
    """A storage, and what its apps share: the worker threads and ``close``.

    Args:
        storage: where the metadata is stored.
        is_ours: whether ``close`` closes it.

    Attributes:
        is_ours: whether ``close`` closes the storage.
        lock: held while a shared object is created.
    """

    def __init__(self, storage: Storage, *, is_ours: bool) -> None:
        self.storage = storage
        self.is_ours = is_ours
        self._is_closed = False
        self._runner: AsyncioRunner | None = None
        self._users: WeakSet[Functions] = WeakSet()
        self.after_fork_in_child()
        watch(self)

    def after_fork_in_child(self) -> None:
        """Another thread of the parent may have held the lock."""
        self.lock = threading.RLock()

    def runner(self, app_id: str | None) -> AsyncioRunner:
        """Return a runner for an app; without an id, for the app of the storage."""
        with self.lock:
            if self._runner is None:
                self._runner = AsyncioRunner(self.storage, self.storage)
        return copy.copy(self._runner) if app_id is None else self._runner.for_app(app_id)

    def add(self, functions: Functions) -> None:
        """Close the functions together with the store."""
        with self.lock:
            if self._is_closed:
                functions.close()
            self._users.add(functions)

    def close(self) -> None:
        """Complete the calls under way, end the worker threads, close the storage if it is ours."""
        with self.lock:
            self._is_closed = True
            for functions in self._users:
                functions.close()
        if self._runner is not None:
            self._runner.close()
        if self.is_ours:
            call_outside(self.storage.close)


class Functions:
    """The functions of one app of a store.

    Args:
        store: where they read and write.
        override: replaces or wraps them.
        model: validates metadata before it is stored.
        app_id: the app; ``None`` means the app of the store's storage.

    Attributes:
        store: the store, as passed.
        storage: the storage for the app.
        app_id: the id of the app.
        override: the override, as passed.
        model: the model, as passed.
        blocking: the functions for blocking code; ``usermetadata.syncio`` calls these.
    """

    def __init__(
        self,
        store: Store,
        override: UserMetadataOverrideConfig | None,
        model: object,
        app_id: str | None = None,
    ) -> None:
        self.store = store
        self.storage = (
            store.storage if app_id is None else call_outside(store.storage.for_app, app_id)
        )
        own_app_id: str = getattr(self.storage, "app_id", "public")
        self.app_id = own_app_id if app_id is None else app_id
        self.override = override
        self.model = model
        self._app_id = app_id
        self._checks: Checks | None = None
        self._asynchronous: RecipeInterface | None = None
        self._runner: AsyncioRunner | None = None  # the runner of the functions that are overridden
        validate = None if model is None else validator_of(model)
        hook = None
        if override is not None and override.functions is not None:
            self._runner = store.runner(app_id)
            self._asynchronous = _overridden(override.functions, _original(self._runner))
            hook = _hook_of(self._asynchronous)
        if hook is not None or validate is not None:
            self._checks = Checks(store.storage, hook, validate)
        if self._runner is not None:
            self._runner.checks = self._checks
        self.blocking = self._blocking(None)
        store.add(self)

    @property
    def asynchronous(self) -> RecipeInterface:
        """The functions for ``asyncio``; ``usermetadata.asyncio`` calls these."""
        if self._asynchronous is None:
            with self.store.lock:
                if self._asynchronous is None:
                    runner = self.store.runner(self._app_id)
                    runner.checks = self._checks
                    self._asynchronous = _original(runner)
        return self._asynchronous

    def for_app(self, app_id: str) -> Functions:
        """Return the functions of another app of the store."""
        return Functions(self.store, self.override, self.model, app_id)

    def joined(self, storage: Storage) -> Functions:
        """Return the same functions, blocking, on a storage that is part of a transaction."""
        other = copy.copy(self)
        other.blocking = self._blocking(storage)
        self.store.add(other)
        return other

    def close(self) -> None:
        """Complete the running calls; later ones raise an error."""
        self.blocking = cast("BlockingFunctions", _Closed())
        self._asynchronous = cast("RecipeInterface", _Closed())

    def _blocking(self, joined: Storage | None) -> BlockingFunctions:
        if self._runner is not None and self._asynchronous is not None:
            overridden = BlockingOverride(self._asynchronous, self._runner, joined)
            return cast("BlockingFunctions", overridden)
        runner = BlockingRunner(
            joined or self.storage, self.store.storage, is_joined=joined is not None
        )
        runner.app_id, runner.checks = self.app_id, self._checks
        return BlockingFunctions(runner)


class _Closed:
    def __getattr__(self, name: str) -> NoReturn:
        raise UsageError(
            "usermetadata: this store is closed; make a new UserMetadata, or call init again"
        )


def _original(runner: AsyncioRunner) -> RecipeInterface:
    # Imported here, because blocking code does not need it.
    from usermetadata._core.asyncio_functions import AsyncioFunctions

    return AsyncioFunctions(runner)


def _hook_of(functions: RecipeInterface) -> Hook | None:
    hook = functions.check_change
    if getattr(hook, "__func__", None) is RecipeInterface.check_change:  # also in the original
        return None
    if not callable(hook) or iscoroutinefunction(hook):
        raise InvalidInputError(
            "override: check_change is not a plain function; make it one without `async`, because"
            " it is called inside the storage's lock"
        )
    return hook


def _overridden(
    functions: Callable[[RecipeInterface], RecipeInterface], original: RecipeInterface
) -> RecipeInterface:
    """Return the override's functions, and the original's where it has none."""
    if not callable(functions):
        raise InvalidInputError(
            f"override: functions: {type(functions).__name__} cannot be called; pass a function"
            " that takes the original and returns a RecipeInterface"
        )
    overridden = functions(original)
    if is_awaitable(overridden) or not isinstance(overridden, RecipeInterface):
        raise InvalidInputError(
            f"override: functions returned {type(overridden).__name__}, not a RecipeInterface; make"
            " it a plain function that returns the original, or an instance of a subclass"
        )
    return cast("RecipeInterface", _Completed(overridden, original))


class _Completed:
    """The functions of an override, and the original's where it has none.

    The override's object stays as it is: it may serve several stores.
    """

    def __init__(self, overridden: RecipeInterface, original: RecipeInterface) -> None:
        self._overridden = overridden
        self._original = original

    def __getattr__(self, name: str) -> object:
        function = getattr(self._overridden, name)
        if getattr(function, "__func__", None) is getattr(RecipeInterface, name, function):
            return getattr(self._original, name)
        return function
