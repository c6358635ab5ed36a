"""Rounds in this process: of the loop, of the service with the default policy, and of the promises of exactness.md."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from driving import Foresight, assert_all_free, goodput_planner, machine, prompt_ids
from fuzz_parts.declared import drawn_params
from fuzz_parts.hostile import Flaky, Hostile
from pairs import FAMILY_PAIRS, LIMITS, recipe_of
from steered import Listener, submit

from echo_trt.backends.self_check import RISES
from echo_trt.cli.build import build
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import Completion, SamplingParams
from echo_trt.engine.request import Sender
from echo_trt.engine.service.service import Service
from echo_trt.engine.stored_prefixes import StoredPrefixes, keep_prefixes
from echo_trt.errors import UserError
from echo_trt.speculation.planner import Planner

CONTEXT, BLOCKS, BATCH = 480, 24, 4  # blocks for one request of full length, and little more
SERVICE_S = 1.5  # that clients of a round submit for; larger: fewer rounds
TOLERANCE = 1e-3  # of log-probabilities, which another batch rounds differently
POLICIES, GOODPUT = ("autoregressive", "static", "echo"), ("goodput", "goodput-exact")
MACHINES = (machine(1e-6), machine(0.2))  # on which speculation pays, always or seldom
PRECISIONS, HYBRIDS = ("fp32", "bf16", "int8", "int4"), ("mtp",)
DENSE = ("close", *FAMILY_PAIRS)  # pairs that are built in few bits, too
PROMISED = (*DENSE, "dspark", *HYBRIDS)


@dataclass(frozen=True)
class Pair:
    """A pair: its bundle, an LLM with few blocks for a crowd, one that decodes plainly, and what happened so far.

    store    the folder of the crowd's store; None: it has none. ``stored`` has it while it is open
    """

    name: str
    roomy: Path
    crowd: LLM
    plain: LLM
    counts: Counter[str] = field(default_factory=Counter)
    store: Path | None = None
    stored: list[StoredPrefixes] = field(default_factory=list)

    def fresh(self, draw: random.Random) -> LLM:
        """Return the crowd's LLM as it was opened: a round depends on its seed, and on what a store still has."""
        loop, networks = self.crowd.loop, self.crowd.networks
        loop.drafter, loop.target = networks.drafter, networks.target
        loop.batch.blocks.forget_cached()
        if self.store:
            self._restart(self.store, draw)
        return self.crowd

    def _restart(self, store: Path, draw: random.Random) -> None:
        """Open the store as after a restart, at times behind damage, or with room for a few blocks."""
        if self.stored:
            self.counts["store: blocks read"] += self.crowd.counters.restored_blocks
            self.crowd.counters.restored_blocks = 0
            self.stored.pop().close()
        files = [file for file in store.rglob("*") if file.is_file() and file.name != "lock"]
        for file in draw.sample(files, min(len(files), draw.choice((0, 0, 3)))):
            content = bytearray(file.read_bytes() or b"0")
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            file.write_bytes(content[: draw.randrange(len(content))] if draw.random() < 0.3 else content)
            self.counts["store: damaged files"] += 1
        prefixes = keep_prefixes(self.crowd, store, draw.choice(("1G", "1G", "200K")))
        assert prefixes
        prefixes._rate = 1e15  # tiny networks compute as fast as a disk is read
        self.stored.append(prefixes)

    def wanted(self, prompt: list[int], params: SamplingParams) -> Completion | UserError:
        """Return what plain decoding answers, or why it does not."""
        try:
            return self.plain.generate([prompt], replace(params, speculate=True))[0]
        except UserError as refusal:
            return refusal


def opened(name: str, networks: Path, folder: Path, precision: str = "fp32") -> Pair:
    """Build a pair, with a pool for every request, and copy it with one of few blocks."""
    limits = {**LIMITS, "batch": BATCH, "context": CONTEXT}
    RISES["int4"] = RISES["int8"] = 50.0  # so tiny a network keeps little of its text in few bits
    roomy, small = folder / f"{name}-{precision}", folder / f"{name}-{precision}-{BLOCKS}"
    if not small.exists():
        engine = "cpu" if precision in RISES else "openvino"
        build(recipe_of(name, networks, limits=limits, precision=precision, engine=engine), folder, roomy)
        shutil.copytree(roomy, small)
        manifest = json.loads((small / "manifest.json").read_text())
        manifest["recipe"]["limits"]["kv_blocks"] = BLOCKS
        (small / "manifest.json").write_text(json.dumps(manifest))
    crowd = LLM(small, "autoregressive", BATCH, prefix_cache=True)
    return Pair(name, roomy, crowd, LLM(roomy, "autoregressive", 1, prefix_cache=False))


