"""Latency targets over HTTP: by a field, by a class's name, by a key; refusals and who kept what."""

from __future__ import annotations

import re
import time

import pytest
from refusal import refused as raises
from server.running import KEY, engine_of, refused, running

from echo_trt.engine.latency import LatencyClasses
from echo_trt.server.keys import Keys

CLASSES = "interactive=60000/60000,batch"
ASKED = {"model": "echo", "prompt": [5, 6, 7], "max_tokens": 6, "ignore_eos": True, "temperature": 0}
HASTY = "sk-of-someone-in-a-hurry"


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"{KEY}\n{HASTY} latency=interactive\n")
    return file


@pytest.fixture(scope="module")
def client(long_bundle, keys_file):
    with engine_of(long_bundle, classes=CLASSES) as engine, running(engine, api_keys_file=keys_file) as client:
        client.headers["Authorization"] = f"Bearer {KEY}"
        yield client


def finished(client) -> dict[str, float]:
    """Return how many requests of a class have kept both of their targets."""
    text = client.get("/metrics").text
    found = re.findall(r'echo_latency_kept_total{class="(\w+)",model_name="echo",target="both"} (\S+)', text)
    return {name: float(number) for name, number in found}


def test_targets_come_by_field_by_name_and_by_key_and_are_counted_by_class(client):
    bodies = [
        ASKED | {"latency": "interactive"},
        ASKED | {"latency": {"tpot_ms": 60_000, "ttft_ms": 60_000}},
        ASKED | {"latency": {"tpot_ms": 0.001}},
        ASKED,
    ]
    texts = {client.post("/v1/completions", json=body).json()["choices"][0]["text"] for body in bodies}
    hasty = {"Authorization": f"Bearer {HASTY}"}
    texts.add(client.post("/v1/completions", json=ASKED, headers=hasty).json()["choices"][0]["text"])
    body = {"model": "echo", "input": "x", "max_output_tokens": 3, "latency": "batch"}
    client.post("/v1/responses", json=body, headers=hasty).raise_for_status()  # the field goes before the key
    assert len(texts) == 1
    time.sleep(0.6)  # metrics are flushed four times per second
    assert finished(client) == {"interactive": 2, "custom": 1, "batch": 1}


def test_what_is_no_target_is_refused_by_name(client):
    for latency in ("fast", {"tpot_ms": 0}, {"tpot_ms": 1e-310}, {"tpot": 5}, {"ttft_ms": 9e9}):
        sentence = refused(client.post("/v1/completions", json=ASKED | {"latency": latency}), 400, "latency")
        assert "latency" in sentence
    unknown = client.post("/v1/completions", json=ASKED | {"latency": "fast"})
    assert "interactive, batch" in refused(unknown, 400, "latency")


@pytest.mark.parametrize("text", ["interactive=fast", "a b=1/2", "a=1/2/3", "a=1,a=2", "a=0/5", "a=/0.0009"])
def test_classes_that_are_none(text):
    with raises("--latency-classes", "NAME=TTFT_MS/TPOT_MS"):
        LatencyClasses(text)


def test_a_key_may_name_a_class(keys_file):
    with raises("has latency=interactive", "--latency-classes"):
        Keys(keys_file, ["batch"])
    keys = Keys(keys_file, ["batch", "interactive"])
    assert keys.find(f"Bearer {HASTY}".encode()).latency == "interactive"
    assert keys.find(f"Bearer {KEY}".encode()).latency is None
