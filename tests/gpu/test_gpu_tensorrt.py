"""TensorRT on a card: engines that are built here, and their CUDA graphs, are the reference."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from gpu.compiled import Built, assert_caches_are_not_copied, skip_without_tensorrt
from gpu.engines import seconds_of
from gpu.random_networks import SMALL, random_decoder, random_head
from gpu.test_gpu_serving import (  # noqa: F401  the same tests, of this engine
    served,
    test_drafted_scores_are_those_of_launches,
    test_drafts_are_what_gates_let_pass_at_every_load,
    test_memory_is_what_sizing_foresaw,
    test_no_pass_copies_a_cache,
)

from echo_trt.backends.tensorrt.session import profile_for
from echo_trt.bundle.read_recipe import parse_recipe
from echo_trt.models.roles import HeadModule, TargetModule
from echo_trt.speculation.pack import BLOCK, LevelShape, pack, pack_levels

pytestmark = pytest.mark.gpu
BATCH, CONTEXT = 32, 512
RECIPE = {
    "name": "gpu",
    "target": {"path": "."},
    "engine": "tensorrt",
    "precision": "fp16",
    "limits": {"batch": BATCH, "context": CONTEXT, "prefill_chunk": 64},
    "decoding": {"per_request": 16, "max_depth": 4, "beams": 3, "width": 4},
}


@pytest.fixture(scope="module")
def engine() -> str:
    return "tensorrt"


@pytest.fixture
def built(card, tmp_path) -> Built:
    skip_without_tensorrt(card)
    return Built(parse_recipe(RECIPE, "the test"), tmp_path)


def test_a_target_is_the_reference_and_captured_whole(built, card, figures):
    """Its caches are written in place, scratch memory holds every size, and T(N) of chains goes into the report."""
    model = random_decoder(SMALL, built.sizes.blocks * BLOCK, torch.float32, torch.device("cpu"))
    begin, free = time.monotonic(), card.free()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opened, check = built.opened(TargetModule(model), "target")
    # TensorRT does not say beforehand whether a launch can be captured.
    assert not [text for text in map(str, (one.message for one in caught)) if "CUDA graph" in text or "cache" in text]
    assert max(check.prompt_error, check.tree_error) <= check.bound
    figures(seconds=time.monotonic() - begin, start_bytes=free - card.free(), error=check.tree_error)
    assert_caches_are_not_copied(opened._session, figures)
    assert scratch_of(opened._session) <= opened._session._scratch.nbytes
    rng, blocks = np.random.default_rng(0), built.sizes.blocks
    for batch in (1, 8, 32):
        reported = {}
        for count in (1, 2, 4, 8, 16):
            past, counts = np.full(batch, CONTEXT // 2), np.full(batch, count)
            positions = (past[:, None] + np.arange(count)).reshape(-1)
            table, rows = np.arange(batch * blocks).reshape(batch, blocks), np.arange(batch * count)
            call = pack(rng.integers(0, SMALL.vocab_size, len(rows)), positions, past, counts, table, rows)
            reported[len(rows)] = 1e3 * seconds_of(opened, call)
        figures(**{f"ms at {batch}": reported})


def scratch_of(session: Any) -> int:
    """Return the most scratch memory of any size that recurs, by a context of its own: a question repartitions it."""
    most = 0
    for shapes in (key for key in session._contexts if isinstance(key, tuple)):
        named = dict(zip(session.inputs, shapes, strict=True))
        context = session._new_context(profile_for(session._profiles, named))
        assert all(context.set_input_shape(name, shape) for name, shape in named.items())
        most = max(most, context.update_device_memory_size_for_shapes())
    return most


def test_a_heads_levels_are_one_graph_and_the_same_as_launches(built):
    """A graph of fewer levels is captured later, over the contexts of the first one's levels.

    A head's profiles must not break the graph's own constraint, features + states = tokens.
    """
    sizes = built.sizes
    target = random_decoder(SMALL, sizes.blocks * BLOCK, torch.float32, torch.device("cpu"))
    opened, _ = built.opened(HeadModule(random_head(target, torch.float32), 4), "head")
    assert opened.drafts_levels
    shape, ones, none = LevelShape(1, 9, 3, 4), np.ones(BATCH, np.int64), np.zeros(0, np.int64)
    table = np.arange(BATCH * sizes.blocks).reshape(BATCH, sizes.blocks)
    call = pack(np.arange(BATCH), 0 * ones, 0 * ones, ones, table, np.arange(BATCH))
    inputs = {
        "features": opened.feature_cache("features").read(table[:, 0] * BLOCK),
        "hidden": opened.feature_cache("hidden").read(none),
    }
    opened.capture_levels(lambda requests: [shape, shape._replace(levels=2)])
    levels, drafted = opened._levels, []
    assert any(graph is not None for graph in levels._graphs._captured.values())
    for graphs in (levels._graphs, None):
        levels._graphs = graphs
        drafted.append(opened.start_levels(call, pack_levels(ones, table, shape), shape, 16, **inputs)[1])
    assert np.array_equal(*(tree[:, :3] for tree in drafted))
