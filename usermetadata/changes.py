"""Changes: pure callables from the stored metadata to the new metadata.

``None`` on either side means "no row". A storage calls each change inside its own lock or
transaction. It may recognise the classes of this module and do the same natively, for example as
one SQL statement. It calls every other change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from usermetadata.merge import merge_metadata

Change = Callable[["dict[str, Any] | None"], "dict[str, Any] | None"]
"""A pure callable from the old metadata to the new; ``None`` on either side means "no row"."""

Key = TypeVar("Key")
Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Merge:
    """Merge ``update`` into the stored metadata; a user without a row gets one.

    Args:
        update: properties to set; a property whose value is ``None`` is removed.

    Example:
        >>> Merge({"a": None, "b": 2})({"a": 1})
        {'b': 2}
    """

    update: Mapping[str, Any]

    def __call__(self, old: dict[str, Any] | None) -> dict[str, Any]:
        """Return the merged metadata."""
        return merge_metadata(old or {}, self.update)


@dataclass(frozen=True, slots=True)
class Replace:
    """Replace the stored metadata with ``metadata``; root-level ``None`` is left out.

    Args:
        metadata: the new properties.

    Example:
        >>> Replace({"b": 2, "c": None})({"a": 1})
        {'b': 2}
    """

    metadata: Mapping[str, Any]

    def __call__(self, old: dict[str, Any] | None) -> dict[str, Any]:
        """Return the new metadata; ``old`` is ignored."""
        return merge_metadata({}, self.metadata)


@dataclass(frozen=True, slots=True)
class Clear:
    """Remove the row; no error if there is none.

    Example:
        >>> Clear()({"a": 1}) is None
        True
    """

    def __call__(self, old: dict[str, Any] | None) -> None:
        """Return ``None``; ``old`` is ignored."""


@dataclass(frozen=True, slots=True)
class Modify:
    """Replace the stored metadata with ``function(metadata)``; root-level ``None`` is left out.

    Args:
        function: takes the stored metadata, ``{}`` if there is none, and returns the new metadata.
            It may change its argument. If it raises, the storage stays as it was.

    Example:
        >>> Modify(lambda metadata: {"visits": metadata.get("visits", 0) + 1})(None)
        {'visits': 1}
    """

    function: Callable[[dict[str, Any]], Mapping[str, Any]]

    def __call__(self, old: dict[str, Any] | None) -> dict[str, Any]:
        """Return the new metadata."""
        return merge_metadata({}, self.function({} if old is None else old))


BLIND = (Clear, Replace)
"""The changes that ignore what is stored: they need no read, and they repair a damaged row."""


def apply_in_order(
    changes: Iterable[tuple[Key, Change]],
    rows: dict[Key, Row],
    *,
    decode: Callable[[Key, Row], dict[str, Any]],
    encode: Callable[[dict[str, Any]], Row],
) -> list[dict[str, Any] | None]:
    """Apply changes one after the other to encoded rows; for storages that keep text or bytes.

    Each change sees the results of those before it. The rows share nothing with the results,
    because ``encode`` returns a new object.

    Args:
        changes: pairs of a row's key and the change to that row.
        rows: the stored rows by key, at least those that the changes read, without absent rows. The
            function updates it: changed rows are replaced, removed rows are deleted.
        decode: takes a key and its row and returns the metadata.
        encode: takes the new metadata and returns the row.

    Returns:
        One entry per change, in order: the new metadata, or ``None`` if the row is removed.

    Raises:
        Exception: any exception of a change, of ``decode`` or of ``encode``, unchanged.

    Example:
        >>> import json
        >>> rows = {"alice": '{"n": 1}'}
        >>> changes = [("alice", Merge({"m": 2})), ("bob", Merge({})), ("bob", Clear())]
        >>> apply_in_order(
        ...     changes, rows, decode=lambda user_id, row: json.loads(row), encode=json.dumps
        ... )
        [{'n': 1, 'm': 2}, {}, None]
        >>> rows
        {'alice': '{"n": 1, "m": 2}'}
    """
    results: list[dict[str, Any] | None] = []
    for key, change in changes:
        row = None if isinstance(change, BLIND) else rows.get(key)
        new = change(None if row is None else decode(key, row))
        if new is None:
            rows.pop(key, None)
        else:
            rows[key] = encode(new)
        results.append(new)
    return results
