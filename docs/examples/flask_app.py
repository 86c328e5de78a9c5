"""Metadata about the current user, with Flask: ``flask --app flask_app run``."""

from typing import Any

from flask import Flask, abort, request

import usermetadata
from usermetadata.syncio import clear_user_metadata, get_user_metadata, update_user_metadata

usermetadata.init()  # the storage that USERMETADATA_URL names
app = Flask(__name__)


def current_user() -> str:
    """Stands for your own authentication: a client must not choose its user id."""
    return request.headers.get("x-user-id") or abort(401)


@app.errorhandler(usermetadata.InvalidInputError)
def bad_input(error: usermetadata.InvalidInputError) -> tuple[dict[str, str], int]:
    return {"message": str(error)}, 400


@app.errorhandler(RecursionError)
def nested_too_deep(_: RecursionError) -> tuple[dict[str, str], int]:
    return {"message": "the body is nested too deep"}, 400


@app.post("/updateinfo")
def update_info() -> dict[str, str]:
    update_user_metadata(current_user(), request.get_json())
    return {"message": "successfully updated user metadata"}


@app.get("/userinfo")
def user_info() -> dict[str, Any]:
    return get_user_metadata(current_user()).metadata


@app.delete("/userinfo")
def clear_info() -> dict[str, str]:
    clear_user_metadata(current_user())
    return {"message": "successfully cleared user metadata"}
