"""guidellm, as its users run it: streams with running usage."""

import json
import os
import subprocess
from pathlib import Path

from tried import MODEL, URL, tried


def benchmark() -> str:
    command = [
        *("guidellm", "benchmark", "run", "--target", URL, "--model", MODEL, "--processor", os.environ["TOKENIZER"]),
        *("--profile", "concurrent", "--rate", "4", "--max-requests", "12", "--output-path", "report.json"),
        *("--data", "prompt_tokens=64,output_tokens=32"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stderr[-300:] or done.stdout[-300:])
    totals = json.loads(Path("report.json").read_text())["benchmarks"][0]["metrics"]["request_totals"]
    if not totals["successful"] or totals["errored"]:
        raise RuntimeError(str(totals))
    return f"{totals['successful']} requests, {totals['errored']} errors"


tried("benchmark, concurrent 4", benchmark)
