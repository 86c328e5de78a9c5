"""Storages by URL or by path, and the check of a storage that an application made."""

from __future__ import annotations

import os
import re
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, cast

from usermetadata.exceptions import InvalidInputError
from usermetadata.indexes import check_indexes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from usermetadata.indexes import Index
    from usermetadata.storage import Storage

DEFAULT_URL = "sqlite:///users.db"

# Arguments of the storages that a URL may have as parameters.
_PARAMETERS: dict[str, dict[str, Callable[[str], object]]] = {
    "memory": {"app_id": str},
    "sqlite": {"app_id": str, "synchronous": str.upper, "timeout": float},
    "postgresql": {
        "app_id": str,
        "max_connections": int,
        "schema": str,
        "statements": str,
        "table": str,
        "timeout": float,
    },
}


def open_storage(
    storage: Storage | str | os.PathLike[str], indexes: Iterable[Index] = ()
) -> Storage:
    """Return the storage that a URL, a factory or a path names, or the storage itself.

    Args:
        storage: one of these.
        indexes: the properties by which users can be found.

    Raises:
        InvalidInputError: it is none of these, or has its own indexes.
    """
    arguments = {"indexes": check_indexes(indexes)} if indexes else {}
    if isinstance(storage, os.PathLike):
        return _open_sqlite(storage, **arguments)
    if isinstance(storage, str) and "://" in storage:
        return _open_url(storage, arguments)
    if isinstance(storage, str) and not _FACTORY.fullmatch(storage):
        return _open_sqlite(storage, **arguments)
    _refuse_indexes(arguments)
    return _call_factory(storage) if isinstance(storage, str) else check_storage(storage)


def path_of(storage: str) -> str:
    """Return the path of the SQLite file that a URL or a path names; empty if it names none."""
    if storage.startswith("sqlite:///"):
        storage = storage.removeprefix("sqlite:///").partition("?")[0]
    elif "://" in storage or _FACTORY.fullmatch(storage):
        return ""
    return "" if storage == ":memory:" else storage


def _refuse_indexes(arguments: dict[str, Any]) -> None:
    if arguments:
        raise InvalidInputError(
            "indexes: the storage was made already; pass them to its constructor"
        )


def check_storage(storage: object) -> Storage:
    """Return the storage if it has the methods of a storage.

    Raises:
        InvalidInputError: it is not a storage; or one of its methods is missing or wrong.
    """
    kind = type(storage).__name__
    methods = {name: getattr(storage, name, None) for name in _METHODS}
    missing = [name for name, method in methods.items() if not callable(method)]
    if isinstance(storage, type):
        raise InvalidInputError(
            f"storage: {storage.__name__} is a class; pass an instance, {storage.__name__}(...)"
        )
    if {"read", "write"} <= set(missing):
        raise InvalidInputError(
            f'storage: {kind} is not a storage; pass for example SQLiteStorage("users.db")'
        )
    if missing:
        raise InvalidInputError(
            f"storage: {kind} has no method {' and no method '.join(missing)}; define it as"
            " usermetadata.Storage describes it"
        )
    for name, method in methods.items():
        if iscoroutinefunction(method):
            raise InvalidInputError(
                f"storage: {kind}.{name} is `async def`; make it a plain method, which the"
                " `asyncio` functions call in a worker thread"
            )
    for name in ("reads_in_flight", "writes_in_flight"):
        at_once = getattr(storage, name, 1)
        if not isinstance(at_once, int) or at_once < 0:
            raise InvalidInputError(f"storage: {kind}.{name} is not a number; make it 0 or more")
    return cast("Storage", storage)


_FACTORY = re.compile(r"[^\W\d][\w.]+:[^\W\d]\w*")  # package.module:factory
_GROUP = "usermetadata.storages"  # of entry points
_METHODS = ("read", "write", "for_app", "close")


def _open_url(url: str, indexes: dict[str, Any]) -> Storage:
    scheme, _, rest = url.partition("://")
    kind = scheme.lower().partition("+")[0]  # SQLAlchemy adds a driver: postgresql+psycopg
    kind = "postgresql" if kind == "postgres" else kind
    # A password may hold a question mark.
    credentials, at, address = rest.rpartition("@")
    place, _, query = address.partition("?")
    place = f"{credentials}{at}{place}"
    arguments, others = _arguments(kind, query)
    arguments |= indexes
    if kind == "postgresql":
        from usermetadata.storage.postgres import PostgresStorage

        parameters = f"?{'&'.join(others)}" if others else ""
        return PostgresStorage(f"postgresql://{place}{parameters}", **arguments)
    if others and kind in _PARAMETERS:
        raise InvalidInputError(
            f'storage: a URL of {kind}:// has no parameter "{others[0].partition("=")[0]}"; known'
            f" are {', '.join(_PARAMETERS[kind])}"
        )
    if kind == "memory" and not place:
        from usermetadata.storage.memory import InMemoryStorage

        return InMemoryStorage(**arguments)
    if kind == "sqlite" and (place[:1] in ("", "/") or place == ":memory:"):
        return _open_sqlite(place.removeprefix("/") or ":memory:", **arguments)
    _refuse_indexes(indexes)
    return _open_installed(scheme.lower(), url)


def _open_installed(scheme: str, url: str) -> Storage:
    """Return the storage of a package that has registered the URL's scheme."""
    from importlib.metadata import entry_points

    installed = {each.name.lower(): each for each in entry_points(group=_GROUP)}
    if scheme in installed and scheme not in _PARAMETERS:
        factory: Callable[[str], object] = installed[scheme].load()
        return check_storage(factory(url))
    known = ", ".join(sorted(f"{name}://" for name in {*_PARAMETERS, *installed}))
    raise InvalidInputError(
        f"storage: unsupported storage URL: {scheme}://; known are {known}; pass for example"
        ' "sqlite:///users.db", or "sqlite:////absolute/path/users.db" with four slashes'
    )


def _call_factory(name: str) -> Storage:
    from importlib import import_module

    module, _, attribute = name.partition(":")
    advice = "pass package.module:factory, or a URL such as sqlite:///users.db"
    try:
        factory: object = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InvalidInputError(f"storage: {name}: {error}; {advice}") from error
    if not callable(factory):
        kind = type(factory).__name__
        raise InvalidInputError(f"storage: {name}: {kind} is not a function; {advice}")
    return check_storage(factory())


def _arguments(kind: str, query: str) -> tuple[dict[str, Any], list[str]]:
    """Return the parameters that are arguments of the storage, and the others unchanged."""
    arguments: dict[str, Any] = {}
    others: list[str] = []
    for parameter in filter(None, query.split("&")):
        name, _, value = parameter.partition("=")
        convert = _PARAMETERS.get(kind, {}).get(name)
        if convert is None:
            others.append(parameter)
            continue
        from urllib.parse import unquote

        try:
            arguments[name] = convert(unquote(value))
        except ValueError:
            raise InvalidInputError(
                f"storage: the URL's parameter {name} is not a number; pass for example {name}=30"
            ) from None
    return arguments, others


def _open_sqlite(path: str | os.PathLike[str], **arguments: Any) -> Storage:
    from usermetadata.storage.sqlite import SQLiteStorage

    return SQLiteStorage(path, **arguments)
