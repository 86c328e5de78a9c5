"""Metadata as JSON text: encoding and decoding, for storages.

JSON means `RFC 8259 <https://www.rfc-editor.org/rfc/rfc8259>`_: no NaN, no infinities, keys are
strings, text is Unicode. Metadata that this library has checked survives
``decode_metadata(encode_metadata(...))`` exactly: equal in type and to the last bit.

If ``msgspec`` is installed (the extra ``fast``), both functions are several times as fast. Input
that ``msgspec`` refuses goes to the standard library, so results and errors are the same with and
without it.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from usermetadata.validation import MAX_DEPTH

if TYPE_CHECKING:
    from collections.abc import Callable

Metadata = dict[str, Any]
"""A JSON object in Python: ``str`` keys; values ``None``, ``bool``, ``int``, ``float``, ``str``,
``list`` or ``dict``."""


def encode_metadata(metadata: Metadata) -> str:
    """Return ``metadata`` as compact JSON text; non-ASCII characters are not escaped.

    Args:
        metadata: a checked object: the result of a change or of :func:`decode_metadata`.

    Returns:
        The text. It contains neither U+0000 nor a lone surrogate, so every database can store it.

    Example:
        >>> encode_metadata({"name": "Zoë", "n": -0.0})
        '{"name":"Zoë","n":-0.0}'
    """
    fast = _fast()
    if fast is not None:
        try:
            text = fast.encode(metadata).decode()
            # msgspec writes NaN as null, so a text with a null is compared with the object.
            if "null" not in text or fast.decode_any(text) == metadata:
                return text
        except fast.errors:
            pass
    return _encode_standard(metadata)


def decode_metadata(text: str) -> Metadata:
    """Return the object in ``text``; each call returns a new one.

    Args:
        text: JSON text, written by :func:`encode_metadata` or another program.

    Returns:
        The object.

    Raises:
        ValueError: ``text`` is not JSON, is not an object, or has a number that Python cannot
            represent exactly.

    Example:
        >>> decode_metadata('{"n": 12345678901234567890}')
        {'n': 12345678901234567890}
    """
    fast = _fast()
    if fast is not None:
        try:
            # Many floats are not checked one by one: written again as they were, none was rounded.
            many = text.count(".", 0, _SAMPLE) > min(len(text), _SAMPLE) // _SPARSE
            decoded = fast.decode_any(text) if many else fast.decode(text)
            if many and fast.encode(decoded) != text.encode():
                decoded = fast.decode(text)
            if type(decoded) is dict:
                return decoded
        except fast.errors:
            pass
    return _decode_standard(text)


class _Fast(NamedTuple):
    """The functions of msgspec.

    Attributes:
        encode: writes an object; NaN and infinities as null.
        decode: reads text and checks each float; the checks take longer than the reading.
        decode_any: reads text and rounds floats.
        errors: the exceptions for input that they refuse.
    """

    encode: Callable[[Metadata], bytes]
    decode: Callable[[str], Any]
    decode_any: Callable[[str], Any]
    errors: tuple[type[Exception], ...]


@cache
def _fast() -> _Fast | None:
    """Import msgspec on first use: importing it takes longer than importing a facade."""
    try:
        import msgspec
    except ImportError:
        return None
    if tuple(map(int, msgspec.__version__.split(".")[:2])) < _OLDEST_MSGSPEC:
        return None
    errors = (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError)
    encoder, decoder = msgspec.json.Encoder(), msgspec.json.Decoder()
    exact = msgspec.json.Decoder(float_hook=_parse_float)
    return _Fast(encoder.encode, exact.decode, decoder.decode, errors)


def _encode_standard(metadata: Metadata) -> str:
    text = _encode(metadata)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            # A lone surrogate, which only a row of another program can have. An escape keeps it.
            return _encode_ascii(metadata)
    return text


def _decode_standard(text: str) -> Metadata:
    try:
        # Text that this library wrote has no blanks around it, so this does not skip any.
        if text.startswith("{"):
            decoded, end = _decoder.raw_decode(text)
            if end == len(text):
                of_ours: Metadata = decoded
                return of_ours
        decoded = _decoder.decode(text)
    except RecursionError:
        # Only a text that is nested too deep is damaged. Otherwise the caller's stack is deep.
        if _depth(text) > MAX_DEPTH:
            raise ValueError(f"it nests deeper than {MAX_DEPTH} levels") from None
        raise
    if not isinstance(decoded, dict):
        raise ValueError(f"it holds {_KINDS[type(decoded)]}, not an object")
    return decoded


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def is_exact(digits: str, number: float) -> bool:
    """Tell whether a float represents exactly the JSON number that it was read from.

    Args:
        digits: the number in JSON.
        number: ``float(digits)``.

    Returns:
        ``True`` if the shortest text of the float is the same number. So 0.1 is exact.

    Example:
        >>> is_exact("1.10", 1.1), is_exact("1e-999", 0.0)
        (True, False)
    """
    if repr(number) == digits:
        return True
    from decimal import Decimal, InvalidOperation

    try:
        return Decimal(digits) == Decimal(repr(number))
    except InvalidOperation:  # an exponent of 19 digits
        return False


def _parse_float(digits: str) -> float:
    number = float(digits)
    # A float holds any 15 digits, if it is neither subnormal nor zero nor infinite.
    short = len(digits) < _CHARACTERS and _SMALL < abs(number) < _LARGE
    if short or is_exact(digits, number):
        return number
    raise ValueError("it holds a number that a float would change")


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in re.findall(r"[][{}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


_OLDEST_MSGSPEC = (0, 19)
_CHARACTERS, _SMALL, _LARGE = 16, 1e-290, 1e290
_SAMPLE = 1024  # characters in which dots are counted, to estimate the number of floats
_SPARSE = 128  # with more characters per dot, checking the floats one by one is faster
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
