"""Policies by name: which planner decides, with which numbers.

| policy         | gates                              | budget                                        |
|----------------|------------------------------------|-----------------------------------------------|
| autoregressive | -                                  | nothing beyond the roots                      |
| static         | none                               | the same for each request (EAGLE-3's tree)    |
| dense          | at every depth                     | one for the batch                             |
| fixed          | at ECHO's depths, one threshold    | one for the batch                             |
| echo           | at a few depths, with thresholds   | one for the batch                             |
| goodput        | a level is drafted if it pays      | a token is verified if it pays; a chain for a |
|                |                                    | lone request where trees round differently    |
| goodput-exact  | as goodput, with one path a request: engines that round trees otherwise than     |
|                | chains verify those bit for bit as they decode plainly                            |
| goodput-head   | as goodput, without copied text and n-grams                                       |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from echo_trt.decoding.echo import gates as gating
from echo_trt.decoding.echo.planner import EchoPlanner
from echo_trt.decoding.echo.settings import EchoSettings
from echo_trt.decoding.goodput.settings import GoodputSettings
from echo_trt.decoding.planner import PlainPlanner, Planner
from echo_trt.decoding.policy_names import GOODPUT, NAMES, PAPER, PLAIN
from echo_trt.errors import UserError

MakeGoodput = Callable[[str, GoodputSettings], Planner]


def make_planner(name: str, settings: Mapping, make_goodput: MakeGoodput) -> Planner:
    """Build a policy's planner from a recipe's ``decoding`` section (``Decoding`` as a mapping).

    ``dense_gates`` beside its fields, if there are any, are the thresholds of all depths; else the sparse ones are
    joined by straight lines. ``make_goodput`` builds a planner that needs costs and acceptance, too.
    """
    if name == PLAIN:
        return PlainPlanner()
    if name in GOODPUT:
        return make_goodput(name, goodput_settings(name, settings))
    if name in PAPER:
        return EchoPlanner(name, echo_settings(name, settings))
    raise UserError(f"policy is {name!r}; choose one of {', '.join(NAMES)}.")


def echo_settings(name: str, settings: Mapping) -> EchoSettings:
    """Return the numbers of ``static``, ``dense``, ``fixed`` or ``echo``."""
    if name == "static":
        tree = settings["static"]
        return EchoSettings(
            max_depth=tree["depth"], beams=tree["top_k"], width=tree["top_k"], per_request=tree["tokens"]
        )
    gates = dict(settings["gates"] or {})
    if name == "fixed":
        gates = gating.fixed(gates, settings["fixed_threshold"])
    elif name == "dense":
        gates = settings.get("dense_gates") or gating.dense(gates, settings["max_depth"])
    shared = {key: settings[key] for key in ("max_depth", "beams", "width", "budget", "per_request")}
    return EchoSettings(gates=gates, **shared)


def goodput_settings(name: str, settings: Mapping) -> GoodputSettings:
    """Return the numbers of a goodput policy."""
    shared = {key: settings[key] for key in ("max_depth", "beams", "width", "per_request")}
    if name == "goodput-exact":
        return GoodputSettings(**shared).as_chain()
    return GoodputSettings(**shared, free_candidates=name != "goodput-head")


def reserve_for(settings: Mapping) -> int:
    """Return the KV rows that a request can need beyond its committed tokens, whatever the policy and K_max."""
    return max(echo_settings(name, settings).rows_per_request for name in ("static", "echo"))
