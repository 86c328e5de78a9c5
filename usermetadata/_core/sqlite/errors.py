"""Translate SQLite's errors into this library's."""

from __future__ import annotations

import errno
import os
import sqlite3

from usermetadata._core.batching import busy
from usermetadata.exceptions import (
    OutcomeUnknownError,
    StorageError,
    UsageError,
)

_ADVICE = [
    ("unable to open", "; name a file that this process may open"),
    (
        "readonly",
        "; let this process write the file and its directory (with a connection that may write)",
    ),
    ("closed database", "; pass a connection that is open"),
    ("full", "; free some space and repeat the call"),
    ("not a database", "; name an SQLite file, or one that does not exist yet"),
    ("disk I/O", "; check the disk and the file system, and repeat the call"),
    ("malformed", "; restore it from a backup; `sqlite3 FILE .recover` may save rows"),
    ("actually a view", "; use another file"),
    ("same thread", "; use it there, or open it with check_same_thread=False"),
    (
        "no such index",
        (
            "; repeat the call where the file may be written: it builds the index, or names the"
            " command that does"
        ),
    ),
]

_EFFECTIVE_IDS = os.access in os.supports_effective_ids


def translate(error: Exception, name: str) -> StorageError:
    """Return the library's error for the driver's.

    Args:
        error: the driver's error.
        name: the name of the database.
    """
    message = str(error).rstrip(".")
    if message.startswith("database ") and message.endswith("is locked"):
        return busy(name)
    if _no_descriptor_is_left():
        return StorageError(
            f"{name}: {message}, because this process has too many open files; close some, or"
            " raise the limit (ulimit -n)"
        )
    directory = os.path.dirname(name)  # empty for the caller's connection
    if "unable to open" in message and directory:
        if not os.path.isdir(directory):
            return StorageError(f"{name}: the directory {directory} does not exist; create it")
        if not os.access(directory, os.W_OK, effective_ids=_EFFECTIVE_IDS):
            return StorageError(
                f"{name}: {message}: this process may not write to its directory, where SQLite"
                " keeps a log beside the file; let it, or write where the file system is not"
                " read-only"
            )
    advice = next((advice for sign, advice in _ADVICE if sign in message), "")
    return StorageError(f"{name}: {message}{advice}")


def _no_descriptor_is_left() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return False


def is_read_only(error: BaseException | None) -> bool:
    """Tell from the driver's error whether the file cannot be written; reading may still work."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)


def after_commit(error: Exception, name: str) -> None:
    """Raise the library's error if the driver's, at ``COMMIT``, is one of the file system.

    A transaction is committed by the last page that is written (https://sqlite.org/walformat.html).
    If a write has failed, that page is missing. After any other error the page may be in the
    write-ahead log, and be found there after a crash.

    Args:
        error: the driver's error.
        name: the name of the database.
    """
    if "disk I/O error" in str(error):
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_IOERR_WRITE:
            raise _refused(error, name) from error
        raise OutcomeUnknownError(
            f"{name}: {error} during COMMIT, so it is unknown whether the write was stored; read to"
            " find out"
        ) from error


def _refused(error: Exception, name: str) -> StorageError:
    advice = "make it writable, let the file grow, or write on the primary if this is a replica"
    if os.path.exists(os.path.join(os.path.dirname(name), ".primary")):
        advice = "this is a replica of LiteFS: write on the primary, whose name is in its .primary"
    return StorageError(
        f"{name}: {error}: the file system has refused COMMIT, so nothing was written; {advice}"
    )


def not_stored(name: str, key: tuple[str, str]) -> StorageError:
    """Return the error of a row that differs from what was written, without an SQLite error."""
    app_id, user_id = key
    return StorageError(
        f"{name}: the database did not store the change of user {user_id!r} in app {app_id!r},"
        " probably because of a trigger on the table user_metadata; nothing was written; change or"
        " remove the trigger"
    )


def moved(name: str) -> StorageError:
    """Return the error of a file that is open and no longer has its name."""
    what = "replaced by another file" if os.path.exists(name) else "removed or moved"
    return StorageError(
        f"{name}: the file was {what} while it was open; put it back, or end all programs that use"
        f" it, remove {os.path.basename(name)}-wal and -shm, and start them again"
    )


def closed(name: str) -> UsageError:
    """Return the error of a call after ``close``."""
    return UsageError(f"{name}: this SQLiteStorage is closed; make a new one")


def inherited(name: str) -> StorageError:
    """Return the error of a process that has its parent's connection to the file."""
    return StorageError(
        f"{name}: this process was forked in the middle of a call, or without telling Python"
        " (as uWSGI does without py-call-uwsgi-fork-hooks), and cannot use the file; fork before"
        " the first call"
    )


def still_open(name: str) -> OutcomeUnknownError:
    """Return the error of a ``COMMIT`` without effect, which an authorizer can suppress."""
    return OutcomeUnknownError(
        f"{name}: a transaction is still open after COMMIT; end it and read to find out"
    )
