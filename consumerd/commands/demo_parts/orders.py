"""What the demo produces: numbered orders, and among them a known set of poison of every kind that consumerd tells.

Two handlers read the topic. `orders` appends each order to a table without a key on its number, so that a doubled row
would show; `customers` keeps the newest order of each customer, by upsert. Poison for one may be a good record for the
other, which does not read the field at fault. Customers have their partition, so that "newest" means something.

One order in each run of POISON_EVERY is poison: the share is below the breaker's 5 % wherever it looks.
"""

from __future__ import annotations

import datetime as dt
import random
import uuid
from collections import Counter
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import orjson

from consumerd.commands.demo_parts.check import Message, Produced, Row, Source, newest

if TYPE_CHECKING:
    from collections.abc import Callable

    from consumerd.errors import PoisonReason

TOPIC = "orders"
ORDERS = 200_000
PARTITIONS = 12
"""A partition is 1.5 MB as sent, 4.4 MB before compression; the embedded broker keeps 5 MiB."""
CUSTOMERS = 10_000
POISON_EVERY = 80
VOUCHER_EVERY = 400
REFUSED_EVERY = 64
"""One poison in so many is refused by the database only, not by the decode: a batch is then written several times over
to find the rows at fault (one in 16 made the whole run half as fast)."""
ORDER_INTERVAL_MS = 5
SEED = 20261101
CURRENCIES = ("EUR", "USD", "CHF", "GBP")
NOTES = ("leave at the door", "Grüße aus Köln", "a gift, no invoice please", "リボンをかけて", 'ring "twice"', "")
OPTIONS: tuple[dict[str, Any], ...] = (
    {"express": True},
    {"wrap": {"paper": "blue", "bow": None}},
    {"tags": ["a", 1, ""]},
)
DEPTH = 1500
"""Levels of nesting: more than the daemon's decoder goes down."""

ORDERS_TABLE = """\
CREATE TABLE orders (
    order_id bigint NOT NULL,
    customer_id integer NOT NULL,
    quantity smallint NOT NULL CHECK (quantity > 0),
    amount numeric(10, 2) NOT NULL,
    currency varchar(3) NOT NULL,
    paid boolean NOT NULL,
    placed_at timestamptz NOT NULL,
    shipment uuid,
    discount double precision,
    note text,
    options jsonb,
    voucher text UNIQUE
)"""
"""No key on order_id: nothing but the daemon's checkpoint keeps a row from being there twice."""

CUSTOMERS_TABLE = """\
CREATE TABLE customers (
    customer_id integer PRIMARY KEY,
    last_order bigint NOT NULL,
    amount numeric(10, 2) NOT NULL,
    placed_at timestamptz NOT NULL
)"""

ORDERS_HANDLER = """\
topics = ["orders"]
table = { name = "orders", write = "append", tombstones = "dead-letter" }
batch = { max_messages = 5_000 }    # small, so that the crash leaves much to do again

[columns]
order_id = "order_id"
customer_id = "customer.id"
quantity = "quantity"
amount = "amount"
currency = "currency"
paid = "paid"
placed_at = "placed_at"
shipment = "shipment"
discount = "discount"
note = "note"
options = "options"
voucher = "voucher"
"""

CUSTOMERS_HANDLER = """\
topics = ["orders"]
table = { name = "customers", write = "upsert", key = ["customer_id"], tombstones = "dead-letter" }
batch = { max_messages = 5_000 }

[columns]
customer_id = "customer.id"
last_order = "order_id"
amount = "amount"
placed_at = "placed_at"
"""

HANDLERS = {"orders": ORDERS_HANDLER, "customers": CUSTOMERS_HANDLER}
TABLES = (ORDERS_TABLE, CUSTOMERS_TABLE)

Document = dict[str, Any]


