"""Indexes of metadata: the properties by which users can be found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from usermetadata.exceptions import InvalidInputError, UsageError
from usermetadata.validation import copy_metadata

if TYPE_CHECKING:
    from usermetadata.codec import Metadata
    from usermetadata.interfaces import Value

NAME_MAX_LENGTH = 64
VALUE_MAX_LENGTH = 255


@dataclass(frozen=True, slots=True)
class Index:
    r"""Declares that users can be found by a root-level property.

    Indexed values are texts of up to 255 characters without U+0000, integers and booleans. Writing
    any other value of the property is an error. The property may be absent.

    Args:
        name: the property: 1 to 64 printable ASCII characters without ``"`` and ``\\``.
        unique: whether a value may belong to only one user of an app.

    Raises:
        InvalidInputError: the name is not valid, or ``unique`` is not a ``bool``.

    Example:
        >>> Index("stripe_customer_id", unique=True)
        Index(name='stripe_customer_id', unique=True)
    """

    name: str
    unique: bool = False

    def __post_init__(self) -> None:
        name = self.name
        if (
            not isinstance(name, str)
            or not 0 < len(name) <= NAME_MAX_LENGTH
            or not (name.isascii() and name.isprintable())
            or '"' in name
            or "\\" in name
        ):
            raise InvalidInputError(
                f"Index: {name!r} cannot be the name of an index; pass a property of 1 to"
                f" {NAME_MAX_LENGTH} printable ASCII characters without quotation marks and"
                " backslashes"
            )
        if not isinstance(self.unique, bool):
            raise InvalidInputError(
                f"Index({name!r}): unique is of type {type(self.unique).__name__}; pass True or"
                " False, and declare each property as a separate Index"
            )


def check_indexes(indexes: Iterable[Index]) -> tuple[Index, ...]:
    """Return the indexes, checked.

    Raises:
        InvalidInputError: one is not an ``Index``, or two have the same name.
    """
    if isinstance(indexes, (str, Index)) or not isinstance(indexes, Iterable):
        raise InvalidInputError(
            f"indexes: {type(indexes).__name__} is not a list of indexes; pass for example"
            ' [Index("plan")]'
        )
    checked = tuple(indexes)
    names: set[str] = set()
    for index in checked:
        if not isinstance(index, Index):
            raise InvalidInputError(
                f'indexes: {type(index).__name__} is not an index; pass for example [Index("plan")]'
            )
        if index.name in names:
            raise InvalidInputError(f"indexes: {index.name!r} is declared twice; declare it once")
        names.add(index.name)
    return checked


def check_where(where: object, indexes: Iterable[Index]) -> dict[str, Value]:
    """Return a checked copy of the properties to search by.

    Raises:
        InvalidInputError: it is not a mapping of properties to values that can be indexed.
        UsageError: none of its properties is indexed.
    """
    checked = copy_metadata(where, "where")
    if not checked:
        raise InvalidInputError('where: it is empty; pass a property, for example {"plan": "pro"}')
    for name, value in checked.items():
        fault = _fault_of(value)
        if fault:
            raise InvalidInputError(f"where[{name!r}]: {fault}; no user can be found by it")
    for index in indexes:
        if index.name in checked:
            return checked
    name = next(iter(checked))
    raise UsageError(
        f"where: none of its properties is indexed; declare one, for example"
        f" indexes=[Index({name!r})]"
    )


def values_of(
    metadata: Mapping[str, Any], indexes: Iterable[Index], user_id: str
) -> dict[str, Value]:
    """Return the values by which a user with this metadata is found, by the index's name.

    Args:
        metadata: the metadata to store.
        indexes: the storage's indexes.
        user_id: the user, for the error message.

    Raises:
        InvalidInputError: a value cannot be indexed; the message names the index.
    """
    values: dict[str, Value] = {}
    for index in indexes:
        value = metadata.get(index.name)
        if value is not None:  # another program's row may have a null, which counts as absent
            fault = _fault_of(value)
            if fault:
                raise InvalidInputError(
                    f"metadata of user {user_id!r}: property {index.name!r} has an index, and"
                    f" {fault}; store a short text, an integer or a boolean there"
                )
            values[index.name] = value
    return values


def matches(metadata: Metadata, where: Mapping[str, Value]) -> bool:
    """Tell whether every property of ``where`` has that value, in type and value."""
    return all(
        name in metadata and type(metadata[name]) is type(value) and metadata[name] == value
        for name, value in where.items()
    )


def _fault_of(value: Any) -> str | None:
    if not isinstance(value, (str, int)):
        return f"{type(value).__name__} is neither a text, an integer nor a boolean"
    if isinstance(value, str):
        if len(value) > VALUE_MAX_LENGTH:
            return f"its text has more than {VALUE_MAX_LENGTH} characters"
        if "\0" in value:
            return "its text holds U+0000"
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                return "its text holds a lone surrogate"
    return None
