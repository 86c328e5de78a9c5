"""A server that answers SuperTokens' SDKs at once, from a dictionary; it stores nothing.

``python core.py`` prints its port, and serves until it is ended. It answers the SDK's
requests for a get or an update, and keeps connections open.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

from usermetadata import merge_metadata

VERSIONS = [f"5.{minor}" for minor in range(7)]
users: dict[str, dict[str, Any]] = {}


def answer(method: bytes, target: str, body: bytes) -> dict[str, Any]:
    """Answer one request."""
    if target.startswith("/apiversion"):
        return {"versions": VERSIONS}
    if method == b"GET":
        metadata = users.get(parse_qs(urlsplit(target).query)["userId"][0], {})
    else:
        asked = json.loads(body)
        metadata = merge_metadata(users.get(asked["userId"], {}), asked["metadataUpdate"])
        users[asked["userId"]] = metadata
    return {"status": "OK", "metadata": metadata}


class Connection(asyncio.Protocol):
    """One connection, one request after the other."""

    transport: asyncio.Transport
    received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
        if not end or len(body) < length:
            return  # the rest has not arrived yet
        self.received = b""
        method, target, _ = head.split(b" ", 2)
        text = json.dumps(answer(method, target.decode(), body)).encode()
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (len(text), text)
        )


async def main() -> None:
    """Serve."""
    server = await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
