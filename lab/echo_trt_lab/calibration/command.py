"""``echo-trt calibrate``: measures costs, records draft trees, fits, and writes both files into the bundle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from echo_trt.bundle.calibration import Calibration
from echo_trt.bundle.costs import COSTS, CostTable
from echo_trt.bundle.manifest import read_manifest
from echo_trt.bundle.stored import CALIBRATION, write, write_whole
from echo_trt.cli.generate import check_lengths
from echo_trt.cli.outputs import files_first
from echo_trt.engine.llm import LLM
from echo_trt.engine.measure import disturbance, measure
from echo_trt.errors import UserError
from echo_trt.files.prompts import Prompt, read_prompts
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt_lab.calibration.fit import fit
from echo_trt_lab.calibration.options import CalibrateOptions
from echo_trt_lab.calibration.plots import report
from echo_trt_lab.calibration.record import record
from echo_trt_lab.calibration.reliability import reliability
from echo_trt_lab.calibration.trees import Trees

REPORT = "calibration.html"
FEWEST = 8  # prompts; larger: better estimates, and a longer file is asked for


Predict = Callable[[Trees, Calibration, Path], list[dict[str, Any]]]


def run(options: CalibrateOptions, out: Console, messages: Console, predict: Predict | None = None) -> None:
    """Calibrate a bundle.

    predict  trees, calibration and the file of costs -> rows of policies by load, which the report draws
    """
    prompts = chosen_prompts(options.prompts, options.limit)
    read_manifest(options.bundle)  # refuses a folder that is no bundle
    _check_apart(options)
    _check_writable(options.bundle)
    with files_first(out):
        _calibrate(options, prompts, out, messages, predict)


def _calibrate(
    options: CalibrateOptions, prompts: list[Prompt], out: Console, messages: Console, predict: Predict | None
) -> None:
    with messages.status("loading the bundle"):
        llm = LLM(options.bundle, "autoregressive", options.batch, prefix_cache=False)
        check_lengths(llm, prompts)
    with messages.status("measuring what passes cost on this machine"):
        costs = measure(llm.networks)
    if disturbed := disturbance(costs):
        raise UserError(
            f"other work disturbed what was measured ({disturbed}); run echo-trt calibrate again while nothing else "
            "runs."
        )
    write(options.bundle, COSTS, costs)
    out.print(costs_table(costs))
    if llm.manifest.draft is None:
        messages.print("the bundle's draft has no network, so there is no acceptance to calibrate")
        return
    decoding = llm.manifest.recipe.decoding
    sizes = decoding.model_dump(include={"max_depth", "beams", "width", "per_request"})
    shape = EchoSettings(**sizes)
    with Progress(console=messages, transient=True, disable=not messages.is_terminal) as progress:
        task = progress.add_task("recording draft trees", total=1.0)
        groups, show = ["all"] * len(prompts), lambda done: progress.update(task, completed=done)
        trees = record(llm, prompts, groups, options.max_tokens, shape, show)
    calibration = fit(
        trees, llm.manifest.target_sha256, llm.manifest.draft_sha256, shape.max_depth, shape.beams, shape.width
    )
    write(options.bundle, CALIBRATION, calibration)
    before, after = reliability(trees, shape)
    with messages.status("predicting what speculation brings by load"):
        predicted = predict(trees, calibration, options.bundle / COSTS) if predict else []
    write_whole(options.bundle / REPORT, report(llm.manifest.name, calibration, costs, before, after, predicted))
    out.print(gates_table(calibration))
    out.print(
        f"calibration error of P(accept) on the half that was not fitted on: {before.error:.3f} before, "
        f"{after.error:.3f} after; copied tokens are accepted at "
        f"{', '.join(f'{p:.0%}' for p in calibration.lookup)} after matches of 1, 2, ... tokens",
        highlight=False,
    )
    out.print(f"written to {options.bundle}: {CALIBRATION}, {COSTS}, {REPORT}", highlight=False)


def chosen_prompts(files: list[Path], limit: int) -> list[Prompt]:
    """Choose ``limit`` prompts, the files in turn while they last, from their beginnings; listed file by file.

    Ids may repeat between files.
    """
    rows = [read_prompts(file) for file in files]
    turns = sorted((turn, number) for number, part in enumerate(rows) for turn in range(len(part)))
    chosen = [rows[number][turn] for number, turn in sorted((n, t) for t, n in turns[:limit])]
    if len(chosen) < FEWEST:
        names = ", ".join(map(str, files))
        raise UserError(
            f"--prompts {names}: {len(chosen)} prompts with --limit {limit}; calibration needs {FEWEST} or more."
        )
    return chosen


def costs_table(costs: CostTable) -> Table:
    """Tabulate the target's and the draft's milliseconds by size, and the hinge."""
    hinge = costs.hinge
    table = Table("N", "target", "draft", title=f"a pass over N tokens, ms, on {costs.machine}", title_justify="left")
    drafts = dict(zip(costs.draft.sizes, costs.draft.seconds, strict=True))
    for size, seconds in zip(costs.target.sizes, costs.target.seconds, strict=True):
        table.add_row(str(size), f"{1e3 * seconds:.1f}", f"{1e3 * drafts[size]:.2f}" if size in drafts else "")
    table.caption = (
        f"target as a hinge: T_ar {1e3 * hinge.t_ar:.1f} ms, K_max {hinge.k_max}, gamma {hinge.gamma:.4f} "
        f"a token; largest error {hinge.error:.0%}"
    )
    return table


def gates_table(calibration: Calibration) -> Table:
    """Tabulate AUC, acceptance and threshold by depth, with the reason of a sparse gate."""
    table = Table(title=f"gates, from {calibration.positions:,} draft trees", title_justify="left")
    for column in ("depth", "AUC", "accepted", "threshold", "sparse gate"):
        table.add_column(column, justify="right" if column != "sparse gate" else "left")
    for gate in calibration.gates:
        why = ""
        if gate.sweet_spot:
            why = "the root's" if gate.depth == 1 else "confidence tells most there"
        table.add_row(str(gate.depth), f"{gate.auc:.3f}", f"{gate.accepted:.0%}", f"{gate.threshold:.3f}", why)
    table.caption = f"one threshold for all sparse gates (policy fixed): {calibration.fixed_threshold:.3f}"
    return table


def _check_apart(options: CalibrateOptions) -> None:
    written = {os.path.realpath(options.bundle / name) for name in (CALIBRATION, COSTS, REPORT)}
    for file in options.prompts:
        if os.path.realpath(file) in written:
            raise UserError(f"--prompts {file} is a file that calibrate writes; keep the prompts in another one.")


def _check_writable(bundle: Path) -> None:
    probe = bundle / ".writable"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"bundle {bundle} cannot be written ({error.strerror}); calibrate a copy that can, or name a bundle."
        ) from error
