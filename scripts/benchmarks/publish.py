"""Measure the published figures, and write docs/benchmarks.*, its plots and README's table from that one run.

    python scripts/benchmarks/publish.py bundles/smollm2-135m --prompts mt_bench.jsonl --prompts gsm8k.jsonl \
        --lossless bundles/smollm2-135m-fp32 --second bundles/coder
    python scripts/benchmarks/publish.py --from docs/benchmarks.json       # render again, measure nothing

The demo's prompts are always among those that are asked. Nothing else should run on the machine meanwhile. A bundle in
bf16 is measured in the precision that this machine computes, and the table names it. The texts of every policy are
compared with plain decoding's by ``lossless.py``, with the bundle in fp32 of ``--lossless``.
"""

from __future__ import annotations

import datetime
import json
import shlex
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import yaml
from cyclopts import Parameter

from echo_trt.engine.options import run_alone
from echo_trt.errors import UserError
from echo_trt.speculation.policies import BUILT_IN
from echo_trt.speculation.sources import DRAFT_SOURCES
from echo_trt_lab.pictures.by_load import drafted, iteration, speedup

ROOT = Path(__file__).parents[2]
EARLIER = Path(__file__).with_name("earlier.yaml")
IMAGES = Path("docs", "img")
DEMO = ROOT / "scripts" / "demo_prompts.jsonl"
BATCHES = "1,2,4,8,16"
#: Of a run that is published; a shorter one is called a trial. Policies take turns by seconds, so one round will do.
REQUESTS, ROUNDS, MAX_TOKENS = 32, 1, 64
PLAIN, DEFAULT, EXACT = "autoregressive", "goodput", "goodput-exact"
HEAD_ALONE = "goodput-head"
ABLATIONS = ROOT / "lab" / "echo_trt_lab" / "ablations.py"
POLICIES = (*BUILT_IN, "dense", "fixed", HEAD_ALONE)
#: Policy -> its name for readers, in the order of the tables.
NAMES = {
    PLAIN: "plain decoding",
    "static": "fixed tree of 8 tokens (`static`)",
    "echo": "ECHO (`echo`)",
    HEAD_ALONE: "default, draft head alone (`goodput-head`)",
    EXACT: "default, chains alone (`goodput-exact`)",
    DEFAULT: "default (`goodput`)",
}
SHOWN = (PLAIN, "static", DEFAULT)  # in README
#: Sources of accepted draft tokens (``speculation.sources``) -> their names for readers.
SOURCES = {
    "lookup": "prompt lookup",
    "ngram": "a table of the target's earlier answers",
    "head": "the draft head",
    "both": "head and prompt lookup alike",
}
SOURCES |= {source.name: source.label for source in DRAFT_SOURCES if source.name not in SOURCES}
LOSSLESS = {"greedy": [], "sampled": ["--temperature", "0.8", "--top-p", "0.95"]}
LOSSLESS_BATCHES, LOSSLESS_PROMPTS, LOSSLESS_TOKENS = "1,8", 4, 48  # prompts of each file
#: Family and model of a processor -> its name, which virtual machines shorten.
PROCESSORS = {
    "family 25, model 1": "EPYC 7003, no AVX-512",
    "family 25, model 17": "EPYC 9004, AVX-512",
    "family 26, model 2": "EPYC 9005, AVX-512",
    "family 6, model 207": "5th Xeon, AMX",
}
WIDTH = 100  # of README's lines
SECOND_POLICIES, SECOND_BATCHES, SECOND_REQUESTS = ("static", EXACT, DEFAULT), "1,4,8", 8  # of a second model
DATA = (
    "The four sets are the evaluation prompts of EAGLE's repository (SafeAILab/EAGLE, eagle/data, Apache-2.0): MT-bench"
    " and 80 each of GSM8K's tests, HumanEval and Alpaca. A row of a prompts file is a JSON object with `id` and "
    "`turns`; the benchmark asks the first turn."
)
BEGIN, END = "<!-- benchmarks: written by scripts/benchmarks/publish.py -->", "<!-- benchmarks: end -->"

Run = dict[str, Any]


def main(
    bundle: Annotated[Path | None, Parameter(help="The bundle to measure.")] = None,
    prompts: Annotated[list[Path] | None, Parameter(help="JSONL beside the demo's; may be given again.")] = None,
    requests: Annotated[int, Parameter(help="Requests a policy, batch and round, at least.")] = REQUESTS,
    rounds: Annotated[int, Parameter(help="Rounds, which are pooled.")] = ROUNDS,
    max_tokens: Annotated[int, Parameter(help="New tokens per request.")] = MAX_TOKENS,
    lossless: Annotated[Path | None, Parameter(help="The bundle in fp32 whose texts are compared.")] = None,
    second: Annotated[Path | None, Parameter(help="The bundle of another model, measured in fewer cells.")] = None,
    stored: Annotated[Path | None, Parameter("--from", help="Render this run again and measure nothing.")] = None,
) -> None:
    if (bundle is None) == (stored is None):
        raise UserError("give a bundle to measure, or --from with a stored run.")
    if stored:
        run = json.loads(stored.read_text())
    else:
        files = [DEMO, *(prompts or [])]
        run = measure(bundle, files, requests, rounds, max_tokens, lossless, second)
    write(run, ROOT)


