"""For tests: in-memory stores, and the conformance suite for storages.

pytest finds the fixtures automatically where this library is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from usermetadata.testing.fixtures import (
    _usermetadata_served,  # pyright: ignore[reportPrivateUsage]
    usermetadata_module_storage,
    usermetadata_process,
    usermetadata_server,
    usermetadata_session_storage,
    usermetadata_storage,
)
from usermetadata.testing.process import OtherProcess
from usermetadata.testing.proxy import BreakingProxy

if TYPE_CHECKING:
    from usermetadata.testing.conformance import StorageConformance

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

pytest.register_assert_rewrite("usermetadata.testing.conformance")


def __getattr__(name: str) -> object:
    """Import the suite on first use: pytest imports this module in every application's tests."""
    if name == "StorageConformance":
        from usermetadata.testing.conformance import StorageConformance

        return StorageConformance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
