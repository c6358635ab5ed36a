"""TensorRT and TensorRT-RTX on a card: engines that are built here, and their CUDA graphs, are the reference."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu.engines import seconds_of
from gpu.random_networks import SMALL, random_decoder

from echo_trt.backends.tensorrt.session import profile_for
from echo_trt.models.config import Eagle3Config
from echo_trt.models.eagle3 import Eagle3Head
from echo_trt.models.roles import HeadModule, TargetModule
from echo_trt.speculation.pack import BLOCK, LevelShape, pack, pack_levels

pytestmark = pytest.mark.gpu
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
BATCH, CONTEXT = 32, 512
RECIPE = {
    "name": "gpu",
    "target": {"path": "."},
    "precision": "fp16",
    "limits": {"batch": BATCH, "context": CONTEXT, "prefill_chunk": 64},
    "decoding": {"per_request": 16, "max_depth": 4, "beams": 3, "width": 4},
}


class Built:
    """A compiler's build of small networks in fp16, in a folder."""

    def __init__(self, engine: str, folder: Path):
        from echo_trt.backends.tensorrt.build import TensorRTBuild
        from echo_trt.bundle.call_sizes import CallSizes
        from echo_trt.bundle.read_recipe import parse_recipe

        recipe = parse_recipe(RECIPE | {"engine": engine}, "the test")
        self.engine, self.sizes = engine, CallSizes.of(recipe)
        self.build = TensorRTBuild(recipe, folder, folder / "timings", lambda share, phase: None)

    def opened(self, role: Any, name: str) -> tuple[Any, Any]:
        """Build a role; return its engine and the self-check."""
        from echo_trt.backends.tensorrt.engine import TensorRTEngine

        file, check = self.build.compile(role, name, "fp16")
        path, sizes = self.build.folder / file, self.sizes
        return TensorRTEngine.open(self.engine, path, self.build.facts(), BATCH, sizes.blocks, sizes.pool), check


@pytest.fixture(params=MODULES)
def built(request, card, tmp_path) -> Built:
    if card.device.type != "cuda":
        pytest.skip(f"{request.param} runs on a card alone")
    for module in (MODULES[request.param], "onnxscript"):
        try:
            __import__(module)
        except Exception as error:  # a wheel without its libraries fails in ways of its own
            pytest.skip(f"{module} cannot be used here ({error})")
    from echo_trt.backends.cuda.device import compute_capability
    from echo_trt.backends.tensorrt.compiler import COMPILERS, known_capabilities

    capability = compute_capability(card.device)
    if COMPILERS[request.param].builds_anywhere and capability not in known_capabilities(request.param):
        pytest.skip(f"{request.param} builds nothing for compute capability {capability}")
    return Built(request.param, tmp_path)


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
    if built.engine == "tensorrt":
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


def assert_caches_are_not_copied(session: Any, figures: Any) -> None:
    """Check that caches are not copied, by the layers that the engine tells of."""
    try:
        inspector = session._engine.create_engine_inspector()
        text = inspector.get_engine_information(session._api.LayerInformationFormat.JSON)
    except Exception as error:
        figures(layers=f"not told: {error}")
        return
    named = [layer for layer in map(str, json.loads(text).get("Layers", [])) if "_cache." in layer]
    figures(layers_that_name_a_cache=len(named))
    assert named or session._title != "TensorRT"  # whose engines are built to tell of their layers
    assert not [layer for layer in named if "Reformat" in layer or "copy" in layer.lower()]


def test_a_heads_levels_are_one_graph_and_the_same_as_launches(built):
    """A graph of fewer levels is captured later, over the contexts of the first one's levels.

    A head's profiles must not break the graph's own constraint, features + states = tokens.
    """
    fields, sizes = {field.name for field in dataclasses.fields(Eagle3Config)}, built.sizes
    shared = {name: value for name, value in dataclasses.asdict(SMALL).items() if name in fields}
    config = Eagle3Config(**shared, target_hidden_size=SMALL.hidden_size, draft_vocab_size=SMALL.vocab_size // 2)
    torch.manual_seed(0)
    head = Eagle3Head(config, sizes.blocks * BLOCK, torch.nn.Embedding(SMALL.vocab_size, SMALL.hidden_size)).eval()
    opened, _ = built.opened(HeadModule(head.requires_grad_(False), 4), "head")
    if not opened.drafts_levels:
        pytest.skip(f"a head of {built.engine} drafts no levels")
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
