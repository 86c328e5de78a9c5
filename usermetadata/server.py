"""A server for SuperTokens' SDKs, in place of the core (SuperTokens' server), over any storage.

It implements the user metadata part of the core driver interface, the HTTP API of a core. Statuses
and error texts are the core's. This library decides what is stored and what is refused.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
from collections.abc import Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qs

try:
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import Route
except ImportError as error:
    raise ImportError(
        "usermetadata.server: Starlette is not installed;"
        " pip install 'httptools>=0.6.4' 'starlette>=0.40' 'msgspec>=0.19'"
    ) from error

from usermetadata._core.arguments import user_ids_of
from usermetadata._core.asyncio_functions import AsyncioFunctions
from usermetadata._core.parsing import parse_json
from usermetadata._core.runners import AsyncioRunner
from usermetadata._core.urls import check_storage
from usermetadata.changes import Merge
from usermetadata.codec import encode_metadata
from usermetadata.exceptions import (
    DamagedMetadataError,
    InvalidInputError,
    NotUniqueError,
    OutcomeUnknownError,
    StorageError,
    UsageError,
)
from usermetadata.validation import check_user_id, copy_metadata

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from starlette.types import Receive, Scope, Send

    from usermetadata.codec import Metadata
    from usermetadata.storage import Storage

T = TypeVar("T")

VERSIONS = (
    *(f"2.{minor}" for minor in range(7, 22)),
    *("3.0", "3.1", "4.0"),
    *(f"5.{minor}" for minor in range(7)),
)
"""The supported versions of the core driver interface; its metadata part is the same in all."""

_MOST_USERS = 500  # the most that one request may ask for
_READ_AT_ONCE = 25  # of these users
_LARGEST_OBJECTS = 16  # the most for which an answer for many users has room
_MOST_VALUES = 120_000  # the most in a body or a user's metadata; more would block the event loop
_LONG_BODY = 2**14  # bytes; longer ones are parsed in another thread
_LONG_VALUE = 1000  # values; longer ones are encoded in another thread
_PATH = re.compile(
    r"(?:/appid-(?P<app>[a-z0-9-]*))?"
    r"(?:/(?!(?:recipe|config|users|hello)/)(?P<tenant>[a-z0-9-]+))?"
    r"(?P<path>/.*)"
)
_MOST_LEVELS = 500  # in a body; CPython 3.13 goes so deep that a thread's stack could overflow
_LEVELS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NO_SIGNS = bytes(set(range(256)).difference(_LEVELS, b'"'))
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9.-]+))(?::[0-9]*)?")
_NOT_A_QUERY = re.compile(rb"%(?![0-9A-Fa-f]{2})|[^!-~]")
_log = logging.getLogger(__name__)


def create_app(
    storage: Storage,
    *,
    api_keys: Collection[str] = (),
    max_body_size: int = 2**20,
    max_metadata_size: int = 2**20,
) -> Starlette:
    """Return an ASGI application that serves a storage to SuperTokens' SDKs.

    It can run alone, or be mounted in another ASGI application. Limits for headers, the time for a
    request and connections are left to the ASGI server that runs it.

    Args:
        storage: where the metadata is stored. The caller closes it.
        api_keys: the keys that a client may send. Without keys, the application answers only
            requests to a loopback name, and none from another site's web page.
        max_body_size: the largest body of a request, in bytes.
        max_metadata_size: the largest metadata of a user after an update, in bytes of compact JSON.
            An answer for many users may have 16 times as many.

    Returns:
        The application. At shutdown its lifespan completes the running calls.

    Raises:
        InvalidInputError: ``storage`` is not a storage, but for example a URL, or one of its
            methods is missing or wrong; ``api_keys`` is not a collection of keys, for example an
            iterator, or one of them is empty or not text.

    Example:
        >>> from usermetadata import InMemoryStorage
        >>> app = create_app(InMemoryStorage(), api_keys=["a key of at least 20 characters"])

    SuperTokens documents the paths and answers as "Core Driver Interface".
    """
    check_storage(storage)
    server = _Server(storage, _encode_keys(api_keys), max_body_size, max_metadata_size)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None, None]:
        yield
        await asyncio.to_thread(server.close)

    async def not_found(_: Request, __: Exception) -> Response:
        return _text(404, "Not found")

    return Starlette(
        routes=[Route("/{path:path}", server)],
        lifespan=lifespan,
        exception_handlers={404: not_found},  # a path of several lines
    )


class _Refusal(Exception):  # noqa: N818 - it is a response, not a failure
    """An answer other than 200."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        self.text = text


