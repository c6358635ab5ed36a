"""Open a bundle: engines, KV pool, drafter, and their costs and calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from echo_trt.backends.base import Engine
from echo_trt.backends.cuda.sizes import CallBounds
from echo_trt.backends.kind import engine_kind
from echo_trt.backends.states import KeepsStates, KeptStates
from echo_trt.bundle.calibration import Calibration, read_calibration
from echo_trt.bundle.manifest import MANIFEST, NGRAMS, Manifest, NetworkFacts, read_manifest, verify_files
from echo_trt.bundle.ngrams import read_ngrams
from echo_trt.bundle.stored import CALIBRATION
from echo_trt.engine.batch import InputBatch
from echo_trt.engine.core import EngineCore
from echo_trt.engine.drafters.eagle3 import Drafter
from echo_trt.engine.drafters.kind import draft_kind
from echo_trt.engine.drafters.levels import LevelsDrafter
from echo_trt.engine.drafters.lookup import LookupDrafter
from echo_trt.engine.kv_pool import KVPool, kv_pool
from echo_trt.engine.params import MAX_STOP_TOKENS
from echo_trt.errors import UserError
from echo_trt.files.extras import check_modules
from echo_trt.speculation.goodput.model.ngrams import NGrams
from echo_trt.speculation.planner import Planner
from echo_trt.speculation.policies import reserve_for


@dataclass(frozen=True)
class Networks:
    """A bundle's engines over one KV pool.

    pool        the size of the KV pool; of a part, the whole pool's
    folder      of the bundle, where a drafter may have more than its network
    ngrams      table of the target's earlier answers; None: the recipe names none
    learns_answers  whether answers propose to later requests of the same sender
    """

    manifest: Manifest
    pool: KVPool
    batch: InputBatch
    target: Engine
    draft: Engine | None
    calibration: Calibration | None
    folder: Path = Path()
    ngrams: NGrams | None = None
    learns_answers: bool = False

    @cached_property
    def _lookup(self) -> LookupDrafter:
        draft, known = self.manifest.recipe.draft, self.calibration
        return LookupDrafter(self.batch, draft.min_match, known.lookup if known else draft.acceptance)

    @cached_property
    def drafter(self) -> Drafter | None:
        """The draft; None: there is none."""
        if draft_kind(self.manifest.recipe.draft.kind).copies:
            return self._lookup
        return drafter_with(self.manifest, self.batch, self.draft, self.folder)

    @property
    def copier(self) -> LookupDrafter | None:
        """What finds continuations in a request's own text; None: the recipe leaves them out."""
        return self._lookup if self.manifest.recipe.draft.copy_text else None

    def prepare(self, planner: Planner) -> None:
        """Capture the drafts that ``planner`` will ask a device for as CUDA graphs, before requests wait for them."""
        if isinstance(self.drafter, LevelsDrafter):
            self.drafter.engine.capture_levels(planner.level_shapes)

    def loop(self, planner: Planner) -> EngineCore:
        """Make an engine core over these networks; one core at a time may have running requests."""
        manifest = self.manifest
        chunk = min(manifest.recipe.limits.prefill_chunk, self.target.longest)
        return EngineCore(self.target, self.drafter, self.batch, planner, manifest.eos_token_ids, chunk)

    def over(self, batch: InputBatch) -> Networks:
        """Return the same networks over other slots, such as a part of the KV pool; these must rest meanwhile."""
        return replace(self, batch=batch)


