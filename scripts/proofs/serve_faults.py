"""Everything that can go wrong with a server, brought about on a real one; prints what was observed as a table.

    python scripts/proofs/serve_faults.py bundles/smollm2-135m

Starts ``echo-trt serve BUNDLE`` on free ports of this machine, about ten times, and asks nothing of any other machine.
At full size (--scale 1) about 10 minutes on 2 cores. Texts are compared with those of the server at rest: all of them
must be the same for a bundle in fp32; for others the table says how many were. Exit code 1 if something is not as it
must be. Needs pip install -e '.[test]'.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins"), str(ROOT / "scripts" / "proofs"), str(ROOT / "tests" / "serving")]

from serve_faults_parts import clients, crowds, deaths, grammars, nonsense  # noqa: E402
from serve_faults_parts.stage import Failed, Row, Stage  # noqa: E402

FAULTS: dict[str, Callable[[Stage], Row]] = {
    "departures": clients.departures,
    "nonsense": nonsense.nonsense,
    "malformed": nonsense.malformed,
    "slow": clients.slow_readers,
    "deadline": crowds.deadlines,
    "queue": crowds.full_queue,
    "pool": crowds.full_pool,
    "grammars": grammars.hostile_grammars,
    "compiling": grammars.gone_while_compiling,
    "tools": grammars.fuzzed_tools,
    "mixed": grammars.mixed_batches,
    "backend": deaths.backend_killed,
    "gateway": deaths.gateway_killed,
    "server": deaths.server_killed,
    "nested": deaths.nested_json,
    "launcher": deaths.launcher_killed,
    "sigterm": deaths.drained,
}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path)
    options.add_argument("--scale", type=float, default=1.0, help="of counts; 1 is the full size")
    options.add_argument("--only", default=",".join(FAULTS), help="faults, by commas, in the order given")
    options.add_argument("--logs", type=Path, help="folder for the servers' logs")
    asked = options.parse_args()
    names = asked.only.split(",")
    unknown = [name for name in names if name not in FAULTS]
    if unknown:
        options.error(f"--only names {unknown[0]!r}; choose from {', '.join(FAULTS)}")
    with tempfile.TemporaryDirectory(prefix="echo-trt-faults-") as folder:
        logs = asked.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        return 1 if run(asked.bundle, logs, asked.scale, names) else 0


def run(bundle: Path, logs: Path, scale: float, names: list[str]) -> list[str]:
    """Prints the table as it grows; returns the names of what failed."""
    failed = []
    print("| fault | observed | lost | s |\n|---|---|---|---|", flush=True)
    with Stage(bundle, logs, scale) as stage:
        for name in names:
            begin = time.monotonic()
            stage.next_fault()
            try:
                row = FAULTS[name](stage)
            except (Failed, AssertionError, OSError) as error:
                row = Row(name, f"**FAILED**: {str(error)[-2000:]}", "")
                failed.append(name)
                stage.start()
            print(f"| {row.tried} | {row.observed} | {row.lost} | {time.monotonic() - begin:.0f} |", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
