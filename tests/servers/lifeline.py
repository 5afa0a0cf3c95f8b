"""Run a command that cannot outlive the process which started it: ``lifeline.py PARENT SIGNAL USER COMMAND...``.

Linux's PR_SET_PDEATHSIG has the kernel send SIGNAL when the parent is gone, however it went: a killed pytest leaves no
server behind. It is set in this small program, which then becomes the command by exec (the process id stays), because
Python code between fork and exec is not safe in a process where librdkafka's threads run. The kernel forgets the
setting when the user changes, so the user (``-`` for the same) is taken on first.
"""

import ctypes
import os
import pwd
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(parent: int, signal_number: int, user: str, command: list[str]) -> None:
    """Become ``command``."""
    if user != "-":
        entry = pwd.getpwnam(user)
        os.initgroups(user, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the kernel was asked to watch it
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
