"""A simulated fleet: replicas behind a router, under a bursty trace of conversations whose prompts begin alike.

A replica computes prompts one after the other and lets its running requests stand meanwhile; between prompts each
running request advances at the rate of the present batch. So a replica changes only when a request comes, begins, gets
its first token or ends, and a clock jumps from one such moment to the next. All is deterministic in the trace's seed.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from echo_trt_lab.simulation.arrivals import BURSTS, Bursts, times

BLOCK = 32  # tokens of a KV block
EPSILON = 1e-9  # seconds or tokens below which rounding is taken for the cause


@dataclass(frozen=True)
class ConversationTurn:
    """A request: the turn of a conversation.

    arrival  seconds, of a first turn; of a later one seconds after the answer before it
    prompt   tokens, with all that was said before
    shared   tokens of the prompt that all conversations of ``family`` begin with
    answer   tokens
    """

    conversation: int
    family: int
    number: int
    arrival: float
    prompt: int
    shared: int
    answer: int


@dataclass(frozen=True)
class TraceSettings:
    """Conversations and their turns; seconds and tokens.

    rate     conversations per second on average
    shared   tokens that all prompts of a family begin with
    think    seconds between an answer and the next turn, on average
    """

    rate: float
    seconds: float = 300.0
    turns: int = 4
    families: int = 16
    shared: int = 384
    bursts: Bursts = BURSTS
    think: float = 8.0
    seed: int = 0


def make_trace(settings: TraceSettings) -> list[list[ConversationTurn]]:
    """Draw conversations, each a list of turns; first turns ascend in time."""
    rng = np.random.default_rng(settings.seed)
    conversations: list[list[ConversationTurn]] = []
    for now in times(settings.rate, settings.seconds, rng, settings.bursts):
        family = int(rng.zipf(1.3) - 1) % settings.families
        turns, prompt = [], settings.shared
        for number in range(settings.turns):
            prompt += int(rng.integers(20, 120))
            answer = int(np.clip(rng.lognormal(4.4, 0.6), 8, 400))
            arrival = now if number == 0 else float(rng.exponential(settings.think))
            turns.append(ConversationTurn(len(conversations), family, number, arrival, prompt, settings.shared, answer))
            prompt += answer
        conversations.append(turns)
    return conversations


@dataclass(frozen=True)
class Speed:
    """The speed of a replica.

    batches         int [m], requests running at once, ascending; the last number is the limit
    rates           float [m], tokens per second of all running requests together
    prompt_seconds  seconds to compute a prompt token that is not cached
    cached_tokens   tokens that the prefix cache holds
    """

    batches: Sequence[int]
    rates: Sequence[float]
    prompt_seconds: float
    cached_tokens: int

    @property
    def maximum(self) -> int:
        return int(self.batches[-1])

    def rate(self, batch: int) -> float:
        return float(np.interp(batch, self.batches, self.rates))


@dataclass
class _Running:
    turn: ConversationTurn
    requested: float
    left: float  # tokens of the answer


@dataclass
class Outcome:
    """What came of a turn, in seconds, and the prompt tokens that were cached."""

    turn: ConversationTurn
    first: float
    whole: float
    cached: int


class Replica:
    """One engine with its queue and its prefix cache; times are seconds on the fleet's clock."""

    def __init__(self, speed: Speed):
        self.speed, self.now = speed, 0.0
        self.queue: deque[tuple[ConversationTurn, float]] = deque()
        self.running: list[_Running] = []
        self._prefill: tuple[float, ConversationTurn, float, int] | None = None  # end, turn, asked, cached
        self._cache: OrderedDict[tuple[str, int], int] = OrderedDict()  # least recently used first
        self._held = 0
        self._first: dict[tuple[int, int], tuple[float, int]] = {}
        self.done: list[Outcome] = []
        self.busy = 0.0  # seconds with something to do

    def cached(self, turn: ConversationTurn) -> int:
        """Return how many of a prompt's tokens are cached, in whole blocks."""
        own = self._cache.get(("conversation", turn.conversation), 0)
        family = turn.shared if ("family", turn.family) in self._cache else 0
        return min(max(own, family), turn.prompt - 1) // BLOCK * BLOCK

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that are still to be computed."""
        waiting = [turn for turn, _ in self.queue] + ([self._prefill[1]] if self._prefill else [])
        return sum(turn.prompt - self.cached(turn) for turn in waiting)

    @property
    def active_tokens(self) -> int:
        """Tokens in the KV blocks of what runs or waits."""
        waiting = [turn for turn, _ in self.queue] + ([self._prefill[1]] if self._prefill else [])
        running = sum(request.turn.prompt + request.turn.answer - request.left for request in self.running)
        return int(running) + sum(turn.prompt for turn in waiting)

    def add(self, turn: ConversationTurn, now: float) -> None:
        self.queue.append((turn, now))
        self._begin()

    def next_change(self) -> float:
        """Return the time of its next event; infinity where it has nothing to do."""
        if self._prefill:
            return self._prefill[0]
        if not self.running:
            return float("inf")
        each = self.speed.rate(len(self.running)) / len(self.running)
        return self.now + min(request.left for request in self.running) / each

    def advance(self, now: float) -> list[Outcome]:
        """Go to ``now``, which is not beyond ``next_change``; returns the answers that ended."""
        span = now - self.now
        if self.running or self._prefill:
            self.busy += span
        if self.running and not self._prefill:
            each = self.speed.rate(len(self.running)) / len(self.running)
            for request in self.running:
                request.left -= span * each
        self.now = now
        ended = []
        if self._prefill and now >= self._prefill[0] - EPSILON:
            _, turn, requested, cached = self._prefill
            self._prefill = None
            self._first[turn.conversation, turn.number] = (now - requested, cached)
            self._keep(("family", turn.family), turn.shared)
            self.running.append(_Running(turn, requested, turn.answer - 1))
        for request in [request for request in self.running if request.left <= EPSILON]:
            self.running.remove(request)
            turn = request.turn
            first, cached = self._first.pop((turn.conversation, turn.number))
            self._keep(("conversation", turn.conversation), turn.prompt + turn.answer)
            ended.append(Outcome(turn, first, now - request.requested, cached))
        self.done += ended
        self._begin()
        return ended

    def _begin(self) -> None:
        if self.queue and not self._prefill and len(self.running) < self.speed.maximum:
            turn, requested = self.queue.popleft()
            cached = self.cached(turn)
            seconds = (turn.prompt - cached) * self.speed.prompt_seconds
            self._prefill = (self.now + seconds, turn, requested, cached)

    def _keep(self, key: tuple[str, int], tokens: int) -> None:
        self._held += tokens - self._cache.pop(key, 0)
        self._cache[key] = tokens
        while self._held > self.speed.cached_tokens and len(self._cache) > 1:
            self._held -= self._cache.popitem(last=False)[1]


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, turn: ConversationTurn, replicas: Sequence[Replica]) -> int:
        self._next += 1
        return (self._next - 1) % len(replicas)


class KvRouter:
    """Dynamo's rule: the replica with the fewest blocks to compute and to hold, the prompt's cached ones left out.

    prefill_scale  weight of blocks to compute (--router-prefill-load-scale); larger: more turns go home
    """

    def __init__(self, prefill_scale: float = 1.0):
        self._scale = prefill_scale

    def choose(self, turn: ConversationTurn, replicas: Sequence[Replica]) -> int:
        def cost(replica: Replica) -> float:
            computed = turn.prompt - replica.cached(turn) + replica.waiting_tokens
            return (self._scale * computed + replica.active_tokens) // BLOCK

        return min(range(len(replicas)), key=lambda i: cost(replicas[i]))


Router = RoundRobin | KvRouter


@dataclass
class Summary:
    """Figures of a run: seconds, tokens and shares."""

    outcomes: list[Outcome]
    seconds: float
    busy: float  # share of the replicas' time
    home: float  # share of later turns that went where the turn before was answered
    first: np.ndarray = field(init=False)  # seconds to the first token, [n], sorted
    token: np.ndarray = field(init=False)  # seconds per token after it, [n], sorted

    def __post_init__(self) -> None:
        self.first = np.sort([outcome.first for outcome in self.outcomes])
        gaps = [(o.whole - o.first) / (o.turn.answer - 1) for o in self.outcomes]
        self.token = np.sort(gaps)

    @property
    def tokens_per_second(self) -> float:
        return sum(outcome.turn.answer for outcome in self.outcomes) / self.seconds

    @property
    def cached(self) -> float:
        """The share of prompt tokens that were cached."""
        return sum(o.cached for o in self.outcomes) / sum(o.turn.prompt for o in self.outcomes)

    def first_percentile(self, percent: float) -> float:
        return float(np.percentile(self.first, percent))


def simulate_fleet(trace: Sequence[Sequence[ConversationTurn]], replicas: int, speed: Speed, router: Router) -> Summary:
    """Run all conversations to their ends. A turn comes when its user has read and thought about the answer before."""
    fleet = [Replica(speed) for _ in range(replicas)]
    # Arrivals, and the replicas' next changes, of which only the latest entry of a replica counts.
    events: list[tuple[float, int, int, int]] = []
    versions, last = [0] * replicas, {}
    same = later = 0
    for conversation, turns in enumerate(trace):
        heapq.heappush(events, (turns[0].arrival, 0, conversation, 0))
    now = 0.0
    while events:
        now, kind, number, detail = heapq.heappop(events)
        if kind == 0:
            turn = trace[number][detail]
            index = router.choose(turn, fleet)
            ended = fleet[index].advance(now)  # at the very moment of an arrival another answer may end
            fleet[index].add(turn, now)
            same, later = same + (last.get(number) == index), later + (detail > 0)
            last[number] = index
        elif detail != versions[number]:
            continue
        else:
            index = number
            ended = fleet[index].advance(now)
        for outcome in ended:
            conversation, following = outcome.turn.conversation, outcome.turn.number + 1
            if following < len(trace[conversation]):
                arrival = now + trace[conversation][following].arrival
                heapq.heappush(events, (arrival, 0, conversation, following))
        versions[index] += 1
        change = fleet[index].next_change()
        if change < float("inf"):
            heapq.heappush(events, (change, 1, index, versions[index]))
    outcomes = [outcome for replica in fleet for outcome in replica.done]
    busy = sum(replica.busy for replica in fleet) / (replicas * now)
    return Summary(outcomes, now, busy, same / max(later, 1))
