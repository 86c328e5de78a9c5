"""``UserMetadata``, and the one that ``init`` makes for the functions of both facades' modules."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from usermetadata._core.default import Made, default, not_initialised
from usermetadata.exceptions import InvalidInputError, UsageError
from usermetadata.interfaces import M, U, UserMetadataOverrideConfig

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Mapping
    from contextlib import AbstractContextManager
    from typing import Self

    from usermetadata._core.functions import Functions
    from usermetadata.asyncio import AsyncioUserMetadata
    from usermetadata.indexes import Index
    from usermetadata.interfaces import RecipeInterface
    from usermetadata.storage import Storage
    from usermetadata.syncio import SyncioUserMetadata


class UserMetadata(Generic[M, U]):
    """One store of metadata: a storage, an override, and the functions of both facades on them.

    A process may have any number of them. They are independent of each other, and may be used in
    any thread and event loop. Nothing is opened before the first call.

    ``UserMetadata[Prefs]``, with a ``TypedDict``, is typed: the metadata of every result and the
    argument of ``modify``'s function are ``Prefs``, and so must be what is set. An update is
    ``Prefs`` as well, or the second type: ``UserMetadata[Prefs, PrefsUpdate]``. At run time the
    types have no effect.

    Args:
        storage: a storage, a URL or a path, as ``init`` takes them.
        override: replaces or wraps the functions.
        app_id: the app whose metadata it is; ``None`` means that of the storage, ``"public"`` if
            neither the URL nor the storage has another.
        model: validates what would be stored, before it is written: a function that takes the
            metadata and raises an exception, or returns ``False``, if it is not valid; a
            ``pydantic.TypeAdapter``, a pydantic model, or another object with a method
            ``validate_python``. The metadata is stored as it was passed. An exception becomes the
            cause of an ``InvalidInputError``.
        indexes: the properties that users can be found by, for a URL or a path.

    Attributes:
        syncio: the functions of :mod:`usermetadata.syncio`, on this store.
        asyncio: the functions of :mod:`usermetadata.asyncio`, on this store.

    Raises:
        InvalidInputError: an argument is not valid.

    Example:
        >>> with UserMetadata("memory://") as users:
        ...     users.syncio.update_user_metadata("alice", {"theme": "dark"}).metadata
        {'theme': 'dark'}
    """

    syncio: SyncioUserMetadata[M, U]
    asyncio: AsyncioUserMetadata[M, U]
    _closes_store = True

    def __init__(
        self,
        storage: Storage | str | os.PathLike[str],
        *,
        override: UserMetadataOverrideConfig | None = None,
        app_id: str | None = None,
        model: object = None,
        indexes: Iterable[Index] = (),
    ) -> None:
        if not isinstance(override, (UserMetadataOverrideConfig, type(None))):
            raise InvalidInputError(
                f"override: {type(override).__name__} is not an override;"
                " pass UserMetadataOverrideConfig(functions=...)"
            )
        # Here, because importing the package needs none of it.
        from usermetadata._core.functions import Functions, Store
        from usermetadata._core.urls import open_storage

        store = Store(
            open_storage(storage, indexes), is_ours=isinstance(storage, (str, os.PathLike))
        )
        self._use(Functions(store, override, model, app_id))

    if not TYPE_CHECKING:

        def __class_getitem__(cls, types: object) -> type[Self]:
            """Return the class itself: the types are for type checkers."""
            return cls

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.storage!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    @property
    def storage(self) -> Storage:
        """Where the metadata is stored."""
        return self._functions.storage

    def for_app(self, app_id: str) -> Self:
        """Return the same store for another app; neither sees the other's users.

        It shares connections and threads with this one, so any number of apps need no more of them.
        It has the same override and model. Only closing this one closes the store.

        Args:
            app_id: 1 to 64 characters, without U+0000.

        Returns:
            The store for the app.

        Raises:
            InvalidInputError: the app id is not valid.

        Example:
            >>> users = UserMetadata("memory://")
            >>> shop = users.for_app("shop")
            >>> shop.syncio.update_user_metadata("alice", {"cart": 1}).metadata
            {'cart': 1}
            >>> users.syncio.get_user_metadata("alice").metadata
            {}
        """
        other = object.__new__(type(self))
        other._use(self._functions.for_app(app_id))
        other._closes_store = False
        return other

    @contextmanager
    def within(self, connection: object) -> Generator[SyncioUserMetadata[M, U], None, None]:
        """Read and write in the caller's own transaction: a block with blocking functions.

        What they write is committed or rolled back with all that the caller does in the
        transaction. The block does not commit, roll back or close anything. Each write runs in a
        savepoint, so that the transaction stays usable after one that failed. Reads see what the
        transaction has written. Nothing is repeated. On a connection in autocommit mode, each call
        is a transaction of its own.

        Args:
            connection: a ``sqlite3.Connection``, a ``sqlite_utils.Database``, a
                ``psycopg.Connection``, a SQLAlchemy ``Session`` or ``Connection``, or Django's
                ``connection``. It is one to the database of the storage.

        Yields:
            The functions of :mod:`usermetadata.syncio`. After the block they raise ``UsageError``.

        Raises:
            InvalidInputError: the connection is of no supported kind, or is one to another
                database.
            UsageError: the storage cannot use a caller's connection.

        Example:
            >>> import sqlite3
            >>> connection = sqlite3.connect("shop.db")
            >>> users = UserMetadata("sqlite:///shop.db")
            >>> with users.within(connection) as metadata:
            ...     metadata.update_user_metadata("alice", {"plan": "pro"}).metadata
            {'plan': 'pro'}
            >>> connection.rollback()
            >>> connection.close()
            >>> users.syncio.get_user_metadata("alice").metadata
            {}
        """
        from usermetadata.storage import JoiningStorage
        from usermetadata.syncio import SyncioUserMetadata

        storage = self.storage
        if not isinstance(storage, JoiningStorage):
            raise UsageError(
                f"within: {type(storage).__name__} cannot be part of a transaction; use an"
                " SQLiteStorage or a PostgresStorage"
            )
        with storage.within(connection) as joined:
            yield SyncioUserMetadata(self._functions.joined(joined))

    def close(self) -> None:
        """Close what this object has opened; later calls raise ``UsageError``.

        Calls of ``asyncio`` that are under way are completed first. A storage that the caller made
        stays open. It may be called twice.

        Raises:
            UsageError: a function given to ``modify_user_metadata`` calls it.
        """
        self._check_outside()
        self._functions.close()
        if self._closes_store:
            self._functions.store.close()

    def _check_outside(self) -> None:
        from usermetadata._core.reentry import check_outside

        check_outside(self._functions.store.storage)

    async def aclose(self) -> None:
        """Close as ``close`` does, without blocking the event loop."""
        import asyncio

        await asyncio.to_thread(self.close)

    def _use(self, functions: Functions) -> None:
        from usermetadata.asyncio import AsyncioUserMetadata
        from usermetadata.syncio import SyncioUserMetadata

        self._functions = functions
        self.syncio = SyncioUserMetadata(functions)
        self.asyncio = AsyncioUserMetadata(functions)


class UserMetadataRecipe(UserMetadata[dict[str, Any], "Mapping[str, Any]"]):
    """The ``UserMetadata`` that ``init`` has made; it has the name that the SDK gives it.

    Attributes:
        recipe_id: ``"usermetadata"``, as in the SDK.
    """

    recipe_id: ClassVar[str] = "usermetadata"

    @staticmethod
    def init(
        storage: Storage | str | os.PathLike[str] | None = None,
        override: UserMetadataOverrideConfig | None = None,
        indexes: Iterable[Index] = (),
    ) -> None:
        """See :func:`usermetadata.init`."""
        from usermetadata._core.urls import DEFAULT_URL, open_storage

        if storage is None:
            storage = os.environ.get("USERMETADATA_URL") or DEFAULT_URL
        indexes = tuple(indexes)
        opened = open_storage(storage, indexes)
        is_named = opened is not storage
        # A relative path names another file in another directory; the representation tells.
        has_repr = type(opened).__repr__ is not object.__repr__  # that one has the address
        named = (str(storage), repr(opened) if has_repr else "") if is_named else (opened, "")
        arguments = named, override, indexes
        made = default.get()
        if made is None:
            recipe = UserMetadataRecipe(opened, override=override)
            recipe._functions.store.is_ours = is_named
            made = default.claim(Made(recipe, recipe._functions, arguments))
        if made.arguments != arguments:
            raise UsageError(
                "usermetadata.init: it was called before, with other arguments; call it once, where"
                " the program starts. A test that needs another storage calls"
                " usermetadata.close() first. A second store is a UserMetadata(...)"
            )

    @staticmethod
    def get_instance() -> UserMetadataRecipe:
        """Return what ``init`` has made.

        Returns:
            The one instance of this process.

        Raises:
            UsageError: ``init`` was not called.
        """
        made = default.get()
        if made is None:
            raise not_initialised()
        return made.recipe

    @staticmethod
    def reset() -> None:
        """See :func:`usermetadata.close`."""
        made = default.get()
        if made is not None:
            made.recipe.close()

    def close(self) -> None:
        """See :func:`usermetadata.close`."""
        self._check_outside()
        made = default.get()
        if made is not None and made.recipe is self:
            default.replace(None)
        super().close()

    @property
    def override(self) -> UserMetadataOverrideConfig | None:
        """What ``init`` got."""
        return self._functions.override

    @property
    def recipe_implementation(self) -> RecipeInterface:
        """The functions as the override left them, for ``asyncio``."""
        return self._functions.asynchronous


def init(
    storage: Storage | str | os.PathLike[str] | None = None,
    override: UserMetadataOverrideConfig | None = None,
    indexes: Iterable[Index] = (),
) -> None:
    """Choose where metadata is stored; call it once, before any other function.

    Nothing is opened yet: the first call does that. So ``init`` may be called at module level, also
    in a program that forks its workers later. A second call with the same arguments does nothing,
    as in a notebook or under Streamlit. It may be called in any thread.

    Args:
        storage: a storage; or a URL, ``memory://``, ``postgresql://...`` or ``sqlite:///users.db``
            (four slashes before an absolute path), with arguments of the storage as parameters,
            ``?timeout=5``; or the path of an SQLite file. ``None`` means the URL or path in the
            environment variable ``USERMETADATA_URL``, and ``sqlite:///users.db`` if that is not
            set.
        override: replaces or wraps the functions, for both facades.
        indexes: the properties that users can be found by, for a URL or a path; a storage gets them
            in its constructor.

    Raises:
        UsageError: ``init`` was called before with other arguments, and ``close`` not since.
        InvalidInputError: ``storage`` or ``override`` is none of the above, or a method of the
            storage is missing or wrong.

    Example:
        >>> init("memory://")
        >>> UserMetadataRecipe.get_instance()
        UserMetadataRecipe(InMemoryStorage(app_id='public'))
        >>> close()

    For more than one store in a process use :class:`usermetadata.UserMetadata`.
    """
    UserMetadataRecipe.init(storage, override, indexes)


def within(
    connection: object,
) -> AbstractContextManager[SyncioUserMetadata[dict[str, Any], Mapping[str, Any]]]:
    """Read and write in the caller's own transaction, on the storage of ``init``.

    Args:
        connection: as :meth:`usermetadata.UserMetadata.within` takes it.

    Returns:
        The block that method returns.

    Raises:
        InvalidInputError: as that method does.
        UsageError: likewise; or ``init`` was not called.
    """
    return UserMetadataRecipe.get_instance().within(connection)


def close() -> None:
    """Undo ``init``, which may then be called again; closes the storage if ``init`` opened it.

    Calls of ``usermetadata.asyncio`` that are under way are completed first. A storage that the
    caller made and passed to ``init`` stays open. Without ``init`` before, nothing happens.

    Raises:
        UsageError: a function given to ``modify_user_metadata`` calls it.
    """
    UserMetadataRecipe.reset()
