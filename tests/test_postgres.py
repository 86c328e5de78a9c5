"""The PostgreSQL storage: its table, its statements, and a SuperTokens core beside it."""

from __future__ import annotations

import contextlib
import decimal
import json
import subprocess
import sys
import threading
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, urlencode

import psycopg
import pytest
from postgres_proxy import Proxy
from postgres_server import server_url, waiting_for_locks
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

import usermetadata
from usermetadata import (
    DamagedMetadataError,
    InvalidInputError,
    OutcomeUnknownError,
    PostgresStorage,
    StorageError,
    UsageError,
    UserMetadataRecipe,
)
from usermetadata.changes import Clear, Merge, Modify, Replace

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import LiteralString

    from usermetadata.changes import Change

# As the core's PostgreSQL plugin creates them.
CORES_TABLES = """
CREATE TABLE apps (app_id varchar(64) PRIMARY KEY);
INSERT INTO apps VALUES ('public');
CREATE TABLE user_metadata (
    app_id varchar(64) DEFAULT 'public',
    user_id varchar(128) NOT NULL,
    user_metadata text NOT NULL,
    CONSTRAINT user_metadata_pkey PRIMARY KEY (app_id, user_id),
    CONSTRAINT user_metadata_app_id_fkey FOREIGN KEY (app_id) REFERENCES apps (app_id)
        ON DELETE CASCADE);
CREATE INDEX user_metadata_app_id_index ON user_metadata (app_id);
"""


@pytest.fixture
def postgres(schema: str) -> Generator[PostgresStorage, None, None]:
    """A storage in that schema."""
    with contextlib.closing(PostgresStorage(server_url(), schema=schema)) as storage:
        yield storage


class Core:
    """Uses the table as a SuperTokens core does."""

    def __init__(self, schema: str, app_id: str = "public") -> None:
        self._app_id = app_id
        self._connection = psycopg.connect(server_url(), options=f"-c search_path={schema}")

    def update(self, user_id: str, update: dict[str, Any], meanwhile: Any = None) -> None:
        """Lock, select, merge, upsert, commit; retry until the lock is free, as the core does."""
        locked = False
        while not locked:
            [locked] = self._query(
                "SELECT pg_try_advisory_xact_lock(hashtext(%s))", f"{self._app_id}~{user_id}"
            ) or [False]
            if not locked:
                self._connection.rollback()
        row = self._query(
            "SELECT user_metadata FROM user_metadata WHERE app_id = %s AND user_id = %s",
            self._app_id,
            user_id,
        )
        if meanwhile:
            meanwhile()
        merged = usermetadata.merge_metadata(json.loads(row[0]) if row else {}, update)
        self._connection.execute(
            "INSERT INTO user_metadata (app_id, user_id, user_metadata) VALUES (%s, %s, %s)"
            " ON CONFLICT (app_id, user_id) DO UPDATE SET user_metadata = excluded.user_metadata",
            [self._app_id, user_id, json.dumps(merged)],
        )
        self._connection.commit()

    def close(self) -> None:
        self._connection.close()

    def _query(self, query: Any, *parameters: str) -> tuple[Any, ...] | None:
        return self._connection.execute(query, parameters).fetchone()


# The table.


