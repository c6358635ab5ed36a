"""Simulate every row of docs/paper.md from recordings, and write the page's tables and pictures, and docs/paper.json.

    python scripts/benchmarks/paper.py mt_bench.npz humaneval.npz alpaca.npz --calibration BUNDLE/calibration.json
    python scripts/benchmarks/paper.py mt_bench.npz ... --quick --docs FOLDER     # a minute; not to be published
    python scripts/benchmarks/paper.py --from docs/paper.json                     # render again

The recordings' trees are 8 levels deep, with 10 beams and 10 children a node. Loads and budgets are simulated with the
first recording, a row per set with each. Sets of docs/paper.json whose recording is not given keep their rows, and the
page names the commit that these are of. Finished rows are kept in ``--rows``, so a run that was ended goes on there.
``--machines this --costs costs.json`` takes a machine on which costs were measured.
"""

from __future__ import annotations

import json
import re
import subprocess
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from echo_trt.engine.options import run_alone
from echo_trt.speculation.policies import load_policies
from echo_trt_lab.bootstrap import Parts, interval, rate
from echo_trt_lab.calibration.trees import Trees
from echo_trt_lab.device_counts import ABLATIONS
from echo_trt_lab.options import WORDS
from echo_trt_lab.pictures.paper import pictures
from echo_trt_lab.simulation.command import read_calibration, settings_for, simulate
from echo_trt_lab.simulation.machines import Machine, machine_named
from echo_trt_lab.simulation.options import SimulateOptions
from echo_trt_lab.simulation.walk import Recording

ROOT = Path(__file__).parents[2]
PLAIN, ECHO = "autoregressive", "echo"
LOADS, FULL = (1, 4, 16, 64, 256), 256
BUDGETS = (384, 512, 768, 1024, 1280)  # beside our fit; what is not above the requests is plain decoding
PROMPT = 256  # cached tokens before an answer: 256 requests of 384 tokens fit both machines
#: The paper's two regimes: depth, top-k and tokens of EAGLE-3's tree; ECHO has as many levels, and what K_max allows.
REGIMES = {"low": (8, 10, 60), "high": (3, 3, 5)}
LARGEST = {"low": 60, "high": 22}  # tokens of one request's tree under ECHO: all nodes of 3 levels
#: The gates that the paper publishes; None: the calibration's.
GATES = {"calibrated": None, "8B's": {1: 0.2, 2: 0.3, 4: 0.5}, "32B's": {1: 0.2, 4: 0.3}}
FIGURES = ("accepted_length", "verified_per_iteration", "draft_levels_per_iteration")
NAMES = {"h100-qwen3-8b": "Qwen3-8B, one H100", "8xh100-qwen3-235b": "Qwen3-235B, eight H100"}


@dataclass(frozen=True)
class Cell:
    """One row: a policy at one load. ``levels`` is a regime, ``budget`` K_max; 0 where the policy has none."""

    answers: str
    machine: str
    batch: int
    policy: str
    levels: str = ""
    gates: str = ""
    budget: int = 0


def cells(answers: list[str], machines: list[Machine], loads: tuple[int, ...], budgets: tuple[int, ...]) -> list[Cell]:
    """List the rows of all tables, each once."""
    found = dict[Cell, None]()
    for machine in machines:
        name, fit = machine.name, machine.k_max
        for batch in loads:
            at = answers[0], name, batch
            found |= dict.fromkeys(_baselines(at))
            found |= dict.fromkeys(Cell(*at, p, "low", "calibrated", k_of(fit)) for p in ("dense", "fixed", ECHO))
            found[Cell(*at, ECHO, "high", "calibrated", max(budgets))] = None
            found |= dict.fromkeys((Cell(*at, "goodput"), Cell(*at, "oracle")))
        at = answers[0], name, max(loads)
        for budget in budgets:
            found |= dict.fromkeys(Cell(*at, ECHO, "high", gates, budget) for gates in GATES)
            found |= dict.fromkeys(Cell(*at, p, "high", "calibrated", budget) for p in ("dense", "fixed"))
            found[Cell(*at, ECHO, "low", "calibrated", budget)] = None
        for each in answers:
            at = each, name, loads[0]
            found |= dict.fromkeys((*_baselines(at), Cell(*at, ECHO, "low", "calibrated", k_of(fit))))
            at = each, name, max(loads)
            found |= dict.fromkeys((Cell(*at, PLAIN), Cell(*at, "static", "high")))
            found |= dict.fromkeys(Cell(*at, p, "high", "calibrated", max(budgets)) for p in ("fixed", ECHO))
    return list(found)


