"""Sampling: the generator against its published vectors, the distribution against a row-by-row one and by counting."""

from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import chisquare, kstest

from echo_trt.decoding.accept import accept
from echo_trt.decoding.sampling import philox4x32, processed_probabilities, sample, uniforms
from echo_trt.decoding.super_tree import SuperTree

# -- the generator -------------------------------------------------------------------------------------------------

# Random123's kat_vectors: philox4x32, 10 rounds.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def test_philox_known_answers():
    counter, key, want = (
        np.array([[int(word, 16) for word in row[column].split()] for row in KNOWN_ANSWERS], np.uint64).T
        for column in range(3)
    )
    np.testing.assert_array_equal(philox4x32(counter, key), want)


def test_a_uniform_is_53_bits_of_philox_keyed_by_the_seed_and_counted_by_the_position():
    seed, position = (0x299F31D0 << 32) | 0xA4093822, (0x85A308D3 << 32) | 0x243F6A88
    counter, key = [0x243F6A88, 0x85A308D3, 0, 0], [0xA4093822, 0x299F31D0]
    high, low, _, _ = philox4x32(np.array([counter], np.uint64).T, np.array([key], np.uint64).T)[:, 0].tolist()
    want = ((high << 32 | low) >> 11) / 2**53
    assert uniforms(np.array([seed], np.uint64), np.array([position], np.uint64)).tolist() == [want]


@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**40)), min_size=1, max_size=20))
def test_uniforms_are_reproducible_and_inside_the_unit_interval(keys):
    seeds, positions = np.array(keys, np.int64).T
    values = uniforms(seeds, positions)
    assert ((values >= 0) & (values < 1)).all()
    alone = [uniforms(seeds[i : i + 1], positions[i : i + 1])[0] for i in range(len(keys))]
    assert values.tolist() == alone


@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_uniforms_are_uniform_and_unrelated_to_their_neighbours(over):
    many, one = np.arange(20_000), np.full(20_000, 1234)
    values = uniforms(many, one) if over == "seeds" else uniforms(one, many)
    assert kstest(values, "uniform").pvalue > 0.01
    pairs = (values[:-1] * 8).astype(int) * 8 + (values[1:] * 8).astype(int)
    assert chisquare(np.bincount(pairs[::2], minlength=64)).pvalue > 0.01


# -- the distribution ----------------------------------------------------------------------------------------------


def processed_row(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> list[float]:
    """The same, in words: temperature, then top-k with everything that ties with the last, then the nucleus."""
    scaled = (logits - logits.max()) / np.float32(temperature)
    probs = (np.exp(scaled) / np.exp(scaled).sum()).tolist()
    if 0 < top_k < len(probs):
        last = sorted(probs, reverse=True)[top_k - 1]
        probs = [p if p >= last else 0.0 for p in probs]
    if top_p < 1:
        best_first = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
        before = accumulate((probs[token] for token in best_first), initial=0.0)
        kept = {token for token, above in zip(best_first, before, strict=False) if above < top_p * sum(probs)}
        probs = [p if token in kept else 0.0 for token, p in enumerate(probs)]
    return probs


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


@settings(max_examples=400, deadline=None)
@given(rows())
def test_processed_probabilities_row_by_row(case):
    got = processed_probabilities(*case)
    want = np.array([processed_row(*row) for row in zip(*case, strict=True)])
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@settings(deadline=None)
@given(rows(), st.data())
def test_a_rows_token_does_not_depend_on_the_rows_beside_it(case, data):
    count = len(case[0])
    uniform = np.array(data.draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=count, max_size=count)))
    temperature = case[1] * np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    case = (case[0], temperature, *case[2:], uniform)
    alone = [sample(*(array[i : i + 1] for array in case))[0] for i in range(count)]
    assert sample(*case).tolist() == alone


@pytest.mark.parametrize("seed", [7, 10, 14])
def test_a_nucleus_does_not_depend_on_the_rows_above(seed):
    """Added up behind another row's, two tokens of a half each would be rounded to more than p = 0.5 or to less."""
    size = 151_936
    tie = np.full(size, -1e9, np.float32)
    tie[:2] = 0
    others = np.random.default_rng(seed).normal(size=(8, size)).astype(np.float32) * 2
    top_p = np.array([0.9999] * 8 + [0.5])
    kept = processed_probabilities(np.concatenate((others, tie[None])), np.ones(9), np.zeros(9, int), top_p)[-1]
    assert np.flatnonzero(kept).tolist() == [0]


def one_row(*logits: float) -> np.ndarray:
    return np.array([logits], np.float32)


def drawn(logits: np.ndarray, uniform: float, temperature=1.0, top_k=0, top_p=1.0) -> int:
    return int(sample(logits, *(np.array([value]) for value in (temperature, top_k, top_p, uniform)))[0])


def test_a_draw_inverts_the_distribution_in_vocabulary_order():
    logits = np.log(one_row(0.5, 0.125, 0.25, 0.125))
    edges = [0.0, 0.49, 0.51, 0.62, 0.63, 0.87, 0.88, 1 - 2**-53]
    assert [drawn(logits, uniform) for uniform in edges] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_no_draw_is_a_token_without_probability():
    logits = one_row(-np.inf, 1, -np.inf, 1, -np.inf)
    assert [drawn(logits, uniform) for uniform in (0.0, 0.49, 0.51, 1 - 2**-53)] == [1, 1, 3, 3]
    assert [drawn(one_row(0, 3, 2, 1), uniform, top_k=2) for uniform in (0.0, 1 - 2**-53)] == [1, 2]
    for uniform in (0.0, 0.5, 1 - 2**-53):
        assert drawn(one_row(0, 3, 2, 1), uniform, top_k=-1) == drawn(one_row(0, 3, 2, 1), uniform, top_k=0)
    assert [drawn(one_row(0, 3, 2, 1), uniform, top_p=0.5) for uniform in (0.0, 1 - 2**-53)] == [1, 1]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-300}, {"temperature": 1e-3}, {"temperature": 1e-40}],
    ids=str,
)
def test_settings_that_amount_to_greedy(settings, uniform):
    assert drawn(one_row(-3, 20, 19, 0), uniform, **settings) == 1


