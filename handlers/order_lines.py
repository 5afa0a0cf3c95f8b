"""The rows of an order: one for each of its lines."""

from typing import Any

from consumerd.handler import Poison, Record


def transform(order: Record) -> list[dict[str, Any]] | None:
    """Return the lines of an order; drafts are skipped, and an order without lines is poison."""
    if order["status"] == "draft":
        return None
    if not order["lines"]:
        raise Poison("an order without lines")
    return [
        {
            "order_id": order["order_id"],
            "line": number,
            "sku": line["sku"],
            "quantity": line["quantity"],
            "total": line["quantity"] * line["price"],  # 3 * Decimal("33.30"): no digit is lost
            "placed_at": order["placed_at"],
        }
        for number, line in enumerate(order["lines"], start=1)
    ]
