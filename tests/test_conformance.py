"""The conformance suite: every storage passes it, and every planted fault fails it."""

from __future__ import annotations

import contextlib
import inspect
import re
import sqlite3
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from faulty_storages import (
    AbsentIsEmpty,
    AcknowledgesEarly,
    AnswersWhatWasDropped,
    AnswersWithoutWaiting,
    BeginsPagesWithTheLast,
    BeginsVersionsAnew,
    BoundToOneThread,
    Caches,
    CallsChangesInACoroutine,
    ChecksEachChange,
    ChecksNothing,
    ClearsToEmpty,
    ClosesForAll,
    ClosesItsOwnAppOnly,
    ClosesOnce,
    CommitsEachUser,
    CommitsInChunks,
    ComparesEmojiAlike,
    CountsWrites,
    CreatesATableForEachApp,
    CutsApps,
    CutsIds,
    CutsLargeObjects,
    DecodesOnce,
    EmptyIndexWhenClosed,
    EmptyIsAbsent,
    EmptyWhenClosed,
    ErasesBeforeItChecks,
    ErasesLike,
    ErasesOneApp,
    ErasesWithoutALock,
    FailsOnNothing,
    FillsItsCacheLate,
    FindsByDoubles,
    FindsByEquality,
    FindsByText,
    FindsByTheFirst,
    FindsFormerUsers,
    FindsInAllApps,
    FindsInTheOrderOfWriting,
    FindsInTwoSteps,
    FoldsApps,
    ForgetsApps,
    ForgetsWhichApp,
    HalfLocked,
    HangsInADeadlock,
    HasManyParameters,
    IndexesAnything,
    JoinsTheIds,
    JoinsTheIdsByABar,
    JoinsTheIdsByAColon,
    JoinsTheIdsByAControlCharacter,
    JoinsTheIdsByASlash,
    KeepsABrokenConnection,
    KeepsResults,
    KeepsTheVersion,
    KnowsOnlyItsChanges,
    LeaksErrorsOfConnecting,
    LeaksErrorsOfReads,
    LeaksTheDriversErrors,
    LeaksWhenClosed,
    LeavesAProcessLocked,
    LeavesItselfLocked,
    LetsWritersMeet,
    ListsAllApps,
    ListsAnyCase,
    LocksInTheOrderOfTheCall,
    LocksOneInstance,
    LocksOneInstanceLong,
    LocksOneProcess,
    LocksTheFirstUser,
    LooksBeforeItWrites,
    LooksInOneInstance,
    MergesAsDoubles,
    MergesByItself,
    MergesByPath,
    MergesDeeply,
    ModifiesNothing,
    NeedsTheLastUser,
    NeverCloses,
    NeverCommits,
    NormalisesIds,
    NumbersApps,
    OneChangePerUser,
    OpensAfterClosing,
    OtherIds,
    PagesByOffset,
    PagesFoundByOffset,
    ReadsElsewhere,
    ReadsFewUsers,
    ReadsFromASnapshot,
    ReadsInChunks,
    ReadsInLongChunks,
    ReadsManyFromAllApps,
    ReadsOneByOne,
    Remote,
    RepeatsMerges,
    RepeatsOnItsOwnResults,
    RepeatsWhatWasDone,
    ReplaceMerges,
    ReplacesInTheOrderOfTheCall,
    RoundsNumbers,
    RoundsWhatIsMerged,
    RoundsWhatIsThere,
    SaysThatNothingWasDone,
    SetsTheAppOfItsConnection,
    SharesLists,
    SharesObjects,
    SharesWhatWasErased,
    SharesWhatWasFound,
    SharesWithin,
    ShowsHalf,
    StopsItsThread,
    StoresInChunks,
    StoresWhatWasInterrupted,
    TakesAChangesErrorForItsOwn,
    TakesAnyApp,
    TrimsIds,
    Unlocked,
    WrapsErrors,
    WritesBackwards,
    WritesElsewhere,
    WritesFewUsers,
    WritesFromItsCache,
    WritesTogether,
)
from json_file_storage import JSONFileStorage
from postgres_proxy import address_of
from postgres_server import empty_schema, server_url
from psycopg.conninfo import make_conninfo
from sqlite_utils import Database

from usermetadata import InMemoryStorage, PostgresStorage, SQLiteStorage
from usermetadata.changes import Merge, Replace
from usermetadata.testing import BreakingProxy, StorageConformance
from usermetadata.testing.conformance.atomicity import BLIND_WRITES
from usermetadata.testing.conformance.connections import ConnectionConformance
from usermetadata.testing.conformance.finding import FindingConformance
from usermetadata.testing.conformance.suite import Suite

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from usermetadata import Storage
    from usermetadata.testing.process import OtherProcess


