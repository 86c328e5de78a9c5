"""Mistakes that the types find. mypy reports a comment here that hides no error."""

from __future__ import annotations

from typing import TypedDict

from usermetadata import UserMetadata


class Settings(TypedDict, total=False):
    """The metadata of a user in this program."""

    theme: str
    n: int


def make_mistakes(users: UserMetadata[Settings]) -> None:
    """Pass values of a wrong type, and properties that do not exist."""
    functions = users.syncio
    functions.update_user_metadata("a", {"n": ""})  # type: ignore[typeddict-item]
    functions.update_user_metadata("a", {"m": 1})  # type: ignore[typeddict-unknown-key]
    functions.set_user_metadata("a", {"n": ""})  # type: ignore[typeddict-item]
    functions.update_bulk_user_metadata({"a": {"n": ""}})  # type: ignore[typeddict-item]
    functions.modify_user_metadata("a", lambda _: {"n": ""})  # type: ignore[typeddict-item]
    text: str = functions.get_user_metadata("a").metadata["n"]  # type: ignore[assignment]
    assert text
