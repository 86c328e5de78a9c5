"""``UserMetadata``, and ``init``, which makes one for ``syncio`` and ``asyncio``."""

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
    """One store of metadata: a storage, an override, and the functions that use them.

    A process may have any number of stores. They are independent of each other, and may be used in
    any thread and event loop. Nothing is opened before the first call.

    ``UserMetadata[Prefs]``, with a ``TypedDict``, is typed. ``Prefs`` is the type of the stored
    metadata: in results, in ``set`` and in the function of ``modify``. It is also the type of an
    update, unless a second type is given: ``UserMetadata[Prefs, PrefsUpdate]``. At run time the
    types have no effect.

    Args:
        storage: a storage, a URL or a path, as for ``init``.
        override: replaces or wraps the functions.
        app_id: the app of the metadata. ``None`` means the app of the URL or the storage, by
            default ``"public"``.
        model: validates metadata before it is written. It may be a function that takes the metadata
            and, if that is not valid, raises an exception or returns ``False``. It may also be a
            ``pydantic.TypeAdapter``, a pydantic model, or another object with a method
            ``validate_python``. The metadata is stored as it was passed. The exception becomes the
            cause of an ``InvalidInputError``.
        indexes: the properties by which users can be found. Only with a URL or a path.

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
        # Imported here to keep importing the package fast.
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
        """Return this store for another app; neither sees the other's users.

        Both share the connections, the threads, the override and the model, so many apps need no
        more connections than one. Only closing this object closes the store.

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
        """Read and write in the caller's transaction, with blocking functions in a ``with`` block.

        Metadata is committed or rolled back together with the caller's other changes. The block
        does not commit, roll back or close anything. Each write runs in a savepoint, so the
        transaction stays usable after a failed write. Reads see what the transaction has written.
        No call is retried. On a connection in autocommit mode, each call is a separate transaction.

        Args:
            connection: a ``sqlite3.Connection``, a ``sqlite_utils.Database``, a
                ``psycopg.Connection``, a SQLAlchemy ``Session`` or ``Connection``, or Django's
                ``connection``. It must be connected to the storage's database.

        Yields:
            The functions of :mod:`usermetadata.syncio`. After the block they raise ``UsageError``.

        Raises:
            InvalidInputError: the connection is not supported, or is connected to another database.
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
        stays open. ``close`` may be called twice.

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
    """The ``UserMetadata`` that ``init`` made; the class name is from SuperTokens' Python SDK.

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
        # A relative path depends on the working directory; the representation has the absolute
        # path.
        has_repr = type(opened).__repr__ is not object.__repr__  # it has an address
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
            The only instance in this process.

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
        """The override that was passed to ``init``."""
        return self._functions.override

    @property
    def recipe_implementation(self) -> RecipeInterface:
        """The ``asyncio`` functions, with the override applied."""
        return self._functions.asynchronous


def init(
    storage: Storage | str | os.PathLike[str] | None = None,
    override: UserMetadataOverrideConfig | None = None,
    indexes: Iterable[Index] = (),
) -> None:
    """Configure the storage. Call once, before any other function.

    ``init`` opens nothing; the first call of another function does. So call it at module level,
    even in a program that forks workers later. A second call with the same arguments does nothing.
    This helps in notebooks and under Streamlit. ``init`` may be called in any thread.

    Args:
        storage: a storage, a URL, or the path of an SQLite file. URLs are ``memory://``,
            ``postgresql://...`` and ``sqlite:///users.db`` (four slashes before an absolute path).
            A URL may have arguments of the storage as parameters, for example ``?timeout=5``.
            ``None`` means the URL or path in the environment variable ``USERMETADATA_URL``, or
            ``sqlite:///users.db`` if that is not set.
        override: replaces or wraps the blocking and the ``asyncio`` functions.
        indexes: the properties by which users can be found. Only with a URL or a path; a storage
            gets them in its constructor.

    Raises:
        UsageError: ``init`` was called with other arguments, and ``close`` was not called since.
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
    """Read and write in the caller's transaction, on the storage of ``init``.

    Args:
        connection: as for :meth:`usermetadata.UserMetadata.within`.

    Returns:
        The context manager of that method.

    Raises:
        InvalidInputError: as for that method.
        UsageError: as for that method; or ``init`` was not called.

    Example:
        >>> import sqlite3
        >>> connection = sqlite3.connect("shop.db")
        >>> init("sqlite:///shop.db")
        >>> with within(connection) as metadata:
        ...     metadata.update_user_metadata("alice", {"plan": "pro"}).metadata
        {'plan': 'pro'}
        >>> connection.commit()
        >>> connection.close()
        >>> close()
    """
    return UserMetadataRecipe.get_instance().within(connection)


def close() -> None:
    """Undo ``init``, so that it may be called again; close the storage that ``init`` opened.

    Calls of ``usermetadata.asyncio`` that are under way are completed first. A storage that the
    caller made and passed to ``init`` stays open. Without an earlier ``init``, nothing happens.

    Raises:
        UsageError: a function given to ``modify_user_metadata`` calls it.

    Example:
        >>> init("memory://")
        >>> close()
        >>> init("sqlite:///users.db")
        >>> close()
    """
    UserMetadataRecipe.reset()
