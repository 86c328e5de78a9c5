"""JSON as this library stores it: checking and copying input, encoding, decoding.

JSON is that of `RFC 8259 <https://www.rfc-editor.org/rfc/rfc8259>`_: no NaN, no infinities, keys
are strings, text is Unicode. Whatever passes :func:`copy_metadata` comes back from
``decode_metadata(encode_metadata(...))`` equal, in type and to the last bit.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from usermetadata.exceptions import InvalidInputError

Metadata = dict[str, Any]
"""A JSON object as Python has it: ``str`` keys; values ``None``, ``bool``, ``int``, ``float``,
``str``, ``list`` or ``dict``."""

MAX_DEPTH = 200
"""How deep objects and arrays may nest, the root object counted. Python's JSON decoder recurses,
and Python allows 1000 levels in all; 200 leave room for the caller's."""

_SHOWN_PARTS = 10
_SHOWN_CHARACTERS = 60
_TOO_DEEP = f"nests deeper than {MAX_DEPTH} levels: store it flatter"
# Python may refuse to write longer integers as text, at the earliest from 640 digits on.
_ALWAYS_WRITABLE = 10**640


def copy_metadata(value: object, name: str) -> Metadata:
    """Return a checked deep copy of ``value``, a JSON object that a caller passed in.

    Subclasses of ``str``, ``int`` and ``float`` become the plain type, any mapping becomes a
    ``dict``, a tuple becomes a ``list``.

    Args:
        value: what the caller gave; it is only read.
        name: what the caller calls it, for the error message.

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
            f"{name}: {type(value).__name__} is not a mapping: it must be a dict of properties"
        )
    try:
        copied = _copy_object(value, 1)
    except _FaultError as fault:
        raise InvalidInputError(f"{name}{fault.place()}: {fault.reason}") from None
    for key in copied:
        if "\0" in key:
            raise InvalidInputError(f"{name}[{_show(key)}]: a root-level key cannot hold U+0000")
    return copied


def encode_metadata(metadata: Metadata) -> str:
    """Return checked ``metadata`` as compact JSON text, non-ASCII characters as themselves.

    Args:
        metadata: an object that :func:`copy_metadata` or :func:`decode_metadata` returned.

    Returns:
        The text. It holds neither U+0000 nor a lone surrogate, so every database can store it.

    Example:
        >>> encode_metadata({"name": "Zoë", "n": -0.0})
        '{"name":"Zoë","n":-0.0}'
    """
    text = _encode(metadata)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            # Only a row written by another program can hold one; as an escape it survives.
            return _encode_ascii(metadata)
    return text


def decode_metadata(text: str) -> Metadata:
    """Return the object that ``text`` holds, fresh at every call.

    Args:
        text: JSON text, as :func:`encode_metadata` or another program wrote it.

    Returns:
        The object.

    Raises:
        ValueError: ``text`` is not JSON, or is not an object, or Python cannot hold it.

    Example:
        >>> decode_metadata('{"n": 12345678901234567890}')
        {'n': 12345678901234567890}
    """
    try:
        # What this library has written has no blanks around it, and need not be searched for them.
        if text.startswith("{"):
            decoded, end = _decoder.raw_decode(text)
            if end == len(text):
                of_ours: Metadata = decoded
                return of_ours
        decoded = _decoder.decode(text)
    except RecursionError:
        # Either the text is to blame, or the caller's stack, which is no fault of the text.
        if _depth(text) > MAX_DEPTH:
            raise ValueError(f"it nests deeper than {MAX_DEPTH} levels") from None
        raise
    if not isinstance(decoded, dict):
        raise ValueError(f"it holds {_KINDS[type(decoded)]}, not an object")
    return decoded


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _parse_float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits} is too large for a float")
    return number


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in re.findall(r"[][{}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


_encode = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":")
).encode
_encode_ascii = json.JSONEncoder(
    check_circular=False, allow_nan=False, separators=(",", ":")
).encode
_decoder = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_parse_float)
_KINDS = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}


class _FaultError(Exception):
    """What cannot be stored; the frames it unwinds through add where it is, innermost first."""

    def __init__(self, reason: str, culprit: object) -> None:
        self.reason = reason
        self.culprit = culprit
        self.path: list[object] = []

    def pass_through(self, container: object, place: object) -> None:
        """Note where in ``container`` the fault is; it may turn out to be the container itself."""
        if self.culprit is container:
            self.reason = "contains itself"
            self.path.clear()
        self.path.append(place)

    def place(self) -> str:
        parts = [f"[{_show(part)}]" for part in reversed(self.path)]
        if len(parts) > _SHOWN_PARTS:
            parts[_SHOWN_PARTS:] = ["…"]
        return "".join(parts)


def _copy(value: Any, depth: int) -> Any:  # noqa: C901, PLR0911 - one case per type
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
    # A subclass (an enum's member, numpy's float64) may have overridden str() or int().
    if isinstance(value, str):
        return _copy(str.__str__(value), depth)
    if isinstance(value, int):
        return _copy(int.__int__(value), depth)
    if isinstance(value, float):
        return _copy(float.__float__(value), depth)
    raise _FaultError(f"{kind.__name__} is not JSON: convert it first, to a str say", value)


def _copy_object(mapping: Mapping[Any, Any], depth: int) -> Metadata:
    if depth > MAX_DEPTH:
        raise _FaultError(_TOO_DEEP, mapping)
    copied: Metadata = {}
    key: Any = None
    try:
        for key, value in mapping.items():
            plain = type(key) is str and key.isascii()
            copied[key if plain else _copy_key(key)] = _copy(value, depth + 1)
        if len(copied) != len(mapping):
            raise _FaultError("the same key as another, once both are plain text", key)
    except _FaultError as fault:
        fault.pass_through(mapping, key)
        raise
    return copied


def _copy_array(array: list[Any] | tuple[Any, ...], depth: int) -> list[Any]:
    if depth > MAX_DEPTH:
        raise _FaultError(_TOO_DEEP, array)
    copied: list[Any] = []
    try:
        for value in array:
            copied.append(_copy(value, depth + 1))  # noqa: PERF401 - its length is the place
    except _FaultError as fault:
        fault.pass_through(array, len(copied))
        raise
    return copied


def _copy_key(key: object) -> str:
    if isinstance(key, str):
        return _copy_text(str.__str__(key))
    raise _FaultError(f"a key in JSON is a str, this one is of type {type(key).__name__}", key)


def _copy_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _FaultError("a lone surrogate is not Unicode text", text) from None
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
    shown = json.dumps(part) if isinstance(part, str) else repr(part)
    return shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}…"
