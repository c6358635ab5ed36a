"""Planners for a bundle: the recipe's numbers where it gives them, else the calibration's, else usual ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from echo_trt.bundle.costs import COSTS, CostTable, read_costs
from echo_trt.bundle.manifest import NGRAMS
from echo_trt.bundle.ngrams import read_ngrams
from echo_trt.bundle.stored import CALIBRATION, write
from echo_trt.engine.assemble import Networks
from echo_trt.engine.drafters.grammars import GrammarProposer
from echo_trt.engine.measure import disturbance, machine, measure, times_as_long, without_speculation
from echo_trt.errors import UserError
from echo_trt.speculation.arrays import next_size
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.model.ngrams import NGrams
from echo_trt.speculation.goodput.planner import GoodputPlanner
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt.speculation.planner import Planner
from echo_trt.speculation.policies import make_planner, policy_named
from echo_trt.speculation.policy_names import EXACT

DOUBTED = 1.5  # times what a pass takes now: a table that says so was measured beside other work
MEASUREMENTS = 2  # of costs at a start, at most: more make a start on a busy machine longer, and a table likelier
USUAL_GATES = {1: 0.2, 3: 0.3}  # depth: threshold, where neither the recipe nor a calibration says any


class Tuning:
    """Makes planners; measures this machine's costs when one first needs them.

    ``note`` gets a sentence where something is missing or measured.
    """

    def __init__(self, folder: Path, networks: Networks, note: Callable[[str], None]):
        self._folder, self._manifest, self._networks = folder, networks.manifest, networks
        self._report, self._reported = note, set[str]()

    def _note(self, sentence: str) -> None:
        """Tell the user once: ``bench`` makes many planners."""
        if sentence not in self._reported:
            self._reported.add(sentence)
            self._report(sentence)

    @cached_property
    def ngrams(self) -> NGrams | None:
        if self._manifest.recipe.draft.ngrams is None:
            return None
        return read_ngrams(self._folder / NGRAMS, self._manifest.target_sha256, self._manifest.target.vocab_size)

    @cached_property
    def costs(self) -> CostTable:
        """Nothing may be running when this is asked for the first time."""
        networks, busy = self._networks, bool(self._networks.batch.active.any())
        table, engine = read_costs(self._folder, self._manifest, machine(self._manifest), self._note), networks.target
        if table and table.sizes != engine.sizes:
            table = None  # of a version that padded passes otherwise
        if table and not busy and (times := times_as_long(table, networks)) > DOUBTED:
            reported = f"{COSTS} says that a pass takes {times:.1f} times as long as it does"
            self._note(f"{reported}: other work ran when it was measured")
            table = None
        if table is None:
            if busy:  # measuring writes over the KV pool
                raise UserError(
                    "what passes cost on this machine is not known yet; choose this policy while no request is running."
                )
            table = self._measure()
        return table

    def _measure(self) -> CostTable:
        """Measure costs and keep them in the bundle. Those that other work disturbed are not kept, nor gone by."""
        self._note("measuring what passes cost on this machine (some seconds, once; best while nothing else runs)")
        for _ in range(MEASUREMENTS):
            table = measure(self._networks)
            disturbed = disturbance(table)
            if not disturbed:
                with contextlib.suppress(OSError):  # a bundle that cannot be written is measured at each start
                    write(self._folder, COSTS, table)
                return table
        self._note(
            f"other work disturbed that ({disturbed}), so no draft is taken to be worth its time; start again while "
            "nothing else runs."
        )
        return without_speculation(table)

    def planner(self, name: str | None, budget: int | None = None, networks: Networks | None = None) -> Planner:
        """Make a planner that has learnt nothing yet.

        name      a policy; None: the recipe's
        budget    replaces K_max where one is shared
        networks  a part of the bundle's (``Networks.over``) for which it is to plan; None: all of them
        """
        decoding, calibration = self._manifest.recipe.decoding, self._networks.calibration
        name, settings = name or decoding.policy, decoding.model_dump()
        if name == EXACT and self._networks.target.rounds_trees and not self._networks.target.paged:
            raise UserError(
                f"policy is {EXACT}, but a target with delta-net layers has plain decoding's bits in fp32 alone; "
                "choose goodput, or build with --precision fp32."
            )
        if settings["gates"] is None:
            settings["gates"] = calibration.sparse_gates if calibration else USUAL_GATES
        settings |= {"budget": budget or settings["budget"], "calibration": calibration}
        if policy_named(name).shares_budget:
            if decoding.gates is None and calibration is None:
                reported = ", ".join(f"{threshold:g} at depth {depth}" for depth, threshold in USUAL_GATES.items())
                self._note(
                    f"{self._folder} has no {CALIBRATION}: gates are the usual {reported}; run echo-trt calibrate."
                )
            settings["budget"] = settings["budget"] or self._k_max
        part = networks or self._networks
        planner = make_planner(name, settings, lambda name, numbers: self._goodput(name, numbers, part))
        part.prepare(planner)
        return planner

    @property
    def _k_max(self) -> int:
        """The knee of the measured costs, raised to the size that passes are padded to anyway."""
        return next_size(self.costs.sizes, self.costs.hinge.k_max)

    def _goodput(self, name: str, settings: GoodputSettings, networks: Networks) -> GoodputPlanner:
        calibration = networks.calibration
        if calibration is None and self._manifest.draft is not None:
            self._note(
                f"{self._folder} has no {CALIBRATION}: goodput learns its draft's acceptance while it answers; "
                "echo-trt calibrate measures it beforehand."
            )
        depths = self._manifest.recipe.decoding.max_depth
        return GoodputPlanner(
            name,
            settings,
            self.costs.costs(),
            calibration.model() if calibration else Acceptance.uncalibrated(depths),
            networks.batch.count,
            self.ngrams,
            networks.copier,
            GrammarProposer(networks.batch, networks.copier),
            head=networks.drafter is not networks.copier,
            budget=self._k_max,
            block=networks.drafter.block if networks.drafter else 0,
            chain_alone=networks.target.rounds_trees,
        )
