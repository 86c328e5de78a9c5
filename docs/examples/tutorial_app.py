"""The program of the tutorial: ``uvicorn tutorial_app:app``."""

from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException
from pydantic import BaseModel

import usermetadata
from usermetadata import Index
from usermetadata.asyncio import (
    erase_user,
    find_user_id,
    get_user_metadata,
    list_user_metadata,
    modify_user_metadata,
    update_user_metadata,
)

usermetadata.init(indexes=[Index("plan"), Index("stripe_customer_id", unique=True)])
app = FastAPI()


async def current_user(x_user_id: Annotated[str | None, Header()] = None) -> str:
    """Stands for your own authentication: a client must not choose its user id."""
    if x_user_id is None:
        raise HTTPException(401)
    return x_user_id


CurrentUser = Annotated[str, Depends(current_user)]


class Preferences(BaseModel):
    theme: str | None = None
    language: str | None = None


@app.get("/preferences", response_model_exclude_unset=True)
async def preferences(user_id: CurrentUser) -> Preferences:
    result = await get_user_metadata(user_id)
    return Preferences.model_validate(result.metadata)


@app.patch("/preferences", response_model_exclude_unset=True)
async def change_preferences(user_id: CurrentUser, changes: Preferences) -> Preferences:
    result = await update_user_metadata(user_id, changes.model_dump(exclude_unset=True))
    return Preferences.model_validate(result.metadata)


def one_more(metadata: dict[str, Any]) -> dict[str, Any]:
    return {**metadata, "visits": metadata.get("visits", 0) + 1}


@app.post("/visits")
async def count_visit(user_id: CurrentUser) -> dict[str, int]:
    result = await modify_user_metadata(user_id, one_more)
    return {"visits": result.metadata["visits"]}


@app.get("/admin/pro-users")
async def pro_users(user_id: CurrentUser, after: str = "") -> dict[str, int]:
    if user_id != "admin":
        raise HTTPException(403)
    page = await list_user_metadata({"plan": "pro"}, after=after, limit=2)
    return {user: result.metadata.get("visits", 0) for user, result in page.items()}


@app.post("/stripe")
async def subscription_changed(event: dict[str, Any]) -> dict[str, str]:
    """Verify Stripe's signature here: otherwise anyone can send an event."""
    subscription = event["data"]["object"]
    user_id = await find_user_id({"stripe_customer_id": subscription["customer"]})
    if user_id is None:
        raise HTTPException(404)
    plan = "pro" if subscription["status"] == "active" else "free"
    await update_user_metadata(user_id, {"plan": plan})
    return {user_id: plan}


@app.delete("/account")
async def erase_account(user_id: CurrentUser) -> dict[str, Any]:
    result = await erase_user(user_id)
    return result.metadata
