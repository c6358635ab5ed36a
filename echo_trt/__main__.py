"""The command, quiet about Ctrl-C even while it is still importing: ``echo-trt``, or ``python -m echo_trt``.

SIGTERM and a terminal that is closed end it in the same way, so that a build leaves nothing half-made either.
"""

from __future__ import annotations

import signal
import sys

from echo_trt.supervision.stopping import stop_signals


def main() -> None:
    for number in stop_signals():
        signal.signal(number, _stop)
    try:
        from echo_trt.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


def _stop(number: int, _: object) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
