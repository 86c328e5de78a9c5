"""JSON on the command line: arguments and standard input."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from usermetadata._core.parsing import parse_json
from usermetadata.changes import Replace
from usermetadata.exceptions import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Never

    from usermetadata.codec import Metadata


def argument_or_input(text: str | None) -> str | bytes:
    """Return the argument, or standard input if there is none."""
    return sys.stdin.buffer.read() if text is None or text == "-" else text


def parse(text: str | bytes, name: str) -> Any:
    """Return the value that a JSON text holds.

    Raises:
        InvalidInputError: it is not JSON, or a float would change a number; the message begins with
            ``name``.
    """
    try:
        return parse_json(text, name)
    except InvalidInputError:
        raise
    except json.JSONDecodeError as error:
        where = f"{error.msg} at character {error.pos + 1}"
        raise InvalidInputError(f"{name}: it is not JSON: {where}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{name}: {error}") from error


def parse_where(pairs: Sequence[str]) -> dict[str, Any] | None:
    """Return the properties of ``NAME=VALUE`` pairs; a value that is not JSON is a text.

    Raises:
        InvalidInputError: one has no equals sign or is there twice, or its value is too long or too
            deep for Python.
    """
    where: dict[str, Any] = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign:
            raise InvalidInputError("--where: it has no =; write NAME=VALUE, for example plan=pro")
        if name in where:
            raise InvalidInputError(f"--where {name}: it has two values; pass one")
        try:
            where[name] = json.loads(text, parse_constant=_refuse)
        except json.JSONDecodeError:
            where[name] = text
        except (ValueError, RecursionError) as error:
            raise InvalidInputError(f"--where {name}: {error}") from error
    return where or None


def _refuse(constant: str) -> Never:
    """Refuse NaN and Infinity, which Python would accept."""
    raise json.JSONDecodeError("it is not JSON", constant, 0)


def as_it_is(metadata: Metadata) -> Replace:
    """Return the change that stores the metadata with nulls at its root.

    Other programs may have stored what the functions refuse, such as half a surrogate pair.
    """
    # Storages store `Replace` itself with fewer statements.
    return _Copy(metadata) if None in metadata.values() else Replace(metadata)


@dataclass(frozen=True, slots=True)
class _Copy(Replace):
    """Replace the metadata with a copy from another storage, nulls included."""

    def __call__(self, old: Metadata | None) -> Metadata:
        return dict(self.metadata)
