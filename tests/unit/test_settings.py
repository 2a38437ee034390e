"""Settings that others follow from."""

from __future__ import annotations

from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured

from django_clustered_sessions.conf import conf


@pytest.mark.parametrize(("most", "in_process"), [(0, 0), (1, 1), (8, 1), (9, 2), (16, 2), (64, 8)])
def test_an_eighth_of_the_waiters_may_be_in_one_process(
    most: int, in_process: int, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_LOCK_MAX_WAITERS = most
    assert conf.lock_process_waiters == in_process


@pytest.mark.parametrize(
    ("setting", "engine", "cache"),
    [
        (None, None, None),
        ("site.engine", "site.engine", None),
        ({"ENGINE": "site.engine", "CACHE": "old"}, "site.engine", "old"),
    ],
)
def test_old_engine_may_have_a_cache_of_its_own(
    setting: Any, engine: str | None, cache: str | None, settings: Any
) -> None:
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = setting
    assert (conf.migrate_from, conf.migrate_cache) == (engine, cache)


def test_old_engine_without_a_name_is_a_clear_error(settings: Any) -> None:
    """The system check says it too, and a worker starts without one."""
    settings.CLUSTERED_SESSIONS_MIGRATE_FROM = {"CACHE": "old"}
    with pytest.raises(ImproperlyConfigured, match='MIGRATE_FROM has no "ENGINE": name'):
        _ = conf.migrate_from
