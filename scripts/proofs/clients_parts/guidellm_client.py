"""guidellm, as its users run it: streams with running usage."""

import json
import os
import subprocess
from pathlib import Path

from tried import MODEL, URL, tried


def benchmark() -> str:
    command = [
        *("guidellm", "run", "--backend", f"kind=openai_http,target={URL},model={MODEL}"),
        *("--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=12"),
        *("--tokenizer", f"kind=hf_auto,model={os.environ['TOKENIZER']}"),
        *("--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=32"),
        *("--output", "kind=json,path=report.json", "--disable-console"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stderr[-300:] or done.stdout[-300:])
    totals = json.loads(Path("report.json").read_text())["benchmarks"][0]["metrics"]["request_totals"]
    if not totals["successful"] or totals["errored"]:
        raise RuntimeError(str(totals))
    return f"{totals['successful']} requests, {totals['errored']} errors"


tried("benchmark, concurrent 4", benchmark)
