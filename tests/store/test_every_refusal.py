"""Every answer by which a store refuses: a request gets a 503, and no error of redis-py."""

from __future__ import annotations

import asyncio
import socketserver
import threading
from collections.abc import Iterator
from typing import Any

import hiredis
import pytest
from django.http import HttpRequest, HttpResponse
from django.test import RequestFactory
from redis.crc import key_slot

from django_clustered_sessions.middleware import ClusteredSessionMiddleware
from tests.conftest import use_store
from tests.pairs import pairwise

#: Words with which a connection is greeted, and that a node of a cluster is asked for its map by.
GREETINGS = {b"HELLO", b"CLIENT", b"SELECT", b"AUTH", b"PING"}

SLOT = key_slot(b"any")

#: Answers to everything else, as servers give them, old ones and proxies too.
ANSWERS = {
    "moved": f"-MOVED {SLOT} 127.0.0.1:1\r\n",
    "moved to a node without a name": f"-MOVED {SLOT} :1\r\n",
    "moved to a node that is not known": f"-MOVED {SLOT} ?:1\r\n",
    "moved, cut": "-MOVED\r\n",
    "moved to no port": f"-MOVED {SLOT} host\r\n",
    "ask": f"-ASK {SLOT} 127.0.0.1:1\r\n",
    "ask, cut": "-ASK\r\n",
    "try again": "-TRYAGAIN Multiple keys request during rehashing of slot\r\n",
    "cluster down": "-CLUSTERDOWN The cluster is down\r\n",
    "slot not served": "-CLUSTERDOWN Hash slot not served\r\n",
    "cross slot": "-CROSSSLOT Keys in request don't hash to the same slot\r\n",
    "primary down": "-MASTERDOWN Link with MASTER is down\r\n",
    "loading": "-LOADING Redis is loading the dataset in memory\r\n",
    "read-only": "-READONLY You can't write against a read only replica.\r\n",
    "unblocked": "-UNBLOCKED force unblock from blocking operation, instance state changed\r\n",
    "no script": "-NOSCRIPT No matching script. Please use EVAL.\r\n",
    "script": "-ERR Error running script (call to f_1): @user_script:1: gone script: 1\r\n",
    "key elsewhere": "-ERR Script attempted to access a non local key in a cluster node\r\n",
    "script killed": "-ERR Error running script: Script killed by user with SCRIPT KILL\r\n",
    "busy": "-BUSY Redis is busy running a script. You can only call SCRIPT KILL.\r\n",
    "no replicas": "-NOREPLICAS Not enough good replicas to write.\r\n",
    "full": "-OOM command not allowed when used memory > 'maxmemory'.\r\n",
    "no disk": "-MISCONF Errors writing to the AOF file\r\n",
    "no password": "-NOAUTH Authentication required.\r\n",
    "no permission": "-NOPERM this user has no permissions to run the command\r\n",
    "no command": "-ERR unknown command\r\n",
    "no text": "-\r\n",
    "too many clients": "-ERR max number of clients reached\r\n",
    "no protocol": "HTTP/1.1 400 Bad Request\r\n\r\n",
    "a part of a reply": "*2\r\n$3\r\nab",
    "nothing": "",
}


class Refusing(socketserver.ThreadingTCPServer):
    """A store that greets, tells a map of slots, and refuses all else with the same answer."""

    allow_reuse_address = daemon_threads = True
    answer = b""

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class Connection(socketserver.BaseRequestHandler):
    server: Refusing

    def handle(self) -> None:
        reader = hiredis.Reader()
        while data := self.request.recv(65536):
            reader.feed(data)
            while (words := reader.gets()) is not False:
                told = self.told(words)
                if not told:
                    return
                self.request.sendall(told)

    def told(self, words: list[bytes]) -> bytes:
        word = words[0].upper()
        if word == b"HELLO":
            return b"%%1\r\n+proto\r\n:%s\r\n" % words[1]
        if word in GREETINGS:
            return b"+OK\r\n"
        if word == b"CLUSTER":
            return (
                b"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:%d\r\n" % self.server.port
            )
        return self.server.answer


@pytest.fixture
def refusing() -> Iterator[Refusing]:
    with Refusing(("127.0.0.1", 0), Connection) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def look(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(request.session.get("n")))


async def alook(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(await request.session.aget("n")))


@pairwise(
    answer=list(ANSWERS),
    kind=["server", "cluster"],
    locking=["off", "all"],
    near_reads=["checked", "tracked"],
    is_async=[False, True],
)
def test_answer_of_a_store_is_a_503(
    refusing: Refusing,
    settings: Any,
    answer: str,
    kind: str,
    locking: str,
    near_reads: str,
    is_async: bool,
) -> None:
    refusing.answer = ANSWERS[answer].encode()
    factory = "django_clustered_sessions.cluster.ClusterConnectionFactory"
    options = {"CONNECTION_FACTORY": factory} if kind == "cluster" else {}
    use_store(settings, f"redis://127.0.0.1:{refusing.port}/0", **options)
    settings.CLUSTERED_SESSIONS_STORE_TIMEOUT = 0.3
    settings.CLUSTERED_SESSIONS_LOCKING = locking
    settings.CLUSTERED_SESSIONS_NEAR_READS = near_reads
    settings.SESSION_SAVE_EVERY_REQUEST = locking == "off"

    request = RequestFactory().get("/")
    request.COOKIES = {"sessionid": "k" * 32}
    middleware = ClusteredSessionMiddleware(alook if is_async else look)

    def ask() -> HttpResponse:
        try:
            return middleware(request)
        except Exception as error:
            if found := middleware.process_exception(request, error):
                return middleware.process_response(request, found)
            raise

    async def aask() -> HttpResponse:
        try:
            return await middleware(request)
        except Exception as error:
            if found := middleware.process_exception(request, error):
                return await middleware.aprocess_response(request, found)
            raise

    response = asyncio.run(aask()) if is_async else ask()
    assert response.status_code == 503
    assert "sessionid" not in response.cookies
