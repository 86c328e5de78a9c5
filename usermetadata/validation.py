"""Checking what callers pass in: metadata, user ids and app ids."""

from __future__ import annotations

import json
import math
import numbers
import reprlib
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from usermetadata.exceptions import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from usermetadata.codec import Metadata

T = TypeVar("T")

USER_ID_MAX_LENGTH = 255
APP_ID_MAX_LENGTH = 64

MAX_DEPTH = 200
"""How many levels objects and arrays may nest, counting the root object. Python's JSON decoder
recurses and Python allows 1000 levels in all; a limit of 200 leaves stack depth for the caller."""

_SHOWN_PARTS = 10
_SHOWN_CHARACTERS = 60
_TOO_DEEP = f"nests deeper than {MAX_DEPTH} levels: store it flatter"
# Python may refuse to write longer integers as text, at the earliest from 640 digits on.
_ALWAYS_WRITABLE = 10**640
_LEAST, _GREATEST = -(2**63), 2**63  # comparing small numbers is faster
# Up to this many values, checking one by one is faster than checking all together.
_FEW = 8


def check_user_id(user_id: object, name: str = "user_id") -> str:
    """Return ``user_id`` if it is a valid user id.

    A user id is a ``str`` of 1 to 255 characters (code points) without U+0000 and without lone
    surrogates. Nothing else is assumed about it, and the user need not exist.

    Args:
        user_id: the value to check.
        name: the argument's name, for the error message.

    Returns:
        The same text, as a plain ``str``.

    Raises:
        InvalidInputError: it is not a valid user id.

    Example:
        >>> check_user_id("")
        Traceback (most recent call last):
            ...
        usermetadata.exceptions.InvalidInputError: user_id: is empty; pass the id of a user
    """
    # Nearly every id is plain, and each call of the library checks one.
    if (
        type(user_id) is str
        and 0 < len(user_id) <= USER_ID_MAX_LENGTH
        and user_id.isascii()
        and "\0" not in user_id
    ):
        return user_id
    return _check_identifier(user_id, name, USER_ID_MAX_LENGTH, "pass the id of a user")


def check_app_id(app_id: object) -> str:
    """Return ``app_id`` if it is a valid app id.

    The rules for user ids apply, with at most 64 characters.

    Args:
        app_id: the value to check.

    Returns:
        The same text, as a plain ``str``.

    Raises:
        InvalidInputError: it is not a valid app id.

    Example:
        >>> check_app_id("public")
        'public'
    """
    return _check_identifier(app_id, "app_id", APP_ID_MAX_LENGTH, 'pass the id of an app, "public"')


def check_after(user_id: object) -> str:
    """Return ``user_id`` if a page can begin after it.

    Rows of other programs may have longer user ids than :func:`check_user_id` allows.

    Args:
        user_id: the last user id of the previous page; ``""`` for the first page.

    Raises:
        InvalidInputError: it is not text, or no user id can be this text.

    Example:
        >>> check_after("")
        ''
    """
    remedy = 'pass the last user id of the page before, or "" to begin'
    return _check_identifier(user_id, "after", sys.maxsize, remedy) if user_id != "" else ""


def copy_metadata(value: object, name: str) -> Metadata:
    """Return a checked deep copy of ``value``, a JSON object that a caller passed in.

    Subclasses of ``str``, ``int`` and ``float``, proxies of them and numpy's scalars become the
    plain type, any mapping becomes a ``dict``, a tuple becomes a ``list``.

    Args:
        value: the value to check and copy; it is not changed.
        name: the argument's name, for the error message.

    Returns:
        The copy, which shares nothing mutable with ``value``.

    Raises:
        InvalidInputError: something in it cannot be stored as JSON; the message says where.

    Example:
        >>> copy_metadata({"a": (1, 2)}, "metadata_update")
        {'a': [1, 2]}
        >>> copy_metadata({"a": [0, 1, 2, float("nan")]}, "metadata_update")
        Traceback (most recent call last):
            ...
        usermetadata.exceptions.InvalidInputError: metadata_update["a"][3]: nan is not JSON
    """
    if type(value) is not dict and not isinstance(value, Mapping):
        raise InvalidInputError(
            f"{name}: {type(value).__name__} is not a mapping; pass a dict of properties"
        )
    try:
        return _copy_object(value, 1)
    except _FaultError as fault:
        raise InvalidInputError(f"{name}{fault.place()}: {fault.reason}") from fault.__cause__


