"""Calls of a transform in a thread and in processes: in order, within a deadline, and none lost with its process."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from consumerd import runners
from consumerd.accumulator import Batch
from consumerd.config import HandlerConfig
from consumerd.errors import Halt, Outage, Refusal
from consumerd.packed import Packed
from consumerd.runners import InProcess
from consumerd.transformer import Transformer, _request
from consumerd.types import TopicPartition

T = TypeVar("T")

MODULE = """\
import os, re, signal, time
from consumerd.handler import Retry

def transform(record):
    what = record.get("what")
    if what == "spin":
        while True: pass
    if what == "hold":  # the interpreter's lock, for about an hour
        re.match(r"(a+)+$", "a" * 40 + "b")
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "exit":
        os._exit(3)
    if what == "once":  # its first call ends the process
        if not os.path.exists(record["flag"]):
            open(record["flag"], "w").close()
            os._exit(4)
    if what == "later" and not os.path.exists(record["flag"]):
        raise Retry("not yet")
    if what == "many":
        return [{"n": record["n"], "text": "x" * 1000}] * 10
    with open(LOG, "a") as log:
        log.write(f"{record['n']} {os.getpid()}\\n")
    return {"n": record["n"], "topic": record.topic, "offset": record.offset}

def transform_batch(records):
    return [transform(record) for record in records]
"""


@dataclass
class Fake:
    """A message."""

    body: bytes | None
    at: int

    def __len__(self) -> int:
        return len(self.body or b"")

    def value(self) -> bytes | None:
        """Give the value."""
        return self.body

    def offset(self) -> int:
        """Give the offset."""
        return self.at

    def timestamp(self) -> tuple[int, int]:
        """Give none."""
        return 0, 0

    def key(self) -> bytes:
        """Give one."""
        return b"k"

    def headers(self) -> list[tuple[str, bytes | None]]:
        """Give one."""
        return [("h", None)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a module of transforms; it is forgotten after."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "work", raising=False)
    (tmp_path / "work.py").write_text(f"LOG = {str(tmp_path / 'log')!r}\n{MODULE}")
    return tmp_path


def batch(count: int, **special: object) -> Batch:
    """Make a batch of numbered records; those whose numbers are named have more in them."""
    more = {int(name.removeprefix("at")): value for name, value in special.items()}
    values: list[dict[str, Any]] = [{"n": n} | cast("dict[str, Any]", more.get(n, {})) for n in range(count)]
    messages = [Fake(json.dumps(value).encode(), 100 + n) for n, value in enumerate(values)]
    return Batch(
        partition=TopicPartition("orders", 0),
        first_offset=100,
        next_offset=100 + count,
        messages=cast("Any", messages),
        size=0,
        reason="age",
        gathered_since=0.0,
        packed=[Packed(messages=count)],
    )


def using(
    folder: Path,
    work: Callable[[Transformer], Awaitable[T]],
    *,
    workers: int,
    function: str = "work:transform",
    timeout: float = 1.0,
    most_bytes: int = 1 << 20,
    where: str | None = None,
) -> T:
    """Start a transformer, use it, and close it."""
    handler = HandlerConfig.model_validate(
        {
            "name": "orders",
            "path": folder / "orders.toml",
            "topics": ["orders"],
            "table": {"name": "orders", "write": "append"},
            **({} if where is None else {"where": where}),
            "transform": {"function": function, "workers": workers, "timeout": f"{round(timeout * 1000)}ms"},
        },
        by_name=False,
        by_alias=True,
        context={"folder": folder},
    )

    async def use() -> T:
        transformer = Transformer(handler, most_bytes)
        try:
            await transformer.start()
            return await work(transformer)
        finally:
            await transformer.close()

    return asyncio.run(use())


def numbers(it: Batch) -> list[int | str]:
    """Return what became of each message: its number, or why it was refused."""
    return [
        outcome.error if isinstance(outcome, Refusal) else json.loads((outcome or (b'{"n": null}',))[0])["n"]
        for outcome in it.outcomes
    ]


@pytest.mark.parametrize("function", ["work:transform", "work:transform_batch"])
@pytest.mark.parametrize("workers", [0, 3])
def test_a_batch_keeps_its_order(folder: Path, workers: int, function: str) -> None:
    """What comes back is in the messages' order, however many call; messages without a value are left as they are."""
    it = batch(5_000)
    it.messages[7] = cast("Any", Fake(None, 107))
    using(folder, lambda transformer: transformer.complete(it), workers=workers, function=function)
    assert it.outcomes[7] is None
    expected = [{"n": n, "topic": "orders", "offset": 100 + n} for n in range(5_000) if n != 7]
    assert expected == [json.loads(outcome[0]) for outcome in it.outcomes if isinstance(outcome, tuple)]
    callers = {line.split()[1] for line in (folder / "log").read_text().splitlines()}
    assert (len(callers), str(os.getpid()) in callers) == ((1, True) if workers == 0 else (3, False))


