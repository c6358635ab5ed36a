"""Counts of an iteration on a device, taken without one: draft tokens, passes, waits, launches and bytes.

The loop, planners, drafter and PyTorch engine are the real ones. The networks compute nothing: target and head answer
at once by a table, so that some requests are sure, some middling and some unsure, and the counts are always the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from echo_trt.backends.cuda.calls import Staging, shapes_of
from echo_trt.backends.cuda.sizes import SIZES, Arrays, CallBounds, Capacity
from echo_trt.backends.cuda.transfers import TRANSFERS
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.bundle.read_recipe import load_recipe
from echo_trt.engine.batch import InputBatch
from echo_trt.engine.core import EngineCore
from echo_trt.engine.drafters.levels import LevelsDraft, LevelsDrafter
from echo_trt.engine.kv_blocks import blocks_for
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.request import Request
from echo_trt.models.config import DecoderConfig, Eagle3Config
from echo_trt.models.decoder import Decoder
from echo_trt.models.eagle3 import Eagle3Head
from echo_trt.models.roles import HeadModule, TargetModule
from echo_trt.speculation.drafts import Proposals
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.model.costs import Costs, Curve
from echo_trt.speculation.goodput.planner import GoodputPlanner
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt.speculation.planner import Iteration, Planner
from echo_trt.speculation.policies import load_policies, make_planner, reserve_for
from echo_trt.speculation.super_tree import SuperTree

RECIPE = Path(__file__).parents[2] / "build" / "qwen3-8b.yaml"  # its gates, depth and beams
ABLATIONS = Path(__file__).with_name("ablations.py")
POLICIES = ("autoregressive", "static", "dense", "fixed", "echo", "goodput")
VOCABULARY = 151_936  # Qwen3's
#: Features and states are narrow: their rows would be copied on the device, which this machine would have to do.
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "num_kv_heads": 1,
    "head_dim": 8, "norm_eps": 1e-6, "rope_theta": 1e6, "max_position": 512,
}  # fmt: skip
CONFIG = DecoderConfig(family="qwen3", num_layers=3, qk_norm=True, **SHAPE)
PROMPT = 16
KIND = 50_000  # token ids of a kind of text: sure, middling, unsure
TOP_K = 20
#: The head's log-probabilities of a node's children, of a kind of text each. A sure request passes all of Qwen3-8B's
#: gates, a middling one those at depths 1 and 2, an unsure one none.
_REST = 0.3 * 0.7 ** np.arange(TOP_K - 1)
CHILDREN = np.log(
    [[0.9, *(0.1 * _REST)], [0.6, *(0.4 * _REST)], (0.15 * 0.85 ** np.arange(TOP_K)).tolist()], dtype=np.float32
)
KINDS = (0, 0, 1, 2)  # of the requests, in turn
#: Of ten positions, how many have the head's best child as their token, and how many its second; others have neither.
RIGHT = np.array([[9, 1], [6, 2], [2, 1]])


@dataclass
class Counts:
    """What happened so far.

    draft_tokens    tokens of the draft's levels, padding included
    draft_prefill   tokens of the draft's passes over committed tokens, padding included
    considered      nodes whose children the planner read
    verified        tokens of trees that the target verified, roots included
    passes          of target and draft
    waits           copies to the host, which wait for the device
    launches        replays of graphs, and kernels and copies that are launched outside of them
    up, down        bytes that are copied to the device and to the host
    """

    draft_tokens: float = 0
    draft_prefill: float = 0
    considered: float = 0
    verified: float = 0
    passes: float = 0
    waits: float = 0
    launches: float = 0
    up: float = 0
    down: float = 0

    def per(self, iterations: int) -> dict[str, float]:
        """Return what happens per iteration; the draft's prefill is called "catch_up"."""
        names = {"draft_prefill": "catch_up"}
        return {names.get(name, name): round(value / iterations, 2) for name, value in asdict(self).items()}


class Device:
    """What stands for a device: its counts, and graphs, which are replayed at once."""

    def __init__(self) -> None:
        self.counts, self._inside = Counts(), False

    @contextmanager
    def replaying(self) -> Iterator[None]:
        self._inside = True
        self.counts.launches += 1
        yield
        self._inside = False

    def launched(self) -> None:
        self.counts.launches += not self._inside


class FreeGraphs:
    """One graph per size, as on a GPU: what is kept for it are the buffers that its calls are sent in."""

    def __init__(self, forward: Callable[..., tuple[torch.Tensor, ...]], device: Device):
        self._forward, self._device, self._staging = forward, device, dict[tuple, Staging]()

    def run(self, arrays: Arrays, capacity: Capacity, *arguments: int) -> tuple[torch.Tensor, ...]:
        key = (*arguments, *sorted(zip(arrays, shapes_of(arrays, capacity), strict=True)))
        if key not in self._staging:
            self._staging[key] = Staging(arrays, torch.device("cpu"), capacity)
        inputs = self._staging[key].upload(arrays)
        with self._device.replaying():
            return self._forward(inputs, *arguments)


