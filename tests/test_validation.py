"""User ids, app ids, and metadata whose types are not plain."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import enum
import fractions
import importlib
import math
import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
from werkzeug.local import LocalProxy

import usermetadata
from usermetadata import InvalidInputError, syncio
from usermetadata.validation import check_app_id, check_user_id, copy_metadata


@pytest.mark.parametrize(
    ("user_id", "message"),
    [
        (None, "user_id: NoneType is not str"),
        (7, "user_id: int is not str"),
        (b"alice", "user_id: bytes is not str"),
        ("", "user_id: is empty"),
        ("a" * 256, "user_id: has 256 characters; 255 are allowed"),
        ("a\0", "user_id: holds U\\+0000"),
        ("é\0", "user_id: holds U\\+0000"),
        ("\ud800", "user_id: holds a lone surrogate"),
    ],
)
def test_a_bad_user_id_is_refused(user_id: object, message: str) -> None:
    """The message says what is wrong with the id."""
    with pytest.raises(InvalidInputError, match=message):
        check_user_id(user_id)


@pytest.mark.parametrize("user_id", ["a", "a" * 255, "\U0010ffff" * 255, " ", "null", "a/b?c#d%"])
def test_any_other_text_is_a_user_id(user_id: str) -> None:
    """Ids come from any auth system; their characters are counted, not their bytes."""
    assert check_user_id(user_id) == user_id


def test_a_subclass_of_str_becomes_plain() -> None:
    """An enum's member becomes its value, not its name."""

    class Known(str, enum.Enum):  # noqa: UP042 - applications have these
        ROOT = "root"

    assert repr(check_user_id(Known.ROOT)) == "'root'"


def test_an_app_id_is_shorter() -> None:
    """App ids have at most 64 characters, as in SuperTokens' tables."""
    assert check_app_id("a" * 64) == "a" * 64
    with pytest.raises(InvalidInputError, match="app_id: has 65 characters; 64 are allowed"):
        check_app_id("a" * 65)


# Objects that claim a type


ObjectProxy: Any = importlib.import_module("wrapt").ObjectProxy


def proxy(value: Any) -> Any:
    """Return werkzeug's proxy of a value, as of something that belongs to a request."""
    return LocalProxy(lambda: value)


@pytest.mark.parametrize("stand_in", [proxy, ObjectProxy], ids=["werkzeug", "wrapt"])
def test_a_proxy_is_stored_as_its_value(stand_in: Any) -> None:
    """A proxy of a JSON value is that value: as a user id, a key and a value, at any depth."""
    usermetadata.init("memory://")
    update = {
        stand_in("theme"): stand_in("dark"),
        "list": stand_in([stand_in(1), stand_in(2.5), stand_in(bool(1)), stand_in("é")]),
        "object": stand_in({stand_in("n"): stand_in(10**30)}),
    }
    plain = {"theme": "dark", "list": [1, 2.5, True, "é"], "object": {"n": 10**30}}
    updated = syncio.update_user_metadata(stand_in("alice"), stand_in(update)).metadata
    assert repr(updated) == repr(plain)
    assert syncio.get_bulk_user_metadata([stand_in("alice")])["alice"].metadata == plain
    assert syncio.update_bulk_user_metadata(stand_in({stand_in("alice"): {}})).keys() == {"alice"}


class Mood(str, enum.Enum):  # noqa: UP042 - applications have these
    """An enum; ``str()`` of a member is not its value."""

    GOOD = "good"


def pretending(kind: type) -> Any:
    """Return an object that claims to be of a type."""
    return type("Pretending", (), {"__class__": property(lambda _: kind)})()


class Raising(Mapping[str, Any]):
    """A mapping that cannot be read."""

    def __getitem__(self, key: str) -> Any:
        raise LookupError

    def __iter__(self) -> Iterator[str]:
        return iter(["a"])

    def __len__(self) -> int:
        return 1


class Lying(dict[str, Any]):
    """A mapping that gives something other than pairs."""

    def items(self) -> Any:
        return [1]


class Miscounting(dict[str, Any]):
    """A mapping that is shorter than it says."""

    def __len__(self) -> int:
        return 7


class Growing(dict[str, Any]):
    """A mapping that changes while it is read."""

    def items(self) -> Any:
        for key, value in super().items():
            self[key * 2] = value
            yield key, value


