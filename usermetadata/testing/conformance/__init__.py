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
    all of these tests over it. The tests of ``ListingStorage``, ``ErasingStorage`` and
    ``IndexedStorage`` are skipped if the storage has not their methods.

    These fixtures are optional. Without one, the tests that need it are skipped:

    ``second_storage``
        yields a second storage over the rows of ``storage``, as another process has it, and closes
        it. The fixture ``usermetadata_process`` opens one in another process.

    ``break_connection``
        returns a function that breaks the connection of ``storage``:
        :meth:`usermetadata.testing.BreakingProxy.break_connection`, or another one with its
        arguments.

    Attributes:
        timeout: seconds after which a test counts as hanging, and fails with the stacks of all
            threads. Its fixtures are included.
        moment: seconds in which a concurrent call would be over if the storage did not make it
            wait. Raise it for a storage that needs longer for a write.
        indexes: what an ``IndexedStorage`` declares in its fixtures.

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