class FreeEngine(TorchEngine):
    """An engine of a network that answers at once."""

    def __init__(self, role: TargetModule | HeadModule, blocks: int, bounds: CallBounds, device: Device):
        super().__init__(role, blocks, bounds=bounds, resident=True)
        self._counts = device.counts
        self.sizes = SIZES
        if isinstance(role, HeadModule):
            self._levels._graphs = FreeGraphs(self._levels._draft, device)
        self._graphs = FreeGraphs(self._forward, device)

    def _compute(self, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        tokens, kind, counts = tensors["token_ids"], self._kind(tensors), self._counts
        counts.passes += 1
        if len(tensors["features"]):
            counts.draft_prefill += len(tokens)
        else:
            counts.draft_tokens += len(tokens)
        candidates = kind[:, None] * KIND + torch.arange(TOP_K)
        return torch.from_numpy(CHILDREN)[kind], candidates, torch.zeros(1, 16).expand(len(tokens), -1)

    def _forward(self, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        if isinstance(self._role, HeadModule):
            return super()._forward(tensors)
        tokens, requested, kind = tensors["token_ids"], tensors["logit_rows"], self._kind(tensors)
        self._counts.passes += 1
        bound = torch.from_numpy(RIGHT.cumsum(axis=1))[kind]
        child = (7 * tensors["positions"][requested][:, None] % 10 >= bound).sum(dim=1)
        best = kind * KIND + torch.where(child < 2, child, TOP_K)
        logits, features = torch.zeros(1, VOCABULARY).expand(len(kind), -1), torch.zeros(1, 48).expand(len(tokens), -1)
        return logits, features, best[:, None].to(torch.int32)

    def _kind(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the kind of text of the rows whose logits are wanted."""
        return (tensors["token_ids"][tensors["logit_rows"]] // KIND).clamp(max=len(CHILDREN) - 1)


class CountedDraft(LevelsDraft):
    """A draft that counts the nodes whose children are read."""

    def expand(self, tree: SuperTree, nodes: np.ndarray) -> Proposals:
        log_q, tokens = super().expand(tree, nodes)
        self._drafter.counts.considered += int((log_q > -np.inf).any(axis=1).sum())
        return log_q, tokens


class CountedDrafter(LevelsDrafter):
    counts: Counts

    def begin(self, slots: np.ndarray) -> LevelsDraft:
        return CountedDraft(self, slots)


class Launches(TorchDispatchMode):
    """Counts what PyTorch launches outside of graphs; views and new memory launch nothing."""

    def __init__(self, device: Device):
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in func.__name__ and "lift_fresh" not in func.__name__:
            self._device.launched()
        return func(*args, **(kwargs or {}))


class OnMachine(GoodputPlanner):
    """A planner to which passes take what its costs say, so that it always decides the same."""

    def observe(self, iteration: Iteration) -> None:
        costs, target = self.costs, iteration.target
        drafts = tuple(replace(done, seconds=costs.draft(done.tokens, done.context)) for done in iteration.drafts)
        target = replace(target, seconds=costs.target(target.tokens, target.context))
        seconds = target.seconds + sum(done.seconds for done in drafts)
        super().observe(replace(iteration, target=target, drafts=drafts, seconds=seconds, planning=0.0, host=0.0))


def planner_for(policy: str, batch: int, decoding: dict[str, Any]) -> Planner:
    def goodput(name: str, settings: GoodputSettings) -> GoodputPlanner:
        # A GPU's shape, in seconds.
        costs = Costs(Curve([1, 128, 512], [0.010, 0.011, 0.030]), Curve([1, 128, 640], [0.0003, 0.0003, 0.0009]))
        return OnMachine(name, settings, costs, Acceptance.uncalibrated(settings.max_depth), batch)

    load_policies(ABLATIONS)
    return make_planner(policy, decoding | {"budget": max(60, 4 * batch)}, goodput)


class Run:
    """A policy over ``batch`` requests with all prompts computed; ``step`` is an iteration."""

    def __init__(self, policy: str, batch: int, iterations: int, recipe: Path = RECIPE):
        decoding = load_recipe(recipe).decoding.model_dump()
        reserve, context = reserve_for(decoding | {"budget": None}), PROMPT + 9 * (iterations + 12)
        blocks = blocks_for(context + reserve) * batch
        bounds = CallBounds(batch, blocks_for(context + reserve), reserve)
        head = Eagle3Config(draft_vocab_size=64, target_hidden_size=16, **SHAPE)
        target = Decoder(CONFIG, 64)
        roles = TargetModule(target, (0, 1, 2)), HeadModule(Eagle3Head(head, 64, target.embed), TOP_K)
        self.device = Device()
        engines = [FreeEngine(role, blocks, bounds, self.device) for role in roles]
        slots = InputBatch(batch, context, reserve, blocks)
        drafter = CountedDrafter(engines[1], slots, 512, 48, 16)
        drafter.counts = self.device.counts
        self.loop = EngineCore(engines[0], drafter, slots, planner_for(policy, batch, decoding), (), 512)
        for i in range(batch):
            prompt = KINDS[i % len(KINDS)] * KIND + np.arange(PROMPT) + i
            self.loop.scheduler.add(Request(i, prompt, SamplingParams(context - PROMPT, ignore_eos=True)))
        while len(slots.prefilling()) or not slots.active.any():
            self.loop.step()
        for _ in range(3):
            self.loop.step()

    def counted(self, iterations: int) -> dict[str, float]:
        """Return what happens per iteration, of so many."""
        counts, loop = self.device.counts, self.loop
        for field in fields(counts):
            setattr(counts, field.name, 0)
        before, verified = replace(TRANSFERS), loop.counters.verified_tokens
        with Launches(self.device):
            for _ in range(iterations):
                loop.step()
        counts.verified = loop.counters.verified_tokens - verified
        counts.waits = TRANSFERS.waits - before.waits
        counts.launches += counts.waits
        counts.up, counts.down = TRANSFERS.up - before.up, TRANSFERS.down - before.down
        return counts.per(iterations)
