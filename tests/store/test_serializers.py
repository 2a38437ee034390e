"""A session is written and read with the site's serialiser."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.checks.settings import check_settings
from django_clustered_sessions.serializers import MsgspecSerializer


def test_nodes_with_either_serialiser_share_sessions(store: redis.Redis, settings: Any) -> None:
    ours = f"{MsgspecSerializer.__module__}.{MsgspecSerializer.__qualname__}"
    values = {"n": 1, "cart": {"tea": 2, "été": None}, "1": [1.5, "x" * 5000]}
    session = SessionStore()
    session.update(values)
    session.create()
    for serializer in (ours, settings.SESSION_SERIALIZER, ours):
        settings.SESSION_SERIALIZER = serializer
        assert check_settings() == []
        session = SessionStore(session.session_key)
        assert session.load() == values
        session["n"] = values["n"] = values["n"] + 1
        session["cart"]["tea"] += 1
        values["cart"]["tea"] += 1
        session.save()


def test_refused_value_is_told_with_the_sites_serialiser(store: redis.Redis) -> None:
    session = SessionStore()
    session["seen"] = {1}
    with pytest.raises(TypeError, match="session key 'seen': JSONSerializer cannot write set"):
        session.save()
