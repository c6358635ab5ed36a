"""What passes cost, measured on tiny pairs."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from engine.driving import assert_all_free

from echo_trt.backends.base import Engine
from echo_trt.bundle.costs import CostTable
from echo_trt.bundle.manifest import read_manifest
from echo_trt.engine.assemble import Networks
from echo_trt.engine.batch import InputBatch
from echo_trt.engine.measure import (
    SIZES,
    SMALL_BATCH_SIZES,
    disturbance,
    machine,
    measure,
    without_speculation,
)
from echo_trt.engine.params import SamplingParams
from echo_trt.speculation.drafts import Pass
from echo_trt.speculation.goodput.learner.costs import correct
from echo_trt.speculation.goodput.model.costs import Curve
from echo_trt.speculation.goodput.settings import GoodputTuning
from echo_trt_lab.simulation.machines import machine_named


def check(table, sizes):
    """``sizes``: those measured in any case, and those that flat curves go on to."""
    usual, further = sizes
    for curve in (table.target, table.draft):
        assert curve.sizes[: len(usual)] == usual or curve.seconds == [0.0]
        assert set(curve.sizes) <= {*usual, *further}
    assert table.target.sizes == (usual + further)[: len(table.target.sizes)]
    for curve in (table.target, table.draft):
        seconds = np.array(curve.seconds)
        assert (np.diff(curve.sizes) > 0).all()
        assert (np.diff(seconds) >= 0).all()
        assert curve.per_context >= 0
    assert min(table.target.seconds) > 0
    costs = table.costs()
    assert 0 < costs.target(1) <= costs.target(16) <= costs.target(100) < 10
    assert table.hinge.t_ar > 0
    assert 1 <= table.hinge.k_max < table.target.sizes[-1]


@pytest.mark.parametrize("pair", ["close", "lookup"])
def test_a_measured_table_is_positive_and_monotone(pair, open_llm):
    llm = open_llm(pair, "autoregressive", 3)
    turn = [{"role": "user", "content": "the theme"}]
    before = llm.chat(turn, SamplingParams(8))[0].token_ids
    table = measure(llm.networks, seconds=0.05)
    possible = [n for n in SIZES if n <= 3 * llm.loop.batch.reserve]
    check(table, ([n for n in possible if n <= SMALL_BATCH_SIZES], [n for n in possible if n > SMALL_BATCH_SIZES]))
    assert table.machine == machine(llm.manifest)
    assert (table.costs().draft(8) > 0) == (pair == "close")
    assert_all_free(llm.loop)
    assert llm.chat(turn, SamplingParams(8))[0].token_ids == before


class Clocked:
    """An engine whose passes take what ``curve`` says, on ``clock``."""

    sizes = ()
    longest = Engine.longest

    def __init__(self, curve, clock, num_blocks):
        self.curve, self.clock, self.num_blocks = curve, clock, num_blocks

    def run(self, call):
        self.clock.now += self.curve(len(call.token_ids), int(call.past_lens.sum()))


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """Return the seconds that passes of a Clocked engine take, instead of the machine's."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("echo_trt.engine.measure.time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture
def measured(bundle_of) -> Callable[..., CostTable]:
    """target, slots, context and reserve -> what is measured of a target without a draft."""
    manifest = read_manifest(bundle_of("lookup"))

    def get(target: Clocked, *slots: int) -> CostTable:
        return measure(Networks(manifest, None, InputBatch(*slots, 8192), target, None, None))

    return get


@pytest.mark.parametrize("count", [8, 256])
def test_sizes_go_on_for_as_long_as_passes_hardly_take_longer(count, measured, clock):
    """On an H100 as on two cores: the knee is within the table, and so is enough of what is behind it."""
    truth = machine_named("h100-qwen3-8b", None)
    target = Clocked(truth.costs().target, clock, 8192)
    table = measured(target, count, 4096, 128)
    curve = table.costs().target
    for tokens in (1, 100, 150, 200, 300, 500, 1000, 2000):
        assert curve(tokens) == pytest.approx(target.curve(tokens), rel=0.03 if tokens <= 500 else 0.2)
    assert 0.8 * truth.k_max < table.hinge.k_max < 1.4 * truth.k_max
    assert table.target.sizes[-1] == 768


