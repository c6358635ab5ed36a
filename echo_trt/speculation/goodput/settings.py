"""The numbers of the goodput policies."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from echo_trt.speculation.pack import WEIGHT_ROWS


@dataclass(frozen=True, kw_only=True)
class GoodputTuning:
    """Every tuned value that steers the policy. A policy file or a sweep may set them; texts do not depend on them.

    The ladder's trials of another verification size (``ladder``):
    trial_iterations     iterations of a trial; larger: trials tell more, and lose more where they lose
    window_iterations    iterations of the incumbent beside a trial, at most; larger: less noise, later comparisons
    trial_cost           share of the time that trials may lose; larger: follows changes sooner
    margin               log gain by which a challenger must be ahead to take over; larger: changes size less often
    comparison_weight    weight of the newest comparison, at least; larger: follows changed texts sooner, and noise too
    forecast_requests    a forecast counts as much as a comparison of so many requests; larger: trusts it for longer
    forecast_error       error of forecast log gains; larger: repeats trials sooner
    warm_up              iterations after a change of size that do not count; larger: trials take longer

    The model, and what is learnt of it (``learner``):
    horizon              levels forecast before a level is drafted; larger: drafts levels that pay with the next ones
    levels_per_doubling  draft levels forecast for a doubling of a request's tokens; larger: dearer large sizes
    cost_weight          weight of the newest pass in a cost curve; larger: follows the machine sooner, and noise too
    shared_cost          share of a pass's error that is the machine's speed; larger: blames one size less
    fit_window           verified nodes that a fit of P(accept) knows; larger: steadier, later where texts change
    memory               share of the past in running means over iterations; larger: steadier, and later
    exploration          share of the time for drafts that find out whether drafting pays again; larger: sooner

    The optimiser (``optimiser``):
    size_ratio           smallest ratio of two verification sizes; larger: fewer sizes to try, and worse ones
    catch_up_iterations  iterations at most that a long catch-up serves; larger: drafts sooner for long prompts
    fairness             power of a request's lag in the weight of its nodes; larger: those behind get more nodes
    prompts_share        passes of the decoding requests alone that a pass with prompts may take before it asks no
                         network for drafts, which would hold the prompts up; larger: drafts beside longer chunks
    min_continuation     least P(accept) of an n-gram continuation; larger: shorter continuations

    Latency targets (``model.iteration``):
    lag_price            price of a token for each token that its request is behind; larger: targets are kept closer
    lead                 tokens by which requests are to be ahead of their targets; larger: fewer are missed
    carried_price        share of the usual price that a request begins with; larger: fewer misses, slower to forget
    max_price            highest price; larger: a target that cannot be kept costs other requests more
    max_sat_out          passes in a row that a request without a target may sit out; larger: longer waits for a token
    prompt_worth         worth of a prompt token in time, over what it takes; larger: larger chunks beside late requests
    """

    trial_iterations: int = 12
    window_iterations: int = 64
    trial_cost: float = 0.01
    margin: float = 0.02
    comparison_weight: float = 0.25
    forecast_requests: float = 2.0
    forecast_error: float = 0.1
    warm_up: int = 2
    horizon: int = 2
    levels_per_doubling: float = 1.6
    cost_weight: float = 0.1
    shared_cost: float = 0.5
    fit_window: int = 1024
    memory: float = 0.97
    exploration: float = 0.005
    size_ratio: float = 1.25
    catch_up_iterations: int = 32
    fairness: float = 0.25
    prompts_share: float = 2.0
    min_continuation: float = 0.015
    lag_price: float = 1.0
    lead: float = 4.0
    carried_price: float = 0.75
    max_price: float = 8.0
    max_sat_out: int = 3
    prompt_worth: float = 1.5


@dataclass(frozen=True, kw_only=True)
class GoodputSettings:
    """How far a search may go; within these bounds it weighs costs against acceptance.

    max_depth    draft levels below the root
    beams        nodes of a level and request that are expanded
    width        children scored under each expanded node
    per_request  K_i, the most tokens verified of one request
    one_path     whether a request's draft is a chain, however many sources propose tokens
    tuning       the tuned values
    """

    max_depth: int
    beams: int
    width: int
    per_request: int
    one_path: bool = False
    tuning: GoodputTuning = field(default_factory=GoodputTuning)

    def level_beams(self, requests: int) -> int:
        """Return how many nodes of a request a device expands per level: as many as take no longer than one does.

        Beyond that many rows it is a power of two, so that few graphs serve all batches.
        """
        if requests * self.beams <= WEIGHT_ROWS:
            return self.beams
        return 1 << (max(WEIGHT_ROWS // requests, 1).bit_length() - 1)

    def level_rows(self, requests: np.ndarray) -> np.ndarray:
        """Return the rows of a device's level for int64 [F] numbers of ``requests``: int64 [F]."""
        beams = [self.level_beams(count) for count in requests.tolist()]
        rows: np.ndarray = requests * np.array(beams)
        return rows

    def as_chain(self) -> GoodputSettings:
        """Return the same numbers for drafts that are chains."""
        return replace(self, beams=1, width=1, one_path=True)
