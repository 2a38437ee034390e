"""Values of ``_session_expiry`` and the expiry that the store is told, odd ones included."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from django.contrib.sessions.serializers import JSONSerializer

from django_clustered_sessions.importing import old_engine, on_demand
from django_clustered_sessions.protocol.options import Expiry, bounded
from django_clustered_sessions.protocol.record import LATEST_MS, Mode, milliseconds_of, moment
from django_clustered_sessions.session.lifetime import Lifetime

CENTURY_MS = 100 * 365 * 24 * 60 * 60 * 1000
NONSENSE = {
    "word": "tomorrow",
    "empty": "",
    "no day": "2026-13-45T00:00:00",
    "not a number": float("nan"),
    "infinite": float("inf"),
    "beyond a float": 1e308,
    "infinite Decimal": Decimal("inf"),
    "signalling Decimal": Decimal("sNaN"),
    "tuple": (1,),
    "bytes": b"60",
    "object": object(),
}


@pytest.mark.parametrize("value", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_refused(value: Any) -> None:
    for expiry_of in (Expiry.of, Lifetime().expiry):
        with pytest.raises((TypeError, ValueError)):
            expiry_of(value)


@pytest.mark.parametrize(
    ("value", "expected", "bounded_ms"),
    [
        (None, Expiry(Mode.DEFAULT, 0), 0),
        (0, Expiry(Mode.BROWSER, 0), 0),
        # Django reads what is false as its 0.
        ([], Expiry(Mode.BROWSER, 0), 0),
        ({}, Expiry(Mode.BROWSER, 0), 0),
        (1.5, Expiry(Mode.SLIDING, 1500), 1500),
        (10**6, Expiry(Mode.SLIDING, 10**9), 10**9),
        (10**10, Expiry(Mode.SLIDING, 10**13), CENTURY_MS),
        (10**20, Expiry(Mode.SLIDING, 10**23), CENTURY_MS),
        (1e300, Expiry(Mode.SLIDING, round(1e303)), CENTURY_MS),
        (-1, Expiry(Mode.SLIDING, -1000), -1000),
        (-(10**9), Expiry(Mode.SLIDING, -(10**12)), -(10**12)),
        (-(10**30), Expiry(Mode.SLIDING, -(10**33)), -CENTURY_MS),
        ("2026-11-28T00:00:00+00:00", Expiry(Mode.ABSOLUTE, 1_795_824_000_000), 1_795_824_000_000),
        (datetime(9999, 12, 31, tzinfo=UTC), Expiry(Mode.ABSOLUTE, 253_402_214_400_000), None),
        (datetime(1, 1, 2, tzinfo=UTC), Expiry(Mode.ABSOLUTE, -62_135_510_400_000), 0),
    ],
)
def test_expiry_fits_the_record(value: Any, expected: Expiry, bounded_ms: int | None) -> None:
    expiry = Lifetime().expiry(value)
    assert expiry == Expiry.of(value) == expected
    assert expiry.bounded_ms == (expected.span_ms if bounded_ms is None else bounded_ms)
    assert abs(expiry.bounded_ms) < 2**48


@pytest.mark.parametrize("value", [float("inf"), 1e308, "tomorrow"])
def test_nonsense_is_not_taken_over(value: Any) -> None:
    found = old_engine.Found({"_session_expiry": value}, datetime.max)
    with pytest.raises(old_engine.Unreadable, match="_session_expiry"):
        on_demand.pack(found, JSONSerializer())


def test_date_without_a_zone_is_in_the_local_one() -> None:
    there = datetime(2026, 11, 28)
    assert Expiry.of(there).span_ms == Expiry.of("2026-11-28T00:00:00").span_ms
    assert Expiry.of(there).span_ms == round(there.timestamp() * 1000)


@pytest.mark.parametrize("zone", [None, UTC, timezone(timedelta(hours=14)), timezone.min])
def test_ends_of_the_calendar_are_deadlines(
    zone: timezone | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for here in ("UTC", "Pacific/Kiritimati", "America/Los_Angeles"):
        monkeypatch.setenv("TZ", here)
        time.tzset()
        try:
            first, last = (end.replace(tzinfo=zone) for end in (datetime.min, datetime.max))
            assert Expiry.of(first).bounded_ms == 0
            assert Expiry.of(last).bounded_ms == LATEST_MS
        finally:
            monkeypatch.undo()
            time.tzset()


def test_every_number_is_a_moment_in_every_zone() -> None:
    for ms in (-(10**20), -1, 0, LATEST_MS, 2**48 - 1, 10**20):
        for zone in (timezone.max, timezone.min):
            assert moment(ms).astimezone(zone) == moment(ms)
    date = datetime(2026, 11, 28, 1, 2, 3, 456_000, UTC)
    assert moment(milliseconds_of(date)) == date
    assert milliseconds_of(date + timedelta(microseconds=999)) == milliseconds_of(date)


def test_date_beyond_the_record_is_cut() -> None:
    assert Expiry(Mode.ABSOLUTE, 2**60).bounded_ms == 2**48 - 1
    assert (bounded(2**60), bounded(-(2**60))) == (CENTURY_MS, -CENTURY_MS)


@pytest.mark.parametrize("days", [-1, 1, 36500])
def test_timedelta_counts_from_the_stores_now(days: int) -> None:
    lifetime, span = Lifetime(), timedelta(days=days)
    lifetime.note(span, "what Django keeps")
    expiry = lifetime.expiry("what Django keeps")
    assert expiry.mode is Mode.FROM_NOW
    # As long as the test takes less than an hour.
    assert 0 <= span.total_seconds() * 1000 - expiry.span_ms < 3_600_000
    with pytest.raises(ValueError, match="isoformat"):
        lifetime.expiry("what somebody else set since")
