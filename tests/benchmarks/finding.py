"""Finding users by indexes: lookups, pages and counts against gets, and what an index costs.

``python tests/benchmarks/finding.py`` measures only this and writes ``finding.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import sqlite3
import sys
import tempfile
import time
import tracemalloc
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import psycopg
from lone import HandTuned
from measuring import Measuring
from report import Report, relative

from usermetadata import Index, InMemoryStorage, PostgresStorage, SQLiteStorage, UserMetadata
from usermetadata.changes import Replace

# The tests' server.
sys.path.append(str(Path(__file__).parent.parent))
from postgres_server import (
    empty_schema,
    server_url,
    server_version,
    stop_servers,
    with_parameters,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from measuring import Times

PLAN, CUSTOMER = Index("plan"), Index("stripe_customer_id", unique=True)
QUICK, THOROUGH = Measuring(0.01, 3), Measuring(0.05, 41)
FEW = 1000
# Every tenth user is on the plan pro.
ROW = """
    '{"plan":"' || CASE n - n / 10 * 10 WHEN 0 THEN 'pro' ELSE 'free' END
    || '","stripe_customer_id":"cus_' || n || '","theme":"dark","language":"en",'
    || '"notifications":{"email":true},"visits":0,"stripe":"none"}'
"""
FILL_SQLITE = f"""
WITH RECURSIVE numbers (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers LIMIT ?)
INSERT INTO user_metadata (app_id, user_id, user_metadata)
SELECT 'public', printf('user %07d', n), {ROW} FROM numbers
"""
FILL_POSTGRES = f"""
INSERT INTO user_metadata (app_id, user_id, user_metadata)
SELECT 'public', 'user ' || to_char(n, 'FM0000000'), {ROW}
FROM generate_series(0, %s - 1) AS n
"""
HOT = """
SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relid = 'user_metadata'::regclass
"""

Store = UserMetadata[dict[str, Any], dict[str, Any]]


def user(number: int, users: int) -> str:
    """Return the id of a stored user, in random order."""
    return f"user {number * 7919 % users:07}"


class Finding:
    """The measurements.

    Args:
        measuring: how long and how often.
        many: how many users the large tables have.
        folder: where ``finding.md`` is written.
        progress: called with what is being measured.

    Attributes:
        aims: what was measured, the aim, and the value.
    """

    def __init__(
        self, measuring: Measuring, many: int, folder: Path, progress: Callable[[str], None]
    ) -> None:
        self.measuring = measuring
        self.many = many
        self.report = Report(folder)
        self.progress = progress
        self.aims: list[tuple[str, float, float]] = []
        self.notes: list[str] = []

    def run(self) -> None:
        """Measure everything and write the page."""
        self.report.say(
            f"Measured with CPython {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
            f" and PostgreSQL {server_version()}; {self.many:,} users of 150 B, updates of {FEW:,}."
        )
        with tempfile.TemporaryDirectory() as folder:
            self.questions("SQLite", partial(sqlite, Path(folder)), count_aim=20)
        self.questions("PostgreSQL", postgres, count_aim=200)
        self.updates_on_sqlite("NORMAL")
        self.updates_on_sqlite("FULL")
        self.updates_on_postgres()
        self.memory()
        self.report.table(
            ["figure", "aim", "measured", "reached"],
            [
                [figure, f"≤ {aim:g}", f"{value:.2f}", "yes" if value <= aim else "**no**"]
                for figure, aim, value in self.aims
            ],
        )
        for note in self.notes:
            self.report.say(note)
        self.report.write("finding.md")

    def questions(
        self,
        database: str,
        opened: Callable[[int], contextlib.AbstractContextManager[Store]],
        count_aim: float,
    ) -> None:
        """Find, list and count in tables of both sizes, in turns."""
        with contextlib.ExitStack() as stack:
            stores: dict[int, Store] = {}
            for users in (FEW, self.many):
                self.progress(f"{database}, {users:,} users")
                begin = time.perf_counter()
                stores[users] = stack.enter_context(opened(users))
                took = time.perf_counter() - begin
            self.notes.append(
                f"{database}: to store {self.many:,} users by SQL, and to build two indexes with"
                f" `python -m usermetadata index`, took {took:.0f} s."
            )
            self.progress(f"{database}, find and get")
            calls: dict[str, Callable[[int], object]] = {}
            for users, store in stores.items():
                calls[f"find, {users:,}"] = partial(find, store, users)
                calls[f"get, {users:,}"] = partial(get, store, users)
            times = self.measuring.alone(calls)
            self.compare(database, "find a user by a unique value, against", times, 1.5)
            self.progress(f"{database}, pages and counts")
            store = stores[self.many]
            times = self.measuring.alone(
                {
                    "100 gets": partial(get_100, store, self.many),
                    "page of some": lambda number: store.syncio.list_user_metadata(
                        {"plan": "pro"}, after=user(number, self.many // 2)
                    ),
                    "page of all": lambda number: store.syncio.list_user_metadata(
                        after=user(number, self.many // 2)
                    ),
                    "count": lambda _: store.syncio.count_user_metadata({"plan": "pro"}),
                }
            )
        for page in ("page of some", "page of all"):
            ratio = relative(times, page, "100 gets")
            self.aims.append((f"{database}: {page}, 100 users, against 100 gets", 0.2, ratio))
        figure = f"{database}: count of {self.many // 10:,} matches, milliseconds"
        self.aims.append((figure, count_aim, median(times["count"]) * 1000))

    def compare(self, database: str, what: str, times: Times, aim: float) -> None:
        """Add the ratios of finding."""
        few, many = f"{FEW:,}", f"{self.many:,}"
        ratio = relative(times, f"find, {many}", f"get, {many}")
        self.aims.append((f"{database}: {what} a get, both of {many} users", aim, ratio))
        ratio = relative(times, f"find, {many}", f"find, {few}")
        self.aims.append((f"{database}: {what} the same of {few} users", aim, ratio))
        self.notes.append(
            f"{database}: microseconds of a lookup and of a get, by the number of users: "
            + "; ".join(f"{name}: {us(each)}" for name, each in times.items())
            + "."
        )

    def updates(self, name: str, stores: dict[str, Store], number_of_calls: list[int]) -> None:
        """Updates in tables without and with an index of ``plan``."""

        def update(store: Store, property_: str, number: int) -> None:
            number_of_calls[0] += 1
            value = f"{property_} {number_of_calls[0]}"
            store.syncio.update_user_metadata(user(number, FEW), {property_: value})

        plain, indexed = stores["without"], stores["with"]
        times = self.measuring.alone(
            {
                "without": partial(update, plain, "theme"),
                "another": partial(update, indexed, "theme"),
                "that": partial(update, indexed, "plan"),
            }
        )
        for what, aim in (("another", 1.1), ("that", 1.6)):
            ratio = relative(times, what, "without")
            figure = f"{name}: update of {what} property beside an index, against none"
            self.aims.append((figure, aim, ratio))
        self.notes.append(f"{name}: an update without an index took {us(times['without'])} µs.")

    def updates_on_sqlite(self, synchronous: str) -> None:
        """Updates on files."""
        name = f"SQLite, `synchronous={synchronous}`"
        self.progress(f"{name}, updates")
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            stores: dict[str, Store] = {}
            for each, indexes in (("without", []), ("with", [PLAN])):
                path = Path(folder) / each
                path.mkdir()
                opened = sqlite(path, FEW, indexes=indexes, synchronous=synchronous)
                stores[each] = stack.enter_context(opened)
            self.updates(name, stores, [0])
            if synchronous == "NORMAL":
                self.floor(Path(folder))

    def floor(self, folder: Path) -> None:
        """What an index of the least expression costs sqlite3 by hand."""
        by_hand: dict[str, HandTuned] = {}
        for each, create in (
            ("without", ""),
            ("with", "CREATE INDEX by_plan ON user_metadata (user_metadata -> '$.plan')"),
        ):
            path = folder / f"by hand {each}"
            path.mkdir()
            by_hand[each] = tuned = HandTuned(path)
            tuned.connection.execute(create)
            for number in range(FEW):
                tuned.update(user(number, FEW), {"plan": "pro", "theme": "dark"})
        times = self.measuring.alone(
            {each: partial(update_by_hand, tuned) for each, tuned in by_hand.items()}
        )
        for tuned in by_hand.values():
            tuned.connection.close()
        self.notes.append(
            "SQLite, `synchronous=NORMAL`: sqlite3 by hand takes"
            f" {relative(times, 'with', 'without'):.2f} times as long for an update of another"
            " property with an index of `user_metadata -> '$.plan'`. SQLite does not compare the"
            " old value of an expression with the new one: it removes and adds the entry."
        )

    def updates_on_postgres(self) -> None:
        """Updates on tables; PostgreSQL counts those that were heap-only."""
        self.progress("PostgreSQL, updates")
        shares: dict[str, float] = {}
        with contextlib.ExitStack() as schemas:
            with contextlib.ExitStack() as stack:
                stores: dict[str, Store] = {}
                names: dict[str, str] = {}
                for each, indexes in (("without", []), ("with", [PLAN])):
                    names[each] = schemas.enter_context(empty_schema())
                    opened = in_schema(names[each], FEW, indexes)
                    stores[each] = stack.enter_context(opened)
                self.updates("PostgreSQL", stores, [0])
            for each, schema in names.items():
                shares[each] = heap_only(schema)
        self.notes.append(
            "PostgreSQL: of the updates"
            f" {shares['with']:.1%} were heap-only with an index, {shares['without']:.1%} without."
        )

    def memory(self) -> None:
        """What an index takes in the in-memory storage."""
        self.progress("in memory")
        users = max(10_000, self.many // 10)
        allocated(1000)  # what is made once
        without = allocated(users)
        for what, index in (("an index", PLAN), ("a unique index", CUSTOMER)):
            figure = f"in memory: bytes for each user and {what}"
            self.aims.append((figure, 200, (allocated(users, index) - without) / users))


def find(store: Store, users: int, number: int) -> object:
    """Find a user by a unique value."""
    value = f"cus_{number * 7919 % users}"
    return store.syncio.find_user_id({"stripe_customer_id": value})


def get(store: Store, users: int, number: int) -> object:
    """Get a user."""
    return store.syncio.get_user_metadata(user(number, users))


def get_100(store: Store, users: int, number: int) -> None:
    """Get 100 users, one after the other."""
    for each in range(number * 100, number * 100 + 100):
        get(store, users, each)


def update_by_hand(tuned: HandTuned, number: int) -> object:
    """Change a property that has no index."""
    return tuned.update(user(number, FEW), {"theme": f"theme {number} {time.perf_counter()}"})


def us(times: list[float]) -> str:
    """Show the median in microseconds."""
    return f"{median(times) * 1e6:.0f}"


@contextlib.contextmanager
def sqlite(
    folder: Path,
    users: int,
    indexes: tuple[Index, ...] | list[Index] = (PLAN, CUSTOMER),
    synchronous: str = "FULL",
) -> Generator[Store, None, None]:
    """Fill a file by SQL, and build the indexes."""
    path = folder / f"{users}.db"
    with contextlib.closing(SQLiteStorage(path)) as storage:
        storage.write([])
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(FILL_SQLITE, [users])
    storage = SQLiteStorage(path, indexes=indexes, synchronous=synchronous)  # type: ignore[arg-type]
    assert storage.build_indexes() == []
    with contextlib.closing(storage), UserMetadata(storage) as store:
        yield store


@contextlib.contextmanager
def postgres(users: int) -> Generator[Store, None, None]:
    """Fill a table of a new schema by SQL, and build the indexes."""
    with empty_schema() as schema, in_schema(schema, users, [PLAN, CUSTOMER]) as store:
        yield store


@contextlib.contextmanager
def in_schema(schema: str, users: int, indexes: list[Index]) -> Generator[Store, None, None]:
    """Fill a table by SQL, and build the indexes."""
    url = with_parameters(server_url(), options=f"-csearch_path={schema}")
    with contextlib.closing(PostgresStorage(url)) as storage:
        storage.write([("user", Replace({}))])
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("TRUNCATE user_metadata")
        connection.execute(FILL_POSTGRES, [users])
        connection.execute("VACUUM ANALYZE user_metadata")
    storage = PostgresStorage(url, indexes=indexes)
    assert storage.build_indexes() == []
    with contextlib.closing(storage), UserMetadata(storage) as store:
        yield store


def heap_only(schema: str) -> float:
    """Return the share of the updates that wrote to no index of the table."""
    options = f"-csearch_path={schema}"
    with psycopg.connect(server_url(), options=options, autocommit=True) as connection:
        # The server processes of the storage count when they end.
        while not (found := connection.execute(HOT).fetchone() or (0, 0))[0]:
            time.sleep(0.1)
    share: float = found[1] / found[0]
    return share


def allocated(users: int, *indexes: Index) -> int:
    """Return the size of an in-memory storage with so many users."""
    tracemalloc.start()
    storage = InMemoryStorage(indexes=indexes)
    for first in range(0, users, 1000):
        storage.write(
            [
                (
                    f"user {n:07}",
                    Replace(
                        {"plan": "pro" if n % 10 == 0 else "free", "stripe_customer_id": f"cus_{n}"}
                    ),
                )
                for n in range(first, first + 1000)
            ]
        )
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only check that everything runs")
    default = Path(__file__).parent.parent.parent / "docs" / "_static" / "benchmarks"
    parser.add_argument("--output", type=Path, default=default, help="folder of the results")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    finding = of(
        arguments.output,
        lambda text: print(f"{time.perf_counter() - begin:6.0f} s  {text}", flush=True),
        quick=arguments.quick,
    )
    finding.run()
    stop_servers()
    for figure, aim, value in finding.aims:
        print(f"{figure}  ≤ {aim:g}  {value:.2f}")


def of(folder: Path, progress: Callable[[str], None], *, quick: bool) -> Finding:
    """Return the measurements, of a million users unless they should be quick."""
    measuring, many = (QUICK, 10_000) if quick else (THOROUGH, 1_000_000)
    return Finding(measuring, many, folder, progress)


if __name__ == "__main__":
    main()
