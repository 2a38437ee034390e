"""Real stores with replicas and Sentinels on loopback, for tests of failover."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import redis

from django_clustered_sessions.store.entries import django_redis
from tests.conftest import use_store
from tests.servers import StoreServer, wait_for

#: Name of the primary in the Sentinels.
NAME: Final = "main"

#: Seconds that a promotion may take. A Sentinel that was not let run for 2 s does nothing for 30 s:
#: it is in TILT mode.
PROMOTION_S: Final = 80.0

#: Silence in ms after which Sentinels consider a server down: by default, and in tests that wait
#: for it.
PATIENT_MS: Final = 30_000
IMPATIENT_MS: Final = 300


class Replicated:
    """Primary with replicas, and Sentinels that watch them if requested.

    ``flags`` are those of primary and replicas, ``binary`` is the program of every server,
    ``server`` makes one. However long the machine stalls, a failover happens only in tests that
    wait for it. Use as a context manager.
    """

    def __init__(
        self,
        *flags: str,
        replicas: int = 1,
        sentinels: int = 0,
        binary: Path | None = None,
        server: Callable[..., StoreServer] = StoreServer,
    ) -> None:
        self._server = server
        self._flags, self._binary = flags, binary
        self._numbers = replicas, sentinels
        self._started = ExitStack()

    def __enter__(self) -> Replicated:
        replicas, sentinels = self._numbers
        with self._started:
            self.primary = self._start(*self._flags)
            self.replicas = [self._follow() for _ in range(replicas)]
            self.sentinels = [self._start_sentinel(sentinels) for _ in range(sentinels)]
            for sentinel in self.sentinels:
                wait_for(
                    lambda one=sentinel: self._is_informed(one),
                    "a Sentinel knows all",
                    timeout_s=30.0,
                )
            self._started = self._started.pop_all()
        return self

    def __exit__(self, *args: object) -> None:
        self._started.close()

    @property
    def stores(self) -> Sequence[StoreServer]:
        """The servers that hold data."""
        return [self.primary, *self.replicas]

    def use(
        self,
        settings: Any,
        database: int,
        *,
        user: str = "",
        scheme: str = "redis",
        **options: Any,
    ) -> None:
        """Point the settings at the primary that the Sentinels name, or at the only one.

        ``user`` is ``NAME:PASSWORD``.
        """
        if user:
            options["USERNAME"], options["PASSWORD"] = user.split(":")
        if not self.sentinels:
            use_store(settings, f"{self.primary.url}/{database}", **options)
            return
        use_store(settings, f"{scheme}://{NAME}/{database}", **(self.options | options))

    @property
    def options(self) -> dict[str, Any]:
        """The OPTIONS of an entry of CACHES whose primary the Sentinels name."""
        addresses = [("127.0.0.1", sentinel.port) for sentinel in self.sentinels]
        return {"CONNECTION_FACTORY": django_redis.SENTINEL, "SENTINELS": addresses}

    def take_over(self, *, timeout_s: float = PROMOTION_S) -> None:
        """Wait until a replica is the primary, and note it as such."""
        promoted = self.promoted(timeout_s=timeout_s)
        self.replicas = [one for one in self.stores if one is not promoted]
        self.primary = promoted

    def add_replica(self) -> None:
        """Start one more replica of the primary, in place of those that are down."""
        self.replicas = [one for one in self.replicas if one.process is not None]
        self.replicas.append(self._follow())

    def demote(self, server: StoreServer) -> None:
        """Make the former primary a replica of the new one, and wait until it follows."""
        with server.client() as client:
            client.replicaof("127.0.0.1", self.primary.port)
        wait_for(lambda: follows(server), "it follows", timeout_s=30.0)

    def promoted(self, *, timeout_s: float = PROMOTION_S) -> StoreServer:
        """Wait until a replica is the primary for all Sentinels; return it.

        Needs the primary to be down, or cut off from the Sentinels.
        """

        def found() -> StoreServer | None:
            named = {self._named(sentinel) for sentinel in self.sentinels}
            return next(
                (one for one in self.replicas if named == {one.port} and is_primary(one)), None
            )

        self._take_for_down_after(IMPATIENT_MS)
        server: StoreServer = wait_for(found, "a replica is promoted", timeout_s=timeout_s)
        self._take_for_down_after(PATIENT_MS)
        return server

    def _take_for_down_after(self, silence_ms: int) -> None:
        for sentinel in self.sentinels:
            with sentinel.client() as client:
                client.execute_command("SENTINEL SET", NAME, "down-after-milliseconds", silence_ms)

    def _follow(self) -> StoreServer:
        replica = self._start("--replicaof", f"127.0.0.1 {self.primary.port}", *self._flags)
        # It is ready before its primary counts it: until then there is no write with replicas.
        wait_for(
            lambda: follows(replica) and self._counts(replica), "a replica follows", timeout_s=30.0
        )
        return replica

    def _counts(self, replica: StoreServer) -> bool:
        """Return whether the primary counts a replica among those that take its writes."""
        with self.primary.client() as client:
            told = client.info("replication")
        known = (one for one in told.values() if isinstance(one, dict) and "state" in one)
        return any((one["port"], one["state"]) == (replica.port, "online") for one in known)

    def admit(self, *rule: str) -> None:
        """Add a user to every server by an ACL rule, which begins with the name."""
        for server in self.stores:
            with server.client() as client:
                client.execute_command("ACL SETUSER", *rule)

    def cut_off(self, password: str) -> redis.Redis:
        """Cut the primary off from Sentinels and replicas, but not from users added by `admit`.

        It goes on as a primary; the returned raw client knows the new password.
        """
        with self.primary.client() as client:
            client.execute_command("ACL SETUSER", "default", "resetpass", f">{password}")
            client.execute_command("CLIENT KILL", "USER", "default", "SKIPME", "yes")
        return self.primary.client(password=password)

    def _start(self, *flags: str, config: str = "") -> StoreServer:
        return self._started.enter_context(self._server(*flags, binary=self._binary, config=config))

    def _start_sentinel(self, sentinels: int) -> StoreServer:
        quorum = sentinels // 2 + 1
        config = (
            f"sentinel monitor {NAME} 127.0.0.1 {self.primary.port} {quorum}\n"
            f"sentinel down-after-milliseconds {NAME} {PATIENT_MS}\n"
            f"sentinel failover-timeout {NAME} 2000\n"
        )
        return self._start("--sentinel", config=config)

    def _is_informed(self, sentinel: StoreServer) -> bool:
        with sentinel.client(decode_responses=True) as client:
            others = client.execute_command("SENTINEL SENTINELS", NAME)
            known = client.execute_command("SENTINEL SLAVES", NAME)
        return len(others) == len(self.sentinels) - 1 and len(known) == len(self.replicas)

    def _named(self, sentinel: StoreServer) -> int | None:
        """Return the port of the primary that a Sentinel names, None while that primary is down."""
        with sentinel.client(decode_responses=True) as client:
            state = client.execute_command("SENTINEL MASTERS")[NAME]
        return None if state["is_odown"] or state["is_sdown"] else int(state["port"])


def follows(replica: StoreServer) -> bool:
    """Return whether a replica is synchronised with its primary."""
    with replica.client() as client:
        return bool(client.info("replication").get("master_link_status") == "up")


def is_primary(server: StoreServer) -> bool:
    """Return whether a server reports the role of primary; False if it is down."""
    if server.process is None:
        return False
    with server.client() as client:
        return bool(client.info("replication")["role"] == "master")
