"""The functions that ``init`` has made, for the functions of both facades' modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from usermetadata.exceptions import UsageError

if TYPE_CHECKING:
    from usermetadata._core.blocking_functions import BlockingFunctions
    from usermetadata._core.functions import Functions
    from usermetadata.interfaces import RecipeInterface


class Default:
    """Stands for the functions of ``init``, which is called after the facades were imported.

    Attributes:
        functions: those of ``init``, once it was called.
    """

    functions: Functions | None = None

    @property
    def blocking(self) -> BlockingFunctions:
        """The functions for blocking code."""
        if self.functions is None:
            raise not_initialised()
        return self.functions.blocking

    @property
    def asynchronous(self) -> RecipeInterface:
        """The functions for ``asyncio``."""
        if self.functions is None:
            raise not_initialised()
        return self.functions.asynchronous

    def __reduce__(self) -> str:
        """Let other processes use their own ``default``: the module-level functions are pickled."""
        return "default"


default = Default()


def not_initialised() -> UsageError:
    """Return the error of a call before ``init``."""
    return UsageError(
        "usermetadata is not initialised: where the program starts, call"
        ' usermetadata.init("sqlite:///users.db")'
    )
