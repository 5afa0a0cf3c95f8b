"""Where the pages cannot be served, one sentence says why."""

import pytest

from consumerd.errors import ConsumerdError
from consumerd.http import HttpServer


async def test_an_address_that_is_not_this_hosts() -> None:
    """An address that cannot be bound is told with the way on; that of a port in use is no way for any other."""
    with pytest.raises(ConsumerdError, match=r"192\.0\.2\.1:0 \(daemon\.listen\): .+; write an address of this host"):
        HttpServer("192.0.2.1", 0, dict)
