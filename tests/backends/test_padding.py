"""Passes padded to few sizes: what is asked for stays what it was, and nobody's rows are touched."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_trt.backends.openvino.engine import DRAFT_SIZES, MIN_BF16_TOKENS, PREPARED, TARGET_SIZES, OpenVINOEngine
from echo_trt.backends.openvino.sequence_split import pad_requests
from echo_trt.speculation.arrays import next_size
from echo_trt.speculation.pack import BLOCK, ForwardBatch, pack
from echo_trt.speculation.super_tree import SuperTree, ancestor_mask


def trees(sizes: list[int], past: int, table: np.ndarray) -> ForwardBatch:
    """Return a fan of ``sizes`` nodes, root included, for each request."""
    forest = SuperTree.from_roots(np.arange(len(sizes)) + 3)
    for request, size in enumerate(sizes):
        forest.add(np.full(size - 1, request), np.arange(size - 1) + 9, np.zeros(size - 1))
    forest, _ = forest.sorted_by_request(np.arange(len(forest)))
    pasts, rows = np.full(len(sizes), past), np.arange(len(forest))
    return pack(forest.token, past + forest.depth, pasts, forest.sizes, table, rows, ancestor_mask(forest))


@pytest.fixture(scope="module")
def two_engines(bundle_of):
    return [OpenVINOEngine(bundle_of("lookup") / "target.onnx", "fp32", 6) for _ in range(2)]


@pytest.fixture
def engines(two_engines):
    """Two engines of one target, whose pools are empty."""
    for engine in two_engines:
        engine._pool[:] = 0
    return two_engines


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), size=st.integers(1, 60))
def test_a_padded_call_has_its_size_and_goes_on_as_it_was(sizes, size):
    table = np.arange(len(sizes))[:, None]
    call = trees(sizes, 3, table)
    got = pad_requests(call, size, 77)
    count, requests = sum(sizes), len(sizes)
    assert len(got.token_ids) == len(got.positions) == len(got.logit_rows) == max(count, size)
    for name in ("token_ids", "positions", "logit_rows", "tree_mask", "block_indices"):
        before = getattr(call, name)
        assert (getattr(got, name)[: len(before)] == before).all()
        assert getattr(got, name).dtype == before.dtype
    assert (np.diff(got.seq_begins)[requests:] == 1).all()
    assert (got.seq_begins[: requests + 1] == call.seq_begins).all()
    assert (got.block_indices[len(call.block_indices) :] == 77).all()
    assert len(got.past_lens) + 1 == len(got.seq_begins) == len(got.block_begins) == len(got.tree_mask_begins)
    assert got.logit_rows.max() < len(got.token_ids)


@pytest.mark.parametrize("tokens", [PREPARED - 1, PREPARED + 1, PREPARED + 16])
def test_a_draft_catches_up_in_passes_of_few_sizes(tokens, bundle_of):
    """With the scores of its own size, and no row that is asked for beside."""
    engine = OpenVINOEngine(bundle_of("eagle3") / "draft.onnx", "fp32", 6)
    inputs = {i.get_any_name(): i.partial_shape for i in engine._request.get_compiled_model().inputs}
    width = {name: shape[1].get_length() for name, shape in inputs.items() if len(shape) == 2}
    rng, sizes, feed = np.random.default_rng(0), [], engine._feed
    engine._feed = lambda inputs: (sizes.append(len(inputs["token_ids"])), feed(inputs))
    rows = {"features": rng.normal(size=(tokens, width["features"])).astype(np.float32)}
    rows["hidden"] = np.zeros((0, width["hidden"]), np.float32)
    count, table = np.arange(tokens), np.array([[2, 0, 4]])
    call = pack(count % 9, count, np.zeros(1, np.int64), np.array([tokens]), table, count[-1:])
    got = {name: np.array(values) for name, values in engine.run(call, **rows).items()}
    parts = [slice(0, 20), slice(20, tokens)]  # both of few tokens
    for part in parts:
        given = {"features": rows["features"][part], "hidden": rows["hidden"]}
        past, size = np.array([part.start]), np.array([part.stop - part.start])
        call = pack(count[part] % 9, count[part], past, size, table, size - 1)
        expected = {name: np.array(values) for name, values in engine.run(call, **given).items()}
    assert sizes == [next_size(DRAFT_SIZES, tokens), 20, tokens - 20]
    assert len(got["scores"]) == 1
    np.testing.assert_allclose(got["scores"], expected["scores"], atol=1e-4)
    np.testing.assert_allclose(got["state"][-1], expected["state"][-1], atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_a_pass_of_few_tokens_is_padded_where_that_is_faster(tokens, engines, monkeypatch):
    engine = engines[0]
    assert engine.sizes == (1, *TARGET_SIZES)
    count = np.arange(tokens)
    call = pack(count + 3, 0 * count, 0 * count, np.ones(tokens, np.int64), count[:, None], count)
    got = []
    for minimum in (1, MIN_BF16_TOKENS):
        monkeypatch.setattr(engine, "sizes", (minimum, *TARGET_SIZES))
        got.append({name: np.array(values) for name, values in engine.run(call).items()})
    for name, values in got[1].items():
        assert len(values) == tokens
        np.testing.assert_allclose(values, got[0][name], atol=1e-4)
    assert engine._pool[:, 6].any() == (tokens < MIN_BF16_TOKENS)


@pytest.mark.parametrize("sizes", [[3], [1, 6, 2], [5, 5, 5, 4]])
def test_an_engine_pads_without_a_trace(sizes, engines, monkeypatch):
    past, blocks = 5, 6
    monkeypatch.setattr(engines[1], "sizes", (1,))  # as it comes
    table = np.array([4, 0, 3, 1])[: len(sizes), None]
    prompts = pack(
        np.tile(np.arange(past), len(sizes)),
        np.tile(np.arange(past), len(sizes)),
        np.zeros(len(sizes), np.int64),
        np.full(len(sizes), past),
        table,
        np.zeros(1),
    )
    call = trees(sizes, past, table)
    assert len(call.token_ids) not in TARGET_SIZES
    got = []
    for engine in engines:
        engine.run(prompts)
        outputs = engine.run(call)
        got.append({name: np.array(values) for name, values in outputs.items()})
    for name, values in got[0].items():
        assert len(values) == len(got[1][name]) == sum(sizes)
        np.testing.assert_allclose(values, got[1][name], atol=1e-4)
    filled, plain = (engine._pool[:, :blocks] for engine in engines)
    np.testing.assert_allclose(filled, plain, atol=1e-5)
    assert engines[0]._pool.shape[1] == blocks + 1
    assert engines[0]._pool[:, blocks].any()
    assert past + max(sizes) < BLOCK


@pytest.mark.parametrize("sizes", [[3], [1, 1], [1, 4, 2]])
@pytest.mark.parametrize("size", [0, 5, 8, 9])
def test_a_call_says_what_it_is_padded_to(sizes, size, engines, monkeypatch):
    """Passes that repeat the size of others: trees and single tokens alike."""
    engine, fed, feed = engines[0], [], engines[0]._feed
    monkeypatch.setattr(engine, "_feed", lambda inputs: (fed.append(len(inputs["token_ids"])), feed(inputs)))
    call = trees(sizes, 0, np.array([4, 0, 3])[: len(sizes), None])
    usual, got = (engine.run(each)["logits"].copy() for each in (call, call._replace(padded_to=size)))
    count = sum(sizes)
    own = count if sizes == [1, 1] else next_size(TARGET_SIZES, count)
    assert fed == [own, max(own, size)]
    assert len(got) == count
    np.testing.assert_allclose(got, usual, atol=1e-4)
