"""Redis Cluster and Valkey Cluster: which node has a slot, and how a trip finds it.

The map of slots is one answer to CLUSTER SLOTS, asked over the same connections and within the
same budget as all else, so it is written once for synchronous and asynchronous use. redis-py's own
cluster client would ask COMMAND too, open pools of its own to each node, and have its own timeouts.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, Self, cast
from urllib.parse import urlsplit

from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    TryAgainError,
)

from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.protocol.commands.statistics import is_passenger
from django_clustered_sessions.protocol.effects import (
    Asks,
    Call,
    Everywhere,
    Flow,
    Pause,
    Trip,
    Wait,
    plain,
)

from . import clock
from .budget import Budget
from .errors import is_lost

#: Between two looks at a cluster that cannot answer yet, in seconds.
_PAUSE_S: Final = 0.05

#: From so many redirections of one trip on there is a pause before the next: nodes disagree.
_HOPS: Final = 3

_ASKING: Final = plain("ASKING")
_SLOTS: Final = plain("CLUSTER SLOTS")

#: Replies that send a call elsewhere, or ask for patience.
_REDIRECTS: Final = (AskError, MovedError, TryAgainError, ClusterDownError)


class NodeAddress(NamedTuple):
    """The address at which a node listens."""

    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> NodeAddress:
        """Return where the node listens that a URL names.

        Raises ValueError.
        """
        parts = urlsplit(url.strip())
        if parts.scheme == "unix" or not parts.scheme:
            raise ValueError("a node of a cluster is named by redis://HOST:PORT or rediss://...")
        return cls(parts.hostname or "localhost", parts.port or 6379)


class Addressed(tuple[Call, ...]):
    """A trip to one node of a cluster, which has ``seconds`` at most; its replies may be errors."""

    node: NodeAddress
    seconds: float

    @classmethod
    def to(cls, node: NodeAddress, trip: Iterable[Call], seconds: float) -> Self:
        """Return a trip to ``node``."""
        addressed = cls(trip)
        addressed.node, addressed.seconds = node, seconds
        return addressed


class SlotMap:
    """The map of slots to primaries, as far as this process knows it."""

    def __init__(self, start: Sequence[NodeAddress]) -> None:
        self._start = start
        self._pid = os.getpid()
        self._forget()

    def _forget(self) -> None:
        #: Never changed, but replaced: other threads read it meanwhile.
        self.slot_map: Mapping[int, NodeAddress] = {}
        #: Another one whenever a slot is found to have moved.
        self.generation = object()
        #: The time of the last answer, by clock.now_s().
        self.asked_at_s = float("-inf")
        self._refreshing = threading.Lock()
        #: True if the map has to be asked for anew; and a node that is better not asked.
        self.is_stale = True
        self._suspect: NodeAddress | None = None

    def node(self, slot: int | None) -> NodeAddress:
        """Return the primary of a slot, any for None; if it is unknown, a node that may know."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._forget()
        if slot is not None and (known := self.slot_map.get(slot)):
            return known
        return next(iter(self._candidates()))

    @property
    def primaries(self) -> Sequence[NodeAddress]:
        """All nodes that have slots, in the order of their first one."""
        return list(dict.fromkeys(node for _, node in sorted(self.slot_map.items())))

    @property
    def ranges(self) -> Mapping[NodeAddress, Sequence[tuple[int, int]]]:
        """Each primary's slots, in ranges with both ends included."""
        found: dict[NodeAddress, list[tuple[int, int]]] = {}
        for slot, node in sorted(self.slot_map.items()):
            its = found.setdefault(node, [])
            first = its.pop()[0] if its and its[-1][1] == slot - 1 else slot
            its.append((first, slot))
        return found

    def moved(self, slot: int, node: NodeAddress) -> None:
        """Take a node's word for where one slot is; the others may have moved too."""
        self.slot_map = {**self.slot_map, slot: node}
        self.is_stale, self.generation = True, object()

    def doubt(self, node: NodeAddress | None = None) -> None:
        """Ask anew before the next trip, and not ``node``, which does not answer."""
        self.is_stale, self._suspect = True, node or self._suspect

    def refreshing(self, budget: Budget) -> Flow[None]:
        """Ask the nodes one after the other for the map, unless another thread or task does."""
        if not self._refreshing.acquire(blocking=False):
            return
        try:
            candidates = self._candidates()
            for left, node in zip(range(len(candidates) + 1, 1, -1), candidates, strict=True):
                asked_at_s = clock.now_s()
                try:
                    (reply,) = yield Addressed.to(node, (_SLOTS,), budget.left / left)
                except SessionStoreUnavailable:
                    continue
                if not isinstance(reply, Exception) and (slots := dict(_parse_slots(reply, node))):
                    if slots != self.slot_map:
                        self.generation = object()
                    self.slot_map, self.is_stale, self.asked_at_s = slots, False, asked_at_s
                    return
        finally:
            self._refreshing.release()

    def _candidates(self) -> list[NodeAddress]:
        found = list(dict.fromkeys((*self.primaries, *self._start)))
        # Last, and not left out: there may be no other.
        found.sort(key=lambda node: node == self._suspect)
        return found