@dataclass(frozen=True, slots=True)
class _LimitedMerge(Merge):
    """Merge, unless the result is too large."""

    max_size: int

    def __call__(self, old: Metadata | None) -> Metadata:
        merged = Merge.__call__(self, old)
        _refuse_large(_encode(merged), self.max_size, "The user's metadata would have")
        return merged


class _Server:
    def __init__(
        self,
        storage: Storage,
        api_keys: list[bytes],
        max_body_size: int,
        max_metadata_size: int,
    ) -> None:
        self._api_keys = api_keys
        self._max_body_size = max_body_size
        self._max_metadata_size = max_metadata_size
        self._runner = AsyncioRunner(storage)
        self._functions: dict[
            str, dict[str, Callable[[Request, AsyncioRunner], Awaitable[bytes]]]
        ] = {
            "/apiversion": {"GET": self._versions},
            "/recipe/user/metadata": {"GET": self._get, "PUT": self._update},
            "/recipe/user/metadata/remove": {"POST": self._remove},
            "/recipe/user/metadata/bulk": {"POST": self._get_bulk},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        response = await self._answer(Request(scope, receive))
        await response(scope, receive, send)

    def close(self) -> None:
        """Complete the running calls."""
        self._runner.close()

    async def _answer(self, request: Request) -> Response:
        try:
            response = await self._content(request)
        except _Refusal as refusal:
            response = _text(refusal.status, refusal.text)
        except InvalidInputError as error:
            response = _text(400, str(error))
        except NotUniqueError as error:
            response = _text(409, str(NotUniqueError(error.name)))  # without the other user's id
        except ClientDisconnect:
            response = _text(400, "Invalid Json Input")
        except (StorageError, UsageError) as error:
            _log.warning("%s", error)
            response = _text(*_trouble(error))
        _log.debug("%s %r: %d", request.method, request.scope["path"], response.status_code)
        return response

    async def _content(self, request: Request) -> Response:
        if not self._api_keys:
            _check_origin(request)
        path = request.path_params["path"]
        # ASGI servers decode what is not UTF-8 to U+FFFD; Starlette drops a newline at the end.
        if not path.isascii() or request.scope["path"].endswith("\n"):
            raise _Refusal(404, "Not found")
        app_id, tenant, path = self._split(path)
        if path == "/hello":
            if request.method not in ("GET", "POST", "PUT", "DELETE"):
                raise _Refusal(405, "Method not supported")
            return _text(200, "Hello")
        if path not in self._functions:
            raise _Refusal(404, "Not found")
        self._check_key(request)
        version = request.headers.get("cdi-version", VERSIONS[-1])
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)*", version):
            raise _Refusal(400, "cdi-version header is invalid")
        if version not in VERSIONS and path != "/apiversion":
            raise _Refusal(400, f"cdi-version {version} not supported")
        if request.method not in self._functions[path]:
            raise _Refusal(405, "Method not supported")
        if tenant not in (None, "public") and path != "/apiversion":
            raise _Refusal(403, "Only public tenantId can call this app specific API")
        runner = self._runner.for_app(app_id) if app_id else self._runner
        content = await self._functions[path][request.method](request, runner)
        return Response(content, headers={"content-type": "application/json;charset=UTF-8"})

    def _split(self, path: str) -> tuple[str | None, str | None, str]:
        """Return the app and the tenant that a path names, and the path after them."""
        path = f"/{path.lower().removesuffix('/')}"
        named = None if path in self._functions else _PATH.fullmatch(path)
        return (named["app"], named["tenant"], named["path"]) if named else (None, None, path)

    def _check_key(self, request: Request) -> None:
        if not self._api_keys:
            return
        key = request.headers.get("api-key")
        if key is None:
            authorization = request.headers.get("authorization", "")
            key = re.sub("^bearer ", "", authorization, flags=re.IGNORECASE).strip(" \t")
        shown = key.encode("latin-1")  # the bytes that were sent
        # All keys are compared, so the time of the comparison reveals nothing.
        if not sum(hmac.compare_digest(shown, each) for each in self._api_keys):
            raise _Refusal(401, "Invalid API key")

    async def _body(self, request: Request, check: Callable[[dict[str, Any]], T]) -> T:
        """Return ``check(body)``, with the body parsed."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._max_body_size:  # the rest of the body is not read
                break
        _refuse_large(body, self._max_body_size, "The body has")
        if len(body) > _LONG_BODY:
            return await asyncio.to_thread(lambda: check(_parse(body)))
        return check(_parse(body))

    async def _versions(self, request: Request, runner: AsyncioRunner) -> bytes:
        return _encode({"versions": VERSIONS})

    async def _get(self, request: Request, runner: AsyncioRunner) -> bytes:
        user_ids = _query(request.scope["query_string"]).get("userId")
        if user_ids is None:
            raise _Refusal(400, "Field name 'userId' is missing in GET request")
        found = await AsyncioFunctions(runner).get_user_metadata(user_ids[0], {})
        return await _encode_all([{"metadata": found.metadata, "status": "OK"}])

    async def _update(self, request: Request, runner: AsyncioRunner) -> bytes:
        def check(body: dict[str, Any]) -> tuple[str, Merge]:
            user_id, update = _field(body, "userId", str), _field(body, "metadataUpdate", dict)
            checked = copy_metadata(update, "metadata_update")
            return check_user_id(user_id), _LimitedMerge(checked, self._max_metadata_size)

        [metadata] = await runner.write([await self._body(request, check)], {})
        return await _encode_all([{"metadata": metadata, "status": "OK"}])

    async def _remove(self, request: Request, runner: AsyncioRunner) -> bytes:
        user_id = await self._body(request, lambda body: _field(body, "userId", str))
        await AsyncioFunctions(runner).clear_user_metadata(user_id, {})
        return _encode({"status": "OK"})

    async def _get_bulk(self, request: Request, runner: AsyncioRunner) -> bytes:
        user_ids = await self._body(request, _user_ids_of)
        room = self._max_metadata_size * _LARGEST_OBJECTS
        users = bytearray()
        for start in range(0, len(user_ids), _READ_AT_ONCE):
            some = user_ids[start : start + _READ_AT_ONCE]
            found = await runner.read(some)
            users += await _encode_all(
                [{"userId": user_id, "metadata": found.get(user_id)} for user_id in some],
                room - len(users),
            )
            if len(users) > room:
                raise _Refusal(413, f"The answer has more than {room} bytes; ask for fewer users")
            users += b","
        return b'{"status":"OK","users":[' + users.removesuffix(b",") + b"]}"


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is a loopback one.

    Args:
        host: the name or address, without a port.

    Returns:
        Whether only programs on this machine can reach it.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("0.0.0.0"), is_loopback("core.example")
        (True, False, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _encode_keys(api_keys: Collection[str]) -> list[bytes]:
    # Without this check, an iterator would be used up here, and the server would have no keys.
    if not isinstance(api_keys, Collection) or isinstance(api_keys, (str, bytes)):
        raise InvalidInputError("api_keys: it is not a list of keys; pass a list")
    if not all(isinstance(key, str) and key.strip() for key in api_keys):
        raise InvalidInputError("api_keys: an empty key, or one that is not text; set another")
    try:
        return [key.encode() for key in api_keys]
    except UnicodeEncodeError:  # it quotes the key
        raise InvalidInputError("api_keys: a key is not UTF-8; set another") from None


def _check_origin(request: Request) -> None:
    """Refuse requests that a browser sends for a web page of another site.

    A page whose name resolves to this machine (DNS rebinding) sends its own name as ``Host``.
    """
    host = request.headers.get("host", "")
    named = _HOST.fullmatch(host)
    if not named or not is_loopback((named[1] or named[2]).lower()):
        raise _Refusal(
            403, "Host: it is not localhost; without API keys only local clients may ask"
        )
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site", "none")
    if origin not in (None, f"http://{host}", f"https://{host}") or site not in (
        "none",
        "same-origin",
    ):
        raise _Refusal(403, "Origin: it is another site; without API keys no web page may ask")


def _query(query: bytes) -> dict[str, list[str]]:
    """Return the fields of a query. A lenient reading would give two users the same id."""
    try:
        if not _NOT_A_QUERY.search(query):
            return parse_qs(query.decode("ascii"), keep_blank_values=True, errors="strict")
    except ValueError:
        pass
    raise _Refusal(400, "query: it is not percent-encoded UTF-8; encode the user id")


def _parse(body: bytearray) -> dict[str, Any]:
    try:
        parsed = None if _is_deep(body) else parse_json(body.decode(), "body")
    except InvalidInputError:
        raise
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise _Refusal(400, "Invalid Json Input")
    return parsed


def _is_deep(body: bytearray) -> bool:
    if body.count(b"[") + body.count(b"{") <= _MOST_LEVELS:
        return False
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    signs = unescaped.translate(None, _NO_SIGNS).replace(b'""', b"")
    brackets = b"".join(signs.split(b'"')[::2])  # every second piece is in a string
    return max(accumulate(map(_LEVELS.__getitem__, brackets)), default=0) > _MOST_LEVELS


def _refuse_large(text: bytes | bytearray, max_size: int, what: str) -> None:
    """Refuse JSON that has too many bytes or values."""
    if len(text) > max_size:
        raise _Refusal(413, f"{what} more than {max_size} bytes")
    # An estimate: strings may contain these signs. Python handles many small values slowly.
    if sum(text.count(sign) for sign in (b"[", b"{", b",")) > _MOST_VALUES:
        raise _Refusal(413, f"{what} more than {_MOST_VALUES} values")


def _user_ids_of(body: dict[str, Any]) -> list[str]:
    user_ids = _field(body, "userIds", list)
    if len(user_ids) > _MOST_USERS:
        raise _Refusal(400, f"You can only query up to {_MOST_USERS} users at a time.")
    if not all(isinstance(user_id, str) for user_id in user_ids):
        raise _Refusal(400, "userIds array must contain only strings")
    return user_ids_of(user_ids, "userIds")


def _encode(content: dict[str, Any]) -> bytes:
    return encode_metadata(content).encode()


async def _encode_all(contents: list[dict[str, Any]], room: int | None = None) -> bytes:
    """Encode objects with commas between them; stop when they have more than ``room`` bytes."""

    def encode() -> bytes:
        encoded = bytearray()
        for content in contents:
            encoded += b"," * bool(encoded) + _encode(content)
            if room is not None and len(encoded) > room:
                break
        return bytes(encoded)

    return await asyncio.to_thread(encode) if _is_long(contents) else encode()


def _is_long(value: object) -> bool:
    """Tell whether encoding the value takes longer than starting a thread."""
    waiting, seen = [value], 0
    while waiting and seen < _LONG_VALUE:
        each = waiting.pop()
        seen += 1
        if isinstance(each, dict):
            waiting.extend(each.values())
        elif isinstance(each, list):
            waiting.extend(each)
        elif isinstance(each, int):
            seen += each.bit_length() // 64
    return bool(waiting)


def _text(status: int, text: str) -> Response:
    headers = {
        "content-type": "text/html;charset=UTF-8",  # as in the core
        "content-security-policy": "default-src 'none'; sandbox",  # nothing in it is executed
    }
    return Response(text, status, headers)


def _trouble(error: StorageError | UsageError) -> tuple[int, str]:
    """Describe the error without the text of the database."""
    if isinstance(error, DamagedMetadataError):
        return 500, "The stored row is damaged; the server's log names the user."
    if isinstance(error, OutcomeUnknownError):
        return 503, "The storage failed during the write: whether the change was stored is unknown."
    return 503, "The storage is busy or cannot be reached; try again."


def _field(body: dict[str, Any], name: str, kind: type[T]) -> T:
    value = body.get(name)
    if not isinstance(value, kind):
        raise _Refusal(400, f"Field name '{name}' is invalid in JSON input")
    return value
