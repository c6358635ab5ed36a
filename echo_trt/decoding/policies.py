"""Policies: how deep and wide to draft, where to gate, and who gets the verification budget.

The paper's policies and plain decoding are one rule with other numbers, so that a comparison of them compares the
numbers. ``goodput`` is a rule of its own, see that module; ``goodput-head`` is the same without copied text, and
``goodput-exact`` with one path a request: engines whose rounding differs between trees and chains verify those bit by
bit as they decode plainly.

| policy         | gates                              | budget                                        |
|----------------|------------------------------------|-----------------------------------------------|
| goodput        | a level is drafted if it pays      | a token is verified if it pays                |
| autoregressive | -                                  | nothing beyond the roots                      |
| static         | none                               | the same for each request (EAGLE-3's tree)    |
| dense          | at every depth                     | one for the batch                             |
| fixed          | at ECHO's depths, one threshold    | one for the batch                             |
| echo           | at a few depths, each its threshold| one for the batch                             |

One budget is shared in one way (``grow``, ``allocate``): first the depth that confidence claims, then width for what is
left. The paper's pivot between the two is no rule of its own: it is how many claims there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from echo_trt.errors import UserError

PAPER = ("autoregressive", "static", "dense", "fixed", "echo")
NAMES = (*PAPER, "goodput", "goodput-exact", "goodput-head")


@dataclass(frozen=True)
class Policy:
    """max_depth: levels below the root; beams: nodes of a level that are expanded; width: children scored under each.

    gates: depth -> tau, compared with conf(i, d) = exp(max_j S(i, d, j)). budget: K_max, tokens verified an iteration
    over the whole batch, roots included; None: not shared (static). per_request: the most of one request, K_i.
    """

    name: str
    max_depth: int = 0
    beams: int = 1
    width: int = 1
    gates: Mapping[int, float] = field(default_factory=dict)
    budget: int | None = None
    per_request: int = 64

    @property
    def seeks_goodput(self) -> bool:
        return self.name.startswith("goodput")

    @property
    def copies(self) -> bool:
        """Whether continuations from the text itself join the draft's."""
        return self.name in ("goodput", "goodput-exact")

    @property
    def one_path(self) -> bool:
        """Whether a request's draft is a chain, however many sources propose tokens."""
        return self.name == "goodput-exact"

    def spare(self, requests: int) -> int:
        """Draft tokens that the budget has room for beside one root a request."""
        if self.max_depth == 0:
            return 0
        shared = self.budget is not None
        return max(self.budget - requests, 0) if shared else requests * (self.per_request - 1)

    def passes(self, depth: int, confidence: np.ndarray) -> np.ndarray:
        """The sparse gate: whether each request (confidence [A]) may go deeper than ``depth``. bool [A]"""
        return confidence > self.gates.get(depth, -1.0)

    @property
    def nodes_per_request(self) -> int:
        """The most new KV rows that one request can need, to draft or to verify, root included."""
        return max(1 + self.beams * max(self.max_depth - 1, 0), self.per_request)


def make_policy(name: str, settings: Mapping) -> Policy:
    """A policy by name from a recipe's ``decoding`` section (echo_trt.recipe.Decoding as a mapping).

    ``dense_gates`` beside it, if there are any, are the thresholds of all depths; else the sparse ones are joined.
    """
    shared = {key: settings[key] for key in ("max_depth", "beams", "width", "budget", "per_request")}
    gates = dict(settings["gates"] or {})
    if name == "autoregressive":
        return Policy(name)
    if name == "static":
        tree = settings["static"]
        return Policy(name, tree["depth"], tree["top_k"], tree["top_k"], per_request=tree["tokens"])
    if name.startswith("goodput") and name in NAMES:
        beams, width = (1, 1) if name == "goodput-exact" else (shared["beams"], shared["width"])
        return Policy(name, shared["max_depth"], beams, width, per_request=shared["per_request"])
    if name == "echo":
        return Policy(name, gates=gates, **shared)
    if name == "fixed":
        return Policy(name, gates=dict.fromkeys(gates, settings["fixed_threshold"]), **shared)
    if name == "dense":
        return Policy(name, gates=settings.get("dense_gates") or _interpolated(gates, shared["max_depth"]), **shared)
    raise UserError(f"policy is {name!r}; choose one of {', '.join(NAMES)}.")


def shares_budget(name: str) -> bool:
    """Whether a policy verifies up to K_max tokens of the whole batch: the paper's, not ``static`` or ``goodput``."""
    return name in ("echo", "dense", "fixed")


def reserve_for(settings: Mapping) -> int:
    """KV rows beyond its committed tokens that a request can need, whichever policy is in force and whatever K_max."""
    return max(make_policy(name, settings).nodes_per_request for name in ("static", "echo"))


def _interpolated(gates: Mapping[int, float], max_depth: int) -> dict[int, float]:
    """A threshold for every depth, on straight lines between the sparse ones."""
    known = sorted(gates)
    depths = range(1, max_depth + 1)
    return dict(zip(depths, np.interp(depths, known, [gates[d] for d in known]).tolist(), strict=True)) if known else {}
