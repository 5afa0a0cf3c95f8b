"""Run a command that cannot outlive the process which started it: `lifeline.py PARENT SIGNAL UID GID COMMAND...`.

Linux's PR_SET_PDEATHSIG has the kernel send SIGNAL when the parent is gone, however it went: a killed demo leaves no
server behind. It is set in this small program, which then becomes the command by exec, because Python code between
fork and exec is not safe in a process where librdkafka's threads run. The kernel forgets the setting when the user
changes, so the user (-1 for the same) is taken on first. On other systems the command is merely started.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""


def main(parent: int, signal_number: int, uid: int, gid: int, *, command: list[str]) -> None:
    """Become the command."""
    if uid >= 0:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel was asked to watch it
        sys.exit(1)
    os.execv(command[0], command)  # noqa: S606 - the demo's own command


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]), command=sys.argv[5:])
