"""The command `consumerd`, and `python -m consumerd`.

A signal that comes while `run` is still imported, which takes a second or two, ends it as a stop does: status 0. There
is nothing to drain yet. From then on the daemon catches signals itself.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] == ["run"]:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _leave)
    from consumerd.cli import app  # noqa: PLC0415 - what takes so long

    app()


def _leave(*_: object) -> None:
    os._exit(0)


if __name__ == "__main__":
    main()
