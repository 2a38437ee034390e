"""The serialiser of a session's values: the site's, and Django's own by a shorter way."""

from __future__ import annotations

from collections.abc import Mapping
from json import JSONDecoder, JSONEncoder
from typing import Any, Final

from django.core import signing

from django_clustered_sessions.protocol.record import Serializer

_decode: Final = JSONDecoder().raw_decode
_encode: Final = JSONEncoder(separators=(",", ":")).encode


class JSONSerializer(signing.JSONSerializer):
    """Django's JSONSerializer, with one encoder for all values, and no look for white space.

    It makes an encoder for each value, and looks for white space around each, of which it writes
    none. For a short value that is half of the work. Errors name the class: it has Django's name.
    """

    def dumps(self, obj: Any) -> bytes:
        """Return what Django's returns. Raises TypeError and ValueError, as that does."""
        return _encode(obj).encode("latin-1")

    def loads(self, data: bytes) -> Any:
        """Return what Django's returns. Raises ValueError, as that does."""
        text = data.decode("latin-1")
        try:
            value, end = _decode(text)
        except ValueError:
            end = -1
        return value if end == len(text) else super().loads(data)


#: Classes that do the same as one that SESSION_SERIALIZER may name.
SHORTER: Final[Mapping[type, type[Serializer]]] = {signing.JSONSerializer: JSONSerializer}