def test_a_nucleus_always_holds_the_best_token():
    logits = np.random.default_rng(1).normal(0, 2, (40, 30)).astype(np.float32)
    logits[-1] = 4
    case = (np.ones(40), np.zeros(40, np.int64), np.full(40, 1e-300))
    kept = processed_probabilities(logits, *case) > 0
    assert kept.sum(axis=1).tolist() == [1] * 40
    assert kept.argmax(axis=1).tolist() == logits.argmax(axis=1).tolist()


def test_a_large_vocabulary_by_row():
    logits = np.random.default_rng(3).normal(0, 4, (6, 5000)).astype(np.float32)
    case = (
        logits,
        np.linspace(0.3, 1.5, 6),
        np.array([0, 50, 0, 7, 4999, 0]),
        np.array([0.9, 0.9, 0.5, 1, 0.99, 0.999]),
    )
    want = np.array([processed_row(*row) for row in zip(*case, strict=True)])
    got = processed_probabilities(*case)
    np.testing.assert_allclose(got, want, rtol=1e-5)


# -- by counting ---------------------------------------------------------------------------------------------------

VOCAB = 7
REQUESTS = 12_000
TABLE = np.random.default_rng(11).normal(0, 1.2, (VOCAB, VOCAB)).astype(np.float32)  # logits after each token
START = 2

SAMPLERS = {"plain": (1.0, 0, 1.0), "cool top-k": (0.7, 4, 1.0), "warm top-p": (1.4, 0, 0.8), "all": (1.1, 5, 0.9)}


def conditional(sampler: tuple[float, int, float]) -> np.ndarray:
    """[V, V]: the distribution after each token."""
    probs = np.array([processed_row(row, *sampler) for row in TABLE])
    return probs / probs.sum(axis=1, keepdims=True)


def bare(after: np.ndarray) -> list[int]:
    return []


def likely(after: np.ndarray) -> list[int]:
    return np.argsort(-after)[:3].tolist()


def unlikely(after: np.ndarray) -> list[int]:
    return np.argsort(after)[:2].tolist()


def mixed(after: np.ndarray) -> list[int]:
    return [*likely(after)[1:2], *unlikely(after)]


def trees_under(roots: np.ndarray, children) -> SuperTree:
    """Under each root the tokens that ``children`` picks from its logits, and the same again under those."""
    tree, level = SuperTree.from_roots(roots), np.arange(len(roots))
    for _ in range(2):
        hung = [(node, token) for node in level.tolist() for token in children(TABLE[tree.token[node]])]
        parent, token = np.array(hung, np.int64).reshape(-1, 2).T
        level = tree.add(parent, token, np.zeros(len(parent)))
    return tree


def first_two_tokens(children, sampler: tuple[float, int, float]) -> tuple[np.ndarray, float]:
    """Two tokens of each of many requests, seeds 0, 1, ..., by tree steps: [REQUESTS, 2], and tokens a step."""
    written = np.full((REQUESTS, 2), -1)
    root, position = np.full(REQUESTS, START), np.zeros(REQUESTS, np.int64)
    running, steps, emitted_in_all = np.arange(REQUESTS), 0, 0
    while len(running):
        tree = trees_under(root[running], children)
        seeds, starts = running[tree.request], position[running][tree.request]

        def next_token(nodes: np.ndarray, tree=tree, seeds=seeds, starts=starts) -> np.ndarray:
            settings = (np.full(len(nodes), value) for value in sampler)
            uniform = uniforms(seeds[nodes], starts[nodes] + tree.depth[nodes])
            return sample(TABLE[tree.token[nodes]], *settings, uniform)

        path, emitted = accept(tree, next_token)
        place = starts[path] + tree.depth[path]
        first_two = place < 2
        written[seeds[path][first_two], place[first_two]] = emitted[first_two]
        root[seeds[path]] = emitted  # request by request, so the last one stays
        position[seeds[path]] = place + 1
        steps, emitted_in_all = steps + len(running), emitted_in_all + len(path)
        running = running[position[running] < 2]
    return written, emitted_in_all / steps


def assert_follows(tokens: np.ndarray, distribution: np.ndarray) -> None:
    counts = np.bincount(tokens, minlength=VOCAB)
    possible = distribution > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        assert chisquare(counts[possible], len(tokens) * distribution[possible]).pvalue > 0.001


@pytest.fixture(scope="module")
def plain_text() -> dict[str, np.ndarray]:
    return {name: first_two_tokens(bare, sampler)[0] for name, sampler in SAMPLERS.items()}


@pytest.mark.parametrize("children", [bare, likely, unlikely, mixed])
@pytest.mark.parametrize("name", SAMPLERS)
def test_tree_steps_follow_the_targets_distribution(name, children, plain_text):
    tokens, per_step = first_two_tokens(children, SAMPLERS[name])
    after = conditional(SAMPLERS[name])
    assert_follows(tokens[:, 0], after[START])
    for first in range(VOCAB):
        second = tokens[tokens[:, 0] == first, 1]
        if len(second) > 300:
            assert_follows(second, after[first])
    assert (tokens == plain_text[name]).all()  # and it is the same text, seed by seed
    if children is likely:
        assert per_step > 1.5
