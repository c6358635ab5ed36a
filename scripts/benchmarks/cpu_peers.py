"""Measure the CPU peers beside ours, and print one table in markdown: vLLM, llama.cpp, OpenVINO GenAI.

    python scripts/benchmarks/cpu_peers.py bundles/smollm2-135m --prompts mt_bench.jsonl --prompts gsm8k.jsonl \
        --json peers.json

Every peer is set up once in an environment of its own below --folder, and then measured by ``echo-trt bench`` in turns
with ours: each round runs ours and then the peer. Peers come one after another, so that no idle server takes part of
the machine. Long prompts, of this repository's docs, are among the prompts. Nothing else should run meanwhile.

A second bundle, as of int8, is measured after the first. A peer that does not run here is named with the reason, and
the others go on. Setting up takes about 20 minutes, a third of it compiling llama.cpp.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from echo_trt.bundle.sources import cache_folder
from echo_trt.engine.options import run_alone
from echo_trt.errors import UserError
from echo_trt_lab.cpu_peers.servers import ENGINES, LoadTarget, Peers, Unavailable
from echo_trt_lab.cpu_peers.table import markdown

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "scripts" / "demo_prompts.jsonl"
ENVIRONMENTS = cache_folder() / "peer-environments"
LONG_CHARACTERS = 3000  # of a long prompt, about 800 tokens; larger: fewer requests fit the KV pool


def main(
    bundles: Annotated[list[Path], Parameter(help="One bundle, or one per precision.")],
    prompts: Annotated[list[Path] | None, Parameter(help="JSONL beside the demo's; may be given again.")] = None,
    engines: Annotated[str, Parameter(help="By commas.")] = ",".join(ENGINES),
    batch: Annotated[str, Parameter(help="Requests at once, by commas.")] = "1,8,32",
    requests: Annotated[int, Parameter(help="Requests an engine, batch and round, at least; two a slot.")] = 32,
    rounds: Annotated[int, Parameter(help="Rounds, which are pooled.")] = 3,
    max_tokens: Annotated[int, Parameter(help="New tokens per request.")] = 64,
    long: Annotated[bool, Parameter(help="Add the long prompts.", negative="--no-long")] = True,
    demo: Annotated[bool, Parameter(help="Add the demo's prompts.", negative="--no-demo")] = True,
    folder: Annotated[Path, Parameter(help="The peers' environments.")] = ENVIRONMENTS,
    recipes: Annotated[Path, Parameter(help="The folder of the bundles' recipe.")] = ROOT / "build",
    json_file: Annotated[Path | None, Parameter("--json", help="Write all figures to this file.")] = None,
) -> None:
    """Measure the peers one after another beside ours."""
    names = [name for name in engines.split(",") if name]
    if unknown := [name for name in names if name not in ENGINES]:
        raise UserError(f"--engines names {unknown[0]!r}; choose from {', '.join(ENGINES)}.")
    folder.mkdir(parents=True, exist_ok=True)
    files = [*([DEMO] if demo else []), *(prompts or []), *([_long_prompts(folder)] if long else [])]
    options = ["--batch", batch, "--requests", requests, "--rounds", rounds, "--max-tokens", max_tokens]
    options += [word for file in files for word in ("--prompts", file)]
    slots = max(int(size) for size in batch.split(","))
    result: dict[str, Any] = {"measured": _facts(), "runs": [], "left_out": {}}
    for bundle in bundles:
        target = LoadTarget(bundle, recipes, slots)
        for name in names:
            _say(f"{bundle.name}: {name}")
            try:
                with ENGINES[name](folder, target) as peers:
                    result["runs"].append({"engine": name, **_bench(target, peers, options)})
            except Unavailable as reason:
                result["left_out"][f"{bundle.name}: {name}"] = str(reason)
                _say(f"{bundle.name}: {name} is left out: {reason}")
            if json_file:
                json_file.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if result["runs"]:
        print(f"{result['runs'][0]['machine']}; commit {result['measured']['commit']}\n")
        print(markdown(result["runs"]))


def _long_prompts(folder: Path) -> Path:
    """Write prompts of several hundred tokens: pages of the docs, to be summarised."""
    rows = [
        {"id": page.stem, "prompt": f"{page.read_text('utf-8')[:LONG_CHARACTERS]}\n\nSummarise this in two sentences."}
        for page in sorted((ROOT / "docs").glob("*.md"))
        if page.stat().st_size >= LONG_CHARACTERS
    ]
    file = folder / "long.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", "utf-8")
    return file


def _bench(target: LoadTarget, peers: Peers, options: list[object]) -> dict[str, Any]:
    """Run ``echo-trt bench`` on ours and the peers, in turns; returns its figures."""
    with tempfile.TemporaryDirectory() as index:
        out = Path(index) / "run.json"
        words = [sys.executable, "-m", "echo_trt", "bench", target.bundle, "--policies", "goodput", *options]
        words += ["--peers", ",".join(peers.words), "--recipes", target.recipes, "--json", out]
        env = os.environ | peers.env
        done = subprocess.run(list(map(str, words)), env=env, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"bench ended with {done.returncode}: {' '.join(done.stderr.split())[-300:]}")
        _say(done.stderr.strip())
        return json.loads(out.read_text("utf-8"))


def _facts() -> dict[str, str]:
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    return {"commit": commit, "begun": now, "command": shlex.join(["python", *sys.argv])}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_alone(main)
