"""Awkward JSON comes back unchanged from every storage, the server and the command line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from asgi_server import serve
from click.testing import CliRunner

from usermetadata.changes import Merge, Replace
from usermetadata.cli import main
from usermetadata.codec import encode_metadata
from usermetadata.server import create_app

if TYPE_CHECKING:
    from pathlib import Path

    from usermetadata import Storage

# Planes, controls, combining marks, directions, noncharacters, what looks like an escape or SQL.
TEXTS = [
    "",
    " ",
    "\0",
    "\\u0000",
    "\\",
    '"',
    "'; DROP TABLE user_metadata; --",
    "%s %(x)s $1 :a ? {}",
    "\x01\x1f\x7f\x80\x9f",
    "\u2028\u2029\ufeff",
    "e\u0301 \u00e9 \u1e9b\u0323",
    "\u202eabc\u202c",
    "\ufffe\uffff\U0001fffe\U0010ffff",
    "\U0001f469\u200d\U0001f680",
    "null",
    "NaN",
    "1e999",
    "\r\n\t\b\f",
    "a" * 70_000,
]
NUMBERS: list[Any] = [
    *(0, -0.0, 1, -1, 2**53 + 1, 2**63, -(2**63) - 1, 10**400),
    *(0.1, 1e22, 5e-324, 1.7976931348623157e308, 123456789.123456789, 1e-7),
    # JSON may have 1e16 or 1e+16, and 1e-05 or 0.00001.
    *(1e15, 1e16, -1e16, 1.5e17, 1e-5, 1.25e-5, 9007199254740993.0, 1e300),
]
DOCUMENTS: dict[str, dict[str, Any]] = {
    "values": {"texts": TEXTS, "numbers": NUMBERS, "others": [True, False, [None], {}, [[]]]},
    "keys": {text: {text: text} for text in TEXTS if "\0" not in text},
    "deep": {"a": json.loads("[" * 190 + "]" * 190)},
    "2 MB": {f"key {n}": "\u00e9" * 1000 for n in range(1000)},
    "30,000 keys": {f"{n:x}": n for n in range(30_000)},
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_storage_returns_it_to_the_last_byte(storage: Storage, name: str) -> None:
    """What is read is what was written, also after another property has changed."""
    document = DOCUMENTS[name]
    storage.write([("alice", Replace(document))])
    [merged] = storage.write([("alice", Merge({"one more": 1}))])
    for found in (merged, storage.read(["alice"])["alice"]):
        assert found is not None
        assert_same(found, {**document, "one more": 1})


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_server_returns_it_to_the_last_byte(storage: Storage, name: str) -> None:
    """What a client gets is what it has sent."""
    document = DOCUMENTS[name]
    app = create_app(storage, max_body_size=2**23, max_metadata_size=2**23)
    body = json.dumps({"userId": "alice", "metadataUpdate": document})
    # verify: reading all root certificates takes as long as the rest of the test.
    with serve(app) as port, httpx.Client(verify=False, timeout=60) as client:
        url = f"http://127.0.0.1:{port}/recipe/user/metadata"
        client.put(url, content=body).raise_for_status()
        answer = client.get(url, params={"userId": "alice"})
    assert_same(answer.json()["metadata"], document)


def test_export_and_import_copy_it_to_the_last_byte(tmp_path: Path) -> None:
    """What the command line imports and exports again is the same file."""
    lines = [encode_metadata({"userId": n, "metadata": each}) for n, each in DOCUMENTS.items()]
    (tmp_path / "given").write_text("".join(f"{line}\n" for line in sorted(lines)), "utf-8")
    url = f"sqlite:///{tmp_path / 'users.db'}"
    for command, file in (("import", "given"), ("export", "exported")):
        done = CliRunner().invoke(main, [command, str(tmp_path / file), "--storage", url])
        assert done.exit_code == 0, done.output
    exported = (tmp_path / "exported").read_text("utf-8").split("\n")[:-1]
    assert sorted(exported) == sorted(lines)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the texts, in which 1, 1.0 and True differ."""
    if json.dumps(found, sort_keys=True) != json.dumps(expected, sort_keys=True):
        assert texts(found) == texts(expected)  # it shows the properties that differ
        pytest.fail("the texts differ")


def texts(document: dict[str, Any]) -> dict[str, str]:
    """Return the text of each property."""
    return {key: json.dumps(value, sort_keys=True) for key, value in document.items()}
