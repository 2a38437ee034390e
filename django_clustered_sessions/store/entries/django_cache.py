"""Django's own backend for Redis: OPTIONS are redis-py's, and there is one primary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .entry import Entry, Foreign, Kind, build, dotted, locations

#: Names of Django's backends for Redis.
BACKENDS: Final = ("RedisCache",)

#: Options that Django takes out of those of a connection.
_DJANGOS: Final = frozenset({"parser_class", "pool_class", "serializer"})


def read(location: Any, options: Mapping[str, Any], backend: str) -> Entry:
    """Return what an entry says.

    Raises BadEntry.
    """
    parser = options.get("parser_class")
    is_foreign = parser is not None and not dotted(parser).startswith("redis.")
    return build(
        Kind.SERVER,
        locations(location, ";,"),
        {name: options[name] for name in options.keys() - _DJANGOS},
        cluster_is="Django's own backend is for one primary; that of django-redis, django-valkey "
        "or django-cachex takes its place",
        pool_option="pool_class",
        pool_class=options.get("pool_class"),
        foreign=[Foreign("parser_class", parser, decides=False)] if is_foreign else (),
    )
