"""Sampling: the generator against its published vectors, draws against a race in plain Python and by counting."""

import math
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import log_softmax
from scipy.stats import chisquare, kstest

from echo_trt.speculation.sampling.draw import limited, philox4x32, sample, uniform
from echo_trt.speculation.sampling.logprobs import best_tokens, log_normalisers
from echo_trt.speculation.sampling.penalties import penalise

# -- the generator ----------------------------------------------------------------------------------------------

# Random123's kat_vectors: philox4x32, 10 rounds.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def philox(counter: list[int], key: int) -> list[int]:
    return philox4x32(np.array([counter], np.uint64).T.copy(), np.uint64(key))[:, 0].tolist()


@pytest.mark.parametrize("case", KNOWN_ANSWERS)
def test_philox_known_answers(case):
    counter, (low, high), want = ([int(word, 16) for word in column.split()] for column in case)
    assert philox(counter, high << 32 | low) == want


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(0, 300_000))
def test_a_uniform_is_52_bits_of_philox_keyed_by_the_seed(seed, index, token):
    """In blocks of 512 tokens: four words of each of 128 calls, and as many again for the lower bits."""
    block, word, lane = token // 512, token // 128 % 4, token % 128
    high, low = (philox([index % 2**32, index >> 32, block * 128 + lane, half], seed)[word] for half in (0, 1))
    value = uniform(seed, index, token)
    assert value == ((high << 20 | low >> 12) + 0.5) / 2**52
    assert 0 < value < 1


@pytest.mark.parametrize("over", ["seeds", "places", "tokens"])
def test_uniforms_are_uniform_and_unrelated_to_their_neighbours(over):
    of = {
        "seeds": lambda i: uniform(i, 1234, 77),
        "places": lambda i: uniform(1234, i, 77),
        "tokens": lambda i: uniform(1234, 77, i),
    }
    values = np.array([of[over](i) for i in range(20_000)])
    assert len(np.unique(values)) == len(values)
    assert kstest(values, "uniform").pvalue > 0.01
    pairs = (values[:-1] * 8).astype(int) * 8 + (values[1:] * 8).astype(int)
    assert chisquare(np.bincount(pairs[::2], minlength=64)).pvalue > 0.01


# -- the distribution -------------------------------------------------------------------------------------------


