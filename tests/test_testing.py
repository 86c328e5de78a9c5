"""``usermetadata.testing``: fixtures for applications, the suite for storage authors."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import textwrap
import threading
from typing import TYPE_CHECKING, Any

import pytest
from json_file_storage import JSONFileStorage

from usermetadata import Index, InMemoryStorage, SQLiteStorage
from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.exceptions import DamagedMetadataError, InvalidInputError, UsageError
from usermetadata.storage import IndexedStorage

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata
    from usermetadata.testing.process import OtherProcess


def test_the_fixture_gives_each_test_its_own_store(pytester: pytest.Pytester) -> None:
    """Pytest finds the fixture; no test sees another test's metadata."""
    pytester.makepyfile(
        """
        import asyncio
        import gc
        import weakref
        import pytest
        from usermetadata import UsageError
        from usermetadata.asyncio import update_user_metadata
        from usermetadata.syncio import get_user_metadata

        storages = []

        @pytest.mark.parametrize("turn", [1, 2])
        def test_theme(usermetadata_storage, turn):
            storages.append(weakref.ref(usermetadata_storage))
            assert get_user_metadata("alice").metadata == {}
            asyncio.run(update("alice", {"turn": turn}))
            assert get_user_metadata("alice").metadata == {"turn": turn}
            assert usermetadata_storage.read(["alice"]) == {"alice": {"turn": turn}}

        async def update(user_id, metadata_update):
            await update_user_metadata(user_id, metadata_update)

        def test_without_it():
            with pytest.raises(UsageError):
                get_user_metadata("alice")

        def test_nothing_is_left():
            gc.collect()
            assert [storage() for storage in storages] == [None, None]
        """
    )
    pytester.runpytest("-W", "error").assert_outcomes(passed=4)


def test_the_fixture_undoes_itself(pytester: pytest.Pytester) -> None:
    """The application's storage is unchanged and back afterwards; its override stays in force."""
    pytester.makepyfile(
        """
        import pytest
        import usermetadata
        from usermetadata import InMemoryStorage, UserMetadataOverrideConfig, UserMetadataRecipe
        from usermetadata.syncio import get_user_metadata, update_user_metadata

        STORAGE = InMemoryStorage()

        def functions(original):
            get_original = original.get_user_metadata
            async def get_user_metadata(user_id, user_context):
                return await get_original(user_id.lower(), user_context)
            original.get_user_metadata = get_user_metadata
            return original

        @pytest.fixture(scope="module", autouse=True)
        def application():
            usermetadata.init(STORAGE, UserMetadataOverrideConfig(functions=functions))
            yield
            UserMetadataRecipe.reset()

        def test_with_it(usermetadata_storage):
            update_user_metadata("alice", {"n": 1})
            assert get_user_metadata("ALICE").metadata == {"n": 1}
            assert STORAGE.read(["alice"]) == {}

        def test_without_it():
            assert UserMetadataRecipe.get_instance().storage is STORAGE
            assert get_user_metadata("ALICE").metadata == {}
        """
    )
    pytester.runpytest("-W", "error").assert_outcomes(passed=2)


# Hypothesis would be imported at the end, which takes as long as all the rest.
QUICK = ["-p", "no:hypothesispytest"]
# What an application's tests have; the plugins of the same names are used as their users do.
SCOPED = """
import pytest
from usermetadata.asyncio import get_user_metadata as get, update_user_metadata as update
from usermetadata.syncio import get_user_metadata, update_user_metadata

def names():
    return [name for name in ("session", "module", "test") if get_user_metadata(name).metadata]

@pytest.fixture(scope="session")
def of_session(usermetadata_session_storage):
    update_user_metadata("session", {"n": 1})

@pytest.fixture(scope="module")
def of_module(usermetadata_module_storage):
    update_user_metadata("module", {"n": 1})

@pytest.fixture
def of_test(usermetadata_storage):
    update_user_metadata("test", {"n": 1})
"""


def test_a_module_has_one_store(pytester: pytest.Pytester) -> None:
    """Its tests see each other's metadata; other modules do not; a test may have its own."""
    tests = """
        def test_first(of_module):
            assert names() == ["module"]
            update_user_metadata("alice", {"n": 1})

        def test_second(of_module):
            assert get_user_metadata("alice").metadata == {"n": 1}

        def test_with_its_own(of_module, of_test):
            assert names() == ["test"]

        def test_without_it(of_module):
            assert names() == ["module"]
            assert get_user_metadata("alice").metadata == {"n": 1}
    """
    for name in ("test_one", "test_two"):
        pytester.makepyfile(**{name: SCOPED + textwrap.dedent(tests)})
    pytester.runpytest("-W", "error").assert_outcomes(passed=8)


