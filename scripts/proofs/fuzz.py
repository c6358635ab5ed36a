"""Random requests in a crowd, against plain decoding of each request alone; stops at the first difference.

    python scripts/proofs/fuzz.py --minutes 5

A round of the loop draws requests, a draft (the pair's own, or one that hides the true text among decoys) and what
comes before each iteration: another policy, a new request, a preemption, a cancellation. A round of the service adds
threads, priorities, deadlines and an engine that fails. A difference is told with the seed of its round, which repeats
it (exactly in the loop; in the service threads have a say, too). Needs pip install -e '.[test]'. Exit code 1 where
something differed.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
PARTS = ("", "plugins", "tests", "tests/engine", "tests/engine/service", "tests/speculation")
sys.path[:0] = [str(ROOT / part) for part in PARTS]

import numpy as np
import torch
from batches import RECORD
from driving import Foresight, assert_all_free, goodput_planner, prompt_ids
from pairs import LIMITS, recipe_of, write_networks
from steered import Listener, submit

from echo_trt.backends.base import Engine
from echo_trt.cli.build import build
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import Completion, SamplingParams
from echo_trt.engine.service import service as serving
from echo_trt.speculation.goodput.model.costs import Costs, Curve
from echo_trt.speculation.pack import ForwardBatch

CONTEXT, BLOCKS, BATCH = 480, 24, 4  # blocks for one request of full length, and little more
SERVICE_S = 4.0  # that clients of a round submit for; larger: fewer rounds
POLICIES, GOODPUT = ("autoregressive", "static", "dense", "fixed", "echo"), ("goodput", "goodput-exact", "goodput-head")
FLAT = Costs(Curve([1, 256], [1e-3, 1.001e-3]), Curve([1, 256], [1e-9] * 2))  # a machine on which speculation pays
GRAMMARS = (
    {"json": RECORD},
    {"json_object": True},
    {"regex": "[A-Z][a-z]{2,9}( [a-z]{1,4}){2,6}"},
    {"choice": ["yes, it is", "yes, it was", "no"]},
    {"grammar": 'root ::= ("ab" | "ba")+ "."'},
)
#: Field -> how often it is given, and what it may be.
FIELDS: dict[str, tuple[float, Any]] = {
    "temperature": (0.5, (0.3, 0.8, 1.0, 2.0)),
    **dict.fromkeys(("top_k", "logprobs", "prompt_logprobs"), (0.3, (1, 2, 5, 20))),
    **dict.fromkeys(("top_p", "min_p"), (0.2, (0.05, 0.5, 0.95))),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), (0.3, (-1.0, 0.7, 1.5))),
    "repetition_penalty": (0.3, (0.7, 1.2, 2.0)),
    "logit_bias": (0.3, ({7: 3.0, 9: -100.0}, {20: 5.0, 40: -3.0, 299: 3.0})),
    **dict.fromkeys(("token_sources", "ignore_eos"), (0.3, (True,))),
    "speculate": (0.15, (False,)),
    "stop_token_ids": (0.3, ((5,), (30, 31, 32), (7, 299))),
    "stop": (0.3, (("e",), ("th", "the "), ("é", "\ufffd"), ("😀", "日本"))),
    "structured": (0.35, GRAMMARS),
}


def drawn_params(draw: random.Random) -> SamplingParams:
    given = {name: draw.choice(values) for name, (often, values) in FIELDS.items() if draw.random() < often}
    given |= {"max_tokens": draw.choice((1, 2, 3, 17, 30, 60)), "seed": draw.randrange(50)}
    if "structured" not in given and draw.random() < 0.3:
        given["min_tokens"] = draw.randrange(given["max_tokens"] + 1)
    return SamplingParams(**given)


def drawn_prompt(draw: random.Random) -> list[int]:
    """Draw a prompt: alone, behind a beginning that others share, repetitive, or up to the end of the context."""
    alone = prompt_ids(draw.choice((1, 2, draw.randrange(3, 150))), draw.randrange(100))
    shared = prompt_ids(100, 99)[: draw.randrange(1, 100)] + alone[:20]
    return draw.choice((alone, shared, (alone * 60)[:100], prompt_ids(draw.randrange(440, CONTEXT), 3)))


@dataclass(frozen=True)
class Pair:
    """A pair's LLM in a crowd, the one that decodes plainly, and what has happened so far."""

    bundle: Path
    crowd: LLM
    plain: LLM
    counts: Counter[str]

    def wanted(self, prompt: list[int], params: SamplingParams) -> Completion:
        return self.plain.generate([prompt], replace(params, speculate=True))[0]


