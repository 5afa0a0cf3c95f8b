"""A handler's own Python between a message's value and its row: found, and called.

A transform turns JSON into JSON: it gets a value decoded with every digit, and what it returns is encoded again and
mapped to columns as if the message had held it. So paths, types and ranges are those of any other value, and a worker
process is handed bytes and hands back bytes.

Nothing here waits or knows of threads: `runners.py` has the places where a call runs, `transformer.py` uses them.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import msgspec

from consumerd import file_trust
from consumerd.errors import Halt, Refusal
from consumerd.formats import values
from consumerd.handler import Misuse, Origin, Poison, Record, Retry, call, decode, encode, records_of, results_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import ModuleType

    from consumerd.errors import SkipReason
    from consumerd.types import Message

ANSWER_BYTES: Final = 4 << 20
"""Bytes of what was returned after which an answer ends, and the rest is asked for again: a transform may make many
records of one."""
SENTENCE: Final = 1000
"""Characters of a user's sentence that go into headers and logs."""
ALL: Final = -1
"""What is noted of a call that has all records of a request."""
NONE: Final = -2
"""What is noted while there is no call."""

Outcome = tuple[bytes, ...] | Refusal | Literal["where"] | None
"""What became of a message: the values returned for it, none where it is skipped; a refusal; that `where` does not
select it; or None, where there is no value to transform."""


