"""TLS with certificates of our own (the bundled server has none), unix sockets with a password."""

from __future__ import annotations

import asyncio
import io
import ipaddress
import json
import ssl
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from django.core.cache import caches
from django.core.management import call_command
from redis.crc import key_slot
from redis.ocsp import OCSPVerifier

from django_clustered_sessions.backend import SessionStore
from django_clustered_sessions.exceptions import SessionStoreUnavailable
from django_clustered_sessions.store import connections
from django_clustered_sessions.store.tls import _made as contexts
from tests.children import forked
from tests.clusters import ClusterServers, ask
from tests.conftest import store_binary, use_store
from tests.gateways import place
from tests.locking import new_session
from tests.pages import block
from tests.servers import StoreServer, free_port, raw_client, wait_for
from tests.topologies import Replicated

#: What a key may be for.
USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


class Certificate(NamedTuple):
    """A certificate with its key, and the files that hold them."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    path: Path
    key_path: Path


def issue(folder: Path, name: str, issuer: Certificate | None = None) -> Certificate:
    """Make a certificate for 127.0.0.1, signed by the issuer, or a CA's own."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    # Python 3.13 is strict about these.
    signer = (issuer.key if issuer else key).public_key()
    for extension in (
        x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signer),
    ):
        builder = builder.add_extension(extension, critical=False)
    usage = dict.fromkeys(USAGES, False) | {"digital_signature": True}
    usage |= {"key_cert_sign": issuer is None, "crl_sign": issuer is None}
    builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
    if issuer is not None:
        here = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        builder = builder.add_extension(x509.SubjectAlternativeName([here]), critical=False)
    certificate = builder.sign(issuer.key if issuer else key, hashes.SHA256())
    path, key_path = folder / f"{name}.pem", folder / f"{name}.key"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return Certificate(certificate, key, path, key_path)


class TLSStoreServer(StoreServer):
    """A store whose only port is TLS; the test's own clients come by its unix socket."""

    def __init__(self, *flags: str, ca: Certificate, own: Certificate, **options: Any) -> None:
        port = free_port()
        tls = (
            *("--port", "0", "--tls-port", str(port), "--tls-replication", "yes"),
            *("--tls-cert-file", str(own.path), "--tls-key-file", str(own.key_path)),
            *("--tls-ca-cert-file", str(ca.path), "--tls-auth-clients", "no"),
        )
        super().__init__(*tls, *flags, port=port, **options)

    @property
    def url(self) -> str:
        return f"rediss://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> redis.Redis:
        return raw_client(self.unix_url, **options)


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return issue(tmp_path_factory.mktemp("ca"), "ca")


@pytest.fixture(scope="module")
def server_certificate(ca: Certificate) -> Certificate:
    return issue(ca.path.parent, "server", ca)