def test_the_table_has_the_cores_columns(
    postgres: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """The table has the columns of SuperTokens' table: one row of text per app and user."""
    postgres.write([("alice", Merge({"theme": "dark"}))])
    rows = direct.execute("SELECT app_id, user_id, user_metadata FROM user_metadata").fetchall()
    assert rows == [("public", "alice", '{"theme":"dark"}')]


def test_table_and_schema_have_the_names_that_were_asked_for(
    schema: str, direct: psycopg.Connection[Any]
) -> None:
    """Any names work, also those that need quotes; without a schema the search path is used."""
    storage = PostgresStorage(server_url(), schema=schema, table='100 % "users"; --%(app_id)s')
    with contextlib.closing(storage):
        storage.write([("alice", Merge({"n": 1}))])
        rows = direct.execute('SELECT user_id FROM "100 % ""users""; --%(app_id)s"').fetchall()
        assert rows == [("alice",)]
    url = make_conninfo(server_url(), options=f"-c search_path={schema}")
    with contextlib.closing(PostgresStorage(url, table="other")) as storage:
        storage.write([("alice", Merge({"n": 1}))])
        assert direct.execute("SELECT user_id FROM other").fetchall() == [("alice",)]


def test_to_read_creates_nothing(
    postgres: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """Reading a database creates nothing in it."""
    assert postgres.read(["alice"]) == {}
    assert postgres.read_after("", 10) == {}
    assert direct.execute("SELECT to_regclass('user_metadata')").fetchone() == (None,)
    postgres.write([("alice", Merge({"n": 1}))])
    assert postgres.read(["alice"]) == {"alice": {"n": 1}}


def test_the_table_may_be_created_by_many_at_once(schema: str) -> None:
    """Eight storages that use an empty database at once all write their updates."""

    def write(number: int) -> None:
        with contextlib.closing(PostgresStorage(server_url(), schema=schema)) as storage:
            storage.write([("alice", Merge({str(number): number}))])

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(write, range(8)))
    with contextlib.closing(PostgresStorage(server_url(), schema=schema)) as storage:
        assert storage.read(["alice"]) == {"alice": {str(n): n for n in range(8)}}


def test_values_of_others_stay_as_they_are(
    postgres: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """A merge keeps other properties' text exactly; a number that it cannot return is an error."""
    postgres.write([])
    others = '{"z": 1.10, "big": 12345678901234567890.123456789, "nested": {"b" : -0.0, "a": null}}'
    direct.execute("INSERT INTO user_metadata VALUES ('public', 'alice', %s)", [others])
    with pytest.raises(OutcomeUnknownError, match=r"a float would change; .* the write was done"):
        postgres.write([("alice", Merge({"new": 1, "z": 2}))])
    [[text]] = direct.execute("SELECT user_metadata FROM user_metadata").fetchall()
    assert text == (
        '{"big":12345678901234567890.123456789,"nested":{"b" : -0.0, "a": null},"new":1,"z":2}'
    )


NUMBERS = [1e16, -1.5e17, 1e22, 1e-5, 1.25e-7, -0.0, 5e-324, 1.7976931348623157e308, 10**30, 0.1]


def test_every_reader_reads_the_same_numbers(
    core: Core, postgres: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """PostgreSQL's ``json`` and ``jsonb``, a core and a native merge read 1e16, 1e+16 alike."""
    named = {f"n{place}": number for place, number in enumerate(NUMBERS)}
    postgres.write([("alice", Replace(named))])
    for query in (
        "SELECT value::text FROM user_metadata, json_each(user_metadata::json) ORDER BY key",
        "SELECT value::text FROM user_metadata, jsonb_each(user_metadata::jsonb) ORDER BY key",
    ):
        texts = [decimal.Decimal(text) for [text] in direct.execute(query).fetchall()]
        assert texts == [decimal.Decimal(repr(number)) for number in NUMBERS]
    query = "SELECT (user_metadata::jsonb ->> 'n0')::float8 = 1e16 FROM user_metadata"
    assert direct.execute(query).fetchone() == (True,)
    core.update("alice", {"by": "core"})
    [merged] = postgres.write([("alice", Merge({"by": 1e16}))])
    assert merged is not None
    assert repr(sorted(merged.items())) == repr(sorted({**named, "by": 1e16}.items()))


def test_a_number_that_only_postgres_can_read(
    postgres: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """The merge is done and raises ``OutcomeUnknownError``, so callers do not repeat it."""
    postgres.write([])
    direct.execute("""INSERT INTO user_metadata VALUES ('public', 'alice', '{"n": 1e999}')""")
    with pytest.raises(
        OutcomeUnknownError, match=r"'alice'.* is damaged: it holds a number.*write was done"
    ):
        postgres.write([("bob", Merge({"n": 1})), ("alice", Merge({"m": 1}))])
    assert postgres.read(["bob"]) == {"bob": {"n": 1}}
    with pytest.raises(DamagedMetadataError, match="'alice'"):
        postgres.read(["alice"])


def test_any_client_encoding_may_be_the_default(schema: str) -> None:
    """One from a URL or an environment variable is overridden; a pool with one is refused."""
    url = make_conninfo(server_url(), client_encoding="latin1")
    with contextlib.closing(PostgresStorage(url, schema=schema)) as storage:
        assert storage.write([("\u65e5", Merge({"n": "\u672c"}))]) == [{"n": "\u672c"}]
    with ConnectionPool(url, min_size=1) as pool:
        storage = PostgresStorage(pool, schema=schema)
        with pytest.raises(InvalidInputError, match="its client_encoding is iso8859-1"):
            storage.read(["alice"])


def test_a_core_may_create_the_table_meanwhile(
    schema: str, direct: psycopg.Connection[Any], postgres: PostgresStorage
) -> None:
    """A table that a core creates during the first call is used with its limits and locks."""
    with ThreadPoolExecutor(1) as executor:
        with direct.transaction():
            direct.execute(CORES_TABLES)
            written = executor.submit(postgres.write, [("alice", Merge({"n": 1}))])
            waiting_for_locks(1)
        assert written.result() == [{"n": 1}]
    with pytest.raises(InvalidInputError, match="takes 128"):
        postgres.write([("a" * 129, Merge({}))])


@pytest.mark.parametrize("change", [Merge({"n": 1}), Modify(dict)])
def test_a_damaged_row_is_named(
    postgres: PostgresStorage, direct: psycopg.Connection[Any], change: Change
) -> None:
    """The error of a damaged row names its user; ``set`` and ``clear`` repair the row."""
    postgres.write([("alice", Merge({"n": 1})), ("bob", Merge({"n": 1}))])
    direct.execute("UPDATE user_metadata SET user_metadata = '[1' WHERE user_id = 'alice'")
    with pytest.raises(DamagedMetadataError, match="of user 'alice' in app 'public' is damaged"):
        postgres.write([("bob", Merge({"n": 2})), ("alice", change)])
    with pytest.raises(DamagedMetadataError, match="'alice'"):
        postgres.read(["bob", "alice"])
    assert postgres.read(["bob"]) == {"bob": {"n": 1}}
    assert postgres.write([("alice", Clear())]) == [None]
    direct.execute("INSERT INTO user_metadata VALUES ('public', 'alice', 'null')")
    assert postgres.write([("alice", Replace({"n": 3})), ("alice", change)])
    assert postgres.read(["alice"])["alice"]["n"] in {1, 3}


def test_what_a_change_raises_is_not_the_databases(postgres: PostgresStorage) -> None:
    """A function may use another database; its errors propagate unchanged."""
    for error in (
        psycopg.errors.SerializationFailure("mine"),
        psycopg.DataError("mine"),
        psycopg.Rollback(),
        KeyboardInterrupt(),
    ):

        def fail(_: Any, error: BaseException = error) -> Any:
            raise error

        with pytest.raises(type(error)) as raised:
            postgres.write([("alice", Merge({"n": 1})), ("alice", fail)])
        assert raised.value is error
        assert postgres.read(["alice"]) == {}


# Round trips.


@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (1, [("alice", Merge({"n": 1, "gone": None}))]),
        (1, [("alice", Replace({"n": 1}))]),
        (1, [("alice", Clear())]),
        (1, [(f"user {n}", Merge({"n": n})) for n in range(500)]),
        (1, [("alice", Merge({})), ("bob", Clear()), ("carol", Replace({}))]),
        (1, [("alice", Merge({str(n): n})) for n in range(3)]),
        (2, [("alice", Merge({str(n): n})) for n in range(50)]),
        (2, [("alice", Modify(dict)), ("bob", Modify(dict)), ("alice", Merge({}))]),
    ],
    ids=["merge", "replace", "clear", "500", "all kinds", "one 3 times", "one 50 times", "modify"],
)
def test_round_trips_of_a_write(
    schema: str, number: int, changes: list[tuple[str, Change]]
) -> None:
    """A write of any size is one round trip; with functions, or a user many times, it is two."""
    proxy = Proxy(server_url())
    with contextlib.closing(proxy):
        storage = PostgresStorage(proxy.url, schema=schema)
        with contextlib.closing(storage):
            storage.write([("somebody", Merge({}))])
            before = proxy.round_trips
            storage.write(changes)
            assert proxy.round_trips - before == number


@pytest.mark.parametrize("count", [1, 500])
def test_round_trips_of_a_read(schema: str, count: int) -> None:
    """A read is one round trip for any number of users, also without a table."""
    proxy = Proxy(server_url())
    with contextlib.closing(proxy):
        storage = PostgresStorage(proxy.url, schema=schema)
        with contextlib.closing(storage):
            users = [f"user {n}" for n in range(count)]
            for _ in range(5):
                assert storage.read(users) == {}
            assert proxy.connections == 2  # the first connection and the pool's
            storage.write([(user, Merge({})) for user in users])
            before = proxy.round_trips
            assert len(storage.read(users)) == count
            assert proxy.round_trips - before == 1


@pytest.mark.parametrize("statements", [None, "portable"])
def test_no_call_reads_the_whole_table(
    schema: str, direct: psycopg.Connection[Any], statements: Literal["portable"] | None
) -> None:
    """Each call finds its users by the key, also in a table that was never analysed."""
    with contextlib.closing(PostgresStorage(server_url(), schema=schema)) as storage:
        storage.write([("alice", Merge({}))])
    direct.execute("ALTER TABLE user_metadata SET (autovacuum_enabled = off)")
    direct.execute("""
        INSERT INTO user_metadata (user_id, user_metadata)
        SELECT 'user ' || n, '{"text": "' || repeat('x', 100) || '"}'
        FROM generate_series(1, 10000) AS n
    """)
    some = [f"user {n}" for n in range(1, 9)]
    change = Modify(lambda metadata: {**metadata, "n": 1})
    url = make_conninfo(server_url(), application_name=schema)
    storage = PostgresStorage(url, schema=schema, statements=statements)
    with contextlib.closing(storage):
        for user_ids in (["user 10"], some, ["absent"], ["absent", "nobody"]):
            storage.read(user_ids)
            for each in (Merge({"n": 1}), change, Replace({}), Clear(), Clear()):
                storage.write([(user_id, each) for user_id in user_ids])
    # The server has counted when the storage's connections have ended.
    query = "SELECT FROM pg_stat_activity WHERE application_name = %s"
    while direct.execute(query, [schema]).fetchone() is not None:
        pass
    query = "SELECT seq_tup_read, idx_tup_fetch FROM pg_stat_user_tables WHERE schemaname = %s"
    [(scanned, fetched)] = direct.execute(query, [schema]).fetchall()
    assert scanned == 0
    assert 20 < fetched < 1000


# A SuperTokens core on the same table.


@pytest.fixture
def core(schema: str, direct: psycopg.Connection[Any]) -> Generator[Core, None, None]:
    """A core that has created its tables."""
    direct.execute(CORES_TABLES)
    with contextlib.closing(Core(schema)) as core:
        yield core


def test_a_cores_table_is_used_as_it_is(core: Core, postgres: PostgresStorage) -> None:
    """The storage reads a core's metadata, and the core reads the storage's."""
    core.update("alice", {"theme": "dark", "n": 1})
    assert postgres.write([("alice", Merge({"n": None}))]) == [{"theme": "dark"}]
    core.update("alice", {"language": "fr"})
    assert postgres.read(["alice"]) == {"alice": {"theme": "dark", "language": "fr"}}


def test_a_cores_columns_have_their_limits(core: Core, postgres: PostgresStorage) -> None:
    """User ids longer than 128 characters, and apps that the core does not know, are refused."""
    longest = "\u00e9" * 128
    assert postgres.write([(longest, Merge({"n": 1}))]) == [{"n": 1}]
    with pytest.raises(InvalidInputError, match=r"user_id: has 129 characters, .* takes 128"):
        postgres.write([("alice", Merge({})), (longest + "x", Merge({}))])
    assert postgres.read(["alice", longest + "x"]) == {}
    with pytest.raises(
        InvalidInputError, match="pass the app_id of an app of the SuperTokens core"
    ):
        postgres.for_app("shop").write([("alice", Merge({}))])


@pytest.mark.parametrize("row", [True, False])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (Merge({"ours": 1}), {"core": 1, "ours": 1}),
        (Modify(lambda metadata: {**metadata, "ours": 1}), {"core": 1, "ours": 1}),
        (Replace({"ours": 1}), {"ours": 1}),
    ],
    ids=["merge", "modify", "replace"],
)
def test_a_write_waits_for_the_core(
    core: Core,
    postgres: PostgresStorage,
    change: Change,
    expected: Any,
    row: bool,  # noqa: FBT001 - pytest passes it by name
) -> None:
    """A write waits for a core that has read and not yet written; neither loses an update."""
    if row:
        postgres.write([("alice", Merge({}))])
    postgres.write([])
    threads: list[threading.Thread] = []

    def meanwhile() -> None:
        ours = threading.Thread(target=postgres.write, args=([("alice", change)],))
        threads.append(ours)
        ours.start()
        waiting_for_locks(1)

    core.update("alice", {"core": 1}, meanwhile)
    threads[0].join()
    assert postgres.read(["alice"]) == {"alice": expected}


