"""What Prometheus reads of the engine."""

from __future__ import annotations

import pytest
from prometheus_client import generate_latest

from echo_trt.engine.params import Counters
from echo_trt.engine.service.metric_aliases import ALIASES, TENSORRT_LLM, VLLM
from echo_trt.engine.service.metrics import EngineMetrics, Statistics


def statistics(reached: dict[int, int] | None = None, **ended: int) -> Statistics:
    counters = Counters()
    counters.reached.update(reached or {})
    return Statistics(2, 0, 4, 1, 0, 0, "echo", 1, counters, {}, ended)


def test_failures_of_the_engine_and_of_reading_are_added():
    metrics = EngineMetrics("echo")
    for _ in range(2):
        metrics.refuse("failed")
        metrics.observe("request_seconds", 0.5)
        metrics.flush(statistics(failed=2, stop=1))
    text = generate_latest(metrics.registry).decode()
    assert 'echo_requests_total{model_name="echo",outcome="failed"} 4.0' in text
    assert 'echo_request_seconds_count{model_name="echo"} 2.0' in text


def test_counts_of_gates_never_fall():
    metrics = EngineMetrics("echo")
    for reached in ({0: 5, 1: 3}, {0: 5, 1: 4}):  # the second was read after a draft's next depth alone was counted
        metrics.flush(statistics(reached))
    text = generate_latest(metrics.registry).decode()
    assert 'echo_gates_total{decision="truncated",depth="0",model_name="echo"} 2.0' in text
    assert 'echo_gates_total{decision="extended",depth="0",model_name="echo"} 4.0' in text


@pytest.mark.parametrize("names", [VLLM, TENSORRT_LLM])
def test_other_servers_names_repeat_series_that_there_are_once_each(names):
    metrics = EngineMetrics("echo")
    counted = statistics(stop=2, length=1, deadline=4, refused=8)
    counted.counters.accepted.update({0: 3, 2: 1})
    metrics.flush(counted)
    served = [metric.name for metric in metrics.collect(names)]
    assert len(served) == len(set(served))
    assert {"echo_" + own for own in ALIASES} <= set(served)
    given = {each.partition("{")[0] for each in " ".join(ALIASES.values()).split() if each.startswith(names)}
    assert given == {name for name in served if not name.startswith("echo_")}


def test_labels_are_those_of_the_other_servers():
    metrics = EngineMetrics("echo")
    counted = statistics(stop=2, length=1, deadline=4, refused=8)
    counted.counters.accepted.update({0: 3, 2: 1})
    metrics.flush(counted)
    metrics.observe("request_seconds", 0.5)
    text = generate_latest(metrics.registry).decode()
    for line in (
        'vllm:request_success_total{engine="0",finished_reason="length",model_name="echo"} 5.0',
        'vllm:cache_config_info{block_size="32",engine="0",model_name="echo",num_gpu_blocks="1"} 1.0',
        'vllm:spec_decode_num_drafts_total{engine="0",model_name="echo"} 4.0',
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="echo",position="1"} 1.0',
        'vllm:e2e_request_latency_seconds_bucket{engine="0",le="0.5",model_name="echo"} 1.0',
    ):
        assert f"\n{line}\n" in text
    assert "refused" not in text.partition("vllm:request_success_total")[2]
    series = {(s.name, *s.labels.items()): s.value for each in metrics.collect(TENSORRT_LLM) for s in each.samples}
    waiting = ("nv_trt_llm_request_metrics", ("model", "echo"), ("version", "1"), ("request_type", "waiting"))
    assert series[waiting] == 2


def test_the_first_position_is_told_before_a_draft_is_accepted():
    metrics = EngineMetrics("echo")
    metrics.flush(statistics())
    line = 'echo_accepted_tokens_per_position_total{model_name="echo",position="0"} 0.0'
    assert f"\n{line}\n" in generate_latest(metrics.registry).decode()
