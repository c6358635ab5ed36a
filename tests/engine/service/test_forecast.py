"""Forecasts: passes that others sit out count at the load that runs, and admission reckons with errors seen so far."""

from __future__ import annotations

import pytest

from echo_trt.engine.service.forecast import Forecaster
from echo_trt.engine.service.job import ExpectedLatency, Late
from echo_trt.speculation.targets import Latency


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
