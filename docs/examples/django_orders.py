"""Orders and metadata in one transaction, with Django.

``python django_orders.py migrate --run-syncdb && python django_orders.py runserver``
"""

import os
import sys

import django
from asgiref.sync import sync_to_async
from django.apps import AppConfig
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.exceptions import PermissionDenied
from django.core.management import execute_from_command_line
from django.db import connection, models, transaction
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views.decorators.http import require_POST

import usermetadata

DATABASE_URL = os.environ.get("DATABASE_URL", "sqlite:///shop.db")


def database() -> dict[str, object]:
    if DATABASE_URL.startswith("sqlite:///"):
        path = DATABASE_URL.removeprefix("sqlite:///")
        return {"ENGINE": "django.db.backends.sqlite3", "NAME": path}
    from psycopg.conninfo import conninfo_to_dict

    options = conninfo_to_dict(DATABASE_URL)
    name = options.pop("dbname")
    return {"ENGINE": "django.db.backends.postgresql", "NAME": name, "OPTIONS": options}


class Shop(AppConfig):
    name = __name__
    label = "shop"

    def ready(self) -> None:
        usermetadata.init(DATABASE_URL)
        self.models_module = sys.modules[__name__]  # in a project: models.py


settings.configure(
    ALLOWED_HOSTS=["localhost"],
    DATABASES={"default": database()},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    INSTALLED_APPS=[f"{__name__}.Shop"],
    ROOT_URLCONF=__name__,
)
django.setup()


class Order(models.Model):
    user_id = models.TextField()
    product = models.TextField()


class PaymentDeclinedError(Exception):
    pass


def current_user(request: HttpRequest) -> str:
    """Stands for your own authentication: a client must not choose its user id."""
    if "x-user-id" not in request.headers:
        raise PermissionDenied
    return request.headers["x-user-id"]


def pay(order: Order) -> None:
    """Stands for what may fail after an order was stored."""
    if order.product == "yacht":
        raise PaymentDeclinedError


@transaction.atomic
def place_order(user_id: str, product: str) -> Order:
    order = Order.objects.create(user_id=user_id, product=product)
    with usermetadata.within(connection) as metadata:
        metadata.update_user_metadata(user_id, {"last_order": order.pk})
    pay(order)
    return order


@require_POST
def buy(request: HttpRequest, product: str) -> JsonResponse:
    try:
        order = place_order(current_user(request), product)
    except PaymentDeclinedError:
        return JsonResponse({"message": "the payment was declined"}, status=402)
    return JsonResponse({"order": order.pk}, status=201)


@transaction.non_atomic_requests  # ATOMIC_REQUESTS does not support async views
async def buy_async(request: HttpRequest, product: str) -> JsonResponse:
    return await sync_to_async(buy)(request, product)


def user_info(request: HttpRequest) -> JsonResponse:
    with usermetadata.within(connection) as metadata:
        return JsonResponse(metadata.get_user_metadata(current_user(request)).metadata)


urlpatterns = [
    path("buy/<product>", buy),
    path("async/buy/<product>", buy_async),
    path("userinfo", user_info),
]
application = get_asgi_application()

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
