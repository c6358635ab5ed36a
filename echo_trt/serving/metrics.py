"""What Prometheus is told, through Triton's metrics endpoint. One thread alone may touch it: two abort the server."""

from __future__ import annotations

from collections import Counter
from typing import Any

from echo_trt.decoding.sources import SOURCES
from echo_trt.serving.job import End
from echo_trt.serving.statistics import Statistics

SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0]

#: name -> what it says, of Statistics.counters
COUNTERS = {
    "iterations": "Iterations of the engine loop",
    "speculative_iterations": "Iterations that verified draft tokens; the others were plain decoding, or prompts alone",
    "prompt_tokens": "Prompt tokens computed",
    "asked_tokens": "Prompt tokens of the requests that were admitted: computed, or found in the prefix cache",
    "cached_tokens": "Prompt tokens found in the prefix cache",
    "evicted_blocks": "KV blocks that the prefix cache gave up for new text",
    "emitted_tokens": "Tokens emitted",
    "verified_tokens": "Tokens that the target verified, roots included",
    "drafted_tokens": "Draft tokens that were verified",
    "accepted_tokens": "Draft tokens that were accepted",
    "verifications": "Verifications of one request: emitted over these is the accepted length",
    "preemptions": "Requests set back because KV blocks ran out",
}
GAUGES = {
    "queued": "Requests that wait for a place",
    "running": "Requests that are being answered",
    "blocks": "KV blocks of the pool",
    "blocks_used": "KV blocks that requests hold",
    "kv_usage": "Share of the KV blocks that requests hold, 0 to 1",
    "blocks_cached": "KV blocks that no request holds, kept for texts that begin alike",
    "budget": "K_max: the budget of an iteration; of goodput the knee of the measured costs; 0 of policies without",
}


class Metrics:
    """``family`` is Triton's MetricFamily; ``model`` names the model in every series (``model_name``).

    Counters are brought up to date by ``flush``, from the service's own.
    """

    def __init__(self, family: Any, model: str):
        self._model = {"model_name": model}
        counter, gauge, histogram = family.COUNTER, family.GAUGE, family.HISTOGRAM
        self._families: list[Any] = []  # a family that is collected takes its metrics along

        def make(name: str, description: str, kind: Any, labels: dict[str, str] | None = None, **more: Any) -> Any:
            self._families.append(family(name=f"echo_{name}", description=description, kind=kind))
            return self._families[-1].Metric(labels=self._model | (labels or {}), **more)

        self._counters = {name: make(f"{name}_total", text, counter) for name, text in COUNTERS.items()}
        self._gauges = {name: make(name, text, gauge) for name, text in GAUGES.items()}
        about = "Tokens emitted a verification, since the last update in which there was a verification"
        self._accepted = make("accepted_length", about, gauge)
        gain = "Tokens a second over plain decoding's at the latest load, as the policy expects; 0: not known"
        self._gain = make("speculation_gain", gain, gauge)
        self._engine_failures = make("engine_failures_total", "Iterations in which the engine failed", counter)
        self._requests = family(name="echo_requests_total", description="Requests by outcome", kind=counter)
        self._gates = family(
            name="echo_gates_total", description="Drafts that went on at a depth, and that ended there", kind=counter
        )
        self._drafts = family(
            name="echo_goodput_drafts_total",
            description="Draft tokens that goodput verified: the sum of their probabilities, and those accepted",
            kind=counter,
        )
        self._policy = family(name="echo_policy", description="1 for the policy in force", kind=gauge)
        self._by_outcome: dict[str, Any] = {}
        self._by_policy: dict[str, Any] = {}
        self._by_gate: dict[tuple[int, str], Any] = {}
        self._by_source = {
            (source, what): self._drafts.Metric(labels=self._model | {"source": source, "what": what})
            for source in SOURCES
            for what in ("expected", "accepted")
        }
        silent = family(
            name="echo_silent_drafts_minutes_total",
            description="Minutes in which a source of drafts was tried and hardly any of its tokens accepted",
            kind=counter,
        )
        self._by_source |= {
            (source, "silent"): silent.Metric(labels=self._model | {"source": source}) for source in SOURCES
        }
        self._families.append(silent)
        self._histograms = {
            name: make(f"{name}_seconds", text, histogram, buckets=SECONDS)
            for name, text in (
                ("queue", "From a request's arrival until the engine takes it"),
                ("time_to_first_token", "From a request's arrival to its first token"),
                ("inter_token", "Between two tokens of a request"),
                ("request", "From a request's arrival to its end"),
            )
        }
        self._told: dict[str, float] = {}
        self._last = (0, 0)

    def observe(self, name: str, seconds: float) -> None:
        self._histograms[name].observe(seconds)

    def ended(self, end: End) -> None:
        """Observe a request's seconds in the queue and until its first token."""
        if end.queue_seconds is not None:
            self.observe("queue", end.queue_seconds)
        if end.first_token_seconds is not None:
            self.observe("time_to_first_token", end.first_token_seconds)

    def flush(self, now: Statistics, refused: dict[str, int]) -> None:
        """``refused``: requests that the service never took, by outcome."""
        for name, metric in self._counters.items():
            self._count(name, metric, getattr(now.counters, name))
        self._count("engine_failures", self._engine_failures, now.engine_failures)
        for name, metric in self._gauges.items():
            self._set(name, metric, getattr(now, name))
        self._set("speculation gain", self._gain, now.gain or 0.0)
        for outcome, number in (Counter(now.ended) + Counter(refused)).items():
            if outcome not in self._by_outcome:
                self._by_outcome[outcome] = self._requests.Metric(labels=self._model | {"outcome": outcome})
            self._count(f"outcome {outcome}", self._by_outcome[outcome], number)
        self._count_gates(now.counters.reached)
        for what, sums in now.drafts.items():
            for source, tokens in sums.items():
                self._count(f"drafts {source} {what}", self._by_source[source, what], tokens)
        if now.policy not in self._by_policy:
            self._by_policy[now.policy] = self._policy.Metric(labels=self._model | {"policy": now.policy})
        for name, metric in self._by_policy.items():
            self._set(f"policy {name}", metric, float(name == now.policy))
        emitted, verifications = self._last
        if now.counters.verifications > verifications:
            length = (now.counters.emitted_tokens - emitted) / (now.counters.verifications - verifications)
            self._accepted.set(length)
            self._last = now.counters.emitted_tokens, now.counters.verifications

    def _count_gates(self, reached: dict[int, int]) -> None:
        """A draft that reached the next depth too was extended at this one."""
        for depth in sorted(reached):
            extended = reached.get(depth + 1, 0)
            for decision, number in (("extended", extended), ("truncated", reached[depth] - extended)):
                gate = depth, decision
                if gate not in self._by_gate:
                    labels = {"depth": str(depth), "decision": decision}
                    self._by_gate[gate] = self._gates.Metric(labels=self._model | labels)
                self._count(f"gate {gate}", self._by_gate[gate], number)

    def _count(self, name: str, metric: Any, value: float) -> None:
        before = self._told.get(name, 0)
        if value > before:
            metric.increment(value - before)
            self._told[name] = value

    def _set(self, name: str, metric: Any, value: float) -> None:
        if self._told.get(name) != value:
            metric.set(value)
            self._told[name] = value
