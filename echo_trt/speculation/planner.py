"""The planner protocol: a planner decides what one iteration drafts and verifies, and learns from the outcome."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import numpy as np

from echo_trt.errors import UserError
from echo_trt.speculation.chains import NO_CHAINS, Chains
from echo_trt.speculation.drafts import Draft, Pass
from echo_trt.speculation.pacer import Pace, Seats
from echo_trt.speculation.pack import LevelShape
from echo_trt.speculation.policy_names import PLAIN
from echo_trt.speculation.super_tree import SuperTree

RECENT = 16  # tokens before each root that a planner may look at: the longest context of an n-gram table


@dataclass(frozen=True)
class StepContext:
    """The work of one iteration, for B decoding requests.

    slots          int64 [B], where a request's history is kept
    max_draft_len  int64 [B], draft tokens in a row that the request can still use
    draft_lag      int64 [B], tokens that its draft must compute before it can draft
    context        cached tokens of all B requests
    recent         int64 [B, RECENT], tokens before a root, -1 where the text is shorter
    epoch          int64 [B], admission number of the request
    prompt_tokens  tokens of prompts computed in the same pass
    pace           how requests keep their latency targets; None: no request has a target
    """

    slots: np.ndarray
    max_draft_len: np.ndarray
    draft_lag: np.ndarray
    context: int
    recent: np.ndarray
    epoch: np.ndarray
    prompt_tokens: int = 0
    pace: Pace | None = None


@dataclass(frozen=True)
class Explanation:
    """The candidates of a plan, for metrics and step callbacks. Neither text nor speed depends on it.

    candidates         the tree of all nodes that the planner considered; the plan's tree is a part of it
    chances            float64 [len(candidates)], estimated chance that a candidate is accepted (1.0 for roots)
    nodes              int64 [n], the nodes of the plan's tree in ``candidates``
    verification_size  most tokens of this iteration's target pass, goodput's choice for its load; 0: the planner's
                       budget
    gates              depth -> threshold that a path's probability must pass to be drafted deeper
    """

    candidates: SuperTree
    chances: np.ndarray
    nodes: np.ndarray
    verification_size: int = 0
    gates: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The nodes that one iteration verifies.

    tree         nodes to verify, grouped by request; every root is included
    probability  float64 [n], estimated chance that a node is accepted (1.0 for roots)
    explanation  what ``tree`` was chosen from, to be shown
    padded_to    tokens to which the target's pass is padded where it computes nothing else; 0: as the engine likes
    """

    tree: SuperTree
    probability: np.ndarray
    explanation: Explanation
    padded_to: int = 0

    @classmethod
    def undrafted(cls, roots: np.ndarray) -> Plan:
        """Plan plain decoding: nothing but ``roots`` int64 [B]."""
        tree, sure = SuperTree.from_roots(roots), np.ones(len(roots))
        return cls(tree, sure, Explanation(tree, sure, np.arange(len(roots))))

    def checked(self, roots: np.ndarray, load: StepContext, rows: int) -> Plan:
        """Return this plan if a target can verify it for ``roots`` int64 [B].

        Else it would overwrite KV rows of other requests, or change a text. ``rows``: KV rows that a request has for
        its tree. Raises UserError.
        """
        tree, node, top = self.tree, np.arange(len(self.tree)), self.tree.parent < 0
        above, kinds = np.where(top, node, tree.parent), (tree.token, tree.parent, tree.request, tree.depth)
        rooted = np.array_equal(tree.request[top], np.arange(len(roots))) and np.array_equal(tree.token[top], roots)
        finite = len(self.probability) == len(tree) and np.isfinite(self.probability).all()
        if not rooted or not finite or any(each.dtype != np.int64 for each in kinds):
            raise UserError("a plan has int64 trees, one for each root, and a finite probability for each node")
        if (
            (above > node).any()
            or (np.diff(tree.request) < 0).any()
            or (tree.request[above] != tree.request).any()
            or (tree.depth != np.where(top, 0, tree.depth[above] + 1)).any()
        ):
            raise UserError("a plan's nodes are sorted by request, parents before children")
        if (largest := int(tree.sizes.max(initial=0))) > rows:
            raise UserError(f"a tree has {largest} tokens, and a request has room for {rows}")
        if (tree.depth > np.maximum(load.max_draft_len, 0)[tree.request]).any():
            raise UserError("a draft is longer than its request's max_draft_len")
        explained = self.explanation
        if len(explained.nodes) != len(tree) or len(explained.chances) != len(explained.candidates):
            raise UserError("an explanation has each node of the plan, and a chance for each candidate")
        children = np.sort((above << 32 | tree.token)[~top])
        if (children[1:] == children[:-1]).any():
            raise UserError("two children of a node have one token")
        return self

    def on_one_path(self, requests: np.ndarray) -> Plan:
        """Return the plan with the best path alone of ``requests``, bool [B]."""
        if not requests.any():
            return self
        kept = np.flatnonzero(self.tree.best_paths(self.probability, requests))
        tree, nodes = self.tree.sorted_by_request(kept)
        explanation = replace(self.explanation, nodes=self.explanation.nodes[nodes])
        return replace(self, tree=tree, probability=self.probability[nodes], explanation=explanation)


