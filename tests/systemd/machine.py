"""A machine with a real systemd: a Debian tree, booted as a container that shares this machine's network.

Tree and wheels are made once, in the cache folder; each machine is an overlay on the tree, so it starts as if it were
just installed. It reaches no package index: pip finds the wheels in a folder, as its configuration says there.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.servers.daemon import REPOSITORY
from tests.servers.process import Process

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "consumerd"
SUITE, PYTHON = "bookworm", "3.11"
PACKAGES = "systemd,systemd-sysv,dbus,python3,python3-venv"
BOOT_TIMEOUT = 60  # seconds: it takes 3
COMMAND_TIMEOUT = 300  # seconds: pip takes longest, 10 on an idle machine
FETCH_TIMEOUT = 900  # seconds for the tree, once: it takes 90
PTRACE_SEIZE, PTRACE_INTERRUPT, WALL = 0x4206, 0x4207, 0x40000000  # linux/ptrace.h, linux/wait.h


class Machine:
    """One booted tree; `root` is where its files are."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self._folder = folder
        self._process: Process | None = None
        self._init = 0
        """Its first process, as this machine numbers it: the child of systemd-nspawn that is number 1 in there."""

    def boot(self) -> None:
        """Boot, and return when systemd has started all."""
        parts = {name: self._folder / name for name in ("root", "upper", "work")}
        for part in parts.values():
            part.mkdir(parents=True)
        layers = f"lowerdir={tree()},upperdir={parts['upper']},workdir={parts['work']}"
        _run(["mount", "-t", "overlay", "overlay", "-o", layers, str(self.root)])
        (self.root / "etc" / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")
        command = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--hostname=warehouse", "--boot"]
        command += [f"--directory={self.root}", f"--bind-ro={wheels()}:/wheels"]
        self._process = Process(command, self._folder / "boot.log")
        self._process.wait_ready(self._is_up, BOOT_TIMEOUT, "systemd")

    def _is_up(self) -> bool:
        """Whether all has started; a timer of Debian's own may have failed, which is nobody's business here."""
        assert self._process is not None
        for child in Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split():
            if _numbers(Path(f"/proc/{child}/status"))[-1:] == ["1"]:
                self._init = int(child)
                return self.sh("systemctl is-system-running --wait", check=False).strip() in {"running", "degraded"}
        return False

    def sh(self, script: str, *, check: bool = True) -> str:
        """Run a script in it, in the folder of the release, until it fails; return what it printed."""
        lines = f"set -euo pipefail\ncd /root/release 2> /dev/null || cd /\n{script}"
        environment = [
            "env",
            "-i",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
            "LANG=C.UTF-8",
            "HOME=/root",
        ]
        command = ["nsenter", f"--target={self._init}", "--all", "--", *environment, "bash", "-c", lines]
        try:
            return _run(command, check=check)
        except RuntimeError as error:
            journal = _run([*command[:-1], "journalctl --lines=40 --no-pager"], check=False)
            raise RuntimeError(f"{error}\n{journal}") from None

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.sh(f"systemctl show --property={name} --value {unit}").strip()

    def pid(self, unit: str) -> int:
        """Return a unit's main process, as this machine numbers it."""
        inner = self.show(unit, "MainPID")
        space = Path(f"/proc/{self._init}/ns/pid").readlink()
        for status in Path("/proc").glob("[0-9]*/status"):
            with suppress(OSError):
                numbers = _numbers(status)
                if numbers[-1:] == [inner] and status.with_name("ns").joinpath("pid").readlink() == space:
                    return int(numbers[0])
        raise ProcessLookupError(f"{unit}: {inner}")

    def close(self) -> None:
        """End it and all that runs in it, and remove its files."""
        if self._process is not None:
            self._process.kill()
        _run(["umount", "--lazy", str(self.root)], check=False)
        shutil.rmtree(self._folder, ignore_errors=True)


def hang(process: int, chosen: Callable[[Path], bool]) -> None:
    """Stop the chosen threads of a process, and no other, for the rest of its life: as a debugger would.

    A process can only be buried when all its threads are, and the kernel leaves a stopped one to whoever stopped it.
    """
    threads = [int(each.name) for each in Path(f"/proc/{process}/task").iterdir() if chosen(each)]
    stopped = threading.Barrier(2)

    def hold() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        for thread in threads:
            for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
                if libc.ptrace(request, thread, None, None) != 0:
                    raise OSError(ctypes.get_errno(), "ptrace")
            os.waitpid(thread, WALL)
        stopped.wait()
        for thread in threads:
            with suppress(ChildProcessError):
                os.waitpid(thread, WALL)

    threading.Thread(target=hold, name="debugger", daemon=True).start()
    stopped.wait(COMMAND_TIMEOUT)


def _numbers(status: Path) -> list[str]:
    """Return a process's numbers, on this machine first."""
    try:
        return status.read_text(encoding="ascii").partition("NSpid:")[2].partition("\n")[0].split()
    except OSError:
        return []


def missing() -> str | None:
    """Say what a machine needs and this one lacks."""
    if os.geteuid() != 0:
        return "A systemd can be booted by root alone."
    for program, package in (("debootstrap", "debootstrap"), ("systemd-nspawn", "systemd-container")):
        if shutil.which(program) is None:
            return f"To boot a systemd {program} is needed: apt-get install {package}"
    return None


@functools.cache
def tree() -> Path:
    """Return a Debian, made at the first call on this machine, from where its own packages come."""
    made = CACHE / f"debian-{SUITE}"
    wanted = ["apt-get", "indextargets", "--format", "$(CODENAME) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"]
    targets = [line.split() for line in _run(wanted, check=False).splitlines()]
    mirror = [uri for codename, component, uri in targets if (codename, component) == (SUITE, "main")][:1]
    return _once(
        made, lambda to: ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(to), *mirror]
    )


@functools.cache
def wheels() -> Path:
    """Return a folder with what requirements.txt names."""
    requirements = REPOSITORY / "requirements.txt"
    made = CACHE / f"wheels-{hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]}"
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    download += [
        "--only-binary=:all:",
        f"--python-version={PYTHON}",
        "--require-hashes",
        f"--requirement={requirements}",
    ]
    return _once(made, lambda to: [*download, f"--dest={to}"])


def _once(folder: Path, command: Callable[[Path], list[str]]) -> Path:
    """Have a command fill a folder, whole or not at all."""
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="making-") as temporary:
            made = Path(temporary) / "made"
            _run(command(made), FETCH_TIMEOUT)
            made.rename(folder)
    return folder


def _run(command: list[str], timeout: float = COMMAND_TIMEOUT, *, check: bool = True) -> str:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
    )
    if check and done.returncode != 0:
        raise RuntimeError(f"{command[-1]}\nended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout
