"""A complete storage: all metadata in one JSON file, for a few hundred users."""

import copy
import fcntl
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from usermetadata import StorageError, UsageError
from usermetadata.changes import Change
from usermetadata.identifiers import check_app_id
from usermetadata.json import Metadata, decode_metadata, encode_metadata


class JSONFileStorage:
    def __init__(self, path: Path, *, app_id: str = "public") -> None:
        self._path, self._app_id = path, check_app_id(app_id)
        self._closed = threading.Event()  # an object, for the storages of all apps to share

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        texts = self._load().get(self._app_id, {})
        return {user: decode_metadata(texts[user]) for user in user_ids if user in texts}

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        results: list[Metadata | None] = []
        with open(f"{self._path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # excludes other threads, and other processes
            apps = self._load()
            texts = apps.setdefault(self._app_id, {})
            for user_id, change in changes:
                old = texts.pop(user_id, None)
                new = change(None if old is None else decode_metadata(old))
                if new is not None:
                    texts[user_id] = encode_metadata(new)
                results.append(new)
            self._save(apps)
        return results

    def for_app(self, app_id: str) -> "JSONFileStorage":
        other = copy.copy(self)
        other._app_id = check_app_id(app_id)
        return other

    def close(self) -> None:
        self._closed.set()

    def _load(self) -> dict[str, dict[str, str]]:
        if self._closed.is_set():
            raise UsageError("this JSONFileStorage is closed")
        try:
            apps: dict[str, dict[str, str]] = json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise StorageError(f"{self._path}: {error}") from error
        return apps

    def _save(self, apps: dict[str, dict[str, str]]) -> None:
        new = self._path.with_suffix(".new")
        try:
            with new.open("w") as file:
                json.dump(apps, file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self._path)  # readers see the whole old file or the whole new one
        except OSError as error:
            raise StorageError(f"{self._path}: {error}") from error