def _parse_slots(reply: Sequence[Any], asked: NodeAddress) -> Iterator[tuple[int, NodeAddress]]:
    for first, last, (host, port, *_), *_ in reply:
        # A node that does not know its own name is the one that was asked.
        name = (host or b"").decode()
        node = NodeAddress(asked.host if name in ("", "?") else name, int(port))
        for slot in range(first, last + 1):
            yield slot, node


class Nodes:
    """The pools of one world, one for each node, and the choice of the one to ask.

    ``build`` makes the pool for an address.
    """

    #: The tracked connections beside them, once there are any: see ``tracking``.
    channels: Any = None
    #: True if pools that are still made, for what is under way, are over too.
    is_over = False

    def __init__(self, slots: SlotMap, build: Callable[[NodeAddress], Any]) -> None:
        self.slot_map, self._build = slots, build
        self._pools: dict[NodeAddress, Any] = {}
        self._generation = slots.generation

    @property
    def slots(self) -> Mapping[NodeAddress, Sequence[tuple[int, int]]]:
        """All primaries that are known, each with its ranges of slots."""
        return self.slot_map.ranges

    @property
    def pools(self) -> Sequence[Any]:
        """All pools that were made."""
        return list(self._pools.values())

    def node(self, key: str) -> NodeAddress:
        """Return the primary that has a key, as far as this process knows."""
        return self.slot_map.node(_slot(key))

    def pool(self, step: Asks) -> Any:
        """Return the pool of the node that an addressed trip names, or that has a mailbox."""
        if isinstance(step, Addressed):
            node = step.node
        else:
            node = self.slot_map.node(_slot(cast(Wait, step).mailboxes[0]))
        if self._generation is not self.slot_map.generation:
            self._leave()
        found = self._pools.get(node)
        if found is None:
            # Two that make one at the same time: the one that is not kept has no connection yet.
            found = self._pools.setdefault(node, self._build(node))
            if self.is_over:
                found.end()
        return found

    def _leave(self) -> None:
        """Close the connections to nodes without slots: some come back with another address."""
        self._generation = self.slot_map.generation
        primaries = self.slot_map.primaries
        for node in list(self._pools):
            if node not in primaries and (pool := self._pools.pop(node, None)):
                pool.end()

    def end(self) -> None:
        """Close the connections, those that are lent when they come back."""
        self.is_over = True
        for pool in self.pools:
            pool.end()

    def disconnect(self) -> None:
        """Close all connections; for synchronous pools."""
        for pool in self.pools:
            pool.disconnect()

    def asking(self, trip: Trip, budget: Budget) -> Flow[list[Any]]:
        """Ask a trip of the primaries of its slots; the flow's replies may be errors, as a node's.

        What comes before a call that is sent elsewhere is not asked again; what comes behind it is,
        for it may build on it. Figures that ride along stay behind where their slot is open.

        Raises SessionStoreUnavailable.
        """
        if isinstance(trip, Everywhere):
            return (yield from self._everywhere(trip, budget))
        replies: list[Any] = [None] * len(trip)
        slots = [_slot(call.keys[0]) if call.keys else None for call in trip]
        calls = [_guarded(call) for call in trip]
        pending: Sequence[int] = range(len(trip))
        hops = in_vain = 0
        asked_to: NodeAddress | None = None
        lost: SessionStoreUnavailable | None = None
        refused: Exception | None = None
        while pending:
            if self.slot_map.is_stale and not asked_to:
                yield from self.slot_map.refreshing(budget)
            node, batch, others = self._batch(pending, slots, asked_to)
            more = len({self.slot_map.node(slots[at]) for at in others})
            some = [calls[at] for at in batch]
            some = list(_asking(some)) if asked_to else some
            refusal, done = None, 0
            try:
                found = yield Addressed.to(node, some, budget.left / (1 + more))
            except SessionStoreUnavailable as error:
                self.slot_map.doubt(node)
                lost = lost or error
                if budget.left <= 0 or (in_vain >= more and not is_lost(error.__cause__)):
                    raise lost from None
            else:
                lost = None
                for at, reply in zip(batch, found[1::2] if asked_to else found, strict=True):
                    replies[at] = reply
                    if isinstance(reply, _REDIRECTS) and not _stays_behind(trip, at, reply):
                        refusal = reply
                        break
                    done += 1
            asked_to, pauses = self._follow(refusal, node) if refusal else (None, lost is not None)
            hops += refusal is not None
            refused = refusal or refused
            in_vain = in_vain + 1 if pauses else 0
            # The others first: they need not suffer from this one.
            rest = batch[done:]
            pending = [*rest, *others] if asked_to else [*others, *rest]
            if pending and (in_vain > more or hops > _HOPS):
                if budget.left <= _PAUSE_S:
                    if lost:
                        raise lost
                    for at in pending:
                        replies[at] = refused
                    break
                budget.spend(_PAUSE_S)
                in_vain = 0
                yield Pause(_PAUSE_S)
        return replies

    def _everywhere(self, trip: Everywhere, budget: Budget) -> Flow[list[Any]]:
        if self.slot_map.is_stale:
            yield from self.slot_map.refreshing(budget)
        replies = []
        nodes = self.slot_map.primaries or [self.slot_map.node(None)]
        for left, node in zip(range(len(nodes), 0, -1), nodes, strict=True):
            replies += yield Addressed.to(node, trip, budget.left / left)
        return replies

    def _batch(
        self, pending: Sequence[int], slots: Sequence[int | None], asked_to: NodeAddress | None
    ) -> tuple[NodeAddress, list[int], list[int]]:
        """Return whom to ask next, what of the pending calls, and what is left then."""
        slot = next((slots[at] for at in pending if slots[at] is not None), None)
        node = asked_to or self.slot_map.node(slot)
        batch: list[int] = []
        others: list[int] = []
        for at in pending:
            its = slots[at]
            fits = its in (None, slot) or (not asked_to and self.slot_map.node(its) == node)
            (batch if fits else others).append(at)
        return node, batch, others

    def _follow(self, refusal: Exception, asked: NodeAddress) -> tuple[NodeAddress | None, bool]:
        """Learn from a refusal; return whom to ask this once, and whether to pause before."""
        if isinstance(refusal, AskError):
            # MovedError is derived from it.
            node = NodeAddress(refusal.host or asked.host, refusal.port)
            if not isinstance(refusal, MovedError):
                return node, False
            self.slot_map.moved(refusal.slot_id, node)
            return None, False
        if isinstance(refusal, ClusterDownError):
            self.slot_map.doubt()
        return None, True


def _slot(key: str) -> int:
    return key_slot(key.encode())


def _guarded(call: Call) -> Call:
    """Return a call that a node refuses as a whole while it has only a part of the slot.

    While a slot moves key by key, a script that finds all the keys that it was given may still be
    refused one that it is about to make, in its middle, after it has written. So it is given a key
    that no node has: then it is told to try again, before it begins.
    """
    if call.script is None or call.script.reads_only:
        return call
    return call._replace(keys=(*call.keys, call.keys[0].partition("}")[0] + "}:nobody"))


def _stays_behind(trip: Trip, at: int, refusal: Exception) -> bool:
    """Return whether the slot is open to migration and a call need not wait until it is closed."""
    is_open = isinstance(refusal, AskError | TryAgainError) and type(refusal) is not MovedError
    return is_open and is_passenger(trip, at)


def _asking(calls: Iterable[Call]) -> Iterator[Call]:
    """Return calls to the node that a slot is moving to: it wants to be told so before each."""
    for call in calls:
        yield _ASKING
        if call.script is None:
            yield call
        else:
            # As source: a second call, where it is not known, would lack the word before it.
            # By the word that each store has.
            source = call.script.source
            yield plain("EVAL", source, len(call.keys), *call.keys, *call.arguments)
