"""Metadata about the current user, with FastAPI: ``uvicorn fastapi_app:app``."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.responses import JSONResponse

import usermetadata
from usermetadata.asyncio import clear_user_metadata, get_user_metadata, update_user_metadata


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    usermetadata.init()  # the storage that USERMETADATA_URL names
    yield
    usermetadata.close()


app = FastAPI(lifespan=lifespan)


@app.exception_handler(usermetadata.InvalidInputError)
async def bad_input(_: Request, error: usermetadata.InvalidInputError) -> JSONResponse:
    return JSONResponse({"message": str(error)}, 400)


async def current_user(x_user_id: Annotated[str | None, Header()] = None) -> str:
    """Stands for your own authentication: a client must not choose its user id."""
    if x_user_id is None:
        raise HTTPException(401)
    return x_user_id


CurrentUser = Annotated[str, Depends(current_user)]


@app.post("/updateinfo")
async def update_info(user_id: CurrentUser, update: dict[str, Any]) -> dict[str, str]:
    await update_user_metadata(user_id, update)
    return {"message": "successfully updated user metadata"}


@app.get("/userinfo")
async def user_info(user_id: CurrentUser) -> dict[str, Any]:
    return (await get_user_metadata(user_id)).metadata


@app.delete("/userinfo")
async def clear_info(user_id: CurrentUser) -> dict[str, str]:
    await clear_user_metadata(user_id)
    return {"message": "successfully cleared user metadata"}
