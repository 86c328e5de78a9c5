"""A server of SuperTokens' core driver interface, its user metadata part, over any storage.

SuperTokens' SDKs, in any language, use it like a core. Statuses and error texts are the core's.
This library decides what is stored and what is refused.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

try:
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import Route
except ImportError as error:
    raise ImportError(
        "usermetadata.server needs Starlette and uvicorn;"
        " pip install 'starlette>=0.40' 'uvicorn>=0.30' 'httptools>=0.6'"
    ) from error

from usermetadata._core.asyncio_functions import AsyncioFunctions
from usermetadata._core.parsing import parse_json
from usermetadata._core.runners import AsyncioRunner
from usermetadata.codec import encode_metadata
from usermetadata.exceptions import (
    DamagedMetadataError,
    InvalidInputError,
    OutcomeUnknownError,
    StorageError,
    UsageError,
)
from usermetadata.storage import Storage
from usermetadata.validation import check_user_id

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Collection

    from starlette.types import Receive, Scope, Send


T = TypeVar("T")

VERSIONS = (
    *(f"2.{minor}" for minor in range(7, 22)),
    *("3.0", "3.1", "4.0"),
    *(f"5.{minor}" for minor in range(7)),
)
"""The supported versions of the core driver interface; its metadata part is the same in all."""

_MOST_USERS = 500  # that one request may ask for
_APP = re.compile(r"/appid-([^/]+)(/.*)")
_log = logging.getLogger(__name__)


def create_app(
    storage: Storage, *, api_keys: Collection[str] = (), max_body_size: int = 2**20
) -> Starlette:
    """Return an ASGI application that serves a storage to SuperTokens' SDKs.

    It may be served by itself, or mounted in the application's own.

    Args:
        storage: where the metadata is stored. The caller closes it.
        api_keys: the keys that a client may send; without any, no key is needed.
        max_body_size: how many bytes a request's body may have.

    Returns:
        The application. At its end, its lifespan completes the calls under way.

    Raises:
        InvalidInputError: ``storage`` is not a storage, but for example a URL; ``api_keys`` is not
            a collection of keys, or one of them is empty.

    Example:
        >>> from usermetadata import InMemoryStorage
        >>> app = create_app(InMemoryStorage(), api_keys=["a key of at least 20 characters"])

    The paths, answers and error texts are those of SuperTokens' core, "Core Driver Interface".
    """
    if not isinstance(storage, Storage):
        raise InvalidInputError(
            f"storage: {type(storage).__name__} is not a storage; pass for"
            " example SQLiteStorage(...)"
        )
    if isinstance(api_keys, str) or not all(key.strip() for key in api_keys):
        raise InvalidInputError(
            "api_keys: an empty key, or a text instead of a list of keys; pass a list of keys"
        )
    server = _Server(storage, api_keys, max_body_size)

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


class _Refusal(Exception):  # noqa: N818 - it is an answer, not a failure
    """An answer other than 200."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        self.text = text