@dataclass(frozen=True)
class Iteration:
    """The outcome of one plan.

    path      int64 [m], accepted nodes of ``plan.tree``, roots included
    target    the verification pass
    drafts    the draft's passes, in order
    levels    draft levels that were asked for
    planning  seconds spent in ``Planner.plan`` outside the draft's passes
    seconds   the whole iteration
    host      seconds outside passes and planning
    """

    plan: Plan
    load: StepContext
    path: np.ndarray
    target: Pass
    drafts: tuple[Pass, ...]
    levels: int
    planning: float
    seconds: float
    host: float


class PlainCost(NamedTuple):
    """What plain decoding of an iteration's requests takes.

    here   seconds of an iteration with the iteration's prompts
    each   seconds of an iteration without
    error  standard error of both, as a share of them
    """

    here: float
    each: float
    error: float


class ChainSource:
    """Proposes draft tokens that take no pass of a network; what makes it is named in ``speculation.sources``.

    Any number of chains may hang below one node, of any length; ``merge`` makes a tree of all sources' chains.
    """

    def forces(self, load: StepContext) -> bool:
        """Say whether its tokens are worth a verification even where the batch decodes plainly, and a larger one."""
        return False

    def propose(self, load: StepContext) -> Chains:
        """Return chains below the roots; ``Chains.above`` is the index of a request in ``load``."""
        return NO_CHAINS

    def extend(self, tree: SuperTree, probability: np.ndarray, load: StepContext) -> Chains:
        """Return chains below leaves of ``tree``, whose nodes have P(accept) ``probability`` float64 [n].

        A root is a leaf where nothing was drafted below it. A chain below another node would repeat its children, and
        a plan with two equal children is refused.
        """
        return NO_CHAINS

    def observe(self, load: StepContext) -> None:
        """Learn from the texts of ``load``, to which an iteration has added its tokens."""

    def dump(self) -> dict[str, np.ndarray]:
        """Return what it has learnt of texts, for ``load`` in a later process, by names that are its own."""
        return {}

    def load(self, learnt: Mapping[str, np.ndarray]) -> None:
        """Begin with what an earlier process has dumped, where ``learnt`` has it."""


class Planner(Protocol):
    """Decides what each iteration verifies.

    In exact arithmetic a text does not depend on the planner; in bf16 its rounding may (docs/exactness.md).
    """

    name: str
    budget: int = (
        0  # K_max, tokens at the knee of the measured costs: ECHO's limit, which goodput only reports; 0: none
    )

    def plan(self, roots: np.ndarray, draft: Draft, load: StepContext) -> Plan:
        """Choose the super-tree to verify for ``roots`` int64 [B], the requests' last tokens."""

    def admit(self, seats: Seats) -> Seats:
        """Return the part of ``seats`` that is in the next pass, by default all; asked where there is a pace to keep.

        Fewer requests may decode, and the chunk of the prompts may be smaller.
        """
        return seats

    def level_shapes(self, requests: int) -> Collection[LevelShape]:
        """List what a device may be asked to draft in one go for ``requests``, so that it can prepare; by default
        nothing.
        """
        return ()

    def observe(self, iteration: Iteration) -> None:
        """Learn from one finished iteration; by default nothing."""
        return

    def totals(self) -> dict[str, dict[str, float]]:
        """Return sums by source: draft tokens "expected" and "accepted", and "silent" minutes; by default none."""
        return {}

    def dump(self) -> bytes:
        """Return what it has learnt, for ``load`` in a later process; by default nothing."""
        return b""

    def load(self, learnt: bytes) -> None:
        """Begin with what an earlier process has dumped. Raises ValueError or KeyError where that is of no use here."""
        return

    def gain(self) -> float | None:
        """Return the ratio of tokens per second to plain decoding's at the latest load; None, the default: not known.

        Any thread may ask.
        """
        return None

    def plain_cost(self, iteration: Iteration) -> PlainCost | None:
        """Return what plain decoding would have taken in the place of ``iteration``; None, the default: not known."""
        return None


class PlainPlanner(Planner):
    """Plain autoregressive decoding: one token per request and iteration."""

    name = PLAIN

    def gain(self) -> float | None:
        return 1.0

    def plan(self, roots: np.ndarray, draft: Draft, load: StepContext) -> Plan:
        return Plan.undrafted(roots)
