"""Metadata as JSON text: encoding and decoding, for storages.

JSON is that of `RFC 8259 <https://www.rfc-editor.org/rfc/rfc8259>`_: no NaN, no infinities, keys
are strings, text is Unicode. Metadata that this library has checked comes back from
``decode_metadata(encode_metadata(...))`` equal, in type and to the last bit.

If ``msgspec`` is installed (the extra ``fast``), it does the work, several times as fast. What it
refuses is left to the standard library, so both ways give the same objects and the same errors.
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
    fast = _fast()
    if fast is not None:
        try:
            text = fast.encode(metadata).decode()
            # It writes NaN as null. Where there is a null, the text is compared with the object.
            if "null" not in text or fast.decode_any(text) == metadata:
                return text
        except fast.errors:
            pass
    return _encode_standard(metadata)


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
        decode: reads text, and checks each float, which takes longer than reading it.
        decode_any: reads text and rounds floats.
        errors: what they raise for what they refuse.
    """

    encode: Callable[[Metadata], bytes]
    decode: Callable[[str], Any]
    decode_any: Callable[[str], Any]
    errors: tuple[type[Exception], ...]


@cache
def _fast() -> _Fast | None:
    """Import msgspec with the first object: importing it takes longer than importing a facade."""
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
            # Only a row written by another program can hold one; as an escape it survives.
            return _encode_ascii(metadata)
    return text


def _decode_standard(text: str) -> Metadata:
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
_SAMPLE = 1024  # characters in which dots are counted: floats have one, and so have some strings
_SPARSE = 128  # characters for each dot: then checking the floats one by one is quicker
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
