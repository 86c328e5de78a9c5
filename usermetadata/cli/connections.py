"""Limits for the connections of ``serve``, whichever HTTP parser uvicorn uses.

uvicorn limits neither the size of the headers, with httptools, nor the time that a request takes to
arrive, nor the number of connections before it accepts one too many.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

    # Both protocols of uvicorn have what is used here; this one is always installed.
    from uvicorn.protocols.http.h11_impl import H11Protocol as HTTPProtocol
else:
    from uvicorn.protocols.http.auto import AutoHTTPProtocol as HTTPProtocol

MAX_HEAD = 2**16
"""How many bytes the request line and the headers may have."""

_SLICE = 2**12  # bytes that the parser gets at once; a head may be larger than its limit by so many
_MOST_CONNECTIONS = 1000
_TOO_LARGE = f"The request line and the headers have more than {MAX_HEAD} bytes".encode()
_REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-type: text/html;charset=UTF-8\r\n"
    b"content-length: %d\r\n"
    b"connection: close\r\n\r\n%b"
) % (len(_TOO_LARGE), _TOO_LARGE)


def most_connections() -> int:
    """Return how many connections may be open: a third of the descriptors.

    Half as many may be accepted at once before the first is counted, and the storage needs some.
    """
    try:
        import resource
    except ImportError:  # Windows
        return _MOST_CONNECTIONS
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return min(_MOST_CONNECTIONS, descriptors // 3)


def limited(max_connections: int, timeout: float) -> type[asyncio.Protocol]:
    """Return a protocol for uvicorn's option ``http``.

    Args:
        max_connections: if more are open, the one is closed that waits longest for a request.
        timeout: seconds that a connection waits for a request, from its beginning to its end.
    """
    limits = {"max_connections": max_connections, "request_timeout": timeout}
    return type("LimitedProtocol", (_LimitedProtocol,), limits)


class OncePerSecond(logging.Filter):
    """Drops a warning that was logged within the last second: clients can cause uvicorn's."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether to log the record."""
        if record.levelno != logging.WARNING:
            return True
        is_new = record.created - self._last.get(record.msg, 0.0) >= 1
        if is_new:
            self._last[record.msg] = record.created
        return is_new


class _LimitedProtocol(HTTPProtocol):
    max_connections: int
    request_timeout: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head = 0  # bytes that have arrived of the next head
        self._is_refused = False
        self._since: float  # it waits for the next request
        self._deadline: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > self.max_connections:
            waiting = [
                each
                for each in self.connections
                if isinstance(each, _LimitedProtocol) and each._is_waiting()
            ]
            min(waiting, key=lambda each: each._since).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), _SLICE):
            if self._is_refused or self.transport.is_closing():
                return
            part = data[start : start + _SLICE]
            before = self.cycle
            super().data_received(part)
            is_body = before and before.more_body and not before.response_complete
            if is_body or self.cycle is not before:
                self._head = 0
            else:
                self._head += len(part)
                if self._head > MAX_HEAD:
                    self._refuse()

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(msg)
        if self.cycle:  # the application must not answer as well: h11 raises an error then
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._deadline.cancel()
        self._wait()

    def _wait(self) -> None:
        self._since = self.loop.time()
        self._deadline = self.loop.call_later(self.request_timeout, self._end)

    def _is_waiting(self) -> bool:
        """Tell whether the client has to send something."""
        cycle = self.cycle
        is_served = cycle and not cycle.more_body and not cycle.response_complete
        return not is_served and not self.transport.is_closing()

    def _end(self) -> None:
        if self._is_waiting():
            self.transport.abort()

    def _refuse(self) -> None:
        if self.cycle and not self.cycle.response_complete:  # the answer to the request before
            self.transport.abort()
            return
        # Closing now could destroy the answer, so what still arrives is thrown away.
        self._is_refused = True
        if not self.cycle or not self.cycle.more_body:  # else it is the rest of a refused body
            self.transport.write(_REFUSAL)
        self.transport.write_eof()
