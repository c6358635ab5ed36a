"""Policies by name. A policy is a function that makes a planner; ``@policy`` registers it.

A policy of one's own is one file, which ``--policy-file`` loads (examples/chain_policy.py).
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from echo_trt.errors import UserError, described, shown
from echo_trt.speculation.echo.planner import EchoPlanner
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt.speculation.planner import PlainPlanner, Planner
from echo_trt.speculation.policy_names import DEFAULT, EXACT, PLAIN

Settings = Mapping[str, Any]  # a recipe's ``decoding`` section (``Decoding`` as a mapping), and the ``calibration``
MakeGoodput = Callable[[str, GoodputSettings], Planner]
MakePlanner = Callable[[str, Settings, MakeGoodput], Planner]


@dataclass(frozen=True)
class Policy:
    """A registered policy.

    summary  one clause for the list in docs/policies.md
    make     makes a planner, from the policy's name, a recipe's settings, and a function that makes a goodput planner
             with this machine's costs and the draft's calibration
    shape    the largest trees that the policy drafts and verifies, from a recipe's settings; None: no drafts
    """

    name: str
    summary: str
    make: MakePlanner
    shape: Callable[[Settings], EchoSettings] | None

    @property
    def shares_budget(self) -> bool:
        """Whether the batch may share K_max, which is ``settings["budget"]``: not so of the built-in ones but echo."""
        return self.name == "echo" or self.name not in BUILT_IN


POLICIES: dict[str, Policy] = {}
_LOADED: set[Path] = set()  # files of policies


def policy(
    name: str, summary: str, shape: Callable[[Settings], EchoSettings] | None = None
) -> Callable[[MakePlanner], MakePlanner]:
    """Register the decorated function as ``Policy.make``. Raises UserError."""
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise UserError(f"the policy's name is {shown(name)}; give lower-case letters, digits and hyphens.")
    if name in POLICIES:
        raise UserError(f"the policy's name is {name!r}, which another policy has; give another name.")

    def register(make: MakePlanner) -> MakePlanner:
        POLICIES[name] = Policy(name, summary, make, shape)
        return make

    return register


def load_policies(file: Path) -> None:
    """Run a Python file that registers policies, once per process. Raises UserError."""
    path = file.resolve()
    if path in _LOADED:
        return
    spec = importlib.util.spec_from_file_location(f"echo_trt_policy_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"--policy-file is {file}, which is no Python file; name one such as examples/chain_policy.py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in the file look their module up
    known = len(POLICIES)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file raises
        raise UserError(f"--policy-file is {file}, which fails ({described(error)}); fix it.") from error
    if len(POLICIES) == known:
        raise UserError(f"--policy-file is {file}, which registers no policy; decorate a function with @policy(...).")
    _LOADED.add(path)


def policy_named(name: str, option: str = "policy") -> Policy:
    """Return a registered policy. Raises UserError, which names ``option``."""
    if name not in POLICIES:
        raise UserError(
            f"{option} is {shown(name)}; choose one of {', '.join(POLICIES)}, or load another with --policy-file."
        )
    return POLICIES[name]


def make_planner(name: str, settings: Settings, make_goodput: MakeGoodput) -> Planner:
    """Make a policy's planner. Raises UserError for an unknown policy, for one that fails, and for trees that a bundle
    has no rows for.
    """
    chosen = policy_named(name)
    try:
        rows = chosen.shape(settings).rows_per_request if chosen.shape else 0
        planner = chosen.make(name, settings, make_goodput)
        if name not in BUILT_IN:
            _try_members(planner)
    except Exception as error:
        if isinstance(error, UserError) or name in BUILT_IN:
            raise
        file = getattr(sys.modules.get(chosen.make.__module__), "__file__", None) or "its file"
        raise UserError(f"policy is {name}, which fails ({described(error)}); fix {file}.") from error
    if rows and rows > (reserved := reserve_for(settings)):
        raise UserError(
            f"policy {name} needs {rows} KV rows per request beyond its tokens, but bundles keep {reserved}; make "
            "its trees smaller, or raise decoding.per_request in the recipe and build again."
        )
    return planner


def _try_members(planner: Planner) -> None:
    """Ask a new planner what the engine asks of it outside iterations: what raises there would end the engine."""
    if not isinstance(planner.name, str) or not callable(planner.plan):
        raise TypeError("a planner has a name and a function plan")
    if not isinstance(planner.budget, int | np.integer):
        raise TypeError(f"budget is {planner.budget!r}, which is no whole number")
    planner.level_shapes(1), planner.totals(), planner.gain()


def echo_settings(name: str, settings: Settings) -> EchoSettings:
    """Return the numbers of ``static`` or ``echo``."""
    if name == "static":
        tree = settings["static"]
        return EchoSettings(
            max_depth=tree["depth"], beams=tree["top_k"], width=tree["top_k"], per_request=tree["tokens"]
        )
    shared = {key: settings[key] for key in ("max_depth", "beams", "width", "budget", "per_request")}
    return EchoSettings(gates=dict(settings["gates"] or {}), **shared)


def goodput_settings(name: str, settings: Settings) -> GoodputSettings:
    """Return the numbers of a goodput policy."""
    shared = GoodputSettings(**{key: settings[key] for key in ("max_depth", "beams", "width", "per_request")})
    return shared.as_chain() if name == EXACT else shared


def _elastic(settings: Settings) -> EchoSettings:
    """Return the largest trees of the policies whose drafts have any number of levels."""
    return EchoSettings(**{key: settings[key] for key in ("max_depth", "beams", "width", "per_request")})


@policy(PLAIN, "plain decoding")
def _plain(name: str, settings: Settings, make_goodput: MakeGoodput) -> Planner:
    return PlainPlanner()


# The lowest is registered first.
@policy(
    "echo",
    "the paper: gates at a few depths, one token budget K_max for the batch",
    _elastic,
)
@policy("static", "EAGLE-3's tree: fixed depth, width and tokens for every request", partial(echo_settings, "static"))
def _paper(name: str, settings: Settings, make_goodput: MakeGoodput) -> Planner:
    return EchoPlanner(name, echo_settings(name, settings))


@policy(EXACT, "the same with chains alone", _elastic)
@policy(
    DEFAULT, "the default: over the whole batch, drafts a level and verifies a token if it is worth its time", _elastic
)
def _goodput(name: str, settings: Settings, make_goodput: MakeGoodput) -> Planner:
    return make_goodput(name, goodput_settings(name, settings))


BUILT_IN = tuple(POLICIES)


def reserve_for(settings: Settings) -> int:
    """Return the KV rows that a request can need beyond its committed tokens under any built-in policy and K_max."""
    shapes = (POLICIES[name].shape for name in BUILT_IN)
    return max(shape(settings).rows_per_request for shape in shapes if shape)
