"""Levels that TensorRT's engine drafts on the device, against the PyTorch engine's."""

import numpy as np
import pytest
import torch
from pairs import SIZES, VOCAB, roles_of
from role_sessions import SLOTS, packed

from echo_trt.backends.cuda.levels import level_call, parts_of_level
from echo_trt.backends.cuda.sizes import CallBounds
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.speculation.pack import LevelShape, pack, pack_levels


@torch.inference_mode()
def drafted_by_both(role, engine, shapes, counts):
    """Return what the PyTorch engine and ``engine`` draft behind texts of ``counts`` entries each: columns of nodes.

    The former projects features itself, and the latter gets what the target has projected.

    After the levels of ``shapes[0]`` all requests but the first go on with those of ``shapes[1]``, and so on.
    """
    reference = TorchEngine(role, engine.num_blocks, bounds=CallBounds(SLOTS, 4, 16), resident=True)
    rows, table = np.arange(counts.sum()), np.arange(SLOTS * 4).reshape(SLOTS, 4)[: len(counts)]
    positions, past = np.concatenate([np.arange(n) for n in counts]), 0 * counts
    call = pack(rows % VOCAB, positions, past, counts, table, np.cumsum(counts) - 1)
    values = np.random.default_rng(4).standard_normal((len(rows), 3 * SIZES["hidden_size"])).astype(np.float32)
    drafted = []
    projected = role.network.combine(torch.from_numpy(values)).numpy()
    for each, features in ((reference, values), (engine, projected)):
        assert each.drafts_levels
        each.feature_cache("features").write(rows, features, rows)
        inputs = {
            "features": each.feature_cache("features").read(rows),
            "hidden": each.feature_cache("hidden").read(rows[:0]),
        }
        _, found = each.start_levels(call, pack_levels(counts, table, shapes[0]), shapes[0], 9, **inputs)
        columns = [found.swapaxes(0, 1).reshape(4, -1)]
        for number, shape in enumerate(shapes[1:], 1):
            below = pack_levels(counts[number:], table[number:], shape)
            found = each.run_levels(below, np.arange(1, len(counts) - number + 1), shape, 9)
            columns.append(found.swapaxes(0, 1).reshape(4, -1))
        drafted.append(np.concatenate(columns, axis=1))
    return drafted


@pytest.mark.parametrize(("levels", "beams", "width"), [([1], 2, 3), ([3], 3, 4), ([0, 1, 2], 3, 4)])
def test_levels_on_the_device_are_those_of_the_pytorch_engine(levels, beams, width, networks, tmp_path):
    _, engine, session = packed("draft", networks, tmp_path)
    role = roles_of("eagle3", networks)["draft"]
    firsts = np.cumsum([1, *levels])
    shapes = [LevelShape(int(first), count, beams, width) for first, count in zip(firsts, levels, strict=False)]
    drafted = drafted_by_both(role, engine, shapes, np.array([4, 1, 6]))
    assert drafted[1].shape == drafted[0].shape
    np.testing.assert_array_equal(drafted[1][:3], drafted[0][:3])
    scores = [np.ascontiguousarray(part[3]).view(np.float32) for part in drafted]
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-5)
    assert len(session.launched) == 1 + sum(levels)


@pytest.mark.parametrize(("requests", "live"), [(4, 4), (4, 2), (5, 3), (3, 0)])
def test_parts_of_a_level_are_the_level(requests, live):
    """Of each request the parts keep tokens, mask, blocks and rows of logits, and padding stays without tokens."""
    beams, level, blocks = 2, 2, 3
    columns = beams * level
    begins = torch.arange(requests + 1, dtype=torch.int32)
    call = {"past_lens": 7 * begins[1:], "block_begins": begins * blocks, "live": torch.tensor([live])}
    call["block_indices"] = torch.arange(requests * blocks, dtype=torch.int32)
    names = ("token_ids", "hidden")
    whole = level_call(level, beams, call) | {name: torch.arange(requests * beams) for name in names}
    whole["tree_mask"] = torch.arange(requests * beams * columns).to(torch.uint8)
    parts = list(parts_of_level(whole, 2 * beams))
    assert len(parts) == -(-requests // 2)
    for name in (*names, "positions", "past_lens", "tree_mask"):
        assert torch.cat([part[name] for part in parts]).equal(whole[name])
    starts = np.cumsum([0, *(len(part["past_lens"]) for part in parts)])
    for start, part in zip(starts, parts, strict=False):
        count = len(part["past_lens"])
        assert len(part["token_ids"]) <= 2 * beams
        assert part["block_indices"] is whole["block_indices"]
        assert part["block_begins"].equal(whole["block_begins"][start : start + count + 1])
        assert part["logit_rows"].tolist() == list(range(count * beams))
        for name, each in (("seq_begins", beams), ("tree_mask_begins", beams * columns)):
            there = max(min(live - int(start), count), 0)
            assert part[name].tolist() == [min(i, there) * each for i in range(count + 1)]
