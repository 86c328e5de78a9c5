"""The connections of ``serve``, byte by byte: what HTTP libraries and their pools rely on."""

from __future__ import annotations

import contextlib
import json
import select
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
from contextlib import closing
from http.client import HTTPMessage, parse_headers
from typing import TYPE_CHECKING, Any

import pytest
from asgi_server import serve, serve_command
from click.testing import CliRunner
from test_server import FEW_DESCRIPTORS, KEY, METADATA, receive_all, send_all, send_halves

from usermetadata import InMemoryStorage
from usermetadata.cli import main
from usermetadata.server import create_app

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from asgi_server import Command


class Peer:
    """A client's connection, whose requests are bytes."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self.file = self.socket.makefile("rb")

    def send(self, *parts: bytes) -> None:
        """Send each part by itself."""
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in parts:
            self.socket.sendall(part)
            select.select([], [], [], 0.01 * (len(parts) > 1))  # so that it arrives alone

    def receive(self, method: str = "") -> tuple[int, HTTPMessage, bytes]:
        """Receive one response; that to ``HEAD`` has no body."""
        version, status, _ = self.file.readline().split(b" ", 2)
        assert version == b"HTTP/1.1"
        headers = parse_headers(self.file)
        length = 0 if method == "HEAD" or status == b"100" else int(headers["content-length"])
        return int(status), headers, self.file.read(length)

    def is_closed(self) -> bool:
        """Tell whether the server has sent its last byte."""
        try:
            return not self.file.read(1)
        except ConnectionError:
            return True

    def close(self) -> None:
        self.file.close()
        self.socket.close()


@pytest.fixture(scope="module")
def command() -> Generator[Command, None, None]:
    """The command on an in-memory store; its log has no line but the first."""
    with serve_command() as command:
        yield command
        assert len(command.log) == 1


@pytest.fixture(scope="module", autouse=True)
def idle(command: Command) -> Generator[tuple[Peer, float], None, None]:
    """A connection that is idle from the first test on, and the time of its end."""
    with closing(Peer(command.port)) as peer:
        peer.send(*put("idle", n=1))
        _, headers, _ = peer.receive()
        assert (headers["connection"], headers["keep-alive"]) == ("keep-alive", "timeout=120")
        yield peer, time.monotonic() + 6


@pytest.fixture
def peer(command: Command) -> Generator[Peer, None, None]:
    """A connection to it."""
    with closing(Peer(command.port)) as peer:
        yield peer


def put(user_id: str, *headers: str, version: str = "1.1", **update: Any) -> tuple[bytes, bytes]:
    """Return the head and the body of an update."""
    body = json.dumps({"userId": user_id, "metadataUpdate": update}).encode()
    return head("PUT", METADATA, *headers, f"Content-Length: {len(body)}", version=version), body


def head(method: str, target: str, *headers: str, version: str = "1.1") -> bytes:
    """Return the head of a request."""
    lines = [f"{method} {target} HTTP/{version}", "Host: localhost", *headers, "", ""]
    return "\r\n".join(lines).encode()


def get(user_id: str, *headers: str) -> bytes:
    """Return a request that reads."""
    return head("GET", f"{METADATA}?userId={user_id}", *headers)


def metadata(peer: Peer, user_id: str) -> Any:
    """Return what the server has stored about a user."""
    peer.send(get(user_id))
    status, _, body = peer.receive()
    assert status == 200
    return json.loads(body)["metadata"]


# Requests for another protocol.


UPGRADES = {
    "h2c": ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIA"),
    "websocket": ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
    "unknown": ("Upgrade: x/9, y", "Connection: keep-alive, upgrade"),
}


@pytest.mark.parametrize("split", ["at once", "head first", "byte by byte"])
@pytest.mark.parametrize("name", UPGRADES)
def test_a_wish_for_another_protocol_is_ignored(peer: Peer, name: str, split: str) -> None:
    """The request is answered over HTTP/1.1, with its body, and so is the next one."""
    for n in range(2):
        request = put(name, *UPGRADES[name], n=n)
        whole = b"".join(request)
        cut = [whole[:70], whole[70:71], whole[71:-3], whole[-3:]]
        parts = {"at once": [whole], "head first": request, "byte by byte": cut}[split]
        peer.send(*parts)
        status, headers, body = peer.receive()
        assert (status, json.loads(body)["metadata"]) == (200, {"n": n})
        assert "upgrade" not in headers
        assert headers["connection"] == "keep-alive"
    peer.send(get(name, *UPGRADES[name]))
    assert json.loads(peer.receive()[2])["metadata"] == {"n": 1}
    assert metadata(peer, name) == {"n": 1}


def test_a_wish_for_another_protocol_may_have_chunks_and_successors(peer: Peer) -> None:
    """A chunked body is read, and so are requests that were sent behind it."""
    body = b'{"userId": "chunks", "metadataUpdate": {"n": 1}}'
    upgrade = head("PUT", METADATA, *UPGRADES["h2c"], "Transfer-Encoding: chunked")
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    peer.send((upgrade + chunks + get("chunks", *UPGRADES["websocket"])) * 2)
    for _ in range(4):
        status, _, body = peer.receive()
        assert (status, json.loads(body)["metadata"]) == (200, {"n": 1})


def test_what_the_client_of_the_jdk_sends() -> None:
    """``java.net.http.HttpClient`` of Java 17 asks for HTTP/2 with each request: all are answered.

    The bytes are those that ``tests/clients/java`` sent.
    """
    settings = "HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA"

    def java(method: str, path: str, body: bytes) -> bytes:
        lines = [
            f"{method} {METADATA}{path} HTTP/1.1",
            "Connection: Upgrade, HTTP2-Settings",
            f"Content-Length: {len(body)}",
            "Host: 127.0.0.1:3567",
            settings,
            "Upgrade: h2c",
            "User-Agent: Java-http-client/17.0.21.1",
            f"api-key: {KEY}",
            "content-type: application/json",
        ]
        return "\r\n".join([*lines, "", ""]).encode() + body

    first = java("PUT", "", b'{"userId": "al ice", "metadataUpdate": {"theme": "dark"}}')
    second = java("PUT", "", b'{"userId": "al ice", "metadataUpdate": {"visits": 1}}')
    read = java("GET", "?userId=al+ice", b"")
    removal = java("POST", "/remove", b'{"userId": "al ice"}')
    with serve_command("--api-key", KEY) as command, closing(Peer(command.port)) as peer:
        start, found, body = first.partition(b"\r\n\r\n")
        peer.send(start + found, body)  # on a new connection it sends the body by itself
        answers = [peer.receive()]
        for request in (second, read, removal, read):
            peer.send(request)
            answers.append(peer.receive())
    both = {"theme": "dark", "visits": 1}
    assert [status for status, _, _ in answers] == [200] * 5
    stored = [json.loads(body).get("metadata") for _, _, body in answers]
    assert stored == [{"theme": "dark"}, both, both, None, {}]
    assert len(command.log) == 1


# Pools of connections.


def test_an_idle_connection_is_closed_in_the_end() -> None:
    """``--keep-alive-timeout`` says when; a request that has begun has ``--request-timeout``."""
    with serve_command("--keep-alive-timeout", "0.5", "--request-timeout", "4") as command:
        with closing(Peer(command.port)) as idle, closing(Peer(command.port)) as half:
            for peer in (idle, half):
                peer.send(head("GET", "/hello"))
                assert peer.receive()[1]["keep-alive"] == "timeout=0"
            half.send(get("alice")[:30])
            assert idle.is_closed()
            assert select.select([half.socket], [], [], 1)[0] == []
            half.send(get("alice")[30:])
            assert half.receive()[0] == 200
            assert half.is_closed()
        assert len(command.log) == 1


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_both_versions_keep_connections(peer: Peer, version: str) -> None:
    """HTTP/1.0 with ``Connection: keep-alive``, HTTP/1.1 without ``Connection: close``."""
    asked = ["Connection: keep-alive"] if version == "1.0" else []
    ended = [] if version == "1.0" else ["Connection: close"]
    for n in range(3):
        peer.send(*put(version, *asked, version=version, n=n))
        status, headers, body = peer.receive()
        assert (status, json.loads(body)["metadata"]) == (200, {"n": n})
        assert headers["connection"] == "keep-alive"
    peer.send(*put(version, *ended, version=version, n=4))
    status, headers, _ = peer.receive()
    assert (status, headers["connection"]) == (200, "close")
    assert peer.is_closed()


def test_requests_may_come_before_the_answers(peer: Peer) -> None:
    """A pipeline is answered in its order, each request after the one before it."""
    updates: list[dict[str, Any]] = [{f"{n}": n} for n in range(100)]
    requests = [b"".join(put("pipeline", **update)) + get("pipeline") for update in updates]
    peer.send(b"".join(requests))
    expected: dict[str, int] = {}
    for n in range(100):
        expected[f"{n}"] = n
        for _ in range(2):
            status, _, body = peer.receive()
            assert (status, json.loads(body)["metadata"]) == (200, expected)


def test_a_bad_request_in_a_pipeline_ends_it(peer: Peer) -> None:
    """Those before it are answered, then it is, and nothing after it is done."""
    peer.send(*put("ended", n=1))
    peer.receive()
    peer.send(get("ended") + b"GARBAGE\r\n\r\n" + b"".join(put("ended", n=2)))
    assert peer.receive()[0] == 200
    status, headers, body = peer.receive()
    assert (status, headers["connection"]) == (400, "close")
    assert body == b"The request is not valid HTTP/1.1"
    assert peer.is_closed()
    with closing(Peer(peer.socket.getpeername()[1])) as other:
        assert metadata(other, "ended") == {"n": 1}


def test_a_client_that_reads_nothing_is_dropped() -> None:
    """Its answers do not pile up in the server's memory, and others are answered meanwhile."""
    with serve_command("--keep-alive-timeout", "1") as command:
        with closing(Peer(command.port)) as other:
            other.send(*put("large", text="x" * 500_000))
            assert other.receive()[0] == 200
        before = command.memory()
        with closing(Peer(command.port)) as peer:
            send_all(peer.socket, get("large"), 10_000)
            with closing(Peer(command.port)) as other:
                assert metadata(other, "large")
            dropped = select.poll()
            dropped.register(peer.socket, 0)
            assert dropped.poll(30_000)
        assert command.memory() < before + 2**23
        assert len(command.log) == 1


