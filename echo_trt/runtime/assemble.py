"""From a bundle to a running loop: engines, KV pool, drafter, policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from echo_trt.bundle import Manifest, read_manifest, verify_files
from echo_trt.decoding.policies import Policy, make_policy, reserve_for
from echo_trt.engines.base import Engine
from echo_trt.recipe import Decoding
from echo_trt.runtime.drafters import Drafter, Eagle3Drafter, EngineDrafter
from echo_trt.runtime.lookup import LookupDrafter
from echo_trt.runtime.loop import Loop
from echo_trt.runtime.slots import Slots, blocks_for


def policy_of(decoding: Decoding, name: str | None = None, budget: int | None = None) -> Policy:
    """The recipe's policy, or another one with the recipe's numbers; ``budget`` replaces K_max where it is shared."""
    policy = make_policy(name or decoding.policy, decoding.model_dump())
    return replace(policy, budget=budget) if budget is not None and policy.budget is not None else policy


def load_loop(
    folder: Path, policy: str | None = None, batch: int | None = None, budget: int | None = None
) -> tuple[Loop, Manifest]:
    """Open a bundle; what is given overrides the recipe's policy, number of running requests and K_max."""
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    recipe = manifest.recipe
    limits, reserve = recipe.limits, reserve_for(recipe.decoding.model_dump())
    count = batch or limits.batch
    blocks = limits.kv_blocks or blocks_for(limits.context + reserve) * count
    state = Slots(count, limits.context, reserve, blocks)
    target = _engine(folder / manifest.target.file, manifest, blocks)
    drafter = _drafter(folder, manifest, state, blocks)
    chosen = policy_of(recipe.decoding, policy, budget)
    return Loop(target, drafter, state, chosen, manifest.eos_token_ids, limits.prefill_chunk), manifest


def _engine(file: Path, manifest: Manifest, blocks: int) -> Engine:
    from echo_trt.engines.openvino import OpenVINOEngine

    return OpenVINOEngine(file, manifest.precision, blocks)


def _drafter(folder: Path, manifest: Manifest, state: Slots, blocks: int) -> Drafter | None:
    draft, facts = manifest.recipe.draft, manifest.draft
    if draft.kind == "none":
        return None
    if draft.kind == "lookup":
        return LookupDrafter(state, draft.min_match, draft.acceptance)
    engine, chunk = _engine(folder / facts.file, manifest, blocks), manifest.recipe.limits.prefill_chunk
    if draft.kind == "model":
        return EngineDrafter(engine, state, chunk)
    return Eagle3Drafter(engine, state, chunk, facts.feature_size, facts.hidden_size)
