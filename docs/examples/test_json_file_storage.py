"""The conformance suite for the example storage."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from json_file_storage import JSONFileStorage

from usermetadata.testing import StorageConformance


class TestJSONFileStorage(StorageConformance):
    """Runs the whole suite over an empty storage."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[JSONFileStorage]:
        """Give each test a new file."""
        storage = JSONFileStorage(tmp_path / "users.json")
        yield storage
        storage.close()
