"""The mail that tells a user of a new sign-in."""

from __future__ import annotations

import email.policy
import logging
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Any, Final

import django
from django.conf import settings
from django.contrib.auth import get_user_model
from django.contrib.sites.shortcuts import get_current_site
from django.core.exceptions import DisallowedHost, ObjectDoesNotExist
from django.core.mail import EmailMultiAlternatives
from django.http import HttpRequest
from django.template.loader import render_to_string
from django.urls import NoReverseMatch
from django.utils import timezone, translation
from django.utils.translation import gettext as _

from django_clustered_sessions import registry
from django_clustered_sessions.conf import conf
from django_clustered_sessions.devices import agents
from django_clustered_sessions.registry import SessionInfo
from django_clustered_sessions.session.client_info import Client

from .links import LIFE, url_of

logger = logging.getLogger("django_clustered_sessions")

#: Bytes of a line of a mail at most, by RFC 5322.
_LONGEST_LINE: Final = 998


class SignInMail(EmailMultiAlternatives):
    """A mail whose link is in one line, as it is to be copied from a console or a file.

    From Django 6.0 on, mails are else encoded so that no line is longer than 78 characters.
    """

    def message(self, **options: Any) -> Any:
        """See EmailMessage.message()."""
        if django.VERSION >= (6, 0):
            policy = options.get("policy", email.policy.default)
            options["policy"] = policy.clone(max_line_length=_LONGEST_LINE)
        return super().message(**options)


def tell_owner(
    session_id: str, user_id: str, client: Client | None, request: HttpRequest | None
) -> None:
    """Send the mail about a login that the setting SIGN_IN_MAIL asks for.

    The arguments are those of ``signals.session_login``. What goes wrong is logged.
    """
    if request is None or client is None:
        # Nothing would say to where its link leads, nor who it was: a shell, or a websocket.
        return
    try:
        mail = mail_about(session_id, user_id, client, request, always=conf.sign_in_mail == "all")
        if mail is not None:
            mail.send()
    except Exception:
        logger.exception(
            "the mail about the sign-in of session %s could not be sent, and its owner knows "
            "nothing of it",
            session_id[:12],
        )


def mail_about(
    session_id: str,
    user_id: str,
    client: Client,
    request: HttpRequest,
    *,
    always: bool = False,
    language: str | None = None,
) -> SignInMail | None:
    """Return the mail about a login, as ``signals.session_login`` tells of it.

    None if the login is over, or its user has no mail address; without ``always``, also if
    ``is_new`` says that it is none of a new browser. ``language`` is the user's, LANGUAGE_CODE
    without one.

    Raises SessionStoreUnavailable.
    """
    user = get_user_model()._default_manager.filter(pk=user_id).first()
    address = user and getattr(user, user.get_email_field_name(), None)
    if not address:
        return None
    sessions = registry.sessions_of(user_id)
    session = next((one for one in sessions if one.id == session_id), None)
    if session is None or not (always or is_new(session, sessions)):
        return None
    site, url = None, ""
    # Language and time zone of the request are those of the person who signs in, maybe a thief.
    with (
        translation.override(language or settings.LANGUAGE_CODE),
        timezone.override(timezone.get_default_timezone()),
    ):
        try:
            site = get_current_site(request)
            url = url_of(request, session)
        except (DisallowedHost, NoReverseMatch, ObjectDoesNotExist):
            # The Host header is chosen by the person who signs in, and must not keep the mail back.
            logger.warning(
                "the mail about the sign-in of session %s has no link",
                session_id[:12],
                exc_info=True,
            )
        context = {
            "user": user,
            "site": site.name if site else "",
            "domain": site.domain if site else "",
            # No words of the User-Agent: they are those of the person who has signed in.
            "browser": agents.usual_name(client.user_agent) or _("an unknown browser"),
            "address": _ip_address(client.address),
            "at": session.created,
            "url": url,
            "days": LIFE.days,
        }
        subject = render_to_string("clustered_sessions/sign_in_subject.txt", context)
        text = render_to_string("clustered_sessions/sign_in_mail.txt", context)
    return SignInMail(" ".join(subject.split()), text, None, [address])


def is_new(session: SessionInfo, sessions: Iterable[SessionInfo]) -> bool:
    """Return whether none of its user's ``sessions`` from before has the browser of a session.

    A browser is its name and system, as on "Your devices"; without names the whole User-Agent.
    One that nothing is known of is new: the site does not keep clients.
    """
    if session.first is None:
        return True
    known = {
        _browser(client)
        for other in sessions
        # Of two at once, the later one has the other before it.
        if (other.created, other.id) < (session.created, session.id)
        for client in (other.first, other.last)
        if client is not None
    }
    return _browser(session.first) not in known - {""}


def _ip_address(text: str) -> str:
    """Return an IP address; empty for another text, which a middleware may have from a header."""
    try:
        return str(ip_address(text))
    except ValueError:
        return ""


def _browser(client: Client) -> str:
    return agents.name(client.user_agent) or client.user_agent
