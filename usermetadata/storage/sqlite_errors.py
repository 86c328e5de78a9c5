"""What SQLite's errors mean to whoever gets them."""

from __future__ import annotations

import os

from usermetadata.exceptions import DamagedMetadataError, StorageBusyError, StorageError

_ADVICE = [
    ("unable to open", ": is it a file, and may this process open it?"),
    ("readonly", ": let this process write the file and its directory"),
    ("full", ": free some space and repeat the call"),
    ("not a database", ": name an SQLite file, or one that does not exist yet"),
    ("malformed", ": restore it from a backup; `sqlite3 FILE .recover` may save rows"),
    ("actually a view", "; use another file"),
    ("no such column", ": its table user_metadata is another program's; use another file"),
    ("same thread", ": open the borrowed connection with check_same_thread=False"),
]


def translate(error: Exception, name: str) -> StorageError:
    """Return our error for the driver's: what happened, to which file, and what to do."""
    message = str(error)
    if message.startswith("database ") and message.endswith("is locked"):
        return busy(name)
    if message.startswith("Could not decode to UTF-8"):
        return DamagedMetadataError(f"{name}: a row is damaged: {message}")
    directory = os.path.dirname(name)
    if "unable to open" in message and not os.path.isdir(directory):
        return StorageError(f"{name}: the directory {directory} does not exist: create it")
    advice = next((advice for sign, advice in _ADVICE if sign in message), "")
    return StorageError(f"{name}: {message}{advice}")


def orphaned(name: str) -> StorageError:
    """Return the error of a process that has its parent's connection to the file."""
    return StorageError(
        f"{name}: this process was forked in the middle of a call, or without telling Python"
        " (uWSGI does it, without py-call-uwsgi-fork-hooks), and cannot use the file"
    )


def busy(name: str) -> StorageBusyError:
    """Return the error of a write that has waited long enough."""
    return StorageBusyError(
        f"{name}: other writers did not let go of the database within the timeout; repeat the"
        " call, or the transaction of yours that it is part of, or allow for a longer timeout"
    )