def test_a_session_has_one_store(pytester: pytest.Pytester) -> None:
    """It outlives a module's, in whatever order they begin; afterwards the former store is back."""
    pytester.makeconftest(
        SCOPED
        + textwrap.dedent(
            """
            import usermetadata

            usermetadata.init("memory://")
            STORAGE = usermetadata.UserMetadataRecipe.get_instance().storage

            def pytest_unconfigure():
                assert usermetadata.UserMetadataRecipe.get_instance().storage is STORAGE
                assert STORAGE.read(["session", "module", "test"]) == {}
                usermetadata.close()
            """
        )
    )
    begin = "from conftest import *\n"
    pytester.makepyfile(
        test_one=begin
        + textwrap.dedent(
            """
            def test_module_first(of_module):
                assert names() == ["module"]

            def test_then_session(of_module, of_session):
                assert names()

            def test_its_own(of_session, of_test):
                assert names() == ["test"]
            """
        ),
        test_two=begin
        + textwrap.dedent(
            """
            def test_session(of_session):
                update_user_metadata("session", {"n": 2})

            def test_module(of_session, of_module):
                assert names() == ["module"]
            """
        ),
        test_three=begin
        + textwrap.dedent(
            """
            def test_session(of_session):
                update_user_metadata("session", {"m": 3})
                assert get_user_metadata("session").metadata["n"] in (1, 2)
            """
        ),
    )
    pytester.runpytest_subprocess(*QUICK, "-W", "error").assert_outcomes(passed=6)


def test_each_worker_has_its_stores(pytester: pytest.Pytester) -> None:
    """With pytest-xdist, a session's store is that of one worker."""
    pytester.makepyfile(
        SCOPED
        + textwrap.dedent(
            """
            import os

            @pytest.mark.parametrize("turn", range(8))
            def test_it(of_session, of_module, of_test, usermetadata_session_storage, turn):
                assert names() == ["test"]
                worker = os.environ["PYTEST_XDIST_WORKER"]
                rows = usermetadata_session_storage.read_after("", 10)
                assert rows.keys() <= {"session", worker}
                usermetadata_session_storage.write([(worker, lambda old: {})])
            """
        )
    )
    pytester.runpytest_subprocess(*QUICK, "-n", "2").assert_outcomes(passed=8)


def test_coroutines_share_a_modules_store(pytester: pytest.Pytester) -> None:
    """With anyio's plugin, fixtures and tests may be coroutines, each test in another loop."""
    pytester.makepyfile(
        SCOPED
        + textwrap.dedent(
            """
            pytestmark = pytest.mark.anyio

            @pytest.fixture(scope="module")
            def anyio_backend():
                return "asyncio"

            @pytest.fixture(scope="module")
            async def users(usermetadata_module_storage):
                await update("alice", {"n": 1})

            async def test_first(users):
                assert (await get("alice")).metadata == {"n": 1}
                await update("alice", {"n": 2})

            async def test_second(users):
                assert (await get("alice")).metadata == {"n": 2}

            def test_blocking(users):
                assert get_user_metadata("alice").metadata == {"n": 2}

            async def test_with_its_own(users, usermetadata_storage):
                assert (await get("alice")).metadata == {}
            """
        )
    )
    pytester.runpytest("-W", "error").assert_outcomes(passed=4)


def test_a_fresh_store_has_the_applications_indexes(pytester: pytest.Pytester) -> None:
    """Functions that find users work on it as on the application's store."""
    pytester.makepyfile(
        """
        import usermetadata
        from usermetadata import Index
        from usermetadata.syncio import find_user_id, update_user_metadata

        usermetadata.init("memory://", indexes=[Index("customer", unique=True)])

        def test_it(usermetadata_storage):
            update_user_metadata("alice", {"customer": 1})
            assert find_user_id({"customer": 1}) == "alice"

        def test_afterwards():
            assert find_user_id({"customer": 1}) is None
            usermetadata.close()
        """
    )
    pytester.runpytest("-W", "error").assert_outcomes(passed=2)


def test_the_sdk_finds_the_server_in_every_test(pytester: pytest.Pytester) -> None:
    """The SDK keeps its first URL, so all tests get the same URL; the stores are fresh."""
    pytester.makepyfile(
        """
        import pytest
        from supertokens_python import InputAppInfo, SupertokensConfig, init
        from supertokens_python.recipe import usermetadata
        from supertokens_python.recipe.usermetadata.syncio import (
            get_user_metadata,
            update_user_metadata,
        )

        @pytest.mark.parametrize("turn", [1, 2])
        def test_theme(usermetadata_server, turn):
            init(
                app_info=InputAppInfo(
                    app_name="shop",
                    api_domain="http://localhost",
                    website_domain="http://localhost",
                ),
                supertokens_config=SupertokensConfig(usermetadata_server),
                framework="fastapi",
                recipe_list=[usermetadata.init()],
            )
            assert get_user_metadata("alice").metadata == {}
            update_user_metadata("alice", {"turn": turn})
            assert get_user_metadata("alice").metadata == {"turn": turn}
        """
    )
    ran = pytester.runpytest_subprocess(*QUICK)
    ran.assert_outcomes(passed=2)


