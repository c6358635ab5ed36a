"""TensorRT and TensorRT-RTX, where they are installed: an engine built here, against the reference, and its T(N)."""

from __future__ import annotations

import dataclasses
import importlib
import json
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from echo_trt.decoding.pack import BLOCK, LevelShape, pack, pack_levels
from echo_trt.errors import UserError
from echo_trt.models.roles import TargetRole
from gpu_proof_parts.curves import time_of
from gpu_proof_parts.networks import SMALL, random_decoder
from gpu_proof_parts.report import Proof, Skipped

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
BATCH, CONTEXT, TREE = 32, 512, 16
BATCHES, COUNTS = (1, 8, 32), (1, 2, 4, 8, 16)
NONE = np.zeros(0, np.int64)


def prove(proof: Proof) -> None:
    """Prove each engine that is here; an engine that is not is a gap, and without any the section is skipped."""
    here = []
    for engine, module in MODULES.items():
        try:
            importlib.import_module(module)
            importlib.import_module("onnxscript")
        except Exception as error:  # a wheel without its libraries fails in ways of its own
            proof.lacks(f"{engine} cannot be used here ({' '.join(str(error).split())})")
            continue
        if reason := unknown_card(proof, engine):
            proof.lacks(reason)
            continue
        here.append(engine)
    if proof.interpret and here:
        proof.lacks(f"{' and '.join(here)} runs on a GPU only")
    if proof.interpret or not here:
        raise Skipped
    for engine in here:
        proof.lines.append(f"### {engine}\n")
        try:
            prove_engine(proof, engine)
        except UserError as error:
            proof.expect(False, f"{engine}: {error}")


def unknown_card(proof: Proof, engine: str) -> str:
    """Say why ``engine`` builds nothing for this card, such as TensorRT-RTX for an H100; empty where it does."""
    from echo_trt.backends.cuda.device import compute_capability
    from echo_trt.backends.tensorrt.compiler import COMPILERS, known_capabilities

    if proof.interpret or not COMPILERS[engine].builds_anywhere:
        return ""
    capability = compute_capability(proof.device)
    known = capability in known_capabilities(engine)
    return "" if known else f"{engine} builds nothing for compute capability {capability}"