class Item(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One message of a request."""

    value: bytes
    offset: int
    timestamp: int | None
    key: bytes | None
    headers: list[tuple[str, bytes | None]]


class Request(msgspec.Struct, frozen=True):
    """Messages of one partition, in offset order."""

    topic: str
    partition: int
    items: list[Item]
    alone: bool = False
    """Whether a batch function gets one record at a time: with all of these it did not come back."""
    most_bytes: int = ANSWER_BYTES
    """Bytes of what was returned after which the answer ends."""


class Answer(msgspec.Struct):
    """What became of the first messages of a request, and why not of more, where it was the function's wish."""

    outcomes: list[tuple[bytes, ...] | Refusal]
    retry: str | None = None
    halt: str | None = None


@dataclass(frozen=True, slots=True)
class Transform:
    """A function of a module beside the handler's file."""

    name: str
    """As it is configured, `orders:transform`."""
    function: Callable[..., Any]
    folder: Path

    def answer(self, request: Request, note: Callable[[int], None]) -> Answer:
        """Call the function for the messages of a request; before each call `note` is told for which."""
        answer = Answer([])
        records: list[Record | Refusal] = [self._record(request, item) for item in request.items]
        if (
            self.name.endswith("_batch")
            and not request.alone
            and self._all_at_once(records, answer, note, request.most_bytes)
        ):
            return answer
        size = 0
        for index, record in enumerate(records):
            note(index)
            outcome = self._one(record, answer)
            if outcome is None:
                break
            answer.outcomes.append(outcome)
            size += sum(map(len, outcome)) if isinstance(outcome, tuple) else 0
            if size > request.most_bytes:
                break
        note(NONE)
        return answer

    def _record(self, request: Request, item: Item) -> Record | Refusal:
        origin = Origin(request.topic, request.partition, item.offset, item.timestamp, item.key, item.headers)
        try:
            return Record(decode(item.value), origin)
        except (ValueError, RecursionError) as error:
            return values.refusal(error)
        except ArithmeticError as error:
            return values.refuse("range", "a number whose exponent is too large", None, type(error))

    def _all_at_once(
        self, records: Sequence[Record | Refusal], answer: Answer, note: Callable[[int], None], most_bytes: int
    ) -> bool:
        """Call a batch function with all records; False when it raised, and each must be tried alone."""
        given = [record for record in records if isinstance(record, Record)]
        if not given:
            return False
        note(ALL)
        try:
            results = iter(results_of(call(self.function, given), len(given)))
        except Retry as retry:
            answer.retry = _sentence(retry)
        except Misuse as misuse:
            answer.halt = str(misuse)
        except BaseException:  # noqa: BLE001 - which record it was is found by calling it for each alone
            return False
        else:
            size = 0
            for record in records:
                outcome = record if isinstance(record, Refusal) else self._values_of(next(results))
                answer.outcomes.append(outcome)
                size += sum(map(len, outcome)) if isinstance(outcome, tuple) else 0
                if size > most_bytes:
                    break
        note(NONE)
        return True

    def _one(self, record: Record | Refusal, answer: Answer) -> tuple[bytes, ...] | Refusal | None:
        """Return what becomes of one record; None, with the reason in the answer, where that is not known."""
        if isinstance(record, Refusal):
            return record
        try:
            if self.name.endswith("_batch"):
                (returned,) = results_of(call(self.function, [record]), 1)
            else:
                returned = call(self.function, record)
        except Retry as retry:
            answer.retry = _sentence(retry)
        except Misuse as misuse:
            answer.halt = str(misuse)
        except Poison as poison:
            return self._refuse(poison, _sentence(poison))
        except BaseException as error:  # noqa: BLE001 - whatever users' code raises is about this record
            return self._refuse(error, f"{type(error).__qualname__} at {self._place(error)}", words=_words(error))
        else:
            return self._values_of(returned)
        return None

    def _values_of(self, returned: object) -> tuple[bytes, ...] | Refusal:
        try:
            return tuple(map(encode, records_of(returned)))
        except TypeError as error:  # its text names types alone
            return self._refuse(error, f"what {self.name} returned: {error}")
        except (ValueError, RecursionError) as error:
            return self._refuse(error, f"what {self.name} returned is no JSON")

    def _refuse(self, error: BaseException, message: str, words: str | None = None) -> Refusal:
        return Refusal(reason="transform", stage="transform", error=_class_of(error), message=message, words=words)

    def _place(self, error: BaseException) -> str:
        """Return file and line where an exception comes from: the last in the handlers' folder, or else the last."""
        places = _places(error)
        ours = [(file, line) for file, line in places if file.is_relative_to(self.folder)]
        file, line = (ours or places)[-1]
        return f"{_shown(file, self.folder)}:{line}"


class Returned:
    """A message with a value that was returned in place of its own."""

    __slots__ = ("_message", "_value")

    def __init__(self, message: Message, value: bytes) -> None:
        self._message, self._value = message, value

    def value(self) -> bytes:
        """Return the value."""
        return self._value

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - all else is the message's
        return getattr(self._message, name)


def expanded(
    messages: Sequence[Message], outcomes: Sequence[Outcome], refused: dict[int, Refusal]
) -> tuple[list[Message], list[int], Counter[SkipReason]]:
    """Return what is to be rows, of which message each is, and how many messages are skipped.

    What was refused is added to `refused`, by position.
    """
    made: list[Message] = []
    owners: list[int] = []
    skipped: Counter[SkipReason] = Counter()
    for position, (message, outcome) in enumerate(zip(messages, outcomes, strict=True)):
        if position in refused:
            continue
        if isinstance(outcome, Refusal):
            refused[position] = outcome
        elif outcome == "where":
            skipped["where"] += 1
        elif outcome == ():
            skipped["transform"] += 1
        else:
            every = [message] if outcome is None else [cast("Message", Returned(message, each)) for each in outcome]
            made += every
            owners += [position] * len(every)
    return made, owners, skipped


def load(name: str, folder: Path) -> Transform:
    """Import a transform, `module:function`; raises Halt with the way on.

    The folder is the last place where modules are looked for, so that none of its files hides another's.
    """
    module_name, _, function_name = name.partition(":")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    importlib.invalidate_caches()
    file = folder.joinpath(*module_name.split("."))
    _trust(folder, file)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise Halt(
                "transform", f"there is no module {module_name}: write {file}.py, or correct `transform.function`"
            ) from error
        raise _broken(module_name, error, folder) from error
    except BaseException as error:
        raise _broken(module_name, error, folder) from error
    beside = [path for path in (file.with_name(f"{file.name}.py"), file / "__init__.py") if path.is_file()]
    if beside and Path(module.__file__ or "").resolve() != beside[0].resolve():
        raise Halt(
            "transform",
            f"{beside[0]} is hidden by another module {module_name} ({module.__file__ or 'built in'}): rename the file",
        )
    return Transform(name, _function(module, function_name), folder)


def _trust(folder: Path, file: Path) -> None:
    """Refuse, before any of it runs, Python that others may change: the module, and what it may import beside it."""
    own = (file.with_name(f"{file.name}.py"), file / "__init__.py")
    for path in (*own, *sorted(folder.glob("*.py")), folder / "__pycache__"):
        if sentence := file_trust.writable(path):
            raise Halt("transform", f"{path} {sentence}")


def _broken(module: str, error: BaseException, folder: Path) -> Halt:
    """Say why a module that is there cannot be imported."""
    if isinstance(error, SyntaxError):
        where = f"{_shown(Path(error.filename or '?'), folder)}:{error.lineno}"
    else:
        file, line = [(file, line) for file, line in _places(error) if "importlib" not in str(file)][-1]
        where = f"{_shown(file, folder)}:{line}"
    missing = isinstance(error, ModuleNotFoundError)
    way = "; install it into the environment of the daemon" if missing else "; mend it"
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    return Halt("transform", f"module {module} cannot be imported: {type(error).__name__}: {said} ({where}){way}")


def _function(module: ModuleType, name: str) -> Callable[..., Any]:
    """Return a function of a module that takes one argument; raises Halt."""
    function = getattr(module, name, None)
    if function is None:
        own = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        near = difflib.get_close_matches(name, own, n=1)
        way = f"did you mean {near[0]}?" if near else f"its functions: {', '.join(own) or 'none'}"
        raise Halt("transform", f"module {module.__name__} has no function {name}; {way}")
    what = f"{name} of module {module.__name__}"
    if not callable(function):
        raise Halt("transform", f"{what} is no function")
    if inspect.iscoroutinefunction(function):
        raise Halt("transform", f"{what} is `async`, and nothing awaits it: write it with `def` alone")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise Halt("transform", f"{what} yields: return a list of records")
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        given = "records" if name.endswith("_batch") else "record"
        raise Halt("transform", f"{what} must take one argument: def {name}({given})") from error
    except ValueError:  # of a function that is not Python's
        pass
    return function  # type: ignore[no-any-return]


def _places(error: BaseException) -> list[tuple[Path, int]]:
    """Return file and line of each frame that an exception went through, the innermost last."""
    return [(Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_tb(error.__traceback__)]


def _shown(file: Path, folder: Path) -> str:
    return str(file.relative_to(folder) if file.is_relative_to(folder) else file)


def _class_of(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")


def _words(error: BaseException) -> str | None:
    """Return an exception's own text, which may be of any kind; nothing where it has none."""
    with suppress(Exception):
        return str(error).encode("utf-8", "replace").decode()[:SENTENCE] or None
    return None


def _sentence(error: Exception) -> str:
    """Return a user's own sentence as headers and logs can have it."""
    return str(error).encode("utf-8", "replace").decode()[:SENTENCE] or f"{type(error).__name__} without a sentence"
