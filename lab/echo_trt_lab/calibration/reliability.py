"""Compares predicted with measured acceptance, on requests that were not fitted on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt_lab.calibration.fit import acceptance_table, lookup_acceptance
from echo_trt_lab.calibration.observe import Observed, observe
from echo_trt_lab.calibration.trees import Trees

BINS = 10  # of predicted probability; larger: a finer curve of noisier points
WORTH = 0.05  # least prediction that counts; larger: fewer nodes, nearer to the few that are verified


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram on trees that were not fitted on.

    predicted  float64 [bins], mean predicted P(accept) of a bin
    accepted   float64 [bins], share of the bin's nodes that were accepted
    error      expected calibration error: the distance of the two, averaged over nodes
    """

    predicted: np.ndarray
    accepted: np.ndarray
    error: float


def reliability(trees: Trees, shape: EchoSettings) -> tuple[Reliability, Reliability]:
    """Compare path probability and acceptance, and the calibrated one, fitted on the other half of the requests."""
    lookup = lookup_acceptance(trees)
    observed = observe(trees, lookup, shape.max_depth, shape.beams, shape.width)
    odd = trees.request[observed.tree] % 2 == 1
    table = acceptance_table(_part(observed, ~odd), shape.max_depth)
    check = _part(observed, odd)
    fitted = Acceptance(table, np.zeros((shape.max_depth, 1, 1))).probability(check.source, check.depth, check.score)
    return _diagram(np.exp(check.score), check.accepted), _diagram(fitted, check.accepted)


def _part(observed: Observed, chosen: np.ndarray) -> Observed:
    return Observed(*(getattr(observed, name)[chosen] for name in Observed.__dataclass_fields__))


def _diagram(predicted: np.ndarray, accepted: np.ndarray) -> Reliability:
    counted = predicted >= WORTH
    predicted, accepted = predicted[counted], accepted[counted]
    cell = np.minimum((predicted * BINS).astype(int), BINS - 1)
    count = np.bincount(cell, minlength=BINS)
    filled = count > 0
    mean = np.bincount(cell, predicted, BINS)[filled] / count[filled]
    share = np.bincount(cell, accepted, BINS)[filled] / count[filled]
    return Reliability(mean, share, float((abs(mean - share) * count[filled]).sum() / max(count.sum(), 1)))
