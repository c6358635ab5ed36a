"""What a bundle's policies go by: the recipe's numbers where it gives them, else the calibration's, else usual ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from echo_trt.bundle import NGRAMS, Manifest
from echo_trt.calibration.measure import disturbance, measure, times_as_long, without_speculation
from echo_trt.calibration.store import CALIBRATION, COSTS, CostTable, read_calibration, read_costs, write
from echo_trt.decoding.acceptance import Acceptance
from echo_trt.decoding.goodput import Goodput
from echo_trt.decoding.ngrams import NGrams
from echo_trt.decoding.policies import Policy, make_policy
from echo_trt.errors import UserError
from echo_trt.runtime.loop import Loop
from echo_trt.runtime.ngram_table import read_ngrams

DOUBTED = 1.5  # times what a pass takes now: a table that says so was measured beside other work
MEASUREMENTS = 2  # of costs at a start, at most: more make a start on a busy machine longer, and a table likelier
USUAL_GATES = {1: 0.2, 3: 0.3}  # depth: threshold, where neither the recipe nor a calibration says any


class Tuning:
    """A bundle's calibration and this machine's costs, which are measured when something first asks for them.

    ``note`` is told, in a sentence, where something is missing or measured.
    """

    def __init__(self, folder: Path, manifest: Manifest, loop: Loop, note: Callable[[str], None]):
        self._folder, self._manifest, self._loop, self._note = folder, manifest, loop, note
        path = folder / CALIBRATION
        known = path.exists()
        self.calibration = read_calibration(path, manifest.target_sha256, manifest.draft_sha256) if known else None
        if self.calibration and loop.copier:
            loop.copier.set_acceptance(self.calibration.lookup)

    @cached_property
    def ngrams(self) -> NGrams | None:
        if self._manifest.recipe.draft.ngrams is None:
            return None
        return read_ngrams(self._folder / NGRAMS, self._manifest.target_sha256, self._manifest.target.vocab_size)

    @cached_property
    def costs(self) -> CostTable:
        """Nothing may be running when this is asked for the first time."""
        table, engine = read_costs(self._folder, self._manifest, self._note), self._loop.target
        if table and (table.granule, table.least) != (engine.granule, engine.least):
            table = None  # of a version that filled passes up otherwise
        if table and not self._loop.busy and (times := times_as_long(table, self._loop)) > DOUBTED:
            told = f"{COSTS} says that a pass takes {times:.1f} times as long as it does"
            self._note(f"{told}: other work ran when it was measured")
            table = None
        if table is None:
            if self._loop.busy:  # measuring writes over the KV pool
                raise UserError(
                    "what passes cost on this machine is not known yet; choose this policy while no request is running."
                )
            table = self._measure()
        return table

    def _measure(self) -> CostTable:
        """Measure costs and keep them in the bundle. Those that other work disturbed are not kept, nor gone by."""
        self._note("measuring what passes cost on this machine (some seconds, once; best while nothing else runs)")
        for _ in range(MEASUREMENTS):
            table = measure(self._loop, self._manifest)
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

    def policy(self, name: str | None, budget: int | None) -> Policy:
        """``name`` None: the recipe's. ``budget`` replaces K_max where one is shared."""
        decoding, calibration = self._manifest.recipe.decoding, self.calibration
        settings = decoding.model_dump()
        name = name or decoding.policy
        if settings["gates"] is None:
            settings["gates"] = calibration.sweet_spots if calibration else USUAL_GATES
            settings["dense_gates"] = {g.depth: g.threshold for g in calibration.gates} if calibration else None
        if settings["fixed_threshold"] is None:
            settings["fixed_threshold"] = calibration.fixed_threshold if calibration else max(USUAL_GATES.values())
        settings["budget"] = budget or settings["budget"] or 0
        policy = make_policy(name, settings)
        if policy.gates and decoding.gates is None and calibration is None:
            told = ", ".join(f"{threshold:g} at depth {depth}" for depth, threshold in USUAL_GATES.items())
            self._note(f"{self._folder} has no {CALIBRATION}: gates are the usual {told}; run echo-trt calibrate.")
        if policy.budget == 0:
            knee, granule = self.costs.hinge.k_max, self.costs.granule
            policy = replace(policy, budget=knee + -knee % granule)  # tokens up to there are verified all the same
        return policy

    def planner(self) -> Goodput:
        """A goodput policy that has learnt nothing yet."""
        if self.calibration is None and self._manifest.draft is not None:
            self._note(f"{self._folder} has no {CALIBRATION}: its draft is taken at its word; run echo-trt calibrate.")
        depths = self._manifest.recipe.decoding.max_depth
        acceptance = self.calibration.model() if self.calibration else Acceptance.uncalibrated(depths)
        return Goodput(self.costs.costs(), acceptance, self._loop.state.count, self.ngrams)