@pytest.mark.parametrize("function", ["work:transform", "work:transform_batch"])
@pytest.mark.parametrize(
    ("what", "error"), [("spin", "TimeoutError"), ("hold", "TimeoutError"), ("crash", "ChildProcessError")]
)
def test_a_record_that_does_not_come_back_is_refused(folder: Path, what: str, error: str, function: str) -> None:
    """A record whose call outlasts the deadline or ends the process, alone too, is poison; all others come through."""
    it = batch(50, at20={"what": what})
    using(folder, lambda transformer: transformer.complete(it), workers=1, function=function)
    assert [n if n != 20 else error for n in range(50)] == numbers(it)
    refused = it.outcomes[20]
    assert isinstance(refused, Refusal)
    assert ("transform", "transform") == (refused.reason, refused.stage)
    assert function in refused.message


@pytest.mark.parametrize("at", [0, 4])
def test_a_record_may_be_lost_once(folder: Path, at: int) -> None:
    """A call that ended its process is made again; a record that comes through then is no poison."""
    it = batch(10, **{f"at{at}": {"what": "once", "flag": str(folder / "flag")}})
    using(folder, lambda transformer: transformer.complete(it), workers=2)
    assert list(range(10)) == numbers(it)


def test_three_in_a_row_are_a_halt(folder: Path) -> None:
    """When records one after another do not come back it is the function: a halt that names the last."""
    it = batch(10, **{f"at{n}": {"what": "exit"} for n in range(10)})
    with pytest.raises(Halt, match=r"ended with exit code 3 for 3 messages one after another.* orders:0 offset 102"):
        using(folder, lambda transformer: transformer.complete(it), workers=1)


def test_records_apart_are_no_halt(folder: Path) -> None:
    """Records that do not come back, with good ones between them, are poison each."""
    it = batch(10, **{f"at{n}": {"what": "exit"} for n in (0, 2, 4, 6)})
    using(folder, lambda transformer: transformer.complete(it), workers=1)
    assert [n if n not in {0, 2, 4, 6} else "ChildProcessError" for n in range(10)] == numbers(it)


def test_a_thread_that_does_not_come_back_is_a_halt(folder: Path) -> None:
    """Nobody can end a thread: the halt names the message, the limit and the way on."""
    it = batch(10, at3={"what": "spin"})
    with pytest.raises(Halt, match=r"did not return within 0\.5 s for orders:0 offset 103.*`timeout`.*`workers`"):
        using(folder, lambda transformer: transformer.complete(it), workers=0, timeout=0.5)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_retry_is_an_outage_and_nothing_is_called_twice(folder: Path, workers: int) -> None:
    """Retry is told with the function and its sentence; the next try begins with the record that wanted it."""
    flag = folder / "flag"
    it = batch(10, at4={"what": "later", "flag": str(flag)})

    async def twice(transformer: Transformer) -> None:
        with pytest.raises(Outage, match="work:transform: not yet") as raised:
            await transformer.complete(it)
        assert ("transform", 4) == (raised.value.source, len(it.outcomes))
        flag.touch()
        await transformer.complete(it)

    using(folder, twice, workers=workers)
    assert list(range(10)) == numbers(it)
    called = [int(line.split()[0]) for line in (folder / "log").read_text().splitlines()]
    assert list(range(10)) == called


@pytest.mark.parametrize("function", ["work:transform", "work:transform_batch"])
@pytest.mark.parametrize("workers", [0, 3])
def test_what_comes_back_is_bounded(folder: Path, workers: int, function: str) -> None:
    """A batch whose records become many is left with its first part transformed, within the bound and a record each."""
    most, record = 5 << 20, 11_000

    async def twice(transformer: Transformer) -> None:
        for least in (0, most - 3 * record):  # how large records become it knows from the first time on
            it = batch(3_000, **{f"at{n}": {"what": "many"} for n in range(3_000)})
            size = await transformer.complete(it)
            assert least < size < most + 3 * record
            assert size // record < len(it.outcomes) < 3_000

    using(folder, twice, workers=workers, function=function, most_bytes=most)


