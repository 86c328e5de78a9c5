"""Metadata about the current user, on AWS Lambda behind an HTTP API with a JWT authorizer."""

import base64
import json
from typing import Any

import usermetadata
from usermetadata.syncio import clear_user_metadata, get_user_metadata, update_user_metadata

# Once for each instance, not for each event. USERMETADATA_URL names the storage.
usermetadata.init()


def handler(event: dict[str, Any], context: object) -> dict[str, Any]:
    user_id = event["requestContext"]["authorizer"]["jwt"]["claims"]["sub"]
    try:
        return answer(200, answer_to(event, user_id))
    except usermetadata.InvalidInputError as error:
        return answer(400, {"message": str(error)})


def answer_to(event: dict[str, Any], user_id: str) -> dict[str, Any]:
    if event["routeKey"] == "POST /updateinfo":
        update_user_metadata(user_id, body(event))
        return {"message": "successfully updated user metadata"}
    if event["routeKey"] == "DELETE /userinfo":
        clear_user_metadata(user_id)
        return {"message": "successfully cleared user metadata"}
    return get_user_metadata(user_id).metadata  # GET /userinfo


def body(event: dict[str, Any]) -> Any:
    text = event.get("body", "")
    try:
        return json.loads(base64.b64decode(text) if event["isBase64Encoded"] else text)
    except (ValueError, RecursionError) as error:
        raise usermetadata.InvalidInputError("the body is not JSON") from error


def answer(status: int, content: dict[str, Any]) -> dict[str, Any]:
    headers = {"content-type": "application/json"}
    return {"statusCode": status, "headers": headers, "body": json.dumps(content)}