def _baselines(at: tuple[str, str, int]) -> tuple[Cell, ...]:
    return Cell(*at, PLAIN), Cell(*at, "static", "low"), Cell(*at, "static", "high")


def k_of(fit: int) -> int:
    """Return K_max of the tables by load: our fit; where there is no saturation point the paper's 5 tokens x 256."""
    return fit if fit > 1 else max(BUDGETS)


def main(
    recordings: list[Path] | None = None,
    *,
    calibration: Path = ROOT / "bundles/smollm2-135m/calibration.json",
    machines: Annotated[tuple[str, ...], WORDS] = tuple(NAMES),
    costs: Path | None = None,
    seeds: int = 5,
    quick: bool = False,
    rows: Path = Path("paper-rows.jsonl"),
    docs: Path = ROOT / "docs",
    stored: Annotated[Path | None, Parameter("--from")] = None,
) -> None:
    """Simulate, and write the page in ``docs``; ``quick``: one seed, two loads, one budget."""
    if stored:
        write(json.loads(stored.read_text()), docs)
        return
    load_policies(ABLATIONS)  # dense and fixed
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    files = recordings or []
    answers = {file.stem: Trees.read(file) for file in files}
    known = [machine_named(name, costs) for name in machines]
    loads, budgets, seeds = ((1, 16), (64,), 1) if quick else (LOADS, BUDGETS, seeds)
    job = SimulateOptions(files[0], calibration=calibration, prompt=PROMPT, static=(1, 1, 2))
    fitted, done = read_calibration(calibration), _done(rows)
    wanted = cells(list(answers), known, loads, budgets)
    wanted.sort(key=lambda cell: list(answers).index(cell.answers))  # one recording at a time
    orders: tuple[str, list[Recording]] = "", []
    for number, cell in enumerate(wanted):
        if cell in done:
            continue
        if orders[0] != cell.answers:
            orders = cell.answers, [Recording(answers[cell.answers], seed) for seed in range(seeds)]
        machine = next(machine for machine in known if machine.name == cell.machine)
        tokens = 300 if quick else max(20 * cell.batch, 1500)
        asked = replace(job, tokens=tokens, machine=cell.machine)
        settings = settings_for(asked, orders[1][0], fitted, machine) | numbers(cell)
        run = reduce(add, (simulate(cell.policy, settings, o, fitted, machine, cell.batch, asked) for o in orders[1]))
        done[cell] = {key: run.figures()[key] for key in FIGURES}, run.by_answer
        with rows.open("a") as file:
            file.write(json.dumps([asdict(cell), *done[cell]]) + "\n")
        print(f"{number + 1}/{len(wanted)} {cell} {rate(done[cell][1]):,.0f}", flush=True)
    result = {
        "commit": commit.strip(),
        "seeds": seeds,
        "answers": {name: len(trees.group) for name, trees in answers.items()},
        "fits": {machine.name: machine.k_max for machine in known},
        "rows": list(compared({cell: done[cell] for cell in wanted})),
    }
    result = with_kept(result, docs / "paper.json")
    (docs / "paper.json").write_text(json.dumps(result, indent=1) + "\n")
    write(result, docs)


def with_kept(result: dict[str, Any], file: Path) -> dict[str, Any]:
    """Add the rows of the sets in ``file`` that ``result`` lacks, and under ``older`` the commits that they are of."""
    known = json.loads(file.read_text()) if file.exists() else {"answers": {}}
    kept = {name: count for name, count in known["answers"].items() if name not in result["answers"]}
    commits = {name: known.get("older", {}).get(name, known["commit"]) for name in kept}
    rows = [row for row in known.get("rows", ()) if row["answers"] in kept]
    added = {"answers": result["answers"] | kept, "older": commits, "rows": result["rows"] + rows}
    return result | added if kept else result


def numbers(cell: Cell) -> dict[str, Any]:
    """Return a row's numbers, in a recipe's words."""
    found: dict[str, Any] = {"budget": cell.budget or None}
    if not cell.levels:
        return found
    depth, top_k, tokens = REGIMES[cell.levels]
    found["static"] = {"depth": depth, "top_k": top_k, "tokens": tokens}
    if cell.policy != "static":
        found |= {"max_depth": depth, "beams": top_k, "width": top_k, "per_request": LARGEST[cell.levels]}
        if gates := GATES[cell.gates]:
            found |= {"gates": gates, "calibration": None}
    return found


def _done(file: Path) -> dict[Cell, tuple[dict[str, float], Parts]]:
    if not file.exists():
        return {}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {Cell(**c): (figures, {int(k): (v[0], v[1]) for k, v in parts.items()}) for c, figures, parts in rows}