def load_networks(
    folder: Path,
    batch: int | None = None,
    prefix_cache: bool | None = None,
    kv_cache_memory: int | None = None,
    learn_answers: bool = False,
) -> Networks:
    """Open a bundle; ``batch`` (running requests) and ``prefix_cache`` override the recipe's.

    ``kv_cache_memory``: bytes of the KV pool; None: see ``kv_pool``.
    """
    manifest = read_manifest(folder)
    if (ends := len(manifest.eos_token_ids)) > MAX_STOP_TOKENS:
        raise UserError(
            f"{folder / MANIFEST}: eos_token_ids has {ends} ids, but a request stops at {MAX_STOP_TOKENS} at most; "
            "build the bundle again."
        )
    kind = engine_kind(manifest.engine)
    check_modules(f"engine {kind.name}", kind.modules, kind.extra)
    if manifest.target.keeps_states and not kind.states:
        raise UserError(f"{folder} has recurrent layers, which engine {kind.name} runs no more; build it again.")
    verify_files(folder, manifest)
    recipe = manifest.recipe
    limits, reserve = recipe.limits, reserve_for(recipe.decoding.model_dump())
    count = batch or limits.batch
    pool = kv_pool(folder, manifest, count, kv_cache_memory)
    cached = limits.prefix_cache if prefix_cache is None else prefix_cache
    input_batch = InputBatch(count, limits.context, reserve, pool.blocks, cached)
    target = _engine(folder, manifest, manifest.target, input_batch, pool.blocks)
    if isinstance(target, KeepsStates) and target.states and cached:
        input_batch.blocks.states = KeptStates(target.states)
    input_batch.blocks.cache.enabled = cached and (target.paged or input_batch.blocks.states is not None)
    draft = _engine(folder, manifest, manifest.draft, input_batch, pool.blocks) if manifest.draft else None
    path = folder / CALIBRATION
    known = None
    if path.exists():
        known = read_calibration(path, manifest.target_sha256, manifest.draft_sha256)
    ngrams = None
    if recipe.draft.ngrams is not None:
        ngrams = read_ngrams(folder / NGRAMS, manifest.target_sha256, manifest.target.vocab_size)
    return Networks(manifest, pool, input_batch, target, draft, known, folder, ngrams, learn_answers)


def _engine(folder: Path, manifest: Manifest, facts: NetworkFacts, batch: InputBatch, blocks: int) -> Engine:
    """Open the network of ``facts``: the manifest's target, or its draft."""
    network = "target" if facts is manifest.target else "draft"
    slots, slot_blocks = batch.blocks.table.shape
    open_file = partial(
        engine_kind(manifest.engine).open,
        precision=manifest.recipe.draft_precision if network == "draft" else manifest.precision,
        num_blocks=blocks,
        bounds=CallBounds(slots, slot_blocks, batch.reserve),
        facts=manifest.engine_facts,
    )
    if network == "target" and facts.rank_files:  # divided, in a process per rank; the draft stands whole in this one
        from echo_trt.backends.parallel.ranked import RankedEngine, of_rank

        files = tuple(folder / file for file in facts.rank_files)
        return RankedEngine(partial(of_rank, files, open_file), len(files))
    engine = open_file(folder / facts.file)
    if engine.widths:
        _check_network(engine.widths, folder / MANIFEST, manifest, network)
    return engine


def _check_network(widths: Mapping[str, int], path: Path, manifest: Manifest, network: str) -> None:
    """Refuse a manifest that names another network's file, or sizes that are not this one's."""
    facts, kind = getattr(manifest, network), draft_kind(manifest.recipe.draft.kind)
    head, reads = kind.hidden, kind.features is not None
    if network == "target":
        right, sizes = "logits" in widths and (not reads or "features" in widths), {"vocab_size": "logits"}
    else:
        right = "candidates" in widths and head == ("hidden" in widths) and reads == ("features" in widths)
        sizes = {"feature_size": "features"} if reads else {}
        sizes |= {"hidden_size": "hidden"} if head else {}
    if not right:
        raise UserError(
            f"{path}: {network}.file is {facts.file!r}, which holds another network; build the bundle again."
        )
    for field, name in sizes.items():
        if (size := getattr(facts, field)) != widths[name]:
            raise UserError(
                f"{path}: {network}.{field} is {size}, but the network's is {widths[name]}; build the bundle again."
            )


def drafter_with(manifest: Manifest, batch: InputBatch, engine: Engine | None, folder: Path) -> Drafter | None:
    """Return the drafter of the bundle in ``folder`` whose draft network ``engine`` runs."""
    if engine is None or manifest.draft is None:
        return None
    return draft_kind(manifest.recipe.draft.kind).drafter(manifest, batch, engine, folder)
