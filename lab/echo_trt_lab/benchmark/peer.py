"""The protocol of a peer: another engine that answers the same prompts; and its measures from the times of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

#: Share of a gap between two arrivals in which a prompt may wait; larger: more gaps count as decoding alone.
OVERLAP = 0.1


@dataclass
class Arrivals:
    """One answer as its client saw it. Times are seconds of one clock.

    prompt  tokens of the prompt
    sent    time at which the prompt was sent
    times   time of every arrival, ascending
    tokens  tokens of every arrival, 0 where a place waits for other answers; a mean where only a sum is known
    """

    prompt: int
    sent: float
    times: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)

    def add(self, time: float, tokens: float) -> None:
        self.times.append(time)
        self.tokens.append(tokens)


@dataclass(frozen=True)
class Work:
    """Tokens, and the seconds in which every place produced them."""

    tokens: float
    elapsed: float


@dataclass(frozen=True)
class PeerRun:
    """A peer's answers and measures.

    answers          token ids with their end tokens, or texts, in the order of the prompts
    whole            all tokens, from the first prompt's arrival to the end of the last prompt's first answer
    decode           tokens of the times in which no prompt waited for its first token
    prefill          tokens of prompts, and the time in which one waited for its first token
    ttft             seconds from an answer's prompt to its first token
    pace             seconds per token of an answer, without its first token
    accepted_length  tokens per arrival in ``decode``, 1 without drafting; None where arrivals are not steps
    drafts           kind of the drafts, None without any
    reported         ``pace`` by the peer's own timings, where it sends some
    cached           tokens of prompts that came from the peer's prefix cache
    """

    answers: Sequence[list[int]] | Sequence[str]
    whole: Work
    decode: Work
    prefill: Work
    ttft: list[float]
    pace: list[float]
    accepted_length: float | None = None
    drafts: str | None = None
    reported: list[float] = field(default_factory=list)
    cached: int = 0


class Peer(Protocol):
    name: str

    def run(self, prompts: list[list[int]], concurrency: int, max_tokens: int) -> PeerRun:
        """Answer the prompts (token ids in a chat template) greedily, at most ``concurrency`` at once.

        A text ends with one of the manifest's end tokens or after ``max_tokens``, and the next takes its place. As in
        our runs, prompts begin again after the last, until each has an answer.
        """


def measured(
    answers: Sequence[list[int]] | Sequence[str], arrivals: list[Arrivals], concurrency: int, begin: float, end: float
) -> PeerRun:
    """Measure a run from ``begin`` to ``end``.

    The first ``arrivals`` belong to ``answers``; later arrivals are repeated prompts, which keep all ``concurrency``
    places busy. So the decode rate is the token rate of one request in gaps without a waiting prompt, times
    ``concurrency``.
    """
    first = arrivals[: len(answers)]
    waits = _merged(sorted((a.sent, a.times[0]) for a in arrivals if a.times and a.times[0] <= end))
    gaps, tokens = _gaps(arrivals, end)
    clean = ~_waited(gaps, waits)
    decoded, seconds = float(tokens[clean].sum()), float((gaps[clean, 1] - gaps[clean, 0]).sum())
    steps = int((tokens[clean] > 0).sum())
    paces = [_pace(a) for a in first]
    return PeerRun(
        answers,
        whole=Work(sum(n for a in arrivals for t, n in zip(a.times, a.tokens, strict=True) if t <= end), end - begin),
        decode=Work(decoded, seconds / concurrency),
        prefill=Work(
            sum(a.prompt for a in arrivals if a.times and a.times[0] <= end), float((waits[:, 1] - waits[:, 0]).sum())
        ),
        ttft=[a.times[0] - a.sent for a in first],
        pace=[pace for pace in paces if pace is not None],
        accepted_length=decoded / steps if steps else None,
    )


def _pace(answer: Arrivals) -> float | None:
    """Compute seconds per token after the first arrival; None for a single token."""
    tokens = sum(answer.tokens)
    last = max(t for t, n in zip(answer.times, answer.tokens, strict=True) if n > 0)
    return (last - answer.times[0]) / (tokens - 1) if tokens > 1 else None


def _merged(spans: list[tuple[float, float]]) -> np.ndarray:
    """Merge overlapping spans, sorted by their begin, to disjoint ones, float64 [n, 2]."""
    merged: list[list[float]] = []
    for begin, end in spans:
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return np.array(merged).reshape(-1, 2)


def _gaps(arrivals: list[Arrivals], end: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the spans between two arrivals of an answer, float64 [n, 2], and the tokens of the later one [n]."""
    spans = [
        (before, after, tokens)
        for a in arrivals
        for before, after, tokens in zip(a.times, a.times[1:], a.tokens[1:], strict=False)
        if after <= end
    ]
    rows = np.array(spans, np.float64).reshape(-1, 3)
    return rows[:, :2], rows[:, 2]


def _waited(gaps: np.ndarray, waits: np.ndarray) -> np.ndarray:
    """Return whether a prompt waited during a gap, bool [n]; ``waits`` are disjoint.

    Arrivals of one step come one after another: an overlap at a gap's edge alone is no wait.
    """
    if not len(waits):
        return np.zeros(len(gaps), bool)
    edge = OVERLAP * (gaps[:, 1] - gaps[:, 0])
    following = np.searchsorted(waits[:, 1], gaps[:, 0] + edge, side="right")
    begins = np.append(waits[:, 0], np.inf)[following]
    return begins < gaps[:, 1] - edge
