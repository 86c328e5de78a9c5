"""The merge."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from strategies import mergeable

from usermetadata import merge_metadata

VECTORS = json.loads((Path(__file__).parent / "merge_vectors.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_every_vector_holds(vector: dict[str, Any]) -> None:
    """The cases that every implementation of the merge, in any language, must satisfy."""
    assert merge_metadata(vector["old"], vector["update"]) == vector["merged"]


@given(mergeable, mergeable)
def test_the_merge_changes_neither_argument(old: dict[str, Any], update: dict[str, Any]) -> None:
    """The merge is pure."""
    before = copy.deepcopy((old, update))
    merge_metadata(old, update)
    assert (old, update) == before


@given(mergeable, mergeable)
def test_merging_twice_is_merging_once(old: dict[str, Any], update: dict[str, Any]) -> None:
    """The merge is idempotent: a repeated update is harmless."""
    once = merge_metadata(old, update)
    assert merge_metadata(once, update) == once


@given(mergeable, mergeable)
def test_what_the_update_does_not_name_is_untouched(
    old: dict[str, Any], update: dict[str, Any]
) -> None:
    """Properties that are not in the update stay: the same objects."""
    merged = merge_metadata(old, update)
    kept = [name for name in old if name not in update and old[name] is not None]
    assert [name for name in merged if name not in update] == kept
    assert all(merged[name] is old[name] for name in kept)


@given(mergeable, mergeable)
def test_properties_keep_their_places(old: dict[str, Any], update: dict[str, Any]) -> None:
    """The properties that were there come first, in their order; then the new ones in theirs."""
    merged = merge_metadata(old, update)
    assert list(merged) == [name for name in {**old, **update} if name in merged]
    was_there = [name in old for name in merged]
    assert was_there == sorted(was_there, reverse=True)


@given(mergeable, mergeable)
def test_what_the_update_names_is_the_updates(old: dict[str, Any], update: dict[str, Any]) -> None:
    """Properties of the update are in the result unchanged, or removed if they are ``None``."""
    merged = merge_metadata(old, update)
    for name, value in update.items():
        assert merged.get(name) is value
    assert None not in merged.values()


@given(mergeable, mergeable, mergeable)
def test_two_updates_are_their_composition(
    old: dict[str, Any], first: dict[str, Any], second: dict[str, Any]
) -> None:
    """Merging two updates in turn equals merging their composition."""
    in_turn = merge_metadata(merge_metadata(old, first), second)
    assert in_turn == merge_metadata(old, {**first, **second})