class Capturing(Clocked):
    """A GPU's engine: the first pass of a size takes ``capture`` seconds more, and every pass is asked for a size."""

    def __init__(self, curve, clock, num_blocks, capture):
        super().__init__(curve, clock, num_blocks)
        self.capture, self.captured = capture, set()

    def run(self, call):
        size = len(call.token_ids), len(call.past_lens), len(call.block_indices)
        if size not in self.captured:
            self.captured.add(size)
            self.clock.now += self.capture
        super().run(call)


@pytest.mark.parametrize(("count", "capture"), [(8, 0.05), (64, 5.0)])
def test_costs_have_no_part_of_a_graphs_capture(count, capture, measured, clock):
    truth = machine_named("h100-qwen3-8b", None)
    target = Capturing(truth.costs().target, clock, 8192, capture)
    table = measured(target, count, 4096, 128)
    curve = table.costs().target
    for tokens in (1, 2, 8, 30, 100, 200, 300, 500):
        assert curve(tokens) == pytest.approx(target.curve(tokens), rel=0.03)
    assert 0.8 * truth.k_max < table.hinge.k_max < 1.4 * truth.k_max
    assert table.change == 0


class Restless(Clocked):
    """Now and then another process takes a part of the machine for some tenths of a second."""

    def __init__(self, curve, clock, num_blocks, seed):
        super().__init__(curve, clock, num_blocks)
        self.rng, self.until, self.times = np.random.default_rng(seed), 0.0, 1.0

    def run(self, call):
        begin = self.clock.now
        if begin >= self.until:
            self.until = begin + self.rng.exponential(0.4)
            self.times = self.rng.uniform(1.3, 2.0) if self.rng.random() < 0.3 else 1.0
        super().run(call)
        self.clock.now = begin + (self.clock.now - begin) * self.times * self.rng.lognormal(0, 0.05)


def test_beside_other_work_few_tokens_are_still_told_from_some_more_within_ten_seconds(measured, clock):
    """What one token takes and what 4, 6 or 8 do decides how much is speculated. Of a CPU without AVX-512."""
    truth, small, wrong = Curve([1, 4, 6, 16, 128], [0.018, 0.021, 0.033, 0.052, 0.27]), (1, 2, 3, 4, 6, 8), []
    for seed in range(8):
        begin = clock.now
        target = Restless(truth, clock, 8192, seed)
        curve = measured(target, 64, 2048, 64).costs()
        assert clock.now - begin < 10
        times = np.array([curve.target(n) / truth(n) for n in small])
        wrong.append(times / np.median(times) - 1)
    assert np.sqrt(np.square(wrong).mean()) < 0.11


def test_a_measurement_that_other_work_disturbs_says_so_and_leaves_no_speculation(measured, clock):
    """A pass over one token is timed between the bursts of other work, and all others in them."""
    target = Clocked(lambda tokens, _: 0.02 if tokens == 1 else 0.6 + 1e-3 * tokens, clock, 8192)
    table = measured(target, 1, 2048, 64)
    assert disturbance(table) == "a pass over 2 tokens took 30 times as long as one over 1"
    assert table.hinge.k_max == 1
    safe = without_speculation(table)
    assert disturbance(safe) == ""
    assert safe.hinge.k_max == 1
    curve = safe.costs().target
    base = curve.base(64)
    for _ in range(500):  # and what plain decoding really takes does not tempt it
        assert (base[2:65] >= 1.99 * base[1]).all()
        assert (np.diff(base[1:65]) >= 0.99 * base[1]).all()
        correct(curve, Pass(1, 100, 0.02), GoodputTuning())
        base = curve.base(64)
