"""The choice on the device is the host's: the same tokens for the same logits, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from echo_trt.backends.cuda import choose as on_device
from echo_trt.backends.cuda import device_rows
from echo_trt.backends.cuda.choose import limited
from echo_trt.backends.cuda.device_rows import DeviceLogits
from echo_trt.speculation.sampling import draw as host
from echo_trt.speculation.sampling.choice import SamplingBatch, choose


def rows(seed: int, count: int, size: int) -> np.ndarray:
    """Logits of several shapes: peaked, flat, with ties and with tokens that are out."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((count, size)).astype(np.float32) * rng.choice([0.0, 0.3, 3.0, 9.0], (count, 1))
    logits[1::3] = np.round(logits[1::3], 0)
    logits[2::5, rng.random(size) < 0.5] = -np.inf
    return logits.astype(np.float32)


def choices(seed: int, count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "temperature": rng.choice([0.0, 1e-7, 0.2, 0.8, 1.0, 1.7], count),
        "top_k": rng.choice([0, 1, 2, 7, 50, 10_000], count),
        "top_p": rng.choice([0.0, 0.1, 0.5, 0.95, 1.0], count),
        "seed": rng.integers(-(2**63), 2**63 - 1, count),
        "position": rng.integers(0, 1 << 40, count),
        "min_p": rng.choice([0.0, 0.01, 0.3, 1.0], count),
    }


def unpenalised(wanted: dict[str, np.ndarray]) -> SamplingBatch:
    """Return a choice in which nothing is penalised or moved."""
    none, no = np.zeros(0, np.int64), np.ones(len(wanted["seed"]))
    history = {"history_row": none, "history_token": none, "history_generated": none.astype(bool)}
    logit_bias = {"logit_bias_row": none, "logit_bias_token": none, "logit_bias": np.zeros(0, np.float32)}
    return SamplingBatch(**wanted, **history, **logit_bias, repetition=no, presence=no - 1, frequency=no - 1)


@pytest.mark.parametrize("size", [1, 5, 50, 51, 700])
def test_where_every_row_has_a_top_k_nothing_else_is_searched(size, monkeypatch):
    """Qwen3's own setting: top-k 20 and top-p 0.95. A search of whole rows would take as long as a pass."""
    for seed in range(10):
        logits, wanted = rows(seed, 40, size), choices(seed, 40)
        wanted["top_k"] = np.random.default_rng(seed).choice([1, 2, 7, 50], 40)
        wanted["temperature"] = np.maximum(wanted["temperature"], 0.2)
        settings = {name: wanted[name] for name in ("temperature", "top_k", "top_p", "min_p")}
        with monkeypatch.context() as patch:
            patch.setattr(on_device, "_fewest", None if size > 50 else on_device._fewest)
            tensors = {name: torch.from_numpy(value) for name, value in settings.items()}
            found = limited(torch.from_numpy(logits), **tensors, max_top_k=50)
        for i, row in enumerate(logits):
            np.testing.assert_array_equal(found[i].numpy(), host.limited(row, *(s[i] for s in settings.values())))


@pytest.mark.parametrize(("others", "top_k", "searches"), [(0, 20, 0), (1, 20, 0), (20, 20, 0), (5, 0, 1), (0, 0, 1)])
def test_greedy_rows_do_not_lengthen_the_search(others, top_k, searches, monkeypatch):
    """Only drawn rows count: rows with top-k 1 or temperature 0 have no other tokens, whatever else they ask for.

    Where no drawn row has a top-k, whole rows are searched for top-p alone.
    """
    logits, wanted = rows(7, 40, 600), choices(7, 40)
    greedy = np.arange(40) % 3 == 0
    wanted["top_k"] = np.where(greedy, others, top_k)
    wanted["temperature"] = np.where(greedy, 0.0, 0.8)
    fewest, calls = on_device._fewest, []
    monkeypatch.setattr(on_device, "_fewest", lambda *arguments: calls.append(1) or fewest(*arguments))
    choice = unpenalised(wanted)
    found = DeviceLogits(torch.from_numpy(logits)).choose(np.arange(40), choice)
    assert found.tolist() == choose(logits, choice).tolist()
    assert len(calls) == searches


@pytest.mark.parametrize(("masked", "at_once"), [(False, 1 << 20), (True, 1 << 20), (False, 7 * 4 * 203), (True, 1)])
def test_a_choice_is_the_hosts(masked, at_once, monkeypatch):
    """Everything at once, at some rows of many and in their order; what logits hold is not touched.

    With few bytes at once the rows are divided into parts, and what moves their logits with them.
    """
    monkeypatch.setattr(device_rows, "_AT_ONCE", at_once)
    rng, size = np.random.default_rng(5), 203
    logits, requested = rows(3, 50, size), rng.permutation(50)[:30]
    many, one = (rng.integers(0, 30, 300), rng.integers(0, size, 300)), rng.choice([-np.inf, 2.5, -1], 300)
    choice = SamplingBatch(
        **choices(9, 30),
        repetition=rng.choice([1.0, 1.3], 30),
        presence=rng.choice([0.0, 1.1], 30),
        frequency=rng.choice([0.0, 0.2], 30),
        history_row=many[0],
        history_token=rng.integers(0, size, 300),
        history_generated=rng.random(300) < 0.7,
        logit_bias_row=many[0],
        logit_bias_token=many[1],
        logit_bias=one.astype(np.float32),
        masks=rng.integers(1, 256, (30, -(-size // 8))).astype(np.uint8) if masked else None,
    )
    before = torch.from_numpy(logits.copy())
    assert DeviceLogits(before).choose(requested, choice).tolist() == choose(logits[requested], choice).tolist()
    np.testing.assert_array_equal(before.numpy(), logits)


def test_few_rows_are_worked_on_at_once(monkeypatch):
    """A pass of many sampled nodes takes no more memory than one of a few."""
    monkeypatch.setattr(device_rows, "_AT_ONCE", 10 * 4 * 90)
    chosen, maximum = on_device.choose, []
    monkeypatch.setattr(
        on_device,
        "choose",
        lambda logits, *rest, **options: maximum.append(len(logits)) or chosen(logits, *rest, **options),
    )
    logits, count = rows(2, 35, 90), 35
    choice = unpenalised(choices(4, count))
    on_card = DeviceLogits(torch.from_numpy(logits))
    assert on_card.choose(np.arange(count), choice).tolist() == choose(logits, choice).tolist()
    assert maximum == [10, 10, 10, 5]
    whole = DeviceLogits(torch.from_numpy(logits[:10])).log_probabilities(np.arange(10), np.arange(10), 3)
    parts = on_card.log_probabilities(np.arange(count), np.arange(count), 3)
    for one, other in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(one[:10], other)


def test_draws_without_limits_search_no_row(monkeypatch):
    """Temperature alone, and top-k 1: what a search for tokens to shut out would find is known."""
    logits, wanted = rows(8, 40, 600), choices(8, 40)
    wanted |= {"top_k": wanted["seed"] % 2, "top_p": np.ones(40), "min_p": np.zeros(40)}
    monkeypatch.setattr(on_device, "limited", None)
    choice = unpenalised(wanted)
    found = DeviceLogits(torch.from_numpy(logits)).choose(np.arange(40), choice)
    assert found.tolist() == choose(logits, choice).tolist()
