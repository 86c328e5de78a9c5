"""The conformance suite for storages."""

from __future__ import annotations

from usermetadata.testing.conformance.atomicity import AtomicityConformance
from usermetadata.testing.conformance.connections import ConnectionConformance
from usermetadata.testing.conformance.erasing import ErasureConformance
from usermetadata.testing.conformance.finding import FindingConformance
from usermetadata.testing.conformance.listing import ListingConformance
from usermetadata.testing.conformance.processes import ProcessConformance
from usermetadata.testing.conformance.rows import RowConformance
from usermetadata.testing.conformance.values import ValueConformance


class StorageConformance(
    ConnectionConformance,
    ErasureConformance,
    FindingConformance,
    ListingConformance,
    ProcessConformance,
    AtomicityConformance,
    ValueConformance,
    RowConformance,
):
    """A test for each promise of :class:`usermetadata.storage.Storage`; subclass it.

    The subclass has a fixture ``storage`` that yields an empty storage and closes it. pytest runs
    all tests on that storage. The tests of ``ListingStorage``, ``ErasingStorage`` and
    ``IndexedStorage`` are skipped if the storage does not have their methods.

    These fixtures are optional. If one is missing, the tests that need it are skipped:

    ``second_storage``
        yields a second storage with the same rows as ``storage``, as another process would open it,
        and closes it. The fixture ``usermetadata_process`` opens one in another process.

    ``break_connection``
        returns a function that breaks the connection of ``storage``:
        :meth:`usermetadata.testing.BreakingProxy.break_connection`, or one with the same arguments.

    Attributes:
        timeout: seconds after which a test, including its fixtures, counts as hanging and fails
            with the stacks of all threads; five times as many for a test with thousands of users.
        moment: seconds within which a concurrent call ends unless the storage makes it wait. Raise
            it if a write takes longer.
        indexes: the indexes that an ``IndexedStorage`` has to declare in the fixtures.

    Example:
        The whole of a test file::

            class TestMyStorage(StorageConformance):
                @pytest.fixture
                def storage(self):
                    storage = MyStorage()
                    yield storage
                    storage.close()
    """


__all__ = ["StorageConformance"]
