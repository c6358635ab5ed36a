"""Calls of random trees for engines of random networks, and the policies that decode with them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gpu.random_networks import first_layers

from echo_trt.backends.base import Engine
from echo_trt.backends.cuda.sizes import CallBounds
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.engine.batch import InputBatch, blocks_for
from echo_trt.engine.core import EngineCore
from echo_trt.engine.drafters.eagle3 import EngineDrafter
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.request import Request
from echo_trt.models.config import DecoderConfig
from echo_trt.models.decoder import Decoder
from echo_trt.models.roles import DraftModule, TargetModule
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.model.costs import Costs
from echo_trt.speculation.goodput.planner import GoodputPlanner
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt.speculation.pack import BLOCK, ForwardBatch, pack
from echo_trt.speculation.policies import make_planner, reserve_for
from echo_trt.speculation.super_tree import SuperTree, ancestor_mask

DECODING = {
    "max_depth": 5, "beams": 3, "width": 4, "per_request": 32, "gates": {1: 0.2, 3: 0.3}, "fixed_threshold": 0.2,
    "static": {"depth": 4, "top_k": 4, "tokens": 16}, "budget": None,
}  # fmt: skip


#: What is other on a CPU, where every level of a tree is a walk through Triton's interpreter.
SHALLOW = {"max_depth": 2, "beams": 2, "gates": {1: 0.2}, "static": {"depth": 2, "top_k": 2, "tokens": 4}}


@dataclass(frozen=True)
class Card:
    """``operator``: the kernel for an engine on a CPU, where Triton interprets it; None: an engine's own choice."""

    device: torch.device
    operator: Callable | None = None

    def pick(self, full: Any, tiny: Any) -> Any:
        """Return the size of a test: ``tiny`` on a CPU."""
        return full if self.device.type == "cuda" else tiny

    def free(self) -> int:
        """Return free bytes of the card's memory; 0 on a CPU."""
        return torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else 0


def call_of(batch: int, count: int, context: int, vocab: int, rng: np.random.Generator) -> ForwardBatch:
    """``batch`` requests of ``context`` cached tokens, each of which verifies a random tree of ``count`` tokens."""
    tree, none = SuperTree.from_roots(rng.integers(0, vocab, batch)), np.zeros(batch)
    for step in range(1, count):
        tree.add(batch * rng.integers(0, step, batch) + np.arange(batch), rng.integers(0, vocab, batch), none)
    tree, _ = tree.sorted_by_request(np.arange(len(tree)))
    past, counts, blocks = np.full(batch, context), np.full(batch, count), -(-(context + count) // BLOCK)
    table = rng.permutation(batch * blocks).reshape(batch, blocks)
    mask = ancestor_mask(tree) if count > 1 else None
    return pack(tree.token, context + tree.depth, past, counts, table, np.arange(len(tree)), mask)


def seconds_of(engine: Engine, call: ForwardBatch, runs: int = 9) -> float:
    """Median seconds of a run with its best tokens on the host."""
    taken = []
    for _ in range(runs + 2):
        begin = time.perf_counter()
        engine.run(call)["logits"].argmax(axis=1)
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken[2:]))


def fitting(config: DecoderConfig, blocks: int) -> DecoderConfig:
    """Return the network with as many layers as this card's memory takes beside ``blocks`` of their KV cache."""
    hidden, kv = config.hidden_size, config.num_kv_heads * config.head_dim
    layer = hidden * (2 * config.num_heads * config.head_dim + 2 * kv + 3 * config.intermediate_size)
    room = 0.85 * torch.cuda.mem_get_info()[0] - 4 * config.vocab_size * hidden - 3e9
    return replace(config, num_layers=min(config.num_layers, int(room // (2 * layer + 4 * (blocks + 64) * BLOCK * kv))))


class Decoding:
    """A target, its first layer as the draft, and requests that one policy after another decodes."""

    def __init__(self, card: Card, model: Decoder, batch: int, prompts: list[np.ndarray], tokens: int):
        """``tokens`` of every answer; ``batch``: requests at once, at most."""
        self.decoding = DECODING | card.pick({}, SHALLOW)
        self.reserve, self.prompts, self.tokens = reserve_for(self.decoding), prompts, tokens
        self.context = max(map(len, prompts)) + tokens + 2
        self.slot_blocks = blocks_for(self.context + self.reserve)
        roles = TargetModule(model), DraftModule(first_layers(model, 1), DECODING["width"])
        bounds, blocks = CallBounds(batch, self.slot_blocks, self.reserve), self.slot_blocks * batch
        self.target, self.draft = (
            TorchEngine(role, blocks, str(card.device), operator=card.operator, bounds=bounds) for role in roles
        )

    def loop(
        self, policy: str, batch: int, costs: Costs, params: list[SamplingParams]
    ) -> tuple[EngineCore, list[Request]]:
        """Return a loop with as many requests as there are ``params``, none of which has begun."""

        def goodput(name: str, settings: GoodputSettings) -> GoodputPlanner:
            return GoodputPlanner(name, settings, costs, Acceptance.uncalibrated(settings.max_depth), batch)

        planner = make_planner(policy, self.decoding | {"budget": max(32, min(4 * batch, 512))}, goodput)
        state = InputBatch(batch, self.context, self.reserve, self.slot_blocks * batch)
        loop = EngineCore(self.target, EngineDrafter(self.draft, state, 512), state, planner, (), 512)
        requests = [Request(i, self.prompts[i], one) for i, one in enumerate(params)]
        for request in requests:
            loop.scheduler.add(request)
        return loop, requests

    def gap(self, index: int, first: list[int], second: list[int]) -> float:
        """Return the distance of the logits of the tokens where two texts part, over the largest logit."""
        shared = next(i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
        ids = np.concatenate((self.prompts[index], first[:shared]))
        count, table = np.array([len(ids)]), np.arange(blocks_for(len(ids)))[None]
        call = pack(ids, np.arange(len(ids)), np.zeros(1, np.int64), count, table, count - 1)
        logits = self.target.run(call)["logits"][0]
        return float(abs(logits[first[shared]] - logits[second[shared]]) / np.abs(logits).max())
