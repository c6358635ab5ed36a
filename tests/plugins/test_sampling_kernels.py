"""The kernels of seeded draws against the host's draws, in Triton's interpreter (on a GPU, where there is one)."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from backends.launches import Launches
from plugins.interpreted import interpreted

from echo_trt.backends.cuda import choose as on_device
from echo_trt.backends.cuda.choose import choose
from echo_trt.backends.cuda.device_rows import DeviceLogits
from echo_trt.engine.batch import InputBatch
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.sampler import TargetOutput
from echo_trt.speculation.accept import accept
from echo_trt.speculation.sampling import draw as host
from echo_trt.speculation.sampling.draw import SamplingBatch
from echo_trt.speculation.super_tree import SuperTree

NAME = "super_tree_attention.sampling_kernels"


def chosen(logits: np.ndarray | torch.Tensor, rows: np.ndarray, choice: SamplingBatch, *lineage: np.ndarray):
    logits = torch.as_tensor(logits)
    if torch.cuda.is_available():
        return choose(logits.cuda(), rows, choice, *lineage)
    return choose(logits, rows, choice, *lineage, kernels=interpreted(NAME))


@pytest.fixture(autouse=True)
def few_lanes(monkeypatch):
    """Tiles of 512 tokens, so that a small vocabulary has several."""
    monkeypatch.setattr(on_device, "_LANES", 128)


def rows_of(seed: int, count: int, size: int) -> np.ndarray:
    """Logits of several shapes: peaked, flat, with ties and with tokens that are out."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((count, size)).astype(np.float32) * rng.choice([0.0, 0.3, 3.0, 9.0], (count, 1))
    logits[1::3] = np.round(logits[1::3], 0)
    logits[2::5, rng.random(size) < 0.5] = -np.inf
    return logits.astype(np.float32)


def choice_of(seed: int, count: int, **others: np.ndarray) -> SamplingBatch:
    """Return a choice of many limits in which nothing is penalised or biased but by ``others``."""
    rng, none = np.random.default_rng(seed), np.zeros(0, np.int64)
    return SamplingBatch(**{
        "temperature": rng.choice([0.0, 1e-7, 0.2, 0.8, 1.0, 1.7], count),
        "top_k": rng.choice([0, 1, 2, 7, 50, 10_000], count),
        "top_p": rng.choice([0.0, 0.1, 0.5, 0.95, 1.0], count),
        "seed": rng.integers(-(2**63), 2**63 - 1, count),
        "position": rng.integers(0, 1 << 40, count),
        "min_p": rng.choice([0.0, 0.01, 0.3, 1.0], count),
        **{"history_row": none, "history_token": none, "history_generated": none.astype(bool)},
        **{"logit_bias_row": none, "logit_bias_token": none, "logit_bias": np.zeros(0, np.float32)},
        **{"repetition": np.ones(count), "presence": np.zeros(count), "frequency": np.zeros(count)},
        **others,
    })  # fmt: skip


@pytest.mark.parametrize("size", [1, 50, 512, 1500])
def test_a_draw_is_the_hosts(size):
    logits, choice = rows_of(size, 10, size), choice_of(size, 10)
    assert chosen(logits, np.arange(10), choice).tolist() == host.choose(logits, choice).tolist()


