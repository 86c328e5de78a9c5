"""A complete storage: all metadata in one JSON file, for a few hundred users."""

import copy
import fcntl
import json
import os
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from usermetadata import DamagedMetadataError, StorageError, UsageError
from usermetadata.changes import Change, apply_in_order
from usermetadata.codec import Metadata, decode_metadata, encode_metadata
from usermetadata.validation import check_app_id

Apps = dict[str, dict[str, str]]  # JSON text by user id by app id


@contextmanager
def our_errors(path: Path, user_id: str | None = None) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: {error}") from error
    except ValueError as error:
        whose = "" if user_id is None else f", user {user_id!r}"
        raise DamagedMetadataError(f"{path}{whose}: {error}", user_id) from error


class JSONFileStorage:
    def __init__(self, path: Path, *, app_id: str = "public") -> None:
        self._path, self._app_id = path, check_app_id(app_id)
        self._closed = threading.Event()  # an object that the storages of all apps share

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        texts = self._load().get(self._app_id, {})
        return {user: self._decode(user, texts[user]) for user in user_ids if user in texts}

    def read_after(self, user_id: str, limit: int) -> dict[str, Metadata]:
        users = sorted(self._load().get(self._app_id, {}))
        return self.read([user for user in users if user > user_id][:limit])

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        with self._locked():
            apps = self._load()
            texts = apps.setdefault(self._app_id, {})
            # It decodes no text that its change ignores: set and clear repair a damaged one.
            results = apply_in_order(changes, texts, decode=self._decode, encode=encode_metadata)
            self._save(apps)
        return results

    def for_app(self, app_id: str) -> "JSONFileStorage":
        other = copy.copy(self)
        other._app_id = check_app_id(app_id)
        return other

    def close(self) -> None:
        self._closed.set()

    @contextmanager
    def _locked(self) -> Generator[None]:
        with our_errors(self._path):
            lock = open(f"{self._path}.lock", "w")  # noqa: SIM115 - closed below
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # excludes other threads, and other processes
            yield

    def _load(self) -> Apps:
        if self._closed.is_set():
            raise UsageError("this JSONFileStorage is closed")
        with our_errors(self._path):
            apps: Apps = json.loads(self._path.read_text()) if self._path.exists() else {}
        return apps

    def _decode(self, user_id: str, text: str) -> Metadata:
        with our_errors(self._path, user_id):
            return decode_metadata(str(text))  # another program may have stored no text

    def _save(self, apps: Apps) -> None:
        new = self._path.with_suffix(".new")
        with our_errors(self._path), new.open("w") as file:
            json.dump(apps, file)
            file.flush()
            os.fsync(file.fileno())
            new.replace(self._path)  # readers see the whole old file or the whole new one