def test_the_suite_finds_a_faulty_storage(pytester: pytest.Pytester) -> None:
    """A subclass with one fixture runs all tests, and they explain the faults."""
    pytester.makepyfile(
        """
        import pytest
        from usermetadata import InMemoryStorage
        from usermetadata.testing import StorageConformance

        class Forgetful(InMemoryStorage):
            def for_app(self, app_id):
                super().for_app(app_id)
                return self

        class TestForgetful(StorageConformance):
            @pytest.fixture
            def storage(self):
                storage = Forgetful()
                yield storage
                storage.close()
        """
    )
    result = pytester.runpytest("-W", "error")
    outcomes = result.parseoutcomes()
    assert outcomes["failed"] == 10
    assert outcomes["passed"] > 20
    result.stdout.fnmatch_lines(["*test_apps_never_see_each_others_rows*", "E*assert *public*"])


def test_the_suite_says_what_it_skips(pytester: pytest.Pytester) -> None:
    """Without the optional fixtures and protocols the rest of the suite runs, and says so."""
    pytester.makepyfile(
        """
        import pytest
        from json_file_storage import JSONFileStorage
        from usermetadata.testing import StorageConformance

        class WithoutListing(JSONFileStorage):
            read_after = None

        class TestWithoutListing(StorageConformance):
            moment = 0.01

            @pytest.fixture
            def storage(self, tmp_path):
                storage = WithoutListing(tmp_path / "users.json")
                yield storage
                storage.close()
        """
    )
    result = pytester.runpytest("-W", "error", "-rs", "-k", "lists or erased or finds or second")
    outcomes = result.parseoutcomes()
    assert outcomes["skipped"] > 20
    assert "failed" not in outcomes
    for reason in (
        "define the fixture second_storage*",
        "the storage is no ListingStorage*",
        "the storage is no ErasingStorage*",
        "the storage is no IndexedStorage*",
    ):
        result.stdout.fnmatch_lines([f"SKIPPED*{reason}"])


HANGING = """
    import threading
    import pytest
    from usermetadata import InMemoryStorage
    from usermetadata.testing import StorageConformance

    class Hangs(InMemoryStorage):
        def for_app(self, app_id):
            self.wait_for_a_lock()

        def wait_for_a_lock(self):
            threading.Event().wait(30)

    class TestHangs(StorageConformance):
        timeout = 2

        @pytest.fixture
        def storage(self, usermetadata_process):
            usermetadata_process.open(InMemoryStorage)
            storage = Hangs()
            yield storage
            storage.close()
"""


def test_a_hang_ends(pytester: pytest.Pytester) -> None:
    """It fails its test after a stated time, also in the main thread, with all threads' stacks."""
    pytester.makepyfile(HANGING)
    result = pytester.runpytest_subprocess(*QUICK, "-k", "test_an_app_is_found_again")
    result.assert_outcomes(failed=1, deselected=int(result.parseoutcomes()["deselected"]))
    result.stdout.fnmatch_lines(
        [
            "E*the test hangs: something in it has not ended within 2 s.*",
            "E*Thread 'MainThread':",
            "E*in wait_for_a_lock",
            "E*In the other process:",
            "E*in accept",
        ]
    )


