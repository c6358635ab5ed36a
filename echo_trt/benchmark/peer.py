"""The protocol of a peer: another engine that answers the same prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class PeerRun:
    """What a peer made of the prompts.

    ``token_ids`` are the answers in the order of the prompts, each with the end token that ended it. ``seconds`` run
    from the first prompt's arrival to the last token; loading, compiling and a first short answer came before.

    Rates that compare with ours are of steps in which every place was taken: ``full_tokens_per_s`` is over all of them,
    prompts included, and ``decode_tokens_per_s`` over those in which every text already had its first token, so that no
    prompt was computed. ``accepted_length`` is what one of the latter gave a text, 1 without drafting. None where there
    was no such step. ``drafts`` says what was drafted, None where nothing was.
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
        """Answer the prompts (token ids, chat template applied), greedy, at most ``concurrency`` at once.

        A text ends with one of the manifest's end tokens or after ``max_tokens``, and the next takes its place.
        """
