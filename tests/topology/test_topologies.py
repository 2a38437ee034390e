"""The topologies that the tests run against are what they say."""

from __future__ import annotations

from tests.topologies import Replicated, follows, is_primary


def test_replica_is_promoted_when_the_primary_dies() -> None:
    with Replicated(replicas=2, sentinels=3) as topology:
        topology.primary.client().set("name", "value")
        topology.primary.client().wait(2, 5000)
        topology.primary.kill()
        promoted = topology.promoted()
        assert promoted in topology.replicas
        assert promoted.client().get("name") == b"value"
        assert is_primary(promoted)
    assert not any(server.folder.exists() for server in topology.stores)


def test_replica_follows_without_a_sentinel() -> None:
    with Replicated(replicas=1) as topology:
        (replica,) = topology.replicas
        assert follows(replica)
        # And may be waited for from the first write on.
        assert topology.primary.client().info("replication")["slave0"]["state"] == "online"
        assert not is_primary(replica)
        assert is_primary(topology.primary)
