"""The command, quiet about Ctrl-C even while it is still importing: ``echo-trt``, or ``python -m echo_trt``."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from echo_trt.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