def compared(done: dict[Cell, tuple[dict[str, float], Parts]]) -> Iterator[dict[str, Any]]:
    """Give each row its rate over that of plain decoding, of EAGLE-3's two trees and of ``echo``, with intervals."""
    for cell, (figures, parts) in done.items():
        others = {
            "plain": replace(cell, policy=PLAIN, levels="", gates="", budget=0),
            "low": replace(cell, policy="static", levels="low", gates="", budget=0),
            "high": replace(cell, policy="static", levels="high", gates="", budget=0),
            "echo": replace(cell, policy=ECHO),
        }
        over = {
            name: [round(x, 4) for x in (rate(parts) / rate(done[other][1]), *interval(parts, done[other][1]))]
            for name, other in others.items()
            if other in done
        }
        yield asdict(cell) | {"tokens_per_s": round(rate(parts), 1)} | figures | {"over": over}


def shown(row: dict[str, Any] | None, base: str = "plain") -> str:
    if row is None or base not in row["over"]:
        return "-"
    ratio, low, high = row["over"][base]
    return f"{ratio:.2f} ({low:.2f}-{high:.2f})"


Find = Callable[..., dict[str, Any] | None]


def verdict(ratios: list[list[float]], paper: float) -> str:
    """Compare ratios and their bounds with the paper's figure, which is a gain or a loss against 1."""
    same = [low > 1 if paper > 1 else high < 1 for _, low, high in ratios]
    reached = [high >= paper if paper > 1 else low <= paper for _, low, high in ratios]
    if not any(same):
        return "not reproduced"
    if all(same) and all(reached):
        beyond = all(ratio >= paper if paper > 1 else ratio <= paper for ratio, *_ in ratios)
        return "reproduced" if beyond else "reproduced within the interval"
    return "in part" if not all(same) else "in direction, smaller"