KINDS: list[type] = [str, int, float, bool, list, dict]
CLAIMS: dict[str, Any] = {
    **{f"mock of {kind.__name__}": Mock(spec=kind) for kind in KINDS},
    **{f"magic mock of {kind.__name__}": MagicMock(spec=kind) for kind in KINDS[:4]},
    **{f"pretending {kind.__name__}": pretending(kind) for kind in [*KINDS, type(None)]},
    **{f"proxy of {value!r}": proxy(value) for value in (None, Mood.GOOD, {1}, b"x", math.nan)},
    "unbound proxy": LocalProxy(ContextVar[str]("outside of a request")),
    "proxy of a date": ObjectProxy(datetime.date.min),
    "raising": Raising(),
    "lying": Lying(a=1),
    "growing": Growing(a=1),
    "miscounting": Miscounting(a=1),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_only_claims_a_type_is_refused_with_its_place(claim: str) -> None:
    """Whatever reading an object raises, the library raises ``InvalidInputError``."""
    with pytest.raises(InvalidInputError, match=r'^update\["a"\]\[1\]'):
        copy_metadata({"a": [0, CLAIMS[claim]]}, "update")
    with pytest.raises(InvalidInputError, match="user_id: "):
        check_user_id(CLAIMS[claim])


def test_a_key_that_only_claims_to_be_text_is_refused() -> None:
    """The same holds for keys."""
    for key in (proxy(1), proxy(Mood.GOOD), pretending(str), Mock(spec=str)):
        with pytest.raises(InvalidInputError, match=r"a key of type .* is not JSON"):
            copy_metadata({"a": {key: 1}}, "update")


def test_bulk_arguments_that_cannot_be_read_are_refused() -> None:
    """The same holds for the arguments of the bulk functions."""
    usermetadata.init("memory://")
    bad: list[Any] = [Mock(spec=list), pretending(list), 7, proxy(7)]
    for user_ids in bad:
        with pytest.raises(InvalidInputError, match="user_ids: "):
            syncio.get_bulk_user_metadata(user_ids)
    for updates in (*bad, Raising(), Lying(a=1), Mock(spec=dict)):
        with pytest.raises(InvalidInputError, match="metadata_updates: "):
            syncio.update_bulk_user_metadata(updates)


def test_a_dict_that_another_thread_changes_is_copied_or_refused() -> None:
    """A dict that changes its size while it is copied raises ``InvalidInputError``."""
    shared: dict[str, Any] = {str(n): {} for n in range(100)}
    stop = threading.Event()

    def change() -> None:
        n = 0
        while not stop.is_set():
            shared[f"new {n % 50}"] = n
            shared.pop(f"new {(n + 25) % 50}", None)
            n += 1

    thread = threading.Thread(target=change)
    thread.start()
    for _ in range(300):
        with contextlib.suppress(InvalidInputError):
            assert len(copy_metadata({"a": shared}, "update")["a"]) >= 100
    stop.set()
    thread.join()


@pytest.mark.parametrize(
    ("scalar", "plain"),
    [
        (np.int64(5), 5),
        (np.uint8(5), 5),
        (np.bool_(1), True),
        (np.float16(0.5), 0.5),
        (np.float32(0.1), 0.10000000149011612),
        (np.float64(0.1), 0.1),
        (np.str_("é"), "é"),
    ],
)
def test_numpys_scalars_become_plain(scalar: Any, plain: Any) -> None:
    """Each is stored as the Python value that is equal to it."""
    assert scalar == plain
    assert repr(copy_metadata({"n": [scalar]}, "update")) == repr({"n": [plain]})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (decimal.Decimal("0.1"), "Decimal is not JSON; convert it .* an int or a float"),
        (fractions.Fraction(1, 3), "Fraction is not JSON; convert it .* an int or a float"),
        (np.longdouble(0.1), "longdouble is not JSON; convert it .* an int or a float"),
        (np.float32("nan"), "nan is not JSON"),
        (np.timedelta64(5, "ns"), "timedelta64 is not JSON"),
        (np.datetime64(5, "ns"), "datetime64 is not JSON; convert it .* a str"),
        (np.bytes_(b"x"), "bytes_ is not JSON; convert it .* a str"),
        (np.array(5), "ndarray is not JSON"),
        (datetime.datetime.min, "datetime is not JSON; convert it .* a str"),
    ],
)
def test_what_would_change_is_refused(value: Any, message: str) -> None:
    """A value that is not exactly a JSON value is not changed silently; the advice fits it."""
    with pytest.raises(InvalidInputError, match=rf'update\["n"\]: {message}'):
        copy_metadata({"n": value}, "update")
