"""When requests come: steadily (Poisson), in bursts, or as a recorded trace says; deterministic in a seed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echo_trt.errors import UserError

INTERACTIVE, BATCH = "interactive", "batch"
PROMPT, SPREAD = 256, 0.6  # tokens of a prompt, median and log-normal spread; larger: more time goes to prompts


@dataclass(frozen=True)
class Bursts:
    """In the first ``length`` seconds of a ``period`` requests come ``height`` times as often as on average."""

    period: float = 60.0
    length: float = 15.0
    height: float = 3.0


BURSTS, STEADY = Bursts(), Bursts(1.0, 0.0, 1.0)


@dataclass(frozen=True)
class Arrival:
    """A request: seconds at which it comes, tokens of its prompt, and the name of its class."""

    time: float
    prompt: int
    kind: str


def times(rate: float, seconds: float, rng: np.random.Generator, bursts: Bursts = STEADY) -> Iterator[float]:
    """Draw the times of ``rate`` requests per second on average, by thinning a Poisson process at the bursts' rate."""
    quiet = (bursts.period - bursts.height * bursts.length) / (bursts.period - bursts.length)
    now = 0.0
    while True:
        now += rng.exponential(1 / (rate * bursts.height))
        if now >= seconds:
            return
        busy = now % bursts.period < bursts.length
        if rng.random() < (1.0 if busy else quiet / bursts.height):
            yield now


def drawn(rate: float, seconds: float, share: float, bursts: Bursts = STEADY, seed: int = 0) -> list[Arrival]:
    """Draw requests of which a ``share`` is interactive."""
    rng = np.random.default_rng(seed)
    return [
        Arrival(
            time,
            int(np.clip(PROMPT * rng.lognormal(0, SPREAD), 16, 16 * PROMPT)),
            INTERACTIVE if rng.random() < share else BATCH,
        )
        for time in times(rate, seconds, rng, bursts)
    ]


def read(path: Path) -> list[Arrival]:
    """Read a recorded trace, a JSON object per line: time (seconds), prompt_tokens and class. Raises UserError."""
    found: list[Arrival] = []
    try:
        for line in path.read_text("utf-8").splitlines():
            entry = json.loads(line)
            found.append(Arrival(float(entry["time"]), int(entry["prompt_tokens"]), str(entry.get("class", BATCH))))
    except OSError as error:
        raise UserError(f"--arrivals is {path}, which cannot be read ({error.strerror}); name a trace.") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        rule = 'write {"time": seconds, "prompt_tokens": n, "class": "interactive"} per line.'
        raise UserError(f"--arrivals {path}, line {len(found) + 1}, is no arrival; {rule}") from None
    if not found:
        raise UserError(f"--arrivals {path} has no line; name a trace with one request per line.")
    return sorted(found, key=lambda arrival: arrival.time)
