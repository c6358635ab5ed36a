"""A real server under a load that changes, a real Prometheus that scrapes it, and what it answers to a dashboard."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from socket import create_server
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).parents[3]
DOCKER = ROOT / "docker"
SCRAPE = 5  # seconds, as in docker/prometheus.yml
LOADS = (1, 4, 16, 2)  # requests at once, one part of the time each
START = 300  # seconds until both answer, at most


def measure(bundle: Path, dashboard: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Serve ``bundle`` under load for some ``seconds``. Returns "PANEL ID/refId" -> series."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        openai, port = free_ports(2)
        words = [sys.executable, "-m", "echo_trt", "serve", str(bundle), "--batch", "8", "--openai-port", str(openai)]
        stack.enter_context(running(words, Path(folder) / "server.log"))
        print("starting the server", file=sys.stderr)
        wait_for(f"http://127.0.0.1:{openai}/health")
        stack.enter_context(prometheus(Path(folder), port, {"server": openai}))
        wait_for(f"http://127.0.0.1:{port}/-/ready")
        begin = time.time()
        for load in LOADS:
            print(f"{load} requests at once", file=sys.stderr)
            ask(f"http://127.0.0.1:{openai}", load, seconds / len(LOADS))
        time.sleep(2 * SCRAPE)
        return answers(f"http://127.0.0.1:{port}", dashboard, begin + 4 * SCRAPE, time.time())


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [socket.getsockname()[1] for socket in sockets]


@contextmanager
def running(words: list[str], log: Path) -> Iterator[None]:
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file)
    try:
        yield
    except Exception:
        print(log.read_text()[-2000:], file=sys.stderr)
        raise
    finally:
        process.terminate()
        process.wait()


@contextmanager
def prometheus(folder: Path, port: int, ports: dict[str, int]) -> Iterator[None]:
    """Run it with the project's own configuration and rules, but for the places of the two services."""
    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [f"127.0.0.1:{ports[job['job_name']]}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(DOCKER / "alerts.yml", folder)
    words = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with running([*words, f"--web.listen-address=127.0.0.1:{port}"], folder / "prometheus.log"):
        yield


def wait_for(url: str) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end:
        with suppress(httpx.HTTPError):
            if httpx.get(url, timeout=10).status_code == 200:
                return
        time.sleep(0.5)
    raise SystemExit(f"error: {url} did not answer in {START} s.")


def ask(url: str, load: int, seconds: float) -> None:
    """Keep ``load`` requests running for some ``seconds``; one client leaves early, and every other has targets."""
    prompts = [
        json.loads(line)["prompt"] for line in (ROOT / "scripts" / "demo_prompts.jsonl").read_text().splitlines()
    ]
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        with httpx.Client(base_url=url, timeout=120) as session:
            turn = number
            while time.monotonic() < end:
                message = {"role": "user", "content": prompts[turn % len(prompts)]}
                body = {"model": "echo", "messages": [message], "max_tokens": 64, "stream": True}
                if number % 2:
                    body["latency"] = {"ttft_ms": 300, "tpot_ms": 25}
                with session.stream("POST", "/v1/chat/completions", json=body) as answer:
                    for _ in answer.iter_lines():
                        if number == 0 and turn == 3:
                            break
                turn += 1

    with ThreadPoolExecutor(load) as pool:
        list(pool.map(client, range(load)))


def answers(url: str, dashboard: dict[str, Any], begin: float, end: float) -> dict[str, Any]:
    """Ask Prometheus every query of the dashboard over a span of time; values that are no numbers are left out."""
    found = {}
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"].replace("$__rate_interval", f"{4 * SCRAPE}s").replace("$instance", ".*")
            requested = {"query": query, "start": begin, "end": end, "step": SCRAPE}
            reply = httpx.get(f"{url}/api/v1/query_range", params=requested, timeout=60).json()
            if reply["status"] != "success":
                raise SystemExit(f"error: {panel['title']}: {reply['error']}")
            found[f"{panel['id']}/{target['refId']}"] = [
                (series["metric"], [(round(when - begin), _short(value)) for when, value in series["values"]])
                for series in reply["data"]["result"]
            ]
    return {
        query: [(labels, [point for point in points if point[1] is not None]) for labels, points in series]
        for query, series in found.items()
    }


def _short(value: str) -> float | None:
    """Return four digits of a value; None for what is no number, as nothing divided by nothing."""
    number = float(f"{float(value):.4g}")
    return number if math.isfinite(number) else None
