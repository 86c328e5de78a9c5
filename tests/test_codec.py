"""Checking and copying input; encoding and decoding."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import importlib.util
import math
import sys
import threading
import types
from typing import Any, NamedTuple
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import json_texts, metadata

from usermetadata import InvalidInputError
from usermetadata.codec import decode_metadata, encode_metadata
from usermetadata.validation import MAX_DEPTH, copy_metadata


def codec(modules: dict[str, Any]) -> Any:
    """Return another ``usermetadata.codec``, whose first object is encoded with these modules."""
    spec = importlib.util.find_spec("usermetadata.codec")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with mock.patch.dict(sys.modules, modules):
        module.encode_metadata({})
    return module


standard: Any = codec({"msgspec": None})
"""The codec as it is where msgspec is not installed."""


def nested(levels: int) -> dict[str, Any]:
    """Return nested objects and arrays; the root object counts as a level."""
    value: Any = {}
    for above in reversed(range(levels - 1)):
        value = [value] if above % 2 else {"a": value}
    root: dict[str, Any] = value
    return root


def contains_itself() -> dict[str, Any]:
    """Return an object that holds a list that holds the object."""
    inner: dict[str, Any] = {}
    inner["list"] = [0, inner]
    return {"inner": inner}


class SameText(str):
    """A ``str`` that never equals another one."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        return f"SameText({str.__repr__(self)})"


BAD_INPUT: dict[str, tuple[object, str]] = {
    "nan": ({"a": [0, 1, 2, math.nan]}, 'update["a"][3]: nan is not JSON'),
    "infinity": ({"a": {"b": math.inf}}, 'update["a"]["b"]: inf is not JSON'),
    "minus infinity": ({"a": -math.inf}, 'update["a"]: -inf is not JSON'),
    "int key": ({1: "a"}, "update[1]: a key of type int is not JSON; convert it to a str"),
    "None key": ({"a": {None: 1}}, 'update["a"][None]: a key of type NoneType is not JSON'),
    "tuple key": ({"a": [{(): 1}]}, 'update["a"][0][()]: a key of type tuple is not JSON'),
    "set": ({"a": {1}}, 'update["a"]: set is not JSON'),
    "datetime": ({"a": datetime.datetime.min}, 'update["a"]: datetime is not JSON; convert it'),
    "decimal": ({"a": decimal.Decimal(1)}, 'update["a"]: Decimal is not JSON'),
    "bytes": ({"a": b"b"}, 'update["a"]: bytes is not JSON'),
    "object": ({"a": object()}, 'update["a"]: object is not JSON'),
    "surrogate": ({"a": ["\ud800"]}, 'update["a"][0]: a lone surrogate is not Unicode text'),
    "surrogate in a key": ({"a": {"\udfff": 1}}, 'update["a"]["\\udfff"]: a lone surrogate'),
    "surrogate in a root key": ({"\udfff": 1}, 'update["\\udfff"]: a lone surrogate'),
    "NUL in a root key": ({"a\0b": 1}, 'update["a\\u0000b"]: a root-level key cannot hold U+0000'),
    "circular": (contains_itself(), 'update["inner"]["list"][1]: contains itself'),
    "the same key twice": (
        {"a": 1, SameText("a"): 2},
        'update["a"]: the same key as another',
    ),
    "too deep": (nested(MAX_DEPTH + 1), "nests deeper than 200 levels"),
    "integer too long": ({"a": 10**5000}, 'update["a"]: an integer too long'),
    "list": ([], "update: list is not a mapping"),
    "None": (None, "update: NoneType is not a mapping"),
    "str": ("{}", "update: str is not a mapping"),
    "pairs": ([("a", 1)], "update: list is not a mapping"),
}


