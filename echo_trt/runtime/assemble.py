"""From a bundle to a loop that can run: engines, KV pool, drafter."""

from __future__ import annotations

from pathlib import Path

from echo_trt.bundle import MANIFEST, Manifest, read_manifest, verify_files
from echo_trt.decoding.policies import Policy, reserve_for
from echo_trt.engines.base import Engine
from echo_trt.errors import UserError
from echo_trt.runtime.drafters import Drafter, Eagle3Drafter, EngineDrafter
from echo_trt.runtime.lookup import LookupDrafter
from echo_trt.runtime.loop import Loop
from echo_trt.runtime.params import MAX_STOP_TOKENS
from echo_trt.runtime.slots import Slots, blocks_for


def load_loop(folder: Path, batch: int | None = None, prefix_cache: bool | None = None) -> tuple[Loop, Manifest]:
    """Open a bundle, with plain decoding for a start; ``batch`` (running requests) and ``prefix_cache`` override the
    recipe's."""
    manifest = read_manifest(folder)
    if (ends := len(manifest.eos_token_ids)) > MAX_STOP_TOKENS:
        raise UserError(
            f"{folder / MANIFEST}: eos_token_ids has {ends} ids, but a request stops at {MAX_STOP_TOKENS} at most; "
            "build the bundle again."
        )
    verify_files(folder, manifest)
    recipe = manifest.recipe
    limits, reserve = recipe.limits, reserve_for(recipe.decoding.model_dump())
    count = batch or limits.batch
    each = blocks_for(limits.context + reserve)
    linear = manifest.engine == "tensorrt-rtx"  # its engines have a cache a slot instead of one pool
    blocks = each * count if linear else limits.kv_blocks or each * count
    cached = limits.prefix_cache if prefix_cache is None else prefix_cache
    state = Slots(count, limits.context, reserve, None if linear else blocks, cached)
    target = _engine(folder, manifest, "target", state, blocks)
    own = recipe.draft.kind in ("model", "eagle3")
    return _loop(manifest, state, target, _engine(folder, manifest, "draft", state, blocks) if own else None), manifest


def divided(loop: Loop, manifest: Manifest, parts: int) -> list[Loop]:
    """So many loops over the engines of ``loop``, which rests meanwhile: each has a part of its KV pool.

    Slots of an engine that has a cache for each cannot be divided.
    """
    state = loop.state
    each, draft = state.num_blocks // parts, loop.drafter.engine if isinstance(loop.drafter, EngineDrafter) else None
    loops = []
    for part in range(parts):
        own = Slots(state.count, state.context, state.reserve, each, state.cache.enabled, part * each)
        loops.append(_loop(manifest, own, loop.target, draft))
        if loop.copier:
            loops[-1].copier.log_acceptance = loop.copier.log_acceptance
    return loops


def _loop(manifest: Manifest, state: Slots, target: Engine, draft: Engine | None) -> Loop:
    recipe = manifest.recipe
    copier = LookupDrafter(state, recipe.draft.min_match, recipe.draft.acceptance)
    drafter = copier if recipe.draft.kind == "lookup" else _drafter(manifest, state, draft)
    plain, eos = Policy("autoregressive"), manifest.eos_token_ids
    loop = Loop(target, drafter, state, plain, eos, recipe.limits.prefill_chunk)
    loop.copier = copier if recipe.draft.copy_text else None
    return loop


def _engine(folder: Path, manifest: Manifest, network: str, state: Slots, blocks: int) -> Engine:
    file = folder / (manifest.target if network == "target" else manifest.draft).file
    if network == "target" and manifest.target.rank_files:
        return _ranked(folder, manifest, state, blocks)
    if manifest.tensorrt:
        from echo_trt.engines.tensorrt import TensorRTEngine

        return TensorRTEngine.open(manifest.engine, file, manifest.tensorrt, *state.block_table.shape, blocks)
    if manifest.engine == "torch":
        from echo_trt.engines.torch import open_torch

        return open_torch(file, blocks)
    from echo_trt.engines.openvino import OpenVINOEngine

    own = manifest.recipe.draft.precision if network == "draft" else None
    engine = OpenVINOEngine(file, own or manifest.precision, blocks)
    _check_network(engine.widths, folder / MANIFEST, manifest, network)
    return engine


def _check_network(widths: dict[str, int], path: Path, manifest: Manifest, network: str) -> None:
    """Refuse a manifest that names another network's file, or sizes that are not this one's."""
    facts, head = getattr(manifest, network), manifest.recipe.draft.kind == "eagle3"
    if network == "target":
        right, sizes = "logits" in widths and (not head or "features" in widths), {"vocab_size": "logits"}
    else:
        right = "candidates" in widths and head == ("hidden" in widths)
        sizes = {"feature_size": "features", "hidden_size": "hidden"} if head else {}
    if not right:
        raise UserError(
            f"{path}: {network}.file is {facts.file!r}, which holds another network; build the bundle again."
        )
    for field, name in sizes.items():
        if (size := getattr(facts, field)) != widths[name]:
            raise UserError(
                f"{path}: {network}.{field} is {size}, but the network's is {widths[name]}; build the bundle again."
            )


def _ranked(folder: Path, manifest: Manifest, state: Slots, blocks: int) -> Engine:
    """A divided target, in a process a rank; the draft stands whole in this one."""
    from echo_trt.engines.ranked import RankedEngine

    files = tuple(folder / file for file in manifest.target.rank_files)
    if manifest.tensorrt:
        from echo_trt.engines.tensorrt import TensorRTRank

        opened = TensorRTRank(files, manifest.engine, manifest.tensorrt, *state.block_table.shape, blocks)
    else:
        from echo_trt.engines.torch import TorchRank

        opened = TorchRank(files, blocks)
    return RankedEngine(opened, len(files))


def _drafter(manifest: Manifest, state: Slots, engine: Engine | None) -> Drafter | None:
    draft, facts = manifest.recipe.draft, manifest.draft
    if engine is None:
        return None
    chunk = manifest.recipe.limits.prefill_chunk
    if draft.kind == "model":
        return EngineDrafter(engine, state, chunk)
    return Eagle3Drafter(engine, state, chunk, facts.feature_size, facts.hidden_size)
