"""Orders and metadata in one transaction, with Flask-SQLAlchemy.

``DATABASE_URL=sqlite:///shop.db flask --app flask_sqlalchemy_app run``
"""

import os
from typing import Any

from flask import Flask, abort, make_response, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from usermetadata import UserMetadata


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[str]
    product: Mapped[str]


app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ.get("DATABASE_URL", "sqlite:///shop.db")
db = SQLAlchemy(app, metadata=Base.metadata)
with app.app_context():
    db.create_all()
    # Of the engine, because Flask-SQLAlchemy puts a relative path into the instance folder.
    users = UserMetadata(db.engine.url.render_as_string(hide_password=False))


def current_user() -> str:
    """Stands for your own authentication: a client must not choose its user id."""
    return request.headers.get("x-user-id") or abort(401)


def pay(order: Order) -> None:
    """Stands for what may fail after an order was stored."""
    if order.product == "yacht":
        abort(make_response({"message": "the payment was declined"}, 402))


@app.post("/buy/<product>")
def buy(product: str) -> tuple[dict[str, int], int]:
    user_id = current_user()
    order = Order(user_id=user_id, product=product)
    db.session.add(order)
    db.session.flush()  # the order gets its id
    with users.within(db.session) as metadata:
        metadata.update_user_metadata(user_id, {"last_order": order.id})
    pay(order)
    db.session.commit()
    return {"order": order.id}, 201


@app.get("/userinfo")
def user_info() -> dict[str, Any]:
    return users.syncio.get_user_metadata(current_user()).metadata
