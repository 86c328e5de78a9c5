"""The blocking functions, for code without ``async``.

They also work in a thread whose event loop is running, and block that loop. This file is generated
from ``usermetadata/asyncio/__init__.py``; change that one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic

from usermetadata._core.default import default
from usermetadata.interfaces import (
    ClearUserMetadataResult,
    EraseUserResult,
    M,
    MetadataResult,
    U,
    Value,
)

if TYPE_CHECKING:
    from usermetadata._core.default import Default
    from usermetadata._core.functions import Functions


class SyncioUserMetadata(Generic[M, U]):
    """The blocking functions on one store: ``UserMetadata(...).syncio``.

    The functions of this module use the store of ``init``. ``M`` is the type of the stored
    metadata, ``U`` the type of an update.
    """

    def __init__(self, functions: Functions | Default) -> None:
        self._functions = functions

    def get_user_metadata(
        self, user_id: str, user_context: dict[str, Any] | None = None
    ) -> MetadataResult[M]:
        """Return the metadata of a user.

        Users need not exist; an unknown user's metadata is ``{}``.

        Args:
            user_id: 1 to 255 characters, without U+0000.
            user_context: passed to an override unchanged; this library ignores it.

        Returns:
            The metadata, in ``.metadata``.

        Raises:
            InvalidInputError: the user id is not valid.
            UsageError: ``usermetadata.init`` was not called.
            StorageError: the storage failed; ``__cause__`` is its driver's error.
            StorageBusyError: timed out waiting for a writer or a connection.
            StorageUnavailableError: the server cannot be reached.
            DamagedMetadataError: the stored row is not a JSON object.

        Example:
            >>> get_user_metadata("alice").metadata
            {}
        """
        context = {} if user_context is None else user_context
        return self._functions.blocking.get_user_metadata(user_id, context)

    def update_user_metadata(
        self, user_id: str, metadata_update: U, user_context: dict[str, Any] | None = None
    ) -> MetadataResult[M]:
        """Merge an update into the metadata of a user, in one atomic step.

        Root-level properties of the update overwrite the stored ones; nested objects are not
        merged. A root-level property whose value is ``None`` is removed. A nested ``None`` is data
        and stays. Two concurrent updates of one user, from tasks, threads or processes, both
        survive.

        Args:
            user_id: 1 to 255 characters, without U+0000.
            metadata_update: a mapping of properties to JSON values. It is copied.
            user_context: passed to an override unchanged; this library ignores it.

        Returns:
            The whole metadata after the update, in ``.metadata``.

        Raises:
            InvalidInputError: the user id is not valid, or the update is not JSON; nothing was
                written.
            UsageError: ``usermetadata.init`` was not called.
            StorageError: the storage failed and nothing was written; ``__cause__`` is its driver's
                error.
            StorageBusyError: timed out waiting for a writer or a connection; nothing was written.
            StorageUnavailableError: the server cannot be reached; nothing was written.
            OutcomeUnknownError: the connection or the disk failed during the write; all of it was
                stored, or nothing.
            DamagedMetadataError: the stored row is not a JSON object; nothing was written.

        Example:
            >>> update_user_metadata("alice", {"theme": "dark", "todos": ["a"]}).metadata
            {'theme': 'dark', 'todos': ['a']}
            >>> update_user_metadata("alice", {"todos": None}).metadata
            {'theme': 'dark'}

        SuperTokens has the same rule: `updating metadata
        <https://supertokens.com/docs/post-authentication/user-management/user-metadata>`_.
        """
        context = {} if user_context is None else user_context
        return self._functions.blocking.update_user_metadata(user_id, metadata_update, context)

    def clear_user_metadata(
        self, user_id: str, user_context: dict[str, Any] | None = None
    ) -> ClearUserMetadataResult:
        """Remove everything stored about a user; no error if there is nothing.

        Args:
            user_id: 1 to 255 characters, without U+0000.
            user_context: passed to an override unchanged; this library ignores it.

        Returns:
            An empty result.

        Raises:
            InvalidInputError: the user id is not valid.
            UsageError: ``usermetadata.init`` was not called.
            StorageError: the storage failed and nothing was removed; ``__cause__`` is its driver's
                error.
            StorageBusyError: timed out waiting for a writer or a connection; nothing was removed.
            StorageUnavailableError: the server cannot be reached; nothing was removed.
            OutcomeUnknownError: the connection or the disk failed during the write; whether the
                metadata was removed is unknown.

        Example:
            >>> clear_user_metadata("alice")
            ClearUserMetadataResult()
        """
        context = {} if user_context is None else user_context
        return self._functions.blocking.clear_user_metadata(user_id, context)

    def set_user_metadata(
        self, user_id: str, metadata: M | U, user_context: dict[str, Any] | None = None
    ) -> MetadataResult[M]:
        """Replace all metadata of a user, in one atomic step.

        The result is the same as after clear and update, but no reader sees the user without
        metadata. Root-level properties whose value is ``None`` are left out.

        Args:
            user_id: 1 to 255 characters, without U+0000.
            metadata: a mapping of properties to JSON values. It is copied.
            user_context: passed to an override unchanged; this library ignores it.

        Returns:
            The metadata as stored, in ``.metadata``.

        Raises:
            InvalidInputError: the user id is not valid, or the metadata is not JSON; nothing was
                written.
            UsageError: ``usermetadata.init`` was not called.
            StorageError: the storage failed and nothing was written; ``__cause__`` is its driver's
                error.
            StorageBusyError: timed out waiting for a writer or a connection; nothing was written.
            StorageUnavailableError: the server cannot be reached; nothing was written.
            OutcomeUnknownError: the connection or the disk failed during the write; all of it was
                stored, or nothing.

        Example:
            >>> set_user_metadata("alice", {"plan": "pro"}).metadata
            {'plan': 'pro'}
        """
        context = {} if user_context is None else user_context
        return self._functions.blocking.set_user_metadata(user_id, metadata, context)

    def modify_user_metadata(
        self,
        user_id: str,
        function: Callable[[M], M | U],
        user_context: dict[str, Any] | None = None,
    ) -> MetadataResult[M]:
        """Replace the metadata of a user with ``function(metadata)``, in one atomic step.

        Use it for counters, nested edits and conditional changes. The function runs inside the
        storage's lock or transaction, so it should be quick and must not call this library. It may
        be called again if the storage retries. It is a plain function, not an ``async`` one.
        Root-level properties whose value is ``None`` are removed.

        Args:
            user_id: 1 to 255 characters, without U+0000.
            function: takes the stored metadata, ``{}`` if there is none, and returns the new
                metadata; it may change its argument and return it. If it raises, nothing is
                written.
            user_context: passed to an override unchanged; this library ignores it.

        Returns:
            The metadata as stored, in ``.metadata``.

        Raises:
            InvalidInputError: the user id is not valid, or the function's result is not JSON;
                nothing was written.
            UsageError: ``usermetadata.init`` was not called, or the function called this library.
            StorageError: the storage failed and nothing was written; ``__cause__`` is its driver's
                error.
            StorageBusyError: timed out waiting for a writer or a connection; nothing was written.
            StorageUnavailableError: the server cannot be reached; nothing was written.
            OutcomeUnknownError: the connection or the disk failed during the write; all of it was
                stored, or nothing.
            DamagedMetadataError: the stored row is not a JSON object; nothing was written.
            Exception: exceptions of the function propagate unchanged; nothing was written.

        Example:
            >>> def count_visit(metadata):
            ...     return {**metadata, "visits": metadata.get("visits", 0) + 1}
            >>> modify_user_metadata("bob", count_visit).metadata
            {'visits': 1}
        """
        context = {} if user_context is None else user_context
        return self._functions.blocking.modify_user_metadata(user_id, function, context)

    def get_bulk_user_metadata(
        self, user_ids: Iterable[str], user_context: dict[str, Any] | None = None
    ) -> dict[str, MetadataResult[M]]:
        """Return the metadata of many users, in one query.

        Args:
            user_ids: any number of user ids.
            user_context: passed to an override unchanged; this library ignores it.

        Returns:
            The result of ``get_user_metadata`` by user id, in the order given, all from one
            consistent snapshot.

        Raises:
            InvalidInputError: a user id is not valid.
            UsageError: ``usermetadata.init`` was not called.
            StorageError: the storage failed; ``__cause__`` is its driver's error.
            StorageBusyError: timed out waiting for a writer or a connection.
            StorageUnavailableError: the server cannot be reached.
            DamagedMetadataError: the stored row of one of the users is not a JSON object.

        Example:
            >>> get_bulk_user_metadata(["erin", "frank"])
            {'erin': MetadataResult(metadata={}), 'frank': MetadataResult(metadata={})}
        """
        context = {} if user_context is None else user_context
        return self._functions.blocking.get_bulk_user_metadata(user_ids, context)

    def update_bulk_user_metadata(
        self,
        metadata_updates: Mapping[str, U],
        user_context: dict[str, Any] | None = None,
    ) -> dict[str, MetadataResult[M]]:
        """Update the metadata of many users in one atomic step: all of them or none.

        Args:
            metadata_updates: the updates by user id, each as for ``update_user_metadata``. They are
                copied.
            user_context: passed to an override unchanged; this library ignores it.

        Returns:
            The result of ``update_user_metadata`` by user id, in the order given.

        Raises:
            InvalidInputError: a user id is not valid, or an update is not JSON; nothing was
                written.
            UsageError: ``usermetadata.init`` was not called.
            StorageError: the storage failed and nothing was written; ``__cause__`` is its driver's
                error.
            StorageBusyError: timed out waiting for a writer or a connection; nothing was written.
            StorageUnavailableError: the server cannot be reached; nothing was written.
            OutcomeUnknownError: the connection or the disk failed during the write; all of it was
                stored, or nothing.
            DamagedMetadataError: the stored row of one of the users is not a JSON object; nothing
                was written.

        Example:
            >>> updates = {"carol": {"seat": 1}, "dave": {"seat": 2}}
            >>> updated = update_bulk_user_metadata(updates)
            >>> updated["dave"].metadata
            {'seat': 2}
        """
        context = {} if user_context is None else user_context
        return self._functions.blocking.update_bulk_user_metadata(metadata_updates, context)

    def erase_user(
        self, user_id: str, user_context: dict[str, Any] | None = None, *, all_apps: bool = False
    ) -> EraseUserResult[M]:
        """Remove everything stored about a user and return it, in one atomic step.

        Use it for erasure requests. The result is the export that the law may require.

        Args:
            user_id: 1 to 255 characters, without U+0000.
            user_context: passed to an override unchanged; this library ignores it.
            all_apps: whether the user is removed from all apps of the store.

        Returns:
            What was removed: ``.metadata`` for this app, ``.by_app`` for each app. Both are empty
            if there was nothing.

        Raises:
            InvalidInputError: the user id is not valid, or ``all_apps`` is not a ``bool``.
            UsageError: ``usermetadata.init`` was not called, or the storage cannot find the
                user's other apps.
            StorageError: the storage failed and nothing was removed; ``__cause__`` is its driver's
                error.
            StorageBusyError: timed out waiting for a writer or a connection; nothing was removed.
            StorageUnavailableError: the server cannot be reached; nothing was removed.
            OutcomeUnknownError: the connection or the disk failed during the write; all of it was
                removed, or nothing.
            DamagedMetadataError: a stored row is not a JSON object; nothing was removed.
                ``clear_user_metadata`` removes it.

        Example:
            >>> set_user_metadata("grace", {"email": "grace@example.com"})
            MetadataResult(metadata={'email': 'grace@example.com'})
            >>> erase_user("grace").metadata
            {'email': 'grace@example.com'}
            >>> erase_user("grace").by_app
            {}
        """
        context = {} if user_context is None else user_context
        return self._functions.blocking.erase_user(user_id, all_apps, context)

    def list_user_metadata(
        self,
        where: Mapping[str, Value] | None = None,
        user_context: dict[str, Any] | None = None,
        *,
        after: str = "",
        limit: int = 100,
    ) -> dict[str, MetadataResult[M]]:
        """Return one page of users and their metadata: all users, or those with given values.

        Args:
            where: root-level properties and their values, at least one of them indexed: ``str``,
                ``int`` or ``bool``. JSON type and value must be equal: ``1``, ``True`` and ``"1"``
                differ. ``None`` means all users.
            user_context: passed to an override unchanged; this library ignores it.
            after: the last user id of the previous page; ``""`` for the first page.
            limit: the largest number of users to return, at least 1.

        Returns:
            The results by user id, sorted by user id, all from one consistent snapshot. Pass the
            last user id as the next ``after``. The last page has fewer than ``limit`` users.

        Raises:
            InvalidInputError: an argument is not valid.
            UsageError: ``usermetadata.init`` was not called, no property of ``where`` is indexed,
                or the storage cannot find users.
            StorageError: the storage failed; ``__cause__`` is its driver's error.
            StorageBusyError: timed out waiting for a writer or a connection.
            StorageUnavailableError: the server cannot be reached.
            DamagedMetadataError: the row of one of the users is not a JSON object. The error's
                ``user_id`` names the user, so the caller can continue after that user.

        Example:
            >>> set_user_metadata("heidi", {"plan": "pro"})
            MetadataResult(metadata={'plan': 'pro'})
            >>> list_user_metadata(after="h", limit=1)
            {'heidi': MetadataResult(metadata={'plan': 'pro'})}
        """
        context = {} if user_context is None else user_context
        return self._functions.blocking.list_user_metadata(where, after, limit, context)

    def count_user_metadata(
        self,
        where: Mapping[str, Value] | None = None,
        user_context: dict[str, Any] | None = None,
    ) -> int:
        """Return the number of users who have metadata, or who have given values in it.

        Args:
            where: as for ``list_user_metadata``.
            user_context: passed to an override unchanged; this library ignores it.

        Returns:
            The number of users. A user whose metadata is ``{}`` counts.

        Raises:
            InvalidInputError: ``where`` is not valid.
            UsageError: as for ``list_user_metadata``.
            StorageError: as for ``list_user_metadata``.

        Example:
            >>> set_user_metadata("ivan", {"plan": "pro"})
            MetadataResult(metadata={'plan': 'pro'})
            >>> count_user_metadata() > 0
            True
        """
        context = {} if user_context is None else user_context
        return self._functions.blocking.count_user_metadata(where, context)

    def find_user_id(
        self, where: Mapping[str, Value], user_context: dict[str, Any] | None = None
    ) -> str | None:
        """Return the id of the user who has a given value of a unique index.

        Args:
            where: as for ``list_user_metadata``; one of its properties must have a unique index.
            user_context: passed to an override unchanged; this library ignores it.

        Returns:
            The user id; ``None`` if no user has these values.

        Raises:
            InvalidInputError: ``where`` is not valid.
            UsageError: ``usermetadata.init`` was not called, or no property of ``where`` has a
                unique index.
            StorageError: as ``list_user_metadata`` does.

        Example:
            >>> from usermetadata import Index, UserMetadata
            >>> users = UserMetadata("memory://", indexes=[Index("customer", unique=True)])
            >>> users.syncio.update_user_metadata("judy", {"customer": "cus_1"})
            MetadataResult(metadata={'customer': 'cus_1'})
            >>> users.syncio.find_user_id({"customer": "cus_1"})
            'judy'
        """
        context = {} if user_context is None else user_context
        return self._functions.blocking.find_user_id(where, context)


_of_init: SyncioUserMetadata[dict[str, Any], Mapping[str, Any]] = SyncioUserMetadata(default)
get_user_metadata = _of_init.get_user_metadata
update_user_metadata = _of_init.update_user_metadata
clear_user_metadata = _of_init.clear_user_metadata
set_user_metadata = _of_init.set_user_metadata
modify_user_metadata = _of_init.modify_user_metadata
get_bulk_user_metadata = _of_init.get_bulk_user_metadata
update_bulk_user_metadata = _of_init.update_bulk_user_metadata
erase_user = _of_init.erase_user
list_user_metadata = _of_init.list_user_metadata
count_user_metadata = _of_init.count_user_metadata
find_user_id = _of_init.find_user_id
