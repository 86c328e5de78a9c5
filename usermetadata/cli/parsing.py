"""JSON on the command line: arguments, standard input, and JSON Lines."""

from __future__ import annotations

import json
import sys
from typing import Any

from usermetadata.changes import Replace
from usermetadata.exceptions import InvalidInputError
from usermetadata.validation import check_user_id, copy_metadata


def argument_or_input(text: str | None) -> str | bytes:
    """Return the argument, or standard input if there is none."""
    if text is not None and text != "-":
        return text
    return sys.stdin.buffer.read()


def parse(text: str | bytes, name: str) -> Any:
    """Return the value that a JSON text holds.

    Raises:
        InvalidInputError: it is not JSON; the message begins with ``name``.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at character {error.pos + 1}"
        raise InvalidInputError(f"{name}: it is not JSON: {where}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{name}: {error}") from error


def parse_line(line: bytes, number: int) -> tuple[str, Replace]:
    """Return the user id and the change that stores the metadata of a line.

    Raises:
        InvalidInputError: the line is not one that export writes; the message gives its number.
    """
    parsed = parse(line, f"line {number}")
    if not isinstance(parsed, dict) or set(parsed) != {"userId", "metadata"}:
        raise InvalidInputError(
            f'line {number}: is not {{"userId": "...", "metadata": {{...}}}}, as export writes it'
        )
    user_id = check_user_id(parsed["userId"], f"line {number}: userId")
    return user_id, Replace(copy_metadata(parsed["metadata"], f"line {number}: metadata"))
