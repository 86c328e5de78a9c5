"""Proxies between the storage and a server: a network that fails, and poolers."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading

from psycopg.conninfo import conninfo_to_dict, make_conninfo


class Proxy:
    """Forwards traffic to and from the server; counts it, drops it or cuts connections.

    Args:
        url: the URL of the server.

    Attributes:
        url: the URL of the proxy.
        connections: the number of connections so far.
        round_trips: how often a client has sent a message and waits for the answer.
        sent: the clients' messages.
        replies_to_lose: how many of the server's next answers are not forwarded; the connection is
            cut instead.
        answer_to_lose: the next message with this in it has no answer, either.
    """

    def __init__(self, url: str) -> None:
        self._server = address_of(url)
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = str(self._listener.getsockname()[1])
        self.url = make_conninfo(
            url, host="127.0.0.1", port=port, sslmode="disable", gssencmode="disable"
        )
        self.connections = 0
        self.round_trips = 0
        self.replies_to_lose = 0
        self.answer_to_lose = b""
        self.sent: list[bytes] = []
        self._sockets: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Cut every connection."""
        for each in list(self._sockets):
            _close(each)
        self._sockets.clear()

    def close(self) -> None:
        """Cut every connection, and accept no more."""
        _close(self._listener)
        self.cut()

    def serve(self, client: socket.socket) -> None:
        """Serve one connection until it ends."""
        self.connections += 1
        server = _connect(self._server)
        self._sockets |= {client, server}
        threading.Thread(target=self._answer, args=(server, client), daemon=True).start()
        server.sendall(_startup(client))
        while not (message := _message(client)).startswith(b"X"):
            # Sync and Query: after these messages a client waits.
            self.round_trips += message[:1] in b"SQ"
            self.sent.append(message)
            if self.answer_to_lose and self.answer_to_lose in message:
                self.answer_to_lose, self.replies_to_lose = b"", 1
            server.sendall(message)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if self.replies_to_lose:
                    self.replies_to_lose -= 1
                    break
                client.sendall(data)
        _close(server)
        _close(client)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._try_to_serve, args=(client,), daemon=True).start()

    def _try_to_serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self.serve(client)
        _close(client)


class Pooler(Proxy):
    """Like pgbouncer in transaction mode, worst case: each transaction is in another session."""

    def __init__(self, url: str, sessions: int = 3) -> None:
        options = {key: value for key, value in conninfo_to_dict(url).items() if value}
        startup = b"".join(
            f"{name}\0{options.get(option, default)}\0".encode()
            for name, option, default in (
                ("user", "user", "postgres"),
                ("database", "dbname", "postgres"),
                ("client_encoding", "client_encoding", "UTF8"),
            )
        )
        self._sessions = [_connect(address_of(url)) for _ in range(sessions)]
        greeting = b""
        for session in self._sessions:
            session.sendall(struct.pack("!ii", 9 + len(startup), 3 << 16) + startup + b"\0")
            greeting = b"".join(_until_ready(session)[0])
        # The pid and the cancellation key (K) are the pooler's.
        place = greeting.index(b"K\0\0\0\x0c") + 5
        self._greeting = greeting[:place] + b"\0\0\0\x07" + greeting[place + 4 :]
        self._locks = [threading.Lock() for _ in self._sessions]
        self._turn = itertools.count()
        super().__init__(url)

    def close(self) -> None:
        """Also end the sessions."""
        super().close()
        for session in self._sessions:
            session.close()

    def serve(self, client: socket.socket) -> None:
        """Use the next session for each transaction."""
        self._sockets.add(client)
        _startup(client)
        client.sendall(self._greeting)
        message = _request(client)
        while not message.startswith(b"X"):
            number = next(self._turn) % len(self._sessions)
            session = self._sessions[number]
            with self._locks[number]:
                status = b"T"
                while status != b"I":
                    session.sendall(message)
                    if message[:1] in b"SQ":
                        replies, status = _until_ready(session)
                        client.sendall(b"".join(replies))
                    if status != b"I":
                        message = _request(client)
            message = _request(client)


