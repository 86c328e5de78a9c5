"""Metadata about the current user, with Django: ``python django_app.py runserver``."""

import json
import sys

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.exceptions import BadRequest, PermissionDenied
from django.core.management import execute_from_command_line
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.utils.deprecation import MiddlewareMixin
from django.views.decorators.http import require_http_methods, require_POST

import usermetadata
from usermetadata import syncio
from usermetadata.asyncio import clear_user_metadata, get_user_metadata

settings.configure(
    ALLOWED_HOSTS=["localhost"],
    MIDDLEWARE=[f"{__name__}.BadInput"],
    ROOT_URLCONF=__name__,
)
usermetadata.init()  # the storage that USERMETADATA_URL names


class BadInput(MiddlewareMixin):
    def process_exception(self, _: HttpRequest, error: Exception) -> JsonResponse | None:
        if not isinstance(error, usermetadata.InvalidInputError):
            return None
        return JsonResponse({"message": str(error)}, status=400)


def current_user(request: HttpRequest) -> str:
    """Stands for your own authentication: a client must not choose its user id."""
    if "x-user-id" not in request.headers:
        raise PermissionDenied
    return request.headers["x-user-id"]


@require_POST
def update_info(request: HttpRequest) -> JsonResponse:
    user_id = current_user(request)
    try:
        update = json.loads(request.body)
    except (ValueError, RecursionError) as error:
        raise BadRequest("the body is not JSON") from error
    syncio.update_user_metadata(user_id, update)
    return JsonResponse({"message": "successfully updated user metadata"})


@require_http_methods(["GET", "DELETE"])
async def user_info(request: HttpRequest) -> JsonResponse:
    user_id = current_user(request)
    if request.method == "DELETE":
        await clear_user_metadata(user_id)
        return JsonResponse({"message": "successfully cleared user metadata"})
    return JsonResponse((await get_user_metadata(user_id)).metadata)


urlpatterns = [path("updateinfo", update_info), path("userinfo", user_info)]
application = get_asgi_application()

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