KINDS = [
    *("memory, indexed", "sqlite file, indexed", "sqlite memory", "sqlite borrowed"),
    *("postgres", "postgres portable"),
]


class Storages(Suite):
    """The fixtures of the suite for this library's storages."""

    @pytest.fixture
    def opened(
        self,
        request: pytest.FixtureRequest,
        storage_kind: str,
        tmp_path: Path,
        usermetadata_process: OtherProcess,
    ) -> Generator[Opened, None, None]:
        with contextlib.ExitStack() as stack:
            kind, _, indexed = storage_kind.partition(", ")
            arguments: dict[str, Any] = {"indexes": self.indexes} if indexed else {}
            opened = Opened(InMemoryStorage(**arguments))
            if kind == "sqlite file":
                path = tmp_path / "users.db"
                opened = Opened(
                    SQLiteStorage(path, **arguments),
                    lambda: usermetadata_process.open(SQLiteStorage, path, **arguments),
                )
            elif kind == "sqlite memory":
                opened = Opened(SQLiteStorage(":memory:", **arguments))
            elif kind == "sqlite borrowed":
                connection = sqlite3.connect(":memory:", check_same_thread=False)
                stack.enter_context(contextlib.closing(connection))
                opened = Opened(SQLiteStorage(Database(connection), **arguments))
            elif kind.startswith("postgres"):
                arguments["statements"] = kind.partition(" ")[2] or None
                arguments["schema"] = stack.enter_context(empty_schema())
                # What passes through the proxy costs this process more than the rest of a test.
                breaks = "break_connection" in request.fixturenames
                proxy = request.getfixturevalue("proxy") if breaks else None
                opened = Opened(
                    PostgresStorage(through(proxy) if proxy else server_url(), **arguments),
                    lambda: usermetadata_process.open(PostgresStorage, server_url(), **arguments),
                    proxy,
                )
            stack.enter_context(contextlib.closing(opened.storage))
            yield opened

    @pytest.fixture
    def storage(self, opened: Opened) -> Storage:
        return opened.storage

    @pytest.fixture
    def second_storage(self, opened: Opened) -> Generator[Storage, None, None]:
        if opened.open_second is None:
            pytest.skip("no second storage can have these rows")
        with contextlib.closing(opened.open_second()) as storage:
            yield storage

    @pytest.fixture
    def break_connection(self, opened: Opened) -> Any:
        if opened.proxy is None:
            pytest.skip("there is no connection")
        return opened.proxy.break_connection


class TestEveryStorage(Storages, StorageConformance):
    """All storages keep all promises; those of a server also if connections break."""

    @pytest.fixture(params=KINDS)
    def storage_kind(self, request: pytest.FixtureRequest) -> str:
        kind: str = request.param
        return kind


class TestPostgresWithIndexes(Storages, FindingConformance):
    """PostgreSQL finds users, and has other statements where nothing is indexed."""

    @pytest.fixture
    def storage_kind(self) -> str:
        return "postgres, indexed"


class Opened(NamedTuple):
    storage: Storage
    open_second: Callable[[], Storage] | None = None
    proxy: BreakingProxy | None = None


@pytest.fixture(scope="module")
def proxy() -> Generator[BreakingProxy, None, None]:
    """A network between the storage and the PostgreSQL server."""
    with contextlib.closing(BreakingProxy(address_of(server_url()))) as proxy:
        yield proxy


def through(proxy: BreakingProxy) -> str:
    """Return the server's URL, with the proxy in between."""
    return make_conninfo(
        server_url(), host=proxy.host, port=proxy.port, sslmode="disable", gssencmode="disable"
    )


class TestRemote(ConnectionConformance):
    """The base of the faults below keeps its promises."""

    @pytest.fixture
    def storage(self) -> Remote:
        return Remote()

    @pytest.fixture
    def second_storage(self, storage: Remote) -> Storage:
        return storage.second()

    @pytest.fixture
    def break_connection(self, storage: Remote) -> Any:
        return storage.break_connection


