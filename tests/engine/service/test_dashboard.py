"""A real Prometheus scrapes a real server; every query of the dashboard, and of those for vLLM, has an answer."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from served import free_ports
from waiting import wait_until

DOCKER = Path(__file__).parents[3] / "docker"
ALERTS = [rule for group in yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((DOCKER / "grafana/dashboards/echo.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
VLLM = yaml.safe_load(Path(__file__).with_name("vllm_queries.yml").read_text())
#: What such a load has none of, and what is over when it is asked for.
NOTHING = (
    "preemptions",
    "engine_failures",
    "evicted",
    "queued",
    "running",
    "blocks_used",
    "kv_usage",
    "ALERTS",
    "speculation_gain",
    "waiting",
    "cache_usage",
    "cache_hits",
)
needs_prometheus = pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is not on PATH")


@pytest.fixture(scope="module")
def ask(server, tmp_path_factory) -> Iterator[Callable[[str], list[float]]]:
    """Return the values that a query has now, in a Prometheus with the project's own configuration."""
    folder, (port,) = tmp_path_factory.mktemp("prometheus"), free_ports(1)
    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    config["global"]["scrape_interval"] = "1s"
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{server.openai}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(DOCKER / "alerts.yml", folder)
    words = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    words.append(f"--web.listen-address=127.0.0.1:{port}")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["prometheus", *words], stdout=log, stderr=log)

    def get(query: str) -> list[float]:
        query = query.replace("$__rate_interval", "20s").replace("$instance", ".*")
        answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": query}).json()
        assert answer["status"] == "success", answer
        return [float(each["value"][1]) for each in answer["data"]["result"]]

    try:
        reported = (folder / "log").read_text
        wait_until(lambda: _is_up(f"http://127.0.0.1:{port}/-/ready") or process.poll() is not None, reported=reported)
        wait_until(lambda: get("sum(up)") == [1], reported=reported)  # it looks for its targets every five seconds
        yield get
    finally:
        process.kill()
        process.wait()


def _is_up(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def load(server, ask) -> None:
    """Make some seconds of answers, and a client that leaves."""
    prompt = np.random.default_rng(4).integers(3, 300, 70).tolist()
    latency = {"ttft_ms": 60_000, "tpot_ms": 60_000}
    body = {"model": "echo", "prompt": prompt, "ignore_eos": True, "max_tokens": 60, "latency": latency}
    end = time.monotonic() + 5
    with httpx.Client(base_url=f"http://127.0.0.1:{server.openai}") as client:
        while time.monotonic() < end:
            client.post("/v1/completions", json=body).raise_for_status()
        with client.stream("POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 400}) as answer:
            next(answer.iter_lines())
    time.sleep(3)  # two scrapes


@needs_prometheus
@pytest.mark.parametrize("query", [*QUERIES, *chain.from_iterable(VLLM.values())])
def test_a_query_of_the_dashboard_has_an_answer(query, ask, load):
    values = ask(query)
    assert values
    if "goodput" in query:  # this bundle's policy is another: nothing over nothing
        return
    assert np.isfinite(values).any()
    assert max(values) > 0 or any(name in query for name in NOTHING), query


@needs_prometheus
def test_alerts_ask_for_series_that_exist_and_none_fires(ask, load):
    for rule in ALERTS:
        for name in set(re.findall(r"\b(?:echo_\w+|up)\b", rule["expr"])):
            assert ask(f"count({name})"), name
        assert ask(rule["expr"]) == [], rule["alert"]


def test_every_metric_of_the_dashboards_is_served(server):
    with httpx.Client(base_url=f"http://127.0.0.1:{server.openai}", timeout=60) as client:
        body = {"model": "echo", "prompt": [5], "max_tokens": 4, "ignore_eos": True, "latency": {"tpot_ms": 60_000}}
        client.post("/v1/completions", json=body).raise_for_status()
        server.rest()
        served = set(re.findall(r"^([\w:]+)", client.get("/metrics").text, re.MULTILINE))
    for board, number in ((DASHBOARD, 20), (VLLM, 25)):
        wanted = set(re.findall(r"\b(?:echo_|vllm:)\w+", json.dumps(board)))
        assert wanted <= served
        assert len(wanted) > number


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not on PATH")
def test_every_alert_fires_when_it_should(tmp_path):
    """Prometheus' own rule tests, on histories of each fault and of what is none."""
    stories = yaml.safe_load(Path(__file__).with_name("alerts.yml").read_text())
    requested = {
        rule["alertname"] for story in stories["tests"] for rule in story["alert_rule_test"] if rule["exp_alerts"]
    }
    assert requested == {rule["alert"] for rule in ALERTS}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump({"rule_files": [str(DOCKER / "alerts.yml")]} | stories))
    done = subprocess.run(["promtool", "test", "rules", tmp_path / "tests.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_the_figures_are_those_of_the_load(ask, load):
    assert ask('sum(echo_gateway_requests_total{status="200"})')[0] > 2
    assert ask('echo_requests_total{outcome="cancelled"}') == [1]
    (begun,), (deeper,) = (ask(f'echo_gates_total{{depth="{d}", decision="extended"}}') for d in (0, 1))
    (ended,) = ask('echo_gates_total{depth="1", decision="truncated"}')
    assert begun == deeper + ended > 0
    (plain,) = ask('echo_gates_total{depth="0", decision="truncated"}')
    assert 0 < plain + begun <= ask("echo_verifications_total")[0]  # a prompt's last token is verified too
