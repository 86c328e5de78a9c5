"""Hypothesis strategies for valid input."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
"""Any Unicode text, U+0000 included."""

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(text, values, max_size=3),
    max_leaves=6,
)
"""Any JSON value."""

root_keys = st.sampled_from(["a", "b", "c", "", "é"]) | text.filter(lambda key: "\0" not in key)
"""Any root-level key; some come often, so that updates meet."""

metadata: st.SearchStrategy[dict[str, Any]] = st.dictionaries(root_keys, json_values, max_size=5)
"""Any metadata or update, root-level nulls included."""

_shallow = st.none() | st.sampled_from([False, 0, "", "text"]) | st.integers()

mergeable: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d", ""]),
    _shallow
    | st.lists(_shallow, max_size=2)
    | st.fixed_dictionaries({}, optional={"a": _shallow, "b": _shallow}),
)
"""Any metadata or update as far as a merge looks into it, which is quicker to make."""
