"""Hypothesis strategies for valid input."""

from __future__ import annotations

import json
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

_numbers = st.sampled_from(
    [
        *("1e16", "1E+16", "1.10", "-0", "-0.0", "0e5", "1e-400", "1e400", "0.1000000000000000055"),
        *("18446744073709551616", "01", "1.", ".5", "+1", "NaN", "-Infinity", "1e5.0"),
    ]
)
_pieces = _numbers | st.sampled_from(
    [*'{}[],:"\\ \n\x0b\ufeff\0\ud800', "null", '"a":1,', '"a":{"a":2},']
    + [f"\\{escaped}" for escaped in ("u0000", "ud800", "udc00", "ud83d\\ude00", "/", "x")]
)


@st.composite
def _texts(draw: st.DrawFn) -> str:
    """Return metadata as another program writes it, some numbers replaced, or damaged."""
    dumped = json.dumps(
        draw(metadata), ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1]))
    )
    for piece in draw(st.lists(_pieces, max_size=3)):
        begin = draw(st.integers(0, len(dumped)))
        dumped = dumped[:begin] + piece + dumped[begin + draw(st.integers(0, 2)) :]
    number = draw(st.none() | _numbers)
    return dumped if number is None else f'{{"n": [{number}], "others": {dumped}}}'


json_texts: st.SearchStrategy[str] = _texts()
"""JSON texts of metadata, sound and damaged."""
