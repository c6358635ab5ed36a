"""What is served, of random weights: a target with an EAGLE-3 head behind the loop, and counts taken on the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu.compiled import Built
from gpu.engines import Card, call_of
from gpu.random_networks import head_config, random_decoder, random_head
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from echo_trt.backends.cuda.sizes import CallBounds
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.bundle.call_sizes import CallSizes
from echo_trt.bundle.read_recipe import load_recipe, parse_recipe
from echo_trt.bundle.recipe import Recipe
from echo_trt.engine.batch import InputBatch
from echo_trt.engine.core import EngineCore
from echo_trt.engine.measure import timed_rounds, typical
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.request import Request
from echo_trt.models.config import DecoderConfig
from echo_trt.models.roles import HeadModule, TargetModule, project_in_target
from echo_trt.sizing.needs import Needs, needs
from echo_trt.sizing.networks import decoder_sizes, draft_sizes
from echo_trt.speculation.echo.budget import fit_hinge
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.model.costs import Costs, Curve
from echo_trt.speculation.goodput.planner import GoodputPlanner
from echo_trt.speculation.pack import pack
from echo_trt.speculation.policies import make_planner, reserve_for
from echo_trt_lab.device_counts import RECIPE, CountedDrafter, Counts
from echo_trt_lab.synthetic_engine import SyntheticEngine, propose

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
FREE = Costs(Curve([1, 64, 128], [0.02, 0.02, 0.04]), Curve([1, 256], [1e-5, 1e-5]))  # of verifying: trees grow
#: What is other on a CPU, where every level of a tree is a walk through Triton's interpreter.
SHALLOW = {
    "max_depth": 3, "beams": 2, "width": 4, "per_request": 16, "gates": {1: 0.2, 2: 0.3},
    "static": {"depth": 3, "top_k": 2, "tokens": 5},
}  # fmt: skip


def recipe_of(
    card: Card, engine: str, dtype: torch.dtype, batch: int, context: int, decoding: dict[str, Any] | None = None
) -> Recipe:
    """Return Qwen3-8B's recipe, with its gates and trees or those of ``decoding``, for other limits."""
    raw = load_recipe(RECIPE).model_dump(exclude_unset=True)
    limits = {"batch": batch, "context": context, "prefill_chunk": card.pick(512, 16)}
    settings = {"engine": engine, "precision": PRECISIONS[dtype], "limits": limits}
    decoding = decoding or card.pick(raw["decoding"], SHALLOW)
    return parse_recipe(raw | settings | {"decoding": decoding}, "the test")


def counted(kind: type, step: str) -> type:
    """Return an engine of ``kind`` that counts the tokens of a head's passes where they are computed.

    A graph's replay counts as a launch does. ``step``: the method that computes a pass, from its arrays.
    """

    class Counted(kind):
        computed: torch.Tensor | None = None  # int64 [2]: of levels, and of passes over committed tokens
        requested = 0  # of the levels that were asked for, padding included
        drafted: list[np.ndarray] | None = None  # scores of drafted children, a sorted float32 [A, m] for each go

        def levels(self) -> int:
            return 0 if self.computed is None else int(self.computed[0])

        def start_levels(self, call, below, shape, *more, **inputs):
            self._request(len(call.logit_rows), shape)
            roots, drafted = super().start_levels(call, below, shape, *more, **inputs)
            return roots, self._noted(drafted)

        def run_levels(self, below, rows, shape, max_nodes):
            self._request(len(rows), shape)
            return self._noted(super().run_levels(below, rows, shape, max_nodes))

        def _noted(self, drafted: np.ndarray) -> np.ndarray:
            if self.drafted is not None:
                self.drafted.append(np.sort(np.ascontiguousarray(drafted[:, 3]).view(np.float32), axis=1))
            return drafted

        def _request(self, requests: int, shape) -> None:
            self.requested += self.padded_requests(requests) * shape.beams * shape.levels

    def count(self, tensors, *more, **named):
        if "features" in tensors:
            if self.computed is None:
                self.computed = torch.zeros(2, dtype=torch.int64, device=tensors["token_ids"].device)
            self.computed[int(len(tensors["features"]) > 0)].add_(len(tensors["token_ids"]))
        return getattr(super(Counted, self), step)(tensors, *more, **named)

    setattr(Counted, step, count)
    return Counted


def torch_engines(
    card: Card, recipe: Recipe, config: DecoderConfig, dtype: torch.dtype, networks: Any = None
) -> tuple[Any, Any]:
    """Open a target and its head, as ``engine/assemble.py`` does; on a CPU outputs stay in the engine, too.

    ``networks``: both, which are moved to the card; by default random ones
    """
    sizes, device = CallSizes.of(recipe), str(card.device)
    if not networks:
        model = random_decoder(config, sizes.blocks * 32, dtype, card.device)
        networks = model, random_head(model, dtype)
    roles = TargetModule(networks[0], config.feature_layers), HeadModule(networks[1], recipe.draft.top_k)
    bounds = CallBounds(sizes.batch, sizes.blocks, sizes.tree)
    target, head = (
        counted(TorchEngine, "_compute")(role, sizes.pool, device, card.operator, bounds=bounds, resident=True)
        for role in roles
    )
    return target, head


