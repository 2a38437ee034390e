"""Tell a user of a new sign-in by mail, with a link that ends it: ``docs/sign-ins.md``."""

from __future__ import annotations

from typing import Any

from django.core.signals import setting_changed
from django.dispatch import receiver

from django_clustered_sessions.conf import PREFIX, conf
from django_clustered_sessions.signals import session_login


def switch() -> None:
    """Listen to logins while the setting SIGN_IN_MAIL wants that, so that "off" costs nothing."""
    if conf.sign_in_mail == "off":
        session_login.disconnect(_tell_owner)
    else:
        session_login.connect(_tell_owner)


@receiver(setting_changed)
def _on_setting_changed(*, setting: str, **kwargs: Any) -> None:
    if setting == f"{PREFIX}SIGN_IN_MAIL":
        switch()


def _tell_owner(*, signal: Any, sender: Any, **login: Any) -> None:
    # Not at the start of a process: few logins, and names of browsers, are what it needs.
    from .mail import tell_owner

    tell_owner(**login)
