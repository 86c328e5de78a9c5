"""The tests of the tutorial's program: ``pytest``."""

import pytest
from fastapi.testclient import TestClient
from tutorial_app import app

from usermetadata.syncio import get_user_metadata, update_user_metadata

pytestmark = pytest.mark.usefixtures("usermetadata_storage")
client = TestClient(app)
ALICE = {"x-user-id": "alice"}


def test_users_cannot_choose_their_plan() -> None:
    client.patch("/preferences", json={"plan": "pro"}, headers=ALICE)
    assert get_user_metadata("alice").metadata == {}


def test_stripe_ends_a_subscription() -> None:
    update_user_metadata("alice", {"plan": "pro", "stripe_customer_id": "cus_1"})
    event = {"data": {"object": {"customer": "cus_1", "status": "canceled"}}}
    assert client.post("/stripe", json=event).json() == {"alice": "free"}
    assert get_user_metadata("alice").metadata["plan"] == "free"
