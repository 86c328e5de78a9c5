"""The recipe: ``init``, overrides, and the functions that both facades call."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar, cast

from usermetadata.exceptions import InvalidInputError, UsageError
from usermetadata.interfaces import RecipeInterface

if TYPE_CHECKING:
    from collections.abc import Callable

    from usermetadata._core.blocking_functions import BlockingFunctions
    from usermetadata._core.runners import AsyncioRunner
    from usermetadata.storage import Storage


class UserMetadataOverrideConfig:
    """Replaces or wraps the recipe's functions; an argument of ``init``.

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
    """Choose where metadata is stored; call it once, before any other function.

    Nothing is opened yet: the first call does that. So ``init`` may be called at module level, also
    in a program that forks its workers later.

    Args:
        storage: a storage; or a URL, ``memory://``, ``postgresql://...`` or ``sqlite:///users.db``
            (four slashes before an absolute path), with arguments of the storage as parameters,
            ``?timeout=5``; or the path of an SQLite file. ``None`` means the URL or path in the
            environment variable ``USERMETADATA_URL``, and ``sqlite:///users.db`` if that is not
            set.
        override: replaces or wraps the functions, for both facades.

    Raises:
        UsageError: ``init`` was called before, and ``UserMetadataRecipe.reset()`` not since.
        InvalidInputError: ``storage`` or ``override`` is none of the above, or a method of the
            storage is missing or wrong.

    Example:
        >>> init("memory://")
        >>> UserMetadataRecipe.get_instance()
        UserMetadataRecipe(InMemoryStorage(app_id='public'))
        >>> UserMetadataRecipe.reset()
    """
    UserMetadataRecipe.init(storage, override)


class UserMetadataRecipe:
    """The storage and the override that ``init`` was given; ``get_instance()`` returns it.

    Args:
        storage: where the metadata is stored.
        override: replaces or wraps the functions.
        owns_storage: whether ``reset`` closes the storage.

    Attributes:
        recipe_id: ``"usermetadata"``, as in the SDK.
        storage: where the metadata is stored.
        override: what ``init`` got.
        blocking_implementation: the functions as the override left them, blocking;
            ``usermetadata.syncio`` calls these.
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
        # Here, because importing a facade needs none of it.
        import threading

        from usermetadata._core.blocking_functions import BlockingFunctions
        from usermetadata._core.runners import BlockingOverride, BlockingRunner

        self.storage = storage
        self.override = override
        self._owns_storage = owns_storage
        self._lock = threading.Lock()
        self._runner: AsyncioRunner | None = None
        self._implementation: RecipeInterface | None = None
        self.blocking_implementation: BlockingFunctions
        if override is None or override.functions is None:
            self.blocking_implementation = BlockingFunctions(BlockingRunner(storage))
        else:
            original = self._asyncio_functions()
            self._implementation = _overridden(override.functions, original)
            self.blocking_implementation = cast(
                "BlockingFunctions", BlockingOverride(self._implementation)
            )

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
        from usermetadata._core.urls import DEFAULT_URL, open_storage

        if storage is None:
            storage = os.environ.get("USERMETADATA_URL") or DEFAULT_URL
        opened = isinstance(storage, (str, os.PathLike))
        UserMetadataRecipe._instance = UserMetadataRecipe(
            open_storage(storage), override, owns_storage=opened
        )

    @staticmethod
    def get_instance() -> UserMetadataRecipe:
        """Return the recipe that ``init`` has made.

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

        Calls of ``usermetadata.asyncio`` that are under way are completed first. A storage that the
        caller made and passed to ``init`` stays open. Without ``init`` before, nothing happens.

        Raises:
            UsageError: a function given to ``modify_user_metadata`` calls it.
        """
        from usermetadata._core.reentry import called_inside, inside

        if inside.get():
            raise called_inside()
        recipe, UserMetadataRecipe._instance = UserMetadataRecipe._instance, None
        if recipe is None:
            return
        if recipe._runner is not None:
            recipe._runner.close()
        if recipe._owns_storage:
            recipe.storage.close()

    @property
    def recipe_implementation(self) -> RecipeInterface:
        """The functions as the override left them; ``usermetadata.asyncio`` calls these."""
        if self._implementation is None:
            with self._lock:
                if self._implementation is None:
                    self._implementation = self._asyncio_functions()
        return self._implementation

    def _asyncio_functions(self) -> RecipeInterface:
        from usermetadata._core.asyncio_functions import AsyncioFunctions
        from usermetadata._core.runners import AsyncioRunner

        self._runner = AsyncioRunner(self.storage)
        return AsyncioFunctions(self._runner)


def _overridden(
    functions: Callable[[RecipeInterface], RecipeInterface], original: RecipeInterface
) -> RecipeInterface:
    """Return the override's functions, and the original's where it has none."""
    from collections.abc import Coroutine

    if not callable(functions):
        raise InvalidInputError(
            f"override: functions: {type(functions).__name__} cannot be called; pass a function"
            " that takes the original and returns a RecipeInterface"
        )
    overridden = functions(original)
    if isinstance(overridden, Coroutine):
        overridden.close()  # else Python warns that it was never awaited
    if not isinstance(overridden, RecipeInterface):
        raise InvalidInputError(
            f"override: functions returned {type(overridden).__name__}, not a RecipeInterface; make"
            " it a plain function that returns the original, or an instance of a subclass"
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
