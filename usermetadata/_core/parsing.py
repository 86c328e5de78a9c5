"""Parse incoming JSON text: from the command line, files, HTTP and SQL."""

from __future__ import annotations

import json
from typing import Any

from usermetadata.codec import is_exact
from usermetadata.exceptions import InvalidInputError

_SHOWN_CHARACTERS = 200


def parse_json(text: str | bytes, name: str) -> Any:
    """Return the value of a JSON text, with every number exact.

    Args:
        text: the text; bytes are UTF-8.
        name: the name of the text, for the error message.

    Returns:
        The value. Text in it may hold lone surrogates, which JSON can escape.

    Raises:
        InvalidInputError: a float would change a number; the message says which.
        ValueError: it is not JSON.
        RecursionError: it nests too deep for Python.

    Example:
        >>> parse_json('{"price": 0.1}', "metadata")
        {'price': 0.1}
        >>> parse_json('{"a": [1e-999]}', "metadata")
        Traceback (most recent call last):
            ...
        usermetadata.exceptions.InvalidInputError: metadata["a"][0]: a float would change this \
number; pass it as a string
    """
    faults: list[_Fault] = []

    def parse_float(digits: str) -> float | _Fault:
        number = float(digits)
        if is_exact(digits, number):
            return number
        faults.append(_Fault("a float would change this number; pass it as a string"))
        return faults[-1]

    def parse_constant(constant: str) -> _Fault:
        faults.append(_Fault(f"{constant} is not JSON; pass null or a string"))
        return faults[-1]

    value = json.loads(text, parse_float=parse_float, parse_constant=parse_constant)
    if faults:
        fault, place = _find(value) or (faults[0], "")  # a repeated key may hide it
        if len(place) > _SHOWN_CHARACTERS:
            place = f"{place[:_SHOWN_CHARACTERS]}…"
        raise InvalidInputError(f"{name}{place}: {fault.reason}")
    return value


class _Fault:
    """Stands for a number that cannot be stored."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _find(value: object) -> tuple[_Fault, str] | None:
    """Return the first fault in ``value``, and where it is."""
    if isinstance(value, _Fault):
        return value, ""
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, each in value.items() if isinstance(value, dict) else ():
        found = _find(each)
        if found:
            return found[0], f"[{json.dumps(key)}]{found[1]}"
    return None