# Bodies.


def test_a_client_may_wait_for_100_continue(peer: Peer) -> None:
    """The server asks for the body once it wants it; a client need not wait."""
    start, body = put("continue", "Expect: 100-continue", n=1)
    peer.send(start)
    assert peer.receive()[0] == 100
    peer.send(body)
    assert json.loads(peer.receive()[2])["metadata"] == {"n": 1}
    peer.send(start + body)
    assert json.loads(peer.receive()[2])["metadata"] == {"n": 1}
    peer.send(b"".join(put("continue", "Expect: 100-continue", version="1.0", n=2)))
    assert peer.receive()[0] == 200


def test_an_unknown_expectation_is_refused(peer: Peer) -> None:
    """417, instead of an answer as if it was met."""
    start, body = put("expectation", "Expect: 100-continue, more", n=1)
    peer.send(start)
    status, headers, _ = peer.receive()
    assert (status, headers["connection"]) == (417, "close")
    send_all(peer.socket, body)
    assert peer.is_closed()
    with closing(Peer(peer.socket.getpeername()[1])) as other:
        assert metadata(other, "expectation") == {}


def test_a_refused_body_is_not_asked_for() -> None:
    """The answer comes instead of 100, and what follows is not taken for a request."""
    with serve_command("--api-key", KEY) as command, closing(Peer(command.port)) as peer:
        start, body = put("a", "Expect: 100-continue", n=1)
        peer.send(start)
        status, headers, _ = peer.receive()
        assert (status, headers["connection"]) == (401, "close")
        send_all(peer.socket, body + get("a"))
        assert peer.is_closed()