def test_a_hang_may_end_while_the_test_connects(
    usermetadata_process: OtherProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process shows its stacks, although another connection is not complete."""
    answer = multiprocessing.connection.answer_challenge
    shown: list[str] = []

    def be_interrupted(connection: Any, key: bytes) -> None:
        monkeypatch.undo()
        shown.append(usermetadata_process.stacks())
        answer(connection, key)

    monkeypatch.setattr(multiprocessing.connection, "answer_challenge", be_interrupted)
    shown.append(usermetadata_process.stacks())
    assert len(shown) == 2
    assert all("in accept" in text for text in shown)


def test_a_test_with_many_users_has_more_time(pytester: pytest.Pytester) -> None:
    """On a busy machine a large write takes longer, and is no hang."""
    hanging = HANGING.replace("def for_app", "def read")
    pytester.makepyfile(hanging.replace("self, app_id", "self, user_ids"))
    result = pytester.runpytest_subprocess(*QUICK, "-k", "read_takes or removes_the_row")
    assert result.parseoutcomes()["failed"] == 2
    result.stdout.fnmatch_lines(["E*not ended within 2 s.*"])
    result.stdout.fnmatch_lines(["E*not ended within 10 s.*"])


def test_an_exception_of_a_thread_fails_the_test(pytester: pytest.Pytester) -> None:
    """The thread's traceback is shown."""
    pytester.makepyfile(
        """
        import threading
        import pytest
        from usermetadata import InMemoryStorage
        from usermetadata.testing import StorageConformance

        class OfOneThread(InMemoryStorage):
            def write(self, changes):
                self.check_thread()
                return super().write(changes)

            def check_thread(self):
                if threading.current_thread() is not threading.main_thread():
                    raise ValueError("created in another thread")

        class TestOfOneThread(StorageConformance):
            @pytest.fixture
            def storage(self):
                return OfOneThread()
        """
    )
    result = pytester.runpytest("-W", "error", "-k", "first_merges_both or any_thread")
    assert result.parseoutcomes()["failed"] == 2
    result.stdout.fnmatch_lines(
        [
            "*def check_thread*",
            "E*ValueError: created in another thread",
            "E*It was raised in a thread that the test has started.",
        ]
    )


@pytest.mark.parametrize("kind", ["Merge", "Modify", "lambda"])
def test_a_storage_in_another_process(
    kind: str, usermetadata_process: OtherProcess, tmp_path: Path
) -> None:
    """Changes and their errors are as in this process; the rows are another process's."""
    changes: dict[str, Change] = {
        "Merge": Merge({"n": 1}),
        "Modify": Modify(lambda old: {**old, "n": 1}),
        "lambda": lambda _: {"n": 1},
    }
    error = LookupError("not today")

    def fail(old: object) -> dict[str, object]:
        raise error

    with contextlib.closing(
        usermetadata_process.open(JSONFileStorage, tmp_path / "users.json")
    ) as storage:
        assert storage.write([("alice", changes[kind]), ("bob", Clear())]) == [{"n": 1}, None]
        assert JSONFileStorage(tmp_path / "users.json").read(["alice"]) == {"alice": {"n": 1}}
        for change in (fail, Modify(fail)):
            with pytest.raises(LookupError) as caught:
                storage.write([("alice", Clear()), ("bob", change)])
            assert caught.value is error
        assert storage.for_app("shop").read(["alice"]) == {}
        with pytest.raises(InvalidInputError, match="app_id"):
            storage.for_app("")
        (tmp_path / "users.json").write_text("no JSON")
        with pytest.raises(DamagedMetadataError) as damaged:
            storage.read(["alice"])
        assert "In the other process:" in damaged.value.__notes__[0]
    with pytest.raises(UsageError):
        storage.read(["alice"])


class Unpicklable(Exception):  # noqa: N818 - as a driver's error may be named
    """An error with other arguments than its class hands on, as drivers have them."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")


class RaisesTheDriversError(InMemoryStorage):
    """Lets the driver's error through, or returns what no process can be sent."""

    def read(self, user_ids: Sequence[str]) -> dict[str, Metadata]:
        if user_ids == ["alice"]:
            raise Unpicklable(1205, "lock wait timeout")
        return {"bob": {"lock": threading.Lock()}}


@pytest.mark.parametrize(("user", "text"), [("alice", "Unpicklable"), ("bob", "cannot pickle")])
def test_an_error_that_cannot_be_pickled_is_shown(
    usermetadata_process: OtherProcess, user: str, text: str
) -> None:
    """Whatever a storage in another process raises or returns ends the call and can be read."""
    with contextlib.closing(usermetadata_process.open(RaisesTheDriversError)) as storage:
        for _ in range(2):
            with pytest.raises((RuntimeError, TypeError), match=text) as caught:
                storage.read([user])
            [note] = caught.value.__notes__
            assert "lock wait timeout" in note or user == "bob"


def test_an_indexed_storage_in_another_process(
    usermetadata_process: OtherProcess, tmp_path: Path
) -> None:
    """A storage in another process has all methods of an ``IndexedStorage``."""
    path, plan = tmp_path / "users.db", Index("plan")
    with contextlib.closing(SQLiteStorage(path)) as here:
        here.write([("alice", Replace({"plan": "pro"}))])
    with contextlib.closing(
        usermetadata_process.open(SQLiteStorage, path, indexes=[plan])
    ) as there:
        assert isinstance(there, IndexedStorage)
        done: list[tuple[int, int]] = []
        assert there.build_indexes(lambda at, of: done.append((at, of))) == []
        assert done[-1] == (1, 1)
        assert there.stored_indexes() == there.indexes == (plan,)
        assert there.find({"plan": "pro"}, "", 10) == {"alice": {"plan": "pro"}}
        there.drop_index("plan")
        assert there.stored_indexes() == ()
        assert there.build_indexes() == []
