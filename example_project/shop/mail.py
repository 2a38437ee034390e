"""Where the shop's mails go: to the terminal."""

from __future__ import annotations

from django.core.mail import EmailMessage
from django.core.mail.backends import console


class EmailBackend(console.EmailBackend):
    """Print mails as they are read: Django's own backend cuts long links in two, as mail does."""

    def write_message(self, message: EmailMessage) -> None:
        """Print one mail between two lines that ``demo.py`` knows."""
        self.stream.write(
            f"{'-- mail ':-<79}\n"
            f"To: {', '.join(message.to)}\nSubject: {message.subject}\n\n"
            f"{message.body.strip()}\n{'-' * 79}\n"
        )
