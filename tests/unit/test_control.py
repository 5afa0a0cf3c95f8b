"""The control socket: who may be there, what is answered, and what a client can do to it."""

import asyncio
import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from consumerd import control
from consumerd.commands.control import NotReachedError, ask
from consumerd.config import DaemonConfig
from consumerd.control import LONGEST_LINE, MOST_CLIENTS, Answer, Control, NoSocketError, Request
from consumerd.errors import ConfigError, ConsumerdError

CONFIG = Path("/etc/consumerd/consumerd.toml")


async def echo(request: Request) -> Answer:
    """Answer with the handler's name; fail as it says."""
    if request.handler == "wrong":
        raise ConfigError("orders.toml:3: wrong", "orders.toml:4: wrong too")
    if request.handler == "unknown":
        raise ConsumerdError("there is no handler unknown")
    if request.handler == "defect":
        raise ZeroDivisionError("secret")
    return Answer(ok=True, message=f"{request.command} {request.handler}")


@pytest.fixture
async def path(tmp_path: Path) -> AsyncIterator[Path]:
    """Serve at a socket."""
    serving = Control(tmp_path / "s", CONFIG, echo)
    await serving.open()
    yield tmp_path / "s"
    await serving.close()


def request(handler: str = "orders", config: str = str(CONFIG)) -> Request:
    """Make a request."""
    return Request(command="pause", config=config, handler=handler)


async def test_a_socket_is_made_replaced_and_removed(tmp_path: Path) -> None:
    """`daemon.control`: mode 0660; that of a dead daemon is replaced; a live one's and a file are a sentence."""
    place = tmp_path / "s"
    config = DaemonConfig.model_validate({"control": "s"}, by_alias=True, context={"folder": tmp_path})
    assert config.control == place
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place))
    first, second = Control(place, CONFIG, echo), Control(place, CONFIG, echo)
    await first.open()
    assert stat.S_IMODE(place.stat().st_mode) == 0o660
    with pytest.raises(NoSocketError, match=f"another daemon listens at {place}"):
        await second.open()
    assert (await asyncio.to_thread(ask, place, request())).message == "pause orders"
    await first.close()
    assert not place.exists()
    place.touch()
    with pytest.raises(NoSocketError, match="is no socket"):
        await second.open()
    assert place.exists()


async def test_another_daemons_socket_is_left(tmp_path: Path) -> None:
    """A stop removes the socket that this daemon made, and not one that was made in its place."""
    place = tmp_path / "s"
    first, second = Control(place, CONFIG, echo), Control(place, CONFIG, echo)
    await first.open()
    place.unlink()
    await second.open()
    await first.close()
    assert (await asyncio.to_thread(ask, place, request())).ok
    await second.close()


async def test_a_folder_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    """So is a path that is longer than a socket's may be; both name the key."""
    for place in (tmp_path / "none" / "s", tmp_path / ("s" * 120)):
        with pytest.raises(NoSocketError, match=r"no control socket at .* \(daemon.control\): .+; without it pause"):
            await Control(place, CONFIG, echo).open()


async def test_errors_are_answers(path: Path) -> None:
    """What a command raises is an answer with its exit status; a defect tells its class, and no text."""
    answers = [await asyncio.to_thread(ask, path, request(name)) for name in ("wrong", "unknown", "defect")]
    assert [(answer.ok, answer.code) for answer in answers] == [(False, 78), (False, 1), (False, 1)]
    assert answers[0].message == "orders.toml:3: wrong\norders.toml:4: wrong too"
    assert "ZeroDivisionError" in answers[2].message
    assert "secret" not in answers[2].message


async def test_a_client_of_another_daemon_is_refused(path: Path) -> None:
    """Two daemons that were given one path: a command for the one does nothing to the other."""
    answer = await asyncio.to_thread(ask, path, request(config="/etc/other.toml"))
    assert not answer.ok
    assert f"runs {CONFIG}, not /etc/other.toml" in answer.message


async def say(path: Path, text: bytes) -> dict[str, Any]:
    """Send bytes and return the answer."""
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(text)
    answer: dict[str, Any] = json.loads(await reader.readline())
    writer.close()
    return answer


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"not json\n", "not a request"),
        (b'{"command": "drop", "config": ""}\n', "not a request"),
        (b'{"command": "pause", "config": "", "handlers": "a"}\n', "not a request"),
        (b"x" * (LONGEST_LINE + 1), "a line of at most"),
    ],
)
async def test_what_is_no_request_is_refused(path: Path, text: bytes, said: str) -> None:
    """Neither nonsense nor a line without an end does any harm."""
    assert said in (await say(path, text))["message"]
    assert (await asyncio.to_thread(ask, path, request())).ok


async def test_slow_clients_are_left(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends nothing is hung up on; more than there may be are told so."""
    monkeypatch.setattr(control, "CLIENT_TIMEOUT", 0.5)
    silent = [await asyncio.open_unix_connection(path) for _ in range(MOST_CLIENTS)]
    await asyncio.sleep(0.05)
    assert "connections" in (await say(path, b"{}\n"))["message"]
    assert [await reader.read() for reader, _ in silent] == [b""] * MOST_CLIENTS
    for _, writer in silent:
        writer.close()
    assert (await asyncio.to_thread(ask, path, request())).ok


async def test_several_requests_of_one_client(path: Path) -> None:
    """One line, one answer, as often as the client likes."""
    reader, writer = await asyncio.open_unix_connection(path)
    for name in ("a", "b"):
        writer.write(json.dumps({"command": "pause", "config": str(CONFIG), "handler": name}).encode() + b"\n")
        assert json.loads(await reader.readline()) == {"ok": True, "message": f"pause {name}"}
    writer.close()


def test_no_daemon_is_one_sentence(tmp_path: Path) -> None:
    """Where nobody listens it is said how to start it; where this user may not, who may."""
    with pytest.raises(NotReachedError, match=rf"no daemon listens at {tmp_path}/s .*: consumerd run -c {CONFIG}"):
        ask(tmp_path / "s", request())
    if os.geteuid() == 0:
        return
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "s"))
        (tmp_path / "s").chmod(0)
        with pytest.raises(NotReachedError, match="may not use"):
            ask(tmp_path / "s", request())
