"""Hugging Face transformers as a peer: ``generate()`` on static batches.

generate() has no continuous batching on a CPU: a batch is as slow as its longest text, and the next batch starts when
all texts have ended. Its rates count a place as taken until the batch ends.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from echo_trt.backends.kind import computes_in
from echo_trt.bundle.manifest import Manifest
from echo_trt.models.families import family_of
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt_lab.benchmark.peer import Arrivals, PeerRun, measured

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Transformers:
    """Batches of ``concurrency`` prompts in their order, padded on the left. Threads are left to PyTorch."""

    name = "transformers"

    def __init__(self, manifest: Manifest, checkpoint: Path):
        self.model = load_network(checkpoint).to(DTYPES[computes_in(manifest)])
        self.model.generation_config = GenerationConfig()  # a checkpoint's may sample or penalise repetition
        self.eos = manifest.eos_token_ids

    def run(self, prompts: list[list[int]], concurrency: int, max_tokens: int) -> PeerRun:
        self._answer(prompts[:1], min(max_tokens, 8), _TokenTimes())
        texts: list[list[int]] = []
        arrivals: list[Arrivals] = []
        begin = time.perf_counter()
        for at in range(0, len(prompts), concurrency):
            batch = [prompts[i % len(prompts)] for i in range(at, at + concurrency)]
            steps, sent = _TokenTimes(), time.perf_counter()
            answers = self._answer(batch, max_tokens, steps)
            texts += answers
            for prompt, answer in zip(batch, answers, strict=True):
                tokens = [1.0] * len(answer) + [0.0] * (len(steps.times) - len(answer))  # padding, while others go on
                arrivals.append(Arrivals(len(prompt), sent, steps.times, tokens))
        return measured(texts[: len(prompts)], arrivals, concurrency, begin, time.perf_counter())

    @torch.inference_mode()
    def _answer(self, prompts: list[list[int]], max_tokens: int, steps: _TokenTimes) -> list[list[int]]:
        longest = max(map(len, prompts))
        padding = self.eos[0] if self.eos else 0
        ids = torch.tensor([[padding] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        output = self.model.generate(
            ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=max_tokens, eos_token_id=self.eos or None, pad_token_id=padding
            ),
            logits_processor=LogitsProcessorList([steps]),
        )
        return [self._until_end(row) for row in output[:, longest:].tolist()]

    def _until_end(self, tokens: list[int]) -> list[int]:
        """Cut the padding that follows a row's end token."""
        ends = [i for i, token in enumerate(tokens) if token in self.eos]
        return tokens[: ends[0] + 1] if ends else tokens


class _TokenTimes(LogitsProcessor):
    """Notes the times of a batch's logits, one for every token of its longest text."""

    def __init__(self):
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.times.append(time.perf_counter())
        return scores


def load_network(checkpoint: Path) -> PreTrainedModel:
    """Load transformers' network from a Hugging Face folder, or from a GGUF file that we read, in fp32."""
    if checkpoint.is_dir():
        return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    source = open_checkpoint(checkpoint)
    family = family_of(source.config["architectures"][0], str(checkpoint))
    config = AutoConfig.for_model(family.name, **source.config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {name: source.get(name) for name in source.names()}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model.eval()
