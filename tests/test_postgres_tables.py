"""Tables that swallow what is written, or that metadata cannot be stored in: errors, not losses."""

from __future__ import annotations

import contextlib
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from postgres_server import empty_schema, server_url
from psycopg.conninfo import make_conninfo
from psycopg.sql import SQL, Identifier
from psycopg_pool import ConnectionPool

import usermetadata
from usermetadata import PostgresStorage, StorageError
from usermetadata.changes import Clear, Merge, Modify, Replace
from usermetadata.syncio import (
    clear_user_metadata,
    get_user_metadata,
    modify_user_metadata,
    set_user_metadata,
    update_bulk_user_metadata,
    update_user_metadata,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    import psycopg

    from usermetadata.changes import Change
    from usermetadata.codec import Metadata

NOT_STORED = "did not store, or remove, the metadata of user 'bob'.*nothing was written"


@pytest.fixture
def storage(schema: str) -> Generator[PostgresStorage, None, None]:
    """A storage in that schema, with rows of alice and bob in it."""
    with contextlib.closing(PostgresStorage(server_url(), schema=schema)) as storage:
        storage.write([(user, Replace({"n": 1})) for user in ("alice", "bob")])
        yield storage


def rows(direct: psycopg.Connection[Any]) -> dict[str, Metadata]:
    """Return what is committed."""
    query = "SELECT user_id, user_metadata::json FROM user_metadata"
    return dict(direct.execute(query).fetchall())


def trigger(direct: psycopg.Connection[Any], event: str, body: str) -> None:
    """Run a function before each row of the table is written."""
    direct.execute(
        f"""
        CREATE FUNCTION guard() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN {body} END $$;
        CREATE TRIGGER guard BEFORE {event} ON user_metadata
            FOR EACH ROW EXECUTE FUNCTION guard();
    """.encode()
    )


def count(metadata: Metadata) -> Metadata:
    """Count one more."""
    return {**metadata, "n": metadata.get("n", 0) + 1}


WRITES: list[list[tuple[str, Change]]] = [
    [("bob", Merge({"n": 2}))],
    [("bob", Replace({"n": 2}))],
    [("bob", Modify(count))],
    [("bob", Clear())],
    [("alice", Merge({"n": 2})), ("bob", Merge({"n": 2})), ("carol", Merge({"n": 2}))],
    [("alice", Replace({"n": 2})), ("bob", Replace({"n": 2}))],
    [("alice", Clear()), ("bob", Clear()), ("carol", Clear())],
    [("alice", Merge({"n": 2})), ("bob", Replace({"n": 2}))],
    [("alice", Merge({"n": 2})), ("bob", Clear())],
    [("bob", Merge({"n": 2})), ("alice", Clear())],
    [("bob", Merge({"n": 2})), ("bob", Replace({"m": 2}))],
    [("bob", Merge({"n": 2})), ("bob", Clear())],
    [("alice", Modify(count)), ("bob", Clear()), ("carol", Merge({}))],
    [*[("bob", Merge({str(n): n})) for n in range(5)], ("alice", Clear())],
]
IDS = [
    *("update", "set", "modify", "clear", "update of three", "set of two", "clear of three"),
    *("update and set", "update and clear", "clear and update", "twice", "update, then clear"),
    *("modify and clear", "many times"),
]
SWALLOWED_BY = {
    "trigger": """
        CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN RETURN CASE WHEN OLD.user_id <> 'bob' THEN coalesce(NEW, OLD) END; END $$;
        CREATE TRIGGER swallow BEFORE UPDATE OR DELETE ON user_metadata
            FOR EACH ROW EXECUTE FUNCTION swallow();
    """,
    "soft delete": """
        ALTER TABLE user_metadata ADD COLUMN deleted boolean DEFAULT false;
        CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql
            SET search_path FROM CURRENT AS $$
            BEGIN
                IF OLD.user_id <> 'bob' THEN RETURN coalesce(NEW, OLD); END IF;
                IF TG_OP = 'DELETE' THEN
                    UPDATE user_metadata SET deleted = true WHERE user_id = OLD.user_id;
                ELSIF NEW.deleted THEN
                    RETURN NEW;
                END IF;
                RETURN NULL;
            END $$;
        CREATE TRIGGER swallow BEFORE UPDATE OR DELETE ON user_metadata
            FOR EACH ROW EXECUTE FUNCTION swallow();
    """,
    "change of the user id": """
        CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF TG_OP = 'DELETE' THEN RETURN NULL; END IF;
                NEW.user_id := replace(NEW.user_id, 'bob', 'eve');
                RETURN NEW;
            END $$;
        CREATE TRIGGER swallow BEFORE INSERT OR UPDATE OR DELETE ON user_metadata
            FOR EACH ROW EXECUTE FUNCTION swallow();
    """,
}


@pytest.mark.parametrize("changes", WRITES, ids=IDS)
@pytest.mark.parametrize("by", SWALLOWED_BY)
def test_a_write_that_a_trigger_swallows_is_an_error(
    storage: PostgresStorage,
    direct: psycopg.Connection[Any],
    by: str,
    changes: list[tuple[str, Change]],
) -> None:
    """The error names the user; nothing of the write is stored, nor what the trigger did."""
    direct.execute(SWALLOWED_BY[by].encode())
    with pytest.raises(StorageError, match=r"of user '\w+', without an error: a trigger") as caught:
        storage.write(changes)
    assert by == "change of the user id" or "'bob'" in str(caught.value)
    assert rows(direct) == {"alice": {"n": 1}, "bob": {"n": 1}}
    if by == "soft delete":
        assert direct.execute("SELECT FROM user_metadata WHERE deleted").fetchall() == []
    direct.execute("DROP TRIGGER swallow ON user_metadata")
    storage.write(changes)
    assert rows(direct) != {"alice": {"n": 1}, "bob": {"n": 1}}


@pytest.mark.parametrize(
    "changes",
    [
        [("carol", Merge({"n": 1}))],
        [("carol", Replace({"n": 1}))],
        [("carol", Modify(count))],
        [("alice", Merge({"n": 2})), ("carol", Merge({"n": 2}))],
        [("alice", Clear()), ("carol", Merge({"n": 2}))],
    ],
    ids=["update", "set", "modify", "bulk update", "clear and update"],
)
def test_a_new_user_that_a_trigger_swallows_is_an_error(
    storage: PostgresStorage, direct: psycopg.Connection[Any], changes: list[tuple[str, Change]]
) -> None:
    """A first update that is not stored is no success; what needs no new row is."""
    trigger(direct, "INSERT", "RETURN CASE WHEN NEW.user_id = 'carol' THEN NULL ELSE NEW END;")
    with pytest.raises(StorageError, match="of user 'carol', without an error"):
        storage.write(changes)
    assert rows(direct) == {"alice": {"n": 1}, "bob": {"n": 1}}
    assert storage.write([("carol", Clear())]) == [None]


def test_each_function_reports_what_was_not_stored(
    storage: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """No function of the library answers with metadata that is not in the database."""
    usermetadata.init(storage)
    trigger(direct, "INSERT OR UPDATE OR DELETE", "RETURN NULL;")
    calls: list[Callable[[], object]] = [
        lambda: update_user_metadata("bob", {"n": 2}),
        lambda: set_user_metadata("bob", {"n": 2}),
        lambda: modify_user_metadata("bob", count),
        lambda: update_bulk_user_metadata({"bob": {"n": 2}, "carol": {"n": 2}}),
        lambda: clear_user_metadata("bob"),
    ]
    for call in calls:
        with pytest.raises(StorageError, match=NOT_STORED):
            call()
    assert get_user_metadata("bob").metadata == {"n": 1}


@pytest.mark.parametrize("user_id", ['say "bob"', "\u2028\n\\", "\U0001f600%s{}"])
def test_any_user_is_named(
    storage: PostgresStorage, direct: psycopg.Connection[Any], user_id: str
) -> None:
    """Also one whose id has quotes, line breaks or other characters than ASCII."""
    trigger(direct, "INSERT", "RETURN NULL;")
    for change in (Merge({}), Modify(count)):
        with pytest.raises(StorageError, match=re.escape(f"of user {user_id!r}, without")):
            storage.write([(user_id, change)])


@pytest.mark.parametrize(
    "change", [Merge({"m": 2}), Replace({"n": 1, "m": 2}), Modify(lambda _: {"n": 1, "m": 2})]
)
@pytest.mark.parametrize("others", [[], ["carol"]])
def test_what_a_trigger_makes_of_it_is_answered(
    storage: PostgresStorage, direct: psycopg.Connection[Any], change: Change, others: list[str]
) -> None:
    """Metadata that a trigger changes is returned as it is stored."""
    stamp = """NEW.user_metadata := jsonb_set(NEW.user_metadata::jsonb, '{by}', '"trigger"');"""
    trigger(direct, "INSERT OR UPDATE", stamp + "RETURN NEW;")
    results = storage.write([("bob", change), *[(other, Merge({"m": 2})) for other in others]])
    assert results == [
        {"n": 1, "m": 2, "by": "trigger"},
        *[{"m": 2, "by": "trigger"} for _ in others],
    ]
    assert storage.read(["bob"])["bob"] == results[0]


def test_the_table_may_require_json(
    storage: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """No write puts anything but JSON objects into the column, not even for a moment."""
    check = "CHECK (json_typeof(user_metadata::json) = 'object')"
    direct.execute(f"ALTER TABLE user_metadata ADD {check}".encode())
    assert storage.write([("carol", Modify(count)), ("bob", Clear())]) == [{"n": 1}, None]


def test_many_that_clear_one_user_are_not_refused(storage: PostgresStorage) -> None:
    """A row that another clear has removed meanwhile is removed, which is what was asked for."""
    with ThreadPoolExecutor(4) as executor:
        for _ in range(20):
            storage.write([("bob", Merge({"n": 1})), ("alice", Merge({"n": 1}))])
            writes = [[("bob", Clear())], [("bob", Clear()), ("alice", Clear())]] * 4
            list(executor.map(storage.write, writes))
            assert storage.read(["alice", "bob"]) == {}


@pytest.mark.parametrize("changes", WRITES, ids=IDS)
def test_what_is_refused_at_the_commit_is_not_acknowledged(
    storage: PostgresStorage, direct: psycopg.Connection[Any], changes: list[tuple[str, Change]]
) -> None:
    """A deferred constraint fails after all statements were answered; the call raises."""
    direct.execute("""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF NEW.user_id = 'bob' OR OLD.user_id = 'bob' THEN RAISE 'not bob'; END IF;
                RETURN NULL;
            END $$;
        CREATE CONSTRAINT TRIGGER refuse AFTER INSERT OR UPDATE OR DELETE ON user_metadata
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse();
    """)
    with pytest.raises(StorageError):
        storage.write(changes)
    assert rows(direct) == {"alice": {"n": 1}, "bob": {"n": 1}}


# Rules and policies.


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("ON INSERT TO user_metadata DO INSTEAD NOTHING", Merge({"n": 2})),
        ("ON UPDATE TO user_metadata DO INSTEAD NOTHING", Replace({"n": 2})),
        ("ON UPDATE TO user_metadata DO INSTEAD NOTHING", Modify(count)),
        ("ON DELETE TO user_metadata DO INSTEAD NOTHING", Clear()),
    ],
)
def test_a_rule_is_named(
    storage: PostgresStorage, direct: psycopg.Connection[Any], rule: str, change: Change
) -> None:
    """A rule that does something else instead is an error, and nothing is written."""
    direct.execute(f"CREATE RULE instead AS {rule}".encode())
    for others in ([], [("alice", Merge({"n": 2}))]):
        with pytest.raises(StorageError, match=r"a rule on the table.*nothing was.*drop the rule"):
            storage.write([*others, ("bob", change)])
    assert rows(direct) == {"alice": {"n": 1}, "bob": {"n": 1}}


@pytest.fixture
def restricted(
    storage: PostgresStorage, direct: psycopg.Connection[Any], schema: str
) -> Generator[PostgresStorage, None, None]:
    """The same table for a role that row-level policies hold for."""
    role = Identifier(f"role_{schema}")
    direct.execute(SQL("CREATE ROLE {}").format(role))
    grant = "GRANT USAGE ON SCHEMA {schema} TO {role}; GRANT ALL ON user_metadata TO {role}"
    direct.execute(SQL(grant).format(schema=Identifier(schema), role=role))
    direct.execute("ALTER TABLE user_metadata ENABLE ROW LEVEL SECURITY")
    url = make_conninfo(server_url(), options=f"-c role={role.as_string()[1:-1]}")
    with contextlib.closing(PostgresStorage(url, schema=schema)) as restricted:
        yield restricted
    direct.execute(SQL("DROP OWNED BY {role}; DROP ROLE {role}").format(role=role))


@pytest.mark.parametrize(
    "policies",
    [
        "FOR ALL USING (user_id <> 'bob')",
        """FOR SELECT USING (true); FOR INSERT WITH CHECK (true);
        FOR UPDATE USING (user_id <> 'bob'); FOR DELETE USING (user_id <> 'bob')""",
        """FOR ALL USING (true) WITH CHECK (user_id <> 'bob');
        AS RESTRICTIVE FOR DELETE USING (user_id <> 'bob')""",
    ],
    ids=["hidden", "visible", "checked"],
)
@pytest.mark.parametrize("changes", WRITES, ids=IDS)
def test_a_write_that_a_policy_forbids_is_an_error(
    restricted: PostgresStorage,
    direct: psycopg.Connection[Any],
    policies: str,
    changes: list[tuple[str, Change]],
) -> None:
    """Also a clear of a row that the role cannot see; nothing of the write is stored."""
    for number, policy in enumerate(policies.split(";")):
        direct.execute(f"CREATE POLICY policy{number} ON user_metadata {policy}".encode())
    with pytest.raises(StorageError, match="row-level"):
        restricted.write(changes)
    assert rows(direct) == {"alice": {"n": 1}, "bob": {"n": 1}}
    assert restricted.write([("carol", Clear()), ("alice", Merge({"n": 2}))]) == [None, {"n": 2}]


# Tables that are nearly ours.

COLUMNS = {
    "app_id": "varchar(64)",
    "user_id": "varchar(128)",
    "user_metadata": "text NOT NULL",
    "": "PRIMARY KEY (app_id, user_id)",
}


def create(direct: psycopg.Connection[Any], **columns: str) -> None:
    """Create a table with some columns, or the key, of other kinds."""
    different = COLUMNS | {name.removeprefix("key"): kind for name, kind in columns.items()}
    definition = ", ".join(f"{name} {kind}" for name, kind in different.items() if kind)
    direct.execute(f"CREATE TABLE user_metadata ({definition})".encode())


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        ({"user_id": "char(36)"}, r"column user_id is character\(36\) and must be varchar\(255\)"),
        ({"user_id": "uuid"}, r"column user_id is uuid and must be varchar\(255\)"),
        ({"user_id": "integer"}, r"column user_id is integer and must be varchar\(255\)"),
        ({"user_id": "text COLLATE any_case"}, r"column user_id is text COLLATE any_case and must"),
        ({"app_id": "text COLLATE any_case"}, r"column app_id is text COLLATE any_case and must"),
        ({"app_id": "varchar(10)"}, r"column app_id is character varying\(10\) and must be varc"),
        ({"user_metadata": "jsonb"}, "column user_metadata is jsonb and must be text"),
        ({"user_metadata": "json"}, "column user_metadata is json and must be text"),
        ({'"the name"': "text NOT NULL"}, "column the name is NOT NULL without a default"),
        ({"key": ""}, r"it has no key \(app_id, user_id\) that ON CONFLICT can use"),
        ({"key": "PRIMARY KEY (user_id)"}, r"it has no key \(app_id, user_id\)"),
        ({"key": "PRIMARY KEY (app_id, user_id, user_metadata)"}, r"it has no key"),
        (
            {"user_id": "uuid", "user_metadata": "jsonb", "more": "text NOT NULL", "key": ""},
            "user_id is uuid .*, column user_metadata is jsonb .*, column more is NOT NULL .* key",
        ),
    ],
)
def test_a_table_that_metadata_cannot_be_stored_in_is_refused(
    schema: str, direct: psycopg.Connection[Any], columns: dict[str, str], fault: str
) -> None:
    """The first read or write says what is wrong; the ALTER TABLE that it shows repairs it."""
    # In place of a case-insensitive one, which needs a server that is built with ICU.
    direct.execute('CREATE COLLATION any_case FROM "C"')
    direct.execute(
        "UPDATE pg_collation SET collisdeterministic = false WHERE oid = 'any_case'::regcollation"
    )
    create(direct, **columns)
    with contextlib.closing(PostgresStorage(server_url(), schema=schema)) as storage:
        for call in (
            lambda: storage.read(["bob"]),
            lambda: storage.write([("bob", Merge({"n": 1}))]),
        ):
            with pytest.raises(StorageError, match=fault) as caught:
                call()
        _, _, repair = str(caught.value).partition("; ALTER ")
        direct.execute(f"ALTER {repair}".encode())
        assert storage.write([("Bob", Merge({"n": 1})), ("bob", Merge({"n": 2}))])
        assert storage.read(["Bob", "bob", "BOB"]) == {"Bob": {"n": 1}, "bob": {"n": 2}}


