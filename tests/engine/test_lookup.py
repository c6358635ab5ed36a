"""Prompt lookup: what followed the latest of the longest matches, against a search that reads the text."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_trt.engine.batch import InputBatch
from echo_trt.engine.drafters.lookup import LookupDrafter
from echo_trt.speculation.super_tree import SuperTree

ACCEPTANCE = [0.2, 0.4, 0.6, 0.75]
CONTEXT = 30
#: Few different tokens, so that texts repeat themselves.
texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=CONTEXT), min_size=1, max_size=4)


def drafter_over(texts: list[list[int]], min_match: int) -> LookupDrafter:
    batch = InputBatch(len(texts), CONTEXT, CONTEXT, 1)
    batch.tokens[:] = 1  # of earlier requests: not to be read
    for slot, text in enumerate(texts):
        batch.tokens[slot, : len(text)], batch.length[slot] = text, len(text)
    return LookupDrafter(batch, min_match, ACCEPTANCE)


def naive(text: list[int], min_match: int) -> tuple[int, list[int]]:
    """How many tokens match, and what followed them there."""
    for size in range(min(len(ACCEPTANCE), len(text) - 1), min_match - 1, -1):
        for begin in range(len(text) - size - 1, -1, -1):
            if text[begin : begin + size] == text[len(text) - size :]:
                return size, text[begin + size :]
    return 0, []


@given(texts, st.integers(1, len(ACCEPTANCE)), st.randoms())
def test_chains_copy_the_latest_longest_match(texts, min_match, random):
    drafter = drafter_over(texts, min_match)
    slots = random.sample(range(len(texts)), len(texts))
    tree = SuperTree.from_roots(np.array([texts[slot][-1] for slot in slots]))
    draft = drafter.begin(np.array(slots))
    log_q, tokens = draft.expand_roots(np.arange(len(slots)))
    nodes = np.arange(len(slots))
    for depth in range(CONTEXT):
        assert log_q.shape == tokens.shape == (len(nodes), 1)
        for node, score, token in zip(nodes, log_q[:, 0], tokens[:, 0], strict=True):
            matched, follows = naive(texts[slots[tree.request[node]]], min_match)
            if follows:
                assert score == pytest.approx(np.log(ACCEPTANCE[matched - 1]))
                assert token == follows[depth % len(follows)]
            else:
                assert score == -np.inf
        exists = log_q[:, 0] > -np.inf
        if not exists.any():
            break
        nodes = tree.add(nodes[exists], tokens[exists, 0], log_q[exists, 0])
        log_q, tokens = draft.expand(tree, nodes)
    assert not (log_q > -np.inf).any()  # a chain is no longer than a verification
