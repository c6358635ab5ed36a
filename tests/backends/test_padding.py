"""Passes padded to few sizes: what is asked for stays what it was, and nobody's rows are touched."""

from __future__ import annotations

import numpy as np
import pytest

from echo_trt.backends.openvino.engine import DRAFT_SIZES, PREPARED, TARGET_SIZES, OpenVINOEngine
from echo_trt.speculation.arrays import next_size
from echo_trt.speculation.pack import ForwardBatch, pack
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
def engine(bundle_of):
    return OpenVINOEngine(bundle_of("lookup") / "target.onnx", "fp32", 6)


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


@pytest.mark.parametrize("sizes", [[3], [1, 1], [1, 4, 2]])
@pytest.mark.parametrize("size", [0, 5, 8, 9])
def test_a_call_says_what_it_is_padded_to(sizes, size, engine, monkeypatch):
    """Passes that repeat the size of others: trees and single tokens alike."""
    fed, feed = [], engine._feed
    monkeypatch.setattr(engine, "_feed", lambda inputs: (fed.append(len(inputs["token_ids"])), feed(inputs)))
    call = trees(sizes, 0, np.array([4, 0, 3])[: len(sizes), None])
    usual, got = (engine.run(each)["logits"].copy() for each in (call, call._replace(padded_to=size)))
    count = sum(sizes)
    own = count if sizes == [1, 1] else next_size(TARGET_SIZES, count)
    assert fed == [own, max(own, size)]
    assert len(got) == count
    np.testing.assert_allclose(got, usual, atol=1e-4)
