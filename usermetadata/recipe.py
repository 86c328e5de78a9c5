"""The recipe: ``init``, overrides, and what both facades find their functions by."""

from __future__ import annotations

import os

from usermetadata.exceptions import InvalidInputError, UsageError
from usermetadata.interfaces import RecipeInterface

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, ClassVar

    from usermetadata.coalescing import Coalescer
    from usermetadata.storage import Storage


class UserMetadataOverrideConfig:
    """What ``init`` takes to replace or wrap the recipe's functions.

    Args:
        functions: takes the original implementation and returns the one to use: the original with
            methods replaced by ``async`` functions, or an instance of a subclass of
            ``RecipeInterface`` that calls the original.

    Example:
        >>> def functions(original: RecipeInterface) -> RecipeInterface:
        ...     get_original = original.get_user_metadata
        ...     async def get_user_metadata(user_id, user_context):
        ...         return await get_original(user_id.lower(), user_context)
        ...     original.get_user_metadata = get_user_metadata
        ...     return original
        >>> override = UserMetadataOverrideConfig(functions=functions)

    The pattern is that of SuperTokens' SDKs, whose older name for it is ``InputOverrideConfig``.
    """

    def __init__(
        self, functions: Callable[[RecipeInterface], RecipeInterface] | None = None
    ) -> None:
        self.functions = functions


InputOverrideConfig = UserMetadataOverrideConfig


def init(
    storage: Storage | str | os.PathLike[str] | None = None,
    override: UserMetadataOverrideConfig | None = None,
) -> None:
    """Say where metadata is kept; to be called once, before any other function.

    Nothing is opened yet: the first call does that, so ``init`` may stand at the top of a program
    that forks its workers later.

    Args:
        storage: a storage; or a URL, ``memory://``, ``postgresql://...`` or ``sqlite:///users.db``
            (four slashes before an absolute path); or the path of an SQLite file. ``None`` means
            the URL or path in the environment variable ``USERMETADATA_URL``, and
            ``sqlite:///usermetadata.db`` if that is not set.
        override: replaces or wraps the functions, for both facades.

    Raises:
        UsageError: ``init`` was called before, and ``UserMetadataRecipe.reset()`` not since.
        InvalidInputError: ``storage`` or ``override`` is none of the above.

    Example:
        >>> init("memory://")
        >>> UserMetadataRecipe.get_instance()
        UserMetadataRecipe(InMemoryStorage(app_id='public'))
        >>> UserMetadataRecipe.reset()
    """
    UserMetadataRecipe.init(storage, override)


