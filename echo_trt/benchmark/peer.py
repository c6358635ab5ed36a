"""The protocol of a peer: another engine that answers the same prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class PeerRun:
    """A peer's answers and rates. A rate is None where there was no such step.

    token_ids            answers in the order of the prompts, with their end tokens
    seconds              from the first prompt's arrival to the last token, after loading and a first short answer
    full_tokens_per_s    of all steps with a text in every place, prompts included
    decode_tokens_per_s  of those full steps that computed no prompt
    accepted_length      tokens of a text in one of the latter steps, 1 without drafting
    drafts               kind of the drafts, None without any
    """

    token_ids: list[list[int]]
    seconds: float
    full_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    accepted_length: float | None
    drafts: str | None = None


class Peer(Protocol):
    name: str

    def run(self, prompts: list[list[int]], concurrency: int, max_tokens: int) -> PeerRun:
        """Answer the prompts (token ids in a chat template) greedily, at most ``concurrency`` at once.

        A text ends with one of the manifest's end tokens or after ``max_tokens``, and the next takes its place.
        """
