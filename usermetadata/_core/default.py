"""The functions that ``init`` made; the module-level functions call them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from usermetadata.exceptions import UsageError

if TYPE_CHECKING:
    from usermetadata._core.blocking_functions import BlockingFunctions
    from usermetadata._core.functions import Functions
    from usermetadata.client import UserMetadataRecipe
    from usermetadata.interfaces import RecipeInterface


class Made(NamedTuple):
    """What ``init`` has made.

    Attributes:
        recipe: the store.
        functions: its functions.
        arguments: the arguments of ``init``, to compare with those of a later call.
    """

    recipe: UserMetadataRecipe
    functions: Functions
    arguments: object


class Default:
    """Stands for the functions of ``init``, which is called after the facades were imported."""

    def __init__(self) -> None:
        # Empty, or the result of `init`. Each method of a dictionary is atomic for threads.
        self._made: dict[str, Made] = {}

    def get(self) -> Made | None:
        """Return what ``init`` has made."""
        return self._made.get(_KEY)

    def claim(self, made: Made) -> Made:
        """Use ``made`` if there is nothing yet; return the one that is used."""
        return self._made.setdefault(_KEY, made)

    def replace(self, made: Made | None) -> Made | None:
        """Use ``made`` in any case; return the one that was used before."""
        before = self._made.pop(_KEY, None)
        if made is not None:
            self._made[_KEY] = made
        return before

    @property
    def blocking(self) -> BlockingFunctions:
        """The functions for blocking code."""
        try:
            return self._made[_KEY].functions.blocking
        except KeyError:
            raise not_initialised() from None

    @property
    def asynchronous(self) -> RecipeInterface:
        """The functions for ``asyncio``."""
        try:
            made = self._made[_KEY]
        except KeyError:
            raise not_initialised() from None
        return made.functions.asynchronous

    def __reduce__(self) -> str:
        """Let other processes use their own ``default``: the module-level functions are pickled."""
        return "default"


_KEY = "init"
default = Default()


def not_initialised() -> UsageError:
    """Return the error of a call before ``init``."""
    return UsageError(
        "usermetadata: it is not initialised; where the program starts, call"
        ' usermetadata.init("sqlite:///users.db")'
    )