@pytest.mark.parametrize(("value", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_refused_with_its_place(value: object, message: str) -> None:
    """The message gives the place of the fault in the argument, and the fault."""
    with pytest.raises(InvalidInputError) as caught:
        copy_metadata(value, "update")
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_deep_fault_is_placed_briefly() -> None:
    """The place of a deeply nested fault is shortened."""
    with pytest.raises(InvalidInputError) as caught:
        copy_metadata(nested(MAX_DEPTH + 1), "update")
    assert len(str(caught.value)) < 150


WIDE: dict[str, Any] = {f"property {n}": n for n in range(30)}


@pytest.mark.parametrize(
    "name", [name for name in BAD_INPUT if BAD_INPUT[name][1][:7] == "update["]
)
def test_bad_input_is_found_among_many_values(name: str) -> None:
    """The message is the same for an object of many properties, and gives the place in an array."""
    value: Any
    value, message = BAD_INPUT[name]
    with pytest.raises(InvalidInputError) as caught:
        copy_metadata({**WIDE, **value}, "update")
    assert message in str(caught.value)
    if "root-level" not in message:
        with pytest.raises(InvalidInputError) as caught:
            copy_metadata({"list": [*range(30), {**WIDE, **value}]}, "update")
        assert message.replace("update", 'update["list"][30]', 1) in str(caught.value)


@given(metadata, st.lists(st.sampled_from([1, 2**70, 1.5, "é", None, True, "a"]), max_size=30))
def test_larger_objects_come_back_exactly(value: dict[str, Any], values: list[Any]) -> None:
    """Any property may stand among many others."""
    wide = {**WIDE, "values": values, **value}
    copied = copy_metadata(wide, "update")
    assert repr(copied) == repr(wide)
    assert copied["values"] is not values or not values
    assert copied is not wide


@given(metadata)
def test_valid_input_comes_back_exactly(value: dict[str, Any]) -> None:
    """Every type, order, digit and sign survives checking, encoding and decoding."""
    copied = copy_metadata(value, "update")
    assert repr(copied) == repr(value)
    assert repr(decode_metadata(encode_metadata(copied))) == repr(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_come_back_bit_for_bit(number: float) -> None:
    """Floats keep all of their bits."""
    decoded = decode_metadata(encode_metadata({"n": number}))
    assert decoded["n"].hex() == number.hex()


@given(st.text(st.characters()))
def test_text_is_stored_or_refused(text: str) -> None:
    """Stored text is UTF-8 without U+0000, so every database can keep it."""
    try:
        copied = copy_metadata({"text": text}, "update")
    except InvalidInputError:
        assert any("\ud800" <= character <= "\udfff" for character in text)
    else:
        assert b"\0" not in encode_metadata(copied).encode()
        assert decode_metadata(encode_metadata(copied)) == {"text": text}


def test_the_deepest_nesting_comes_back() -> None:
    """``MAX_DEPTH`` levels are allowed, arrays and objects alike."""
    deepest = nested(MAX_DEPTH)
    assert decode_metadata(encode_metadata(copy_metadata(deepest, "update"))) == deepest


def test_other_spellings_of_json_become_plain() -> None:
    """Tuples, mappings and subclasses of plain types are stored as their JSON equivalents."""

    class Colour(str, enum.Enum):  # noqa: UP042 - applications have such enums
        RED = "red"

    class Level(enum.IntEnum):
        HIGH = 3

    class Metres(float):
        __slots__ = ()

        def __repr__(self) -> str:
            return "many"

    class Point(NamedTuple):
        x: int
        y: tuple[int, ...]

    copied = copy_metadata(
        collections.OrderedDict(
            {
                Colour.RED: Colour.RED,
                "level": Level.HIGH,
                "metres": Metres(1.5),
                "point": Point(1, (2,)),
                "proxy": types.MappingProxyType({"a": 1}),
            }
        ),
        "update",
    )
    assert repr(copied) == (
        "{'red': 'red', 'level': 3, 'metres': 1.5, 'point': [1, [2]], 'proxy': {'a': 1}}"
    )


def test_a_copy_shares_nothing() -> None:
    """Changing the argument after the call changes nothing in the copy."""
    value = {"list": [{"a": 1}]}
    copied = copy_metadata(value, "update")
    value["list"][0]["a"] = 2
    value["list"].clear()
    assert copied == {"list": [{"a": 1}]}


def test_the_same_object_may_stand_twice() -> None:
    """Only an object inside itself is circular; the copies are independent."""
    shared = [1]
    copied = copy_metadata({"a": shared, "b": [shared, shared]}, "update")
    copied["a"].append(2)
    assert copied == {"a": [1, 2], "b": [[1], [1]]}


def test_long_integers_follow_pythons_limit() -> None:
    """An application that raises Python's own limit may store longer integers."""
    limit = sys.get_int_max_str_digits()
    number = 10**limit
    sys.set_int_max_str_digits(limit + 1)
    try:
        copied = copy_metadata({"n": number}, "update")
        assert decode_metadata(encode_metadata(copied)) == {"n": number}
    finally:
        sys.set_int_max_str_digits(limit)


# Texts that are not metadata, and what the error says.
BAD_TEXTS = {
    "": "Expecting value",
    "{": "Expecting property name",
    '{"a": 1}x': "Extra data",
    '{"a": NaN}': "NaN is not JSON",
    '{"a": -Infinity}': "-Infinity is not JSON",
    "[1]": "it holds an array, not an object",
    "null": "it holds null, not an object",
    '"a"': "it holds a string, not an object",
    "1": "it holds a number, not an object",
    "true": "it holds a boolean, not an object",
    '{"a": -1e999}': "it holds a number that a float would change",
    '{"a": [1e-999]}': "it holds a number that a float would change",
    '{"a": 12345678901234567890.12}': "it holds a number that a float would change",
    '{"a": 0.1000000000000000055}': "it holds a number that a float would change",
    '{"a": 9007199254740993.0}': "it holds a number that a float would change",
    '{"a": 1e99999999999999999999}': "it holds a number that a float would change",
    '{"a": 1.234567e-320}': "it holds a number that a float would change",
    '{"a": 01}': "Expecting ',' delimiter",
    '{"a": "\x1f"}': "Invalid control character",
    '{"a": 1,}': "Illegal trailing comma|Expecting property name",
    '\ufeff{"a": 1}': "Expecting value",
    f'{{"a": {"9" * 5000}}}': "Exceeds the limit",
    '{"a":' * 100_000: "it nests deeper than 200 levels",
}


@pytest.mark.parametrize(
    ("text", "message"), BAD_TEXTS.items(), ids=lambda text: ascii(str(text)[:20])
)
def test_what_is_not_an_object_cannot_be_decoded(text: str, message: str) -> None:
    """Text that is not a JSON object is a ``ValueError`` that says why."""
    with pytest.raises(ValueError, match=message):
        decode_metadata(text)


@pytest.mark.parametrize("number", ["1.10", "-0.0", "1E22", "0.1", "1e-7", "123.4560e2", "5e-324"])
def test_a_number_may_be_written_in_any_way(number: str) -> None:
    """A row of another program may write a number with other digits, if the value is the same."""
    assert decode_metadata(f'{{"n": {number}}}') == {"n": float(number)}


# With and without msgspec.


def decoded(codec: Any, text: str) -> str:
    """Return what a codec makes of a text: an object, or the text of the error."""
    try:
        return repr(codec.decode_metadata(text))
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


@given(metadata)
def test_either_way_reads_what_the_other_writes(value: dict[str, Any]) -> None:
    """Objects come back exactly, whichever way they were written and are read."""
    for text in {encode_metadata(value), standard.encode_metadata(value)}:
        assert repr(decode_metadata(text)) == repr(value)
        assert repr(standard.decode_metadata(text)) == repr(value)


@given(json_texts)
def test_any_text_is_read_alike(text: str) -> None:
    """Text of any program gives the same object with and without msgspec, or the same error."""
    assert decoded(sys.modules["usermetadata.codec"], text) == decoded(standard, text)


@pytest.mark.parametrize("text", BAD_TEXTS, ids=lambda text: ascii(text[:20]))
def test_the_same_error_either_way(text: str) -> None:
    """The error does not depend on what decodes, nor on where in the text the fault is."""
    for among in (text, f'{{"f": [{"1.5, 2e300, " * 9}0], "v": {text}}}'):
        assert decoded(sys.modules["usermetadata.codec"], among) == decoded(standard, among)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_many_floats_come_back_bit_for_bit(numbers: list[float]) -> None:
    """Arrays of floats keep all of their bits, however another program has written them."""
    written = [repr(number) for number in numbers]
    upper = [digits.upper().replace("E", "0E") for digits in written if "." in digits]
    for digits in (written, upper, [*written, "0.5000"]):
        text = f'{{"n":[{",".join(digits)}]}}'
        expected = [float(each).hex() for each in digits]
        assert [number.hex() for number in decode_metadata(text)["n"]] == expected
        assert decoded(standard, text) == repr(decode_metadata(text))


@pytest.mark.parametrize("changed", ["0.1000000000000000055", "1e400", "1e-400", "5e-325"])
def test_a_number_that_a_float_would_change_is_found_among_many(changed: str) -> None:
    """One such number among thousands of others makes the text damaged."""
    text = f'{{"n":[{"0.25," * 5000}{changed}]}}'
    with pytest.raises(ValueError, match="a number that a float would change"):
        decode_metadata(text)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("beside", [None, 1])
def test_what_is_not_a_number_is_never_written(value: float, beside: object) -> None:
    """NaN and infinities raise an error; they are not stored as null."""
    for each in (sys.modules["usermetadata.codec"], standard):
        with pytest.raises(ValueError, match="not JSON compliant"):
            each.encode_metadata({"a": [beside, {"b": value}]})


def test_nulls_and_the_word_null_are_written() -> None:
    """A nested null, and text with that word, come back like anything else."""
    value = {"a": [None, 1.5, {"null": "null"}], "b": "not null, nor nan", "c": {"d": None}}
    assert decode_metadata(encode_metadata(value)) == value


@pytest.mark.parametrize("limit", [640, 5000, 0])
def test_pythons_limit_of_digits_holds_either_way(limit: int) -> None:
    """Integers are refused from the same length on, when they are written and when they are read.

    A limit of 0 means that there is none.
    """
    before = sys.get_int_max_str_digits()
    try:
        for digits in (640, 641, 4300, 4301, 5000, 5001):
            sys.set_int_max_str_digits(0)
            text, number = f'{{"n":{"9" * digits}}}', 10**digits - 1
            sys.set_int_max_str_digits(limit)
            for each in (sys.modules["usermetadata.codec"], standard):
                if limit and digits > limit:
                    with pytest.raises(ValueError, match="Exceeds the limit"):
                        each.encode_metadata({"n": number})
                    with pytest.raises(ValueError, match="Exceeds the limit"):
                        each.decode_metadata(text)
                else:
                    assert each.encode_metadata({"n": number}) == text
                    assert each.decode_metadata(text) == {"n": number}
    finally:
        sys.set_int_max_str_digits(before)


def test_the_last_of_equal_keys_counts() -> None:
    """A key that stands twice has the place of the first and the value of the last."""
    text = '{"a": 1, "b": 2, "a": {"c": 1, "c": 3.50}}'
    for each in (sys.modules["usermetadata.codec"], standard):
        assert repr(each.decode_metadata(text)) == "{'a': {'c': 3.5}, 'b': 2}"


@pytest.mark.parametrize("version", ["0.18.6", "0.9.1"])
def test_an_old_msgspec_is_not_used(version: str) -> None:
    """A release before the oldest that the tests ran with is left alone."""
    old = types.ModuleType("msgspec")
    old.__version__ = version  # type: ignore[attr-defined]
    alone = codec({"msgspec": old})
    assert alone.encode_metadata({"n": 1e16}) == standard.encode_metadata({"n": 1e16})


def test_threads_may_encode_and_decode_at_once() -> None:
    """Threads never see each other's objects or numbers."""
    failed: list[int] = []

    def work(thread: int) -> None:
        value = {str(n): [thread, n / 7, f"{thread} é {n}"] for n in range(50)}
        failed.extend(thread for _ in range(50) if decode_metadata(encode_metadata(value)) != value)

    threads = [threading.Thread(target=work, args=[thread]) for thread in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed


def test_a_caller_without_stack_is_not_told_of_damage() -> None:
    """Where the stack has no room left for decoding it is ``RecursionError``: the text is sound."""
    brackets, nested = "[" * 300, "[" * 150 + "1.5" + "]" * 150
    text = f'{{"brackets":"{brackets}","nested":{nested}}}'

    def deeper() -> int:
        try:
            failed = deeper()
        except RecursionError:
            failed = 0
        try:
            decode_metadata(text)
        except RecursionError:
            failed += 1
        return failed

    assert deeper() > 0


def test_a_lone_surrogate_of_another_program_survives() -> None:
    """Text that another program wrote with a lone surrogate can be read, merged and stored."""
    decoded = decode_metadata('{"a": "\\ud800", "b": "é"}')
    encoded = encode_metadata(decoded)
    assert encoded.encode()
    assert decode_metadata(encoded) == {"a": "\ud800", "b": "é"}
