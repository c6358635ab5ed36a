"""Time the host's part of an iteration around a free device, and count what crosses between the two.

python scripts/benchmarks/device_iteration.py --batch 1,64,256

The loop, planners, drafter and PyTorch engine are the real ones. The networks compute nothing: target and head answer
at once with the same tokens every time, most of which are accepted. Levels of the draft, which a GPU computes, are
subtracted. "through the host" is the same loop where features, states and levels come and go instead of staying.
"clients" is the time of telling clients what an iteration wrote, which a server does while the next pass runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from echo_trt.backends.cuda import levels as cuda_levels
from echo_trt.backends.cuda.calls import Staging, shapes_of
from echo_trt.backends.cuda.sizes import Arrays, CallBounds, Capacity
from echo_trt.backends.cuda.transfers import TRANSFERS, pack_results
from echo_trt.backends.torch.engine import TorchEngine
from echo_trt.bundle.recipe import Decoding
from echo_trt.engine.batch import InputBatch, blocks_for
from echo_trt.engine.core import Emitted, EngineCore
from echo_trt.engine.drafters.eagle3 import Eagle3Drafter
from echo_trt.engine.drafters.levels import LevelsDrafter
from echo_trt.engine.options import bounds, run_alone
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.request import Request
from echo_trt.models.config import DecoderConfig, Eagle3Config
from echo_trt.models.decoder import Decoder
from echo_trt.models.eagle3 import Eagle3Head
from echo_trt.models.roles import HeadModule, TargetModule
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.model.costs import Costs, Curve
from echo_trt.speculation.goodput.planner import GoodputPlanner
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt.speculation.pack import ForwardBatch
from echo_trt.speculation.planner import Planner
from echo_trt.speculation.policies import make_planner, reserve_for

VOCABULARY = 151_936  # Qwen3's
#: Features and states are narrow: their rows would be copied on the device, which this machine would have to do.
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "num_kv_heads": 1,
    "head_dim": 8, "norm_eps": 1e-6, "rope_theta": 1e6, "max_position": 512,
}  # fmt: skip
CONFIG = DecoderConfig(family="qwen3", num_layers=3, qk_norm=True, **SHAPE)
WIDE = 4096  # of Qwen3-8B, for the bytes of rows that go through the host
POLICIES = ("autoregressive", "static", "echo", "goodput")
PROMPT = 16
TOKENIZER = Path("bundles/smollm2-135m/tokenizer.json")
TOKEN = 5  # what everybody answers
CHILDREN = np.log(np.array([0.8, 0.08, 0.04, 0.02, 0.01, 0.008, 0.006, 0.004], np.float32))


class FreeGraphs:
    """One graph per size, as on a GPU: what is kept for it are the buffers that its calls are sent in."""

    def __init__(self, forward: Callable[..., tuple[torch.Tensor, ...]]):
        self._forward, self._staging = forward, {}

    def run(self, arrays: Arrays, capacity: Capacity, *arguments: int) -> tuple[torch.Tensor, ...]:
        key = (*arguments, *sorted(zip(arrays, shapes_of(arrays, capacity), strict=True)))
        if key not in self._staging:
            self._staging[key] = Staging(arrays, torch.device("cpu"), capacity)
        return self._forward(self._staging[key].upload(arrays), *arguments)


class FreeEngine(TorchEngine):
    """An engine of a network that answers at once."""

    def __init__(self, role: TargetModule | HeadModule, blocks: int, bounds: CallBounds, resident: bool):
        super().__init__(role, blocks, bounds=bounds, resident=resident)
        self.seconds, self.up, self.down, self.runs = 0.0, 0, 0, 0
        if resident and isinstance(role, HeadModule):
            self._levels._graphs = FreeGraphs(self._levels._draft)
        if resident:
            self._graphs = FreeGraphs(self._forward)

    def _forward(self, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        start = time.perf_counter()
        tokens, requested = len(tensors["token_ids"]), len(tensors["logit_rows"])
        if isinstance(self._role, HeadModule):
            scores = torch.from_numpy(CHILDREN).expand(requested, -1)
            candidates = TOKEN + torch.arange(len(CHILDREN)).expand(requested, -1)
            outputs = scores, candidates, torch.zeros(1, 16).expand(tokens, -1)
        else:
            outputs = torch.zeros(1, VOCABULARY).expand(requested, -1), torch.zeros(1, 48).expand(tokens, -1)
        packed = torch.full((requested, 1), TOKEN, dtype=torch.int32)
        if isinstance(self._role, HeadModule):
            packed = pack_results(dict(zip(self._role.outputs, outputs, strict=True)))
        self.seconds += time.perf_counter() - start
        return (*outputs, packed) if self._resident else outputs

    def run(self, call: ForwardBatch, **inputs: Any) -> dict[str, Any]:
        outputs = super().run(call, **inputs)
        if not self._resident:
            self.runs += 1
            self.up += sum(a.nbytes for a in call[:-1]) + sum(_wide(len(i)) for i in inputs.values())
            self.down += sum(8 * len(o) if n == "logits" else _bytes(o) for n, o in outputs.items())
            if "logits" in outputs:
                outputs["logits"] = FixedLogits(len(call.logit_rows))
        return outputs


class FixedLogits:
    """Logits whose argmax a device has told."""

    def __init__(self, rows: int):
        self.shape = rows, VOCABULARY

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> FixedLogits:
        return FixedLogits(len(np.arange(len(self))[index]))

    def argmax(self, axis: int) -> np.ndarray:
        return np.full(len(self), TOKEN)


def _wide(rows: int) -> int:
    return 2 * 3 * WIDE * rows  # bfloat16


def _bytes(output: np.ndarray) -> int:
    return _wide(len(output)) if output.shape[1] == 48 else 2 * WIDE * len(output) if output.shape[1] == 16 else (
        output.nbytes
    )  # fmt: skip


def planner_for(policy: str, batch: int, decoding: dict[str, Any]) -> Planner:
    def goodput(name: str, settings: GoodputSettings) -> GoodputPlanner:
        costs = Costs(Curve([1, 128, 512], [0.010, 0.011, 0.030]), Curve([1, 512], [0.0004, 0.0006]))  # a GPU's shape
        return GoodputPlanner(name, settings, costs, Acceptance.uncalibrated(settings.max_depth), batch)

    return make_planner(policy, decoding | {"budget": max(60, 4 * batch)}, goodput)


def measure(policy: str, batch: int, resident: bool, iterations: int, tokenizer: Tokenizer) -> dict[str, float]:
    """Return milliseconds of the host and of telling clients, copies that wait, and kilobytes, an iteration."""
    decoding = Decoding().model_dump()
    reserve, context = reserve_for(decoding | {"budget": None}), PROMPT + 8 * (iterations + 8)
    blocks = blocks_for(context + reserve) * batch
    bounds = CallBounds(batch, blocks_for(context + reserve), reserve)
    head = Eagle3Config(draft_vocab_size=64, target_hidden_size=16, **SHAPE)
    target = Decoder(CONFIG, 64)
    roles = TargetModule(target, (0, 1, 2)), HeadModule(Eagle3Head(head, 64, target.embed), len(CHILDREN))
    engines = [FreeEngine(role, blocks, bounds, resident) for role in roles]
    input_batch = InputBatch(batch, context, reserve, blocks)
    kind = LevelsDrafter if resident else Eagle3Drafter
    loop = EngineCore(
        engines[0],
        kind(engines[1], input_batch, 512, 48, 16),
        input_batch,
        planner_for(policy, batch, decoding),
        (),
        512,
    )
    for i in range(batch):
        loop.scheduler.add(Request(i, np.arange(PROMPT) + i, SamplingParams(context - PROMPT, ignore_eos=True)))
    while len(input_batch.prefilling()) or not input_batch.active.any():
        loop.step()
    for _ in range(3):
        loop.step()
    device = Device(engines)
    before = device.reported()
    start = time.perf_counter()
    emissions = [loop.step() for _ in range(iterations)]
    seconds = time.perf_counter() - start
    free, waits, up, down = (now - then for now, then in zip(device.reported(), before, strict=True))
    per = 1 / iterations
    return {
        "host": 1e3 * (seconds - free) * per,
        "clients": 1e3 * telling(emissions, loop, tokenizer) * per,
        "waits": waits * per,
        "up": up * per / 1024,
        "down": down * per / 1024,
    }


def telling(emissions: Sequence[Emitted], loop: EngineCore, tokenizer: Tokenizer) -> float:
    """Return the seconds in which the tokens of ``emissions`` become events of a server."""
    for request, _ in emissions[0]:
        request.begin_text(tokenizer)
    start = time.perf_counter()
    for step_output in emissions:
        for request, tokens in step_output:
            request.take(loop.scheduler.cancel, tokens)
    return time.perf_counter() - start


class Device:
    """What the engines' device does and gets, all of it since the start."""

    def __init__(self, engines: list[FreeEngine]):
        self._engines, self._levels = engines, 0.0
        for name in ("draft_levels", "best_children"):
            setattr(cuda_levels, name, self._timed(ORIGINAL[name]))

    def _timed(self, function: Callable) -> Callable:
        def timed(*arguments: Any) -> Any:
            start, known = time.perf_counter(), self._engines[1].seconds
            result = function(*arguments)
            self._levels += time.perf_counter() - start - (self._engines[1].seconds - known)
            return result

        return timed

    def reported(self) -> tuple[float, float, float, float]:
        """Seconds of the device, copies that wait for it, and bytes up and down."""
        free = self._levels + sum(engine.seconds for engine in self._engines)
        runs, up, down = (sum(getattr(e, name) for e in self._engines) for name in ("runs", "up", "down"))
        return free, TRANSFERS.waits + runs, TRANSFERS.up + up, TRANSFERS.down + down


ORIGINAL = {name: getattr(cuda_levels, name) for name in ("draft_levels", "best_children")}


def main(
    batch: Annotated[str, Parameter(help="Requests, several by comma.")] = "1,64,256",
    iterations: Annotated[int, Parameter(validator=bounds(1), help="Measured iterations.")] = 60,
    tokenizer: Annotated[Path, Parameter(help="The clients' tokenizer.")] = TOKENIZER,
) -> None:
    torch.set_num_threads(1)
    words = Tokenizer.from_file(str(tokenizer))
    table = Table("B", "policy", "", "host, ms", "clients, ms", "waits", "KiB up", "KiB down")
    for count in (int(part) for part in batch.split(",")):
        for policy in POLICIES:
            for resident in (False, True):
                reported = measure(policy, count, resident, iterations, words)
                where = "on the device" if resident else "through the host"
                row = [f"{reported[name]:.2f}" for name in ("host", "clients")]
                row += [f"{reported['waits']:.1f}", f"{reported['up']:,.0f}", f"{reported['down']:,.0f}"]
                table.add_row(str(count), policy, where, *row)
    Console(width=100).print(table)


if __name__ == "__main__":
    run_alone(main)
