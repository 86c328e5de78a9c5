"""Hypothesis strategies for valid input."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
"""Any Unicode text, U+0000 included."""

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda values: st.lists(values, max_size=4) | st.dictionaries(text, values, max_size=4),
    max_leaves=12,
)
"""Any JSON value."""

root_keys = st.sampled_from(["a", "b", "c", "", "é"]) | text.filter(lambda key: "\0" not in key)
"""Any root-level key; some come often, so that updates meet."""

metadata: st.SearchStrategy[dict[str, Any]] = st.dictionaries(root_keys, json_values, max_size=6)
"""Any metadata or update, root-level nulls included."""
