"""The conformance suite for the example storage."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from json_file_storage import JSONFileStorage

from usermetadata import Storage
from usermetadata.testing import OtherProcess, StorageConformance


class TestJSONFileStorage(StorageConformance):
    """Runs the whole suite over an empty storage."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[Storage]:
        """Give each test a new file."""
        with closing(JSONFileStorage(tmp_path / "users.json")) as storage:
            yield storage

    @pytest.fixture
    def second_storage(
        self, usermetadata_process: OtherProcess, tmp_path: Path
    ) -> Iterator[Storage]:
        """Open the same file in another process."""
        path = tmp_path / "users.json"
        with closing(usermetadata_process.open(JSONFileStorage, path)) as storage:
            yield storage