class UserMetadataRecipe:
    """What ``init`` set up; the facades find it by ``get_instance()``.

    Args:
        storage: where the metadata is kept.
        override: replaces or wraps the functions.
        owns_storage: whether ``reset`` closes the storage.

    Attributes:
        recipe_id: ``"usermetadata"``, as in the SDK.
        storage: where the metadata is kept.
        override: what ``init`` got.
        blocking_implementation: the functions, as the override left them, each returning its result
            itself; ``usermetadata.syncio`` calls these.
    """

    recipe_id: ClassVar[str] = "usermetadata"
    _instance: ClassVar[UserMetadataRecipe | None] = None

    def __init__(
        self,
        storage: Storage,
        override: UserMetadataOverrideConfig | None = None,
        *,
        owns_storage: bool = False,
    ) -> None:
        # Here, as all that init() needs and importing a facade does not.
        import threading

        self.storage = storage
        self.override = override
        self._one_at_a_time = threading.Lock()
        self._owns_storage = owns_storage
        self._coalescer: Coalescer | None = None
        self._implementation: RecipeInterface | None = None
        self.blocking_implementation: Any
        if override is None or override.functions is None:
            from usermetadata.bridge import OnTheSpot
            from usermetadata.recipe_implementation import RecipeImplementation

            # Its functions return their result itself, whatever the interface says.
            on_the_spot: Any = OnTheSpot(storage)
            self.blocking_implementation = RecipeImplementation(on_the_spot)
        else:
            from usermetadata.bridge import InThreads

            original = self._awaitable_implementation()
            self._implementation = _complete(override.functions(original), original)
            self.blocking_implementation = InThreads(self._implementation)

    def __repr__(self) -> str:
        return f"UserMetadataRecipe({self.storage!r})"

    @staticmethod
    def init(
        storage: Storage | str | os.PathLike[str] | None = None,
        override: UserMetadataOverrideConfig | None = None,
    ) -> None:
        """See :func:`usermetadata.init`."""
        if UserMetadataRecipe._instance is not None:
            raise UsageError(
                "usermetadata.init() was called before: call it once, where the program starts;"
                " a test that needs another storage calls UserMetadataRecipe.reset() first"
            )
        if not isinstance(override, (UserMetadataOverrideConfig, type(None))):
            raise InvalidInputError(
                f"override: {type(override).__name__} is not an override:"
                " pass UserMetadataOverrideConfig(functions=...)"
            )
        if storage is None:
            storage = os.environ.get("USERMETADATA_URL") or "sqlite:///usermetadata.db"
        opened = isinstance(storage, (str, os.PathLike))
        UserMetadataRecipe._instance = UserMetadataRecipe(
            open_storage(storage), override, owns_storage=opened
        )

    @staticmethod
    def get_instance() -> UserMetadataRecipe:
        """Return what ``init`` set up.

        Returns:
            The one instance of this process.

        Raises:
            UsageError: ``init`` was not called.
        """
        if UserMetadataRecipe._instance is None:
            raise UsageError(
                "usermetadata is not initialised: where the program starts, call"
                ' usermetadata.init("sqlite:///users.db")'
            )
        return UserMetadataRecipe._instance

    @staticmethod
    def reset() -> None:
        """Undo ``init``, which may then be called again; closes the storage if ``init`` opened it.

        Calls of ``usermetadata.asyncio`` that are under way come to their end before.

        A storage that the caller made and passed to ``init`` is the caller's to close. Without
        ``init`` before, nothing happens.

        Raises:
            UsageError: a function given to ``modify_user_metadata`` calls it.
        """
        from usermetadata.reentry import refuse_reentry

        refuse_reentry()
        recipe, UserMetadataRecipe._instance = UserMetadataRecipe._instance, None
        if recipe is None:
            return
        if recipe._coalescer is not None:
            recipe._coalescer.close()
        if recipe._owns_storage:
            recipe.storage.close()

    @property
    def recipe_implementation(self) -> RecipeInterface:
        """The functions, as the override left them; ``usermetadata.asyncio`` calls these."""
        if self._implementation is None:
            with self._one_at_a_time:
                if self._implementation is None:
                    self._implementation = self._awaitable_implementation()
        return self._implementation

    def _awaitable_implementation(self) -> RecipeInterface:
        from usermetadata.coalescing import Coalescer
        from usermetadata.recipe_implementation import RecipeImplementation

        self._coalescer = Coalescer(self.storage)
        return RecipeImplementation(self._coalescer)


def open_storage(storage: Storage | str | os.PathLike[str]) -> Storage:
    """Return the storage that a URL or a path names, or the storage itself."""
    if isinstance(storage, str):
        scheme, separator, rest = storage.partition("://")
        if not separator:
            return _open_sqlite(storage)
        if storage == "memory://":
            from usermetadata.storage.memory import InMemoryStorage

            return InMemoryStorage()
        if scheme == "sqlite" and rest[:1] in ("", "/"):
            return _open_sqlite(rest[1:] or ":memory:")
        if scheme in ("postgresql", "postgres"):
            return _open_postgres(storage)
        raise InvalidInputError(
            f'storage: {scheme}:// is not a URL that is known: pass "memory://",'
            ' "sqlite:///users.db", "sqlite:////absolute/path/users.db" or "postgresql://..."'
        )
    if isinstance(storage, os.PathLike):
        return _open_sqlite(storage)
    from usermetadata.storage import Storage

    if isinstance(storage, Storage) and not isinstance(storage, type):
        return storage
    raise InvalidInputError(
        f"storage: {type(storage).__name__} is neither a storage nor a URL nor a path:"
        ' pass "sqlite:///users.db"'
    )


def _open_sqlite(path: str | os.PathLike[str]) -> Storage:
    from usermetadata.storage.sqlite import SQLiteStorage

    return SQLiteStorage(path)


def _open_postgres(url: str) -> Storage:
    from usermetadata.storage.postgres import PostgresStorage

    return PostgresStorage(url)


def _complete(overridden: RecipeInterface, original: RecipeInterface) -> RecipeInterface:
    """Let functions that the override does not have be the original's."""
    if not isinstance(overridden, RecipeInterface):
        raise InvalidInputError(
            f"override: functions returned {type(overridden).__name__}, not a RecipeInterface:"
            " return the original, or an instance of a subclass"
        )
    for name in (
        "set_user_metadata",
        "modify_user_metadata",
        "get_bulk_user_metadata",
        "update_bulk_user_metadata",
    ):
        function = getattr(overridden, name)
        if getattr(function, "__func__", None) is getattr(RecipeInterface, name):
            setattr(overridden, name, getattr(original, name))
    return overridden
