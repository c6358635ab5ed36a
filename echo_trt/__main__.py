"""The command, quiet about Ctrl-C even while it is still importing: ``echo-trt``, or ``python -m echo_trt``.

SIGTERM ends it in the same way, so that a build that is stopped leaves nothing half-made either.
"""

from __future__ import annotations

import signal
import sys


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        from echo_trt.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
