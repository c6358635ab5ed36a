"""Penalties at tree nodes against the same in words: each node's own text, counted token by token."""

from collections import Counter

import numpy as np
import pytest
from forests import path_to, super_trees
from hypothesis import given
from hypothesis import strategies as st

from echo_trt.speculation.sampling.penalties import penalise, tokens_above

VOCAB = 6
texts = st.lists(st.integers(0, VOCAB - 1), max_size=8)
factors = st.sampled_from([1.0, 1.3, 0.5, 2.0, 1e-12, 100.0])
terms = st.sampled_from([0.0, 0.7, -0.7, 2.0, -2.0])


def penalised_row(logits, prompt, generated, repetition, presence, frequency) -> list[float]:
    """One row, in plain Python: repetition over everything that was said, then the others over what was generated."""
    counts, row = Counter(generated), []
    for token, logit in enumerate(logits.tolist()):
        if token in prompt or token in counts:
            factor = max(repetition, 1e-6)
            logit = logit / factor if logit > 0 else logit * factor
        row.append(logit - presence * (counts[token] > 0) - frequency * counts[token])
    return row


@given(super_trees(max_requests=3, max_nodes=12), st.data())
def test_every_node_by_its_own_text(tree, data):
    tree.token %= VOCAB
    rows = data.draw(st.permutations(range(len(tree))))[: data.draw(st.integers(0, len(tree)))]
    nodes, logits = np.array(rows, np.int64), np.random.default_rng(1).normal(0, 3, (len(rows), VOCAB))
    logits = logits.astype(np.float32)
    earlier = [(data.draw(texts), data.draw(texts)) for _ in range(tree.num_requests)]
    settings = [(data.draw(factors), data.draw(terms), data.draw(terms)) for _ in range(tree.num_requests)]

    want, history = [], []
    for row, node in enumerate(rows):
        prompt, generated = earlier[tree.request[node]]
        path = [int(tree.token[n]) for n in path_to(tree, node)[1:]]
        want.append(penalised_row(logits[row], prompt, generated + path, *settings[tree.request[node]]))
        history += [(row, token, False) for token in prompt] + [(row, token, True) for token in generated]
    below_row, below = tokens_above(tree, nodes)
    history += [(row, token, True) for row, token in zip(below_row.tolist(), below.tolist(), strict=True)]
    history = data.draw(st.permutations(history))

    row, token, generated = np.array(history, np.int64).reshape(-1, 3).T
    each = np.array(settings)[tree.request[nodes]].reshape(-1, 3).T
    before = logits.copy()
    got = penalise(logits, row, token, generated.astype(bool), *each)
    np.testing.assert_allclose(got, np.array(want).reshape(got.shape), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(logits, before)
    assert got.dtype == np.float32


@pytest.mark.parametrize("repetition", [1e-300, 1e-6, 100.0])
def test_extreme_factors_leave_numbers(repetition):
    logits = np.array([[30.0, -30.0, 0.0]], np.float32)
    row, token = np.zeros(3, np.int64), np.arange(3)
    got = penalise(logits, row, token, np.zeros(3, bool), *np.array([[repetition], [0.0], [0.0]]))
    assert np.isfinite(got).all()