def measure(
    bundle: Path,
    prompts: list[Path],
    requests: int,
    rounds: int,
    max_tokens: int,
    lossless: Path | None = None,
    second: Path | None = None,
) -> Run:
    """Run ``echo-trt bench``; its figures, with the commit, the date and the command in ``published``.

    With a bundle ``lossless`` its texts are compared, too: rows of ``lossless.py`` by mode, greedy or sampled. With a
    bundle ``second`` its run is in ``second``.
    """
    options = ["--rounds", str(rounds), "--max-tokens", str(max_tokens)]
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"

        def bench(measured: Path, policies: Iterable[str], batches: str, requests: int) -> Run:
            words = ["bench", str(measured), "--policies", ",".join(policies), "--batch", batches]
            words += ["--requests", str(requests)]
            words += ["--policy-file", str(ABLATIONS)]
            words += [word for file in prompts for word in ("--prompts", str(file))]
            subprocess.run([sys.executable, "-m", "echo_trt.cli.app", *words, *options, "--json", str(out)], check=True)
            found: Run = json.loads(out.read_text())
            return found

        run = bench(bundle, (policy for policy in NAMES if policy != PLAIN), BATCHES, requests)
        if second:
            run["second"] = bench(second, SECOND_POLICIES, SECOND_BATCHES, SECOND_REQUESTS)
        if lossless:
            run["lossless"] = {mode: _compared(lossless, prompts, more, out) for mode, more in LOSSLESS.items()}
    named = [word for file in prompts if file != DEMO for word in ("--prompts", file.name)]
    for option, other in (("--lossless", lossless), ("--second", second)):
        named += [option, f"bundles/{other.name}"] if other else []
    command = ["python", "scripts/benchmarks/publish.py", f"bundles/{bundle.name}", *named, "--requests", str(requests)]
    command += options
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    made = {"commit": git.stdout.strip(), "date": today, "command": shlex.join(command)}
    made["trial"] = requests < REQUESTS or rounds < ROUNDS or max_tokens < MAX_TOKENS
    return {"published": made, **run}


def _compared(bundle: Path, prompts: list[Path], more: list[str], out: Path) -> list[dict[str, Any]]:
    """Run ``lossless.py`` over all policies; its rows. It ends with an error where a text differs."""
    words = [str(Path(__file__).with_name("lossless.py")), str(bundle), "--batch", LOSSLESS_BATCHES]
    words += ["--policies", ",".join(name for name in POLICIES if name != PLAIN), "--max-tokens", str(LOSSLESS_TOKENS)]
    words += ["--limit", str(LOSSLESS_PROMPTS), "--out", str(out)]
    words += [word for file in prompts for word in ("--prompts", str(file))]
    subprocess.run([sys.executable, *words, *more], check=False)
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


def write(run: Run, root: Path) -> None:
    """Write everything that is published of one run."""
    readme = root / "README.md"
    readme.write_text(with_block(readme.read_text(), block(run)))
    (root / "docs" / "benchmarks.md").write_text(page(run, yaml.safe_load(EARLIER.read_text())))
    for name, plot in plots(run).items():
        (root / IMAGES / name).write_text(plot)
    (root / "docs" / "benchmarks.json").write_text(json.dumps(run, indent=1) + "\n")


def with_block(text: str, inner: str) -> str:
    """``text`` with what stands between the two markers replaced."""
    before, _, rest = text.partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise SystemExit(f"error: README.md lacks the lines {BEGIN} and {END}; put them back.")
    return f"{before}{BEGIN}\n{inner}\n{marker}{after}"


def block(run: Run) -> str:
    """README's part: speed by concurrent requests."""
    batches = sorted({row["batch"] for row in run["results"]})
    rows = [[NAMES[p], *(_speed(_row(run, p, batch)) for batch in batches)] for p in SHOWN]
    second = run.get("second")
    if second:
        measured = {row["batch"] for row in second["results"]}
        speeds = {p: [_speed(_row(second, p, b)) if b in measured else "-" for b in batches] for p in SHOWN[::2]}
        rows += [[f"{second['bundle']}: {NAMES[p]}", *shown] for p, shown in speeds.items()]
    return "\n".join(
        [
            _prose(
                f"Decode tokens/s by concurrent requests; brackets hold the speedup over plain decoding. The model is "
                f"{run['bundle']} unless a row names another. [Prompts and commit](docs/benchmarks.md).{_trial(run)}",
                WIDTH,
            ),
            "",
            _table([_machine(run), *map(str, batches)], rows),
        ]
    )