@pytest.mark.parametrize(
    "columns",
    [
        {"user_id": 'text COLLATE "C"'},
        {"app_id": "text NOT NULL", "user_id": "text", "user_metadata": "varchar"},
        {"number": "bigint GENERATED ALWAYS AS IDENTITY", "at": "timestamptz DEFAULT now()"},
        {"id": "serial PRIMARY KEY", "key": "UNIQUE (user_id, app_id) INCLUDE (user_metadata)"},
        {"note": "text", "size": "integer GENERATED ALWAYS AS (length(user_metadata)) STORED"},
    ],
)
def test_a_table_may_have_more_than_the_storage_needs(
    schema: str, direct: psycopg.Connection[Any], columns: dict[str, str]
) -> None:
    """Other columns, keys and deterministic collations are accepted, and every function works."""
    create(direct, **columns)
    with contextlib.closing(PostgresStorage(server_url(), schema=schema)) as storage:
        changes: list[tuple[str, Change]] = [("bob", Merge({"n": 1})), ("Bob", Modify(count))]
        assert storage.write(changes) == [{"n": 1}, {"n": 1}]
        assert storage.write([("bob", Clear()), ("Bob", Merge({"n": 2}))]) == [None, {"n": 2}]
        assert storage.read(["bob", "Bob"]) == storage.read_after("", 10) == {"Bob": {"n": 2}}


