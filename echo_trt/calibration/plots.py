"""The calibration as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from echo_trt.bundle.calibration import Calibration
from echo_trt.bundle.costs import CostTable
from echo_trt.calibration.reliability import Reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(path: Path, calibration: Calibration, costs: CostTable, before: Reliability, after: Reliability) -> None:
    """Plot gates by depth, reliability before and after, and T(N) with its hinge; SVG or PNG by suffix."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    gates, reliability, cost = figure.subplots(1, 3)
    _gates(gates, calibration)
    _reliability(reliability, before, after)
    _costs(cost, costs)
    figure.savefig(path)


def _gates(axes: Axes, calibration: Calibration) -> None:
    depth = [g.depth for g in calibration.gates]
    colours = ["tab:blue" if g.sweet_spot else "lightsteelblue" for g in calibration.gates]
    axes.bar(depth, [g.auc for g in calibration.gates], color=colours, label="AUC (dark: sparse gates)")
    axes.plot(depth, [g.threshold for g in calibration.gates], "k.-", label="threshold")
    axes.plot(depth, [g.accepted for g in calibration.gates], "r.--", label="accepted so deep")
    axes.set(title="gates", xlabel="depth", ylim=(0, 1))
    axes.legend()


def _reliability(axes: Axes, before: Reliability, after: Reliability) -> None:
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes.plot(before.predicted, before.accepted, "o-", label=f"exp(S), error {before.error:.3f}")
    axes.plot(after.predicted, after.accepted, "s-", label=f"calibrated, error {after.error:.3f}")
    axes.set(title="reliability on held-out trees", xlabel="predicted P(accept)", ylabel="accepted")
    axes.legend()


def _costs(axes: Axes, costs: CostTable) -> None:
    sizes, hinge = np.array(costs.target.sizes), costs.hinge
    fitted = hinge.t_ar * (1 + hinge.gamma * np.maximum(sizes - hinge.k_max, 0))
    axes.plot(sizes, 1e3 * np.array(costs.target.seconds), "o-", label="target")
    axes.plot(sizes, 1e3 * fitted, "--", label=f"hinge, K_max {hinge.k_max}")
    axes.plot(costs.draft.sizes, 1e3 * np.array(costs.draft.seconds), "s-", label="draft")
    axes.set(title="a pass", xlabel="tokens", ylabel="ms", xscale="log", yscale="log")
    axes.legend()