def test_a_write_waits_for_the_core_of_its_app(
    core: Core, schema: str, direct: psycopg.Connection[Any], postgres: PostgresStorage
) -> None:
    """A core locks a user of one app; its other apps' users of the same id are not held up."""
    direct.execute("INSERT INTO apps VALUES ('shop')")
    shop = postgres.for_app("shop")

    def meanwhile() -> None:
        assert postgres.write([("alice", Merge({"public": 1}))]) == [{"public": 1}]
        waiting.append(executor.submit(shop.write, [("alice", Merge({"ours": 1}))]))
        waiting_for_locks(1)

    waiting: list[Future[Any]] = []
    with ThreadPoolExecutor(1) as executor, contextlib.closing(Core(schema, "shop")) as other:
        other.update("alice", {"core": 1}, meanwhile)
        assert waiting[0].result(60) == [{"core": 1, "ours": 1}]
    assert postgres.read(["alice"]) == {"alice": {"public": 1}}


def test_a_clear_waits_for_the_core(core: Core, postgres: PostgresStorage) -> None:
    """A core's write during a clear does not restore the old metadata."""
    postgres.write([("alice", Merge({"old": 1}))])
    threads: list[threading.Thread] = []

    def meanwhile() -> None:
        threads.append(threading.Thread(target=postgres.write, args=([("alice", Clear())],)))
        threads[0].start()
        waiting_for_locks(1)

    core.update("alice", {"core": 1}, meanwhile)
    threads[0].join()
    assert postgres.read(["alice"]) == {}


