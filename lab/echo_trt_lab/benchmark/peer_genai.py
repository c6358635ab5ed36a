"""OpenVINO GenAI's ContinuousBatchingPipeline, plain or drafted by an EAGLE-3 head."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from echo_trt.backends.openvino.cpu import compute_type
from echo_trt.bundle.manifest import Manifest
from echo_trt.speculation.pack import BLOCK
from echo_trt_lab.benchmark.peer import Arrivals, PeerRun, measured

WARM_UP_TOKENS = 8  # of a first answer; larger: a longer start, with more kernels prepared
TREE, CHAINS = 0, (1, 2, 3, 4)  # drafts of a trial: the recipe's tree, and chains by their tokens
TRIAL_PROMPTS = 8  # of a trial, two a place at least; larger: a slower and surer choice


class GenAI:
    """GenAI on the graph folders of a target and of a head, if it drafts, with the options of our OpenVINO engine.

    Target and head compute and cache in the bundle's precision. Of int8 only the weights are given, and GenAI's fast
    defaults stay: activations are quantised as they come, and the KV cache is u8. Threads are left to OpenVINO. Prefix
    caching is off, as in our runs, prompts are computed in chunks between decoding steps, and the KV cache holds all
    running texts.

    With a head, a trial chooses the drafts: chains, or for one text at a time a dynamic top-k tree with depth, children
    and tokens of the recipe's static policy. With several texts GenAI 2026.4.1 fails in trees when one text ends while
    another accepts a branch (PaKVReorder: block_indices_begins and block_update_indices_begins of different length).
    """

    def __init__(self, name: str, manifest: Manifest, target: Path, head: Path | None = None):
        self.name = name
        self._target, self._head, self._manifest = target, head, manifest
        self._tree = manifest.recipe.decoding.static
        self._opened: _Opened | None = None
        self._fastest: dict[int, int] = {}  # concurrency -> the trial's chain, or TREE

    def run(self, prompts: list[list[int]], concurrency: int, max_tokens: int) -> PeerRun:
        longest = max(map(len, prompts)) + max_tokens
        pipeline = self._pipeline(concurrency, longest)
        if self._head is None:
            return _closed_loop(pipeline, prompts, concurrency, self._generation(None, max_tokens))
        if concurrency not in self._fastest:
            self._fastest[concurrency] = self._trial(pipeline, prompts, concurrency, max_tokens)
        chain = self._fastest[concurrency]
        run = _closed_loop(pipeline, prompts, concurrency, self._generation(chain, max_tokens))
        return replace(run, drafts="a tree" if chain == TREE else f"a chain of {chain}")

    def _trial(
        self, pipeline: genai.ContinuousBatchingPipeline, prompts: list[list[int]], concurrency: int, max_tokens: int
    ) -> int:
        """Find the chain, or TREE, with the most tokens per second."""
        some = prompts[: max(TRIAL_PROMPTS, 2 * concurrency)]
        rates = {}
        for chain in (*CHAINS, *([TREE] if concurrency == 1 else [])):
            run = _closed_loop(pipeline, some, concurrency, self._generation(chain, max_tokens))
            rates[chain] = run.decode.tokens / run.decode.elapsed if run.decode.elapsed else 0.0
        return max(rates, key=rates.__getitem__)

    def _pipeline(self, concurrency: int, longest: int) -> genai.ContinuousBatchingPipeline:
        """Return a pipeline for ``concurrency`` texts of ``longest`` tokens: the previous one if it has room."""
        drafted = self._tree.depth * self._tree.top_k**2
        blocks = concurrency * -(-(longest + drafted + BLOCK) // BLOCK)
        if self._opened is None or self._opened.concurrency != concurrency or self._opened.blocks < blocks:
            self._opened = None  # frees its memory before the next pipeline is opened
            pipeline = self._open(concurrency, blocks)
            _closed_loop(pipeline, [[1, 1]], 1, self._generation(self._head and TREE, WARM_UP_TOKENS))
            self._opened = _Opened(concurrency, blocks, pipeline)
        return self._opened.pipeline

    def _open(self, concurrency: int, blocks: int) -> genai.ContinuousBatchingPipeline:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size, scheduler.num_kv_blocks = 0, blocks
        scheduler.max_num_seqs = concurrency
        scheduler.max_num_batched_tokens = self._manifest.recipe.limits.prefill_chunk + concurrency * self._tree.tokens
        scheduler.dynamic_split_fuse, scheduler.enable_prefix_caching = True, False
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if self._manifest.precision != "int8":
            compute = compute_type(self._manifest.precision).to_string()
            options |= {"INFERENCE_PRECISION_HINT": compute, "KV_CACHE_PRECISION": compute}
        if self._head is not None:
            options["draft_model"] = genai.draft_model(self._head, "CPU", **options)
        return genai.ContinuousBatchingPipeline(self._target, scheduler, "CPU", options)

    def _generation(self, chain: int | None, max_tokens: int) -> genai.GenerationConfig:
        config = genai.GenerationConfig()
        config.do_sample = False
        config.max_new_tokens = max_tokens
        eos = self._manifest.eos_token_ids
        config.ignore_eos = not eos
        if eos:
            config.stop_token_ids = set(eos)
            config.eos_token_id = eos[0]  # else GenAI adds the -1 of a checkpoint that names none
        if chain:
            config.num_assistant_tokens = chain
        elif chain == TREE:
            config.branching_factor, config.tree_depth = self._tree.top_k, self._tree.depth
            config.num_assistant_tokens = self._tree.tokens - 1  # ours count the root
        return config


@dataclass(frozen=True)
class _Opened:
    concurrency: int
    blocks: int
    pipeline: genai.ContinuousBatchingPipeline


def _closed_loop(
    pipeline: genai.ContinuousBatchingPipeline,
    prompts: list[list[int]],
    concurrency: int,
    generation: genai.GenerationConfig,
) -> PeerRun:
    """Keep ``concurrency`` texts running until all prompts are answered; like ours, prompts begin again at the end."""
    texts: list[list[int]] = []
    arrivals: list[Arrivals] = []
    left, running = set(range(len(prompts))), {}
    begin = time.perf_counter()
    while left:
        while len(running) < concurrency:
            index, prompt = len(texts), prompts[len(texts) % len(prompts)]
            arrivals.append(Arrivals(len(prompt), time.perf_counter()))
            running[index] = pipeline.add_request(index, ov.Tensor(np.array([prompt], np.int64)), generation)
            texts.append([])
        pipeline.step()
        now = time.perf_counter()
        for index, handle in running.items():
            if tokens := _read(handle, texts[index]):
                arrivals[index].add(now, tokens)
        running = {index: handle for index, handle in running.items() if _is_running(handle)}
        left -= set(range(len(texts))) - running.keys()
    for handle in running.values():
        handle.cancel()
    while pipeline.has_non_finished_requests():
        pipeline.step()
    return measured(texts[: len(prompts)], arrivals, concurrency, begin, now)


def _read(handle: Any, text: list[int]) -> int:
    """Move a text's new tokens from its handle, and return their number."""
    before = len(text)
    while handle.can_read():
        text += next(iter(handle.read().values())).generated_ids
    return len(text) - before


def _is_running(handle: Any) -> bool:
    status = handle.get_status()
    if status == genai.GenerationStatus.IGNORED:
        raise RuntimeError("OpenVINO GenAI ignored a prompt: its KV cache is too small")
    return status == genai.GenerationStatus.RUNNING
