"""Near cache of a process: it keeps no session that has ended, and notices a loss."""

from __future__ import annotations

import pytest

from django_clustered_sessions.protocol.record import CachedSession, Loaded, Meta, Mode
from django_clustered_sessions.session import near_cache
from django_clustered_sessions.session.near_cache import Copy, Life, NearCache


def test_late_load_brings_no_ended_session_to_hand() -> None:
    cache = NearCache()
    life = Life(0.0, 0, 10**9)
    cache.put("a", CachedSession.of(b"1", {}), 10**6, life)
    cache.end("a")
    cache.put("a", CachedSession.of(b"1", {}), 10**6, life)
    assert (cache.get("a"), cache.life("a"), cache.bytes) == (None, None, 0)
    for number in range(near_cache.ENDED + 1):
        cache.end(str(number))
    assert len(cache.ended_lately) == near_cache.ENDED


@pytest.mark.parametrize(
    ("life", "is_told"),
    [
        (Life(100.0, 0, 10**9), True),
        # It may have ended by itself by now.
        (Life(100.0, 0, 15_000), False),
        # Its end may have left no trace any more.
        (Life(-900.0, 0, 10**9), False),
        (None, False),
    ],
    ids=["known", "short", "long ago", "nothing"],
)
def test_loss_is_a_session_that_lived_a_short_while_ago(life: Life | None, is_told: bool) -> None:
    cache = NearCache()
    cache.put("a", CachedSession.of(b"1", {}), 10**6, life)
    assert cache.misses("a", 110.0) is is_told
    # Once a minute.
    assert not cache.misses("a", 111.0)
    if is_told:
        assert cache.misses("a", 171.0)
    assert not cache.misses("b", 300.0)


@pytest.mark.parametrize("generations", ["one", "another"])
def test_slow_answer_takes_no_later_copy_away(generations: str) -> None:
    """Of two writes of this process, the reply to the first may be the one that is handled last."""
    cache, channel = NearCache(), object()
    later = channel if generations == "one" else object()

    def write(version: bytes, current_at_s: float, generation: object) -> None:
        meta = Meta(Mode.DEFAULT, version, 0, 10**9, 0, 0, 0, b"")
        copy = Copy(Loaded(meta, {}), 0, 0.0, current_at_s, generation, is_tracked=False)
        cache.put("a", CachedSession.of(version, {}), 10**6, None, copy)

    write(b"second..", 2.0, channel)
    write(b"first...", 1.0, later)
    expected = b"second.." if generations == "one" else b"first..."
    known, copy = cache.get("a"), cache.copy("a")
    assert known is not None
    assert copy is not None
    assert known.version == copy.found.meta.version == expected