# The tests of the suite, and the faulty storages that must fail each.
PLANTED_FAULTS: dict[str, list[type[Any]]] = {
    "test_a_user_without_a_row_is_absent": [AbsentIsEmpty],
    "test_an_empty_object_is_a_row": [EmptyIsAbsent],
    "test_none_removes_the_row": [ClearsToEmpty],
    "test_read_takes_any_number_of_users": [ReadsFewUsers, HasManyParameters],
    "test_write_takes_any_number_of_users": [WritesFewUsers],
    "test_merge_overwrites_root_properties": [MergesDeeply],
    "test_replace_forgets_what_was_there": [ReplaceMerges],
    "test_modify_is_given_the_stored_metadata": [ModifiesNothing],
    "test_any_callable_is_a_change": [KnowsOnlyItsChanges],
    "test_changes_apply_in_order": [WritesBackwards, OneChangePerUser],
    "test_writing_nothing_is_nothing": [FailsOnNothing],
    "test_values_come_back_exactly": [
        RoundsNumbers,
        MergesAsDoubles,
        RoundsWhatIsMerged,
        RoundsWhatIsThere,
    ],
    "test_property_names_are_told_apart": [MergesByPath],
    "test_large_objects_come_back_exactly": [CutsLargeObjects],
    "test_user_ids_are_told_apart": [
        OtherIds,
        TrimsIds,
        NormalisesIds,
        CutsIds,
        ComparesEmojiAlike,
    ],
    "test_a_failing_change_undoes_the_whole_write": [
        Unlocked,
        WrapsErrors,
        TakesAChangesErrorForItsOwn,
        StoresWhatWasInterrupted,
        CallsChangesInACoroutine,
    ],
    "test_a_write_of_many_users_is_whole": [CommitsInChunks, StoresInChunks],
    "test_a_failing_write_fails_alone": [WritesTogether],
    "test_a_storage_works_after_a_failed_write": [LeavesItselfLocked],
    "test_no_write_comes_between": [Unlocked],
    "test_no_blind_write_comes_between": [BeginsVersionsAnew, KeepsTheVersion],
    "test_a_reader_sees_all_of_a_write_or_nothing": [HalfLocked],
    "test_any_thread_may_use_the_storage": [BoundToOneThread],
    "test_what_was_acknowledged_is_stored": [
        AcknowledgesEarly,
        NeverCommits,
        AnswersWhatWasDropped,
    ],
    "test_concurrent_writes_are_all_kept": [LetsWritersMeet],
    "test_a_storage_that_never_waits_does_not_block": [ReadsElsewhere, WritesElsewhere],
    "test_for_app_does_not_block": [CreatesATableForEachApp],
    "test_what_appears_twice_is_two": [SharesWithin],
    "test_what_read_returns_is_the_callers": [SharesObjects],
    "test_what_write_returns_is_the_callers": [SharesObjects],
    "test_results_share_nothing": [DecodesOnce],
    "test_what_a_change_returned_is_its_own": [SharesObjects],
    "test_what_a_change_is_given_is_its_own": [SharesObjects],
    "test_two_first_merges_both_survive": [MergesByItself],
    "test_a_read_is_of_one_moment": [ReadsOneByOne, FillsItsCacheLate],
    "test_a_read_does_not_bring_an_old_row_back": [FillsItsCacheLate],
    "test_apps_are_told_apart": [
        JoinsTheIds,
        JoinsTheIdsByAColon,
        JoinsTheIdsByASlash,
        JoinsTheIdsByABar,
        JoinsTheIdsByAControlCharacter,
        FoldsApps,
        CutsApps,
    ],
    "test_apps_are_apart_in_calls_for_many_users": [ReadsManyFromAllApps],
    "test_apps_do_not_share_a_write": [SetsTheAppOfItsConnection],
    "test_apps_never_see_each_others_rows": [ForgetsApps],
    "test_an_app_is_found_again": [ForgetsWhichApp],
    "test_an_app_id_is_checked": [TakesAnyApp],
    "test_a_closed_storage_says_so": [NeverCloses, ClosesOnce, ClosesItsOwnAppOnly],
    "test_a_storage_may_be_closed_before_its_first_call": [OpensAfterClosing],
    "test_every_user_of_a_write_is_locked": [LocksTheFirstUser],
    "test_a_change_that_is_called_again_starts_anew": [RepeatsOnItsOwnResults],
    "test_functions_in_opposite_order_do_not_deadlock": [
        LocksInTheOrderOfTheCall,
        HangsInADeadlock,
        KeepsResults,
    ],
    "test_writes_in_opposite_order_do_not_deadlock": [
        LocksInTheOrderOfTheCall,
        ReplacesInTheOrderOfTheCall,
    ],
    "test_a_read_of_many_users_is_of_one_moment": [ReadsInChunks, ReadsInLongChunks],
    "test_closing_leaks_no_other_error": [LeaksWhenClosed],
    "test_closing_in_the_middle_of_a_write": [StopsItsThread],
    "test_a_second_storage_reads_what_was_acknowledged": [Caches, ReadsFromASnapshot],
    "test_a_second_storage_has_the_same_apps": [NumbersApps],
    "test_each_change_is_given_what_the_other_storage_wrote": [WritesFromItsCache],
    "test_no_write_of_a_second_storage_comes_between": [LocksOneInstance, LocksOneProcess],
    "test_no_blind_write_of_a_second_storage_comes_between": [
        BeginsVersionsAnew,
        KeepsTheVersion,
    ],
    "test_every_user_is_locked_for_a_second_storage": [LocksTheFirstUser],
    "test_a_change_that_meets_a_second_storage_starts_anew": [RepeatsOnItsOwnResults],
    "test_a_second_storage_sees_all_of_a_write_or_nothing": [ShowsHalf],
    "test_two_storages_do_not_deadlock": [LocksInTheOrderOfTheCall],
    "test_two_storages_do_not_deadlock_with_many_users": [LocksInTheOrderOfTheCall],
    "test_writes_of_two_storages_are_all_kept": [LocksOneInstanceLong],
    "test_first_merges_of_two_storages_both_survive": [LocksOneInstanceLong],
    "test_a_read_is_of_one_moment_of_a_second_storage": [ReadsInChunks],
    "test_a_failed_write_leaves_nothing_locked_for_a_second_storage": [LeavesAProcessLocked],
    "test_closing_one_storage_leaves_the_second_open": [ClosesForAll],
    "test_pages_have_each_user_once": [BeginsPagesWithTheLast, ListsAnyCase],
    "test_a_page_may_begin_after_a_user_who_is_gone": [NeedsTheLastUser],
    "test_an_app_lists_its_own_users": [ListsAllApps],
    "test_listing_misses_no_user_while_others_write": [PagesByOffset],
    "test_what_was_listed_is_the_callers": [SharesLists],
    "test_a_second_storage_lists_what_was_acknowledged": [SharesLists],
    "test_a_closed_storage_lists_no_user": [EmptyWhenClosed],
    "test_a_user_is_erased_in_all_apps": [ErasesOneApp],
    "test_only_that_user_is_erased": [ErasesLike],
    "test_an_erasure_that_is_refused_removes_nothing": [ErasesBeforeItChecks],
    "test_no_write_comes_between_an_erasure": [ErasesWithoutALock],
    "test_no_write_of_a_second_storage_comes_between_an_erasure": [ErasesWithoutALock],
    "test_what_was_erased_is_the_callers": [SharesWhatWasErased],
    "test_a_closed_storage_erases_no_user": [EmptyWhenClosed],
    "test_values_differ_in_type_and_text": [FindsByEquality, FindsByText, FindsByDoubles],
    "test_what_cannot_be_indexed_is_refused": [IndexesAnything],
    "test_every_property_has_to_match": [FindsByTheFirst],
    "test_a_user_is_found_by_what_is_stored": [FindsFormerUsers],
    "test_users_are_counted": [CountsWrites],
    "test_pages_of_found_users_follow_the_listing": [FindsInTheOrderOfWriting],
    "test_finding_misses_no_user_while_others_write": [PagesFoundByOffset],
    "test_what_is_found_is_of_one_moment": [FindsInTwoSteps],
    "test_an_app_finds_its_own_users": [FindsInAllApps],
    "test_what_was_found_is_the_callers": [SharesWhatWasFound],
    "test_a_value_belongs_to_one_user": [ChecksNothing],
    "test_only_the_end_of_a_write_counts": [ChecksEachChange],
    "test_threads_race_for_a_value": [LooksBeforeItWrites],
    "test_two_storages_race_for_a_value": [LooksInOneInstance],
    "test_a_second_storage_finds_what_was_acknowledged": [SharesWhatWasFound],
    "test_a_closed_storage_finds_no_user": [EmptyIndexWhenClosed],
    "test_a_broken_connection_does_nothing_twice": [
        RepeatsWhatWasDone,
        SaysThatNothingWasDone,
        LeaksTheDriversErrors,
        KeepsABrokenConnection,
        CommitsEachUser,
        AnswersWithoutWaiting,
    ],
    "test_a_broken_connection_writes_all_or_nothing": [CommitsEachUser, SaysThatNothingWasDone],
    "test_what_may_have_been_done_is_not_repeated": [RepeatsMerges],
    "test_a_read_survives_a_broken_connection": [LeaksErrorsOfReads],
    "test_an_error_while_connecting_is_translated": [LeaksErrorsOfConnecting],
    "test_threads_count_what_was_done": [RepeatsWhatWasDone],
}
# The arguments besides the storages, if a test has any.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "test_values_come_back_exactly": {"values": [2**53 + 1, [], {}]},
    "test_no_write_comes_between": {"row": True},
    "test_no_write_of_a_second_storage_comes_between": {"row": False},
    "test_no_blind_write_comes_between": {"changes": BLIND_WRITES["clear and merge"]},
    "test_no_blind_write_of_a_second_storage_comes_between": {
        "changes": BLIND_WRITES["clear and merge"]
    },
    "test_a_read_of_many_users_is_of_one_moment": {"between": 3000},
    "test_every_user_of_a_write_is_locked": {"which": "the last user"},
    "test_every_user_is_locked_for_a_second_storage": {"which": "a user whose change comes later"},
    "test_writes_in_opposite_order_do_not_deadlock": {"change": Merge({"m": 1})},
    "test_two_storages_do_not_deadlock_with_many_users": {"change": Merge({"m": 1})},
    "test_a_read_is_of_one_moment_of_a_second_storage": {"between": 3000},
    "test_a_failing_change_undoes_the_whole_write": {"error": LookupError()},
    "test_a_closed_storage_says_so": {"which": "the other"},
    "test_values_differ_in_type_and_text": {"name": "plan"},
    "test_what_cannot_be_indexed_is_refused": {"value": []},
    "test_a_broken_connection_does_nothing_twice": {"phase": "after sending"},
    "test_a_broken_connection_writes_all_or_nothing": {"phase": "after sending", "change": Merge},
    "test_a_read_survives_a_broken_connection": {"phase": "after sending"},
    "test_an_error_while_connecting_is_translated": {"method": "read"},
}
# The arguments with which only one fault is found.
SPECIAL: dict[Any, dict[str, Any]] = {
    StoresWhatWasInterrupted: {"error": KeyboardInterrupt()},
    TakesAChangesErrorForItsOwn: {"error": ConnectionResetError()},
    CallsChangesInACoroutine: {"error": StopIteration()},
    KeepsTheVersion: {"changes": BLIND_WRITES["replace"]},
    ReplacesInTheOrderOfTheCall: {"change": Replace({"m": 1})},
    ReadsInLongChunks: {"between": 70_000},
    AnswersWithoutWaiting: {"phase": "before sending"},
}


