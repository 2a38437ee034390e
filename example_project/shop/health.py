"""What a load balancer asks each node: is it to get requests?"""

from __future__ import annotations

import threading

from django.http import HttpRequest, HttpResponse

#: Set once this process was told to stop; it still answers what comes until it does.
leaving = threading.Event()


def health(request: HttpRequest) -> HttpResponse:
    """Answer 200, or 404 once this process is about to stop: give it nothing new.

    The store is not asked. All nodes share it, so one that cannot reach it is no worse than the
    others; with all of them taken out, visitors would not even get the page that says 503.
    """
    return HttpResponse(status=404 if leaving.is_set() else 200, content_type="text/plain")