def _equal_rows(run: Run) -> list[list[str]]:
    precision = run["precision"]
    rows = [
        [f"fp32, {len(POLICIES) - 1} policies, {mode}, 1 and 8 requests", "token for token", _lossless(run, mode)]
        for mode in LOSSLESS
    ]
    if precision == "fp32":
        return rows
    # What the engine cpu computes of a row does not depend on the others (docs/exactness.md).
    crowd = "bit for bit" if f"cpu {precision}" in run["machine"] else "may diverge at near-ties"
    more = [
        [f"{precision}, `{EXACT}`", "bit for bit", _equal(run, EXACT)],
        [f"{precision}, `{DEFAULT}`, 1 request", "bit for bit", _equal(run, DEFAULT, lambda batch: batch == 1)],
        [f"{precision}, `{DEFAULT}`, more requests", crowd, _equal(run, DEFAULT, lambda b: b > 1)],
    ]
    return rows + more


def _lossless(run: Run, mode: str) -> str:
    rows = run.get("lossless", {}).get(mode, [])
    if not rows:
        return "not in this run"
    equal, texts = (sum(row[name] for row in rows) for name in ("identical", "requests"))
    return f"{equal:,} of {texts:,} ({rows[0]['requests']} distinct prompts)"


def _proposers(run: Run) -> str:
    """Tell the sources of the default's accepted draft tokens, by concurrent requests."""
    rows = [row for row in run["results"] if row["set"] == "all" and row["policy"] == DEFAULT]
    totals = [sum(row["accepted_by_source"].values()) for row in rows]
    shares = {
        name: [row["accepted_by_source"].get(source, 0) / (total or 1) for row, total in zip(rows, totals, strict=True)]
        for source, name in SOURCES.items()
    }
    shown = [[name, *(f"{share:.0%}" for share in row)] for name, row in shares.items() if max(row) >= 0.005]
    return _table(["requests", *(str(row["batch"]) for row in rows)], shown) if shown else "Nothing was drafted."


def _several_sources(run: Run) -> bool:
    rows = [row for row in run["results"] if row["policy"] == DEFAULT]
    return len({source for row in rows for source, count in row["accepted_by_source"].items() if count}) > 1


def _machine(run: Run) -> str:
    """Return the machine, its processor by the name that is sold."""
    machine: str = run["machine"]
    for numbers, name in PROCESSORS.items():
        machine = machine.replace(f"({numbers})", f"({name})")
    return machine


def _distinct(run: Run) -> int:
    """How many distinct prompts each policy answered at a batch size, in each round."""
    row = _row(run, PLAIN, 1)
    return int(row["same_texts"].split(" of ")[1]) // int(row["rounds"])


def _short(policy: str) -> str:
    """Return the name of a policy in tables behind the first one, which explains it."""
    return NAMES[PLAIN] if policy == PLAIN else f"`{policy}`"


def page(run: Run, earlier: list[dict[str, Any]]) -> str:
    """docs/benchmarks.md."""
    batches = sorted({row["batch"] for row in run["results"]})
    made = run["published"]
    prompts = ", ".join(f"{count} of {name}" for name, count in run["prompts"].items())
    command = made["command"].replace(" --", " \\\n    --")
    drafting = [policy for policy in NAMES if policy != PLAIN]
    apart = ", ".join(str(batch) for batch in batches if not _row(run, DEFAULT, batch)["side_by_side"])

    def by_batch(
        shown: Callable[[dict[str, Any]], str], policies: Iterable[str] = drafting, name: Callable[[str], str] = _short
    ) -> str:
        rows = [[name(p), *(shown(_row(run, p, batch)) for batch in batches)] for p in policies]
        return _table(["requests", *map(str, batches)], rows)

    old = [
        [row["what"], row["machine"], row["version"], ", ".join(f"{key}: {value}" for key, value in row["at"].items())]
        for row in earlier
    ]
    sections = [
        "# Benchmarks",
        "Written by `scripts/benchmarks/publish.py` from [one run](benchmarks.json); not to be edited by hand.",
        _table(
            ["measured", ""],
            [
                ["model", run["bundle"]],
                ["machine", _machine(run)],
                ["commit", f"{made['commit']}, {made['date']}"],
                ["prompts", f"{_distinct(run)} distinct prompts, drawn evenly from {prompts}"],
                ["answers", f"greedy, {run['max_tokens']} new tokens each"],
            ],
        ),
        "Policies take turns by seconds."
        + (f" For want of KV blocks one after another at {apart} requests." if apart else "")
        + _trial(run),
        f"```\n{command}\n```",
        DATA,
        "![Speedup over plain decoding by concurrent requests](img/speedup.svg)",
        "## Speedup",
        "Decode tokens/s divided by plain decoding's.",
        by_batch(lambda row: _ratio(row["ratio"]), name=NAMES.__getitem__),
        "The same with the time for prompts included:",
        by_batch(lambda row: _ratio(row["end_to_end_ratio"])),
        "## Who proposed the tokens",
        "The default's accepted draft tokens by source. Prompt lookup and the table of earlier answers need no pass:",
        _proposers(run),
        "## Tokens per second",
        "All requests together, decoding only.",
        by_batch(lambda row: _rate(row["decode_tokens_per_s"]), NAMES),
        "## Tokens per verification",
        by_batch(lambda row: _ratio(row["accepted_length"])),
        *_second_model(run.get("second")),
        "## Where an iteration's time goes",
        "![Milliseconds of an iteration by phase and load](img/iteration.svg)",
        "## Texts equal to plain decoding's",
        _table(["Texts compared with plain decoding's", "promise", "equal in this run"], _equal_rows(run)),
        *_lossless_section(run),
        "## Other machines, earlier versions",
        "Not repeated with this version. Speedups over plain decoding of the default pair in bf16, by requests, on two "
        "cores; CPUs are named by family and model.",
        _table(["what", "machine", "version", "figures"], old),
    ]
    return "\n\n".join(part if part.startswith(("|", "`")) else _prose(part) for part in sections) + "\n"


