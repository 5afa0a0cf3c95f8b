"""Files that others may change, or secrets that others may read, are refused with the line that mends them."""

import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from consumerd import file_trust
from consumerd.credentials import Secret
from consumerd.errors import ConfigError, Halt
from consumerd.loader import load
from consumerd.transform import load as load_transform

ANOTHER = 54321
"""A group that is neither root's nor this process's."""
DAEMON = '[kafka]\nbootstrap_servers = "localhost:9092"\n[postgres]\ndsn = "host=db"\n'
HANDLER = 'topics = ["orders"]\n[table]\nname = "orders"\nwrite = "append"\n'

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="Only root gives a file to a group that is not its own.")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Make a folder that others may enter; pytest's own they may not."""
    with tempfile.TemporaryDirectory(prefix="consumerd-trust-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


def made(path: Path, mode: int = 0o644, content: str = "secret") -> Path:
    """Write a file of this mode."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    path.chmod(mode)
    return path


def follow(sentence: str | None) -> None:
    """Type what a sentence tells."""
    assert sentence is not None
    subprocess.run(shlex.split(sentence.partition("type ")[2]), check=True)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o664, 0o660])
def test_own_and_group_files_are_fine(folder: Path, mode: int) -> None:
    """Files of our own group may be written by it: that is what a umask of 002 makes."""
    assert file_trust.writable(made(folder / "it", mode)) is None


@pytest.mark.parametrize("mode", [0o666, 0o602, 0o777])
def test_a_file_that_everybody_may_change(folder: Path, mode: int) -> None:
    """It is refused; the line that is told mends it."""
    path = made(folder / "it's a file", mode)
    sentence = file_trust.writable(path)
    assert sentence == f"""may be changed by everybody: type chmod o-w '{folder}/it'"'"'s a file'"""
    follow(sentence)
    assert file_trust.writable(path) is None


@as_root
def test_a_file_that_another_group_may_change(folder: Path) -> None:
    """It is refused unless the group has its owner's number, as a user's own group has."""
    path = made(folder / "it", 0o664)
    os.chown(path, 0, ANOTHER)
    sentence = file_trust.writable(path)
    assert sentence == f"may be changed by group {ANOTHER}: type chmod g-w {path}"
    os.chown(path, ANOTHER, ANOTHER)
    assert file_trust.writable(path) is None
    os.chown(path, 0, ANOTHER)
    follow(sentence)
    assert file_trust.writable(path) is None


@pytest.mark.parametrize("above", ["a", "."])
def test_a_folder_in_which_everybody_may_replace_it(folder: Path, above: str) -> None:
    """A folder above that everybody may write is refused, however far above; with the sticky bit it is not."""
    path = made(folder / "a" / "it")
    open_one = (folder / above).resolve()
    open_one.chmod(0o777)
    sentence = file_trust.writable(path)
    assert sentence == f"may be replaced by everybody: type chmod o-w {open_one}"
    open_one.chmod(0o1777)
    assert file_trust.writable(path) is None
    open_one.chmod(0o777)
    follow(sentence)
    assert file_trust.writable(path) is None


def test_links_are_followed(folder: Path) -> None:
    """What counts is the file that a link leads to, and the folders of both: a ConfigMap's keys are links."""
    data = made(folder / "..2026_11_24" / "orders.toml").parent
    (folder / "..data").symlink_to(data.name)
    link = folder / "orders.toml"
    link.symlink_to("..data/orders.toml")
    assert file_trust.writable(link) is None
    data.chmod(0o777)
    assert file_trust.writable(link) == f"may be replaced by everybody: type chmod o-w {data}"
    data.chmod(0o755)
    made(data / "orders.toml", 0o666)
    assert file_trust.writable(link) == f"may be changed by everybody: type chmod o-w {data}/orders.toml"


def test_what_is_mounted_read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modes of a read-only mount are another machine's: a ConfigMap's folder is 0777, a Secret's files 0644."""
    path = made(folder / "it", 0o666)
    folder.chmod(0o777)
    assert file_trust.writable(path) is not None
    assert file_trust.readable(path) is not None
    real = os.statvfs(path)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*real[:8], real.f_flag | os.ST_RDONLY, real[9])))
    assert file_trust.writable(path) is None
    assert file_trust.readable(path) is None


def test_a_secret_that_everybody_may_read(folder: Path) -> None:
    """A file of our own that others may read is refused, as ssh does, unless it is out of their reach."""
    path = made(folder / "pw")
    with pytest.raises(ConfigError) as caught:
        Secret(file=path).read()
    assert str(caught.value).endswith(f"{path} may be read by everybody: type chmod o-r {path}")
    folder.chmod(0o750)
    assert Secret(file=path).read() == "secret"
    folder.chmod(0o755)
    follow(str(caught.value))
    assert Secret(file=path).read() == "secret"


@as_root
def test_a_secret_of_another_owner(folder: Path) -> None:
    """Who may read another's file is that one's to say, as for ssh."""
    path = made(folder / "pw")
    os.chown(path, ANOTHER, ANOTHER)
    assert Secret(file=path).read() == "secret"


def test_a_secret_that_everybody_may_change(folder: Path) -> None:
    """It is refused with the line to type, and never told."""
    path = made(folder / "pw", 0o602)
    with pytest.raises(ConfigError) as caught:
        Secret(credential="pw").read(environ={}, folder=folder)
    assert str(caught.value) == (
        f"secret {{ credential = pw }}: {path} may be changed by everybody: type chmod o-w {path}"
    )


def test_the_files_of_the_config(folder: Path) -> None:
    """The daemon's file and each handler's are refused before they are read as TOML, all of them at once."""
    main = made(folder / "consumerd.toml", 0o666, DAEMON)
    orders = made(folder / "handlers" / "orders.toml", 0o666, HANDLER)
    made(folder / "handlers" / "clicks.toml", 0o644, HANDLER)
    with pytest.raises(ConfigError) as caught:
        load(main, environ={})
    told = [problem.partition(": ")[2] for problem in caught.value.problems]  # whose path is shown from here
    assert [f"may be changed by everybody: type chmod o-w {path}" for path in (main, orders)] == told
    for path in (main, orders):
        path.chmod(0o664)
    assert ["clicks", "orders"] == [handler.name for handler in load(main, environ={}).handlers]


@pytest.mark.parametrize("name", ["own_trust.py", "beside_trust.py", "__pycache__"])
def test_python_is_not_run(folder: Path, name: str) -> None:
    """A module, what lies beside it and may be imported, and what was compiled of it, are refused before they run."""
    made(folder / "own_trust.py", 0o644, f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\n")
    made(folder / "beside_trust.py")
    (folder / "__pycache__").mkdir()
    (folder / name).chmod(0o777)
    with pytest.raises(Halt, match=f"{name} may be changed by everybody: type chmod o-w {folder / name}"):
        load_transform("own_trust:transform", folder)
    assert not (folder / "ran").exists()
