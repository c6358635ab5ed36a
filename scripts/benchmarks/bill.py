"""The bill of saved time beside a real plain run of the same requests.

    python scripts/benchmarks/bill.py BUNDLE prompts.jsonl [--streams 1,4,8] [--count 160] [--tokens 192]

Two loops over one bundle's engines answer the same requests, as many at once as there are streams, in turns of a
second: plain decoding, and goodput, which keeps the bill. Prints for each number of streams the seconds of both at the
same number of tokens, what their difference is, and what the bill says; "off" is the bill's error as a share of the
difference, "of plain" as one of the plain run. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.files.prompts import read_prompts
from echo_trt_lab.benchmark.closed_loop import SLICE, ClosedLoop
from echo_trt_lab.side_by_side import side_by_side


class Recorded(ClosedLoop):
    """Notes after each iteration the tokens so far, the seconds and what the bill says: ``notes`` [n, 3]."""

    def __init__(self, *args: object):
        super().__init__(*args)
        self.notes: list[tuple[float, float, float]] = [(0, 0.0, 0.0)]

    def _step(self) -> None:
        super()._step()
        self.notes.append((self.emitted, self.seconds, float(self.loop.bill.saved.sum())))

    def at(self, tokens: int, column: int) -> float:
        """Return what stood in a column of the notes at so many tokens."""
        known = np.array(self.notes).T
        return float(np.interp(tokens, known[0], known[column]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--streams", default="1,4,8")
    parser.add_argument("--count", type=int, default=160, help="prompts of the file")
    parser.add_argument("--tokens", type=int, default=192, help="of an answer, at most")
    parser.add_argument("--seconds", type=float, default=45.0, help="of goodput, at most")
    parser.add_argument("--every", type=float, default=15.0, help="seconds of goodput between two lines")
    parser.add_argument("--costs", type=Path, help="file that keeps what passes cost on this machine")
    args = parser.parse_args()
    columns = (
        "streams",
        "tokens",
        "plain s",
        "goodput s",
        "faster",
        "saved s",
        "billed s",
        "error s",
        "off",
        "of plain",
    )
    print("".join(f"{column:>10}" for column in columns), flush=True)
    for streams in map(int, args.streams.split(",")):
        llm = LLM(args.bundle, "goodput", 2 * streams, note=print, costs=args.costs)
        texts = [llm.chat_ids(prompt.text) for prompt in read_prompts(args.prompts)][: args.count]
        params = SamplingParams(args.tokens)
        plain, goodput = (
            Recorded(loop, texts, streams, params) for loop in side_by_side(llm, ("autoregressive", "goodput"))
        )
        shown = 0.0
        while plain.busy and goodput.busy and goodput.seconds < args.seconds:
            min(plain, goodput, key=lambda run: run.emitted).run(SLICE)
            if goodput.seconds > shown + args.every:
                shown = goodput.seconds
                show(plain, goodput)
        show(plain, goodput)


def show(plain: Recorded, goodput: Recorded) -> None:
    """Print what both runs took for as many tokens as both have, and what the bill says of them."""
    tokens = min(plain.emitted, goodput.emitted)
    took, taken, billed = plain.at(tokens, 1), goodput.at(tokens, 1), goodput.at(tokens, 2)
    saved, error = took - taken, goodput.loop.bill.error
    row = f"{goodput.batch:10}{tokens:10}{took:10.1f}{taken:10.1f}{took / taken:10.2f}{saved:10.1f}{billed:10.1f}"
    print(f"{row}{error:10.1f}{billed / saved - 1:+10.1%}{(billed - saved) / took:+10.1%}", flush=True)


if __name__ == "__main__":
    main()
