"""Metadata as JSON text: encoding and decoding, for storages.

JSON is that of `RFC 8259 <https://www.rfc-editor.org/rfc/rfc8259>`_: no NaN, no infinities, keys
are strings, text is Unicode. Metadata that this library has checked comes back from
``decode_metadata(encode_metadata(...))`` equal, in type and to the last bit.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from usermetadata.validation import MAX_DEPTH

Metadata = dict[str, Any]
"""A JSON object as Python has it: ``str`` keys; values ``None``, ``bool``, ``int``, ``float``,
``str``, ``list`` or ``dict``."""


def encode_metadata(metadata: Metadata) -> str:
    """Return ``metadata`` as compact JSON text, non-ASCII characters as themselves.

    Args:
        metadata: a checked object, as a change returns it or :func:`decode_metadata` does.

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
        ValueError: ``text`` is not JSON, or is not an object, or Python cannot hold it exactly.

    Example:
        >>> decode_metadata('{"n": 12345678901234567890}')
        {'n': 12345678901234567890}
    """
    try:
        # Text that this library wrote has no blanks around it, so none are searched for.
        if text.startswith("{"):
            decoded, end = _decoder.raw_decode(text)
            if end == len(text):
                of_ours: Metadata = decoded
                return of_ours
        decoded = _decoder.decode(text)
    except RecursionError:
        # Either the text is at fault, or the caller's stack, for which the text is not to blame.
        if _depth(text) > MAX_DEPTH:
            raise ValueError(f"it nests deeper than {MAX_DEPTH} levels") from None
        raise
    if not isinstance(decoded, dict):
        raise ValueError(f"it holds {_KINDS[type(decoded)]}, not an object")
    return decoded


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def is_exact(digits: str, number: float) -> bool:
    """Tell whether a float, written as text again, is the number that it was read from.

    Args:
        digits: the number in JSON.
        number: ``float(digits)``.

    Returns:
        ``True`` if nothing is lost. The shortest text of a float stands for it, so 0.1 is exact.

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
    if not is_exact(digits, number):
        raise ValueError("it holds a number that a float would change")
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
