"""The demo's processes: started, reported when they die, and all gone at the end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import httpx
import psutil
import pytest
import redis

from tests.children import bound
from tests.example.conftest import EXAMPLE, Demo, refuses
from tests.example.project import PATIENCE_S
from tests.servers import free_port, wait_for

# Some start a demo twice, and a busy machine takes half a minute for each.
pytestmark = pytest.mark.timeout(240)

StartDemo = Callable[..., Demo]

NODES = ("terracotta", "cobalt")


def add(client: httpx.Client, demo: Demo, node: int, sku: str) -> None:
    """Put a product into the cart, as the form of the page does."""
    client.get(demo.url(node, "login/"))
    answer = client.post(
        demo.url(node, f"{sku}/change/"),
        data={"action": "add", "csrfmiddlewaretoken": client.cookies["csrftoken"]},
    )
    assert answer.status_code == 302, answer.text


def cart(client: httpx.Client, demo: Demo, node: int) -> dict[str, int]:
    """Return the cart as a node sees it."""
    state = client.get(demo.url(node, "state.json")).raise_for_status().json()
    assert state["node"] == NODES[node]
    return dict(state["cart"])


def test_output_names_nodes_that_answer(demo: Demo) -> None:
    """Both addresses are in the output, both answer, and nothing else is printed."""
    for node in (0, 1):
        assert demo.url(node) in demo.output
        assert httpx.get(demo.url(node), timeout=PATIENCE_S).status_code == 200
    assert "|" not in demo.output


def test_silent_store_is_no_logout(demo: Demo) -> None:
    """Pages are 503 with the cookie kept while the store is away; then the cart is back."""
    with httpx.Client(timeout=PATIENCE_S) as client:
        add(client, demo, 0, "mug")
        os.kill(demo.pid("store"), signal.SIGSTOP)
        try:
            for node in (0, 1):
                answer = client.get(demo.url(node))
                assert answer.status_code == 503
                assert "Back in a moment" in answer.text
                assert "bar-top" in answer.text
                assert not re.search("session|store", answer.text.partition("<body>")[2])
                assert "set-cookie" not in answer.headers
        finally:
            os.kill(demo.pid("store"), signal.SIGCONT)
        for node in (0, 1):
            assert cart(client, demo, node) == {"mug": 1}


def test_sigterm_ends_a_verbose_demo(start_demo: StartDemo) -> None:
    """Each line has the name of its process before it; no process and no file is left."""
    demo = start_demo("--verbose").wait_until_started()
    for name in ("store", "migrate", *NODES):
        assert f"\n  {name:<10} | " in demo.output
    assert len(demo.processes()) >= 4
    demo.process.terminate()
    assert demo.wait() == 0
    assert demo.processes() == []
    assert list(demo.folder.iterdir()) == []
    assert "Traceback" not in demo.output


def test_named_folder_keeps_carts_over_a_ctrl_c(start_demo: StartDemo, tmp_path: Path) -> None:
    """Ctrl-C leaves no process behind, and the next demo with the same folder has the carts.

    Also if they are encrypted: the key is in the folder.
    """
    arguments = ("--dir", str(tmp_path / "kept"), "--encrypt")
    with httpx.Client(timeout=PATIENCE_S) as client:
        demo = start_demo(*arguments).wait_until_started()
        add(client, demo, 0, "mug")
        assert len(demo.processes()) >= 4
        demo.ctrl_c()
        assert demo.wait() == 0
        assert demo.processes() == []
        assert list(demo.folder.iterdir()) == []
        assert "Traceback" not in demo.output
        demo = start_demo(*arguments).wait_until_started()
        assert cart(client, demo, 1) == {"mug": 1}


def test_encrypted_carts_are_on_both_nodes_and_not_to_be_read(start_demo: StartDemo) -> None:
    """The store has the cart's field, encrypted and without a product's name."""
    demo = start_demo("--encrypt").wait_until_started()
    assert re.search("^  store .* encrypted ", demo.output, re.MULTILINE)
    with httpx.Client(timeout=PATIENCE_S) as client:
        add(client, demo, 0, "mug")
        assert cart(client, demo, 1) == {"mug": 1}
    sockets = psutil.Process(demo.pid("store")).net_connections("tcp4")
    port = next(one.laddr.port for one in sockets if one.status == psutil.CONN_LISTEN)
    with redis.Redis(port=port) as raw:
        records = [raw.hgetall(key) for key in raw.scan_iter(_type="hash")]
    (value,) = [fields[b"d:cart"] for fields in records if b"d:cart" in fields]
    assert b"mug" not in value
    # Behind the version, which is random: the codec.
    assert value[8:9] == b"e"


def test_ctrl_c_during_the_start_stops_what_runs(start_demo: StartDemo) -> None:
    """Ctrl-C before the nodes answer stops what has been started so far."""
    demo = start_demo()
    demo.wait_for_output("Starting")
    wait_for(lambda: len(demo.processes()) > 1, "a first process")
    demo.ctrl_c()
    assert demo.wait() == 0
    assert demo.processes() == []
    assert "Traceback" not in demo.output


def test_second_ctrl_c_ends_what_hangs(start_demo: StartDemo) -> None:
    """A node that does not react to the first one is killed."""
    demo = start_demo().wait_until_started()
    os.kill(demo.pid("cobalt"), signal.SIGSTOP)
    demo.ctrl_c()
    demo.wait_for_output("Stopping.")
    demo.ctrl_c()
    assert demo.wait() == 0
    assert demo.processes() == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_killed_demo_leaves_no_process(start_demo: StartDemo) -> None:
    """SIGKILL gives the demo no chance to stop its children; the kernel tells them."""
    demo = start_demo().wait_until_started()
    demo.process.kill()
    demo.wait()
    demo.wait_until_gone()


def test_demo_goes_on_until_its_last_node_dies(start_demo: StartDemo) -> None:
    """The demo says which node died; the other one, here gunicorn's, has the cart."""
    demo = start_demo().wait_until_started()
    with httpx.Client(timeout=PATIENCE_S) as client:
        add(client, demo, 1, "mug")
        add(client, demo, 0, "jug")
        os.kill(demo.pid("cobalt"), signal.SIGKILL)
        demo.wait_for_output("cobalt died (killed by SIGKILL). terracotta goes on")
        assert refuses(demo.ports[1])
        add(client, demo, 0, "mug")
        assert cart(client, demo, 0) == {"mug": 2, "jug": 1}
    os.kill(demo.pid("terracotta"), signal.SIGKILL)
    assert demo.wait() == 1
    assert "all nodes are dead" in demo.output
    assert demo.processes() == []


def test_killed_node_starts_again_by_the_printed_line(start_demo: StartDemo) -> None:
    """The line in the demo's output brings the node back, with the session."""
    demo = start_demo().wait_until_started()
    with httpx.Client(timeout=PATIENCE_S) as client:
        add(client, demo, 1, "mug")
        os.kill(demo.pid("cobalt"), signal.SIGKILL)
        demo.wait_for_output("Start it again, in another terminal:\n  cd ")
        line = demo.output.split("in another terminal:\n  ", 1)[1].splitlines()[0]
        environment = {k: v for k, v in os.environ.items() if k != "DJANGO_SETTINGS_MODULE"}
        command = bound(["sh", "-c", line])
        again = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            wait_for(lambda: not refuses(demo.ports[1]), "it listens", timeout_s=60.0)
            assert cart(client, demo, 1) == {"mug": 1}
        finally:
            os.killpg(again.pid, signal.SIGKILL)
            again.wait()


def test_store_death_ends_the_demo(start_demo: StartDemo) -> None:
    """Without the store the nodes have no sessions."""
    demo = start_demo().wait_until_started()
    os.kill(demo.pid("store"), signal.SIGKILL)
    assert demo.wait() == 1
    assert "The store died (killed by SIGKILL)" in demo.output
    assert demo.processes() == []


@pytest.mark.parametrize(("node", "host"), [(0, "127.0.0.1"), (1, "::1")])
def test_taken_port_is_named(start_demo: StartDemo, node: int, host: str) -> None:
    """The message says which port it is and how to move; nothing is started."""
    ports = [free_port(), free_port()]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, ports[node]), family=family):
        demo = start_demo("--ports", "{},{}".format(*ports))
        assert demo.wait() == 1
    assert f"Port {ports[node]} is taken" in demo.output
    assert "make demo PORTS={},{}".format(*(port + 100 for port in ports)) in demo.output
    assert "Traceback" not in demo.output
    assert demo.processes() == []
    assert list(demo.folder.iterdir()) == []


def test_taken_store_port_is_named(start_demo: StartDemo) -> None:
    """The store's port is checked too."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        demo = start_demo("--store-port", str(port))
        assert demo.wait() == 1
    assert f"Port {port} is taken" in demo.output


def test_node_that_does_not_start_shows_why(start_demo: StartDemo, tmp_path: Path) -> None:
    """The last output of the process is in the message, and the others are stopped."""
    (tmp_path / "uvicorn.py").write_text("raise SystemExit('no uvicorn today')\n")
    demo = start_demo(PYTHONPATH=str(tmp_path))
    assert demo.wait() == 1
    assert "cobalt did not start (exit status 1)" in demo.output
    assert "cobalt     | no uvicorn today" in demo.output
    assert demo.processes() == []


def test_wrong_ports_are_refused(start_demo: StartDemo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two different ports are needed."""
    monkeypatch.syspath_prepend(EXAMPLE)
    read = import_module("demo").two_ports
    for ports in ("9081", "9081,9081", "1,2,3", "a,b", "0,9082", "9081,70000"):
        with pytest.raises(ValueError):
            read(ports)
    assert read("9081,9082") == (9081, 9082)
    demo = start_demo("--ports", "9081,9081")
    assert demo.wait() == 2
    assert "invalid pair of ports value: '9081,9081'" in demo.output
