"""The calibration as plots, and as a report of them with their figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from echo_trt.bundle.calibration import Calibration
from echo_trt.bundle.costs import CostTable
from echo_trt_lab.calibration.gates import worth
from echo_trt_lab.calibration.reliability import Reliability
from echo_trt_lab.pictures.by_load import speedup
from echo_trt_lab.pictures.page import Figures, Report
from echo_trt_lab.pictures.palette import AMBER, BLUE, GREEN, GREY, PURPLE
from echo_trt_lab.pictures.style import Picture, doubling_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PREDICTED = (
    "Tokens per second, as a multiple of plain decoding's, simulated from these costs and from the draft trees that "
    "the calibration was fitted to, without n-grams. echo-trt bench measures it."
)


def report(
    name: str,
    calibration: Calibration,
    costs: CostTable,
    before: Reliability,
    after: Reliability,
    predicted: Sequence[dict[str, Any]] = (),
) -> bytes:
    """Write the calibration of the bundle ``name`` as one HTML file.

    predicted  rows of ``policy``, ``batch`` and ``ratio``, as simulated; none: no plot of them
    """
    facts = {
        "machine": costs.machine,
        "draft trees": f"{calibration.positions:,}",
        "copied tokens accepted": ", ".join(f"{p:.0%}" for p in calibration.lookup)
        + " after matches of 1, 2, ... tokens",
    }
    lead = ["How far this draft can be trusted, and what passes cost on this machine: policies decide by these two."]
    top = [replace(speedup(predicted), title="Speedup to expect, by load", sentence=PREDICTED)] if predicted else []
    pictures = [*top, gates(calibration), reliability(before, after), passes(costs)]
    return Report(f"{name}: calibration", lead, pictures, [_gate_figures(calibration), _costs(costs)], facts).html()


def gates(calibration: Calibration) -> Picture:
    every = calibration.gates
    value = {gate.depth: worth(gate.auc, gate.accepted) for gate in every}
    best = max((gate.depth for gate in every if gate.sweet_spot and gate.depth > 1), key=value.__getitem__, default=0)

    def draw(axes: Axes) -> None:
        for chosen, label, strength in ((True, "worth of a gate: taken", 0.9), (False, "not taken", 0.3)):
            some = [gate.depth for gate in every if gate.sweet_spot == chosen]
            axes.bar(some, [value[depth] for depth in some], color=BLUE, alpha=strength, label=label)
        for gate in every:
            if gate.sweet_spot:
                why = (
                    "first:\nalways"
                    if gate.depth == 1
                    else "worth\nmost"
                    if gate.depth == best
                    else "next, 2 or\nmore off"
                )
                axes.text(gate.depth, 0.02, why, ha="center", color="white", fontsize=10.5)
        depth = [gate.depth for gate in every]
        axes.plot(depth, [gate.auc for gate in every], "o-", color=AMBER, label="confidence is right (AUC)")
        axes.plot(depth, [gate.accepted for gate in every], "s--", color=GREEN, label="drafts accepted so deep")
        axes.set_xticks(depth, [str(number) for number in depth])
        axes.set(xlabel="depth in the draft, tokens", ylim=(0, 1))

    return Picture(
        "gates",
        "Where a gate is worth most",
        "A gate is worth most where confidence tells accepted drafts from others (AUC: 0.5 is a coin, 1 is certain) "
        "and where there are both: few drafts live to the last depths, so a gate there has little left to end. ECHO "
        "has gates at the dark bars, two or more depths from one another, the first at depth 1.",
        draw,
        wide=True,
    )


def reliability(before: Reliability, after: Reliability) -> Picture:
    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1.2, linestyle=(0, (4, 3)), label="ideal")
        for curve, label, colour, mark in (
            (before, "the draft's own", AMBER, "o-"),
            (after, "calibrated", BLUE, "s-"),
        ):
            label = f"{label} (error {curve.error:.3f})"
            axes.plot(curve.predicted, curve.accepted, mark, color=colour, label=label)
        axes.set(xlabel="predicted P(accept)", ylabel="accepted", xlim=(0, 1), ylim=(0, 1))

    return Picture(
        "reliability",
        "Are the probabilities true?",
        "Predicted against measured acceptance of draft tokens, on requests that were not fitted on. On the dashed "
        "line a prediction of 60 % is right six times in ten.",
        draw,
    )


def passes(costs: CostTable) -> Picture:
    sizes, hinge = np.array(costs.target.sizes), costs.hinge
    fitted = 1e3 * hinge.t_ar * (1 + hinge.gamma * np.maximum(sizes - hinge.k_max, 0))
    target, draft = (1e3 * np.array(curve.seconds) for curve in (costs.target, costs.draft))

    def draw(axes: Axes) -> None:
        axes.plot(sizes, target, "o-", color=BLUE, label="target")
        axes.plot(sizes, fitted, linestyle=(0, (4, 3)), color=PURPLE, label=f"hinge, K_max {hinge.k_max}")
        axes.plot(costs.draft.sizes, draft, "s-", color=AMBER, label="draft")
        doubling_axis(axes, "x", [*sizes, *costs.draft.sizes])
        doubling_axis(axes, "y", [*target, *draft])
        axes.set(xlabel="tokens in a pass", ylabel="ms")

    return Picture(
        "passes",
        "What a pass costs",
        "Milliseconds of one pass over so many tokens: verification is nearly free as long as the target's curve is "
        "flat. The hinge is the paper's model of it, with its knee at K_max.",
        draw,
    )


def _gate_figures(calibration: Calibration) -> Figures:
    rows = [
        [str(g.depth), f"{g.auc:.3f}", f"{g.accepted:.0%}", f"{g.threshold:.3f}", "yes" if g.sweet_spot else ""]
        for g in calibration.gates
    ]
    sentence = f"One threshold for all sparse gates (policy fixed) would be {calibration.fixed_threshold:.3f}."
    return Figures("Gates", sentence, ("depth", "AUC", "accepted", "threshold", "sparse gate"), rows)


def _costs(costs: CostTable) -> Figures:
    drafts = dict(zip(costs.draft.sizes, costs.draft.seconds, strict=True))
    rows = [
        [str(size), f"{1e3 * seconds:.1f}", f"{1e3 * drafts[size]:.2f}" if size in drafts else ""]
        for size, seconds in zip(costs.target.sizes, costs.target.seconds, strict=True)
    ]
    hinge = costs.hinge
    sentence = (
        f"The target as a hinge: {1e3 * hinge.t_ar:.1f} ms up to {hinge.k_max} tokens, then {hinge.gamma:.1%} more for "
        f"each token; largest error {hinge.error:.0%}."
    )
    return Figures("Passes", sentence, ("tokens", "target, ms", "draft, ms"), rows)
