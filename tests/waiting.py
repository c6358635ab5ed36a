"""What a test waits for, on a machine that may be busy."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE = 180  # seconds for what takes a moment on a quiet machine


def wait_until(fits: Callable[[], Any], seconds: float = PATIENCE, reported: Callable[[], object] = lambda: "") -> Any:
    """Return the first true value of ``fits``; a test fails with ``reported()`` where it takes longer than
    ``seconds``.
    """
    end = time.monotonic() + seconds
    while not (found := fits()):
        assert time.monotonic() < end, reported()
        time.sleep(0.02)
    return found


def listens(path: Path) -> bool:
    """Say whether a server answers at a socket; its file is there a moment earlier, when nobody is let in yet."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0
