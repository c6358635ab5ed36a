"""Does a server do what its /openapi.json says? Schemathesis draws requests from it, valid ones and others.

    echo-trt serve bundles/smollm2-135m
    python scripts/proofs/schema.py

No request may end in a server's error, no answer or event of a stream may differ from its schema, and no body that the
schema rules out may be answered. Answers are short (``schema_parts/hooks.py``), and /live is left out, since its stream
does not end. Needs the command schemathesis, of any environment (pipx install schemathesis==4.32.5), and is skipped
without it. The exit code is Schemathesis's: 1 where something was found. It names the seed, which repeats a run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

TIMEOUT_S = 60  # of an answer; larger: a server that hangs is noticed later
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:9000", help="of the server")
    parser.add_argument("--examples", type=int, default=25, help="requests that are drawn for each operation")
    parser.add_argument("--seed", type=int, help="of an earlier run")
    args = parser.parse_args()
    if not (command := shutil.which("schemathesis")):
        print("Skipped: there is no command schemathesis; pipx install schemathesis==4.32.5 brings it.")
        return
    words = [command, "run", f"{args.url}/openapi.json", "--exclude-path", "/live", "--checks", ",".join(CHECKS)]
    words += ["--max-examples", str(args.examples), "--generation-database", "none", "--continue-on-failure"]
    words += ["--request-timeout", str(TIMEOUT_S)]
    words += [] if args.seed is None else ["--seed", str(args.seed)]
    hooks = {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(Path(__file__).with_name("schema_parts"))}
    sys.exit(subprocess.run(words, env=os.environ | hooks).returncode)


if __name__ == "__main__":
    main()
