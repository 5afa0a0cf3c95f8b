"""Facts about libraries that the code relies on, and that a new version of one may change without a word."""

import datetime as dt
import decimal
import uuid
from typing import Annotated

import msgspec
import pytest
from psycopg._copy_base import format_row_binary
from psycopg.adapt import Transformer
from psycopg.pq import Format

from consumerd.catalog import Column
from consumerd.formats.values import refusal
from consumerd.sinks.copy import CopyData, Packer

INT4, INT8, TEXT, JSONB = 23, 20, 25, 3802


class Inner(msgspec.Struct):
    """One level below the top."""

    text: str | None = None


class Value(msgspec.Struct):
    """What a table's columns become, one of each branch."""

    id: Annotated[int, msgspec.Meta(ge=-32768, le=32767)]
    short: Annotated[str, msgspec.Meta(max_length=3)] | None = None
    real: float | None = None
    amount: decimal.Decimal | None = None
    at: Annotated[dt.datetime, msgspec.Meta(tz=True)] | None = None
    u: uuid.UUID | None = None
    f: bool | None = None
    inner: Inner | None = None
    dotted: str | None = msgspec.field(default=None, name="a.b")


DEEP = b"[" * 1_000 + b"]" * 1_000


@pytest.mark.parametrize(
    ("sent", "error", "text", "reason", "column"),
    [
        (b"{}", msgspec.ValidationError, "Object missing required field `id`", "missing", "id"),
        (b'{"id":null}', msgspec.ValidationError, "Expected `int`, got `null` - at `$.id`", "missing", "id"),
        (b"null", msgspec.ValidationError, "Expected `object`, got `null`", "missing", None),
        (b"[]", msgspec.ValidationError, "Expected `object`, got `array`", "type", None),
        (b'{"id":"1"}', msgspec.ValidationError, "Expected `int`, got `str` - at `$.id`", "type", "id"),
        (b'{"id":32768}', msgspec.ValidationError, "Expected `int` <= 32767 - at `$.id`", "range", "id"),
        (b'{"id":-32769}', msgspec.ValidationError, "Expected `int` >= -32768 - at `$.id`", "range", "id"),
        (b'{"id":18446744073709551616}', msgspec.ValidationError, "Expected `int` <= 32767 - at `$.id`", "range", "id"),
        (
            b'{"id":1,"short":"four"}',
            msgspec.ValidationError,
            "Expected `str` of length <= 3 - at `$.short`",
            "range",
            "short",
        ),
        (b'{"id":1,"real":1e999}', msgspec.ValidationError, "Number out of range - at `$.real`", "range", "real"),
        (
            b'{"id":1,"at":"2026-01-01T00:00:00"}',
            msgspec.ValidationError,
            "Expected `datetime` with a timezone component - at `$.at`",
            "type",
            "at",
        ),
        (b'{"id":1,"at":"x"}', msgspec.ValidationError, "Invalid RFC3339 encoded datetime - at `$.at`", "type", "at"),
        (b'{"id":1,"u":"x"}', msgspec.ValidationError, "Invalid UUID - at `$.u`", "type", "u"),
        (
            b'{"id":1,"f":1}',
            msgspec.ValidationError,
            "Expected `bool | null`, got `int` - at `$.f`",
            "type",
            "f",
        ),
        (
            b'{"id":1,"inner":{"text":1}}',
            msgspec.ValidationError,
            "Expected `str | null`, got `int` - at `$.inner.text`",
            "type",
            "inner.text",
        ),
        (b'{"id":1,"a.b":1}', msgspec.ValidationError, "Expected `str | null`, got `int` - at `$.a.b`", "type", "a.b"),
        (b"", msgspec.DecodeError, "Input data was truncated", "malformed", None),
        (b'{"id":NaN}', msgspec.DecodeError, "JSON is malformed: invalid character (byte 6)", "malformed", None),
        (b'{"id":1}2', msgspec.DecodeError, "JSON is malformed: trailing characters (byte 9)", "malformed", None),
        (b'{"id":1,"inner":{"text":"\\ud800"}}', msgspec.DecodeError, "Input data was truncated", "malformed", None),
        (b'{"id":1,"inner":{"text":"\xff"}}', UnicodeDecodeError, "text is not valid UTF-8", "encoding", None),
        (b'{"id":1,"ignored":' + DEEP + b"}", RecursionError, "JSON is nested too deeply", "malformed", None),
    ],
)
def test_msgspec_words_its_errors_as_refusals_read_them(
    sent: bytes, error: type[Exception], text: str, reason: str, column: str | None
) -> None:
    """Class and words of each error are those that `refusal` makes reason and column of."""
    with pytest.raises(error) as raised:
        msgspec.json.decode(sent, type=Value)
    said = refusal(raised.value)
    assert (error, text, reason, column) == (type(raised.value), said.message, said.reason, said.column)


def test_msgspec_keeps_raw_bytes_as_they_were_sent() -> None:
    """A Raw is the exact bytes of its value, so that jsonb rounds no number."""

    class Document(msgspec.Struct):
        doc: msgspec.Raw

    sent = b'{"doc": {"n": 123456789012345678901234567890, "f":1.10} }'
    assert b'{"n": 123456789012345678901234567890, "f":1.10}' == bytes(msgspec.json.decode(sent, type=Document).doc)


def test_psycopgs_private_row_formatter_packs() -> None:
    """`format_row_binary` is there, and appends a row in the form that binary COPY wants."""
    transformer = Transformer()
    transformer.set_dumper_types([INT4, TEXT, INT8], Format.BINARY)
    packed = bytearray()
    format_row_binary((1, "é", None), transformer, packed)
    expected = b"\x00\x03" + b"\x00\x00\x00\x04\x00\x00\x00\x01" + b"\x00\x00\x00\x02\xc3\xa9" + b"\xff\xff\xff\xff"
    assert expected == bytes(packed)


def test_the_packer_passes_jsonb_on_as_bytes() -> None:
    """Bytes go through the same formatter unchanged."""
    column = Column(name="v", oid=JSONB, typmod=-1, type_name="jsonb", not_null=False, automatic=False)
    expected = b"\x00\x01" + b"\x00\x00\x00\x03\x01[]"
    assert expected == bytes(Packer([column]).add(CopyData(), [(b"\x01[]",)]).packed)