def drawn_prompt(draw: random.Random) -> list[int]:
    """Draw a prompt: alone, behind a beginning that others share, repetitive, or up to the end of the context."""
    alone = prompt_ids(draw.choice((1, 2, draw.randrange(3, 150))), draw.randrange(100))
    shared = prompt_ids(100, 99)[: draw.randrange(1, 100)] + alone[:20]
    return draw.choice((alone, shared, (alone * 60)[:100], prompt_ids(draw.randrange(440, CONTEXT + 1), 3)))


def differing(got: Completion, want: Completion) -> list[str]:
    """Name what two answers differ in."""
    found = [name for name in ("token_ids", "text", "finish_reason") if getattr(got, name) != getattr(want, name)]
    for name in ("logprobs", "prompt_logprobs"):
        pairs = [[(e.token, e.logprob, *(p for _, p in e.top)) for e in getattr(c, name) or ()] for c in (got, want)]
        same = [len(e) for e in pairs[0]] == [len(e) for e in pairs[1]]
        off = max(
            (float(np.max(np.abs(np.nan_to_num(a) - np.nan_to_num(b)))) for a, b in zip(*pairs, strict=False)),
            default=0.0,
        )
        if not same or not off <= TOLERANCE:
            found.append(f"{name}, by {off:.2g}" if same else name)
    if got.token_sources is not None:
        found += ["token_sources"] * ([each.token for each in got.token_sources] != got.token_ids)
        found += ["probability"] * any(not 0 <= (each.probability or 0) <= 1 for each in got.token_sources)
    return found


def drawn_cases(draw: random.Random, pair: Pair, count: int) -> list[tuple[list[int], SamplingParams, Completion]]:
    """Draw requests that are taken, with what plain decoding answers."""
    cases: list[tuple[list[int], SamplingParams, Completion]] = []
    while len(cases) < count:
        prompt, params = drawn_prompt(draw), drawn_params(draw)
        want = pair.wanted(prompt, params)
        pair.counts["refused"] += isinstance(want, UserError)
        if isinstance(want, Completion):
            cases.append((prompt, params, want))
    return cases


def of_loop(draw: random.Random, pair: Pair) -> None:
    """Change policies, preempt and cancel between iterations; compare every answer."""
    llm = pair.fresh(draw)
    loop = llm.loop
    cases = drawn_cases(draw, pair, draw.randrange(2, 8))
    foresight = draw.random() < 0.3
    policies: list[Planner] = [llm.tuning.planner(name, 24) for name in POLICIES]
    policies += [] if foresight else [goodput_planner(llm, draw.choice(MACHINES), name) for name in GOODPUT]
    policies += [Hostile(planner, draw) for planner in policies]
    if foresight:
        loop.drafter = Foresight(loop.batch, [prompt + want.token_ids for prompt, _, want in cases])
    requests = [llm.request(i, prompt, params) for i, (prompt, params, _) in enumerate(cases)]
    reported, waiting = dict.fromkeys(requests, ""), requests.copy()
    texts = {request: llm.text_of(request) for request in requests}
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
            reported[request] += texts[request].follow(request, tokens, loop.scheduler.cancel)[0]
    assert_all_free(loop)
    for request, (prompt, params, want) in zip(requests, cases, strict=True):
        got = texts[request].completion(request)
        pair.counts[f"loop: {got.finish_reason}"] += 1
        found = differing(got, want) + ["stream"] * (reported[request] != want.text)
        if got.finish_reason == "cancelled":
            found = ["token_ids"] * (want.token_ids[: len(got.token_ids)] != got.token_ids)
        assert not found, (found, prompt, params, got, want)


def default_llm(draw: random.Random, pair: Pair) -> LLM:
    """Open a pair with the default policy on some machine, which may be hostile in part."""
    llm = pair.fresh(draw)
    planner = goodput_planner(llm, draw.choice(MACHINES), "goodput", clock=draw.random() < 0.7)
    llm.loop.planner = Hostile(planner, random.Random(draw.random())) if draw.random() < 0.5 else planner
    return llm