def test_a_view_is_used_as_it_is(
    storage: PostgresStorage, direct: psycopg.Connection[Any], schema: str
) -> None:
    """One that PostgreSQL can update is written to; columns of other types are refused."""
    direct.execute("CREATE VIEW users AS SELECT * FROM user_metadata WITH CHECK OPTION")
    direct.execute("CREATE VIEW ids AS SELECT app_id, user_id::char(9), user_metadata FROM users")
    with contextlib.closing(PostgresStorage(server_url(), schema=schema, table="users")) as view:
        assert view.write([("bob", Modify(count)), ("alice", Clear())]) == [{"n": 2}, None]
        assert view.write([("bob", Merge({"m": 1}))]) == [{"n": 2, "m": 1}]
        assert view.read_after("", 10) == storage.read(["alice", "bob"])
    with (
        contextlib.closing(PostgresStorage(server_url(), schema=schema, table="ids")) as view,
        pytest.raises(StorageError, match=r"is character\(9\) .*; cast it in the view's query"),
    ):
        view.read(["bob"])


def test_a_table_that_is_altered_later_returns_no_other_users(
    storage: PostgresStorage, direct: psycopg.Connection[Any]
) -> None:
    """Rows of other ids than asked for are an error of the library, and nothing is written."""
    direct.execute("ALTER TABLE user_metadata ALTER COLUMN user_id TYPE char(36)")
    for users in (["bob"], ["bob", "alice"]):
        with pytest.raises(StorageError, match="rows of other users than asked for"):
            storage.read(users)
    changes: list[Change] = [Merge({"n": 2}), Replace({"n": 2}), Modify(lambda _: {"n": 2})]
    for change in changes:
        for others in ([], [("alice", Merge({}))]):
            assert storage.write([("bob", change), *others])[0] == {"n": 2}
    assert storage.write([("bob", Clear())]) == [None]


# The schema.


def test_the_table_is_found_once(schema: str, direct: psycopg.Connection[Any]) -> None:
    """A search_path that is changed afterwards does not lead to another table."""
    with (
        empty_schema() as other,
        ConnectionPool(server_url(), min_size=1, max_size=1, open=True) as pool,
    ):
        storage = PostgresStorage(pool)

        def search(path: str) -> None:
            with pool.connection() as connection:
                connection.execute(SQL("SET search_path = {}").format(Identifier(path)))

        search(schema)
        assert storage.read(["bob"]) == {}
        storage.write([("bob", Merge({"n": 1}))])
        direct.execute(
            SQL("CREATE TABLE {}.user_metadata (LIKE user_metadata INCLUDING ALL)").format(
                Identifier(other)
            )
        )
        search(other)
        assert storage.write([("bob", Modify(count)), ("alice", Clear())]) == [{"n": 2}, None]
        assert storage.write([("bob", Merge({"m": 1}))]) == [{"n": 2, "m": 1}]
        assert storage.read(["bob"]) == {"bob": {"n": 2, "m": 1}} == rows(direct)