class Kind(NamedTuple):
    """One kind of poison: how a good order is spoiled, and with what reason each handler refuses it (None: a row)."""

    name: str
    spoil: Callable[[Document], bytes | None]
    orders: PoisonReason | None
    customers: PoisonReason | None


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One record, and the row that it is or would have been."""

    source: Source
    message: Message
    row: Row
    kind: Kind | None


def make(count: int, now_ms: int) -> list[Order]:
    """Return the orders of the topic, in the order of producing; `now_ms` is when the last one was placed."""
    chance = random.Random(SEED)  # noqa: S311 - the same orders each time
    offsets: Counter[int] = Counter()
    vouchers: dict[int, str] = {}
    orders = []
    poisoned = 0
    for number in range(count):
        if number % POISON_EVERY == 0:
            poisoned = number + chance.randrange(POISON_EVERY)
        placed_ms = now_ms - (count - number) * ORDER_INTERVAL_MS
        document, row = _order(chance, number, placed_ms)
        partition = row[1] % PARTITIONS
        kind = None
        if number == poisoned:
            kind = _kind(number // POISON_EVERY)
            if kind is REPEATED:
                document["voucher"] = vouchers[partition]
        elif partition not in vouchers or number % VOUCHER_EVERY == 1:
            document["voucher"] = vouchers[partition] = f"V{number}"
            row = (*row[:-1], vouchers[partition])
        value = kind.spoil(document) if kind else orjson.dumps(document)
        message = _message(chance, row[1], value, placed_ms, spoiled=kind is not None)
        orders.append(Order(source=Source(partition, offsets[partition]), message=message, row=row, kind=kind))
        offsets[partition] += 1
    return orders


def expected(orders: list[Order]) -> dict[str, list[Produced]]:
    """Return what must become of each order, for each handler."""
    return {
        "orders": [_outcome(order, order.row, order.kind and order.kind.orders) for order in orders],
        "customers": newest(
            _outcome(
                order, (order.row[1], order.row[0], order.row[3], order.row[6]), order.kind and order.kind.customers
            )
            for order in orders
        ),
    }


def _outcome(order: Order, row: Row, reason: PoisonReason | None) -> Produced:
    return Produced(source=order.source, message=order.message, row=None if reason else row, reason=reason)


def _kind(number: int) -> Kind:
    """Return the kind of a poison by its number: each in its turn."""
    turn, rest = divmod(number, REFUSED_EVERY)
    if rest == 0:
        return REFUSED_BY_DATABASE[turn % len(REFUSED_BY_DATABASE)]
    return KINDS[(number - turn) % len(KINDS)]


def _order(chance: random.Random, number: int, placed_ms: int) -> tuple[Document, Row]:
    """Return an order as it is sent, and as the row that it becomes; the voucher is added by the caller."""
    bits = chance.getrandbits(128)  # one draw for all: 200,000 orders take a second or two as it is
    shipment = uuid.UUID(int=bits)
    customer = bits % CUSTOMERS
    cents = 100 + (bits >> 64) % 100_000
    placed = dt.datetime.fromtimestamp(placed_ms / 1000, dt.UTC)
    quantity, currency = 1 + number % 9, CURRENCIES[cents % len(CURRENCIES)]
    document: Document = {
        "order_id": number,
        "customer": {"id": customer},
        "quantity": quantity,
        "amount": cents / 100,
        "currency": currency,
        "paid": cents % 3 > 0,
        "placed_at": placed,
        "shipment": shipment,
    }
    discount = cents / 7 if cents % 5 == 0 else None
    note = NOTES[cents % len(NOTES)] if cents % 4 == 0 else None
    options = OPTIONS[cents % len(OPTIONS)] if cents % 7 == 0 else None
    # Null and absent are the same to a column that may be null: both are sent.
    if discount is not None:
        document["discount"] = discount
    if note is not None:
        document["note"] = note
    if options is not None or cents % 11 == 0:
        document["options"] = options
    amount = Decimal(cents).scaleb(-2)
    paid = document["paid"]
    return document, (
        number, customer, quantity, amount, currency, paid, placed, shipment, discount, note, options, None,
    )  # fmt: skip


def _message(chance: random.Random, customer: int, value: bytes | None, placed_ms: int, *, spoiled: bool) -> Message:
    """Return the record; poison has every shape of key and header that Kafka knows, as its letter must keep them."""
    key: bytes | None = b"%d" % customer
    if not spoiled:
        return Message(key, value, (), placed_ms)
    key = chance.choice((key, key, None, b"", b"\xff\x00"))
    trace = chance.randbytes(8)
    headers = (("trace", trace), ("source", b"web"), ("source", b""), ("nothing", None))
    return Message(key, value, headers[: chance.randrange(len(headers) + 1)], placed_ms)


def _set(name: str, value: object) -> Callable[[Document], bytes]:
    return lambda document: orjson.dumps({**document, name: value})


def _set_raw(name: str, text: bytes) -> Callable[[Document], bytes]:
    """Set a field to bytes that no JSON library would write."""
    return lambda document: orjson.dumps({**document, name: "SPOILT"}).replace(b'"SPOILT"', text)


def _without(name: str) -> Callable[[Document], bytes]:
    return lambda document: orjson.dumps({key: value for key, value in document.items() if key != name})


REPEATED = Kind("a unique value again", orjson.dumps, "rejected", None)

KINDS = (
    Kind("a tombstone", lambda _: None, "missing", "missing"),
    Kind("an empty value", lambda _: b"", "malformed", "malformed"),
    Kind("cut off", lambda document: orjson.dumps(document)[:-20], "malformed", "malformed"),
    Kind("text behind the object", lambda document: orjson.dumps(document) + b"}", "malformed", "malformed"),
    Kind("nested too deeply", _set_raw("options", b"[" * DEPTH + b"]" * DEPTH), "malformed", "malformed"),
    Kind("not a number", _set_raw("amount", b"NaN"), "malformed", "malformed"),
    Kind("a lone surrogate", _set_raw("note", b'"\\ud800"'), "malformed", "malformed"),
    Kind("an array", lambda document: orjson.dumps([document]), "type", "type"),
    Kind("a field missing", _without("paid"), "missing", None),
    Kind("an object missing", _without("customer"), "missing", "missing"),
    Kind("null into NOT NULL", _set("quantity", None), "missing", None),
    Kind("text for an integer", _set("quantity", "three"), "type", None),
    Kind("text for a boolean", _set("paid", "yes"), "type", None),
    Kind("a fraction for an integer", _set("order_id", 1.5), "type", "type"),
    Kind("not a date", _set("placed_at", "2026-02-30T12:00:00Z"), "type", "type"),
    Kind("a time without a zone", _set("placed_at", "2026-02-03T12:00:00"), "type", "type"),
    Kind("not a uuid", _set("shipment", "10e2-4b"), "type", None),
    Kind("beyond smallint", _set("quantity", 70_000), "range", None),
    Kind("beyond 64 bits", _set_raw("order_id", b"18446744073709551616"), "range", "range"),
    Kind("beyond numeric(10, 2)", _set_raw("amount", b"1e12"), "range", "range"),
    Kind("too long for varchar(3)", _set("currency", "EURO"), "range", None),
    Kind("invalid UTF-8", _set_raw("note", b'"\xc3("'), "encoding", None),
)

REFUSED_BY_DATABASE = (
    Kind("NUL in text", _set("note", "a\0b"), "rejected", None),
    Kind("NUL in jsonb", _set("options", {"a": "\0"}), "rejected", None),
    Kind("against a CHECK", _set("quantity", 0), "rejected", None),
    REPEATED,
)
