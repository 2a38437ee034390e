"""Proxy between the workers and the store that cuts replies at random."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from random import Random


class CuttingProxy:
    """Proxy that forwards all, and cuts a connection instead of a reply with the chance ``cut``.

    The store has executed the command; the client receives nothing of the reply, or half.
    """

    def __init__(self, store_port: int, dice: Random, cut: float) -> None:
        self.store_port = store_port
        self.cut = cut
        #: Number of connections that were cut.
        self.cuts = 0
        self._dice = dice
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> int:
        """Listen on a free port of loopback, and return it."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def cut_all(self) -> None:
        """Cut all open connections, those of stopped processes too."""
        self.cuts += len(self._writers)
        for writer in list(self._writers):
            writer.transport.abort()

    async def close(self) -> None:
        """Refuse and cut everything."""
        self._server.close()
        self.cut_all()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        store_reader, store_writer = await asyncio.open_connection("127.0.0.1", self.store_port)
        requests = asyncio.create_task(self._pass_on(reader, store_writer, is_reply=False))
        replies = asyncio.create_task(self._pass_on(store_reader, writer, is_reply=True))
        try:
            await asyncio.wait((requests, replies), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in (writer, store_writer):
                end.transport.abort()
            # Both readers end because the transports are aborted.
            await asyncio.gather(requests, replies)
            self._writers.discard(writer)

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_reply: bool
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if is_reply and self._dice.random() < self.cut:
                    self.cuts += 1
                    if self._dice.random() < 0.3:
                        writer.write(data[: len(data) // 2])
                        await writer.drain()
                    return
                writer.write(data)
                await writer.drain()
