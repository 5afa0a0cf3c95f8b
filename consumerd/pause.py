"""A pause: the handler stays in its group, and reads and writes nothing until it is resumed.

What is gathered is written first, as far as a few seconds go; what is left then is dropped, and read again from the
checkpoint when the handler is resumed. So a paused handler holds no lock and no memory, however long the pause, and its
partitions are claimed anew at the end of it. It survives a rebalance: what is assigned meanwhile is not claimed.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from consumerd.member import Member

TIMEOUT = 5.0
"""Seconds for what is gathered and in flight; half of them to begin with it, as at a revoke."""


class Pause:
    """Whether a member is paused."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self.on = False

    async def begin(self) -> bool:
        """Stop reading and writing; False if some of what was gathered is read again when it goes on."""
        self.on = True
        self._member.progress.pause()
        return await self._member.lay_down(time.monotonic() + TIMEOUT)

    def end(self) -> None:
        """Go on from the checkpoints."""
        self.on = False
        self._member.progress.resume()
        self._member.take_up()