def opened(name: str, networks: Path, folder: Path) -> Pair:
    """Build a pair, with a pool for every request, and copy it with one of few blocks."""
    limits = {**LIMITS, "batch": BATCH, "context": CONTEXT}
    roomy, small = folder / f"{name}-0", folder / f"{name}-{BLOCKS}"
    build(recipe_of(name, networks, limits=limits), folder, roomy)
    shutil.copytree(roomy, small)
    manifest = json.loads((small / "manifest.json").read_text())
    manifest["recipe"]["limits"]["kv_blocks"] = BLOCKS
    (small / "manifest.json").write_text(json.dumps(manifest))
    plain = LLM(roomy, "autoregressive", 1, prefix_cache=False)
    return Pair(small, LLM(small, "echo", BATCH, prefix_cache=True), plain, Counter())


def differing(got: Completion, want: Completion) -> list[str]:
    """Name what two answers differ in. Log-probabilities may differ by what another batch rounds differently."""
    found = [name for name in ("token_ids", "text", "finish_reason") if getattr(got, name) != getattr(want, name)]
    for name in ("logprobs", "prompt_logprobs"):
        pairs = [[(e.token, e.logprob, *(p for _, p in e.top)) for e in getattr(c, name) or ()] for c in (got, want)]
        same = [len(e) for e in pairs[0]] == [len(e) for e in pairs[1]]
        if not same or not all(np.allclose(a, b, atol=1e-3, rtol=0) for a, b in zip(*pairs, strict=True)):
            found.append(name)
    if got.token_sources is not None and [each.token for each in got.token_sources] != got.token_ids:
        found.append("token_sources")
    return found


def round_of_loop(draw: random.Random, pair: Pair) -> None:
    llm = pair.crowd
    loop, own = llm.loop, llm.networks.drafter
    loop.batch.forget_cached()  # a round depends on its seed alone
    cases = [(drawn_prompt(draw), drawn_params(draw)) for _ in range(draw.randrange(2, 8))]
    wanted = [pair.wanted(prompt, params) for prompt, params in cases]
    foresight = draw.random() < 0.3
    policies = [llm.tuning.planner(name, 24) for name in POLICIES]
    policies += [] if foresight else [goodput_planner(llm, FLAT, name) for name in GOODPUT]
    texts = [prompt + want.token_ids for (prompt, _), want in zip(cases, wanted, strict=True)]
    loop.drafter = Foresight(loop.batch, texts) if foresight else own
    requests = [llm.request(i, prompt, params) for i, (prompt, params) in enumerate(cases)]
    reported, waiting = dict.fromkeys(requests, ""), requests.copy()
    while waiting or loop.scheduler.busy:
        if waiting and (not loop.scheduler.busy or draw.random() < 0.4):
            loop.scheduler.add(waiting.pop())
        if draw.random() < 0.2:
            loop.planner = draw.choice(policies)
        if loop.scheduler.running and draw.random() < 0.05:
            loop.scheduler.preempt_least_urgent()
        for request in loop.scheduler.preempt_all() if draw.random() < 0.03 else ():
            loop.scheduler.add(request)
        if (chosen := draw.choice(requests)) not in waiting and draw.random() < 0.02:
            chosen.finish_reason = chosen.finish_reason or "cancelled"
            loop.scheduler.cancel(chosen)
        for request, tokens in loop.step():
            reported[request] += request.take(loop.scheduler.cancel, tokens).text
    assert_all_free(loop)
    for request, want in zip(requests, wanted, strict=True):
        got = request.completion()
        pair.counts[f"loop: {got.finish_reason}"] += 1
        found = differing(got, want) + ["stream"] * (reported[request] != want.text)
        if got.finish_reason == "cancelled":
            found = ["token_ids"] * (want.token_ids[: len(got.token_ids)] != got.token_ids)
        assert not found, (found, request, got, want)
    loop.drafter = own


