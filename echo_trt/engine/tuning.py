"""Planners for a bundle: the recipe's numbers where it gives them, else the calibration's, else usual ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from pkgutil import resolve_name

from echo_trt.bundle.costs import COSTS, CostTable, read_costs
from echo_trt.bundle.stored import CALIBRATION, write
from echo_trt.engine.assemble import Networks
from echo_trt.engine.measure import disturbance, machine, measure, times_as_long, without_speculation
from echo_trt.engine.sources.grammars import GuidedSource
from echo_trt.errors import UserError
from echo_trt.speculation.arrays import next_size
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.planner import GoodputPlanner
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt.speculation.planner import ChainSource, Planner
from echo_trt.speculation.policies import make_planner, policy_named
from echo_trt.speculation.sources import DRAFT_SOURCES

DOUBTED = 1.5  # times what a pass takes now: a table that says so was measured beside other work
MEASUREMENTS = 2  # of costs at a start, at most: more make a start on a busy machine longer, and a table likelier
USUAL_GATES = {1: 0.2, 3: 0.3}  # depth: threshold, where neither the recipe nor a calibration says any


class Tuning:
    """Makes planners; measures this machine's costs when one first needs them.

    ``note`` gets a sentence where something is missing or measured. ``costs``: a file that keeps the costs, or its
    folder; None: the bundle's costs.json, which is read besides.
    """

    def __init__(self, folder: Path, networks: Networks, note: Callable[[str], None], costs: Path | None = None):
        self._folder, self._manifest, self._networks = folder, networks.manifest, networks
        self._kept = (costs / COSTS if costs.is_dir() else costs) if costs else folder / COSTS
        self._report, self._reported = note, set[str]()

    def _note(self, sentence: str) -> None:
        """Tell the user once: ``bench`` makes many planners."""
        if sentence not in self._reported:
            self._reported.add(sentence)
            self._report(sentence)

    @cached_property
    def costs(self) -> CostTable:
        """Nothing may be running when this is asked for the first time."""
        networks, busy = self._networks, bool(self._networks.batch.active.any())
        table = self._stored()
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

    def _stored(self) -> CostTable | None:
        """Return the costs that were kept of this machine, by a version that padded passes as this one does."""
        name = machine(self._manifest)
        for path in dict.fromkeys((self._kept, self._folder / COSTS)):
            table = read_costs(path, self._manifest, name, self._note)
            if table and table.sizes == self._networks.target.sizes:
                return table
        return None

    def _measure(self) -> CostTable:
        """Measure costs and keep them. Those that other work disturbed are not kept, nor gone by."""
        self._note("measuring what passes cost on this machine (some seconds, once; best while nothing else runs)")
        for _ in range(MEASUREMENTS):
            table = measure(self._networks)
            disturbed = disturbance(table)
            if not disturbed:
                try:
                    write(self._kept.parent, self._kept.name, table)
                except OSError as error:
                    self._note(
                        f"{self._kept} cannot be written ({error.strerror}): each start measures; give --costs FILE."
                    )
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
        acceptance = calibration.model() if calibration else Acceptance.uncalibrated(depths)
        return GoodputPlanner(
            name,
            settings,
            self.costs.costs(),
            acceptance,
            networks.batch.count,
            sources(networks, settings, acceptance),
            head=networks.drafter is not networks.copier,
            budget=self._k_max,
            block=networks.drafter.block if networks.drafter else 0,
            chain_alone=networks.target.rounds_trees,
        )


def sources(networks: Networks, settings: GoodputSettings, acceptance: Acceptance) -> list[ChainSource]:
    """Make what proposes tokens at no cost. Makers return None where a bundle leaves theirs out.

    acceptance  which a learner corrects in place
    """
    found: list[ChainSource] = []
    for row in (row for row in DRAFT_SOURCES if row.maker):
        source: ChainSource | None = resolve_name(row.maker)(networks, settings, acceptance)
        if source:
            found.append(source if row.forced else GuidedSource(source, networks.batch))
    return found
