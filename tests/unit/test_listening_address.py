"""Address of ``manage.py sessionserver``, by the settings and its options."""

from __future__ import annotations

import pytest
from django.core.management.base import CommandError

from django_clustered_sessions.management.commands.sessionserver import (
    Command,
    ListeningAddress,
    listening_address,
)


@pytest.mark.parametrize(
    ("location", "address"),
    [
        ("", "redis://127.0.0.1:6379"),
        ("redis://localhost:7000/1", "redis://127.0.0.1:7000"),
        ("redis://[::1]:7000/1", "redis://[::1]:7000"),
        ("redis://db.example.org:7000/1", "redis://127.0.0.1:6379"),
        ("rediss://127.0.0.1:7000/1", "redis://127.0.0.1:6379"),
        ("unix:///run/store.sock?db=1", "unix:///run/store.sock"),
    ],
)
def test_address_is_that_of_the_settings_when_local(location: str, address: str) -> None:
    assert str(listening_address(location, port=None, bind=None)) == address


def test_options_win_over_the_settings() -> None:
    assert listening_address("unix:///run/s", port=7001, bind=None) == ListeningAddress(
        "127.0.0.1", 7001
    )
    assert listening_address(
        "redis://127.0.0.1:7000", port=None, bind="0.0.0.0"
    ) == ListeningAddress("0.0.0.0", 7000)


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_number_that_is_no_port_is_refused(port: str) -> None:
    parser = Command().create_parser("manage.py", "sessionserver")
    parser.called_from_command_line = False
    with pytest.raises(CommandError, match="not a port between 1 and 65535"):
        parser.parse_args(["--port", port])
