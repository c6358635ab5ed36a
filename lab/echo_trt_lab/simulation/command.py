"""``echo-trt simulate``: replays recorded draft trees with every policy, at every batch, on any machine."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from echo_trt.bundle.calibration import Calibration
from echo_trt.bundle.ngrams import read_ngrams
from echo_trt.bundle.recipe import Decoding
from echo_trt.bundle.stored import read_stored
from echo_trt.cli.outputs import files_first, json_bytes, output_file
from echo_trt.engine.params import MAX_AT_ONCE
from echo_trt.engine.sources.ngrams import NGramSource
from echo_trt.errors import UserError
from echo_trt.speculation.echo.settings import EchoSettings
from echo_trt.speculation.goodput.model.ngrams import NGrams
from echo_trt.speculation.goodput.planner import GoodputPlanner
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt.speculation.planner import ChainSource, Planner
from echo_trt.speculation.policies import POLICIES, goodput_settings, make_planner, policy_named
from echo_trt.speculation.policy_names import DEFAULT, PLAIN
from echo_trt_lab.bootstrap import interval
from echo_trt_lab.calibration.trees import Trees
from echo_trt_lab.options import gates_of, tree_named
from echo_trt_lab.simulation.loads import run_loads
from echo_trt_lab.simulation.machines import Machine, machine_named
from echo_trt_lab.simulation.options import SimulateOptions
from echo_trt_lab.simulation.oracle import Oracle
from echo_trt_lab.simulation.replay import RecordedCopies, Replay, Tally
from echo_trt_lab.simulation.report import html_report, table
from echo_trt_lab.simulation.walk import Recording, Walk
from echo_trt_lab.tables import print_table

ORACLE = "oracle"
STATIC = (6, 4, 8)  # depth, top_k and tokens of the default pair's recipe
LARGEST = {"budget": 1_000_000, "prompt": 131_072, "tokens": 1_000_000, "block": 64}
# Tokens that a cell measures: SLOT_TOKENS for every slot, within FEWEST and MAX_TOKENS. Larger: less noise, a longer
# run.
SLOT_TOKENS, FEWEST, MAX_TOKENS = 400, 4000, 24_000


def run(job: SimulateOptions, out: Console, messages: Console) -> dict[str, Any]:
    _check(job)
    machine = machine_named(job.machine, job.costs)
    calibration = read_calibration(job.calibration)
    trees = Trees.read(job.recording)
    recordings = [Recording(trees, seed) for seed in range(job.seeds)]
    recording = recordings[0]
    ngrams = job.ngrams and _read_ngrams(job.ngrams, calibration)
    names = list(dict.fromkeys((PLAIN, *job.policies)))
    settings = settings_for(job, recording, calibration, machine)
    for name in names:
        shape = POLICIES[name].shape if name != ORACLE else None
        if shape:
            _check_shape(name, shape(settings), recording)
    result: dict[str, Any] = {
        "machine": machine.name,
        "recording": {"answers": len(recording.answers), "positions": len(recording.trees)},
        "budget": _budget(job, machine),
        "static": tree_named(settings["static"]),
        "assumptions": [*machine.assumptions, *_assumptions(job, recording, machine, ngrams)],
        "results": [],
    }
    if job.targets:

        def planner(name: str, traffic: Walk) -> Planner:
            return planner_for(name, settings, calibration, machine, traffic, ngrams, job.block or 0)

        return run_loads(job, planner, recording, machine, result, out)
    inputs = job.recording, job.calibration, job.costs, job.ngrams
    with (
        output_file("--json", job.json_file, inputs) as write_json,
        output_file("--html", job.html_file, inputs) as write_html,
        files_first(out),
    ):
        with Progress(console=messages, transient=True, disable=not messages.is_terminal) as progress:
            task = progress.add_task("simulating", total=len(job.batches) * len(names))
            plain = Tally(np.zeros(0))
            for batch in job.batches:
                for name in names:
                    runs = (simulate(name, settings, r, calibration, machine, batch, job, ngrams) for r in recordings)
                    tally = reduce(add, runs)
                    plain = tally if name == PLAIN else plain
                    row = {"policy": name, "batch": batch, "ratio": tally.rate / plain.rate}  # which may round to 0
                    row["ratio_interval"] = list(interval(tally.by_answer, plain.by_answer))
                    result["results"].append(row | tally.figures())
                    progress.advance(task)
        print_table(out, table(result))
        write_json(json_bytes(result))
        write_html(html_report(result))
    return result


def simulate(
    name: str,
    settings: Mapping[str, Any],
    recording: Recording,
    calibration: Calibration,
    machine: Machine,
    batch: int,
    job: SimulateOptions,
    ngrams: NGrams | None = None,
) -> Tally:
    """Simulate one policy at one batch."""
    tokens = job.tokens or min(max(SLOT_TOKENS * batch, FEWEST), max(MAX_TOKENS, 4 * batch))
    if name == ORACLE:  # which has goodput's candidates
        shape = goodput_settings(DEFAULT, settings)
        return Oracle(recording, machine, shape, batch, job.prompt, ngrams, job.block or 0).run(tokens)
    walk = Walk(recording, batch, job.prompt)
    planner = planner_for(name, settings, calibration, machine, walk, ngrams, job.block or 0)
    return Replay(walk, machine, planner, job.block or 0).run(tokens)


def planner_for(
    name: str,
    settings: Mapping[str, Any],
    calibration: Calibration,
    machine: Machine,
    walk: Walk,
    ngrams: NGrams | None = None,
    block: int = 0,
) -> Planner:
    """Make the planner that the runtime would have on this machine (runtime/tuning.py)."""

    def goodput(name: str, numbers: GoodputSettings) -> GoodputPlanner:
        acceptance = calibration.model()
        sources: list[ChainSource] = [RecordedCopies(walk, calibration.lookup, numbers.max_depth)]
        if ngrams:
            sources.append(NGramSource(ngrams, numbers, acceptance))
        return GoodputPlanner(name, numbers, machine.costs(), acceptance, walk.batch, sources, block=block)

    return make_planner(name, settings, goodput)


def settings_for(
    job: SimulateOptions, recording: Recording, calibration: Calibration, machine: Machine
) -> dict[str, Any]:
    """Return the policies' numbers, as a recipe's ``decoding`` section."""
    depth, top_k, nodes = job.static or (min(STATIC[0], recording.levels), min(STATIC[1], recording.beams), STATIC[2])
    return {
        "max_depth": recording.levels,
        "beams": recording.beams,
        "width": recording.width,
        "per_request": Decoding().per_request,
        "budget": _budget(job, machine),
        "gates": gates_of(job.gates) if job.gates else calibration.sparse_gates,
        "calibration": None if job.gates else calibration,
        "static": {"depth": depth, "top_k": top_k, "tokens": nodes},
    }


def read_calibration(path: Path) -> Calibration:
    """Read a complete calibration. Raises UserError."""
    remedy = "name a calibration.json that echo-trt calibrate wrote"
    stored = read_stored(path, Calibration, remedy)
    try:
        stored.model()
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is not complete ({error}); {remedy}.") from error
    return stored


def _read_ngrams(path: Path, calibration: Calibration) -> NGrams:
    remedy = "name the ngrams.npz of the bundle that was recorded, or leave --ngrams out"
    vocabulary = np.iinfo(np.int64).max  # a recording does not say
    return read_ngrams(path, calibration.target_sha256, vocabulary, remedy)


def _budget(job: SimulateOptions, machine: Machine) -> int:
    return job.budget or machine.k_max


def _assumptions(job: SimulateOptions, recording: Recording, machine: Machine, ngrams: NGrams | None) -> list[str]:
    facts = [
        f"{1e3 * machine.host_seconds:g} ms an iteration outside passes, for every policy, and "
        f"{1e3 * machine.level_seconds:g} ms a draft level; {'every policy' if machine.node_seconds else 'goodput'} "
        f"{1e6 * machine.candidate_seconds:g} us more for each node that it considers",
        f"prompts are computed before the clock starts, and leave {job.prompt} cached tokens per request",
        "acceptance is as recorded: this target, this draft and these texts, whatever the machine",
        "goodput and the oracle are without n-grams"
        if ngrams is None
        else f"{len(ngrams):,} n-grams go on where drafts of goodput and the oracle end; they see nothing of prompts",
    ]
    if job.block:
        facts.append(f"the draft writes its tree in one pass of {job.block} rows per request, each at a token's cost")
    answers = len(recording.answers)
    if max(job.batches) > answers:
        facts.append(f"above batch {answers} several requests walk one recorded answer, from different places")
    free_tokens = machine.capacity and machine.capacity // (job.prompt + recording.longest)
    if free_tokens and free_tokens < max(job.batches):
        facts.append(f"above batch {free_tokens} the KV cache would not fit the machine's memory")
    return facts


def _check(job: SimulateOptions) -> None:
    if not job.policies:
        raise UserError(
            f"--policies is empty; name one or more of {', '.join((*POLICIES, ORACLE))}, separated by commas."
        )
    for name in job.policies:
        if name != ORACLE:
            policy_named(name, "--policies")
    if not job.batches:
        raise UserError("--batch is empty; give one or more positive whole numbers.")
    for batch in job.batches:
        if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= MAX_AT_ONCE:
            raise UserError(f"--batch has {batch!r}; give positive whole numbers up to {MAX_AT_ONCE}, such as 1,8,64.")
    for option, maximum in LARGEST.items():
        value = getattr(job, option)
        if value is not None and not 1 <= value <= maximum:
            raise UserError(f"--{option} is {value}; give a whole number from 1 to {maximum}.")
    if job.gates:
        gates_of(job.gates)
    if job.static and (len(job.static) != 3 or min(job.static) < 1 or job.static[2] < 2):
        given = ",".join(map(str, job.static))
        raise UserError(f"--static is {given}; give depth, top_k (1 or more) and tokens (2 or more), such as 6,4,8.")


def _check_shape(name: str, settings: EchoSettings, recording: Recording) -> None:
    """Refuse a policy whose trees are larger than the recorded ones: the draft's further proposals are unknown."""
    for setting, wanted, recorded in (
        ("max_depth", settings.max_depth, recording.levels),
        ("beams", settings.beams if settings.max_depth > 1 else 1, recording.beams),
        ("width", settings.width, recording.width),
    ):
        if wanted > recorded:
            raise UserError(
                f"policy {name} has {setting} {wanted}, but the recording's trees have {recorded}; "
                "lower it, or record larger trees."
            )
