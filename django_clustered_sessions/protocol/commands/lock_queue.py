"""Take, hold and release a session's lock, or a place in its queue."""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Any, Final

from django_clustered_sessions.protocol.effects import Argument, Call
from django_clustered_sessions.protocol.options import Fence, LockOptions
from django_clustered_sessions.protocol.record import EndReason, SessionKeys
from django_clustered_sessions.protocol.results import Gone, Held, Lost, Taken

from .script_calls import Status, parse, scripted

#: Time in which a waiter has to take a lock that was handed on to it, in ms.
CLAIM_MS: Final = 2000

_TIMES: Final = Struct(">5q")


def acquire(
    keys: SessionKeys, token: str, options: LockOptions, wait_ms: int, inside: str = ""
) -> Call:
    """Build ``lua/acquire.lua``; ``inside`` is the token of an outer request's lock."""
    return scripted(
        "acquire",
        (keys.record, keys.locks),
        token,
        options.name,
        inside,
        _TIMES.pack(
            wait_ms,
            options.lease_ms,
            CLAIM_MS,
            options.most,
            2 * options.hold_ms + options.wait_ms,
        ),
    )


def parse_acquire(reply: Any) -> Taken | Held | Gone:
    """Read the reply of ``acquire``."""
    status, now_ms, rest = parse(reply)
    match status:
        case Status.GONE:
            return Gone(now_ms, EndReason.of(rest[0]))
        case Status.HELD:
            since_ms, holder, lease_ms, place, before, before_ms = rest
            return Held(
                now_ms,
                since_ms,
                _text(holder),
                lease_ms,
                place,
                before=_text(before),
                before_left_ms=before_ms,
            )
        case Status.FULL:
            since_ms, holder, waiting = rest
            return Held(now_ms, since_ms, _text(holder), waiting=waiting)
    return Taken(now_ms, rest[0], inside=status is Status.INSIDE)


def release(keys: SessionKeys, token: str) -> Call:
    """Build ``lua/release.lua``."""
    named = (keys.record, keys.locks, keys.mailbox(token))
    return scripted("release", named, token, CLAIM_MS)


def parse_release(reply: Any) -> int | None:
    """Return how long the lock was held, in ms; None where another token or none held it."""
    status, now_ms, rest = parse(reply)
    return now_ms - rest[0] if status is Status.DONE else None


def renew(keys: SessionKeys, token: str, lease_ms: int, hold_ms: int) -> Call:
    """Build ``lua/renew.lua``."""
    return scripted("renew", (keys.record, keys.locks), token, lease_ms, hold_ms, 2 * hold_ms)


def parse_renew(reply: Any) -> int | None:
    """Return how much is left of the lease, in ms; None where the lock was lost."""
    status, _, rest = parse(reply)
    return rest[0] if status is Status.DONE else None


def fenced(fence: Fence) -> tuple[Argument, ...]:
    """Return the arguments of a write under a lock: token, release, and time for the next."""
    return fence.token or "", int(fence.release), CLAIM_MS


def parse_refusal(status: Status, now_ms: int, rest: Sequence[Any]) -> Held | Lost:
    """Read the reply to a write that a lock refused."""
    since_ms, holder = rest
    return (Held if status is Status.HELD else Lost)(now_ms, since_ms, _text(holder))


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")