def test_an_older_core_locks_the_row(
    core: Core, postgres: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """A core that locks the row, as older ones do, loses nothing if the row exists."""
    postgres.write([("alice", Merge({}))])
    with ThreadPoolExecutor(1) as executor:
        with direct.transaction():
            direct.execute("SELECT FROM user_metadata WHERE user_id = 'alice' FOR UPDATE")
            written = executor.submit(postgres.write, [("alice", Merge({"ours": 1}))])
            waiting_for_locks(1)
            direct.execute("""UPDATE user_metadata SET user_metadata = '{"core": 1}'""")
        assert written.result() == [{"core": 1, "ours": 1}]


def test_two_kinds_of_writers_lose_nothing(
    core: Core, schema: str, postgres: PostgresStorage
) -> None:
    """Four cores and four threads of the library that update two users keep every property."""
    users = ("alice", "bob")
    cores = [Core(schema) for _ in range(4)]

    def as_core(number: int) -> None:
        for n in range(25):
            for user in users:
                cores[number].update(user, {f"core {number} {n}": n})

    def as_ours(number: int) -> None:
        for n in range(25):
            postgres.write([(user, Merge({f"ours {number} {n}": n})) for user in users])

    with ThreadPoolExecutor(8) as executor:
        done = [executor.submit(as_core, number) for number in range(4)]
        done += [executor.submit(as_ours, number) for number in range(4)]
        for each in done:
            each.result()
    for another in cores:
        another.close()
    expected = {
        f"{kind} {m} {n}": n for kind in ("core", "ours") for m in range(4) for n in range(25)
    }
    assert postgres.read(users) == dict.fromkeys(users, expected)


# A borrowed pool.


def test_a_borrowed_pool_is_left_as_it_was(schema: str) -> None:
    """A pool with its own row factory, cursors and transactions works, and stays open."""
    url = server_url()
    kwargs: dict[str, Any] = {"row_factory": dict_row, "cursor_factory": psycopg.ClientCursor}
    with ConnectionPool(url, min_size=1, max_size=1, kwargs=kwargs) as pool:
        storage = PostgresStorage(pool, schema=schema)
        assert storage.write([("alice", Merge({"n": 1}))]) == [{"n": 1}]
        assert storage.write([("alice", Modify(lambda _: {"n": 2}))]) == [{"n": 2}]
        assert storage.read(["alice", "bob"]) == {"alice": {"n": 2}}
        again = PostgresStorage(pool, schema=schema)  # the first call finds the table
        assert again.write([("alice", Merge({"n": 3})), ("bob", Clear())]) == [{"n": 3}, None]
        assert repr(storage) == "PostgresStorage('the borrowed pool', app_id='public')"
        storage.close()
        with pytest.raises(UsageError, match="closed"):
            storage.read(["alice"])
        with pool.connection() as connection:
            assert not connection.autocommit
            row: Any = connection.execute("SELECT 1 AS one").fetchone()
            assert row == {"one": 1}
    with pytest.raises(UsageError, match="the pool is closed; pass one that is open"):
        PostgresStorage(pool).read(["alice"])


# Construction.


def test_a_url_is_all_it_takes(schema: str) -> None:
    """``init`` accepts both URL schemes, and ``reset`` closes what it opened."""
    options = {**conninfo_to_dict(server_url()), "options": f"-csearch_path={schema}"}
    query = urlencode({key: value for key, value in options.items() if value}, quote_via=quote)
    for scheme in ("postgresql", "postgres"):
        usermetadata.init(f"{scheme}://?{query}")
        storage = UserMetadataRecipe.get_instance().storage
        assert isinstance(storage, PostgresStorage)
        assert storage.read(["alice"]) == {}
        UserMetadataRecipe.reset()
        with pytest.raises(UsageError, match="is closed; make a new one"):
            storage.read(["alice"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PostgresStorage(1), "database: int is neither a URL nor a ConnectionPool"),  # type: ignore[arg-type]
        (lambda: PostgresStorage("what?"), "database: it cannot be parsed; pass"),
        (
            lambda: PostgresStorage("", timeout=-1),
            "timeout: -1 is not a number of seconds, 0.001 or more",
        ),
        (lambda: PostgresStorage("", max_connections=0), "max_connections: 0 is not 1 or more"),
        (lambda: PostgresStorage("", app_id=""), "app_id: "),
        (lambda: PostgresStorage("", table=""), "table: '' is not a name"),
        (lambda: PostgresStorage("", schema="\0"), "schema: '\\\\x00' is not a name"),
        (lambda: PostgresStorage("", table="\ud800"), "table: .* is not a name"),
        (lambda: PostgresStorage("host=\ud800"), "database: it cannot be parsed; pass"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[], object], message: str) -> None:
    """Bad arguments raise before anything is opened; the message says what to pass."""
    with pytest.raises(InvalidInputError, match=message):
        make()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE user_metadata SET user_metadata = '{\"ssn\": sesame'",
        "ALTER TABLE user_metadata ADD CHECK (user_metadata NOT LIKE '%ssn%sesame%') NOT VALID",
        "ALTER TABLE user_metadata ALTER user_metadata TYPE varchar(9)",
        """
        CREATE FUNCTION cast_it() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN PERFORM NEW.user_metadata::int; RETURN NEW; END';
        CREATE TRIGGER cast_it BEFORE UPDATE ON user_metadata
        FOR EACH ROW WHEN (NEW.user_metadata LIKE '%sesame%') EXECUTE FUNCTION cast_it()
        """,
    ],
    ids=["damaged", "constraint", "type", "trigger"],
)
def test_an_error_quotes_no_metadata(
    postgres: PostgresStorage, direct: psycopg.Connection[Any], statement: LiteralString
) -> None:
    """Neither a message nor a traceback quotes a row; the server's own texts do."""
    postgres.write([("alice", Merge({"n": 1}))])
    direct.execute(statement)
    for change in (Merge({"ssn": "sesame"}), Modify(lambda _: {"ssn": "sesame"})):
        with pytest.raises(StorageError) as caught:
            postgres.write([("alice", change)])
        assert "sesame" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("module", ["psycopg", "psycopg_pool"])