def _check_identifier(identifier: object, name: str, max_length: int, remedy: str) -> str:
    value = identifier if type(identifier) is str else _plain(identifier)
    if not isinstance(value, str):
        raise InvalidInputError(f"{name}: {type(identifier).__name__} is not str; {remedy}")
    if not value:
        raise InvalidInputError(f"{name}: is empty; {remedy}")
    if len(value) > max_length:
        raise InvalidInputError(f"{name}: has {len(value)} characters; {max_length} are allowed")
    if "\0" in value:
        raise InvalidInputError(
            f"{name}: holds U+0000, which databases cannot store; leave it out: {value!r}"
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidInputError(
                f"{name}: holds a lone surrogate, which is not Unicode text; leave it out:"
                f" {value!r}"
            ) from None
    return value


class _FaultError(Exception):
    """A value that cannot be stored; the frames it unwinds add its place, innermost first."""

    def __init__(self, reason: str, culprit: object) -> None:
        self.reason = reason
        self.culprit = culprit
        self.path: list[object] = []

    def pass_through(self, container: object, place: object) -> None:
        """Note where in ``container`` the fault is; the fault may be the container itself."""
        if self.culprit is container:
            self.reason = "contains itself"
            self.path.clear()
        self.path.append(place)

    def place(self) -> str:
        parts = [f"[{_show(part)}]" for part in reversed(self.path)]
        if len(parts) > _SHOWN_PARTS:
            parts[_SHOWN_PARTS:] = ["…"]
        return "".join(parts)


def _copy(value: Any, depth: int) -> Any:  # noqa: PLR0911 - one case per type
    kind = type(value)
    if kind is str:
        return value if value.isascii() else _copy_text(value)
    if value is None or kind is bool:
        return value
    if kind is dict:
        return _copy_object(value, depth)
    if kind is int:
        return value if -_ALWAYS_WRITABLE < value < _ALWAYS_WRITABLE else _copy_long_integer(value)
    if kind is float:
        if math.isfinite(value):
            return value
        raise _FaultError(f"{value} is not JSON", value)
    if isinstance(value, Mapping):
        return _copy_object(value, depth)
    if isinstance(value, (list, tuple)):
        return _copy_array(value, depth)
    plain = _plain(value)
    if plain is None:
        to = "an int or a float" if isinstance(value, numbers.Number) else "a str"
        reason = f"{kind.__name__} is not JSON; convert it first, for example to {to}"
        raise _FaultError(reason, value)
    return _copy(plain, depth)


def _plain(value: Any) -> str | bool | int | float | None:
    """Return the plain value of a subclass of a JSON type, or of a proxy of such a value.

    ``None`` means that there is none: values that would be rounded or lose their unit have none.
    """
    kind = type(value)
    # A subclass (an enum's member, numpy's float64) may have overridden str() or int().
    if issubclass(kind, str):
        return str.__str__(value)
    if issubclass(kind, int):
        return int.__int__(value)
    if issubclass(kind, float):
        return float.__float__(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None and issubclass(kind, (numpy.bool_, numpy.integer, numpy.floating)):
        item = value.item()
        # A timedelta64 is an integer in numpy, and a longdouble has more digits than a float.
        is_plain = type(item) in (bool, int, float) and not issubclass(kind, numpy.timedelta64)
        return item if is_plain else None
    # A proxy (werkzeug's LocalProxy) claims the type of its object, and equals it. So does a mock,
    # which is equal to nothing.
    with suppress(Exception):
        for claimed in (str, bool, int, float):
            if isinstance(value, claimed):
                converted = claimed(value)
                return converted if type(converted) is claimed and converted == value else None
    return None


def _copy_object(  # noqa: C901 - function calls would cost more than their work
    mapping: Mapping[Any, Any], depth: int
) -> Metadata:
    if depth > MAX_DEPTH:
        raise _FaultError(_TOO_DEEP, mapping)
    copied: Metadata = {}
    key: Any = None
    try:
        whole = _with_plain_keys(mapping) if len(mapping) > _FEW else None
        if whole is not None:
            for key in _places_of_others(whole.items()):
                whole[key] = _copy(whole[key], depth + 1)
            return whole
        for key, value in mapping.items():
            plain = type(key) is str and key.isascii()
            # Most values are plain text: it is copied here, without a call.
            copied[key if plain else _copy_key(key)] = (
                value if type(value) is str and value.isascii() else _copy(value, depth + 1)
            )
        if len(copied) != len(mapping):
            raise _FaultError(
                "the same key as another, once both are plain text; leave one out", key
            )
        for key in copied if depth == 1 else ():
            if "\0" in key:
                raise _FaultError("a root-level key cannot hold U+0000; rename it", key)
    except _FaultError as fault:
        fault.pass_through(mapping, key)
        raise
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        raise _unreadable(mapping, error) from error
    return copied


def _copy_array(array: list[Any] | tuple[Any, ...], depth: int) -> list[Any]:
    if depth > MAX_DEPTH:
        raise _FaultError(_TOO_DEEP, array)
    place = 0
    try:
        copied = list(array)
        few = len(copied) <= _FEW
        for place in range(len(copied)) if few else _places_of_others(enumerate(copied)):
            copied[place] = _copy(copied[place], depth + 1)
    except _FaultError as fault:
        fault.pass_through(array, place)
        raise
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        raise _unreadable(array, error) from error
    return copied


def _with_plain_keys(mapping: Mapping[Any, Any]) -> Metadata | None:
    """Return a shallow copy of a ``dict`` whose keys can stay as they are, checked together."""
    if type(mapping) is not dict:
        return None
    copied: Metadata = mapping.copy()  # one step, so no other thread can change it meanwhile
    if set(map(type, copied)) != {str}:
        return None
    keys = "".join(copied)
    return copied if keys.isascii() and "\0" not in keys else None


def _places_of_others(items: Iterable[tuple[T, Any]]) -> list[T]:
    """Return the places of all values that need a copy or a check; plain values do not."""
    return [
        place
        for place, value in items
        if not (
            value.isascii()
            if type(value) is str
            else _LEAST <= value <= _GREATEST
            if type(value) is int
            else value - value == 0.0  # neither NaN nor an infinity
            if type(value) is float
            else type(value) is bool
        )
    ]


def _copy_key(key: object) -> str:
    plain = _plain(key)
    if isinstance(plain, str):
        return _copy_text(plain)
    raise _FaultError(f"a key of type {type(key).__name__} is not JSON; convert it to a str", key)


def _unreadable(container: object, error: Exception) -> _FaultError:
    return _FaultError(
        f"reading this {type(container).__name__} raised {type(error).__name__}, for example"
        " because it changed meanwhile; pass a plain copy",
        container,
    )


def _copy_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _FaultError("a lone surrogate is not Unicode text; leave it out", text) from None
    return text


def _copy_long_integer(value: int) -> int:
    try:
        str(value)
    except ValueError:
        raise _FaultError(
            "an integer too long for Python to write as text; "
            "sys.set_int_max_str_digits() raises the limit",
            value,
        ) from None
    return value


def _show(part: object) -> str:
    plain = _plain(part)
    shown = json.dumps(plain) if isinstance(plain, str) else reprlib.repr(part)
    return shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}…"