def _second_model(run: Run | None) -> list[str]:
    """Return the sections of a second model, which the same command measured."""
    if run is None:
        return []
    batches = sorted({row["batch"] for row in run["results"]})
    rows = [[_short(p), *(_speed(_row(run, p, batch)) for batch in batches)] for p in (PLAIN, *SECOND_POLICIES)]
    same = [[_short(p), *(_row(run, p, batch)["same_texts"] for batch in batches)] for p in SECOND_POLICIES]
    return [
        "## A second model",
        f"{run['bundle']} in {run['precision']}. Decode tokens/s (times plain decoding):",
        _table(["requests", *map(str, batches)], rows),
        "Texts equal to plain decoding's:",
        _table(["requests", *map(str, batches)], same),
        *(["The default's accepted draft tokens by source:", _proposers(run)] if _several_sources(run) else []),
    ]


def plots(run: Run) -> dict[str, str]:
    """SVGs by file name: the speedup by concurrent requests, drafted tokens, and the time of an iteration."""
    rows = [row for row in run["results"] if row["set"] == "all"]
    gains = speedup(rows, {name: name for name in NAMES if name != PLAIN})
    return {f"{picture.name}.svg": picture.file() for picture in (gains, drafted(rows), iteration(rows))}


def _row(run: Run, policy: str, batch: int) -> dict[str, Any]:
    return next(r for r in run["results"] if (r["set"], r["policy"], r["batch"]) == ("all", policy, batch))


def _speed(row: dict[str, Any]) -> str:
    ratio = "" if row["policy"] == PLAIN else f" ({_ratio(row['ratio'])})"
    return _rate(row["decode_tokens_per_s"]) + ratio


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _equal(run: Run, policy: str, batches: Callable[[int], bool] = lambda batch: True) -> str:
    """Texts equal to plain decoding's over ``batches``."""
    rows = [row for row in run["results"] if row["policy"] == policy and batches(row["batch"])]
    pairs = [row["same_texts"].split(" of ") for row in rows]
    return " of ".join(str(sum(map(int, column))) for column in zip(*pairs, strict=True))


def _lossless_section(run: Run) -> list[str]:
    rows = _lossless_rows(run)
    return (
        ["`scripts/benchmarks/lossless.py` in fp32:", _table(["policies", "requests", *LOSSLESS], rows)] if rows else []
    )


def _lossless_rows(run: Run) -> list[list[str]]:
    found = run.get("lossless", {})
    cells = {(row["policy"], row["batch"]): [] for rows in found.values() for row in rows}
    for rows in found.values():
        for row in rows:
            cells[row["policy"], row["batch"]].append(f"{row['identical']}/{row['requests']}")
    return [[f"`{policy}`", str(batch), *shown] for (policy, batch), shown in cells.items()]


def _trial(run: Run) -> str:
    """Return a warning, where the run was shorter than the published ones are."""
    return " **A short trial: not a result.**" if run["published"]["trial"] else ""


def _prose(text: str, width: int = 120) -> str:
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def _table(head: list[str], rows: list[list[str]]) -> str:
    first, *others = ("| " + " | ".join(row) + " |" for row in (head, *rows))
    return "\n".join([first, "|---" * len(head) + "|", *others])


if __name__ == "__main__":
    run_alone(main)
