"""A faster JSON serialiser with the results of Django's own: ``pip install ...[msgspec]``."""

from __future__ import annotations

from typing import Any

from django.contrib.sessions.serializers import JSONSerializer
from django.core.exceptions import ImproperlyConfigured

try:
    import msgspec
except ImportError as error:
    raise ImproperlyConfigured(
        "MsgspecSerializer needs msgspec: install django-clustered-sessions[msgspec]."
    ) from error


class MsgspecSerializer(JSONSerializer):
    """Django's JSONSerializer, with msgspec for all values that it writes alike.

    Each reads the other's output, so a site can switch over and back without a logout. If
    msgspec would write a value that reads back differently, such as a set as a list or NaN as
    null, Django's serialiser writes it instead, or raises its TypeError.
    """

    def dumps(self, obj: Any) -> bytes:
        """Return ``obj`` as JSON in ASCII. Raises TypeError for values that JSON cannot hold."""
        try:
            data = msgspec.json.encode(obj)
            if data.isascii() and msgspec.json.decode(data) == obj:
                return data
        except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError):
            pass
        return super().dumps(obj)

    def loads(self, data: bytes) -> Any:
        """Return the value of JSON that this serialiser or Django's wrote."""
        try:
            return msgspec.json.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return super().loads(data)
