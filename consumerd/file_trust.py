"""Who else may change the files that say what the daemon does, or read its secrets.

A handler's file says where rows go, its Python runs as the daemon: whoever may write them is the daemon. So a file that
others may write, or replace because a folder above it is open to everybody, is refused, with the line that mends it.

Root's group, the groups of this process, and a group that has its owner's number (a user's own group, with which a
umask of 002 writes 0664) are nobody else: a ConfigMap with `fsGroup` and a checkout that is mounted into a container
stay as they are. So does whatever is mounted read-only: nobody here writes it, and its modes are those of another
machine (a ConfigMap's own folder is 0777). The owner is not looked at: for a mount it is any number.

A secret that others may read is refused as ssh refuses a key: only when the file is our own. One of root's, say 0640
for the daemon's group or a Secret of Kubernetes, is as whoever administers the machine wants it. Unlike ssh, nothing is
said of a file that is out of others' reach, in a folder that they may not enter.
"""

from __future__ import annotations

import os
import shlex
import stat
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def writable(path: Path) -> str | None:
    """Say that others may change a file or folder, and what to type; None where they may not, or it is not there."""
    try:
        status, real = path.stat(), path.resolve()
        if _read_only(path):
            return None
        folders = {each: each.stat() for each in _above(path.absolute(), real)}
    except OSError:
        return None  # whoever reads it says so
    if status.st_mode & stat.S_IWOTH:
        return f"may be changed by everybody: type chmod o-w {shlex.quote(str(real))}"
    if status.st_mode & stat.S_IWGRP and _foreign(status):
        return f"may be changed by group {status.st_gid}: type chmod g-w {shlex.quote(str(real))}"
    for folder, seen in folders.items():
        if seen.st_mode & stat.S_IWOTH and not seen.st_mode & stat.S_ISVTX:
            return f"may be replaced by everybody: type chmod o-w {shlex.quote(str(folder))}"
    return None


def readable(path: Path) -> str | None:
    """Say that others may read a file of our own, and what to type."""
    try:
        status = path.stat()
        if status.st_uid != os.geteuid() or not status.st_mode & stat.S_IROTH or _read_only(path):
            return None
        reached = all(each.stat().st_mode & stat.S_IXOTH for each in path.resolve().parents)
    except OSError:
        return None
    return f"may be read by everybody: type chmod o-r {shlex.quote(str(path))}" if reached else None


def _foreign(status: os.stat_result) -> bool:
    return status.st_gid not in {0, status.st_uid, os.getegid(), *os.getgroups()}


def _read_only(path: Path) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def _above(*paths: Path) -> Iterator[Path]:
    """Return the folders in which a link and what it leads to can be replaced, each once, the nearest first."""
    yield from dict.fromkeys(folder for path in paths for folder in path.parents)