@pytest.fixture(scope="module")
def tls(ca: Certificate, server_certificate: Certificate) -> Iterator[StoreServer]:
    """Run a store with TLS."""
    binary = store_binary("redis")
    with TLSStoreServer(ca=ca, own=server_certificate, binary=binary) as server:
        yield server


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def is_async(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def use(is_async: bool) -> None:
    """Write and read a session."""

    async def go() -> None:
        session = SessionStore()
        await session.aset("n", 1)
        await session.acreate()
        assert await SessionStore(session.session_key).aload() == {"n": 1}

    if is_async:
        asyncio.run(go())
    else:
        assert SessionStore(new_session(n=1)).load() == {"n": 1}


def use_tls(settings: Any, server: StoreServer, **kwargs: Any) -> None:
    use_store(settings, f"{server.url}/1", CONNECTION_POOL_KWARGS=kwargs)


def test_authority_in_the_entry_is_trusted(
    tls: StoreServer, ca: Certificate, settings: Any, is_async: bool
) -> None:
    use_tls(settings, tls, ssl_ca_certs=str(ca.path))
    use(is_async)


def test_client_certificate_is_shown(
    ca: Certificate, server_certificate: Certificate, settings: Any, is_async: bool
) -> None:
    own = issue(ca.path.parent, "client", ca)
    flags = ("--tls-auth-clients", "yes")
    binary = store_binary("redis")
    with TLSStoreServer(*flags, ca=ca, own=server_certificate, binary=binary) as server:
        trust = {"ssl_ca_certs": str(ca.path)}
        mine = {"ssl_certfile": str(own.path), "ssl_keyfile": str(own.key_path)}
        use_tls(settings, server, **trust, **mine)
        use(is_async)
        use_tls(settings, server, **trust)
        with pytest.raises(SessionStoreUnavailable, match=r"(?i)certificate|closed|EOF|reset"):
            use(is_async)


def test_renewed_client_certificate_is_shown(
    ca: Certificate, server_certificate: Certificate, settings: Any, is_async: bool, tmp_path: Path
) -> None:
    """By the next connection, without a restart."""
    good = issue(ca.path.parent, "renewed", ca)
    old = issue(tmp_path, "site", issue(tmp_path, "another"))
    flags = ("--tls-auth-clients", "yes")
    binary = store_binary("redis")

    with (
        TLSStoreServer(*flags, ca=ca, own=server_certificate, binary=binary) as server,
        asyncio.Runner() as runner,
    ):
        mine = {"ssl_certfile": str(old.path), "ssl_keyfile": str(old.key_path)}
        use_tls(settings, server, ssl_ca_certs=str(ca.path), **mine)
        session = SessionStore("x" * 32)

        def connect() -> None:
            runner.run(session.aexists("x" * 32)) if is_async else session.exists("x" * 32)

        with pytest.raises(SessionStoreUnavailable, match=r"(?i)certificate|closed|EOF|reset|ca"):
            connect()
        good.path.replace(old.path)
        good.key_path.replace(old.key_path)
        connect()


def test_half_of_a_renewal_keeps_the_certificate_of_before(
    ca: Certificate, server_certificate: Certificate, settings: Any, is_async: bool, tmp_path: Path
) -> None:
    good, other = issue(tmp_path, "site", ca), issue(tmp_path, "next", ca)
    flags = ("--tls-auth-clients", "yes")
    with TLSStoreServer(
        *flags, ca=ca, own=server_certificate, binary=store_binary("redis")
    ) as server:
        mine = {"ssl_certfile": str(good.path), "ssl_keyfile": str(good.key_path)}
        for _ in range(2):
            # Over new connections.
            use_tls(settings, server, ssl_ca_certs=str(ca.path), **mine)
            use(is_async)
            good.path.write_bytes(other.path.read_bytes())


def test_password_of_a_key_stands_in_no_local(
    tls: StoreServer, settings: Any, is_async: bool, tmp_path: Path
) -> None:
    """A traceback shows the locals of this package's frames."""
    missing = str(tmp_path / "none.pem")
    use_tls(settings, tls, ssl_certfile=missing, ssl_keyfile=missing, ssl_password="sesame")
    with pytest.raises(SessionStoreUnavailable) as caught:
        use(is_async)
    error: BaseException | None = caught.value
    shown = []
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if "django_clustered_sessions" in frame.f_code.co_filename:
                shown += [name for name, value in frame.f_locals.items() if "sesame" in repr(value)]
        error = error.__cause__
    assert shown == []


def test_unknown_authority_is_named_as_the_cause(
    tls: StoreServer, settings: Any, is_async: bool, tmp_path: Path
) -> None:
    use_tls(settings, tls, ssl_ca_certs=str(issue(tmp_path, "another").path))
    with pytest.raises(SessionStoreUnavailable, match="certificate verify failed"):
        use(is_async)


@pytest.mark.parametrize("how", ["None", "word", "query"])
def test_certificate_is_not_verified_where_asked(
    tls: StoreServer, settings: Any, is_async: bool, how: str
) -> None:
    query = "?ssl_cert_reqs=none" if how == "query" else ""
    options = {"None": {"ssl_cert_reqs": None}, "word": {"ssl_cert_reqs": "none"}, "query": {}}[how]
    use_store(settings, f"{tls.url}/1{query}", CONNECTION_POOL_KWARGS=options)
    caches["sessions"].set("a", 1)
    assert caches["sessions"].get("a") == 1
    use(is_async)


def test_certificate_for_another_host_is_refused(
    tls: StoreServer, ca: Certificate, settings: Any, is_async: bool
) -> None:
    location = tls.url.replace("127.0.0.1", "localhost")
    use_store(settings, f"{location}/1", CONNECTION_POOL_KWARGS={"ssl_ca_certs": str(ca.path)})
    with pytest.raises(SessionStoreUnavailable, match="not valid for 'localhost'"):
        use(is_async)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Give a list that gets an item for each context, of which there are none yet."""
    found: list[Any] = []
    make = ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", lambda *args: found.append(1) or make(*args))
    contexts.clear()
    return found


def test_connections_share_one_context(
    tls: StoreServer, ca: Certificate, settings: Any, is_async: bool, made: list[Any]
) -> None:
    """To make one takes 20 ms and more, in which an event loop does nothing else."""
    use_tls(settings, tls, ssl_ca_certs=str(ca.path))
    session = SessionStore("x" * 32)

    async def burst() -> None:
        await asyncio.gather(*(SessionStore("x" * 32).aexists("x" * 32) for _ in range(30)))

    for _ in range(2):
        if is_async:
            asyncio.run(burst())
        else:
            connections.pool().disconnect()
            session.exists("x" * 32)
    assert len(made) == 1


def test_other_options_have_another_context(
    tls: StoreServer, settings: Any, is_async: bool
) -> None:
    use_tls(settings, tls, ssl_cert_reqs="none")
    use(is_async)
    use_tls(settings, tls)
    with pytest.raises(SessionStoreUnavailable, match="certificate verify failed"):
        use(is_async)


def test_revocation_is_asked_for(
    tls: StoreServer, ca: Certificate, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """redis-py can do that synchronously only."""
    asked: list[Any] = []

    def is_valid(verifier: Any) -> bool:
        asked.append(verifier.SOCK.getpeername())
        return True

    monkeypatch.setattr(OCSPVerifier, "is_valid", is_valid)
    use_tls(settings, tls, ssl_ca_certs=str(ca.path), ssl_validate_ocsp=True)
    use(False)
    assert asked == [("127.0.0.1", tls.port)]


def test_fork_makes_a_context_of_its_own(
    tls: StoreServer, ca: Certificate, settings: Any, made: list[Any]
) -> None:
    use_tls(settings, tls, ssl_ca_certs=str(ca.path))
    use(False)

    def work() -> bytes:
        use(False)
        return str(len(made)).encode()

    assert forked(work) == b"2"


def test_missing_file_is_named_as_the_cause(
    tls: StoreServer, settings: Any, is_async: bool, tmp_path: Path
) -> None:
    use_tls(settings, tls, ssl_ca_certs=str(tmp_path / "none.pem"))
    with pytest.raises(SessionStoreUnavailable, match="No such file"):
        use(is_async)


def test_asynchronous_requests_share_connections(
    tls: StoreServer, ca: Certificate, settings: Any
) -> None:
    use_tls(settings, tls, ssl_ca_certs=str(ca.path))
    keys = [new_session(n=n, it="x" * (n * n * n)) for n in range(40)]

    async def go() -> None:
        for _ in range(3):
            found = await asyncio.gather(*(SessionStore(key).aget("n") for key in keys))
            assert found == list(range(40))
        pool: Any = connections.apool()
        assert any(line.is_open for line in pool.lines)

    asyncio.run(go())


def test_client_without_tls_gets_no_answer(tls: StoreServer, settings: Any, is_async: bool) -> None:
    use_store(settings, f"redis://127.0.0.1:{tls.port}/1")
    with pytest.raises(SessionStoreUnavailable, match="does not answer"):
        use(is_async)


def test_documented_configuration_works(
    ca: Certificate, server_certificate: Certificate, settings: Any
) -> None:
    """Directives and entry are those of the page, but for address and files."""
    own = issue(ca.path.parent, "site", ca)
    port = free_port()
    directives, entry = (block("deploy-store.md", word) for word in ("port 0\n", "rediss:"))

    def here(text: str) -> str:
        for name, path in {
            "store.example.net:6380": f"127.0.0.1:{port}",
            "tls-port 6380": f"tls-port {port}",
            "/etc/ssl/store-ca.pem": ca.path,
            "/etc/ssl/store.pem": server_certificate.path,
            "/etc/ssl/store.key": server_certificate.key_path,
            "/etc/ssl/site.pem": own.path,
            "/etc/ssl/site.key": own.key_path,
        }.items():
            text = text.replace(name, str(path))
        return text

    words = [word for line in here(directives).splitlines() for word in f"--{line}".split(" ", 1)]
    with StoreServer(*words, binary=store_binary("redis"), port=port):
        namespace: dict[str, Any] = {}
        exec(here(entry), namespace)
        settings.CACHES = namespace["CACHES"]
        settings.SESSION_CACHE_ALIAS = namespace["SESSION_CACHE_ALIAS"]
        use(False)
        use(True)


def test_sentinels_and_stores_work_by_tls_only(
    ca: Certificate, server_certificate: Certificate, settings: Any
) -> None:
    """Sentinels, primary and replica, all by TLS only; and a failover."""
    server = partial(TLSStoreServer, ca=ca, own=server_certificate)
    trust = {"ssl_ca_certs": str(ca.path)}
    with Replicated(sentinels=1, binary=store_binary("redis"), server=server) as topology:
        topology.use(
            settings,
            1,
            scheme="rediss",
            CONNECTION_POOL_KWARGS=trust,
            SENTINEL_KWARGS={"ssl": True, **trust},
        )
        use(False)
        use(True)
        # As django-redis' cache asks for TLS.
        topology.use(
            settings,
            1,
            CONNECTION_POOL_KWARGS={"ssl": True, "ssl_cert_reqs": None},
            SENTINEL_KWARGS={"ssl": True, "ssl_cert_reqs": None},
        )
        caches["sessions"].set("a", 1)
        assert caches["sessions"].get("a") == 1
        use(False)
        use(True)
        pool = connections.pool_at(("127.0.0.1", topology.replicas[0].port))
        assert redis.Redis(connection_pool=pool).info("replication")["role"] == "slave"
        pool.disconnect()
        topology.primary.kill()
        topology.promoted()
        watcher = connections.watcher()
        assert watcher is not None
        promoted = topology.replicas[0].port
        wait_for(lambda: watcher.names("127.0.0.1", promoted), "it is seen", timeout_s=30.0)
        use(False)
        use(True)


def test_cluster_works_by_tls_only(
    ca: Certificate, server_certificate: Certificate, settings: Any
) -> None:
    """Clients and nodes by TLS only, all nodes; also where a node says where a slot is now."""
    server = partial(TLSStoreServer, "--tls-cluster", "yes", ca=ca, own=server_certificate)
    with ClusterServers(binary=store_binary("redis"), server=server) as servers:
        first, *_, last = servers.primaries
        trust = {"ssl_ca_certs": str(ca.path)}
        servers.use(settings, first.port, scheme="rediss", CONNECTION_POOL_KWARGS=trust)

        def all_are_used() -> bool:
            use(False)
            use(True)
            return all(ask(one, "DBSIZE") for one in servers.primaries)

        wait_for(all_are_used, "a session on each node", timeout_s=30.0)
        key = new_session(n=1)
        slot, slots = key_slot(place(key).record.encode()), connections.pool().slot_map
        slots.moved(slot, next(node for node in connections.nodes() if node != slots.node(slot)))
        slots.is_stale = False
        assert SessionStore(key).load() == {"n": 1}
        caches["sessions"].set("a", 1)
        assert caches["sessions"].get("a") == 1
        out = io.StringIO()
        call_command("sessionstats", format="json", stdout=out)
        found = json.loads(out.getvalue())
        assert len(found["topology"]["primaries"]) == 3
        servers.use(settings, last.port, scheme="redis")
        with pytest.raises(SessionStoreUnavailable, match="does not answer"):
            use(False)


@pytest.mark.each_server
@pytest.mark.parametrize(("is_async", "user"), [(False, "default"), (True, "site")])
def test_unix_socket_takes_a_password(
    store_server: StoreServer, settings: Any, is_async: bool, user: str
) -> None:
    with StoreServer("--requirepass", "secret", binary=store_server.binary) as server:
        server.client(password="secret").execute_command(
            "ACL SETUSER site on >secret ~session:* +@all"
        )
        names = {} if user == "default" else {"USERNAME": user}
        use_store(settings, f"{server.unix_url}?db=1", PASSWORD="secret", **names)
        use(is_async)
        use_store(settings, f"{server.unix_url}?db=1", PASSWORD="wrong", **names)
        with pytest.raises(SessionStoreUnavailable, match="not accept user or password"):
            use(is_async)
