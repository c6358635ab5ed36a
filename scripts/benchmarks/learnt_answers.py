"""What answers bring that are learnt while serving (--learn-answers): tokens per pass and tokens per second, a table.

    python scripts/benchmarks/learnt_answers.py BUNDLE --prompts alpaca.jsonl [--count 24] [--streams 1,4]

Two engines answer in turns, one of which learns. "again": the same questions, once more each round, with other seeds
from the second round on. "samples": eight answers to each question, together. "others": each question once, where
nothing comes again. Texts of both engines are compared.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from echo_trt import LLM, SamplingParams

ROUNDS, SAMPLES = 3, 8
Chats = list[list[dict[str, str]]]


class Side:
    """One of the two engines: what its rounds have brought."""

    def __init__(self, bundle: Path, streams: int, learns: bool):
        self._llm = LLM(bundle, "goodput", streams, learn_answers=learns)
        self.tokens = self.verifications = 0
        self.seconds = 0.0

    def answer(self, chats: Chats, params: list[SamplingParams], counted: bool) -> list[list[int]]:
        before, begin = self._llm.counters.copy(), time.perf_counter()
        answers = self._llm.chat(chats, params)
        if counted:
            self.seconds += time.perf_counter() - begin
            self.tokens += self._llm.counters.emitted_tokens - before.emitted_tokens
            self.verifications += self._llm.counters.verifications - before.verifications
        return [each.token_ids for each in answers]

    @property
    def per_pass(self) -> float:
        return self.tokens / self.verifications


def rounds_of(load: str, chats: Chats, temperature: float) -> list[tuple[Chats, list[SamplingParams]]]:
    """Return the requests of each round; of "again" the first round is not counted."""
    params = SamplingParams(128, temperature=temperature)
    if load == "samples":
        few = [chat for chat in chats[: len(chats) // ROUNDS] for _ in range(SAMPLES)]
        return [(few, [replace(params, seed=seed) for seed in range(len(few))])]
    if load == "others":
        return [(chats, [replace(params, seed=seed) for seed in range(len(chats))])]
    return [(chats, [replace(params, seed=1000 * turn + i) for i in range(len(chats))]) for turn in range(ROUNDS)]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bundle", type=Path)
    options.add_argument("--prompts", type=Path, required=True, help="made by prompts.py")
    options.add_argument("--count", type=int, default=24)
    options.add_argument("--streams", default="1,4")
    given = options.parse_args()
    lines = given.prompts.read_text("utf-8").splitlines()[: given.count]
    chats = [[{"role": "user", "content": json.loads(line)["turns"][0]}] for line in lines]
    print("| load | temperature | streams | tokens per pass, without | with | tokens/s, with / without | texts |")
    print("|---|---|---|---|---|---|---|")
    for load, temperature in (("again", 0.0), ("again", 0.7), ("samples", 0.7), ("samples", 1.0), ("others", 0.0)):
        for streams in map(int, given.streams.split(",")):
            without, learning = (Side(given.bundle, streams, learns) for learns in (False, True))
            equal, rounds = True, rounds_of(load, chats, temperature)
            for turn, requests in enumerate(rounds):
                counted = turn > 0 or len(rounds) == 1
                sides = (without, learning) if turn % 2 else (learning, without)
                one, other = (side.answer(*requests, counted) for side in sides)
                equal &= one == other
            ratio = learning.tokens / learning.seconds / (without.tokens / without.seconds)
            figures = (
                f"{without.per_pass:.2f} | {learning.per_pass:.2f} | {ratio:.2f} | {'equal' if equal else 'DIFFER'}"
            )
            print(f"| {load} | {temperature:g} | {streams} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