class BeginningPooler(Proxy):
    """Like pgpool-II: begins transactions itself, and leaves them open.

    Attributes:
        begun: the number of transactions that it has begun.
        fates: what happens to the next COMMITs, of the client or of the pooler: ``"lose"`` cuts the
            connection instead of forwarding the answer, ``"abort"`` makes the transaction fail
            before, so that the answer is ROLLBACK, ``"begin"`` begins another transaction after it.
    """

    def __init__(self, url: str) -> None:
        self.begun = 0
        self.fates: list[str] = []
        self.ends = 0
        super().__init__(url)

    def serve(self, client: socket.socket) -> None:
        """Send BEGIN before what a client sends outside a transaction, and hide the answer."""
        self.connections += 1
        server = _connect(self._server)
        self._sockets |= {client, server}
        with contextlib.closing(server):
            server.sendall(_startup(client))
            replies, status = _until_ready(server)
            client.sendall(b"".join(replies))
            while not (message := _request(client)).startswith(b"X"):
                messages = [message]
                while messages[-1][:1] not in b"SQ":
                    messages.append(_request(client))
                commits = [number for number, each in enumerate(messages) if b"COMMIT\0" in each]
                fate = self.fates.pop(0) if commits and self.fates else ""
                if status == b"I" and not commits and b"BEGIN\0" not in b"".join(messages):
                    self._begin(server)
                replies = []
                if fate == "abort":
                    server.sendall(b"".join(messages[: commits[0]]))
                    # Without the error and the messages after it.
                    replies = _query(server, b"SELECT 1 / 0")[:-2]
                    del messages[: commits[0]]
                server.sendall(b"".join(messages))
                replies += _until_ready(server)[0]
                if fate == "lose":
                    break
                if fate == "begin":
                    replies[-1] = self._begin(server)
                if self.ends and b"BEGIN\0" in b"".join(messages):
                    self.ends -= 1
                    replies[-1] = _query(server, b"COMMIT")[-1]
                status = replies[-1][5:]
                client.sendall(b"".join(replies))

    def _begin(self, server: socket.socket) -> bytes:
        self.begun += 1
        return _query(server, b"BEGIN")[-1]


def address_of(url: str) -> str | tuple[str, int]:
    """Return where the server of a URL listens, as sockets take it."""
    options = conninfo_to_dict(url)
    host, port = str(options.get("host") or "/var/run/postgresql"), options.get("port") or 5432
    return f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, int(port))


def _connect(address: str | tuple[str, int]) -> socket.socket:
    if isinstance(address, tuple):
        return socket.create_connection(address)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    return connection


def _close(connection: socket.socket) -> None:
    # close() alone would not wake the thread that waits in accept().
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionResetError
        data += part
    return data


def _startup(client: socket.socket) -> bytes:
    head = _receive(client, 4)
    return head + _receive(client, struct.unpack("!i", head)[0] - 4)


def _message(connection: socket.socket) -> bytes:
    head = _receive(connection, 5)
    return head + _receive(connection, struct.unpack("!i", head[1:])[0] - 4)


def _request(client: socket.socket) -> bytes:
    message = _message(client)
    # Flush needs no answer: everything received is forwarded at once.
    while message.startswith(b"H"):
        message = _message(client)
    return message


def _until_ready(session: socket.socket) -> tuple[list[bytes], bytes]:
    messages = [_message(session)]
    while messages[-1][:1] != b"Z":
        messages.append(_message(session))
    return messages, messages[-1][5:]


def _query(session: socket.socket, statement: bytes) -> list[bytes]:
    session.sendall(b"Q" + struct.pack("!i", 5 + len(statement)) + statement + b"\0")
    return _until_ready(session)[0]
