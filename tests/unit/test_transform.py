"""A transform is found or its mistake told, and what it returns, raises or is given is JSON to the last digit."""

import datetime as dt
import decimal
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumerd import transform as module
from consumerd.config import HandlerConfig
from consumerd.errors import Halt, Refusal
from consumerd.handler import Misuse, Poison, Record, Retry, decode, encode, run
from consumerd.transform import ALL, NONE, Answer, Item, Outcome, Request, Transform, load

NUMBERS = st.from_regex(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?", fullmatch=True)


@dataclass
class Order:
    """A record of another kind."""

    id: int


def answer(
    function: Callable[..., Any],
    *values: bytes,
    alone: bool = False,
    noted: list[int] | None = None,
    most_bytes: int = 1 << 20,
) -> Answer:
    """Call a function for values of one partition, offsets from 0 on."""
    items = [Item(value, offset, None, None, []) for offset, value in enumerate(values)]
    transform = Transform(f"tests:{function.__name__}", function, Path(__file__).parent)
    noted = [] if noted is None else noted
    return transform.answer(Request("orders", 0, items, alone, most_bytes), noted.append)


def reasons(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the reasons of refusals."""
    return [outcome.reason if isinstance(outcome, Refusal) else "" for outcome in outcomes]


@given(NUMBERS)
def test_no_digit_is_lost(number: str) -> None:
    """A number that is passed on is the number that was sent, with all its digits."""
    sent = decode(f'{{"n": {number}}}'.encode())
    again = json.loads(encode(sent), parse_float=decimal.Decimal, parse_int=decimal.Decimal)
    expected = decimal.Decimal(number)
    assert expected.as_tuple() == again["n"].as_tuple() or (expected == 0 == again["n"] and "." not in number)


def test_what_a_record_is() -> None:
    """A record has the message's value, and where it came from beside it."""
    seen: list[Record] = []

    def transform(record: Record) -> None:
        seen.append(record)

    at = dt.datetime(2026, 11, 23, 10, 15, 0, 123000, tzinfo=dt.UTC)
    value = b'{"a": 1, "b": 1.10, "a": 2}'
    headers = [("h", b"1"), ("h", None)]
    assert [] == run(transform, value, topic="t", partition=1, offset=2, timestamp=at, key=b"k", headers=headers)
    (record,) = seen
    assert {"a": 2, "b": decimal.Decimal("1.10")} == record
    assert ("t", 1, 2, at, b"k") == (record.topic, record.partition, record.offset, record.timestamp, record.key)
    assert headers == record.headers


def test_run_gives_what_a_transform_makes() -> None:
    """`run` returns a list of records, whatever the function's kind, and raises what it raises."""

    def some_batch(records: list[Record]) -> list[Any]:
        return [[record, {"n": 2}] for record in records]

    def refuse(record: Record) -> None:
        raise Poison(record["why"])

    assert [{"n": 1}, {"n": 2}] == run(some_batch, {"n": 1})
    assert [{"n": 1}] == run(lambda record: record, b'{"n": 1}')
    with pytest.raises(Poison, match="so"):
        run(refuse, {"why": "so"})
    with pytest.raises(TypeError):
        run(lambda _: {"n": object()}, {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        run(lambda _: {"a": None, "n": [float("nan")]}, {})
    for nan in ("nan", "inf"):  # which no message can hold
        with pytest.raises(ValueError, match="not JSON compliant"):
            run(lambda record: record, {"a": {"n": float(nan)}})


def test_what_is_returned_is_json() -> None:
    """Values of Python's own types are written as a column of theirs reads them."""

    def transform(_: Record) -> dict[str, Any]:
        at = dt.datetime(2026, 11, 23, tzinfo=dt.UTC)
        return {"at": at, "raw": b"ab", "d": decimal.Decimal("1.10"), "f": 1.5, "t": (1, None), "day": at.date()}

    expected = b'{"at":"2026-11-23T00:00:00Z","raw":"YWI=","d":1.10,"f":1.5,"t":[1,null],"day":"2026-11-23"}'
    assert [(expected,)] == answer(transform, b"{}").outcomes
    assert [(b'{"id":1}',)] == answer(lambda _: Order(1), b"{}").outcomes


def test_each_way_that_a_call_ends() -> None:
    """A dict is a value, a list several, None and an empty list none; whatever else is a refusal, in its place."""

    def transform(record: Record) -> Any:  # noqa: ANN401 - all kinds
        return {
            "one": {"n": 1},
            "two": [{"n": 1}, {"n": 2}],
            "none": None,
            "empty": [],
            "text": "text",
            "texts": [{"n": 1}, "text"],
            "nan": {"n": float("inf"), "m": None},
            "decimal": {"n": decimal.Decimal("-Infinity")},
            "object": {"n": object()},
            "surrogate": {"n": "\ud800"},
        }[record["kind"]]

    kinds = ["one", "two", "none", "empty", "text", "texts", "nan", "decimal", "object", "surrogate", "absent"]
    outcomes = answer(transform, *(json.dumps({"kind": kind}).encode() for kind in kinds)).outcomes
    assert [(b'{"n":1}',), (b'{"n":1}', b'{"n":2}'), (), ()] == outcomes[:4]
    assert ["transform"] * 7 == reasons(outcomes[4:])
    errors = ["TypeError"] * 2 + ["ValueError", "msgspec.DecodeError", "TypeError", "UnicodeEncodeError", "KeyError"]
    assert errors == [outcome.error for outcome in outcomes[4:] if isinstance(outcome, Refusal)]


def test_an_exception_is_told_without_its_text() -> None:
    """A letter has an exception's class, file and line, and a user's own sentence; never an exception's text."""

    def transform(record: Record) -> int:
        if record["n"]:
            raise Poison(f"my own \ud800 sentence {'x' * 2000}")
        return int("secret")

    refused, poison = answer(transform, b'{"n": 0}', b'{"n": 1}').outcomes
    assert isinstance(refused, Refusal)
    assert isinstance(poison, Refusal)
    assert ("ValueError", "transform", "transform") == (refused.error, refused.reason, refused.stage)
    assert re.fullmatch(r"ValueError at test_transform\.py:\d+", refused.message)
    assert "consumerd.handler.Poison" == poison.error
    assert poison.message.startswith("my own ? sentence xxx")
    assert module.SENTENCE == len(poison.message)
    assert "invalid literal for int() with base 10: 'secret'" == refused.words
    assert "secret" not in repr(refused)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_whatever_is_raised_is_of_its_record(error: type[BaseException]) -> None:
    """What is no Exception refuses its record like one: it is not taken for the daemon's own end."""

    def transform(record: Record) -> Record:
        if record["n"]:
            raise error
        return record

    def some_batch(records: list[Record]) -> list[Record]:
        return list(map(transform, records))

    for function in (transform, some_batch):
        good, refused = answer(function, b'{"n": 0}', b'{"n": 1}').outcomes
        assert ((b'{"n":0}',), ["transform"]) == (good, reasons([refused]))


def test_an_exception_without_a_text() -> None:
    """An exception whose text cannot be made is told like any other."""

    class Mute(Exception):  # noqa: N818
        def __str__(self) -> str:
            raise ValueError

    def transform(_: Record) -> None:
        raise Mute

    (refused,) = answer(transform, b"{}").outcomes
    assert isinstance(refused, Refusal)
    assert refused.words is None
    assert refused.error.endswith("Mute")


def test_what_cannot_be_decoded_is_not_given() -> None:
    """A value that is no JSON object is refused as without a transform, and the function is not called for it."""
    seen: list[Record] = []
    outcomes = answer(seen.append, b'{"n": 1}', b"{", b"[]", b"null", b'{"n": 1e9999999999999999999}', b'{"n": "\xff"}')
    assert ["", "malformed", "type", "missing", "range", "encoding"] == reasons(outcomes.outcomes)
    assert [{"n": 1}] == seen


def test_a_retry_keeps_what_came_before() -> None:
    """Retry ends an answer with its sentence; what was transformed before it is there, and nothing after it."""

    def transform(record: Record) -> Record:
        if record["n"] == 2:
            raise Retry("the lookup is down")
        return record

    found = answer(transform, b'{"n":1}', b'{"n":2}', b'{"n":3}')
    assert ([(b'{"n":1}',)], "the lookup is down") == (found.outcomes, found.retry)


def test_a_large_answer_ends_early() -> None:
    """An answer ends with the record that fills it, that of a batch function too; the rest is asked for again."""

    def same(record: Record) -> Record:
        return record

    def same_batch(records: list[Record]) -> list[Record]:
        return records

    for function in (same, same_batch):
        assert 2 == len(answer(function, b'{"n":1}', b'{"n":2}', b'{"n":3}', most_bytes=10).outcomes)


def test_a_batch_function_has_all_at_once() -> None:
    """One call has the records of all values that can be decoded, and tells what becomes of each."""
    calls: list[int] = []
    noted: list[int] = []

    def some_batch(records: list[Record]) -> list[Any]:
        calls.append(len(records))
        return [None if record["n"] == 2 else record for record in records]

    found = answer(some_batch, b'{"n":1}', b"{", b'{"n":2}', noted=noted)
    assert [(b'{"n":1}',), ()] == [found.outcomes[0], found.outcomes[2]]
    assert ["", "malformed", ""] == reasons(found.outcomes)
    assert ([2], [ALL, NONE]) == (calls, noted)
    answer(some_batch, b'{"n":1}', b'{"n":2}', alone=True, noted=noted)
    assert ([2, 1, 1], [0, 1, NONE]) == (calls, noted[2:])


def test_a_batch_function_that_raises_is_called_for_each() -> None:
    """The record at which a batch function raises is found by calling it for each; a Retry is not looked into."""

    def some_batch(records: list[Record]) -> list[Record]:
        if any(record["n"] == 1 for record in records):
            raise KeyError
        if len(records) == 3:
            raise Retry
        return records

    assert ["", "transform", ""] == reasons(answer(some_batch, b'{"n":0}', b'{"n":1}', b'{"n":2}').outcomes)
    found = answer(some_batch, *[b'{"n":0}'] * 3)
    assert ([], "Retry without a sentence") == (found.outcomes, found.retry)


@pytest.mark.parametrize(
    ("returned", "words"), [([], "0 entries for 2 records"), (None, "not NoneType"), (iter(()), "must return a list")]
)
def test_a_batch_function_that_loses_count_is_a_halt(returned: object, words: str) -> None:
    """What does not tell which record became what is a mistake of the function, not of the records."""

    def some_batch(_: list[Record]) -> object:
        return returned

    found = answer(some_batch, b"{}", b"{}")
    assert [] == found.outcomes
    assert found.halt is not None
    assert words in found.halt
    with pytest.raises(Misuse):
        run(some_batch, {})  # type: ignore[arg-type]


MISTAKES = {
    "absent:transform": ("there is no module absent", "absent.py", "`transform.function`"),
    "package.absent:transform": ("there is no module package.absent", "package/absent.py"),
    "broken:transform": ("module broken cannot be imported: ValueError: no (broken.py:2)", "mend it"),
    "lacking:transform": ("lacking cannot be imported: ModuleNotFoundError", "no_such_library", "install it"),
    "beside:transform": ("beside cannot be imported: ModuleNotFoundError", "'nowhere' (beside.py:1)"),
    "syntax:transform": ("module syntax cannot be imported: SyntaxError", "(syntax.py:1)"),
    "exits:transform": ("module exits cannot be imported: SystemExit: 3 (exits.py:1)",),
    "interrupts:transform": ("module interrupts cannot be imported: KeyboardInterrupt:  (interrupts.py:1)", "mend it"),
    "sound:trasnform": ("module sound has no function trasnform; did you mean transform?",),
    "sound:nothing": ("has no function nothing; its functions: transform, two, waits, yields",),
    "sound:NUMBER": ("NUMBER of module sound is no function",),
    "sound:waits": ("waits of module sound is `async`",),
    "sound:yields": ("yields of module sound yields: return a list",),
    "sound:two": ("two of module sound must take one argument: def two(record)",),
    "wave:open": ("wave.py is hidden by another module wave", "rename the file"),
}
FILES = {
    "broken.py": "def f():\n    raise ValueError('no')\nf()",
    "lacking.py": "import no_such_library",
    "beside.py": "import nowhere",
    "syntax.py": "def transform(",
    "exits.py": "raise SystemExit(3)",
    "interrupts.py": "raise KeyboardInterrupt",
    "sound.py": (
        "NUMBER = 1\ndef transform(record): return record\ndef two(a, b): ...\nasync def waits(record): ...\n"
        "def yields(record): yield\n"
    ),
    "wave.py": "def open(record): ...",
    "package/__init__.py": "",
    "package/inner.py": "from sound import transform",
}


@pytest.fixture
def handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a folder of modules; what is imported of it is forgotten."""
    import sys

    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    (tmp_path / "package").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(handlers: Path, name: str) -> None:
    """Each mistake of a module or a function is told from the others, in one sentence with the way on."""
    with pytest.raises(Halt) as raised:
        load(name, handlers)
    assert "transform" == raised.value.reason
    assert [] == [words for words in MISTAKES[name] if words not in str(raised.value)], raised.value
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["sound:transform", "package.inner:transform"])
def test_a_module_beside_the_handler_is_found(handlers: Path, name: str) -> None:
    """A module of the folder, or of a package in it, is imported, and may import its neighbours."""
    assert {"n": 1} == load(name, handlers).function({"n": 1})


@pytest.mark.parametrize("function", ["orders", "orders:", ":transform", "orders.py:transform", "a b:c", "a:b.c"])
def test_a_function_is_named_by_its_module(function: str) -> None:
    """What is not `module:function` is refused with an example."""
    table = {"name": "orders", "write": "append"}
    data = {"name": "o", "path": Path("o.toml"), "topics": ["o"], "table": table, "transform": {"function": function}}
    with pytest.raises(ValueError, match='must be "module:function"'):
        HandlerConfig.model_validate(data, by_name=False, by_alias=True, context={"folder": Path()})
