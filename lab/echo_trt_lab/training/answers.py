"""The target's own answers to prompts, written as shards with what the target computed on the way to them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch

from echo_trt.backends.openvino.engine import OpenVINOEngine
from echo_trt.bundle.manifest import Manifest
from echo_trt.engine.batch import InputBatch
from echo_trt.engine.drafters.eagle3 import Drafter
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.errors import UserError
from echo_trt.files.prompts import Prompt
from echo_trt.speculation.drafts import TimedDraft
from echo_trt.speculation.pack import BLOCK
from echo_trt_lab.training.corpus import write_shard

GREEDY_OF_FIVE = 3  # three answers of five are greedy, as at serving; two are drawn, for variety


class Recorder(Drafter):
    """A drafter that drafts nothing and keeps what a head is trained on: features and normed last state, by pool row.

    ``finished`` are (tokens int32 [L], prompt length, known uint16 [L, 4H] as bfloat16) of requests that have left.
    """

    def __init__(self, batch: InputBatch, num_blocks: int, hidden_size: int):
        self.batch, self.width = batch, 3 * hidden_size
        self.finished: list[tuple[np.ndarray, int, np.ndarray]] = []
        self._known = np.zeros((num_blocks * BLOCK, 4 * hidden_size), np.uint16)

    def draft_lag(self, slots: np.ndarray) -> np.ndarray:
        return np.zeros(len(slots), np.int64)

    def begin(self, slots: np.ndarray) -> TimedDraft:
        return TimedDraft()  # plain decoding asks it for nothing

    def observe(self, rows: np.ndarray, outputs: dict[str, np.ndarray], output_rows: np.ndarray) -> None:
        if not self.width:
            return
        self._known[rows, : self.width] = _bfloat16(outputs["features"][output_rows])
        # States come for rows whose next token was asked for. A prompt's are never used, whatever lands there.
        requested = output_rows < len(outputs["hidden"])
        self._known[rows[requested], self.width :] = _bfloat16(outputs["hidden"][output_rows[requested]])

    def forget(self, slot: int) -> None:
        batch = self.batch
        length, cached = int(batch.length[slot]), int(batch.committed[slot])
        known = np.zeros((length, self._known.shape[1]), np.uint16)
        known[:cached] = self._known[batch.blocks.rows(np.full(cached, slot), np.arange(cached))]
        self.finished.append((batch.tokens[slot, :length].copy(), int(batch.prompt_length[slot]), known))


def record(llm: LLM, bundle: Path) -> Recorder:
    """Turn ``llm`` into plain decoding that records; its target gets one more output, the normed last state.

    Where no head reads features, answers alone are recorded, which are enough for n-grams.
    """
    loop, manifest = llm.loop, llm.manifest
    llm.set_policy("autoregressive")
    if manifest.recipe.draft.kind != "eagle3":
        loop.drafter = Recorder(loop.batch, loop.target.num_blocks, 0)
        return loop.drafter
    if manifest.engine not in ("cpu", "openvino"):
        raise UserError(f"{bundle} is for {manifest.engine}, which gives no last states; build with --engine cpu.")
    if manifest.engine == "openvino":
        with tempfile.TemporaryDirectory(dir=bundle.parent) as folder:
            graph = _with_hidden_output(bundle, manifest, Path(folder))
            loop.target = OpenVINOEngine(graph, manifest.precision, loop.target.num_blocks)
    loop.drafter = Recorder(loop.batch, loop.target.num_blocks, manifest.target.hidden_size)
    return loop.drafter


def write_answers(
    llm: LLM,
    recorder: Recorder,
    prompts: list[Prompt],
    folder: Path,
    max_tokens: int,
    per_shard: int,
    report: Callable[[float, str], None],
) -> None:
    """Answer ``prompts`` in order, ``per_shard`` to a file; files that are there from an earlier run are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = 0
    for number, begin in enumerate(range(0, len(prompts), per_shard)):
        path = folder / f"shard-{number:05d}.npz"
        report(begin / len(prompts), f"{path.name}, {tokens:,} tokens so far")
        if path.exists():
            continue
        requested = [llm.chat_ids(p.text) for p in prompts[begin : begin + per_shard]]
        answers = llm.generate(requested, [_params(begin + i, max_tokens) for i in range(len(requested))])
        if llm.counters.preemptions:
            raise UserError(f"the KV pool is too small for {llm.loop.batch.count} requests; give a smaller --batch.")
        tokens += sum(len(a.token_ids) for a in answers)
        write_shard(path, recorder.finished)
        recorder.finished = []


def _params(number: int, max_tokens: int) -> SamplingParams:
    if number % 5 < GREEDY_OF_FIVE:
        return SamplingParams(max_tokens)
    return SamplingParams(max_tokens, temperature=0.8, top_p=0.95, seed=number)


def _with_hidden_output(bundle: Path, manifest: Manifest, folder: Path) -> Path:
    """Return a copy of the target's graph that also returns what its output matrix reads, [R, H]; weights are
    linked.
    """
    source = bundle / manifest.target.file
    model = onnx.load(source, load_external_data=False)
    last = next(node for node in model.graph.node if "logits" in node.output)
    model.graph.node.append(onnx.helper.make_node("Identity", [last.input[0]], ["hidden"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("hidden", onnx.TensorProto.FLOAT, None))
    for data in bundle.glob(f"{source.name}.data"):
        os.link(data, folder / data.name)  # OpenVINO refuses a symbolic link that leads out of the folder
    onnx.save(model, folder / source.name)
    return folder / source.name


def _bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()
