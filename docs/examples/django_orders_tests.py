"""Tests of ``django_orders``; they use Django's test database, also for metadata."""

from django.test import TestCase
from django_orders import Order

ALICE = {"x-user-id": "alice"}


class BuyTests(TestCase):
    def test_buying(self) -> None:
        order = self.client.post("/buy/tea", headers=ALICE).json()["order"]
        assert self.client.get("/userinfo", headers=ALICE).json() == {"last_order": order}

    async def test_buying_in_an_async_view(self) -> None:
        answer = await self.async_client.post("/async/buy/tea", headers=ALICE)
        order = answer.json()["order"]
        assert (await self.async_client.get("/userinfo", headers=ALICE)).json() == {
            "last_order": order
        }

    def test_declined_payment(self) -> None:
        assert self.client.post("/buy/yacht", headers=ALICE).status_code == 402
        assert not Order.objects.exists()
        assert self.client.get("/userinfo", headers=ALICE).json() == {}
