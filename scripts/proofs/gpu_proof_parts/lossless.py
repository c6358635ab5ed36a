"""ECHO end to end on the GPU: every policy writes what plain decoding writes, greedy and sampled."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import numpy as np
import torch

from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.decoding.goodput.model.acceptance import Acceptance
from echo_trt.decoding.goodput.model.costs import Costs, Curve
from echo_trt.decoding.goodput.planner import GoodputPlanner
from echo_trt.decoding.goodput.settings import GoodputSettings
from echo_trt.decoding.pack import pack
from echo_trt.decoding.planner import Planner
from echo_trt.decoding.policies import make_planner, reserve_for
from echo_trt.models.roles import DraftRole, TargetRole
from echo_trt.runtime.drafters import EngineDrafter
from echo_trt.runtime.loop import Loop
from echo_trt.runtime.params import SamplingParams
from echo_trt.runtime.request import Request
from echo_trt.runtime.slots import Slots, blocks_for
from gpu_proof_parts.curves import operator
from gpu_proof_parts.networks import SMALL, TINY, first_layers, quiet_layers, random_decoder
from gpu_proof_parts.report import Proof, Skipped

POLICIES = ("static", "echo", "goodput")
DECODING = {
    "max_depth": 4, "beams": 3, "width": 4, "per_request": 16, "gates": {1: 0.02, 3: 0.005}, "fixed_threshold": 0.02,
    "static": {"depth": 3, "top_k": 3, "tokens": 8},
}  # fmt: skip
TIE = 1e-4  # of the largest logit: kernels of other batch sizes round otherwise


@dataclass(frozen=True)
class Scale:
    requests: int
    prompt: int
    tokens: int
    batch: int


def prove(proof: Proof) -> None:
    scale = Scale(2, 9, 4, 2) if proof.interpret else Scale(24, 200, 48, 8)
    # Heads of 32: in float32, larger ones need more shared memory than some cards have.
    config = TINY if proof.interpret else dataclasses.replace(SMALL, num_heads=16, num_kv_heads=4, head_dim=32)
    context = scale.prompt + scale.tokens + 2
    rows = []
    for dtype in (torch.float32,) if proof.interpret else (torch.float32, torch.bfloat16):
        model = random_decoder(config, context + reserve_for(DECODING | {"budget": None}), dtype, proof.device)
        quiet_layers(model, 0.05)
        runs = Runs(proof, model, scale, context)
        plain, speed, _ = runs.answers("autoregressive")
        for policy in POLICIES:
            if not proof.in_time:
                proof.lacks(f"{policy} in {dtype} for lack of time")
                continue
            answers, rate, accepted = runs.answers(policy)
            apart = [i for i, (a, b) in enumerate(zip(plain, answers, strict=True)) if a != b]
            gaps = [runs.gap(i, plain[i], answers[i]) for i in apart]
            name = str(dtype).removeprefix("torch.")
            same = f"{len(plain) - len(apart)} of {len(plain)}"
            proof.record(
                **{f"{name} {policy}": {"same": len(plain) - len(apart), "of": len(plain), "accepted": accepted}}
            )
            rows.append((name, policy, same, f"{accepted:.2f}", f"{rate / speed:.2f}x", f"{max(gaps, default=0):.1g}"))
            if dtype == torch.float32:
                bad = sum(gap > TIE for gap in gaps)
                proof.expect(bad == 0, f"{policy}: {bad} texts differ from plain decoding's where no tie explains it")
                proof.expect(accepted > 1.1, f"{policy}: hardly anything was accepted ({accepted:.2f} tokens a pass)")
    if not rows:
        raise Skipped
    proof.table(("type", "policy", "same text", "accepted length", "speed", "largest gap"), rows)
    proof.say(
        f"{scale.requests} requests, every other one sampled, {scale.batch} at once; a random target whose first "
        "layers are the draft. A gap is the distance of the target's logits of the two tokens where texts part, over "
        f"the largest logit; up to {TIE:g} it is a tie. In float32 nothing else may part; bfloat16 is told, not judged."
    )


class Runs:
    """The same requests under one policy after another."""

    def __init__(self, proof: Proof, model, scale: Scale, context: int):
        self.model, self.scale, self.context = model, scale, context
        self.reserve = reserve_for(DECODING | {"budget": None})
        self.blocks = blocks_for(context + self.reserve) * scale.batch
        draft = first_layers(model, max(1, model.config.num_layers // 3))
        roles = TargetRole(model), DraftRole(draft, DECODING["width"])
        self.target, self.draft = (
            TorchEngine(role, self.blocks, str(proof.device), operator=operator(proof)) for role in roles
        )
        self.draft._role.num_layers = len(draft.layers)
        rng = np.random.default_rng(3)
        lengths = rng.integers(1, scale.prompt + 1, scale.requests)
        self.prompts = [rng.integers(0, model.config.vocab_size, n) for n in lengths]

    def answers(self, name: str) -> tuple[list[list[int]], float, float]:
        """Texts, tokens a second and accepted length; the second of two runs, so that graphs are there."""
        for _ in range(2 if self.target.device.type == "cuda" else 1):
            state = Slots(self.scale.batch, self.context, self.reserve, self.blocks)
            drafter = EngineDrafter(self.draft, state, 64)
            loop = Loop(self.target, drafter, state, self._planner(name), (), 64)
            requests = [Request(i, prompt, self._params(i)) for i, prompt in enumerate(self.prompts)]
            for request in requests:
                loop.queue.add(request)
            start = time.perf_counter()
            while loop.queue.busy:
                loop.step()
            seconds = time.perf_counter() - start
        counters = loop.counters
        rate = counters.emitted_tokens / seconds
        return [r.generated for r in requests], rate, counters.emitted_tokens / counters.verifications

    def gap(self, index: int, first: list[int], second: list[int]) -> float:
        """The distance of the logits of the tokens where two texts part, over the largest logit."""
        shared = next(i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
        ids = np.concatenate((self.prompts[index], first[:shared]))
        count = np.array([len(ids)])
        table = np.arange(blocks_for(len(ids)))[None]
        call = pack(ids, np.arange(len(ids)), np.zeros(1, np.int64), count, table, count - 1)
        logits = self.target.run(call)["logits"][0]
        return float(abs(logits[first[shared]] - logits[second[shared]]) / np.abs(logits).max())

    def _params(self, index: int) -> SamplingParams:
        return SamplingParams(self.scale.tokens, temperature=0.8 * (index % 2), seed=index, ignore_eos=True)

    def _planner(self, name: str) -> Planner:
        return make_planner(name, DECODING | {"budget": 4 * self.scale.batch}, self._goodput)

    def _goodput(self, name: str, settings: GoodputSettings) -> GoodputPlanner:
        # Verification all but free, so that trees grow: what is proved is the text, not the plan.
        costs = Costs(Curve([1, 64, 128], [0.02, 0.02, 0.04]), Curve([1, 256], [1e-5, 1e-5]))
        acceptance = Acceptance.uncalibrated(settings.max_depth)
        return GoodputPlanner(name, settings, costs, acceptance, self.scale.batch)
