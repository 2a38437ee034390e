"""The pages of the shop: the session is used as any Django view would use it."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.contrib import messages
from django.contrib.auth import get_user_model
from django.contrib.auth.views import LoginView, LogoutView
from django.contrib.messages.views import SuccessMessageMixin
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import redirect, render
from django.urls import reverse, reverse_lazy
from django.utils.decorators import method_decorator
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_GET, require_POST
from django.views.generic import UpdateView

from cart.catalogue import PRODUCTS, Product
from django_clustered_sessions.decorators import recent_login

#: Visits kept in the session.
SEEN_LENGTH = 40

#: Most pieces of one product in a cart.
MAX_QUANTITY = 99


@never_cache
@require_GET
def shop(request: HttpRequest) -> HttpResponse:
    """Show all products."""
    return render(request, "cart/shop.html", {"products": PRODUCTS.values()})


@never_cache
@require_GET
def product(request: HttpRequest, sku: str) -> HttpResponse:
    """Show one product and remember that it was seen."""
    shown = find(sku)
    seen = request.session.setdefault("seen", [])
    seen.append({"sku": sku, "node": settings.NODE["name"]})
    del seen[:-SEEN_LENGTH]
    return render(request, "cart/product.html", {"product": shown})


@require_POST
def change(request: HttpRequest, sku: str) -> HttpResponse:
    """Put one more of a product into the cart, take one out, or take all out."""
    changed = find(sku)
    action = request.POST.get("action", "add")
    cart = request.session.setdefault("cart", {})
    quantity = cart.get(sku, 0)
    if action == "remove" or (action == "less" and quantity <= 1):
        cart.pop(sku, None)
        messages.success(request, f"{changed.name} is out of the cart.")
        return back(request, "cart")
    cart[sku] = min(quantity + (-1 if action == "less" else 1), MAX_QUANTITY)
    if action == "add":
        messages.success(request, f"{changed.name} is in the cart: {cart[sku]}.")
    else:
        messages.success(request, f"{changed.name}: {cart[sku]} in the cart.")
    return back(request, f"{action}-{sku}")


@require_GET
async def state(request: HttpRequest) -> JsonResponse:
    """Answer what this node knows of the session."""
    user = await request.auser()
    return JsonResponse(
        {
            "node": settings.NODE["name"],
            "user": user.get_username() or None,
            "cart": await request.session.aget("cart", {}),
            "seen": [visit["sku"] for visit in await request.session.aget("seen", [])],
        }
    )


class Login(SuccessMessageMixin, LoginView):
    """Log in; the page shows the name and the password of the demo user."""

    template_name = "cart/login.html"
    redirect_authenticated_user = True
    extra_context = {"demo_user": settings.DEMO_USER, "demo_password": settings.DEMO_PASSWORD}

    def get_success_message(self, cleaned_data: dict[str, Any]) -> str:
        """Greet the user."""
        return f"Welcome, {self.request.user.get_username()}. Every node knows you now."


@method_decorator(recent_login(minutes=settings.CONFIRM_MINUTES), name="dispatch")
class Email(SuccessMessageMixin, UpdateView):
    """Change the mail address, after a recent login: who has it can have a new password sent."""

    template_name = "cart/email.html"
    model = get_user_model()
    fields = ["email"]
    success_url = reverse_lazy("email")
    extra_context = {"minutes": settings.CONFIRM_MINUTES}
    success_message = "Your mail address is changed."

    def get_object(self, queryset: Any = None) -> Any:
        """Return the user, not the lazy object that a page has."""
        return get_user_model().objects.get(pk=self.request.user.pk)


class Logout(LogoutView):
    """Log out, which ends the session and its cart on every node."""

    def post(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        """End the session, then say so in a new one."""
        response = super().post(request, *args, **kwargs)
        messages.success(
            request, "You are logged out on every node; the cart went with the session."
        )
        return response


def find(sku: str) -> Product:
    """Return a product, or answer 404."""
    try:
        return PRODUCTS[sku]
    except KeyError:
        raise Http404(f"no product {sku!r}") from None


def back(request: HttpRequest, element_id: str) -> HttpResponse:
    """Redirect to the page that held the form, with the focus on one of its elements."""
    url = request.POST.get("next", "")
    if not url_has_allowed_host_and_scheme(url, allowed_hosts=None):
        url = reverse("shop")
    return redirect(f"{url}#{element_id}")
