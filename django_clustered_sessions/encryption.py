"""The keys with which sessions are encrypted in the store: AES-256-GCM, by ``cryptography``.

Each session has keys of its own, derived from the site's, so that random nonces suffice for any
number of writes. ``docs/encryption.md`` says what is encrypted, and what is not.
"""

from __future__ import annotations

import binascii
import hmac
import os
import re
from base64 import b64decode
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Final

from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.dispatch import receiver

from .conf import PREFIX, conf
from .protocol import sealing
from .protocol.record import Serializer
from .protocol.sealing import KEY_ID_BYTES, NONCE_BYTES, Seal, Unopened

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

#: First entry of the setting where values are to be written as they are.
PLAIN: Final = "plain"

_KEY_BYTES: Final = 32
_HEX: Final = re.compile(r"[0-9a-fA-F]{64}")
#: Keys of sessions that are remembered: a browser loads a page in several requests.
_REMEMBERED: Final = 1024


def decoded(entry: object) -> bytes:
    """Return the bytes of a key of the setting.

    Raises ValueError, without the key in it.
    """
    if not isinstance(entry, str):
        raise ValueError(f"is no string but {type(entry).__name__}")
    if _HEX.fullmatch(entry):
        return bytes.fromhex(entry)
    text = entry.strip().rstrip("=").replace("-", "+").replace("_", "/")
    try:
        key = b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("is neither base64 nor hexadecimal") from None
    if len(key) != _KEY_BYTES:
        raise ValueError(f"is {len(key)} bytes when decoded, and not {_KEY_BYTES}")
    return key


def key_id(key: bytes) -> bytes:
    """Return the id of a key, by which a value names it: 4 bytes that do not tell the key."""
    return hmac.digest(key, b"django-clustered-sessions key id", "sha256")[:KEY_ID_BYTES]


def faults(entries: object) -> Iterator[tuple[int, str]]:
    """Yield each entry of the setting that is none: its number, from 1, and the reason."""
    if not isinstance(entries, list | tuple):
        yield 0, "is neither a list nor a tuple"
        return
    seen: dict[bytes, int] = {}
    for number, entry in enumerate(entries, 1):
        if entry == PLAIN and number == 1:
            continue
        try:
            name = key_id(decoded(entry))
        except ValueError as error:
            yield number, str(error)
            continue
        if name in seen:
            yield number, f"is the same as entry {seen[name]}"
        seen.setdefault(name, number)


def _library() -> tuple[type[AESGCM], type[Exception]]:
    try:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise ImproperlyConfigured(
            f"{PREFIX}ENCRYPTION_KEYS needs cryptography: install "
            "django-clustered-sessions[encryption]."
        ) from error
    return AESGCM, InvalidTag


class Keys:
    """The keys of the setting: the first one writes, all of them read."""

    def __init__(self, entries: Sequence[str]) -> None:
        aes_gcm, self._invalid = _library()
        self.writes = entries[0] != PLAIN
        secrets = {
            key_id(key): key for entry in entries if entry != PLAIN for key in [decoded(entry)]
        }
        self._ids = frozenset(secrets)
        self.key_id = next(iter(secrets))

        @lru_cache(_REMEMBERED)
        def of_session(id_: bytes, name: bytes) -> AESGCM:
            return aes_gcm(hmac.digest(secrets[id_], b"session" + name, "sha256"))

        self._of_session = of_session

    def __reduce__(self) -> tuple[Callable[[], Keys | None], tuple[()]]:
        # A copy or a pickle of a session takes no key along.
        return keys, ()

    def seal(self, name: bytes, field: bytes, plain: bytes) -> bytes:
        """See Cipher.seal()."""
        nonce = os.urandom(NONCE_BYTES)
        cipher = self._of_session(self.key_id, name)
        return self.key_id + nonce + cipher.encrypt(nonce, plain, name + field)

    def open(self, name: bytes, field: bytes, sealed: bytes) -> bytes | None:
        """See Cipher.open()."""
        id_, nonce = sealed[:KEY_ID_BYTES], sealed[KEY_ID_BYTES : KEY_ID_BYTES + NONCE_BYTES]
        if id_ not in self._ids:
            raise Unopened(
                f"it is encrypted with key {id_.hex()}, which this process does not have"
            )
        cipher = self._of_session(id_, name)
        try:
            return cipher.decrypt(nonce, sealed[KEY_ID_BYTES + NONCE_BYTES :], name + field)
        except (self._invalid, ValueError):
            return None


class _Configured:
    @cached_property
    def keys(self) -> Keys | None:
        """The keys of the setting, None where there are none."""
        # No variable of a frame that may raise holds the entries, which a traceback would show.
        for number, fault in faults(conf.encryption_keys):
            raise ImproperlyConfigured(f"{PREFIX}ENCRYPTION_KEYS: entry {number} {fault}.")
        if all(entry == PLAIN for entry in conf.encryption_keys):
            return None
        _library()
        return Keys(conf.encryption_keys)


_configured = _Configured()


def keys() -> Keys | None:
    """Return the keys of the setting, None where there are none.

    Raises ImproperlyConfigured for a setting that cannot be used.
    """
    return _configured.keys


@receiver(setting_changed)
def _on_setting_changed(**kwargs: Any) -> None:
    vars(_configured).clear()


def seal_of(public_id: str, past: bytes = b"") -> Seal | None:
    """Return the seal of a session, None where nothing is encrypted; ``past`` is its record's.

    Raises ImproperlyConfigured for a setting that cannot be used.
    """
    found = _configured.keys
    return Seal(found, public_id, past) if found else None


def user_told(public_id: str, told: bytes, serializer: Serializer) -> str | None:
    """Return the key of the user whom a script told of, None where it is empty or unreadable."""
    user, past = sealing.told_apart(told)
    return sealing.user_id(user, serializer, seal_of(public_id, past))
