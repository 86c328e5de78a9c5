"""Metadata about the current user, with Starlette: ``uvicorn starlette_app:app``."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import usermetadata
from usermetadata.asyncio import clear_user_metadata, get_user_metadata, update_user_metadata


def current_user(request: Request) -> str:
    """Stands for your own authentication: a client must not choose its user id."""
    if "x-user-id" not in request.headers:
        raise HTTPException(401)
    return request.headers["x-user-id"]


async def update_info(request: Request) -> JSONResponse:
    user_id = current_user(request)
    try:
        update = await request.json()
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body is not JSON") from error
    await update_user_metadata(user_id, update)
    return JSONResponse({"message": "successfully updated user metadata"})


async def user_info(request: Request) -> JSONResponse:
    return JSONResponse((await get_user_metadata(current_user(request))).metadata)


async def clear_info(request: Request) -> JSONResponse:
    await clear_user_metadata(current_user(request))
    return JSONResponse({"message": "successfully cleared user metadata"})


async def bad_input(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"message": str(error)}, 400)


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncGenerator[None]:
    usermetadata.init()  # the storage that USERMETADATA_URL names
    yield
    usermetadata.close()


app = Starlette(
    routes=[
        Route("/updateinfo", update_info, methods=["POST"]),
        Route("/userinfo", user_info, methods=["GET"]),
        Route("/userinfo", clear_info, methods=["DELETE"]),
    ],
    exception_handlers={usermetadata.InvalidInputError: bad_input},
    lifespan=lifespan,
)