def processed_row(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> list[float]:
    """Probabilities in words: temperature, then the top_k best, then the nucleus; of tokens that tie the first ones."""
    scaled = (logits - logits.max()) / np.float32(temperature)
    probs = (np.exp(scaled) / np.exp(scaled).sum()).tolist()
    best_first = sorted(range(len(probs)), key=lambda token: (-logits[token], token))
    if 0 < top_k < len(probs):
        best_first = best_first[:top_k]
    if top_p < 1:
        above = list(accumulate((probs[token] for token in best_first), initial=0.0))
        best_first = [token for token, before in zip(best_first, above, strict=False) if before < top_p * above[-1]]
    kept = set(best_first)
    return [p if token in kept else 0.0 for token, p in enumerate(probs)]


@st.composite
def rows(draw) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Logits of a few rows, with many ties, and settings of each row."""
    n, vocab = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    values = st.one_of(
        st.sampled_from([0.0, 1.0, 2.0, -1.0, 30.0, -np.inf]), st.floats(-8, 8, width=16, allow_subnormal=False)
    )
    logits = draw(arrays(np.float32, (n, vocab), elements=values))
    logits[:, draw(st.integers(0, vocab - 1))] = 2.0  # a row of nothing but -inf is no distribution
    of = lambda strategy: np.array(draw(st.lists(strategy, min_size=n, max_size=n)))  # noqa: E731
    temperature = of(st.sampled_from([0.05, 0.5, 1.0, 1.7, 100.0]))
    top_k = of(st.integers(0, vocab + 1))
    top_p = of(st.one_of(st.sampled_from([1.0, 0.5, 0.25, 0.9, 1e-6]), st.floats(0.01, 1)))
    return logits, temperature, top_k, top_p


@settings(max_examples=3 * settings().max_examples)  # ties are rare
@given(rows())
def test_limits_row_by_row(case):
    for logits, temperature, top_k, top_p in zip(*case, strict=True):
        got = limited(logits, temperature, top_k, top_p)
        want = np.array(processed_row(logits, temperature, top_k, top_p)) > 0
        possible = np.exp((logits - logits.max()) / np.float32(temperature)) > 0  # the rest is no matter
        np.testing.assert_array_equal(np.isfinite(got)[possible], want[possible])
        np.testing.assert_array_equal(got[np.isfinite(got)], logits[np.isfinite(got)])


@given(rows(), st.floats(0, 1))
def test_min_p_keeps_tokens_with_that_share_of_the_best_one_s_and_the_other_limits_see_those_alone(case, min_p):
    for logits, temperature, top_k, top_p in zip(*case, strict=True):
        weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
        if (np.abs(weights - min_p) < 1e-3 * min_p).any():
            continue  # within rounding of the limit
        left = np.where(weights >= min_p, logits, np.float32(-np.inf))
        assert limited(logits, temperature, 0, 1.0, min_p).tolist() == left.tolist()
        got, want = limited(logits, temperature, top_k, top_p, min_p), limited(left, temperature, top_k, top_p)
        assert got.tolist() == want.tolist()


def raced(logits: np.ndarray, temperature: float, top_k: int, top_p: float, seed: int, index: int) -> int:
    """Return the draw in words: of the tokens that are left, the one with the largest logit / temperature - log E."""
    if temperature <= 1e-6:
        return int(logits.argmax())
    kept = np.flatnonzero(np.isfinite(limited(logits, temperature, top_k, top_p)))
    best = float(logits.max())
    noise = {t: -math.log(-math.log1p(-uniform(seed, index, t))) for t in kept.tolist()}
    return max(noise, key=lambda t: ((float(logits[t]) - best) * (1 / temperature) + noise[t], -t))


@given(rows(), st.integers(0, 2**63 - 1), st.data())
def test_a_rows_token_is_its_own_race_whatever_the_rows_beside_it(case, seed, data):
    count = len(case[0])
    temperature = case[1] * np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    case = (case[0], temperature, *case[2:], np.full(count, seed), np.arange(count) * 1000)
    want = [raced(*(array[i].tolist() if array.ndim == 1 else array[i] for array in case)) for i in range(count)]
    assert sample(*case).tolist() == want
    assert [sample(*(array[i : i + 1] for array in case))[0] for i in range(count)] == want


@pytest.mark.parametrize("size", [1, 512, 513, 49_152])
@pytest.mark.parametrize("temperature", [1e-5, 0.6, 100.0])
def test_no_winner_is_passed_over(size, temperature):
    """Blocks that are skipped, and tokens whose logarithm is not taken, could not have won."""
    rng = np.random.default_rng(size)
    repeats = 3 if size > 2000 else 15
    for index in range(repeats):
        logits = (rng.normal(-40, rng.choice([0.1, 3, 30]), size)).astype(np.float32)
        logits[rng.random(size) < 0.1] = -np.inf
        logits[rng.integers(size)] = -35
        settings = (np.array([value]) for value in (temperature, 0, 1.0, 9, index))
        assert sample(logits[None], *settings)[0] == raced(logits, temperature, 0, 1.0, 9, index)


def one_row(*logits: float) -> np.ndarray:
    return np.array([logits], np.float32)


def drawn(logits: np.ndarray, seed: int, temperature=1.0, top_k=0, top_p=1.0) -> int:
    return int(sample(logits, *(np.array([value]) for value in (temperature, top_k, top_p, seed, 3)))[0])


def test_no_draw_is_a_token_without_probability():
    logits = one_row(-np.inf, 1, -np.inf, 1, -np.inf)
    assert {drawn(logits, seed) for seed in range(50)} == {1, 3}
    assert {drawn(one_row(0, 3, 2, 1), seed, top_k=2) for seed in range(50)} == {1, 2}
    assert [drawn(one_row(0, 3, 2, 1), seed, top_k=-1) for seed in range(50)] == [
        drawn(one_row(0, 3, 2, 1), seed, top_k=0) for seed in range(50)
    ]
    assert {drawn(one_row(0, 3, 2, 1), seed, top_p=0.5) for seed in range(50)} == {1}


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-300}, {"temperature": 1e-40}], ids=str
)
def test_greedy_settings_take_the_first_of_tokens_that_tie(settings):
    for row in (one_row(-3, 20, 20, 20), one_row(-3, 20, 19, 0)):
        assert {drawn(row, seed, **settings) for seed in range(20)} == {1}


def test_rows_that_are_no_distribution_have_a_token_all_the_same():
    rows = one_row(np.nan, np.nan, -np.nan), one_row(-np.inf, -np.inf), one_row(0, np.inf, 1), one_row(1, np.nan)
    for row in (*rows, one_row(*[np.nan] * 300), one_row(*[-np.inf] * 300)):
        for limits in ({}, {"top_k": 2}, {"top_p": 0.5}):
            with np.errstate(invalid="ignore"):
                assert drawn(row, 0, **limits) == row[0].argmax()


@pytest.mark.parametrize("repetition", [1e-300, 1e-6, 100.0])
def test_extreme_penalties_leave_numbers(repetition):
    row, token = np.zeros(3, np.int64), np.arange(3)
    factors = np.array([[repetition], [0.0], [0.0]])
    assert np.isfinite(penalise(one_row(30.0, -30.0, 0.0), row, token, np.zeros(3, bool), *factors)).all()


@pytest.mark.parametrize(("top_p", "spread"), [(0.3, 2.0), (0.99, 0.1), (0.9, 6.0)])
def test_a_large_vocabulary_by_row(top_p, spread):
    logits = np.random.default_rng(3).normal(0, spread, 5000).astype(np.float32)
    for temperature, top_k in ((1.0, 0), (0.5, 50), (1.5, 4999)):
        want = np.flatnonzero(processed_row(logits, temperature, top_k, top_p))
        got = np.flatnonzero(np.isfinite(limited(logits, temperature, top_k, top_p)))
        assert len(np.setxor1d(want, got)) <= 1  # float32 sums may differ at the limit


# -- by counting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [(1.0, 0, 1.0), (0.7, 4, 1.0), (1.4, 0, 0.8), (1.1, 5, 0.9)], ids=str)
@pytest.mark.parametrize("row", range(2))
def test_draws_follow_the_distribution(row, sampler):
    """Seeds and places in turn. Trees draw the same: test_accept.py, and by place and seed alone."""
    draws, logits = 6_000, np.random.default_rng(11).normal(0, 1.2, (7, 7)).astype(np.float32)[row]
    settings = (np.full(draws, value) for value in sampler)
    tokens = sample(np.tile(logits, (draws, 1)), *settings, np.arange(draws), np.arange(draws) % 3)
    counts, wanted = np.bincount(tokens, minlength=7), np.array(processed_row(logits, *sampler))
    possible = wanted > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        assert chisquare(counts[possible], draws * wanted[possible] / wanted.sum()).pvalue > 0.001


# -- log-probabilities -----------------------------------------------------------------------------------------------


@st.composite
def counted_rows(draw) -> tuple[np.ndarray, np.ndarray]:
    """Logits with many ties, and how many of each row are asked for."""
    n, vocab = draw(st.integers(0, 4)), draw(st.integers(1, 9) | st.integers(90, 140))
    values = st.sampled_from([0.0, 1.0, -2.0, 30.0]) | st.floats(-90, 90, width=16, allow_subnormal=False)
    count = np.array(draw(st.lists(st.integers(0, 12), min_size=n, max_size=n)), np.int64)
    return draw(arrays(np.float32, (n, vocab), elements=values)), count


@given(counted_rows())
def test_best_tokens_by_a_sort_of_each_row(case):
    logits, count = case
    row, token = best_tokens(logits, count)
    want = []
    for index, (values, maximum) in enumerate(zip(logits.tolist(), count.tolist(), strict=True)):
        best_first = sorted(range(len(values)), key=lambda t: (-values[t], t))
        want += [(index, t) for t in best_first[:maximum]]
    assert list(zip(row.tolist(), token.tolist(), strict=True)) == want


@given(counted_rows())
def test_normalisers_by_scipy(case):
    logits, _ = case
    got = logits - log_normalisers(logits)[:, None]
    np.testing.assert_allclose(got, log_softmax(logits.astype(np.float64), axis=1), rtol=1e-6, atol=1e-5)
