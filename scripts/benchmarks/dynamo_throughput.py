"""What the way through NVIDIA Dynamo costs: an engine alone, behind Dynamo, and as two workers with a core each.

    python scripts/benchmarks/dynamo_throughput.py bundles/smollm2-135m

The same prompts, greedy, so many at once, on two cores of this machine: in one process; as one worker with two cores
behind Dynamo; as two workers with one core each. Prints tokens per second, CPU seconds and memory (proportional share,
PSS) of every process. The client runs on the same cores. About 5 minutes on a quiet machine; on a busy one the CPU
seconds still say something. Needs pip install -e '.[test,dynamo]' -e ./lab and pip install --no-deps ai-dynamo==1.6.1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("", "plugins", "tests/engine/service")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")])

from served import free_ports  # noqa: E402

from echo_trt.adapters.dynamo.environment import completed  # noqa: E402

SUBJECTS = ("the tides", "bread", "prime numbers", "a violin", "photosynthesis", "chess", "rain", "a clock")
TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Load:
    requests: int
    at_once: int
    tokens: int

    def prompt(self, i: int) -> str:
        return f"{i}. A short essay on {SUBJECTS[i % len(SUBJECTS)]}.\n"

    def run(self, ask: Callable[[int], int]) -> tuple[float, int]:
        """Return seconds, and tokens of all answers."""
        begin = time.monotonic()
        with ThreadPoolExecutor(self.at_once) as pool:
            tokens = sum(pool.map(ask, range(self.requests)))
        return time.monotonic() - begin, tokens


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path)
    options.add_argument("--requests", type=int, default=96)
    options.add_argument("--at-once", type=int, default=16)
    options.add_argument("--tokens", type=int, default=96, help="of an answer")
    options.add_argument("--cell", help=argparse.SUPPRESS)
    requested = options.parse_args()
    load = Load(requested.requests, requested.at_once, requested.tokens)
    if requested.cell == "alone":
        alone(requested.bundle, load)
        return
    print("| way | tokens/s | CPU s: processes | memory, MB: processes |\n|---|---|---|---|", flush=True)
    words = [sys.executable, *sys.argv, "--cell", "alone"]  # in a process of its own, which ends with its memory
    subprocess.run(words, check=True)
    cores = sorted(os.sched_getaffinity(0))[:2]
    draft_lag(requested.bundle, load, "one worker, two cores", [set(cores)])
    draft_lag(requested.bundle, load, "two workers, a core each", [{core} for core in cores])


def alone(bundle: Path, load: Load) -> None:
    import numpy as np

    from echo_trt.engine.llm import LLM
    from echo_trt.engine.params import SamplingParams
    from echo_trt.engine.request import Event, Request
    from echo_trt.engine.service.job import Job
    from echo_trt.engine.service.service import Service

    llm = LLM(bundle)
    prompts = [llm.tokenizer.encode(load.prompt(i)) for i in range(load.requests)]
    service = Service(llm, load.requests)
    params = SamplingParams(load.tokens, ignore_eos=True)

    def ask(i: int) -> int:
        done, tokens = threading.Event(), 0

        def tell(event: Event) -> None:
            nonlocal tokens
            tokens += len(event.token_ids)
            if event.reason:
                done.set()

        service.submit(Job(Request(i, np.asarray(prompts[i]), params), tell))
        done.wait()
        return tokens

    Load(load.at_once, load.at_once, 16).run(ask)
    before = cpu(os.getpid())
    seconds, tokens = load.run(ask)
    spent, memory = cpu(os.getpid()) - before, pss(os.getpid())
    print(f"| alone, in one process | {tokens / seconds:.0f} | {spent:.1f} | {memory:.0f} |", flush=True)
    service.close(1)


def draft_lag(bundle: Path, load: Load, name: str, shares: list[set[int]]) -> None:
    """``shares``: the cores of each worker; the frontend may use all."""
    with tempfile.TemporaryDirectory(dir=bundle.parent) as folder:
        # Costs are kept in the bundle, and a core has other costs than two.
        bundle = shutil.copytree(bundle, Path(folder) / "bundle", copy_function=os.link)
        [port, *systems] = free_ports(1 + len(shares))
        own = {key: value for key, value in os.environ.items() if not key.startswith("DYN_")}
        environment = completed(
            {**own, "DYN_FILE_KV": f"{folder}/discovery", "DYN_LOG": "warn", "DYN_ROUTER_MODE": "kv"}
        )
        frontend = ["-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)]
        started = [spawn(frontend, environment, None)]
        for system, share in zip(systems, shares, strict=True):
            words = ["-m", "echo_trt", "worker", str(bundle), "--name", "echo", "--system-port", str(system)]
            started.append(spawn(words, environment, share))
        try:
            wait([f"http://127.0.0.1:{system}/health" for system in systems], port)
            measure(load, name, port, started)
        finally:
            for process in started:
                process.kill()
                process.wait()


def measure(load: Load, name: str, port: int, started: list[subprocess.Popen]) -> None:
    client = httpx.Client(timeout=600, limits=httpx.Limits(max_connections=load.at_once))

    def ask(i: int, tokens: int = 0) -> int:
        body = {"model": "echo", "prompt": load.prompt(i), "temperature": 0, "ignore_eos": True}
        answer = client.post(
            f"http://127.0.0.1:{port}/v1/completions", json=body | {"max_tokens": tokens or load.tokens}
        )
        return int(answer.raise_for_status().json()["usage"]["completion_tokens"])

    Load(load.at_once, load.at_once, 16).run(lambda i: ask(i, 16))
    before = [cpu(process.pid) for process in started]
    seconds, tokens = load.run(ask)
    spent = [cpu(process.pid) - begin for process, begin in zip(started, before, strict=True)]
    memory = [pss(process.pid) for process in started]
    times = f"frontend {spent[0]:.1f}, workers {', '.join(f'{each:.1f}' for each in spent[1:])}"
    sizes = f"frontend {memory[0]:.0f}, workers {', '.join(f'{each:.0f}' for each in memory[1:])}"
    print(f"| behind Dynamo: {name} | {tokens / seconds:.0f} | {times} | {sizes} |", flush=True)


def spawn(words: list[str], environment: dict[str, str], cores: set[int] | None) -> subprocess.Popen:
    share = (lambda: os.sched_setaffinity(0, cores)) if cores else None
    return subprocess.Popen([sys.executable, *words], env=environment, preexec_fn=share, stderr=subprocess.DEVNULL)


def wait(urls: list[str], port: int) -> None:
    end = time.monotonic() + 600
    while time.monotonic() < end:
        try:
            models = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5).json()["data"]
            if models and all(httpx.get(url, timeout=5).status_code == 200 for url in urls):
                time.sleep(1)
                return
        except (httpx.HTTPError, ValueError, KeyError):
            pass
        time.sleep(0.5)
    sys.exit("error: the workers did not start in 600 s.")


def cpu(pid: int) -> float:
    """Seconds of CPU that a process has spent."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def pss(pid: int) -> float:
    """Memory of a process in MB, what it shares with others in proportion."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1000


if __name__ == "__main__":
    main()