class Impatient(StorageConformance):
    """The suite, for storages that hang; the others may be slow on a busy machine."""

    timeout = 1


def failure_of(test: str, fault: type[Any], process: OtherProcess, folder: Path) -> str:
    """Return the text with which a test of the suite finds a fault."""
    arguments: dict[str, Any] = dict(SPECIAL.get(fault, ARGUMENTS.get(test, {})))
    if issubclass(fault, JSONFileStorage):
        opens: Any = fault
        arguments["storage"] = opens(folder / "users.json")
        arguments["second_storage"] = process.open(opens, folder / "users.json")
    else:
        arguments["storage"] = fault()
        if hasattr(fault, "second"):
            arguments["second_storage"] = arguments["storage"].second()
        if hasattr(fault, "break_connection"):
            arguments["break_connection"] = arguments["storage"].break_connection
    suite = Impatient if "hangs" in getattr(fault, "finds", "") else StorageConformance
    method = getattr(suite(), test)
    names = inspect.signature(method).parameters
    try:
        method(**{name: each for name, each in arguments.items() if name in names})
    except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - it is what is tested
        return "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
    except pytest.skip.Exception as skipped:
        pytest.fail(f"the test was skipped: {skipped}")
    pytest.fail("the fault was not found")


@pytest.mark.parametrize(
    ("test", "fault"),
    [(test, fault) for test, faults in PLANTED_FAULTS.items() for fault in faults],
)
def test_a_planted_fault_fails_the_suite(
    test: str, fault: type[Any], usermetadata_process: OtherProcess, tmp_path: Path
) -> None:
    """The suite finds a storage that breaks a promise, and its text leads to the fault."""
    text = failure_of(test, fault, usermetadata_process, tmp_path)
    assert re.search(getattr(fault, "finds", ""), text)


def test_every_promise_has_a_planted_fault() -> None:
    """Every test of the suite can fail."""
    tests = {name for name in dir(StorageConformance) if name.startswith("test_")}
    assert tests == set(PLANTED_FAULTS)
