"""What passes cost, measured on tiny pairs."""

import numpy as np
import pytest
from runtime.driving import assert_all_free

from echo_trt.calibration.measure import SIZES, measure
from echo_trt.calibration.store import machine
from echo_trt.runtime.params import SamplingParams


@pytest.mark.parametrize("pair", ["close", "lookup"])
def test_a_measured_table_is_positive_and_monotone(pair, open_llm):
    llm = open_llm(pair, "autoregressive", 3)
    before = llm.generate(["the theme"], SamplingParams(8))[0].token_ids
    table = measure(llm.loop, llm.manifest, seconds=0.05)
    assert table.target.sizes == [n for n in SIZES if n <= 16]
    for curve in (table.target, table.draft):
        seconds = np.array(curve.seconds)
        assert (np.diff(curve.sizes) > 0).all()
        assert (np.diff(seconds) >= 0).all()
        assert curve.per_context >= 0
    assert min(table.target.seconds) > 0
    assert table.machine == machine(llm.manifest)
    costs = table.costs()
    assert 0 < costs.target(1) <= costs.target(16) <= costs.target(100) < 10
    assert (costs.draft(8) > 0) == (pair == "close")
    assert table.hinge["t_ar"] > 0
    assert 1 <= table.hinge["k_max"] <= 16
    assert_all_free(llm.loop)
    assert llm.generate(["the theme"], SamplingParams(8))[0].token_ids == before
