"""For tests: in-memory stores, and the conformance suite for storages.

pytest finds the fixtures by itself where this library is installed.
"""

from __future__ import annotations

import pytest

# pyright: reportPrivateUsage=false

pytest.register_assert_rewrite("usermetadata.testing.conformance")

from usermetadata.testing.conformance import StorageConformance  # noqa: E402 - after the call above
from usermetadata.testing.fixtures import (  # noqa: E402 - likewise
    _usermetadata_served,
    usermetadata_module_storage,
    usermetadata_process,
    usermetadata_server,
    usermetadata_session_storage,
    usermetadata_storage,
)
from usermetadata.testing.process import OtherProcess  # noqa: E402 - likewise
from usermetadata.testing.proxy import BreakingProxy  # noqa: E402 - likewise

__all__ = [
    "BreakingProxy",
    "OtherProcess",
    "StorageConformance",
    "_usermetadata_served",
    "usermetadata_module_storage",
    "usermetadata_process",
    "usermetadata_server",
    "usermetadata_session_storage",
    "usermetadata_storage",
]
