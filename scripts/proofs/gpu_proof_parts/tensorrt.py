"""TensorRT and TensorRT-RTX, where they are installed: an engine built here, against the reference, and its T(N)."""

from __future__ import annotations

import importlib
import tempfile
import time
from pathlib import Path

import numpy as np

from echo_trt.decoding.pack import BLOCK, pack
from echo_trt.errors import UserError
from echo_trt.models.roles import TargetRole
from gpu_proof_parts.curves import time_of
from gpu_proof_parts.networks import SMALL, random_decoder
from gpu_proof_parts.report import Proof, Skipped

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
BATCH, CONTEXT, TREE = 32, 512, 16
BATCHES, COUNTS = (1, 8, 32), (1, 2, 4, 8, 16)


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
        opened = TensorRTEngine.open(engine, Path(folder) / file, build.facts(), BATCH, sizes.blocks, sizes.pool)
        proof.table(("B", "N: ms"), list(curves(proof, opened, sizes.blocks)))


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
