"""Levels that TensorRT's engine drafts on the device, against the PyTorch engine's."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx_sessions import SLOTS, packed
from pairs import SIZES, VOCAB
from stand_in_graphs import uncollected

from echo_trt.backends.cuda.calls import Graphs
from echo_trt.backends.cuda.levels import level_call, parts_of_level
from echo_trt.backends.cuda.sizes import CallBounds
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.speculation.pack import LevelShape, pack, pack_levels


def drafted_by_both(role, engine, shape, counts):
    """Return what the PyTorch engine and ``engine`` draft behind texts of ``counts`` entries each: columns of nodes."""
    reference = TorchEngine(role, engine.num_blocks, bounds=CallBounds(SLOTS, 4, 16), resident=True)
    rows, table = np.arange(counts.sum()), np.arange(SLOTS * 4).reshape(SLOTS, 4)[: len(counts)]
    positions, past = np.concatenate([np.arange(n) for n in counts]), 0 * counts
    call = pack(rows % VOCAB, positions, past, counts, table, np.cumsum(counts) - 1)
    values = np.random.default_rng(4).standard_normal((len(rows), 3 * SIZES["hidden_size"]))
    drafted = []
    for each in (reference, engine):
        assert each.drafts_levels
        each.feature_cache("features").write(rows, values.astype(np.float32), rows)
        inputs = {
            "features": each.feature_cache("features").read(rows),
            "hidden": each.feature_cache("hidden").read(rows[:0]),
        }
        drafted.append(each.run_levels(call, pack_levels(counts, table, shape), shape, 9, **inputs))
    return drafted


@pytest.mark.parametrize(("levels", "beams", "width"), [(1, 2, 3), (3, 3, 4)])
def test_levels_on_the_device_are_those_of_the_pytorch_engine(levels, beams, width, networks, tmp_path):
    role, engine, session = packed("draft", networks, tmp_path)
    drafted = drafted_by_both(role, engine, LevelShape(levels, beams, width), np.array([4, 1, 6]))
    assert drafted[1].shape == drafted[0].shape
    np.testing.assert_array_equal(drafted[1][:, :3], drafted[0][:, :3])
    scores = [np.ascontiguousarray(part[:, 3]).view(np.float32) for part in drafted]
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-5)
    assert len(session.launched) == 1 + levels


def test_levels_of_more_tokens_than_a_launch_takes_are_divided(networks, tmp_path, monkeypatch):
    """Qwen3-8B's recipe has 128 requests, 10 beams and 7 levels: 8,960 tokens, and an engine's launch takes 1,536."""
    monkeypatch.setattr("echo_trt.bundle.call_sizes.MAX_LOGIT_ROWS", 16)
    role, engine, session = packed("draft", networks, tmp_path)
    shape, counts = LevelShape(3, 3, 4), np.array([4, 1, 6, 2])
    assert len(counts) * shape.beams * shape.levels > engine._limits.tokens
    drafted = drafted_by_both(role, engine, shape, counts)
    np.testing.assert_array_equal(drafted[1][:, :3], drafted[0][:, :3])
    assert session.launched == [(16,), (12,), (24,), (18,), (18,)]  # 13 rows padded, and 36 tokens in two


@pytest.mark.parametrize(("requests", "live"), [(4, 4), (4, 2), (5, 3), (3, 0)])
def test_parts_of_a_level_are_the_level(requests, live):
    """Of each request the parts keep tokens, mask, blocks and rows of logits, and padding stays without tokens."""
    beams, level, blocks = 2, 2, 3
    rows = beams * level
    begins = torch.arange(requests + 1, dtype=torch.int32)
    call = {"past_lens": 7 * begins[1:], "block_begins": begins * blocks, "live": torch.tensor([live])}
    call["block_indices"] = torch.arange(requests * blocks, dtype=torch.int32)
    names = ("token_ids", "hidden")
    whole = level_call(level, beams, call) | {name: torch.arange(requests * rows) for name in names}
    whole["tree_mask"] = torch.arange(requests * rows * rows).to(torch.uint8)
    parts = list(parts_of_level(whole, 2 * rows))
    assert len(parts) == -(-requests // 2)
    for name in (*names, "positions", "past_lens", "tree_mask"):
        assert torch.cat([part[name] for part in parts]).equal(whole[name])
    starts = np.cumsum([0, *(len(part["past_lens"]) for part in parts)])
    for start, part in zip(starts, parts, strict=False):
        count = len(part["past_lens"])
        assert len(part["token_ids"]) <= 2 * rows
        assert part["block_indices"] is whole["block_indices"]
        assert part["block_begins"].equal(whole["block_begins"][start : start + count + 1])
        assert (part["logit_rows"] + start * rows).equal(whole["logit_rows"][start * beams : (start + count) * beams])
        for name, each in (("seq_begins", rows), ("tree_mask_begins", rows * rows)):
            there = max(min(live - int(start), count), 0)
            assert part[name].tolist() == [min(i, there) * each for i in range(count + 1)]


def test_an_engine_is_gone_with_its_last_reference(networks, tmp_path, monkeypatch):
    """Its contexts and graphs go with it: a build's next network, or NCCL's communicator, waits for them."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: SimpleNamespace(cuda_stream=0))
    engine = packed("draft", networks, tmp_path)[1]
    engine._graphs = Graphs(engine._forward, torch.device("cpu"))
    levels = engine._levels
    assert levels._graphs is not None
    gone = [weakref.ref(owner) for owner in (engine, levels)]
    with uncollected():
        del engine, levels
        assert [ref() for ref in gone] == [None, None]
