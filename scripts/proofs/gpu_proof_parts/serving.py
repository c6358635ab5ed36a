"""Tokens a second end to end: plain decoding, static trees, ECHO and goodput, on a network of Qwen3-8B's shape."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass

import numpy as np
import torch

from echo_trt.backends.cuda.sizes import CallBounds
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.decoding.goodput.model.acceptance import Acceptance
from echo_trt.decoding.goodput.model.costs import Costs, Curve
from echo_trt.decoding.goodput.planner import GoodputPlanner
from echo_trt.decoding.goodput.settings import GoodputSettings
from echo_trt.decoding.pack import Packed
from echo_trt.decoding.policies import make_planner, reserve_for
from echo_trt.models.roles import DraftRole, TargetRole
from echo_trt.runtime.drafters import EngineDrafter
from echo_trt.runtime.loop import Loop
from echo_trt.runtime.params import SamplingParams
from echo_trt.runtime.request import Request
from echo_trt.runtime.rounds import timed_rounds, typical
from echo_trt.runtime.slots import Slots, blocks_for
from gpu_proof_parts.curves import call_of, fitting
from gpu_proof_parts.networks import QWEN3_8B, TINY, first_layers, quiet_layers, random_decoder
from gpu_proof_parts.report import Failed, Proof, Skipped

POLICIES = ("autoregressive", "static", "echo", "goodput")
#: The paper's two settings, of low and of high load, are the same gates under another budget.
DECODING = {
    "max_depth": 5, "beams": 3, "width": 4, "per_request": 32, "gates": {1: 0.2, 3: 0.3}, "fixed_threshold": 0.2,
    "static": {"depth": 4, "top_k": 4, "tokens": 16},
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    batches: tuple[int, ...]
    prompt: int
    tokens: int
    sizes: tuple[int, ...]


FULL = Scale((1, 8, 32, 64, 128, 256), 128, 400, (1, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512))
WALKED = Scale((1, 3), 6, 30, (1, 2))


class TimedEngine:
    """An engine whose seconds on the device are added up, by events around each run."""

    def __init__(self, engine: TorchEngine):
        self._engine, self.num_blocks, self.sizes = engine, engine.num_blocks, engine.sizes
        self._events: list[tuple] = []
        self._seconds = 0.0

    def run(self, call: Packed, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        if self._engine.device.type != "cuda":
            start = time.perf_counter()
            outputs = self._engine.run(call, **inputs)
            self._seconds += time.perf_counter() - start
            return outputs
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        outputs = self._engine.run(call, **inputs)
        end.record()
        self._events.append((begin, end))
        return outputs

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        self._engine.move(source, target)

    def seconds(self) -> float:
        """Return seconds on the device since the last question."""
        if self._events:
            torch.cuda.synchronize()
            self._seconds = sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
        seconds, self._seconds = self._seconds, 0.0
        self._events.clear()
        return seconds


def prove(proof: Proof) -> None:
    scale = WALKED if proof.interpret else FULL
    reserve = reserve_for(DECODING | {"budget": None})
    context = scale.prompt + scale.tokens + 2
    blocks = blocks_for(context + reserve) * scale.batches[-1]
    config = TINY if proof.interpret else fitting(QWEN3_8B, blocks + blocks // 8)
    if config.num_layers < 2:
        raise Failed("this card's memory takes no two layers of the network beside its KV cache")
    dtype = torch.float32 if proof.interpret else torch.bfloat16
    model = random_decoder(config, context + reserve, dtype, proof.device)
    quiet_layers(model, 0.03)
    draft = first_layers(model, 1)
    roles = TargetRole(model), DraftRole(draft, DECODING["width"])
    bounds = CallBounds(scale.batches[-1], blocks_for(context + reserve), reserve)
    start = time.monotonic()
    engines = [TimedEngine(TorchEngine(role, blocks, str(proof.device), bounds=bounds)) for role in roles]
    proof.say(
        f"{config.num_layers} of {QWEN3_8B.num_layers} layers in {str(dtype).removeprefix('torch.')}, the first of "
        f"them with the output matrix as the draft; prompts of {scale.prompt} tokens, greedy. Graphs captured in "
        f"{time.monotonic() - start:.1f} s. Rates are of decoding alone. The host's share is of an iteration's time in "
        "which no pass of target or draft runs."
    )
    if importlib.util.find_spec("numba") is None:
        proof.lacks("numba is not installed, so that the host's planning is interpreted and its share larger")
    runs = Runs(proof, scale, engines, config.vocab_size, reserve, context)
    costs = runs.costs(proof)
    rows, figures = [], []
    for batch in scale.batches:
        plain = None
        for policy in POLICIES:
            if not proof.in_time:
                proof.lacks(f"{policy} at B = {batch} for lack of time")
                continue
            told = runs.rate(policy, batch, costs)
            plain = plain or told["rate"]
            figures.append({"batch": batch, "policy": policy, **told, "speedup": told["rate"] / plain})
            rows.append((batch, policy, f"{told['rate']:,.0f}", f"{told['rate'] / plain:.2f}x",
                         f"{told['accepted']:.2f}", f"{told['tokens']:.0f}", f"{told['iteration']:.2f}",
                         f"{told['host']:.0%}"))  # fmt: skip
    if not rows:
        raise Skipped
    head = ("B", "policy", "tokens/s", "of plain", "accepted", "N", "iteration, ms", "host's share")
    proof.table(head, rows)
    proof.record(runs=figures)
    reached = {row["batch"] for row in figures if row["policy"] == "autoregressive"}
    proof.check("plain decoding ran at every batch", set(scale.batches) == reached or None, f"at {sorted(reached)}")


class Runs:
    """The same requests under one policy after another."""

    def __init__(self, proof: Proof, scale: Scale, engines: list[TimedEngine], vocab: int, reserve: int, context: int):
        self._proof, self._scale, self._engines = proof, scale, engines
        self._vocab, self._reserve, self._context = vocab, reserve, context
        rng = np.random.default_rng(5)
        self._prompts = [rng.integers(0, vocab, scale.prompt) for _ in range(scale.batches[-1])]

    def costs(self, proof: Proof) -> Costs:
        """Measure T(N) of target and draft, as the server does, and put both into the report."""
        curves = []
        for engine, name in zip(self._engines, ("target", "draft"), strict=True):
            config = engine._engine._role.network.config
            rng = np.random.default_rng(6)
            calls = [call_of(size, 1, self._scale.prompt, config, rng) for size in self._fitting_sizes()]
            seconds = np.maximum.accumulate(typical(timed_rounds(engine.run, calls, 2.0)))
            engine.seconds()
            curves.append(Curve(self._fitting_sizes(), seconds))
            proof.record(**{f"{name}_ms": dict(zip(self._fitting_sizes(), (1e3 * seconds).tolist(), strict=True))})
            told = "; ".join(f"{n}: {1e3 * s:.2f}" for n, s in zip(self._fitting_sizes(), seconds, strict=True))
            proof.say(f"T(N) of the {name}, N requests of one token, ms: {told}.")
        return Costs(*curves)

    def _fitting_sizes(self) -> list[int]:
        return [size for size in self._scale.sizes if size <= self._scale.batches[-1]]

    def rate(self, policy: str, batch: int, costs: Costs) -> dict[str, float]:
        """Decode until the time for this run is over, or all texts have ended; prompts' iterations do not count."""
        target, draft = self._engines
        slot_blocks = blocks_for(self._context + self._reserve)
        state = Slots(batch, self._context, self._reserve, slot_blocks * batch)
        loop = Loop(target, EngineDrafter(draft, state, 512), state, self._planner(policy, batch, costs), (), 512)
        for i in range(batch):
            loop.queue.add(Request(i, self._prompts[i], SamplingParams(self._scale.tokens, ignore_eos=True)))
        while len(state.prefilling()) or not state.active.any():
            loop.step()
        for _ in range(2):  # the draft's catch-up with the prompts
            if loop.queue.busy:
                loop.step()
        for engine in self._engines:
            engine.seconds()
        before, start = loop.counters.copy(), time.perf_counter()
        until = start + (3600 if self._proof.interpret else 2.0)
        while loop.queue.busy and time.perf_counter() < until:
            loop.step()
            if int(state.active.sum()) < batch:
                break
        seconds, after = time.perf_counter() - start, loop.counters
        iterations = max(after.iterations - before.iterations, 1)
        emitted = after.emitted_tokens - before.emitted_tokens
        verifications = max(after.verifications - before.verifications, 1)
        device = sum(engine.seconds() for engine in self._engines)
        return {
            "rate": emitted / seconds,
            "accepted": emitted / verifications,
            "tokens": (after.verified_tokens - before.verified_tokens) / iterations,
            "iteration": 1e3 * seconds / iterations,
            "host": max(1 - device / seconds, 0.0),
        }

    def _planner(self, name: str, batch: int, costs: Costs):
        def goodput(name: str, settings: GoodputSettings) -> GoodputPlanner:
            return GoodputPlanner(name, settings, costs, Acceptance.uncalibrated(settings.max_depth), batch)

        return make_planner(name, DECODING | {"budget": max(32, min(4 * batch, 512))}, goodput)