class _Server:
    def __init__(self, storage: Storage, api_keys: Collection[str], max_body_size: int) -> None:
        self._api_keys = [key.encode() for key in api_keys]
        self._max_body_size = max_body_size
        self._runner = AsyncioRunner(storage)
        self._functions: dict[
            str, dict[str, Callable[[Request, AsyncioRunner], Awaitable[dict[str, Any]]]]
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
        """Complete the calls under way."""
        self._runner.close()

    async def _answer(self, request: Request) -> Response:
        try:
            response = await self._content(request)
        except _Refusal as refusal:
            response = _text(refusal.status, refusal.text)
        except InvalidInputError as error:
            response = _text(400, str(error))
        except ClientDisconnect:
            response = _text(400, "Invalid Json Input")
        except (StorageError, UsageError) as error:
            _log.warning("%s", error)
            response = _text(*_trouble(error))
        _log.debug("%s %r: %d", request.method, request.scope["path"], response.status_code)
        return response

    async def _content(self, request: Request) -> Response:
        path = "/" + request.path_params["path"].lower().removesuffix("/")
        app = _APP.fullmatch(path)
        if app:
            path = app[2]
        if path == "/hello":
            if request.method not in ("GET", "POST", "PUT", "DELETE"):
                raise _Refusal(405, "Method not supported")
            return _text(200, "Hello")
        if path not in self._functions:
            raise _Refusal(404, "Not found")
        self._check_key(request)
        version = request.headers.get("cdi-version", VERSIONS[-1])
        if version not in VERSIONS and path != "/apiversion":
            raise _Refusal(400, f"cdi-version {version} not supported")
        if request.method not in self._functions[path]:
            raise _Refusal(405, "Method not supported")
        runner = self._runner.for_app(app[1]) if app else self._runner
        content = await self._functions[path][request.method](request, runner)
        return Response(
            encode_metadata(content), headers={"content-type": "application/json;charset=UTF-8"}
        )

    def _check_key(self, request: Request) -> None:
        if not self._api_keys:
            return
        key = request.headers.get("api-key")
        if key is None:
            authorization = request.headers.get("authorization", "")
            key = re.sub("^bearer ", "", authorization, flags=re.IGNORECASE).strip()
        shown = key.encode("latin-1")  # the bytes that were sent
        # All keys are compared, so that the time reveals nothing.
        if not sum(hmac.compare_digest(shown, each) for each in self._api_keys):
            raise _Refusal(401, "Invalid API key")

    async def _body(self, request: Request) -> dict[str, Any]:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > self._max_body_size:
                raise _Refusal(413, f"The body has more than {self._max_body_size} bytes")
        try:
            parsed = parse_json(body.decode(), "body")
        except InvalidInputError:
            raise
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            raise _Refusal(400, "Invalid Json Input")
        return parsed

    async def _versions(self, request: Request, runner: AsyncioRunner) -> dict[str, Any]:
        return {"versions": VERSIONS}

    async def _get(self, request: Request, runner: AsyncioRunner) -> dict[str, Any]:
        user_ids = request.query_params.getlist("userId")
        if not user_ids:
            raise _Refusal(400, "Field name 'userId' is missing in GET request")
        found = await AsyncioFunctions(runner).get_user_metadata(user_ids[0], {})
        return {"metadata": found.metadata, "status": "OK"}

    async def _update(self, request: Request, runner: AsyncioRunner) -> dict[str, Any]:
        body = await self._body(request)
        user_id, update = _field(body, "userId", str), _field(body, "metadataUpdate", dict)
        updated = await AsyncioFunctions(runner).update_user_metadata(user_id, update, {})
        return {"metadata": updated.metadata, "status": "OK"}

    async def _remove(self, request: Request, runner: AsyncioRunner) -> dict[str, Any]:
        user_id = _field(await self._body(request), "userId", str)
        await AsyncioFunctions(runner).clear_user_metadata(user_id, {})
        return {"status": "OK"}

    async def _get_bulk(self, request: Request, runner: AsyncioRunner) -> dict[str, Any]:
        user_ids = _field(await self._body(request), "userIds", list)
        if len(user_ids) > _MOST_USERS:
            raise _Refusal(400, f"You can only query up to {_MOST_USERS} users at a time.")
        if not all(isinstance(user_id, str) for user_id in user_ids):
            raise _Refusal(400, "userIds array must contain only strings")
        for number, user_id in enumerate(user_ids):
            check_user_id(user_id, f"userIds[{number}]")
        found = await runner.read(user_ids)
        users = [{"userId": user_id, "metadata": found.get(user_id)} for user_id in user_ids]
        return {"status": "OK", "users": users}


def _text(status: int, text: str) -> Response:
    headers = {
        "content-type": "text/html;charset=UTF-8",  # as the core has it
        "content-security-policy": "default-src 'none'; sandbox",  # browsers execute nothing of it
    }
    return Response(text, status, headers)


def _trouble(error: StorageError | UsageError) -> tuple[int, str]:
    """Describe the error without the database's own text."""
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
