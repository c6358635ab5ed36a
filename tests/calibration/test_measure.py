"""What passes cost, measured on tiny pairs."""

import numpy as np
import pytest
from pairs import LIMITS, roles_of
from runtime.driving import assert_all_free

from echo_trt.calibration.measure import SIZES, measure
from echo_trt.calibration.store import machine
from echo_trt.compile.native_export import export_native
from echo_trt.engines.onnxruntime import OnnxRuntimeEngine
from echo_trt.engines.padded import Layout
from echo_trt.runtime.drafters import EngineDrafter
from echo_trt.runtime.params import SamplingParams
from echo_trt.runtime.slots import Slots, blocks_for


def check(table, sizes):
    assert table.target.sizes == sizes
    for curve in (table.target, table.draft):
        seconds = np.array(curve.seconds)
        assert (np.diff(curve.sizes) > 0).all()
        assert (np.diff(seconds) >= 0).all()
        assert curve.per_context >= 0
    assert min(table.target.seconds) > 0
    costs = table.costs()
    assert 0 < costs.target(1) <= costs.target(16) <= costs.target(100) < 10
    assert table.hinge.t_ar > 0
    assert 1 <= table.hinge.k_max < sizes[-1]


@pytest.mark.parametrize("pair", ["close", "lookup"])
def test_a_measured_table_is_positive_and_monotone(pair, open_llm):
    llm = open_llm(pair, "autoregressive", 3)
    before = llm.generate(["the theme"], SamplingParams(8))[0].token_ids
    table = measure(llm.loop, llm.manifest, seconds=0.05)
    check(table, [n for n in SIZES if n <= 3 * llm.loop.state.reserve])
    assert table.machine == machine(llm.manifest)
    assert (table.costs().draft(8) > 0) == (pair == "close")
    assert_all_free(llm.loop)
    assert llm.generate(["the theme"], SamplingParams(8))[0].token_ids == before


@pytest.mark.parametrize(("slots", "sizes"), [(1, SIZES[:9]), (3, SIZES[:13])])
def test_where_each_slot_has_its_own_blocks_a_request_brings_more_tokens(slots, sizes, open_llm, networks, tmp_path):
    """An engine with a cache a slot takes each slot once a call, in its own blocks."""
    llm = open_llm("model", "autoregressive", slots)
    loop = llm.loop
    state = Slots(slots, loop.state.context, loop.state.reserve)
    blocks = blocks_for(state.context + state.reserve)
    engines = {}
    for name, role in roles_of("model", networks).items():
        export_native(role, tmp_path / f"{name}.onnx", "fp32", Layout(1, blocks, LIMITS["prefill_chunk"]).rows)
        engines[name] = OnnxRuntimeEngine(tmp_path / f"{name}.onnx", slots, blocks, threads=1)
    loop.target, loop.state = engines["target"], state
    loop.drafter = EngineDrafter(engines["draft"], state, LIMITS["prefill_chunk"])
    table = measure(loop, llm.manifest, seconds=0.05)
    check(table, list(sizes))
    assert table.draft.sizes == list(sizes)
    assert_all_free(loop)
