"""What the shop sells."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """Describe one product; ``cart/pictures.svg`` draws it."""

    sku: str
    name: str
    cents: int
    line: str
    text: str
    facts: tuple[tuple[str, str], ...]

    @property
    def price(self) -> str:
        """Return the price of one, in euro."""
        return euro(self.cents)


def euro(cents: int) -> str:
    """Write an amount of ``cents`` in euro."""
    return f"€ {cents // 100}.{cents % 100:02}"


PRODUCTS = {
    product.sku: product
    for product in (
        Product(
            "amphora",
            "Amphora",
            8900,
            "Two handles, one long memory.",
            "The shape that carried oil and wine from harbour to harbour: whichever ship took it, "
            "it arrived with what had been put in. Thrown in two parts and joined on the wheel.",
            (("Height", "46 cm"), ("Holds", "6 litres"), ("Fired at", "1 040 °C")),
        ),
        Product(
            "jug",
            "Water jug",
            4200,
            "Keeps water cool without ice.",
            "Left unglazed outside, so that it sweats a little and cools what it holds. The lip "
            "is pulled by hand and does not drip.",
            (("Height", "24 cm"), ("Holds", "1.8 litres"), ("Fired at", "1 060 °C")),
        ),
        Product(
            "teapot",
            "Teapot",
            5600,
            "Pours to the last cup.",
            "A round belly, a short spout and a lid that stays on when it is tipped. Glazed "
            "inside; outside it darkens where hands hold it.",
            (("Height", "15 cm"), ("Holds", "4 cups"), ("Fired at", "1 140 °C")),
        ),
        Product(
            "bowl",
            "Mixing bowl",
            3400,
            "Wide, heavy, does not wander.",
            "Heavy enough to stay where it is put while one hand stirs. Slip-banded in cream, "
            "glazed inside.",
            (("Width", "30 cm"), ("Holds", "4 litres"), ("Fired at", "1 120 °C")),
        ),
        Product(
            "tagine",
            "Tagine",
            7400,
            "Slow cooking under a tall hat.",
            "Steam rises into the cone, turns to drops and runs back down: nothing is lost. Soak "
            "it once before its first fire.",
            (("Width", "28 cm"), ("Serves", "4"), ("Fired at", "1 080 °C")),
        ),
        Product(
            "mug",
            "Mug",
            1800,
            "For the second coffee.",
            "A straight wall, a handle for three fingers and a foot ring that leaves no mark on "
            "the desk.",
            (("Height", "10 cm"), ("Holds", "0.35 litres"), ("Fired at", "1 200 °C")),
        ),
        Product(
            "vase",
            "Bud vase",
            2600,
            "One branch is enough.",
            "A narrow neck over a round body holds a single branch upright. Burnished with a "
            "pebble instead of glazed.",
            (("Height", "19 cm"), ("Holds", "0.5 litres"), ("Fired at", "980 °C")),
        ),
        Product(
            "planter",
            "Planter",
            2200,
            "With a saucer, without a plant.",
            "Porous walls let roots breathe, a hole and a saucer take care of the rest. The "
            "plant in the picture has a home already.",
            (("Width", "18 cm"), ("Holds", "2.5 litres"), ("Fired at", "1 000 °C")),
        ),
        Product(
            "lantern",
            "Lantern",
            3900,
            "The wind goes round, the light stays.",
            "One candle, one arched door and a few stars cut by hand while the clay was soft. It "
            "has been left in the rain more than once.",
            (("Height", "26 cm"), ("Holds", "1 candle"), ("Fired at", "1 060 °C")),
        ),
    )
}
