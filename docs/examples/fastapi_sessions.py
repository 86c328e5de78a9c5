"""Metadata about the user of a SuperTokens session.

With a core at that address: ``SUPERTOKENS_URI=http://127.0.0.1:3567 uvicorn fastapi_sessions:app``
"""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import supertokens_python
from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse
from supertokens_python.framework.fastapi import get_middleware
from supertokens_python.recipe import session
from supertokens_python.recipe.session.framework.fastapi import verify_session

import usermetadata
from usermetadata.asyncio import clear_user_metadata, get_user_metadata, update_user_metadata

supertokens_python.init(
    app_info=supertokens_python.InputAppInfo(
        app_name="shop", api_domain="http://localhost", website_domain="http://localhost"
    ),
    supertokens_config=supertokens_python.SupertokensConfig(os.environ["SUPERTOKENS_URI"]),
    framework="fastapi",
    recipe_list=[session.init()],
)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
    usermetadata.init()
    yield
    usermetadata.close()


app = FastAPI(lifespan=lifespan)
app.add_middleware(get_middleware())


@app.exception_handler(usermetadata.InvalidInputError)
async def bad_input(_: Request, error: usermetadata.InvalidInputError) -> JSONResponse:
    return JSONResponse({"message": str(error)}, 400)


Session = Annotated[session.SessionContainer, Depends(verify_session())]


@app.post("/updateinfo")
async def update_info(session: Session, update: dict[str, Any]) -> dict[str, str]:
    await update_user_metadata(session.get_user_id(), update)
    return {"message": "successfully updated user metadata"}


@app.get("/userinfo")
async def user_info(session: Session) -> dict[str, Any]:
    return (await get_user_metadata(session.get_user_id())).metadata


@app.delete("/userinfo")
async def clear_info(session: Session) -> dict[str, str]:
    await clear_user_metadata(session.get_user_id())
    return {"message": "successfully cleared user metadata"}
