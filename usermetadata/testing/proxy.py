"""A TCP proxy that breaks connections at a chosen moment, for the conformance suite."""

from __future__ import annotations

import contextlib
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

Phase = Literal["before sending", "after sending", "after the answer"]


class BreakingProxy:
    """Forwards connections to a server, and breaks one when a test asks for it.

    It works with any protocol in which the client waits for the server's answers. A round trip
    begins with the first bytes that a client sends after an answer.

    Args:
        server: the host and port of the server, or the path of its Unix socket.

    Attributes:
        host: the host on which the proxy listens.
        port: the port on which it listens.

    Example:
        The fixture of a storage whose server is at port 6379::

            @pytest.fixture
            def proxy(self):
                with closing(BreakingProxy(("127.0.0.1", 6379))) as proxy:
                    yield proxy

            @pytest.fixture
            def break_connection(self, proxy):
                return proxy.break_connection
    """

    def __init__(self, server: tuple[str, int] | str) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host: str = "127.0.0.1"
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._break: _Break | None = None
        threading.Thread(target=self._accept, daemon=True).start()

    @contextmanager
    def break_connection(
        self, phase: Phase, number: int = 0, meanwhile: Callable[[], object] = lambda: None
    ) -> Generator[None, None, None]:
        """Break one connection during a ``with`` block.

        Args:
            phase: ``"before sending"``: the round trip's request does not reach the server;
                ``"after sending"``: the server has answered, and the answer is lost;
                ``"after the answer"``: the connections break when the block ends.
            number: which round trip of the block breaks, counted from 0. If there are fewer,
                nothing breaks.
            meanwhile: called after the server has lost the connection and before the client
                notices.
        """
        breaking = _Break(phase, number, meanwhile)
        self._break = breaking
        try:
            yield
        finally:
            self._break = None
            if phase == "after the answer":
                self.cut()
            if breaking.error is not None:
                raise breaking.error

    def cut(self) -> None:
        """Break all connections."""
        for link in list(self._links):
            link.close()
        self._links.clear()

    def close(self) -> None:
        """Break all connections, and accept no more."""
        _close(self._listener)
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = _connect(self._server)
                except OSError:
                    client.close()
                    continue
                link = _Link(client, server)
                self._links.add(link)
                for function in (self._forward_requests, self._forward_answers):
                    threading.Thread(target=function, args=(link,), daemon=True).start()

    def _forward_requests(self, link: _Link) -> None:
        with contextlib.suppress(OSError):
            while data := link.client.recv(65536):
                if self._begins_what_breaks(link, "before sending"):
                    link.break_off()
                    break
                link.server.sendall(data)
        link.close()

    def _forward_answers(self, link: _Link) -> None:
        with contextlib.suppress(OSError):
            while data := link.server.recv(65536):
                with self._lock:
                    link.is_asking = False
                if link.breaking is not None:
                    link.break_off()
                    break
                link.client.sendall(data)
        # Until a break is over, the client must not notice it.
        if link.breaking is None:
            link.close()

    def _begins_what_breaks(self, link: _Link, phase: Phase) -> bool:
        with self._lock:
            breaking = self._break
            if link.is_asking or breaking is None:
                link.is_asking = True
                return False
            link.is_asking = True
            if breaking.phase == "after the answer" or not breaking.is_due():
                return False
            link.breaking = breaking
            return breaking.phase == phase


class _Break:
    """The break that one connection will have."""

    def __init__(self, phase: Phase, number: int, meanwhile: Callable[[], object]) -> None:
        self.phase = phase
        self.error: BaseException | None = None
        self._left = number
        self._meanwhile = meanwhile

    def is_due(self) -> bool:
        """Count a round trip; return whether it is the one that breaks."""
        self._left -= 1
        return self._left == -1

    def run_meanwhile(self) -> None:
        try:
            self._meanwhile()
        except BaseException as error:  # noqa: BLE001 - the end of the block raises it
            self.error = error


class _Link:
    """A client's connection, and the one to the server."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.is_asking = False
        self.breaking: _Break | None = None

    def break_off(self) -> None:
        _close(self.server)
        if self.breaking is not None:
            self.breaking.run_meanwhile()
        _close(self.client)

    def close(self) -> None:
        _close(self.server)
        _close(self.client)


def _connect(address: tuple[str, int] | str) -> socket.socket:
    if isinstance(address, tuple):
        return socket.create_connection(address)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    return connection


def _close(connection: socket.socket) -> None:
    # close() alone would not wake a thread that waits for data.
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