def of_service(draw: random.Random, pair: Pair) -> None:
    """Ask from threads, leave, set deadlines, before an engine that may fail; compare every answer."""
    llm = default_llm(draw, pair)
    flaky = Flaky(llm.loop.target, random.Random(draw.random()))
    if draw.random() < 0.5:
        llm.loop.target = flaky
    service, end = Service(llm, queue=10_000), time.monotonic() + SERVICE_S
    refusals: list[tuple[list[int], SamplingParams, str]] = []

    def client(own: random.Random) -> list[tuple[list[int], SamplingParams, Listener, set[str]]]:
        requested = []
        while time.monotonic() < end:
            prompt, params = drawn_prompt(own)[:200], drawn_params(own)
            seconds = own.choice((None, None, None, 0.05))
            reasons = {"stop", "length"} | ({"deadline"} if seconds else set())
            try:
                tenant = own.choice((b"", b"a", b"b"))
                more = {"priority": own.randrange(3), "sender": Sender(tenant)}
                job, listener = submit(service, prompt, params, seconds=seconds, **more)
            except UserError as refusal:
                refusals.append((prompt, params, str(refusal)))
                continue
            time.sleep(own.random() * 0.1)
            if own.random() < 0.2:
                service.cancel(job)
                reasons.add("cancelled")
            requested.append((prompt, params, listener, reasons))
        return requested

    with ThreadPoolExecutor(4) as threads:
        lists = threads.map(client, [random.Random(draw.random()) for _ in range(4)])
        requested = [each for cases in lists for each in cases]
    service.drain(60)
    service.close(0)
    assert_all_free(llm.loop)
    found = service.statistics().engine_failures
    assert found == flaky.failed, f"the engine failed {flaky.failed} times, and {found} failures are counted"
    for prompt, params, listener, reasons in requested:
        reason, want = listener.end.reason, pair.wanted(prompt, params)
        pair.counts[f"service: {reason}"] += 1
        ids, text, case = listener.token_ids, listener.text, (prompt, params, listener.end, want)
        assert reason in reasons | ({"failed"} if flaky.failed else set()), case
        assert isinstance(want, Completion), case
        assert ids == want.token_ids[: len(ids)], case
        assert listener.end.completion_tokens == len(ids), case
        if reason in ("stop", "length"):
            assert (text, reason, len(ids)) == (want.text, want.finish_reason, len(want.token_ids)), case
    for prompt, params, sentence in refusals:  # the plain LLM alone answers any number of log-probabilities
        assert isinstance(pair.wanted(prompt, params), UserError) or "log-prob" in sentence, (sentence, prompt, params)
    pair.counts["service: engine failures"] += found
    pair.counts["refused"] += len(refusals)


def of_promises(draw: random.Random, pair: Pair) -> None:
    """Try a promise of exactness.md on a family in a precision: plain decoding's texts."""
    precision = pair.roomy.name.removeprefix(f"{pair.name}-")
    hybrid, cases = pair.name in HYBRIDS, drawn_cases(draw, pair, draw.randrange(4, 9))
    if precision == "fp32":
        policy, batch = draw.choice(POLICIES + GOODPUT), draw.choice((1, 3, BATCH))
    else:
        policy, batch = draw.choice((("autoregressive", 3), ("goodput-exact", 1), ("goodput-exact", 3), ("goodput", 1)))
    if hybrid and precision != "fp32":  # either refused, or kept
        try:
            LLM(pair.roomy, "goodput-exact", batch, prefix_cache=False)
        except UserError:
            pair.counts["promises: goodput-exact is refused for a hybrid"] += 1
            return
        policy = "goodput-exact"
    llm = LLM(pair.roomy, "autoregressive", batch, prefix_cache=False)
    if policy in GOODPUT:
        llm.loop.planner = goodput_planner(llm, MACHINES[0], policy)
    elif policy != "autoregressive":
        llm.loop.planner = llm.tuning.planner(policy, 24)
    prompts, params = [prompt for prompt, _, _ in cases], [params for _, params, _ in cases]
    for got, (prompt, each, want) in zip(llm.generate(prompts, params), cases, strict=True):
        found = differing(got, want)
        assert not found, (f"{pair.name} in {precision}, {policy}, batch {batch}", found, prompt, each, got, want)
    pair.counts[f"promises: {precision}, {policy}"] += len(cases)
