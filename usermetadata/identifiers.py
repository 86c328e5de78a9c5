"""Checking user ids and app ids."""

from __future__ import annotations

from usermetadata.exceptions import InvalidInputError

USER_ID_MAX_LENGTH = 255
APP_ID_MAX_LENGTH = 64


def check_user_id(user_id: object, name: str = "user_id") -> str:
    """Return ``user_id`` if a user may have it, else raise ``InvalidInputError``.

    A user id is a ``str`` of 1 to 255 characters (code points) without U+0000 and without lone
    surrogates; nothing else is assumed about it, and nobody checks that the user exists.

    Args:
        user_id: what the caller gave.
        name: what the caller calls it, for the error message.

    Returns:
        The same text, as a plain ``str``.

    Raises:
        InvalidInputError: it is not such a ``str``.

    Example:
        >>> check_user_id("")
        Traceback (most recent call last):
            ...
        usermetadata.exceptions.InvalidInputError: user_id: is empty: pass the id of a user
    """
    return _check_identifier(user_id, name, USER_ID_MAX_LENGTH, "pass the id of a user")


def check_app_id(app_id: object) -> str:
    """Return ``app_id`` if an app may have it, else raise ``InvalidInputError``.

    The rules are those of a user id, with at most 64 characters.

    Args:
        app_id: what the caller gave.

    Returns:
        The same text, as a plain ``str``.

    Raises:
        InvalidInputError: it is not such a ``str``.

    Example:
        >>> check_app_id("public")
        'public'
    """
    return _check_identifier(app_id, "app_id", APP_ID_MAX_LENGTH, 'pass the id of an app, "public"')


def _check_identifier(value: object, name: str, max_length: int, remedy: str) -> str:
    # Nearly every identifier is plain, and each call of the library checks one.
    if (
        type(value) is str
        and 0 < len(value) <= max_length
        and value.isascii()
        and "\0" not in value
    ):
        return value
    if not isinstance(value, str):
        raise InvalidInputError(f"{name}: {type(value).__name__} is not str: {remedy}")
    if not value:
        raise InvalidInputError(f"{name}: is empty: {remedy}")
    if len(value) > max_length:
        raise InvalidInputError(f"{name}: has {len(value)} characters; {max_length} are allowed")
    if "\0" in value:
        raise InvalidInputError(f"{name}: holds U+0000, which databases cannot store: {value!r}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidInputError(
                f"{name}: holds a lone surrogate, which is not Unicode text: {value!r}"
            ) from None
    return str.__str__(value)
