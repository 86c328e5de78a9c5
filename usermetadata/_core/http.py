"""An HTTP/1 server for one ASGI application, on httptools and asyncio.

It has what ``serve`` needs and other servers have only in part: limits of headers, time and
connections, and an answer to each request that asks for another protocol. A response is written
when the application has sent all of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections import deque
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

try:
    from httptools import (
        HttpParserCallbackError,
        HttpParserError,
        HttpParserUpgrade,
        HttpRequestParser,
    )
except ImportError as error:
    raise ImportError(
        "usermetadata.server: httptools is not installed;"
        " pip install 'httptools>=0.6.4' 'starlette>=0.40' 'msgspec>=0.19'"
    ) from error

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine, MutableMapping

    from starlette.applications import Starlette

MAX_HEAD = 2**16
"""How many bytes the request line and the headers may have."""

_SLICE = 2**12  # bytes that the parser gets at once; a head may exceed its limit by this much
_MOST_BUFFERED = 2**16  # bytes of a body that the application has not asked for
_MOST_CONNECTIONS = 10_000
_MOST_RESERVED = 256  # descriptors for the storage, and for what is accepted but not yet counted
_QUEUE = 1024  # connections that the kernel holds until they are accepted
_GRACE = 30  # seconds for the requests under way, when the server stops
_LOG_INTERVAL = 60  # seconds between two lines about too many connections
_TARGET = re.compile(rb"(?:[A-Za-z][A-Za-z0-9+.-]*://[^/?]*)?([^?]*)(?:\?(.*))?", re.DOTALL)
_NOT_A_TARGET = re.compile(rb"[^!-~]|#")
_STATUSES = {each.value: f"HTTP/1.1 {each.value} {each.phrase}\r\n".encode() for each in HTTPStatus}
_log = logging.getLogger(__name__)


def connection_limits() -> tuple[int, int]:
    """Return how many connections may be open, and how many may be accepted at once.

    The process keeps some file descriptors for the storage. asyncio accepts up to four times before
    the first connection is counted.
    """
    try:
        import resource
    except ImportError:  # Windows
        return _MOST_CONNECTIONS, _MOST_RESERVED // 8
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS, _MOST_RESERVED // 8
    reserved = min(_MOST_RESERVED, descriptors // 2)
    return min(_MOST_CONNECTIONS, descriptors - reserved), max(1, reserved // 8)


class Server:
    """Serves an application until it is asked to stop.

    Args:
        app: the application.
        keep_alive_timeout: seconds that a connection waits for its next request.
        request_timeout: seconds from the first byte of a request to its last. For the first request
            they count from the start of the connection.
    """

    def __init__(
        self, app: Starlette, *, keep_alive_timeout: float = 120, request_timeout: float = 30
    ) -> None:
        self.app = app
        self.keep_alive_timeout = keep_alive_timeout
        self.request_timeout = request_timeout
        self.max_connections, self._accepted_at_once = connection_limits()
        self.connections: set[_Connection] = set()
        self.waiting: dict[_Connection, None] = {}  # for their clients; the longest comes first
        self.tasks: set[asyncio.Task[None]] = set()
        self.is_stopping = False
        self.loop: asyncio.AbstractEventLoop
        self._stopped: asyncio.Event
        self._completed: asyncio.Event
        self._date = (0, b"")
        self._logged = -float(_LOG_INTERVAL)

    def run(
        self,
        started: Callable[[list[Any]], None],
        *,
        host: str | None = None,
        port: int | None = None,
        sock: socket.socket | None = None,
    ) -> None:
        """Serve until ``stop`` is called; then complete the requests under way.

        Args:
            started: is called with the addresses when clients can connect.
            host: the name or address to listen on.
            port: the port to listen on.
            sock: a socket that is bound, in place of both.

        Raises:
            OSError: it cannot listen there.
        """
        asyncio.run(self._serve(started, {"host": host, "port": port, "sock": sock}))

    def stop(self) -> None:
        """Stop. Any thread and any signal handler may call it after ``started`` was called."""
        self.loop.call_soon_threadsafe(self._stopped.set)

    def begin(self, answer: Coroutine[Any, Any, None]) -> None:
        """Begin to answer a request."""
        task = self.loop.create_task(answer)
        self.tasks.add(task)
        task.add_done_callback(self._end)

    def check_end(self) -> None:
        """Note whether a server that stops has completed everything."""
        if self.is_stopping and not (self.connections or self.tasks):
            self._completed.set()

    def make_room(self) -> None:
        """Close the connection that has waited longest for its client."""
        longest = next(iter(self.waiting))
        longest.abort()
        now = self.loop.time()
        if now - self._logged >= _LOG_INTERVAL:
            self._logged = now
            _log.warning(
                "connections: more than %d; those that wait longest for a request are closed;"
                " raise the limit of open files (ulimit -n), to %d at most, or run a second server",
                self.max_connections,
                _MOST_CONNECTIONS + _MOST_RESERVED,
            )

    def date(self) -> bytes:
        """Return the time for the header ``Date``."""
        now = int(self.loop.time())
        if self._date[0] != now:
            self._date = now, formatdate(usegmt=True).encode()
        return self._date[1]

    def _end(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self.check_end()

    async def _serve(self, started: Callable[[list[Any]], None], address: dict[str, Any]) -> None:
        self.loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._completed = asyncio.Event()
        async with self.app.router.lifespan_context(self.app):
            listener = await self.loop.create_server(
                lambda: _Connection(self), backlog=self._accepted_at_once, **address
            )
            for each in listener.sockets:
                with each.dup() as listening:
                    listening.listen(_QUEUE)
            ending = asyncio.create_task(self._end_late_ones())
            started([each.getsockname() for each in listener.sockets])
            await self._stopped.wait()
            listener.close()
            await self._complete()
            ending.cancel()

    async def _end_late_ones(self) -> None:
        pause = min(1.0, self.keep_alive_timeout / 4, self.request_timeout / 4)
        while True:
            await asyncio.sleep(pause)
            now = self.loop.time()
            for connection in [each for each in self.waiting if each.deadline < now]:
                connection.expire()

    async def _complete(self) -> None:
        self.is_stopping = True
        for connection in list(self.connections):
            connection.stop()
        self.check_end()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE):
                await self._completed.wait()
        for connection in list(self.connections):
            connection.abort()


class _Request:
    """A request, and the application's answer to it."""

    def __init__(self, connection: _Connection, scope: dict[str, Any]) -> None:
        self.scope = scope
        self.keep_alive = False
        self.expects_continue = False
        self.is_complete = False  # the whole request has arrived
        self.is_answered = False
        self.refusal: tuple[int, str] | None = None  # in place of the application's answer
        self.body = bytearray()  # that has arrived, and that the application does not have
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.content: list[bytes] = []
        self._connection = connection
        self._is_lost = False  # the rest of it will not arrive
        self._has_arrived = asyncio.Event()

    def add(self, body: bytes) -> None:
        """Add a part of the body."""
        if not self.is_answered:
            self.body += body
            self._has_arrived.set()

    def end(self) -> None:
        """Note that the body is complete."""
        self.is_complete = True
        self._has_arrived.set()

    def lose(self) -> None:
        """Note that the rest of the body will not arrive."""
        self._is_lost = not self.is_complete
        self._has_arrived.set()

    async def receive(self) -> dict[str, Any]:
        """Give the application a part of the body."""
        if self.expects_continue and not (self.body or self.is_complete):
            self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.expects_continue = False
        while not (self.body or self.is_complete or self._is_lost):
            self._connection.read_on()
            self._has_arrived.clear()
            await self._has_arrived.wait()
        if self._is_lost:
            return {"type": "http.disconnect"}
        body = bytes(self.body)
        self.body.clear()
        return {"type": "http.request", "body": body, "more_body": not self.is_complete}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Take a part of the application's answer."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = list(message["headers"])
        else:
            self.content.append(message.get("body", b""))

    def refuse(self, status: int, text: str) -> None:
        """Answer with an error, and do not keep the connection."""
        self.keep_alive = False
        self.refusal = status, text
        self.lose()

    def response(self, date: bytes, keep_alive_timeout: float | None) -> bytes:
        """Return the bytes of the answer; without a timeout the connection is closed after it."""
        if self.refusal:
            self.status, text = self.refusal
            self.headers = [(b"content-type", b"text/plain;charset=UTF-8")]
            self.content = [text.encode()]
        lines = [_STATUSES[self.status], b"date: ", date, b"\r\n"]
        for name, value in self.headers:
            if name != b"content-length":
                lines += name, b": ", value, b"\r\n"
        lines.append(b"content-length: %d\r\n" % sum(map(len, self.content)))
        if keep_alive_timeout is None:
            lines.append(b"connection: close\r\n\r\n")
        else:
            seconds = int(keep_alive_timeout)
            lines.append(b"connection: keep-alive\r\nkeep-alive: timeout=%d\r\n\r\n" % seconds)
        if self.scope.get("method") != "HEAD":
            lines += self.content
        return b"".join(lines)


