"""Synthetic text: the table is what is accepted, log q says so, and what is no table is refused."""

import json

import numpy as np
import pytest
from refusal import refused

from echo_trt_lab.synthetic_text import HashedText, Rates

PLACES = 60_000


def drawn(rates: str, depth: int, count: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return log q, whether a candidate is the target's token, and the candidates: [PLACES, count] each."""
    text, rng = HashedText(Rates.parse(rates), np.arange(50, 5000)), np.random.default_rng(depth)
    where = [rng.integers(0, high, PLACES) for high in (2**32, 5000, 4000)]
    log_q, candidates = text.propose(*where, np.full(PLACES, depth), count)
    return log_q, candidates == text.next_tokens(*where)[:, None], candidates


@pytest.mark.parametrize(
    ("rates", "depth", "wanted"),
    [
        ("0.75", 1, [0.75]),
        ("0.75", 9, [0.75]),
        ("0.8,0.6,0.1", 2, [0.6]),
        ("0.8,0.6,0.1", 5, [0.1]),
        ("1", 3, [1.0, 0.0]),
        ("[[0.5, 0.25, 0.25, 0.0], [0.4, 0.4]]", 1, [0.5, 0.25, 0.25, 0.0, 0.0]),
        ("[[0.5, 0.25, 0.25, 0.0], [0.4, 0.4]]", 7, [0.4, 0.4, 0.0]),
    ],
)
def test_the_targets_token_stands_at_a_rank_as_often_as_the_table_says(rates, depth, wanted):
    log_q, right, candidates = drawn(rates, depth)
    noise = 4 / np.sqrt(PLACES)
    assert right[:, : len(wanted)].mean(axis=0) == pytest.approx(wanted, abs=noise)
    assert np.exp(log_q).mean(axis=0) == pytest.approx(right.mean(axis=0), abs=noise)
    assert (log_q[:, :-1] >= log_q[:, 1:] - 1e-6).all()
    assert (np.diff(np.sort(candidates, axis=1), axis=1) > 0).all()  # siblings differ
    assert candidates.min() >= 50


def test_a_confidence_is_the_chance_and_differs_between_places():
    log_q, right, _ = drawn("0.6", 1)
    confidence = np.exp(log_q[:, 0])
    assert confidence.std() > 0.2
    for low in np.arange(0, 1, 0.25):
        part = (low <= confidence) & (confidence < low + 0.25)
        assert right[part, 0].mean() == pytest.approx(confidence[part].mean(), abs=0.02)


def test_a_device_computes_the_same_text():
    torch = pytest.importorskip("torch")
    text = HashedText(Rates.parse("0.7,0.5"), np.arange(7, 4000))
    there, rng = text.placed(torch, "cpu"), np.random.default_rng(0)
    *inputs, depth = (rng.integers(0, high, 500) for high in (2**32, 4000, 999, 9))
    placed = [*map(torch.from_numpy, inputs)]
    log_q, candidates = text.propose(*inputs, depth, 5)
    device = there.propose(*placed, torch.from_numpy(depth), 5)
    assert (device[1].numpy() == candidates).all()
    assert device[0].numpy() == pytest.approx(log_q, rel=1e-4, abs=1e-4)
    assert (there.next_tokens(*placed).numpy() == text.next_tokens(*inputs)).all()


def test_rates_may_stand_in_a_file(tmp_path):
    file = tmp_path / "rates.json"
    file.write_text(json.dumps([[0.5, 0.2], [0.25]]))
    rates = Rates.parse(str(file))
    assert rates.rows == ((0.5, 0.2), (0.25,))
    assert str(file) in rates.sentence


@pytest.mark.parametrize(
    "text",
    [
        *("0", "1.2", "nan", "0.5,", "a", "", "-0.5", "0.8;0.7", "[[0.5]", "none.json", "[]", "[0.5]", "[[0.5], []]"),
        *('[["a"]]', "[[0.0, 0.0]]", "[[0.3, 0.4]]", "[[0.6, 0.5]]", "[[true]]", "[[0.5, -0.1]]", "[[NaN]]", "{}"),
        "[" * 3000,
        "0.5," * 64 + "0.5",
    ],
)
def test_what_is_no_table_is_refused(text):
    with refused("ECHO_TRT_SYNTHETIC_TEXT is", text[:100], "such as 0.75", "0.8,0.7,0.6", "JSON file", "[[0.8, 0.1]"):
        Rates.parse(text)