@pytest.mark.parametrize("limits", [{"top_k": 20, "top_p": 0.95}, {"top_k": 0, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_usual_settings(limits, dtype):
    """In bfloat16 many logits tie, also at a limit."""
    rng = np.random.default_rng(4)
    logits = torch.from_numpy(rng.normal(0, 4, (6, 1300)).astype(np.float32)).to(dtype)
    limits = {name: np.full(6, value) for name, value in limits.items()}
    choice = choice_of(3, 6, **limits, temperature=rng.choice([0.4, 1.0, 3.0], 6))
    assert chosen(logits, np.arange(6), choice).tolist() == host.choose(logits.float().numpy(), choice).tolist()


@pytest.mark.parametrize(("masked", "at_once"), [(False, 1 << 20), (True, 1 << 20), (False, 7 * 8 * 203)])
def test_a_choice_is_the_hosts(masked, at_once, monkeypatch):
    """Everything at once, at some rows of many and in their order; what logits hold is not touched.

    With few bytes at once the rows are divided into parts, and what moves their logits with them.
    """
    monkeypatch.setattr(on_device, "_AT_ONCE", at_once)
    rng, size = np.random.default_rng(5), 203
    logits, requested = rows_of(3, 50, size), rng.permutation(50)[:20]
    history, bias = (rng.integers(0, 20, n) for n in (300, 60))
    others = {
        "repetition": rng.choice([1.0, 1.3], 20),
        "presence": rng.choice([0.0, 1.1], 20),
        "frequency": rng.choice([0.0, 0.2], 20),
        "history_row": history[history % 4 > 0],
        "history_token": rng.integers(0, size, 300)[history % 4 > 0],
        "history_generated": rng.random(300)[history % 4 > 0] < 0.7,
        "logit_bias_row": bias[bias % 3 > 0],
        "logit_bias_token": rng.permutation(size)[:60][bias % 3 > 0],
        "logit_bias": rng.choice([-np.inf, 2.5, -1], 60).astype(np.float32)[bias % 3 > 0],
        "masks": rng.integers(1, 256, (20, -(-size // 8))).astype(np.uint8) if masked else None,
    }
    choice, before = choice_of(9, 20, **others), torch.from_numpy(logits.copy())
    assert chosen(before, requested, choice).tolist() == host.choose(logits[requested], choice).tolist()
    np.testing.assert_array_equal(before.numpy(), logits)


def test_no_field_is_ignored():
    """Row i differs from the same row of ``base`` by the i-th field alone. A new field needs an entry of ``other``."""
    names, size, rng = [field.name for field in fields(SamplingBatch)], 64, np.random.default_rng(8)
    count = len(names) + 1  # entries that leave a row go to the last one
    owner = np.repeat(np.arange(count), 12)
    base = {"temperature": 1.0, "top_k": 40, "top_p": 0.98, "min_p": 0.01, "seed": 1, "position": 2}
    base |= {"repetition": 1.1, "presence": 0.3, "frequency": 0.2}
    base = {name: np.full(count, value) for name, value in base.items()} | {
        "history_row": owner,
        "history_token": rng.integers(0, size, len(owner)),
        "history_generated": np.ones(len(owner), bool),
        "logit_bias_row": owner,
        "logit_bias_token": rng.integers(0, size, len(owner)),
        "logit_bias": np.full(len(owner), 0.5, np.float32),
        "masks": np.full((count, size // 8), 255, np.uint8),
    }
    other = {"temperature": 9.0, "top_k": 1, "top_p": 0.1, "min_p": 0.9, "seed": 5000, "position": 5}
    other |= {"repetition": 9.0, "presence": 9.0, "frequency": 9.0, "logit_bias": -9.0, "masks": 1}
    other |= {"history_row": count - 1, "history_token": 0, "history_generated": False}
    other |= {"logit_bias_row": count - 1, "logit_bias_token": 0}

    def changed(seeds: np.ndarray) -> SamplingBatch:
        arrays = {name: values.copy() for name, values in (base | {"seed": seeds}).items()}
        for row, name in enumerate(names):
            arrays[name][owner == row if len(arrays[name]) == len(owner) else row] = other[name]
        return SamplingBatch(**arrays)

    logits, seeds = rng.normal(0, 2, (count, size)).astype(np.float32), np.full(count, -1)
    for seed in range(200):
        same = np.full(count, seed)
        usual = host.choose(logits, SamplingBatch(**base | {"seed": same}))
        seeds[(seeds < 0) & (host.choose(logits, changed(same)) != usual)] = seed
    assert (seeds[:-1] >= 0).all(), [name for name, seed in zip(names, seeds, strict=False) if seed < 0]
    found = chosen(logits, np.arange(count), changed(seeds))
    assert found.tolist() == host.choose(logits, changed(seeds)).tolist()


def test_nodes_that_the_walk_cannot_visit_are_left_out(monkeypatch):
    """Two requests, chains whose tokens are the target's own draws at first, and then others."""
    size, batch = 300, InputBatch(2, 64, 4, 1)
    batch.length[:], batch.prompt_length[:] = 5, 5
    for slot in range(2):
        batch.set_params(slot, SamplingParams(temperature=1.0, seed=slot))
    logits = rows_of(6, 12, size)
    tree = SuperTree.from_roots(np.array([1, 2]))
    above = np.arange(2)
    for level in range(5):
        verified = TargetOutput(tree, np.arange(2), 2, {"logits": logits}, None, batch)
        draws = verified.next_token(above)
        above = tree.add(above, np.where(level < np.array([1, 3]), draws, (draws + 1) % size), np.zeros(2))
    verified = TargetOutput(tree, np.arange(2), 2, {"logits": logits}, None, batch)
    path, emitted = accept(tree, verified.next_token)
    assert np.bincount(tree.request[path]).tolist() == [2, 4]

    found = []
    monkeypatch.setattr(
        DeviceLogits, "choose", lambda self, *each: found.append(chosen(self.tensor, *each)) or found[0]
    )
    card = DeviceLogits(torch.from_numpy(logits))
    verified = TargetOutput(tree, np.arange(2), 2, {"logits": card}, None, batch)
    again = accept(tree, verified.next_token)
    assert [part.tolist() for part in again] == [path.tolist(), emitted.tolist()]
    assert len(found[0]) == len(tree) == 12
    if not torch.cuda.is_available():  # where a parent's program may not have ended
        assert (found[0] >= 0).sum() == len(path)


@pytest.mark.parametrize("kind", ["limits", "penalties", "masks"])
def test_a_pass_launches_few_kernels(kind):
    """250 nodes over Qwen3's vocabulary, half of them penalised, some biased."""
    count, size, rng = 250, 151_936, np.random.default_rng(0)
    history, bias = np.repeat(np.arange(count // 2), 500), np.arange(40)
    others = {
        "history_row": history,
        "history_token": rng.integers(0, size, len(history)),
        "history_generated": np.ones(len(history), bool),
        "logit_bias_row": bias,
        "logit_bias_token": bias,
        "logit_bias": np.ones(40, np.float32),
    }
    others = {
        "limits": {},
        "penalties": others,
        "masks": {"masks": np.full((count, -(-size // 8)), 255, np.uint8)},
    }[kind]
    logits = torch.zeros(count, size, dtype=torch.bfloat16)
    launches = Launches()
    with launches:
        choose(
            logits,
            np.arange(count),
            choice_of(1, count, **others),
            kernels=launches.kernels("sample", "add_at", "penalise"),
        )
    copies = launches.counts.pop("copy_")
    assert (launches.total, copies) <= ((9, 2) if kind == "penalties" else (2, 1)), launches.counts
    assert launches.counts["zeros"] == (kind == "penalties")
