"""What every page of the shop shows: the node, the cart and the browsing history."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpRequest

from cart.catalogue import PRODUCTS, euro

#: Products that the browsing history shows, newest first.
HISTORY_LENGTH = 5


def shop(request: HttpRequest) -> dict[str, Any]:
    """Return the variables of every template."""
    host = request.get_host().rpartition(":")[0] or request.get_host()
    lines = [
        {
            "product": PRODUCTS[sku],
            "quantity": quantity,
            "sum": euro(PRODUCTS[sku].cents * quantity),
        }
        for sku, quantity in request.session.get("cart", {}).items()
        if sku in PRODUCTS
    ]
    return {
        "node": settings.NODE,
        "peer": settings.PEER,
        "demo_staff": settings.DEMO_STAFF,
        "interface": "ASGI" if isinstance(request, ASGIRequest) else "WSGI",
        "peer_url": f"{request.scheme}://{host}:{settings.PEER['port']}{request.get_full_path()}",
        "lines": lines,
        # Not "count": the package's list of devices has a "count" of its own.
        "pieces": sum(line["quantity"] for line in lines),
        "total": euro(sum(line["product"].cents * line["quantity"] for line in lines)),
        "history": history(request.session.get("seen", [])),
    }


def history(seen: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return the products seen last, newest first and each once, with the node that showed it."""
    newest = {}
    for visit in reversed(seen):
        newest.setdefault(visit["sku"], visit["node"])
    return [
        {"product": PRODUCTS[sku], "node": node, "here": node == settings.NODE["name"]}
        for sku, node in newest.items()
        if sku in PRODUCTS
    ][:HISTORY_LENGTH]