def test_a_body_may_be_chunked(peer: Peer) -> None:
    """In chunks of any size, with extensions and trailers."""
    body = b'{"userId": "chunked", "metadataUpdate": {"n": 1}}'
    chunks = b"".join(b"1;name=value\r\n%c\r\n" % byte for byte in body)
    start = head("PUT", METADATA, "Transfer-Encoding: chunked", "Trailer: cdi-version")
    for _ in range(2):
        peer.send(start, chunks[:100], chunks[100:], b"0\r\ncdi-version: x\r\n\r\n")
        assert json.loads(peer.receive()[2])["metadata"] == {"n": 1}


@pytest.mark.parametrize(
    "flood", [b"0\r\n" + b"x: " + b"y" * 2**18, b"5;x=" + b"y" * 2**18, b"0" * 2**18 + b"5\r\n"]
)
def test_what_is_around_a_chunk_has_a_limit(peer: Peer, flood: bytes) -> None:
    """Trailers, extensions and lengths are not kept: the request is refused."""
    peer.send(head("PUT", METADATA, "Transfer-Encoding: chunked"))
    send_all(peer.socket, flood)
    assert peer.receive()[0] in {400, 431}
    assert peer.is_closed()


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: +5\r\n\r\nabcde",
        b"Content-Length: 99999999999999999999\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nx\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcdefg\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding:\r\n\r\n",
        b"Content-Length : 5\r\n\r\nabcde",
        b" folded: 1\r\n\r\n",
        b"x: 1\r\n folded\r\n\r\n",
        b"x: 1\n\r\n",
        b"x: \0\r\n\r\n",
    ],
)
def test_an_ambiguous_request_is_refused(peer: Peer, framing: bytes) -> None:
    """A proxy in front could read another request out of it: 400, and the connection ends."""
    line = b"PUT /recipe/user/metadata HTTP/1.1\r\nHost: localhost\r\n"
    peer.send(line + framing + b"GET /hello HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert peer.receive()[0] == 400
    assert peer.is_closed()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("end", ["half", "reset"])
def test_a_body_that_ends_early_writes_nothing(peer: Peer, end: str, *, chunked: bool) -> None:
    """Also if what has arrived of it is JSON. A client that still reads gets 400."""
    start, body = put("early", n=1)
    start = start.replace(b"Content-Length: ", b"Content-Length: 1")
    if chunked:
        start = head("PUT", METADATA, "Transfer-Encoding: chunked")
        body = b"%x\r\n%b\r\n" % (len(body), body)
    with closing(Peer(peer.socket.getpeername()[1])) as early:
        early.send(start + body)
        if end == "reset":
            early.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            early.socket.shutdown(socket.SHUT_WR)
            assert early.receive()[::2] == (400, b"Invalid Json Input")
            assert early.is_closed()
    assert metadata(peer, "early") == {}


def test_a_client_may_end_its_half_of_the_connection(peer: Peer) -> None:
    """What it has sent is answered before the server ends the other half."""
    peer.send(b"".join(put("half", n=1)) + get("half"))
    peer.socket.shutdown(socket.SHUT_WR)
    for _ in range(2):
        assert json.loads(peer.receive()[2])["metadata"] == {"n": 1}
    assert peer.is_closed()


def test_the_rest_of_a_refused_body_is_not_a_request() -> None:
    """After 413 the connection goes on behind the body, and may be idle as long as any other."""
    options = ("--max-body-size", "10", "--request-timeout", "2")
    with serve_command(*options) as command, closing(Peer(command.port)) as peer:
        start, body = put("a", text="x" * 200_000)
        for _ in range(2):
            peer.send(start, body[:1000])
            assert peer.receive()[0] == 413
            peer.send(body[1000:], head("GET", "/hello"))
            assert peer.receive()[::2] == (200, b"Hello")
        peer.send(start, body[:1000])
        assert peer.receive()[0] == 413
        peer.send(body[1000:])
        assert select.select([peer.socket], [], [], 2.8)[0] == []
        peer.send(head("GET", "/hello"))
        assert peer.receive()[::2] == (200, b"Hello")


def test_a_client_that_leaves_is_not_logged(command: Command) -> None:
    """Also if it closes the connection before the answer to what is refused."""
    command.process.send_signal(signal.SIGSTOP)
    for request in [b"GARBAGE\r\n\r\n", put("leaving", "Expect: 100-continue")[0]] * 5:
        with closing(Peer(command.port)) as leaving:
            leaving.send(request)
    command.process.send_signal(signal.SIGCONT)
    with closing(Peer(command.port)) as peer:
        assert metadata(peer, "leaving") == {}  # the log is read at the end


# Requests.


def test_blanks_around_a_value_are_no_part_of_it(peer: Peer) -> None:
    """Spaces and tabs may stand before and after the value of a header."""
    start, body = put("blanks", "cdi-version: \t5.4 \t", "Expect: 100-continue ", n=1)
    peer.send(start.replace(b"localhost", b" localhost\t"))
    assert peer.receive()[0] == 100
    peer.send(body)
    assert json.loads(peer.receive()[2])["metadata"] == {"n": 1}


def test_targets_have_several_forms(peer: Peer) -> None:
    """A server understands a whole URL; ``HEAD`` gets no body; ``CONNECT`` is for proxies."""
    peer.send(head("GET", "http://localhost/hello"))
    assert peer.receive()[::2] == (200, b"Hello")
    peer.send(head("GET", f"HTTP://localhost:1{METADATA}?userId=absolute"))
    assert peer.receive()[0] == 200
    peer.send(head("OPTIONS", "*"))
    assert peer.receive()[0] == 404
    peer.send(head("GET", "http://localhost"))
    assert peer.receive()[0] == 404
    peer.send(head("HEAD", "/hello"))
    status, headers, _ = peer.receive("HEAD")
    assert (status, headers["content-length"]) == (405, "20")
    peer.send(b"\r\n" + head("GET", "/hello"))  # an empty line before it is allowed
    status, headers, _ = peer.receive()
    assert (status, headers["date"][-4:]) == (200, " GMT")
    peer.send(head("CONNECT", "localhost:1"))
    assert peer.receive()[0] == 400
    assert peer.is_closed()


@pytest.mark.parametrize(
    "line",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /hello\r\n\r\n",
        b"GET /hello HTTP/9.9\r\n\r\n",
        b"GET /hello HTTP/1.1\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"PUT / HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"get /hello HTTP/1.1\r\n\r\n",
        b"GET /hello#a HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /recipe/user/metadata?userId=a#b HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /recipe/user/metadata?userId=\xc3\xa9 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /recipe/user/metadata?userId=a b HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused(peer: Peer, line: bytes) -> None:
    """400, and nothing in the log."""
    send_all(peer.socket, line)
    assert peer.receive()[0] == 400
    assert peer.is_closed()


NOT_UTF8 = ["%", "%f", "%zz", "%%", "%u0041", "%ff", "%ed%a0%80", "%c0%80", "%f4%90%80%80", "%c3"]


@pytest.fixture(scope="module", params=["serve", "uvicorn"])
def port(request: pytest.FixtureRequest, command: Command) -> Generator[int, None, None]:
    """Where the application is served, by ``serve`` and by another ASGI server."""
    if request.param == "serve":
        yield command.port
        return
    with serve(create_app(InMemoryStorage())) as port:
        yield port


@pytest.mark.parametrize("text", [*NOT_UTF8, "\xe9"])
def test_a_query_is_decoded_exactly(port: int, text: str) -> None:
    """A query that is not percent-encoded UTF-8 names no user: 400, instead of another user's id.

    A part of it that is refused for another field may hide a user id as well.
    """
    for query in (f"userId={text}", f"userId=a{text}b", f"userId=a&x={text}", f"{text}&userId=a"):
        with closing(Peer(port)) as peer:
            request = f"GET {METADATA}?{query} HTTP/1.1\r\nHost: localhost\r\n\r\n"
            send_all(peer.socket, request.encode("latin-1"))
            assert peer.receive()[0] == 400
    with closing(Peer(port)) as peer:
        for query, user_id in (("%C3%a9+%2b", "é +"), ("%F0%9F%98%80", "😀"), ("%EF%BF%BD", "�")):
            peer.send(*put(user_id, name=user_id))
            assert peer.receive()[0] == 200
            peer.send(get(query))
            assert json.loads(peer.receive()[2])["metadata"] == {"name": user_id}


@pytest.mark.parametrize("text", [*NOT_UTF8, "%e2%84%aa", "%00", "%0a"])
def test_a_path_is_decoded_exactly(port: int, text: str) -> None:
    """A path that is not ASCII or not decodable names no app and no tenant: 404."""
    for path in (
        f"/appid-{text}{METADATA}",
        f"/appid-a{text}{METADATA}",
        f"/{text}{METADATA}",
        f"{METADATA}{text}",
        f"/hello{text}",
    ):
        with closing(Peer(port)) as peer:
            peer.send(head("GET", f"{path}?userId=a"))
            assert peer.receive()[0] == 404


@pytest.mark.parametrize(
    "body",
    [
        b'{"userId": "\xff", "metadataUpdate": {}}',
        b'{"userId": "\xed\xa0\x80", "metadataUpdate": {}}',
        b'{"userId": "\xc0\x80", "metadataUpdate": {}}',
        rb'{"userId": "\ud800", "metadataUpdate": {}}',
        rb'{"userId": "a", "metadataUpdate": {"\udfff": 1}}',
        '{"userId": "a", "metadataUpdate": {}}'.encode("utf-16"),
        b'\xef\xbb\xbf{"userId": "a", "metadataUpdate": {}}',
    ],
)
def test_a_body_is_decoded_exactly(port: int, body: bytes) -> None:
    """A body is UTF-8, and its escapes are characters: else 400."""
    with closing(Peer(port)) as peer:
        peer.send(head("PUT", METADATA, f"Content-Length: {len(body)}") + body)
        assert peer.receive()[0] == 400


@pytest.mark.parametrize("key", ["schlüssel-à", "a key", "鍵鍵鍵鍵"])
def test_a_key_is_compared_byte_by_byte(key: str) -> None:
    """In either header; bytes that Latin-1 or Python takes for spaces belong to the key."""
    shown = key.encode()
    with serve(create_app(InMemoryStorage(), api_keys=[key])) as port, closing(Peer(port)) as peer:
        for header in (b"api-key: ", b"Authorization: Bearer "):
            for value, status in (
                (shown, 200),
                (shown + b"\xa0", 401),
                (shown + b"\xc2\xa0", 401),
                (key.encode("utf-16-le").replace(b"\0", b""), 200 if key.isascii() else 401),
            ):
                start = f"GET {METADATA}?userId=a HTTP/1.1\r\nHost: localhost\r\n".encode()
                peer.send(start + header + value + b"\r\n\r\n")
                assert peer.receive()[0] == status


@pytest.mark.parametrize("host", [b"evil@localhost", b"local\thost", b"localhost:1@x", b"\xff"])
def test_a_host_is_read_exactly(port: int, host: bytes) -> None:
    """Nothing is left out of ``Host`` to make it a local name."""
    with closing(Peer(port)) as peer:
        peer.send(b"GET /hello HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
        assert peer.receive()[0] in {400, 403}


# Too many connections, and the end.


def test_too_many_connections_are_one_line(database: Path) -> None:
    """Half-sent requests keep neither a client out nor the storage from opening its file.

    The line says how far the limit of open files is worth raising.
    """
    options = ("--storage", f"sqlite:///{database}")
    with (
        serve_command(*options, before=FEW_DESCRIPTORS) as command,
        contextlib.ExitStack() as stack,
    ):
        send_halves(command.port, stack)
        with closing(Peer(command.port)) as peer:
            for n in range(3):
                peer.send(*put("alice", n=n))
                assert peer.receive()[0] == 200
            assert metadata(peer, "alice") == {"n": 2}
        assert len(command.log) == 2
        assert "connections: more than 50; those that wait longest" in command.log[1]
        assert "(ulimit -n), to 10256 at most" in command.log[1]


def test_a_late_request_is_told_so() -> None:
    """408, for a head and for a body; bytes that keep coming do not help."""
    start, body = put("late", n=1)
    with serve_command("--request-timeout", "0.5") as command:
        for sent in (start[:30], start + body[:-1]):
            with closing(Peer(command.port)) as peer:
                peer.send(sent)
                status, headers, _ = peer.receive()
                assert (status, headers["connection"]) == (408, "close")
                assert peer.is_closed()
        with closing(Peer(command.port)) as peer:
            assert peer.is_closed()  # nothing was asked, so nothing is answered
        with closing(Peer(command.port)) as peer:
            assert metadata(peer, "late") == {}
        assert len(command.log) == 1


def test_the_end_waits_for_requests_and_for_nothing_else(database: Path) -> None:
    """At SIGTERM the requests under way are answered; idle connections and half a head are not.

    The file is closed afterwards.
    """
    options = ("--storage", f"sqlite:///{database}")
    with serve_command(*options) as command, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(closing(Peer(command.port))) for _ in range(5)]
        writing, sending, idle, half, new = peers
        for peer in (writing, sending, idle, half):
            peer.send(*put("alice", n=0))
            assert peer.receive()[0] == 200
        writer = stack.enter_context(closing(sqlite3.connect(database)))
        writer.execute("BEGIN IMMEDIATE")
        writing.send(*put("alice", a=1))
        start, body = put("alice", "Expect: 100-continue", b=2)
        sending.send(start)
        assert sending.receive()[0] == 100
        half.send(start[:30])
        idle.send(get("bob"))
        assert idle.receive()[0] == 200  # what was sent before it has arrived
        command.process.send_signal(signal.SIGTERM)
        for peer in (idle, half, new):
            assert peer.is_closed()
        with pytest.raises(ConnectionError):
            Peer(command.port)
        writer.rollback()
        writer.close()
        sending.send(body)
        for peer in (writing, sending):
            status, headers, _ = peer.receive()
            assert (status, headers["connection"]) == (200, "close")
            assert peer.is_closed()
        assert command.process.wait(timeout=30) == 0
        assert [path.name for path in database.parent.iterdir()] == [database.name]
        with closing(sqlite3.connect(database)) as connection:
            stored = connection.execute("SELECT user_metadata FROM user_metadata").fetchone()
        assert json.loads(stored[0]) == {"n": 0, "a": 1, "b": 2}
    assert len(command.log) == 1


def test_ctrl_c_ends_it_like_sigterm() -> None:
    """The exit code is 0, and there is no traceback."""
    with serve_command() as command, closing(Peer(command.port)) as peer:
        peer.send(get("alice"))
        assert peer.receive()[0] == 200
        command.process.send_signal(signal.SIGINT)
        assert command.process.wait(timeout=30) == 0
    assert len(command.log) == 1


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_it_at_once(database: Path, first: signal.Signals) -> None:
    """It does not wait for the storage, and writes nothing more."""
    with (
        serve_command("--storage", f"sqlite:///{database}") as command,
        closing(Peer(command.port)) as peer,
        closing(Peer(command.port)) as idle,
    ):
        peer.send(*put("alice", n=1))
        assert peer.receive()[0] == 200
        with closing(sqlite3.connect(database)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            peer.send(*put("alice", n=2))
            idle.send(get("bob"))
            assert idle.receive()[0] == 200  # what was sent before it has arrived
            command.process.send_signal(first)
            assert idle.is_closed()
            command.process.send_signal(signal.SIGTERM)
            assert command.process.wait(timeout=10) == -signal.SIGTERM
        assert peer.is_closed()
        with closing(sqlite3.connect(database)) as connection:
            stored = connection.execute("SELECT user_metadata FROM user_metadata").fetchone()
        assert json.loads(stored[0]) == {"n": 1}
    assert len(command.log) == 1


@pytest.mark.parametrize("option", ["--keep-alive-timeout", "--request-timeout"])
@pytest.mark.parametrize("seconds", ["inf", "nan"])
def test_a_time_is_a_number_of_seconds(option: str, seconds: str) -> None:
    """What is not finite is refused at the start."""
    with socket.create_server(("127.0.0.1", 0)) as taken:  # so that no server starts
        port = str(taken.getsockname()[1])
        arguments = ["serve", "--storage", "memory://", "--port", port, option, seconds]
        done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert f"'{option}': {seconds} is not a number of seconds." in done.output


@pytest.mark.parametrize("keys", ["", " ", "a key,"])
def test_an_empty_variable_does_not_open_the_server(keys: str) -> None:
    """``USERMETADATA_API_KEYS="$(cat missing.key)"`` is refused: a key was to be required."""
    with socket.create_server(("127.0.0.1", 0)) as taken:  # so that no server starts
        port = str(taken.getsockname()[1])
        arguments = ["serve", "--storage", "memory://", "--port", port]
        done = CliRunner().invoke(main, arguments, env={"USERMETADATA_API_KEYS": keys})
    assert done.exit_code == 2
    assert "empty" in done.output


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_it_says_in_one_line_why_it_cannot_listen(host: str) -> None:
    """The reason is the system's, and the line says what to change."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "usermetadata", "serve", "--host", host, "--port", port]
        options = ["--storage", "memory://"]
        done = subprocess.run(
            [*command, *options], stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert f"cannot listen at --host '{host}' --port {port}: " in line
    assert "ddress already in use" in line


def test_bytes_after_the_end_of_a_connection_are_harmless(command: Command) -> None:
    """A client may send more behind ``Connection: close``; it is not answered."""
    with closing(Peer(command.port)) as peer:
        request = head("GET", "/hello", "Connection: close")
        send_all(peer.socket, request + head("GET", "/hello"))
        received = receive_all(peer.socket)
    assert received.count(b"HTTP/1.1") == 1
    assert received.endswith(b"\r\n\r\nHello")


def test_an_idle_connection_is_kept(idle: tuple[Peer, float]) -> None:
    """For 120 seconds, which each answer says; after six seconds of silence it still answers."""
    peer, end = idle
    assert select.select([peer.socket], [], [], max(0, end - time.monotonic()))[0] == []
    peer.send(*put("idle", m=2))
    assert json.loads(peer.receive()[2])["metadata"] == {"n": 1, "m": 2}
