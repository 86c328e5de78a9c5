"""After any sequence of calls, through both facades, a storage holds what a dict would."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import FACADES, STORAGES, open_storage
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from strategies import metadata

import usermetadata
from usermetadata import UserMetadataRecipe, merge_metadata

if TYPE_CHECKING:
    from usermetadata.codec import Metadata

facades = st.sampled_from(list(FACADES.values()))
user_ids = st.sampled_from(["alice", "Alice", "é", "\U0010ffff"])


class AnyCalls(RuleBasedStateMachine):
    """Calls one facade or the other, and applies the same to a model."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.opened = contextlib.ExitStack()
        folder = self.opened.enter_context(tempfile.TemporaryDirectory())
        self.storage = self.opened.enter_context(open_storage(kind, Path(folder)))
        self.model: dict[str, Metadata] = {}
        usermetadata.init(self.storage)

    def teardown(self) -> None:
        """Close what was opened."""
        UserMetadataRecipe.reset()
        self.opened.close()

    @rule(facade=facades, user_id=user_ids, update=metadata)
    def update(self, facade: Any, user_id: str, update: Metadata) -> None:
        """Merge into one user."""
        self.model[user_id] = merge_metadata(self.model.get(user_id, {}), update)
        same(facade.update_user_metadata(user_id, update).metadata, self.model[user_id])

    @rule(facade=facades, user_id=user_ids, new=metadata)
    def set(self, facade: Any, user_id: str, new: Metadata) -> None:
        """Replace one user."""
        self.model[user_id] = merge_metadata({}, new)
        same(facade.set_user_metadata(user_id, new).metadata, self.model[user_id])

    @rule(facade=facades, user_id=user_ids)
    def clear(self, facade: Any, user_id: str) -> None:
        """Remove one user."""
        self.model.pop(user_id, None)
        facade.clear_user_metadata(user_id)

    @rule(facade=facades, user_id=user_ids, name=st.sampled_from(["a", "b"]), fail=st.booleans())
    def modify(self, facade: Any, user_id: str, name: str, *, fail: bool) -> None:
        """Count, or raise in the function."""

        def count(metadata: Metadata) -> Metadata:
            metadata[name] = [metadata.get(name)]
            if fail:
                raise LookupError
            return metadata

        if fail:
            with pytest.raises(LookupError):
                facade.modify_user_metadata(user_id, count)
        else:
            old = self.model.get(user_id, {})
            self.model[user_id] = {**old, name: [old.get(name)]}
            same(facade.modify_user_metadata(user_id, count).metadata, self.model[user_id])

    @rule(facade=facades, updates=st.dictionaries(user_ids, metadata), fail=st.booleans())
    def update_bulk(self, facade: Any, updates: dict[str, Metadata], *, fail: bool) -> None:
        """Merge into several users, or fail for all because of one."""
        if fail:
            with pytest.raises(usermetadata.InvalidInputError):
                facade.update_bulk_user_metadata({**updates, "other": {"a": float("nan")}})
            return
        for user_id, update in updates.items():
            self.model[user_id] = merge_metadata(self.model.get(user_id, {}), update)
        updated = facade.update_bulk_user_metadata(updates)
        same(
            {user_id: result.metadata for user_id, result in updated.items()},
            {user_id: self.model[user_id] for user_id in updates},
        )

    @rule(facade=facades, user_id=user_ids)
    def get(self, facade: Any, user_id: str) -> None:
        """Read one user."""
        same(facade.get_user_metadata(user_id).metadata, self.model.get(user_id, {}))

    @rule(facade=facades, users=st.lists(user_ids))
    def get_bulk(self, facade: Any, users: list[str]) -> None:
        """Read several users."""
        found = facade.get_bulk_user_metadata(users)
        same(
            {user_id: result.metadata for user_id, result in found.items()},
            {user_id: self.model.get(user_id, {}) for user_id in users},
        )

    @invariant()
    def everything_is_as_in_the_model(self) -> None:
        """Read all users through both facades and from the storage."""
        everybody = ["alice", "Alice", "é", "\U0010ffff", "other"]
        rows = self.storage.read(everybody)
        same({user: rows[user] for user in everybody if user in rows}, self.rows())
        for facade in FACADES.values():
            found = facade.get_bulk_user_metadata(everybody)
            for user_id in everybody:
                same(found[user_id].metadata, self.model.get(user_id, {}))

    def rows(self) -> dict[str, Metadata]:
        """Return the model in a fixed order."""
        everybody = ["alice", "Alice", "é", "\U0010ffff", "other"]
        return {user: self.model[user] for user in everybody if user in self.model}


def same(found: Any, expected: Any) -> None:
    """Compare values, types and digits; ignore the order of properties."""
    assert repr(in_order(found)) == repr(in_order(expected))


def in_order(value: Any) -> Any:
    """Return a copy with sorted properties."""
    if isinstance(value, dict):
        return {key: in_order(value[key]) for key in sorted(value)}
    return [in_order(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("kind", [*STORAGES, "postgres portable"])
def test_every_storage_is_a_dict(kind: str) -> None:
    """After any calls through either facade, a storage holds what a dict would."""

    class Calls(AnyCalls):
        def __init__(self) -> None:
            super().__init__(kind)

    often = settings(max_examples=10, stateful_step_count=15)
    run_state_machine_as_test(Calls, settings=often)
