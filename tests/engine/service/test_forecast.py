"""Forecasts: passes that others sit out count at the load that runs, and admission reckons with errors seen so far."""

from __future__ import annotations

import numpy as np
import pytest

from echo_trt.engine.params import SamplingParams
from echo_trt.engine.request import Request
from echo_trt.engine.service.forecast import Forecaster
from echo_trt.engine.service.job import ExpectedLatency, Job, Late
from echo_trt.speculation.pacer import Latency


def test_passes_that_others_sit_out_count_at_the_load_that_runs():
    forecaster = Forecaster()
    for _ in range(200):  # one pass of two is all 16 requests', the other one of the two with targets
        forecaster.observe([(True, 0.03, 1)] * 2 + [(False, 0.04, 1)] * 14, 16, 0, 0.03, 0)
        forecaster.observe([(True, 0.01, 1)] * 2, 16, 0, 0.01, 0)
    assert forecaster.forecast(9, True, 15, 16, 0, 0).tpot == pytest.approx(0.02, rel=0.02)


def test_admission_reckons_with_errors_seen_so_far():
    forecaster, wanted, expected = Forecaster(), Latency(tpot=0.015), ExpectedLatency(0.1, 0.012)
    forecaster.refuse_late(expected, wanted, [], 3)
    for seen in (0.01, 0.012, 0.02, 0.02):
        forecaster.ended(expected, 0.1, seen)
    with pytest.raises(Late):
        forecaster.refuse_late(expected, wanted, [], 3)


@pytest.mark.parametrize("wanted", [Latency(), Latency(tpot=0.05)], ids=["no target", "a long one"])
def test_admission_keeps_the_targets_of_those_who_run(wanted):
    forecaster, expected = Forecaster(), ExpectedLatency(0.1, 0.02)
    for _ in range(50):
        forecaster.observe([(True, 0.02, 1)] * 4, 4, 0, 0.02, 0)
    forecaster.refuse_late(expected, wanted, [0.03], 3)
    with pytest.raises(Late):
        forecaster.refuse_late(expected, wanted, [0.03, 0.015], 3)


def test_whose_first_token_is_due_first_is_served_first_within_a_priority():
    def job(id: int, ttft_ms: float | None = None, priority: int = 0) -> Job:
        params = SamplingParams(latency=ttft_ms and {"ttft_ms": ttft_ms})
        return Job(Request(id, np.ones(9, int), params, priority=priority, submitted=id / 100))

    first, second, soon, urgent = job(1), job(2), job(3, 300.0), job(4, priority=-1)
    assert sorted([second, soon, first, urgent]) == [urgent, soon, first, second]
