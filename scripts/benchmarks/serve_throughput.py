"""What serving costs: tokens a second behind Triton against the offline runtime, in turn on the same machine.

    python scripts/benchmarks/serve_throughput.py bundles/smollm2-135m prompts.jsonl --streams 64 --seconds 60

Runs the offline runtime, the server under perf_analyzer (from PyPI; streams over gRPC) and the offline runtime again,
each with as many requests at once and the same prompts. Prints tokens a second and their ratio, time to first token
and between tokens, errors, and the resident memory of server and backend. Needs pip install -e '.[test]' perf-analyzer.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from itertools import cycle, islice
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "plugins"), str(ROOT / "tests" / "serving")]

from served import Served  # noqa: E402

from echo_trt.files.prompts import read_prompts  # noqa: E402

SETTLE = 5.0  # seconds at either end that do not count
WINDOWS = 3  # of perf_analyzer, which wants several


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path)
    options.add_argument("prompts", type=Path)
    options.add_argument("--streams", type=int, default=64)
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--max-tokens", type=int, default=64)
    options.add_argument("--policy", help="the recipe's by default")
    options.add_argument("--perf-analyzer", default="perf_analyzer", help="the program")
    asked = options.parse_args()
    before = in_a_process_of_its_own(offline, asked)
    print(f"offline: {before:.1f} tokens/s", flush=True)
    with tempfile.TemporaryDirectory(prefix="echo-trt-throughput-") as folder:
        rate, errors = served(asked, Path(folder))
    after = in_a_process_of_its_own(offline, asked)
    print(f"offline: {after:.1f} tokens/s")
    print(f"served / offline: {rate / np.mean([before, after]):.3f}")
    return 1 if errors else 0


def in_a_process_of_its_own(task, asked: argparse.Namespace) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(task, (asked,))


def offline(asked: argparse.Namespace) -> float:
    """Tokens a second of LLM.stream, text included, once all slots are full."""
    from echo_trt.runtime.llm import LLM
    from echo_trt.runtime.params import SamplingParams

    llm = LLM(asked.bundle, asked.policy, asked.streams)
    chats = [llm.chat_ids(row.text) for row in read_prompts(asked.prompts)]
    begin = settled = 0.0
    for _ in llm.stream(list(islice(cycle(chats), 50 * asked.streams)), SamplingParams(asked.max_tokens)):
        now = time.monotonic()
        begin = begin or now
        if not settled and now - begin > SETTLE:
            settled, tokens = now, llm.counters.emitted_tokens
        if settled and now - settled > asked.seconds:
            break
    return (llm.counters.emitted_tokens - tokens) / (now - settled)


def served(asked: argparse.Namespace, folder: Path) -> tuple[float, int]:
    """Tokens a second, and the number of errors; prints the rest."""
    policy = ("--policy", asked.policy) if asked.policy else ()
    server = Served(asked.bundle, folder / "log", "--batch", asked.streams, *policy).wait_for("serving", 300)
    try:
        done = threading.Event()
        samples: list[tuple[float, dict[str, float], dict[str, float]]] = []
        sampler = threading.Thread(target=sample, args=(server, samples, done))
        sampler.start()
        output = analyze(server, asked, folder)
        done.set()
        sampler.join()
        code = server.stop()
    finally:
        server.kill()
    (profile,) = json.loads((folder / "profile.json").read_text())["experiments"]
    rate, seconds = rate_of(samples, asked.streams)
    errors = int(samples[-1][1].get('echo_requests_total{outcome="failed"}', 0)) + ("rror" in output) + (code != 0)
    print(f"served: {rate:.1f} tokens/s over {seconds:.0f} s, {len(profile['requests'])} answers, {errors} errors")
    times(profile["requests"], samples)
    memory(samples)
    return rate, errors


def analyze(server: Served, asked: argparse.Namespace, folder: Path) -> str:
    """perf_analyzer's own words."""
    rows = [
        {"text_input": [row.text], "chat": [True], "stream": [True], "max_tokens": [asked.max_tokens]}
        for row in read_prompts(asked.prompts)
    ]
    (folder / "inputs.json").write_text(json.dumps({"data": rows}))
    window = int(1000 * (asked.seconds + 2 * SETTLE) / WINDOWS)
    words = [asked.perf_analyzer, "-m", "echo", "-u", f"127.0.0.1:{server.grpc}", "-i", "grpc", "--streaming", "-a"]
    words += ["--concurrency-range", asked.streams, "--input-data", folder / "inputs.json", "-p", window]
    words += ["-s", 999, "-r", WINDOWS, "--profile-export-file", folder / "profile.json"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=asked.seconds * 4 + 120)
    if done.returncode:
        sys.exit(f"error: perf_analyzer failed: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout + done.stderr


def sample(server: Served, samples: list, done: threading.Event) -> None:
    """Once a second: the time, the metrics, resident MiB by process."""
    pids = {name: server.children(name)[0] for name in ("tritonserver", "triton_python_backend_stub")}
    while not done.wait(1):
        pages = {name: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for name, pid in pids.items()}
        samples.append((time.monotonic(), server.metrics(), {name: n * 4 / 1024 for name, n in pages.items()}))


def full(samples: list, streams: int) -> list:
    return [each for each in samples if each[1].get("echo_running", 0) >= 0.9 * streams]


def rate_of(samples: list, streams: int) -> tuple[float, float]:
    """Tokens a second while the places were taken, and for how long they were."""
    busy = full(samples, streams)
    begin, end = busy[int(SETTLE)], busy[-int(SETTLE)]
    seconds = end[0] - begin[0]
    return (end[1]["echo_emitted_tokens_total"] - begin[1]["echo_emitted_tokens_total"]) / seconds, seconds


def times(requests: list[dict], samples: list) -> None:
    """As the client saw them, a message (which may carry several tokens) at a time; a token's share by the server."""
    first = [(r["response_timestamps"][0] - r["timestamp"]) / 1e6 for r in requests]
    gaps = np.concatenate([np.diff(r["response_timestamps"]) for r in requests if len(r["response_timestamps"]) > 1])
    for name, values in (("time to first token", first), ("between messages", gaps / 1e6)):
        p50, p99 = np.percentile(values, (50, 99))
        print(f"{name}: {p50:.1f} ms median, {p99:.1f} ms p99")
    last = samples[-1][1]
    mean = last["echo_inter_token_seconds_sum"] / last["echo_inter_token_seconds_count"]
    print(f"between tokens, by the server's metrics: {1e3 * mean:.1f} ms mean of messages' means")


def memory(samples: list) -> None:
    for name in samples[0][2]:
        values = [each[2][name] for each in samples]
        quarter = max(len(values) // 4, 1)
        shown = ", ".join(f"{np.median(values[i * quarter : (i + 1) * quarter]):.0f}" for i in range(4))
        print(f"memory of {name}, medians of the run's quarters: {shown} MiB")


if __name__ == "__main__":
    sys.exit(main())