def tensorrt_engines(recipe: Recipe, config: DecoderConfig, folder: Path) -> tuple[Any, Any]:
    from echo_trt.backends.tensorrt.engine import TensorRTEngine

    built = Built(recipe, folder)
    model = random_decoder(config, built.sizes.blocks * 32, torch.float32, torch.device("cpu"))
    head, kind = HeadModule(random_head(model, torch.float32), recipe.draft.top_k), counted(TensorRTEngine, "_forward")
    target = TargetModule(model, config.feature_layers)
    target.projection = project_in_target(head)
    return built.opened(target, "target", kind)[0], built.opened(head, "draft", kind)[0]


def foreseen(recipe: Recipe, config: DecoderConfig) -> tuple[Needs, int]:
    """Return what sizing says of a recipe, and all its bytes."""
    draft = draft_sizes(head_config(config), projected=recipe.engine == "tensorrt")
    need = needs(recipe, decoder_sizes(config), draft)
    return need, need.fixed + need.pool + need.features


class Served:
    """Engines of a recipe, and one policy after another that decodes with them.

    text   takes the place of the networks' choices; with ``draft_only`` of the head's
    costs  what goodput is told of passes
    taken  bytes of the card's memory, with one policy's graphs
    """

    def __init__(self, recipe: Recipe, config: DecoderConfig, engines: tuple[Any, Any]):
        self.recipe, self.config, (self.target, self.head) = recipe, config, engines
        self.text: Any = None
        self.draft_only, self.costs, self.counts, self.policy, self.taken = False, FREE, Counts(), "", 0

    def drafter(self) -> CountedDrafter:
        """Return a drafter with slots of its own."""
        limits, hidden = self.recipe.limits, self.config.hidden_size
        reserve = reserve_for(self.recipe.decoding.model_dump())
        state = InputBatch(limits.batch, limits.context, reserve, self.target.num_blocks)
        drafter = CountedDrafter(self.head, state, limits.prefill_chunk, 3 * hidden, hidden)
        drafter.counts = self.counts
        return drafter

    def loop(self, policy: str, prompts: list[np.ndarray], params: list[SamplingParams]) -> tuple[EngineCore, list]:
        """Return a loop with a request per prompt, none of which has begun."""
        limits, decoding = self.recipe.limits, self.recipe.decoding.model_dump()

        def goodput(name: str, settings: Any) -> GoodputPlanner:
            acceptance = Acceptance.uncalibrated(settings.max_depth)
            return GoodputPlanner(name, settings, self.costs, acceptance, limits.batch)

        planner = make_planner(policy, decoding | {"budget": max(60, 4 * len(prompts))}, goodput)
        if policy != self.policy:  # a server has the graphs of one policy
            vars(self.head).pop("_levels", None)
        self.policy, drafter, target = policy, self.drafter(), self.target
        if self.text:
            propose(drafter, self.text)
            target = target if self.draft_only else SyntheticEngine(target, self.text, drafter.batch)
        self.head.capture_levels(planner.level_shapes)
        loop = EngineCore(target, drafter, drafter.batch, planner, (), limits.prefill_chunk)
        requests = [Request(i, *each) for i, each in enumerate(zip(prompts, params, strict=True))]
        for request in requests:
            loop.scheduler.add(request)
        return loop, requests

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Run both engines by plain launches, also a head's levels."""
        held = [(self.target, "_graphs"), (self.head, "_graphs"), (self.head._levels, "_graphs")]
        kept = [getattr(*each) for each in held]
        for each in held:
            setattr(*each, None)
        yield
        for each, graphs in zip(held, kept, strict=True):
            setattr(*each, graphs)

    def begun(self, policy: str, batch: int) -> EngineCore:
        """Return a loop of ``batch`` requests whose prompts, half a context each, are computed by both networks."""
        rng, context = np.random.default_rng(5), self.recipe.limits.context
        prompts = [rng.integers(0, self.config.vocab_size, context // 2) for _ in range(batch)]
        loop, _ = self.loop(policy, prompts, [SamplingParams(context // 2 - 1, ignore_eos=True)] * batch)
        while len(loop.batch.prefilling()) or not loop.batch.active.any():
            loop.step()
        loop.step()
        return loop

    def measure(self, seconds: float, sizes: tuple[int, ...]) -> dict[str, Any]:
        """Time passes of ``sizes``, and give goodput their costs. Returns milliseconds by tokens, and K_max."""
        rng, drafter, limits = np.random.default_rng(5), self.drafter(), self.recipe.limits
        shapes = [(min(size, limits.batch), -(-size // limits.batch)) for size in sizes]
        calls = [call_of(*shape, limits.context // 2, self.config.vocab_size, rng) for shape in shapes]

        def head(call: Any) -> None:
            self.head.run(call, **drafter.dummy_inputs(len(call.token_ids)))

        curves = [typical(timed_rounds(run, calls, seconds)) for run in (self.target.run, head)]
        self.costs = Costs(*(Curve([*sizes], np.maximum.accumulate(curve)) for curve in curves))
        rounded = ((1e3 * curve).round(3).tolist() for curve in curves)
        k_max = fit_hinge(np.array(sizes), curves[0]).k_max
        return {"tokens": sizes, "k_max": k_max, **dict(zip(("target_ms", "head_ms"), rounded, strict=True))}

    def rate(self, policy: str, batch: int, seconds: float) -> dict[str, float]:
        """Decode while all requests run, for ``seconds`` at most.

        overlapped  share of target passes in which the device still computed when the host was free for other work
        """
        loop, cuda, busy = self.begun(policy, batch), torch.cuda, list[bool]()
        assert self.target.overlap(lambda: busy.append(cuda.is_available() and not cuda.current_stream().query()))
        counters, head = loop.counters, self.head
        before, computed, requested, self.counts.considered = counters.copy(), head.levels(), head.requested, 0
        begin = time.perf_counter()
        while int(loop.batch.active.sum()) == batch and time.perf_counter() < begin + seconds:
            loop.step()
        seconds, drafted = time.perf_counter() - begin, head.levels() - computed
        waited = sum(counters.seconds[name] - before.seconds.get(name, 0) for name in ("draft", "verify"))
        names = "emitted_tokens", "verifications", "verified_tokens", "iterations"
        emitted, verifications, verified, iterations = (
            getattr(counters, name) - getattr(before, name) for name in names
        )
        return {
            "tokens_per_s": round(emitted / seconds, 1),
            "accepted": round(emitted / verifications, 2),
            "iteration_ms": round(1e3 * seconds / iterations, 3),
            "host_share": round(1 - waited / seconds, 3),
            "overlapped": round(sum(busy) / iterations, 3),
            "verified": verified,
            "drafted": drafted,
            "requested": head.requested - requested,
            "considered": self.counts.considered,
            "drafted_per_verified": round(drafted / verified, 2),
        }


def gap(target: Any, prompt: np.ndarray, first: list[int], second: list[int]) -> float:
    """Return the distance of the logits of the tokens where two texts part, over the largest logit."""
    shared = next(i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
    ids = np.concatenate((prompt, first[:shared]))
    count, table = np.array([len(ids)]), np.arange(-(-len(ids) // 32))[None]
    call = pack(ids, np.arange(len(ids)), np.zeros(1, np.int64), count, table, count - 1)
    logits = np.asarray(target.run(call)["logits"])[0]
    return float(abs(logits[first[shared]] - logits[second[shared]]) / np.abs(logits).max())


class KnownText:
    """A draft's text that is plain decoding's, so that real choices of a target are accepted; see ``HashedText``.

    texts  int64 [n] by key of a request: its prompt and answer. ``size``: tokens of the vocabulary
    """

    def __init__(self, texts: dict[int, np.ndarray], size: int, device: Any = "cpu"):
        self._texts, self._size, keys = texts, size, sorted(texts)
        self._keys = torch.tensor(keys, device=device)
        padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(texts[key]) for key in keys], batch_first=True)
        self._table = padded.to(device)

    def placed(self, xp: Any, device: Any) -> KnownText:
        return KnownText(self._texts, self._size, device)

    def propose(self, keys: Any, previous: Any, positions: Any, depth: Any, count: int) -> tuple[Any, Any]:
        """Propose the text: at two of three positions first and surely, at others second and unsurely."""
        if isinstance(keys, np.ndarray):
            on_device = map(torch.from_numpy, (keys, previous, positions, depth))
            return tuple(found.numpy() for found in self.propose(*on_device, count))
        row = torch.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        right = self._table[row, positions.clip(max=self._table.shape[1] - 1)]
        sure, rank = positions % 3 > 0, torch.arange(count, device=keys.device)
        log_q = torch.log(0.15 + 0.75 * sure)[:, None] - 2.3 * rank
        return log_q, ((right - 1 + sure.long())[:, None] + rank) % self._size


class CacheCopies(TorchDispatchMode):
    """Notes operators that move a whole cache: a layer's keys or values, or all rows of a feature bank."""

    def __init__(self, engines: tuple[Any, Any]):
        super().__init__()
        banks = [engine.feature_cache(name) for engine in engines for name in ("features", "hidden")]
        caches = [(engine._pool, engine._pool[0].numel()) for engine in engines]
        caches += [(bank.rows, bank.rows.numel()) for bank in banks if bank]
        self._sizes = {cache.untyped_storage().data_ptr(): size for cache, size in caches}
        self.found: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not (function.is_view or function.overloadpacket.__name__.startswith("new_")):  # which read no values
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            sizes = [(t.numel(), self._sizes.get(t.untyped_storage().data_ptr(), 0)) for t in tensors]
            whole = [cache for size, cache in sizes if 0 < cache <= size]
            if whole and max((size for size, cache in sizes if not cache), default=0) >= min(whole):
                self.found.add(str(function))
        return result