def test_what_came_back_is_not_asked_for_again(folder: Path) -> None:
    """Where the answer to the first part of a batch ends early, those to the others are kept until it is whole."""
    it = batch(300, **{f"at{n}": {"what": "many"} for n in range(100)})
    using(folder, lambda transformer: transformer.complete(it), workers=3, most_bytes=3 << 19)
    assert list(range(300)) == numbers(it)
    called = sorted(int(line.split()[0]) for line in (folder / "log").read_text().splitlines())
    assert list(range(100, 300)) == called


def test_only_what_is_selected_is_transformed(folder: Path) -> None:
    """`where` is about the message: what it does not select is no call, and what it cannot tell is refused."""
    it = batch(6, at1={"n": "text"})
    it.messages[5] = cast("Any", Fake(None, 105))
    using(folder, lambda transformer: transformer.complete(it), workers=0, where="n >= 2 and @offset < 104")
    expected = ["where", "refused", "made", "made", "where", None]
    kinds = {tuple: "made", Refusal: "refused"}
    assert expected == [kinds.get(type(outcome), outcome) for outcome in it.outcomes]
    assert 2 == len((folder / "log").read_text().splitlines())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("function", "words"),
    [("absent:transform", "there is no module absent"), ("work:absent", "has no function absent")],
)
def test_a_mistake_is_told_at_the_start(folder: Path, workers: int, function: str, words: str) -> None:
    """What is wrong with a module is the same sentence from a thread and from a process."""
    with pytest.raises(Halt, match=words):
        using(folder, lambda transformer: transformer.complete(batch(1)), workers=workers, function=function)


def test_an_import_that_ends_the_process_is_told(folder: Path) -> None:
    """A module whose import ends its process is a sentence, and no process is started again and again."""
    (folder / "ends.py").write_text("import os\nos._exit(5)\n")
    with pytest.raises(Halt, match="the import of ends:transform ended its process: ended with exit code 5: a module"):
        using(folder, lambda transformer: transformer.complete(batch(1)), workers=1, function="ends:transform")


def test_a_process_that_is_killed_while_it_imports(folder: Path) -> None:
    """A signal that ends a process at its start is an outage: it is started again, and no call is lost meanwhile."""
    marks = [folder / "first", folder / "second"]
    killed = "import os, pathlib, signal\nfrom work import transform\nfor mark in {}:\n    if not mark.exists():\n"
    killed += "        mark.touch()\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    killed = killed.format([f"pathlib.Path({str(mark)!r})" for mark in marks]).replace('"', "")
    (folder / "killed.py").write_text(killed)

    async def tried(transformer: Transformer) -> list[int | str]:
        runner = transformer._runners[0]
        assert isinstance(runner, InProcess)
        await runner._end()
        marks[1].unlink()
        it = batch(3)
        with pytest.raises(Outage, match="killed:transform was killed by SIGKILL; it is started again"):
            await transformer.complete(it)
        await transformer.complete(it)
        return numbers(it)

    words = "the worker process that was to import killed:transform was killed by SIGKILL; it is started again"
    for _ in marks:
        with pytest.raises(Outage, match=words) as raised:
            using(folder, tried, workers=2, function="killed:transform")
        assert raised.value.source == "transform"
    assert [0, 1, 2] == using(folder, tried, workers=2, function="killed:transform")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_long_import_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    """An import that takes a while is a line in the log that names the function, and then goes on."""
    monkeypatch.setattr("consumerd.runners.START_VISIBLE_AFTER", 0.1)
    monkeypatch.delitem(sys.modules, "late", raising=False)
    (folder / "late.py").write_text("import time\ntime.sleep(1)\nfrom work import transform\n")
    it = batch(1)
    using(folder, lambda transformer: transformer.complete(it), workers=workers, function="late:transform")
    assert [0] == numbers(it)
    (told,) = [record for record in caplog.records if record.name == "consumerd.runners"]
    assert ("late:transform", 60.0) == (vars(told)["function"], vars(told)["seconds_at_most"])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_import_that_never_ends_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """A module whose import takes too long is a sentence at the start."""
    monkeypatch.setattr("consumerd.runners.START_TIMEOUT", 1.0)
    (folder / "slow.py").write_text("import time\ntime.sleep(3600)\n")
    with pytest.raises(Halt, match="the import of module slow takes longer than 1 s"):
        using(folder, lambda transformer: transformer.complete(batch(1)), workers=workers, function="slow:transform")