class _Connection(asyncio.Protocol):
    """A client's connection. The methods ``on_...`` are httptools' callbacks."""

    _transport: asyncio.Transport

    def __init__(self, server: Server) -> None:
        self.deadline = server.loop.time() + server.request_timeout
        self._server = server
        self._parser = HttpRequestParser(self)
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._requests: deque[_Request] = deque()  # not answered; the first one is under way
        self._arriving: _Request | None = None  # its body is not complete
        self._has_begun = False  # a request has arrived in part
        self._unread = 0  # bytes since the last head or part of a body
        self._is_running = False  # the application answers a request
        self._is_blocked = False  # the client does not read
        self._is_deaf = False  # what arrives is thrown away
        self._has_ended = False  # nothing arrives any more

    # Called by asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment] # a server has no other
        self._server.connections.add(self)
        self._server.waiting[self] = None
        if self._server.is_stopping:
            self._transport.close()
        elif len(self._server.connections) > self._server.max_connections:
            self._server.make_room()

    def data_received(self, data: bytes) -> None:
        view, start, head = memoryview(data), 0, b""
        while (part := head or view[start : start + _SLICE]) and not self._is_deaf:
            start += 0 if head else len(part)
            head = b""
            self._unread += len(part)
            try:
                self._parser.feed_data(part)
            except HttpParserUpgrade as upgrade:
                # httptools treats the following data as another protocol, so the head is parsed
                # again.
                start += upgrade.args[0] - len(part)
                head = self._head_without_upgrade()
            except HttpParserCallbackError:
                raise  # an error of this module; asyncio logs it
            except HttpParserError:
                self._refuse(400, "The request is not valid HTTP/1.1")
            if self._unread > MAX_HEAD and not self._is_deaf:
                text = f"The request line and the headers have more than {MAX_HEAD} bytes"
                self._refuse(431, text)
        buffered = len(self._arriving.body) if self._arriving else 0
        if not self._is_deaf and (len(self._requests) > 1 or buffered > _MOST_BUFFERED):
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        self._is_deaf = self._has_ended = True
        if self._arriving:
            self._arriving.lose()
        return bool(self._requests)  # they are answered

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_deaf = self._has_ended = True
        if self._arriving:
            self._arriving.lose()
        self._server.waiting.pop(self, None)
        self._server.connections.discard(self)
        self._server.check_end()

    def pause_writing(self) -> None:
        self._is_blocked = True
        self.deadline = self._server.loop.time() + self._server.keep_alive_timeout

    def resume_writing(self) -> None:
        self._is_blocked = False
        self._go_on()

    # Called by httptools.

    def on_message_begin(self) -> None:
        self._has_begun = True
        self._target = b""
        self._headers = []
        if not self._is_blocked:
            self.deadline = self._server.loop.time() + self._server.request_timeout
        if self in self._server.waiting:
            del self._server.waiting[self]
            self._server.waiting[self] = None

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._arriving:  # else it comes after the body
            self._headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        if self._is_deaf or self._parser.should_upgrade():
            return
        self._unread = 0
        version = self._parser.get_http_version()
        hosts, codings = self._values(b"host"), self._values(b"transfer-encoding")
        is_valid = {
            "1.0": len(hosts) <= 1 and not codings,
            "1.1": len(hosts) == 1 and codings in ([], [b"chunked"]),
        }
        if not is_valid.get(version):
            self._refuse(400, "The request is not valid HTTP/1.1")
            return
        split = _TARGET.fullmatch(self._target)
        if _NOT_A_TARGET.search(self._target) or split is None:
            self._refuse(400, "The request's target is not a URL; percent-encode it")
            return
        expected = self._values(b"expect") if version == "1.1" else []
        if not {b"100-continue"}.issuperset(expected):
            self._refuse(417, "The server meets no expectation but 100-continue")
            return
        request = _Request(self, self._scope(split[1] or b"/", split[2] or b""))
        request.keep_alive = self._parser.should_keep_alive()
        request.expects_continue = bool(expected)
        self._arriving = request
        self._requests.append(request)
        self._go_on()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        if self._arriving:
            self._arriving.add(body)

    def on_message_complete(self) -> None:
        if self._is_deaf or self._parser.should_upgrade():
            return
        self._unread = 0
        self._has_begun = False
        if self._arriving:
            self._arriving.end()
            self._arriving = None
        self._server.waiting.pop(self, None)  # it waits for something else now
        self._wait()

    # Called by the server and the requests.

    def write(self, data: bytes) -> None:
        """Send data to the client, if it is still connected."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def read_on(self) -> None:
        """Resume reading, unless requests are waiting."""
        if len(self._requests) <= 1:
            self._transport.resume_reading()

    def stop(self) -> None:
        """Close the connection, now or after the requests under way."""
        if not self._requests:
            self._transport.close()

    def expire(self) -> None:
        """Close the connection, because the client has taken too long."""
        is_answered = self._arriving and self._arriving.is_answered
        if self._is_deaf or is_answered or self._transport.get_write_buffer_size():
            self.abort()
        elif self._has_begun:
            self._refuse(408, "The request did not arrive in time")
        else:
            self._is_deaf = True
            self._transport.close()

    def abort(self) -> None:
        """Close the connection at once."""
        self._server.waiting.pop(self, None)
        self._transport.abort()

    # The rest.

    def _values(self, name: bytes) -> list[bytes]:
        return [value.lower() for each, value in self._headers if each == name]

    def _scope(self, path: bytes, query: bytes) -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": self._parser.get_http_version(),
            "method": self._parser.get_method().decode("ascii"),
            "scheme": "http",
            "path": unquote_to_bytes(path).decode("utf-8", "replace"),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": self._headers,
        }

    def _head_without_upgrade(self) -> bytes:
        method = self._parser.get_method()
        if method == b"CONNECT":
            self._refuse(400, "CONNECT is for proxies")
        version = self._parser.get_http_version().encode()
        self._parser = HttpRequestParser(self)
        lines = [b"%b %b HTTP/%b" % (method, self._target, version)]
        lines += [b"%b: %b" % each for each in self._headers if each[0] != b"upgrade"]
        return b"\r\n".join([*lines, b"", b""])

    def _refuse(self, status: int, text: str) -> None:
        """Answer with an error, after the answers to earlier requests, and close."""
        self._is_deaf = True
        request = self._arriving
        if request is None:
            request = _Request(self, {})
            self._requests.append(request)
        elif request.is_answered:
            self.abort()
        request.refuse(status, text)
        self._go_on()

    def _go_on(self) -> None:
        """Start the next request, if there is one."""
        if self._requests and not self._is_running and not self._is_blocked:
            self._is_running = True
            self._server.begin(self._answer(self._requests[0]))
        self._wait()

    def _wait(self) -> None:
        """Note whether the server waits for the client to send or to read."""
        if self._is_running and self._requests[0].is_complete:
            self._server.waiting.pop(self, None)
        elif self in self._server.connections and self not in self._server.waiting:
            self._server.waiting[self] = None
            timeouts = self._server.keep_alive_timeout, self._server.request_timeout
            is_request_awaited = self._has_begun and not self._is_blocked
            self.deadline = self._server.loop.time() + timeouts[is_request_awaited]

    async def _answer(self, request: _Request) -> None:
        try:
            if not request.refusal:
                await self._server.app(request.scope, request.receive, request.send)
        except Exception:  # noqa: BLE001 - the other requests go on
            _log.exception("the application failed")
            request.refuse(500, "Internal Server Error")
        request.is_answered = True
        # A client that was not asked to continue may send the body or leave it out.
        keep = (
            request.keep_alive
            and not (request.expects_continue and not request.is_complete)
            and not (self._has_ended or self._server.is_stopping)
        )
        timeout = self._server.keep_alive_timeout if keep else None
        self.write(request.response(self._server.date(), timeout))
        self._requests.popleft()
        self._is_running = False
        if keep:
            self.read_on()
        else:
            self._close(request)
        self._go_on()

    def _close(self, request: _Request) -> None:
        self._requests.clear()
        self._is_deaf = True
        if request.is_complete or self._has_ended:
            self._transport.close()
        elif not self._transport.is_closing():
            # Closing now could destroy the answer, so what still arrives is thrown away.
            with contextlib.suppress(OSError):  # the client has closed the connection
                self._transport.write_eof()
            self._transport.resume_reading()