class Flaky(Engine):
    """An engine that fails before a pass, amid it or behind it, and calls back meanwhile or not."""

    def __init__(self, engine: Engine, draw: random.Random):
        self.num_blocks, self.compact_kv = engine.num_blocks, engine.compact_kv
        self._engine, self._draw, self._overlaps = engine, draw, draw.random() < 0.5
        self._meanwhile: Callable[[], object] = bool

    def overlap(self, work: Callable[[], None]) -> bool:
        self._meanwhile = work if self._overlaps else bool
        return self._overlaps

    def run(self, call: ForwardBatch, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        outputs: dict[str, np.ndarray] = {}
        for work in (self._meanwhile, lambda: outputs.update(self._engine.run(call, **inputs)), bool):
            if self._draw.random() < 0.01:
                raise RuntimeError("the engine is unwell")
            work()
        return outputs


def round_of_service(draw: random.Random, pair: Pair) -> None:
    llm = LLM(pair.bundle, "echo", BATCH, prefix_cache=True)
    llm.loop.target = Flaky(llm.loop.target, random.Random(draw.random()))
    service, end = serving.Service(llm, queue=10_000), time.monotonic() + SERVICE_S

    def client(own: random.Random) -> list[tuple[list[int], SamplingParams, Listener]]:
        requested = []
        while time.monotonic() < end:
            prompt, params = drawn_prompt(own)[:200], drawn_params(own)
            seconds = own.choice((None, None, None, 0.05))
            job, listener = submit(service, prompt, params, priority=own.randrange(3), seconds=seconds)
            requested.append((prompt, params, listener))
            time.sleep(own.random() * 0.1)
            if own.random() < 0.2:
                service.cancel(job)
        return requested

    with ThreadPoolExecutor(4) as threads:
        lists = threads.map(client, [random.Random(draw.random()) for _ in range(4)])
        requested = [each for cases in lists for each in cases]
    service.close(60)
    assert_all_free(llm.loop)
    for prompt, params, listener in requested:
        reason, want = listener.end.reason, pair.wanted(prompt, params)
        pair.counts[f"service: {reason}"] += 1
        ids, text, case = listener.token_ids, listener.text, (prompt, params, listener.end, want)
        assert ids == want.token_ids[: len(ids)], case
        assert listener.end.completion_tokens == len(ids), case
        if reason in ("stop", "length"):
            assert (text, reason, len(ids)) == (want.text, want.finish_reason, len(want.token_ids)), case
    pair.counts["service: engine failures"] += service.statistics().engine_failures


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=5.0, help="after which no other round begins; 0 is one round")
    options.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of the first round")
    options.add_argument("--networks", type=Path, help="those of tests/pairs.py; default: written anew")
    options.add_argument("--pairs", default="close,lookup,dspark", help="of tests/pairs.py, by commas")
    requested = options.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)  # of engines that fail
    serving.MANY = 1  # tokens of a few requests wait for the next pass, too
    with tempfile.TemporaryDirectory(prefix="echo-trt-fuzz-") as folder:
        networks = requested.networks or Path(folder) / "networks"
        if not requested.networks:
            write_networks(networks)
        pairs = [opened(name, networks, Path(folder)) for name in requested.pairs.split(",")]
        end, seed = time.monotonic() + 60 * requested.minutes, requested.seed
        while seed == requested.seed or time.monotonic() < end:
            draw = random.Random(seed)
            pair, play = draw.choice(pairs), draw.choice((round_of_loop,) * 3 + (round_of_service,))
            try:
                play(draw, pair)
            except Exception as error:
                sys.exit(
                    f"{error!r} in {play.__name__}; repeat it: --seed {seed} --minutes 0 --pairs {requested.pairs}"
                )
            seed += 1
        counts = sum((pair.counts for pair in pairs), Counter())
    print(f"{seed - requested.seed} rounds from seed {requested.seed}: {json.dumps(dict(sorted(counts.items())))}")


if __name__ == "__main__":
    main()