def test_a_cancelled_call_is_nobodys_answer(folder: Path) -> None:
    """What a call that was given up answers is not taken for the next one's."""

    async def give_up(runner: InProcess) -> list[int | str]:
        await runner.start()
        endless = batch(1, at0={"what": "spin"})
        request = _request(endless.partition, endless.messages, {}, 1 << 20)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(runner.answer(request), 0.3)
        it = batch(2)
        it.outcomes += (await runner.answer(_request(it.partition, it.messages, {}, 1 << 20))).outcomes
        await runner.close()
        return numbers(it)

    assert [0, 1] == asyncio.run(give_up(InProcess("work:transform", folder, 60.0)))


def test_a_worker_outlives_the_signals_of_a_stop(folder: Path) -> None:
    """Ctrl-C and systemd's SIGTERM reach the daemon's processes too: they go on, for the daemon needs them to drain."""

    async def signalled(runner: InProcess) -> list[int | str]:
        await runner.start()
        assert runner._process is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            runner._process.send_signal(number)
        it = batch(2)
        it.outcomes += (await runner.answer(_request(it.partition, it.messages, {}, 1 << 20))).outcomes
        await runner.close()
        return numbers(it)

    assert [0, 1] == asyncio.run(signalled(InProcess("work:transform", folder, 60.0)))


HALF = """
import asyncio, time

def half_batch(records):
    if records[0]["n"] == 0:
        return []
    time.sleep(3)
    return records

def cancelled(record):
    raise asyncio.CancelledError("secret")
"""


def test_a_halt_leaves_no_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another worker is at when a call halts the handler ends with it, and no process is started for it again."""
    (folder / "half.py").write_text(HALF)
    spawned, spawn = [], runners._spawn

    def seen(*numbers: int) -> subprocess.Popen[bytes]:
        spawned.append(spawn(*numbers))
        return spawned[-1]

    monkeypatch.setattr(runners, "_spawn", seen)

    async def halted(transformer: Transformer) -> list[asyncio.Task[Any]]:
        with pytest.raises(Halt, match="0 entries for 5 records"):
            await transformer.complete(batch(10))
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    assert using(folder, halted, workers=2, function="half:half_batch", timeout=20) == []
    assert len(spawned) == 2
    assert all(process.poll() is not None for process in spawned)


@pytest.mark.parametrize("workers", [0, 1])
def test_whatever_is_raised_is_about_the_record(folder: Path, workers: int, capfd: pytest.CaptureFixture[str]) -> None:
    """What asyncio takes for the end of a task ends none of ours, nor a process, and its text is told nowhere."""
    (folder / "half.py").write_text(HALF)
    sys.modules.pop("half", None)
    it = batch(2)
    using(folder, lambda transformer: transformer.complete(it), workers=workers, function="half:cancelled")
    assert numbers(it) == ["asyncio.exceptions.CancelledError"] * 2
    assert "secret" not in "".join(capfd.readouterr())


def test_a_disk_that_is_read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers need no file: a container's root may be read-only (deploy/kubernetes.yaml)."""
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    it = batch(3)
    using(folder, lambda transformer: transformer.complete(it), workers=1)
    assert numbers(it) == [0, 1, 2]


def test_no_process_can_be_started(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine has no process left to replace a lost one, that is an outage, and no defect of ours."""
    spawn = runners._spawn
    it = batch(3, at1={"what": "once", "flag": str(folder / "flag")})

    async def work(transformer: Transformer) -> None:
        def refused(*_: int) -> subprocess.Popen[bytes]:
            raise BlockingIOError(11, "Resource temporarily unavailable")

        monkeypatch.setattr(runners, "_spawn", refused)
        with pytest.raises(Outage, match="no worker process can be started: Resource temporarily unavailable"):
            await transformer.complete(it)
        monkeypatch.setattr(runners, "_spawn", spawn)
        await transformer.complete(it)

    using(folder, work, workers=1)
    assert numbers(it) == [0, 1, 2]
