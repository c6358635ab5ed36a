"""A machine that only keeps time: passes take what its curves say, drafted tokens are right with known probability."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from seeded_draft import PathDraft, SteadyDraft

from echo_trt.speculation.chains import Chains
from echo_trt.speculation.drafts import Pass, TimedDraft
from echo_trt.speculation.goodput.model.acceptance import CALIBRATED, KNOTS, Acceptance
from echo_trt.speculation.goodput.model.costs import Costs, Curve
from echo_trt.speculation.goodput.planner import GoodputPlanner
from echo_trt.speculation.goodput.settings import GoodputSettings, GoodputTuning
from echo_trt.speculation.planner import RECENT, ChainSource, Iteration, Plan, Planner, StepContext
from echo_trt.speculation.sources import LOOKUP
from echo_trt.speculation.super_tree import SuperTree

TUNING = GoodputTuning()
SHAPE = GoodputSettings(max_depth=5, beams=2, width=3, per_request=12)
SIZES = [1, 2, 4, 8, 16, 32, 64, 128]
USUAL = np.array([[[0.2, 0.4, 0.6, 0.8, 0.95], [0.02, 0.06, 0.1, 0.15, 0.2]]])


def random_acceptance(seed: int, depths: int = 3) -> Acceptance:
    """Tables that rise with the score, and else mean nothing."""
    table = np.sort(np.random.default_rng(seed).uniform(1e-4, 0.999, (len(CALIBRATED), depths, KNOTS)), axis=2)
    return Acceptance(table, np.tile(USUAL, (depths, 1, 1)))


def linear(first: float, each: float) -> Curve:
    """``first`` seconds for a token and ``each`` for every further one."""
    return Curve(SIZES, [first + each * (n - 1) for n in SIZES])


def load_of(count: int, **changes) -> StepContext:
    """Return a load of ``count`` requests in step with their draft, which were in their slots from the beginning."""
    slots = np.arange(count)
    usual = {"slots": slots, "max_draft_len": np.full(count, 9), "draft_lag": np.ones(count, np.int64), "context": 0}
    return StepContext(**{**usual, "recent": np.full((count, RECENT), -1), "epoch": np.full(count, -1), **changes})


class Copied(ChainSource):
    """A source that has found its chains already, whoever asks."""

    def __init__(self, found: Chains):
        self._found = found

    def propose(self, load: StepContext) -> Chains:
        return self._found


def copied_chains(tokens: np.ndarray, log_p: np.ndarray) -> Chains:
    """Make copied ``tokens`` int64 [B, L], each with the request's ``log_p`` float64 [B]."""
    per_token = np.repeat(np.asarray(log_p)[:, None], tokens.shape[1], axis=1)
    return Chains(np.arange(len(tokens)), tokens, per_token, np.full(len(tokens), LOOKUP, np.int8))


class Server:
    """One request per slot, without end. ``q`` [k]: what the draft says of the children of any node, best first, of
    which ``right`` [k] are the target's own; by default the draft is calibrated."""

    def __init__(self, planner: Planner, target: Curve, draft: Curve, q: Sequence[float], count: int):
        self.planner, self.target, self.draft = planner, target, draft
        self.q = self.right = q
        self.slots, self.epoch, self.draft_lag = np.arange(count), np.arange(count), np.full(count, 20)
        self.rng = np.random.default_rng(0)
        self.reset()

    def reset(self) -> None:
        """Begin counting anew."""
        self.seconds = self.drafting = 0.0
        self.tokens = self.drafts = 0
        self.sizes: list[int] = []  # of each verified tree

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def run(self, iterations: int) -> Server:
        """Count from here on."""
        self.reset()
        for _ in range(iterations):
            self._step()
        return self

    def _step(self) -> None:
        draft = ClockedDraft(self)
        count = len(self.slots)
        load = load_of(
            count, max_draft_len=np.full(count, 99), draft_lag=self.draft_lag.copy(), epoch=self.epoch.copy()
        )
        plan = self.planner.plan(np.zeros(len(self.slots)), draft, load)
        tokens = max(len(plan.tree), plan.padded_to)
        target, passes = Pass(tokens, 0, self.target(tokens)), tuple(draft.passes)
        drafting = sum(done.seconds for done in passes)
        path, seconds = self._accepted(plan), target.seconds + drafting
        self.draft_lag += np.bincount(plan.tree.request[path])
        self.planner.observe(Iteration(plan, load, path, target, passes, len(passes), 0.0, seconds, 0.0))
        self.seconds += seconds
        self.drafting += drafting
        self.drafts += drafting > 0
        self.tokens += len(path)
        self.sizes.append(len(plan.tree))

    def _accepted(self, plan: Plan) -> np.ndarray:
        tree = plan.tree
        visited = np.zeros(len(tree), bool)
        # The children of a node are the tokens 0, 1, ...; the target's own is each with its probability, or none.
        truth = self.rng.choice(len(self.right) + 1, len(tree), p=[*self.right, 1 - sum(self.right)])
        for node, parent in enumerate(tree.parent.tolist()):
            visited[node] = parent < 0 or (visited[parent] and truth[parent] == tree.token[node])
        return np.flatnonzero(visited)


class ClockedDraft(TimedDraft):
    """What a drafter does in an iteration: catch up with the asked requests, then one pass per level."""

    def __init__(self, server: Server):
        super().__init__(clock=lambda: self._now)
        self._server, self._draft = server, SteadyDraft([server.q] * len(server.slots))
        self._above, self._now = 0, 0.0

    def _pass(self, entries: int) -> None:
        self._now += self._server.draft(entries)
        self.ran(entries, 0)

    def propose_roots(self, requests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self._pass(int(self._server.draft_lag[requests].sum()))
        self._server.draft_lag[requests] = 0
        return self._draft.expand_roots(requests)

    def propose(self, tree: SuperTree, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self._above += len(nodes)
        self._pass(self._above)
        return self._draft.expand(tree, nodes)


def server_of(
    target: Curve, draft: Curve, q: Sequence[float], count: int, change: float = 0.0, sizes: tuple[int, ...] = ()
) -> Server:
    """Return a server whose planner knows the machine's curves, and nothing of the draft."""
    costs = Costs(Curve(target.sizes, target.seconds), Curve(draft.sizes, draft.seconds), change=change, sizes=sizes)
    planner = GoodputPlanner("goodput", SHAPE, costs, Acceptance.uncalibrated(SHAPE.max_depth), count)
    return Server(planner, target, draft, q, count)


class Recorded(PathDraft):
    """A draft that keeps which requests its roots pass was asked for."""

    def __init__(self, draft: PathDraft):
        super().__init__()
        self._inner, self.roots, self.passes = draft, [], 0

    def children(self, request: int, path: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        return self._inner.children(request, path)

    def expand_roots(self, requests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.roots, self.passes = requests.tolist(), self.passes + 1
        return super().expand_roots(requests)

    def expand(self, tree: SuperTree, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.passes += 1
        return super().expand(tree, nodes)
