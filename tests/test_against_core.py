"""``tests/benchmarks/against_core.py``, with the project's server in place of a core."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import Response
from test_server import KEY, served

from usermetadata import InMemoryStorage
from usermetadata.changes import Merge
from usermetadata.server import create_app

if TYPE_CHECKING:
    import pytest
    from starlette.types import Receive, Scope, Send

PROGRAM = Path(__file__).parent / "benchmarks" / "against_core.py"


def run(*options: str, code: int = 0) -> str:
    """Run the program for a moment; return what it prints."""
    command = [sys.executable, str(PROGRAM), "--quick", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def rows(output: str) -> dict[str, list[str]]:
    """Return the cells of the table's rows, by the names without versions."""
    lines = [line.strip("|").split("|") for line in output.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in lines[0]] == [
        *("a second", "1 update", "4 updates", "1 get", "4 gets")
    ]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines[2:]}


def test_a_core_is_measured_beside_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK, HTTP and the library take turns; the core's users are as they were.

    Errors are not throughput: a core that refuses each update has a rate of 0 there, and its errors
    are counted and named.
    """
    storage = InMemoryStorage()
    storage.write([(user_id, Merge({"n": 1})) for user_id in ("alice", "usermetadata-benchmark-7")])
    app = create_app(storage, api_keys=[KEY])

    async def refuse_updates(scope: Scope, receive: Receive, send: Send) -> None:
        refused = scope.get("method") == "PUT"
        await (Response("full", 507) if refused else app)(scope, receive, send)

    monkeypatch.setenv("SUPERTOKENS_API_KEY", KEY)
    with served(refuse_updates) as client:
        core = f"http://{client.connection.host}:{client.connection.port}"
        output = run("--core", core)
    found = rows(output)
    sdk = next(iter(found)).removesuffix(" + core")
    assert sdk.startswith("supertokens_python 0.")
    assert list(found) == [
        f"{sdk} + core",
        f"{sdk} + our server",
        "the library embedded, asyncio",
        "raw HTTP: core",
        "raw HTTP: our server",
    ]
    for row in f"{sdk} + core", "raw HTTP: core":
        updates, gets = found[row][:2], found[row][2:]
        assert all(re.fullmatch(r"0, [0-9,]+ errors", cell) for cell in updates)
        assert all(re.fullmatch(r"[0-9,]+", cell) for cell in gets)
    for row in f"{sdk} + our server", "the library embedded, asyncio", "raw HTTP: our server":
        # No errors; the rate of a machine with other work may be less than 1.
        assert all(re.fullmatch(r"[0-9,]+", cell) for cell in found[row])
    assert "StatusError 507 full" in output
    assert "resident memory of our server afterwards: " in output
    assert KEY not in output
    assert storage.read_after("", 10) == {"alice": {"n": 1}}


def test_without_a_core_the_rest_is_measured(tmp_path: Path) -> None:
    """It says so; ``--storage`` names what our server and the library use."""
    database = tmp_path / "users.db"
    output = run("--storage", f"sqlite:///{database}")
    assert output.startswith("no --core: a core is not measured")
    assert len(rows(output)) == 3
    assert database.exists()


def test_a_core_that_is_not_there_is_named() -> None:
    """One line, before anything is measured."""
    error = run("--core", "http://127.0.0.1:1", code=1)
    assert error.startswith("http://127.0.0.1:1: ")
    assert len(error.splitlines()) == 1