def test_the_extra_is_named_where_it_is_missing(module: str) -> None:
    """Without psycopg or its pool, the error says how to install them."""
    program = """
import sys
sys.modules[sys.argv[1]] = None
import usermetadata
try:
    usermetadata.init("postgresql://localhost/users")
except ImportError as error:
    print(error)
"""
    output = subprocess.check_output([sys.executable, "-c", program, module], text=True)
    command = "pip install 'psycopg[binary,pool]>=3.2' 'msgspec>=0.19'"
    assert output == f"PostgresStorage: psycopg is not installed; {command}\n"


def test_a_table_of_something_else_is_an_error_of_ours(
    postgres: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """A table with the name but other columns raises an error and stays unchanged."""
    direct.execute("CREATE TABLE user_metadata (n integer)")
    with pytest.raises(StorageError, match=r"it has no column app_id: .* name another"):
        postgres.read(["alice"])


def test_an_old_cores_table_is_copied_through_a_view(
    postgres: PostgresStorage, direct: psycopg.Connection[Any], schema: str
) -> None:
    """The table of a core without apps can be copied through a view that adds the column."""
    direct.execute("CREATE TABLE user_metadata (user_id varchar(128), user_metadata text)")
    direct.execute("INSERT INTO user_metadata VALUES ('alice', '{\"theme\":\"dark\"}')")
    with pytest.raises(StorageError, match=r"a SuperTokens core before 6\.0"):
        postgres.read_after("", 10)
    direct.execute("CREATE VIEW with_apps AS SELECT text 'public' AS app_id, * FROM user_metadata")
    view = PostgresStorage(server_url(), schema=schema, table="with_apps")
    with contextlib.closing(view) as storage:
        assert storage.read_after("", 10) == {"alice": {"theme": "dark"}}


def test_a_partitioned_table_is_used_as_it_is(
    postgres: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """A partitioned table works like any other."""
    direct.execute("""
        CREATE TABLE user_metadata (
            app_id varchar(64), user_id varchar(255), user_metadata text NOT NULL,
            PRIMARY KEY (app_id, user_id)) PARTITION BY HASH (app_id, user_id);
        CREATE TABLE even PARTITION OF user_metadata FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE odd PARTITION OF user_metadata FOR VALUES WITH (MODULUS 2, REMAINDER 1);
    """)
    users = [f"user {n}" for n in range(20)]
    for n in range(2):
        assert len(postgres.write([(user, Merge({str(n): n})) for user in users])) == 20
    postgres.write([("user 0", Clear()), ("user 1", Modify(lambda _: {}))])
    assert postgres.read(users) == {"user 1": {}} | {user: {"0": 0, "1": 1} for user in users[2:]}
    assert direct.execute("SELECT count(*) > 0 FROM even").fetchone() == (True,)
    assert direct.execute("SELECT count(*) > 0 FROM odd").fetchone() == (True,)
