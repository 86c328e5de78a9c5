"""What can happen to a stored object: changes, as pure values.

A change is a callable from the stored metadata to the new one, where ``None`` means "no row". The
storage calls it inside its own lock or transaction. A storage may recognise one of the classes here
and do the same natively; it must simply call every other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from usermetadata.merge import merge_metadata

Change = Callable[["dict[str, Any] | None"], "dict[str, Any] | None"]
"""A pure callable from the old metadata to the new; ``None`` on either side means "no row"."""


class _Value:  # noqa: PLW1641 - it holds what has no hash
    """Equal to another of the same class with the same arguments."""

    __slots__: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)):
            return NotImplemented
        return self._arguments() == other._arguments()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self._arguments()))})"

    def _arguments(self) -> list[object]:
        return [getattr(self, name) for name in self.__slots__]


class Merge(_Value):
    """Lay ``update`` over the stored metadata; a user without a row gets one.

    Args:
        update: properties to set, and with the value ``None`` those to remove.

    Example:
        >>> Merge({"a": None, "b": 2})({"a": 1})
        {'b': 2}
    """

    __slots__ = ("update",)

    def __init__(self, update: Mapping[str, Any]) -> None:
        self.update: Final = update

    def __call__(self, old: dict[str, Any] | None) -> dict[str, Any]:
        """Return the merged metadata."""
        return merge_metadata(old or {}, self.update)


class Replace(_Value):
    """Store ``metadata`` whole, whatever was there; root-level ``None`` is left out.

    Args:
        metadata: the properties that the user has from now on.

    Example:
        >>> Replace({"b": 2, "c": None})({"a": 1})
        {'b': 2}
    """

    __slots__ = ("metadata",)

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata: Final = metadata

    def __call__(self, old: dict[str, Any] | None) -> dict[str, Any]:
        """Return the new metadata; ``old`` is not looked at."""
        return merge_metadata({}, self.metadata)


class Clear(_Value):
    """Remove the row; no error if there is none.

    Example:
        >>> Clear()({"a": 1}) is None
        True
    """

    __slots__ = ()

    def __call__(self, old: dict[str, Any] | None) -> None:
        """Return ``None``; ``old`` is not looked at."""


class Modify(_Value):
    """Store what ``function`` makes of the stored metadata; root-level ``None`` is left out.

    Args:
        function: takes the stored metadata (``{}`` if there is none; it may change it) and returns
            the new one. What it raises leaves the storage untouched.

    Example:
        >>> Modify(lambda metadata: {"visits": metadata.get("visits", 0) + 1})(None)
        {'visits': 1}
    """

    __slots__ = ("function",)

    def __init__(self, function: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
        self.function: Final = function

    def __call__(self, old: dict[str, Any] | None) -> dict[str, Any]:
        """Return the new metadata."""
        return merge_metadata({}, self.function({} if old is None else old))
