"""What a service says of itself, and the engine's metrics in a registry of prometheus_client's."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from echo_trt.engine.params import Counters
from echo_trt.engine.request import Event
from echo_trt.engine.service.metric_aliases import VLLM, aliased
from echo_trt.speculation.pack import BLOCK
from echo_trt.speculation.sources import SOURCES

SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0]
TOKENS = [1.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5]

KEPT = ("ttft", "tpot", "both")  # targets of a request, as metrics name them
#: name -> what it says, of Statistics.counters
COUNTERS = {
    "iterations": "Iterations of the engine core",
    "speculative_iterations": "Iterations that verified draft tokens",
    "prompt_tokens": "Prompt tokens computed",
    "asked_tokens": "Prompt tokens of admitted requests: computed, or found in the prefix cache",
    "cached_tokens": "Prompt tokens found in the prefix cache",
    "evicted_blocks": "KV blocks that the prefix cache gave up for new text",
    "restored_blocks": "KV blocks read from the store",
    "restored_seconds": "Seconds by which reading these was expected to beat computing them",
    "stored_bytes": "Bytes of KV blocks written to the store",
    "emitted_tokens": "Tokens emitted",
    "verified_tokens": "Tokens that the target verified, roots included",
    "drafted_tokens": "Draft tokens that were verified",
    "accepted_tokens": "Draft tokens that were accepted",
    "verifications": "Verifications of one request",
    "preemptions": "Requests set back because KV blocks ran out",
    "planner_failures": "Times that a policy or its draft failed, which cost a pass its draft",
}
#: Of Statistics.
GAUGES = {
    "queued": "Requests that wait for a slot",
    "running": "Requests that are being answered",
    "slots": "Requests that can be answered at once",
    "blocks": "KV blocks of the pool",
    "blocks_used": "KV blocks that requests hold",
    "blocks_free": "KV blocks that no request holds",
    "block_size": "Tokens of a KV block",
    "kv_usage": "Share of the KV blocks that requests hold, 0 to 1",
    "blocks_cached": "KV blocks that no request holds, kept for texts that begin alike",
    "budget": "K_max: the budget of an iteration; of goodput the knee of the measured costs",
}
HISTOGRAMS = {
    "queue_seconds": (SECONDS, "From a request's arrival until the engine takes it"),
    "prefill_seconds": (SECONDS, "From when the engine takes a request to the request's first token"),
    "decode_seconds": (SECONDS, "From a request's first token to its end"),
    "time_to_first_token_seconds": (SECONDS, "From a request's arrival to its first token"),
    "inter_token_seconds": (SECONDS, "Between two tokens of a request"),
    "request_seconds": (SECONDS, "From a request's arrival to its end"),
    "request_prompt_tokens": (TOKENS, "Tokens of a request's prompt"),
    "request_emitted_tokens": (TOKENS, "Tokens of a request's answer"),
}
LENGTH = "Tokens emitted per verification, lately"
GAIN = "Tokens per second over plain decoding's at the latest load, as the policy expects; 0: not known"
SAVED = "Seconds of the engine that drafts have saved since the start, against plain decoding; below 0: lost"
SAVED_ERROR = "Standard error of echo_saved_seconds, in seconds"
SOURCE_SAVED = "What a source has saved of them"
DRAFTS = "Draft tokens that goodput verified: their probabilities, summed, and those accepted"
POSITIONS = "Accepted draft tokens, by their position in the draft; 0: the first"
SILENT = "Minutes in which hardly any token of a source was accepted"


@dataclass(frozen=True)
class Statistics:
    """The service at about one moment; ``ended`` counts requests by reason."""

    queued: int
    running: int
    slots: int
    blocks: int
    blocks_used: int
    blocks_cached: int
    policy: str
    budget: int
    counters: Counters
    drafts: dict[str, dict[str, float]]  # ``Planner.totals``
    ended: dict[str, int] = field(default_factory=dict)
    engine_failures: int = 0
    given_up: int = 0
    queued_tokens: int = 0  # of the prompts that wait
    gain: float | None = None  # tokens per second over plain decoding's at the latest load; None: not known
    saved: dict[str, float] = field(default_factory=dict)  # seconds by source, against plain decoding
    saved_error: float = 0.0  # standard error of their sum
    latency: dict[str, tuple[int, dict[str, int]]] = field(default_factory=dict)  # class -> finished requests, kept

    block_size = BLOCK

    @property
    def blocks_free(self) -> int:
        """KV blocks that no request holds, those of the prefix cache included."""
        return self.blocks - self.blocks_used

    @property
    def kv_usage(self) -> float:
        """The share of the KV pool that requests hold."""
        return self.blocks_used / self.blocks


class EngineMetrics(Collector):
    """Series of a model that clients call ``name``: of the latest ``flush``, and of all observed times.

    observed  times not yet copied by a bridge to another registry; None: there is none
    """

    def __init__(self, name: str):
        self.registry = CollectorRegistry()
        self.registry.register(self)
        make = partial(Histogram, labelnames=["model_name"], registry=None)
        self._histograms = {
            each: make(f"echo_{each}", text, buckets=buckets) for each, (buckets, text) in HISTOGRAMS.items()
        }
        for each in self._histograms.values():
            each.labels(name)  # its series begin at 0
        self.observed: deque[tuple[str, float]] | None = None
        self._name, self._refused = name, Counter[str]()
        self._now: Statistics | None = None
        self._gates: dict[tuple[str, str], int] = {}
        self._length, self._verified = 0.0, (0, 0)

    def observe(self, name: str, value: float) -> None:
        """Observe a value of HISTOGRAMS."""
        self._histograms[name].labels(self._name).observe(value)
        if self.observed is not None:
            self.observed.append((name, value))

    def ended(self, end: Event, seconds: float) -> None:
        """Observe a request's tokens, and its seconds: in the queue, until its first token, and in all."""
        if end.reason == "invalid":
            return
        if end.queue_seconds is not None:
            self.observe("queue_seconds", end.queue_seconds)
        if end.first_token_seconds is not None:
            self.observe("time_to_first_token_seconds", end.first_token_seconds)
            self.observe("prefill_seconds", end.first_token_seconds - (end.queue_seconds or 0.0))
            self.observe("decode_seconds", max(seconds - end.first_token_seconds, 0.0))
        self.observe("request_seconds", seconds)
        self.observe("request_prompt_tokens", end.prompt_tokens)
        self.observe("request_emitted_tokens", end.completion_tokens)

    def refuse(self, outcome: str) -> None:
        """Count a request that the service never took."""
        self._refused[outcome] += 1

    def flush(self, now: Statistics) -> None:
        emitted, verifications = self._verified
        self._verified = now.counters.emitted_tokens, now.counters.verifications
        if now.counters.verifications > verifications:
            self._length = (self._verified[0] - emitted) / (self._verified[1] - verifications)
        reached = now.counters.reached
        for depth in sorted(reached):  # a draft that reached the next depth too was extended at this one
            extended = reached.get(depth + 1, 0)
            # A count read in the midst of an iteration must not make a counter smaller later.
            for gate, drafts in (("extended", extended), ("truncated", reached[depth] - extended)):
                key = str(depth), gate
                self._gates[key] = max(self._gates.get(key, 0), drafts)
        self._now = now

    def collect(self, names: str = VLLM) -> Iterator[Metric]:
        """Yield the engine's series, and after them those that have other ``names``."""
        own = [*self._counted(), *chain.from_iterable(each.collect() for each in self._histograms.values())]
        yield from own
        yield from aliased(own, names)

    def _counted(self) -> Iterator[Metric]:
        if (now := self._now) is None:
            return
        for name, text in COUNTERS.items():
            yield self._counter(name, text, {(): getattr(now.counters, name)})
        yield self._counter("engine_failures", "Iterations in which the engine failed", {(): now.engine_failures})
        given_up = "Requests ended since the engine failed again and again while they ran beside others"
        yield self._counter("requests_given_up", given_up, {(): now.given_up})
        for name, text in GAUGES.items():
            yield self._gauge(name, text, {(): getattr(now, name)})
        yield self._gauge("accepted_length", LENGTH, {(): self._length})
        yield self._gauge("speculation_gain", GAIN, {(): now.gain or 0.0})
        yield self._gauge("saved_seconds", SAVED, {(): sum(now.saved.values())})
        yield self._gauge("saved_seconds_error", SAVED_ERROR, {(): now.saved_error})
        by_source = {(source,): seconds for source, seconds in now.saved.items()}
        yield self._gauge("source_saved_seconds", SOURCE_SAVED, by_source, "source")
        yield self._gauge("policy", "1 for the policy in force", {(now.policy,): 1}, "policy")
        outcomes = Counter(now.ended) + self._refused
        yield self._counter("requests", "Requests by outcome", {(each,): n for each, n in outcomes.items()}, "outcome")
        sizes = {(str(now.block_size), str(now.blocks)): 1}
        yield self._gauge("kv_cache_info", "1; the labels tell the KV pool's size", sizes, "block_size", "blocks")
        yield from self._accepted(now.counters.accepted)
        gates = "Drafts that went on at a depth, and that ended there"
        yield self._counter("gates", gates, self._gates, "depth", "decision")
        sums = {what: now.drafts.get(what, {}) for what in ("expected", "accepted", "silent")}
        drafts = {(source, what): sums[what].get(source, 0) for source in SOURCES for what in ("expected", "accepted")}
        finished = {(name,): count for name, (count, _) in now.latency.items()}
        yield self._counter("latency_requests", "Finished requests by class of latency targets", finished, "class")
        kept = {(name, what): n for name, (_, each) in now.latency.items() for what, n in each.items()}
        yield self._counter("latency_kept", "Those whose targets were kept", kept, "class", "target")
        yield self._counter("goodput_drafts", DRAFTS, drafts, "source", "what")
        silent = {(source,): sums["silent"].get(source, 0) for source in SOURCES}
        yield self._counter("silent_drafts_minutes", SILENT, silent, "source")

    def _accepted(self, lengths: Counter[int]) -> Iterator[Metric]:
        """Yield the number of drafts, and how often the draft token at a position was accepted, 0 the first."""
        yield self._counter("drafts", "Verifications of a request's draft", {(): lengths.total()})
        depth = max([1, *lengths])  # the first position is told before anything is accepted: a series begins with 0
        positions = {(str(at),): sum(n for length, n in lengths.items() if length > at) for at in range(depth)}
        yield self._counter("accepted_tokens_per_position", POSITIONS, positions, "position")

    def _counter(self, name: str, text: str, values: Mapping[Any, float], *labels: str) -> Metric:
        return self._family(CounterMetricFamily(f"echo_{name}", text, labels=["model_name", *labels]), values)

    def _gauge(self, name: str, text: str, values: Mapping[Any, float], *labels: str) -> Metric:
        return self._family(GaugeMetricFamily(f"echo_{name}", text, labels=["model_name", *labels]), values)

    def _family(self, family: CounterMetricFamily | GaugeMetricFamily, values: Mapping[Any, float]) -> Metric:
        for labels, value in values.items():
            family.add_metric([self._name, *labels], value)
        return family
