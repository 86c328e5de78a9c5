"""A fully typed program that uses the library: mypy and pyright check it, the tests run it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, assert_type

import usermetadata
from usermetadata import InMemoryStorage, SQLiteStorage, Storage, UserMetadata
from usermetadata import asyncio as aio
from usermetadata.changes import Change
from usermetadata.codec import Metadata
from usermetadata.interfaces import ClearUserMetadataResult, MetadataResult, RecipeInterface
from usermetadata.syncio import (
    clear_user_metadata,
    get_bulk_user_metadata,
    get_user_metadata,
    modify_user_metadata,
    set_user_metadata,
    update_bulk_user_metadata,
    update_user_metadata,
)


class Logged(RecipeInterface):
    """An override as written for the SDK."""

    def __init__(self, original: RecipeInterface) -> None:
        self.original = original

    async def get_user_metadata(self, user_id: str, user_context: dict[str, Any]) -> MetadataResult:
        """Read."""
        return await self.original.get_user_metadata(user_id, user_context)

    async def update_user_metadata(
        self, user_id: str, metadata_update: dict[str, Any], user_context: dict[str, Any]
    ) -> MetadataResult:
        """Merge."""
        return await self.original.update_user_metadata(user_id, metadata_update, user_context)

    async def clear_user_metadata(
        self, user_id: str, user_context: dict[str, Any]
    ) -> ClearUserMetadataResult:
        """Remove."""
        return await self.original.clear_user_metadata(user_id, user_context)


class Wrapped:
    """A storage of a third party."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        """Read."""
        return self.inner.read(user_ids)

    def write(self, changes: Sequence[tuple[str, Change]]) -> list[Metadata | None]:
        """Write."""
        return self.inner.write(changes)

    def for_app(self, app_id: str) -> Wrapped:
        """Return the storage for another app."""
        return Wrapped(self.inner.for_app(app_id))

    def close(self) -> None:
        """Close."""
        self.inner.close()


async def use_asyncio() -> bool:
    """Call every function and await it."""
    result: MetadataResult = await aio.update_user_metadata("alice", {"a": {"b": [1]}})
    first: int = result.metadata["a"]["b"][0]
    settings: Settings = {"n": first}
    await aio.set_user_metadata("alice", settings, user_context={})
    await aio.update_user_metadata("alice", settings)
    bulk: dict[str, MetadataResult] = await aio.get_bulk_user_metadata(("alice", "bob"))
    await aio.update_bulk_user_metadata({"alice": {"n": 2}})
    await aio.modify_user_metadata("alice", lambda metadata: {**metadata, "m": 1})
    both = await asyncio.gather(aio.get_user_metadata("alice"), aio.get_user_metadata("bob"))
    task = asyncio.create_task(aio.clear_user_metadata("alice"))
    cleared: ClearUserMetadataResult = await task
    return bool(cleared and bulk["alice"].metadata) and both[0].metadata == {"n": 2, "m": 1}


class SettingsUpdate(TypedDict, total=False):
    """An update of them; ``None`` removes one."""

    theme: str | None
    n: int | None


def use_types() -> bool:
    """Use a store whose metadata has a type."""
    users = UserMetadata[Settings]("memory://")
    assert_type(users.syncio.update_user_metadata("alice", {"n": 1}), MetadataResult[Settings])
    assert_type(users.for_app("shop").syncio.get_user_metadata("alice").metadata, Settings)
    assert_type(users.syncio.erase_user("bob").by_app, dict[str, Settings])
    users.syncio.modify_user_metadata("alice", lambda found: {"n": found.get("n", 0) + 1})
    other = UserMetadata[Settings, SettingsUpdate]("memory://")
    other.syncio.update_user_metadata("alice", {"theme": None})
    plain = UserMetadata("memory://")
    assert_type(plain.syncio.get_user_metadata("alice").metadata, dict[str, Any])

    async def use_asyncio() -> int:
        async with users:
            found = await users.asyncio.get_user_metadata("alice")
            assert_type(found.metadata, Settings)
            return found.metadata.get("n", 0)

    return asyncio.run(use_asyncio()) == 2


class Settings(TypedDict, total=False):
    """The metadata of a user in this program."""

    theme: str
    n: int


def use_syncio() -> bool:
    """Call every function."""
    result: MetadataResult = update_user_metadata("alice", {"theme": "dark"})
    theme: str = result.metadata["theme"]
    settings: Settings = {"theme": theme}
    set_user_metadata("bob", settings)
    update_user_metadata("bob", settings)
    update_bulk_user_metadata({"alice": {"n": 1}, "bob": {"n": 2}})
    modify_user_metadata("bob", lambda metadata: {**metadata, "n": metadata["n"] + 1})
    found: dict[str, MetadataResult] = get_bulk_user_metadata(["alice", "bob"])
    cleared: ClearUserMetadataResult = clear_user_metadata("alice")
    return bool(cleared and found) and get_user_metadata("bob").metadata["n"] == 3


def main() -> None:
    """Use the library in every way that its types should allow."""
    override = usermetadata.UserMetadataOverrideConfig(functions=Logged)
    storages: list[Storage | str | Path | None] = [
        "memory://",
        Path("typed.db"),
        InMemoryStorage(),
        SQLiteStorage(":memory:", synchronous="NORMAL", timeout=1),
        Wrapped(InMemoryStorage()),
    ]
    for storage in storages:
        usermetadata.init(storage, override)
        assert asyncio.run(use_asyncio())
        assert use_syncio()
        usermetadata.close()
    assert use_types()


if __name__ == "__main__":
    main()
