"""Orders and metadata in one transaction, with FastAPI and SQLAlchemy.

``DATABASE_URL=sqlite:///shop.db uvicorn fastapi_sqlalchemy:app``
"""

import os
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from usermetadata import UserMetadata


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[str]
    product: Mapped[str]


def request_session(request: Request) -> Generator[Session]:
    with Session(request.state.engine, expire_on_commit=False) as session:
        yield session  # closing it rolls back what was not committed


def current_user(x_user_id: Annotated[str | None, Header()] = None) -> str:
    """Stands for your own authentication: a client must not choose its user id."""
    if x_user_id is None:
        raise HTTPException(401)
    return x_user_id


def pay(order: Order) -> None:
    """Stands for what may fail after an order was stored."""
    if order.product == "yacht":
        raise HTTPException(402, "the payment was declined")


CurrentUser = Annotated[str, Depends(current_user)]
RequestSession = Annotated[Session, Depends(request_session)]
router = APIRouter()


@router.post("/buy/{product}", status_code=201)
def buy(
    product: str, user_id: CurrentUser, session: RequestSession, request: Request
) -> dict[str, int]:
    order = Order(user_id=user_id, product=product)
    session.add(order)
    session.flush()  # the order gets its id
    with request.state.users.within(session) as metadata:
        metadata.update_user_metadata(user_id, {"last_order": order.id})
    pay(order)
    session.commit()
    return {"order": order.id}


@router.get("/userinfo")
async def user_info(user_id: CurrentUser, request: Request) -> dict[str, Any]:
    users: UserMetadata = request.state.users
    return (await users.asyncio.get_user_metadata(user_id)).metadata


def create_app(url: str) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[dict[str, Any]]:
        engine = create_engine(url)
        Base.metadata.create_all(engine)
        async with UserMetadata(url) as users:
            yield {"engine": engine, "users": users}
        engine.dispose()

    app = FastAPI(lifespan=lifespan)
    app.include_router(router)
    return app


app = create_app(os.environ.get("DATABASE_URL", "sqlite:///shop.db"))
