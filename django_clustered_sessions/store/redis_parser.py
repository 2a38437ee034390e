"""Read the replies of a trip, all of them by one deadline.

redis-py reads one reply at a time, each through three functions: a tenth of what a trip takes.
"""

from __future__ import annotations

import builtins
import time
from typing import Any, Final

from redis._parsers.hiredis import NOT_ENOUGH_DATA, _HiredisParser
from redis.exceptions import ConnectionError, TimeoutError

#: The least that a socket is given to answer, in seconds: 0 would mean not to wait at all.
SHORTEST_S: Final = 0.001

#: By how much a socket's timeout may be too short at most, in seconds; and by a tenth. Less than
#: the grace that a blocking read is given.
_LITTLE_S: Final = 0.1


class TripParser(_HiredisParser):
    """redis-py's parser for a connection whose replies are read trip by trip."""

    def read_all(self, count: int, deadline: float) -> list[Any]:
        """Return the next ``count`` replies, errors among them, by a time of time.monotonic().

        Raises redis-py's ConnectionError and TimeoutError.
        """
        replies: list[Any] = []
        while len(replies) < count:
            if self._reader is None:
                raise ConnectionError("the connection was closed")
            reply = self._reader.gets()
            if reply is NOT_ENOUGH_DATA:
                self._receive(deadline)
            elif isinstance(reply, ConnectionError):
                raise reply
            else:
                replies.append(reply)
        return replies

    def limit(self, deadline: float) -> None:
        """Let neither sending nor receiving wait beyond a time of time.monotonic().

        To set a socket's timeout is a call of the system, so one that is a little too short stays.
        """
        left_s = max(deadline - time.monotonic(), SHORTEST_S)
        shortest_s = left_s - min(left_s / 10, _LITTLE_S)
        if not shortest_s <= (self._sock.gettimeout() or 0) <= left_s:
            self._sock.settimeout(left_s)

    def _receive(self, deadline: float) -> None:
        self.limit(deadline)
        try:
            count = self._sock.recv_into(self._buffer)
        except builtins.TimeoutError as error:
            raise TimeoutError("no reply in time") from error
        except OSError as error:
            raise ConnectionError(f"Error while reading: {error}") from error
        if not count:
            raise ConnectionError("the store closed the connection")
        self._reader.feed(self._buffer, 0, count)  # type: ignore[arg-type]
