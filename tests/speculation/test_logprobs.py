"""Log-probabilities against scipy's, the best tokens against a sort of each row."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax

from echo_trt.speculation.sampling.logprobs import best_tokens, log_normalisers


@st.composite
def rows(draw) -> tuple[np.ndarray, np.ndarray]:
    """Logits with many ties, and how many of each row are asked for."""
    n, vocab = draw(st.integers(0, 4)), draw(st.integers(1, 9) | st.integers(90, 140))
    values = st.sampled_from([0.0, 1.0, -2.0, 30.0]) | st.floats(-90, 90, width=16, allow_subnormal=False)
    count = np.array(draw(st.lists(st.integers(0, 12), min_size=n, max_size=n)), np.int64)
    return draw(arrays(np.float32, (n, vocab), elements=values)), count


@given(rows())
def test_best_tokens_by_a_sort_of_each_row(case):
    logits, count = case
    row, token = best_tokens(logits, count)
    want = []
    for index, (values, maximum) in enumerate(zip(logits.tolist(), count.tolist(), strict=True)):
        best_first = sorted(range(len(values)), key=lambda t: (-values[t], t))
        want += [(index, t) for t in best_first[:maximum]]
    assert list(zip(row.tolist(), token.tolist(), strict=True)) == want


@given(rows())
def test_normalisers_by_scipy(case):
    logits, _ = case
    got = logits - log_normalisers(logits)[:, None]
    np.testing.assert_allclose(got, log_softmax(logits.astype(np.float64), axis=1), rtol=1e-6, atol=1e-5)
