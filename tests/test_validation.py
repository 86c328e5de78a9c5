"""User ids and app ids."""

from __future__ import annotations

import enum

import pytest

from usermetadata import InvalidInputError
from usermetadata.validation import check_app_id, check_user_id


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