def prove_engine(proof: Proof, engine: str) -> None:
    """Build the small network in fp16; its self-check runs on this card."""
    import torch

    from echo_trt.backends.tensorrt.build import TensorRTBuild
    from echo_trt.backends.tensorrt.engine import TensorRTEngine
    from echo_trt.bundle.call_sizes import CallSizes
    from echo_trt.bundle.recipe import parse_recipe

    recipe = parse_recipe(
        {
            "name": "proof",
            "target": {"path": "."},
            "engine": engine,
            "precision": "fp16",
            "limits": {"batch": BATCH, "context": CONTEXT, "prefill_chunk": 64},
            "decoding": {"per_request": TREE, "max_depth": 4, "beams": 3, "width": 4},
        },
        "gpu_proof",
    )
    sizes = CallSizes.of(recipe)
    model = random_decoder(SMALL, sizes.blocks * BLOCK, torch.float32, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        build = TensorRTBuild(recipe, Path(folder), Path(folder) / "timings", lambda share, phase: None)
        start = time.monotonic()
        file, check = build.compile(TargetRole(model), "target", "fp16")
        proof.say(f"Built and checked in {time.monotonic() - start:.0f} s.")
        if check is None:
            raise UserError("the engine was not checked against the reference on this card")
        proof.say(
            f"Against the reference, of the largest logit: {check.prompt_error:.2g} off on a prompt, "
            f"{check.tree_error:.2g} on a tree ({check.bound} allowed); the same best token at {check.same_argmax:.1%}."
        )
        free = torch.cuda.mem_get_info()[0]
        start = time.monotonic()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            opened = TensorRTEngine.open(engine, Path(folder) / file, build.facts(), BATCH, sizes.blocks, sizes.pool)
        refused = [str(w.message) for w in said if "CUDA graph" in str(w.message)]
        taken = f"{time.monotonic() - start:.1f} s and {(free - torch.cuda.mem_get_info()[0]) / 2**20:.0f} MiB"
        # TensorRT does not say beforehand whether a launch can be captured; each size keeps a context (its issue 4849).
        proof.check(f"{engine}: all sizes are captured", not refused, "; ".join([f"opened in {taken}", *refused[:1]]))
        check_layers(proof, engine, opened)
        rows = list(curves(proof, opened, sizes.blocks))
        proof.table(("B", "N: ms"), rows)
        proof.record(**{engine: {"ms": dict(rows)}})
        if proof.in_time:
            prove_head(proof, engine, build, sizes)
        else:
            proof.lacks(f"{engine}: a head, for lack of time")


def check_layers(proof: Proof, engine: str, opened) -> None:
    """Check that no copy stands behind a cache's output: the plugin writes through its input, which a copy undoes."""
    name = f"{engine}: caches are not copied"
    session = opened._session
    try:
        inspector = session._engine.create_engine_inspector()
        text = inspector.get_engine_information(session._api.LayerInformationFormat.JSON)
    except Exception as error:
        proof.check(name, None, " ".join(str(error).split()))
        return
    layers = [str(layer) for layer in json.loads(text).get("Layers", [])]
    named = [layer for layer in layers if "_cache." in layer]  # none, where the engine tells its layers' names alone
    copies = [layer[:80] for layer in named if "Reformat" in layer or "copy" in layer.lower()]
    told = f"{len(layers)} layers, {len(named)} of which name a cache and {copies[:2] or 'none'} copy one"
    proof.check(name, not copies if named else None, told)
    if engine == "tensorrt":
        scratch = session._scratch.nbytes
        most = max(
            (context.update_device_memory_size_for_shapes() for context in session._contexts.values()), default=0
        )
        proof.check(f"{engine}: scratch holds every size", most <= scratch, f"{most:,} of {scratch:,} bytes")


def prove_head(proof: Proof, engine: str, build, sizes) -> None:
    """Build an EAGLE-3 head: its profiles must not break the graph's own constraint, features + states = tokens.

    A head over a paged pool then drafts levels, at more requests than one launch of the last level takes.
    """
    import torch

    from echo_trt.backends.tensorrt.engine import TensorRTEngine
    from echo_trt.models.config import Eagle3Config
    from echo_trt.models.eagle3 import Eagle3Head
    from echo_trt.models.roles import HeadRole

    fields = {field.name for field in dataclasses.fields(Eagle3Config)}
    shared = {name: value for name, value in dataclasses.asdict(SMALL).items() if name in fields}
    config = Eagle3Config(**shared, target_hidden_size=SMALL.hidden_size, draft_vocab_size=SMALL.vocab_size // 2)
    torch.manual_seed(0)
    head = Eagle3Head(config, sizes.blocks * BLOCK, torch.nn.Embedding(SMALL.vocab_size, SMALL.hidden_size)).eval()
    start = time.monotonic()
    try:
        file, check = build.compile(HeadRole(head.requires_grad_(False), 4), "head", "fp16")
        detail = (
            f"built in {time.monotonic() - start:.0f} s, {check.tree_error:.2g} off on a tree" if check else "built"
        )
        proof.check(f"{engine}: an EAGLE-3 head builds", True, detail)
    except UserError as error:
        proof.check(f"{engine}: an EAGLE-3 head builds", False, str(error))
        return
    opened = TensorRTEngine.open(engine, build.folder / file, build.facts(), BATCH, sizes.blocks, sizes.pool)
    if opened.drafts_levels:
        prove_levels(proof, engine, opened, sizes.blocks)


def prove_levels(proof: Proof, engine: str, opened, blocks: int) -> None:
    """Draft levels as a captured graph and by plain launches: the same trees.

    A graph of fewer levels is captured later, over the contexts of the first one's levels.
    """
    shape, ones = LevelShape(9, 3, 4), np.ones(BATCH, np.int64)
    table = np.arange(BATCH * blocks).reshape(BATCH, blocks)
    call = pack(np.arange(BATCH), 0 * ones, 0 * ones, ones, table, np.arange(BATCH))
    features = opened.bank("features").read(table[:, 0] * BLOCK)
    inputs = {"features": features, "hidden": opened.bank("hidden").read(NONE)}
    opened.capture_levels([shape, shape._replace(levels=2)])
    levels = opened._levels
    captured = [graph for graph in levels._graphs._captured.values() if graph is not None]
    drafted = []
    for graphs in (levels._graphs, None):
        levels._graphs = graphs
        drafted.append(opened.run_levels(call, pack_levels(ones, table, shape), shape, 16, **inputs))
    proof.check(
        f"{engine}: levels of a draft are one graph, and the same as launches",
        bool(captured) and np.array_equal(*(tree[:, :3] for tree in drafted)),
        f"{len(captured)} graphs; a level of {BATCH * 27} tokens by launches of {opened._limits.tokens}",
    )


def curves(proof: Proof, engine, blocks: int):
    """T(N) of chains of a few tokens, whose KV blocks lie as an engine with a cache a slot asks for."""
    rng = np.random.default_rng(0)
    for batch in BATCHES:
        known = []
        for count in COUNTS:
            if not proof.in_time:
                break
            past, counts = np.full(batch, CONTEXT // 2), np.full(batch, count)
            positions = (past[:, None] + np.arange(count)).reshape(-1)
            table = np.arange(batch * blocks).reshape(batch, blocks)
            tokens = rng.integers(0, SMALL.vocab_size, batch * count)
            call = pack(tokens, positions, past, counts, table, np.arange(batch * count))
            known.append(f"{batch * count}: {1e3 * time_of(engine, call, proof):.2f}")
        yield batch, "; ".join(known)
