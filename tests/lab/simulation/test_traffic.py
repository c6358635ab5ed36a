"""Requests that come and go in the simulator: arithmetic that can be worked out, and what targets are worth."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusal import refused
from rich.console import Console
from synthetic import recorded

from echo_trt.bundle.stored import CALIBRATION, write
from echo_trt.speculation.pacer import PATIENCE, Latency
from echo_trt.speculation.planner import PlainPlanner
from echo_trt_lab.calibration.fit import fit
from echo_trt_lab.simulation import loads
from echo_trt_lab.simulation.arrivals import BATCH, BURSTS, INTERACTIVE, Arrival, drawn, read
from echo_trt_lab.simulation.command import run
from echo_trt_lab.simulation.machines import Machine
from echo_trt_lab.simulation.options import SimulateOptions
from echo_trt_lab.simulation.replay import Replay
from echo_trt_lab.simulation.traffic import CHUNK, Traffic
from echo_trt_lab.simulation.walk import Recording

SIZES = np.array([1, 64, 1024])
STEEP = Machine("test", (SIZES, 1e-3 * SIZES, 0.0, 0.0), (SIZES, 1e-4 * SIZES, 0.0, 0.0), 0.0, 0.0, ())


@pytest.fixture(scope="module")
def recording() -> Recording:
    return Recording(recorded([11] * 8, 4, 2, 3))


def answered(recording, slots, arrivals, latency=None):
    traffic = Traffic(recording, slots, arrivals, {INTERACTIVE: latency} if latency else {})
    traffic.serve(Replay(traffic, STEEP, PlainPlanner()), 1e9)
    return traffic


def test_a_request_takes_its_prompt_in_chunks_and_then_a_token_at_a_time(recording):
    [only] = answered(recording, 2, [Arrival(5.0, CHUNK + 44, BATCH)]).done
    assert only.ttft == pytest.approx(1e-3 * (CHUNK + 44))
    assert (only.tokens, only.tpot) == (11, pytest.approx(1e-3))
    assert only.wait == pytest.approx(1e-3)


def test_a_prompt_holds_up_those_who_decode(recording):
    first, second = answered(recording, 2, [Arrival(0.0, 10, BATCH), Arrival(0.0105, 60, BATCH)]).done
    assert first.wait == pytest.approx(0.061)
    assert second.ttft == pytest.approx(0.061 + 0.011 - 0.0105)


@given(seed=st.integers(0, 2**32 - 1))
def test_nobody_waits_for_those_who_come_later_than_a_bound(recording, seed):
    """Whatever their targets are, where twice as much comes as can be answered."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice([BATCH, INTERACTIVE, "slow"], 30)
    come = [Arrival(time, 4 * CHUNK, kind) for time, kind in zip(np.sort(15 * rng.random(30)), kinds, strict=True)]
    traffic = Traffic(recording, 2, come, {INTERACTIVE: Latency(0.1, 1e-3), "slow": Latency(3600.0)})
    traffic.serve(Replay(traffic, STEEP, PlainPlanner()), 1e9)
    first = sorted(traffic.done, key=lambda answered: answered.first)
    for i, one in enumerate(first):
        assert all(one.arrival.time <= later.arrival.time + PATIENCE for later in first[i + 1 :])


def test_a_trace_is_read_and_what_is_none_refused(tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_text('{"time": 2, "prompt_tokens": 5}\n{"time": 1, "prompt_tokens": 7, "class": "interactive"}\n')
    assert read(file) == [Arrival(1.0, 7, INTERACTIVE), Arrival(2.0, 5, BATCH)]
    file.write_text('{"time": 2, "prompt_tokens": 5}\n{"time": 1}\n')
    with refused("--arrivals", "line 2"):
        read(file)
    with refused("--arrivals", "cannot be read"):
        read(tmp_path / "none")


def test_drawn_arrivals_have_their_rate_their_share_and_their_bursts():
    found = drawn(20, 600, 0.25, BURSTS)
    times = np.array([each.time for each in found])
    assert len(found) == pytest.approx(12_000, rel=0.05)
    assert np.mean([each.kind == INTERACTIVE for each in found]) == pytest.approx(0.25, abs=0.02)
    assert (times % 60 < 15).mean() == pytest.approx(0.75, abs=0.03)
    assert drawn(20, 600, 0.25, BURSTS) == found


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> SimulateOptions:
    folder = tmp_path_factory.mktemp("simulation")
    trees = recorded([40, 30, 50, 45] * 3, 4, 2, 3)
    (folder / "trees.npz").write_bytes(trees.to_bytes())
    write(folder, CALIBRATION, fit(trees, "target", "draft", 4, 2, 3))
    return SimulateOptions(
        folder / "trees.npz",
        calibration=folder / CALIBRATION,
        machine="h100-qwen3-8b",
        targets=(150.0, 4.5),
        loads=(1.0,),
        slots=32,
        seconds=2.0,
    )


@pytest.fixture(autouse=True)
def capacity_in_a_second(monkeypatch):
    """Repeat a run in which no answer ends, twice as long, until some do: 0.001, 0.002, ... 1 second."""
    monkeypatch.setattr(loads, "SATURATED", 0.001)


def test_targets_are_kept_more_often_and_nobody_starves(job, tmp_path):
    out, file = Console(file=io.StringIO(), width=200), tmp_path / "out.json"
    result = run(replace(job, json_file=file), out, Console(file=io.StringIO()))
    rows = {row["policy"]: row for row in result["results"]}
    assert json.loads(file.read_text()) == result
    assert "targets kept" in out.file.getvalue()
    before, after = rows["goodput"], rows["goodput with targets"]
    assert after["attained"] > 1.1 * before["attained"]
    assert after["tokens_per_s"] > 0.9 * before["tokens_per_s"]
    assert after["longest_wait_ms"] < 200
