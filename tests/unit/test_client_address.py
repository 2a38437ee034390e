"""From where a request comes: whose word about that counts, and what is left of it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from hypothesis import given
from hypothesis import strategies as st

from django_clustered_sessions.checks.settings import check_settings
from django_clustered_sessions.session import client_info
from django_clustered_sessions.session.client_info import Client

#: Addresses of the site's proxies, of a client, and one that the client made up.
CDN, BALANCER, CLIENT, LIE = "198.51.100.7", "10.0.0.5", "203.0.113.9", "192.0.2.66"
NETWORKS = ["198.51.100.0/24", "10.0.0.0/8"]


def address(peer: str | None, forwarded: str | None = None) -> str:
    """Return the address of a client by its peer and the header."""
    meta = {} if peer is None else {"REMOTE_ADDR": peer}
    return Client.of(
        meta if forwarded is None else {**meta, "HTTP_X_FORWARDED_FOR": forwarded}
    ).address


@pytest.mark.parametrize("peer", [CLIENT, "2001:db8::7", "", None])
def test_without_proxies_nobodys_word_counts(peer: str | None) -> None:
    assert address(peer, LIE) == address(peer) == (peer or "")


@pytest.mark.parametrize(
    ("proxies", "peer", "forwarded", "expected"),
    [
        # As it should be; and with what the client had put there.
        (NETWORKS, BALANCER, f"{CLIENT}, {CDN}", CLIENT),
        (NETWORKS, BALANCER, f"{LIE}, {CLIENT}, {CDN}", CLIENT),
        (NETWORKS, BALANCER, f"{CDN}, {BALANCER}, {CLIENT}, {CDN}", CLIENT),
        (NETWORKS, BALANCER, f'"{LIE}, {CLIENT}, {CDN}', CLIENT),
        (NETWORKS, BALANCER, f"for={LIE};x, junk, \xff, {CLIENT}, {CDN}", CLIENT),
        (NETWORKS, BALANCER, f"2001:db8::7, {CDN}", "2001:db8::7"),
        (NETWORKS, BALANCER, f"[2001:DB8::7]:443, {CDN}:80", "2001:db8::7"),
        # Past the content network, past all, or without the header.
        (NETWORKS, BALANCER, f"{LIE}, {CLIENT}", BALANCER),
        (NETWORKS, CLIENT, f"{LIE}, {CDN}", CLIENT),
        (NETWORKS, CLIENT, f"{LIE}, {CDN}, {BALANCER}", CLIENT),
        (NETWORKS, BALANCER, None, BALANCER),
        (NETWORKS, BALANCER, "", BALANCER),
        # The last one speaks through a unix socket.
        (["127.0.0.1"], "", CLIENT, CLIENT),
        (["127.0.0.1"], None, f"{LIE}, {CLIENT}", CLIENT),
        (NETWORKS, None, f"{CLIENT}, {CDN}", ""),
        (("2001:db8:1::/48",), "2001:db8:1::1", CLIENT, CLIENT),
        (["10.0.0.5"], "10.0.0.51", LIE, "10.0.0.51"),
        (1, BALANCER, f"{LIE}, {CLIENT}", CLIENT),
        (2, BALANCER, f"{LIE}, {CLIENT}, {CDN}", CLIENT),
        (2, BALANCER, CLIENT, BALANCER),
        (1, None, CLIENT, CLIENT),
    ],
)
def test_behind_proxies_their_word_counts_alone(
    settings: Any, proxies: Any, peer: str | None, forwarded: str | None, expected: str
) -> None:
    settings.CLUSTERED_SESSIONS_TRUSTED_PROXIES = proxies
    assert check_settings() == []
    assert address(peer, forwarded) == expected


def test_without_the_library_proxies_are_refused(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.CLUSTERED_SESSIONS_TRUSTED_PROXIES = 1
    monkeypatch.setitem(sys.modules, "python_ipware", None)
    with pytest.raises(ImproperlyConfigured, match="clients"):
        address(BALANCER, CLIENT)


@given(st.text(), st.text())
def test_whatever_a_browser_says_is_kept_short_and_printable(agent: str, peer: str) -> None:
    client = Client.of({"HTTP_USER_AGENT": agent * 50, "REMOTE_ADDR": peer})
    assert len(client.user_agent) <= 200 and client.user_agent.isprintable()
    assert len(client.pack()) <= 1200
    if agent.isprintable() and agent == agent.strip() and len(agent) * 50 <= 200:
        assert client.user_agent == agent * 50
    if peer.isascii() and len(peer) <= 64:
        assert Client.parse(client.pack()) == client


@pytest.mark.parametrize("stored", [b"", b"[]", b"{", b"\xff", b'["1"]', b"7", b"[1,2,3]"])
def test_damage_is_nobody(stored: bytes) -> None:
    assert Client.parse(stored) is None


def test_setting_of_proxies_is_read_anew(settings: Any) -> None:
    assert client_info.proxies.reader is None
    settings.CLUSTERED_SESSIONS_TRUSTED_PROXIES = 1
    assert client_info.proxies.reader is not None
