"""What a test waits for, on a machine that may be busy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_until(fits: Callable[[], Any], seconds: float = 180, reported: Callable[[], object] = lambda: "") -> Any:
    """Return the first true value of ``fits``; a test fails with ``reported()`` where it takes longer than
    ``seconds``.
    """
    end = time.monotonic() + seconds
    while not (found := fits()):
        assert time.monotonic() < end, reported()
        time.sleep(0.02)
    return found
