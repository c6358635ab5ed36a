"""From a bundle to a loop that can run: engines, KV pool, drafter."""

from __future__ import annotations

from pathlib import Path

from echo_trt.bundle import Manifest, read_manifest, verify_files
from echo_trt.decoding.policies import Policy, reserve_for
from echo_trt.engines.base import Engine
from echo_trt.runtime.drafters import Drafter, Eagle3Drafter, EngineDrafter
from echo_trt.runtime.lookup import LookupDrafter
from echo_trt.runtime.loop import Loop
from echo_trt.runtime.slots import Slots, blocks_for


def load_loop(folder: Path, batch: int | None = None) -> tuple[Loop, Manifest]:
    """Open a bundle, with plain decoding for a start; ``batch`` overrides the recipe's number of running requests."""
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    recipe = manifest.recipe
    limits, reserve = recipe.limits, reserve_for(recipe.decoding.model_dump())
    count = batch or limits.batch
    blocks = limits.kv_blocks or blocks_for(limits.context + reserve) * count
    state = Slots(count, limits.context, reserve, blocks)
    target = _engine(folder / manifest.target.file, manifest.precision, blocks)
    copier = LookupDrafter(state, recipe.draft.min_match, recipe.draft.acceptance)
    drafter = copier if recipe.draft.kind == "lookup" else _drafter(folder, manifest, state, blocks)
    plain, eos = Policy("autoregressive"), manifest.eos_token_ids
    loop = Loop(target, drafter, state, plain, eos, limits.prefill_chunk)
    loop.copier = copier if recipe.draft.copy_text else None
    return loop, manifest


def _engine(file: Path, precision: str, blocks: int) -> Engine:
    from echo_trt.engines.openvino import OpenVINOEngine

    return OpenVINOEngine(file, precision, blocks)


def _drafter(folder: Path, manifest: Manifest, state: Slots, blocks: int) -> Drafter | None:
    draft, facts = manifest.recipe.draft, manifest.draft
    if draft.kind == "none":
        return None
    engine = _engine(folder / facts.file, draft.precision or manifest.precision, blocks)
    chunk = manifest.recipe.limits.prefill_chunk
    if draft.kind == "model":
        return EngineDrafter(engine, state, chunk)
    return Eagle3Drafter(engine, state, chunk, facts.feature_size, facts.hidden_size)