def claims(find: Find, fits: dict[str, int], loads: list[int], most: int) -> str:
    """Return the table of claims that are ratios of rates: the paper's figure, ours with its interval, a verdict."""
    busy = {"batch": max(loads), "levels": "high", "gates": "calibrated", "budget": most}
    idle = {"batch": min(loads), "levels": "low", "gates": "calibrated"}
    lines = []

    def add(claim: str, paper: float, base: str, policy: str, machines: Iterable[str], at: dict[str, Any]) -> None:
        rows = {name: find(machine=name, policy=policy, **({"budget": k_of(fits[name])} | at)) for name in machines}
        cells = [f"{NAMES.get(name, name)}: {shown(row, base)}" for name, row in rows.items()]
        ratios = [row["over"][base] for row in rows.values() if row and base in row["over"]]
        lines.append([claim, f"{paper:.2f}", "; ".join(cells), verdict(ratios, paper)])

    dense, mixture = [name for name, fit in fits.items() if fit > 1], [name for name, fit in fits.items() if fit == 1]
    requests = f"{max(loads)} requests"
    add("ECHO over plain decoding, one request (the paper's least)", 1.63, "plain", ECHO, fits, idle)
    add(f"ECHO over EAGLE-3, 8B, {requests}: 11,551 to 10,703 tokens/s", 1.08, "high", ECHO, dense, busy)
    fit = {"batch": max(loads), "levels": "low", "gates": "calibrated"}
    add("the same, K_max our fit", 1.08, "high", ECHO, dense, fit)
    lines[-1][-1] = "not the claim: at our fit ECHO decodes plainly, which the small tree is slower than"
    add(f"ECHO over EAGLE-3, 235B, {requests}: 3,207 to 2,803", 1.14, "high", ECHO, mixture, busy)
    add(f"dense gates over ECHO, 8B, {requests}: 10,978 to 11,551", 0.95, "echo", "dense", dense, busy)
    add(f"one threshold over ECHO, 235B, {requests}: 3,046 to 3,207", 0.95, "echo", "fixed", mixture, busy)
    add("over 20 % beyond the baselines: EAGLE-3 of 60 tokens, one request", 1.20, "low", ECHO, fits, idle)
    return table(["the paper", "its figure", f"here (K_max {most:,} under load)", "verdict"], lines)


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Return the page's blocks by name."""
    rows = result["rows"]
    first, *_ = result["answers"]
    loads = sorted({row["batch"] for row in rows if row["answers"] == first})
    budgets = sorted({row["budget"] for row in rows if row["levels"] == "high" and row["budget"]})
    largest = max(loads)

    def find(**given: Any) -> dict[str, Any] | None:
        wanted = {"answers": first, "levels": "", "gates": "", "budget": 0} | given
        return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)

    blocks = {"claims": claims(find, result["fits"], loads, max(budgets))}
    for machine, fit in result["fits"].items():
        at, top, used = {"machine": machine}, max(budgets), k_of(fit)
        gated = {"levels": "low", "gates": "calibrated", "budget": used}
        columns = {
            "static 8/10/60": {"policy": "static", "levels": "low"},
            "static 3/3/5": {"policy": "static", "levels": "high"},
            f"echo, K {used:,}": {"policy": ECHO, **gated},
            f"echo 3/3, K {top:,}": {"policy": ECHO, "levels": "high", "gates": "calibrated", "budget": top},
            "goodput": {"policy": "goodput"},
            "bound": {"policy": "oracle"},
        }
        lines = []
        for batch in loads:
            plain = find(**at, batch=batch, policy=PLAIN)
            if plain:
                cells = [shown(find(**at, batch=batch, **given)) for given in columns.values()]
                lines.append([str(batch), f"{plain['tokens_per_s']:,.0f}", *cells])
        blocks[f"load {machine}"] = table(["requests", "plain, tokens/s", *columns], lines)
        at["batch"] = largest
        kinds = {policy: {"policy": policy, "gates": "calibrated"} for policy in (ECHO, "fixed", "dense")}
        sweep = [k for k in budgets if find(**at, policy=ECHO, levels="high", gates="calibrated", budget=k)]
        lines = [
            [f"{fit:,} (our fit): plain decoding" if fit <= largest else "", *["1.00"] * (len(kinds) + 1), "-", "-"]
        ]
        for budget in sweep:
            found = [find(**at, levels="high", budget=budget, **kind) for kind in kinds.values()]
            low = find(**at, levels="low", budget=budget, policy=ECHO, gates="calibrated")
            theirs = find(**at, levels="high", budget=budget, policy=ECHO, gates="8B's")
            over = (shown(row, "high") for row in (found[0], theirs))
            lines.append([f"{budget:,}", *map(shown, found), shown(low), *over])
        blocks[f"budget {machine}"] = table(
            ["K_max", *kinds, "echo, 8 levels", "echo over EAGLE-3 3/3/5", "8B's gates over it"], lines
        )
    lines = []
    for answers in result["answers"]:
        for machine, fit in result["fits"].items():
            at = {"answers": answers, "machine": machine}
            one = [find(**at, batch=loads[0], policy="static", levels="low")]
            one.append(find(**at, batch=loads[0], policy=ECHO, levels="low", gates="calibrated", budget=k_of(fit)))
            busy = find(**at, batch=largest, policy=ECHO, levels="high", gates="calibrated", budget=max(budgets))
            lengths = [f"{row['accepted_length']:.2f}" if row else "-" for row in one]
            cells = [shown(one[1]), shown(busy), shown(busy, "high")]
            lines.append([answers, NAMES.get(machine, machine), *lengths, *cells])
    heads = ["static 8/10/60, length", "echo, length", "echo, times plain"]
    busy = [f"echo 3/3 at {largest}", "over EAGLE-3 3/3/5"]
    blocks["sets"] = table(["set", "machine", *heads, *busy], lines)
    older = result.get("older", {})
    made = f"Commit {result['commit']}, {result['seeds']} seeds; " + ", ".join(
        f"{count} answers of {name}" + (f" (commit {older[name]})" if name in older else "")
        for name, count in result["answers"].items()
    )
    sentence = f"{made}. In brackets 95 % intervals, bootstrapped over the answers."
    return blocks | {"made": textwrap.fill(sentence, 120, break_on_hyphens=False)}


def table(head: list[str], lines: list[list[str]]) -> str:
    first, *others = ("| " + " | ".join(line) + " |" for line in (head, *lines))
    return "\n".join([first, "|---" * len(head) + "|", *others])


def write(result: dict[str, Any], docs: Path) -> None:
    """Write the marked blocks of paper.md and the pictures."""
    page = docs / "paper.md"
    text = page.read_text()
    for name, block in tables(result).items():
        mark = re.escape(name)
        pattern = rf"(<!-- paper.py: {mark} -->\n).*?(<!-- paper.py: end -->)"
        text = re.sub(pattern, lambda found, block=block: f"{found[1]}\n{block}\n\n{found[2]}", text, flags=re.DOTALL)
    page.write_text(text)
    for picture in pictures(result["rows"], result["fits"], NAMES):
        (docs / "img" / f"{picture.name}.svg").write_text(picture.file())


if __name__ == "__main__":
    run_alone(main)
