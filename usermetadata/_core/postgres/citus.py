"""A table that Citus distributes over several servers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psycopg import Cursor
from psycopg.rows import tuple_row
from psycopg.sql import SQL, Identifier, Literal

from usermetadata._core.postgres.statements import CREATE_BY_USER
from usermetadata.exceptions import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import LiteralString

    from psycopg import Connection

    from usermetadata._core.postgres.statements import Table

_EXTENSION = "SELECT count(*) FROM pg_extension WHERE extname = 'citus'"
_IS_WORKER = "SELECT groupid <> 0 FROM pg_dist_local_group"
_KIND = """
SELECT distribution_column, citus_table_type FROM citus_tables
WHERE table_name = {name}::regclass AND citus_table_type <> 'local'
"""
_TRIGGERS = """
SELECT count(*) FROM pg_trigger WHERE tgrelid = {name}::regclass AND NOT tgisinternal
"""
# Without workers, Citus uses the coordinator.
_HAS_SERVERS = "SELECT count(*) = 0 OR bool_or(shouldhaveshards) FROM pg_dist_node"
_HAS_ROWS = "SELECT count(*) FROM (SELECT FROM {table} LIMIT 1) AS row"
_DISTRIBUTE = "SELECT create_distributed_table({name}, 'user_id')"
# The rows were copied to the shards; those on the coordinator only take space.
_TRUNCATE = "SELECT truncate_local_data_after_distributing_table({name}::regclass)"
_SHARDS = """
SELECT count(DISTINCT shardid), count(DISTINCT groupid)
FROM pg_dist_shard JOIN pg_dist_placement USING (shardid)
WHERE logicalrelid = {name}::regclass
"""


def distribute(connection: Connection[Any], table: Table) -> list[str]:
    """Create the table if it is missing, and distribute it by user id.

    Returns:
        One line for each step that was done.

    Raises:
        UsageError: the database does not have Citus, or the table cannot be distributed.
    """
    table.describe(connection)
    name = table.full_name
    parts = {"table": Identifier(*name), "name": Literal(Identifier(*name).as_string())}
    cursor = Cursor(connection, row_factory=tuple_row)
    title = f"table {Identifier(*name).as_string()}"

    def ask(query: LiteralString) -> tuple[Any, ...]:
        return cursor.execute(SQL(query).format(**parts)).fetchone() or ()

    _check_server(ask, title)
    if table.is_shared:
        raise UsageError(
            f"{title}: it is a SuperTokens core's, whose locks work on one server only; use a table"
            " of your own"
        )
    exists = table.user_id_length > 0
    if not table.is_plain:
        raise UsageError(
            f"{title}: it is a view or a foreign table, which Citus cannot distribute; name the"
            " table behind it"
        )
    kind = ask(_KIND) if exists else ()
    if kind and kind[0] != "user_id":
        raise UsageError(
            f"{title}: it is a {kind[1]} table, and not distributed by user_id; run SELECT"
            f" undistribute_table({parts['name'].as_string()}) first"
        )
    if exists and ask(_TRIGGERS) != (0,):
        raise UsageError(
            f"{title}: it has triggers, for example those of indexes, and Citus has none on a"
            " distributed table; remove them (`python -m usermetadata index --drop NAME`)"
        )
    done = [f"{title}: it exists" if exists else f"{title}: created"]
    if not kind:
        with connection.transaction():
            if not exists:
                connection.execute(table[CREATE_BY_USER], {})
            had_rows = ask(_HAS_ROWS) != (0,)
            ask(_DISTRIBUTE)
        if had_rows:
            ask(_TRUNCATE)
    shards, servers = ask(_SHARDS)
    how = "it is distributed" if kind else "distributed"
    done.append(f"{title}: {how} by user_id: {shards} shards on {servers} servers")
    table.forget()
    return done


def _check_server(ask: Callable[[LiteralString], tuple[Any, ...]], title: str) -> None:
    if ask(_EXTENSION) == (0,):
        raise UsageError(
            f"{title}: this database has no extension citus, so there are no other servers to"
            " distribute it over; run CREATE EXTENSION citus on each server"
        )
    if ask(_IS_WORKER) == (True,):
        raise UsageError(
            f"{title}: this server is a worker of Citus, and only the coordinator distributes"
            " tables; connect to the coordinator"
        )
    if ask(_HAS_SERVERS) != (True,):
        raise UsageError(
            f"{title}: no server of this cluster takes shards; add one with SELECT"
            " citus_add_node('host', 5432)"
        )
