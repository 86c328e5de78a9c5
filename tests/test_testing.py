"""``usermetadata.testing``: fixtures for applications, the suite for storage authors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


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
    # Hypothesis would be imported at the end, which takes as long as all the rest.
    ran = pytester.runpytest_subprocess("-p", "no:hypothesispytest")
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
    assert outcomes["failed"] == 3
    assert outcomes["passed"] > 20
    result.stdout.fnmatch_lines(["*test_apps_never_see_each_others_rows*", "E*assert *public*"])
