"""Random requests in a crowd, against plain decoding of each request alone; stops at the first difference.

    python scripts/proofs/fuzz.py --minutes 5

Every sampling parameter and every field of the door is drawn from what is declared of it, with both ends of its range.
A round is of one kind (``--only``):

loop      another policy, a new request, a preemption or a cancellation before each iteration; drafts of every kind
service   threads, priorities, deadlines, an engine that fails; the default policy, or one that raises and lies
door      clients of the whole server, with the limits of its socket scaled down, and a bad client of that socket
promises  what docs/exactness.md says of a precision, on a family of models

In each, no engine failure is counted that the engine did not make, no client's answer ends or changes by what another
one does, and every text is plain decoding's. A difference is told with the seed of its round, which repeats it (exactly
in loop and promises; elsewhere threads have a say, too). Needs pip install -e '.[test]' -e ./lab. Exit code 1 where
something differed.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
PARTS = ("", "plugins", "tests", "tests/engine", "tests/engine/service", "tests/speculation", "scripts/proofs")
sys.path[:0] = [str(ROOT / part) for part in PARTS]

import torch
from fuzz_parts.crowds import DENSE, PRECISIONS, PROMISED, Pair, of_loop, of_promises, of_service, opened
from fuzz_parts.door import of_door, scale_limits
from pairs import write_networks

from echo_trt.engine.service import service as serving

ROUNDS = {"loop": of_loop, "service": of_service, "door": of_door, "promises": of_promises}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=5.0, help="after which no other round begins; 0 is one round")
    options.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of the first round")
    options.add_argument("--networks", type=Path, help="those of tests/pairs.py; default: written anew")
    options.add_argument("--pairs", default="close,lookup,dspark", help="of tests/pairs.py, by commas")
    options.add_argument("--only", default=",".join(ROUNDS), help="kinds of rounds, by commas")
    options.add_argument("--store", action="store_true", help="give crowds a store, which is damaged at times")
    options.add_argument("--precisions", default=",".join(PRECISIONS), help="of the promises, by commas")
    requested = options.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)  # of engines that fail
    serving.MANY = 1  # tokens of a few requests wait for the next pass, too
    scale_limits()
    kinds, counts = requested.only.split(","), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="echo-trt-fuzz-") as folder:
        networks = requested.networks or Path(folder) / "networks"
        if not requested.networks:
            write_networks(networks)

        @cache
        def pair_of(name: str, precision: str) -> Pair:
            pair = opened(name, networks, Path(folder), precision)
            store = Path(folder) / f"store-{name}-{precision}" if requested.store else None
            return Pair(**vars(pair) | {"counts": counts, "store": store})

        end, seed = time.monotonic() + 60 * requested.minutes, requested.seed
        while seed == requested.seed or time.monotonic() < end:
            draw = random.Random(seed)
            kind = draw.choice(kinds)
            names, precision = requested.pairs.split(","), "fp32"
            if kind == "promises":
                precision = draw.choice(requested.precisions.split(","))
                names = DENSE if precision.startswith("int") else PROMISED
            pair = pair_of(draw.choice(names), precision)
            try:
                ROUNDS[kind](draw, pair)
            except Exception as error:
                traceback.print_exc()
                again = f"--seed {seed} --minutes 0 --pairs {requested.pairs} --only {requested.only}"
                again += f" --precisions {requested.precisions}" + " --store" * requested.store
                sys.exit(f"{type(error).__name__} in a round of the {kind}; repeat it: {again}")
            counts[f"rounds: {kind}"] += 1
            seed += 1
    print(f"{seed - requested.seed} rounds from seed {requested.seed}: {json.dumps(dict(sorted(counts.items())))}")


if __name__ == "__main__":
    main()
