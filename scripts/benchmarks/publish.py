"""Measure the published figures, and write docs/benchmarks.*, its plots and README's table from that one run.

    python scripts/benchmarks/publish.py bundles/smollm2-135m --prompts mt_bench.jsonl --prompts gsm8k.jsonl
    python scripts/benchmarks/publish.py --from docs/benchmarks.json       # render again, measure nothing

The demo's prompts are always among those that are asked. Nothing else should run on the machine meanwhile.
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

import typer
import yaml

from echo_trt.pictures.by_load import drafted, iteration, speedup

ROOT = Path(__file__).parents[2]
EARLIER = Path(__file__).with_name("earlier.yaml")
IMAGES = Path("docs", "img")
DEMO = ROOT / "scripts" / "demo_prompts.jsonl"
BATCHES = "1,2,4,8,16"
REQUESTS, ROUNDS, MAX_TOKENS = 32, 3, 64  # of a run that is published; a shorter one is called a trial
PLAIN, DEFAULT, EXACT = "autoregressive", "goodput", "goodput-exact"
#: Policy -> its name for readers, in the order of the tables.
NAMES = {
    PLAIN: "plain decoding",
    "static": "fixed tree (`static`)",
    "echo": "ECHO (`echo`)",
    EXACT: "bit-exact (`goodput-exact`)",
    DEFAULT: "default (`goodput`)",
}
BEGIN, END = "<!-- benchmarks: written by scripts/benchmarks/publish.py -->", "<!-- benchmarks: end -->"

Run = dict[str, Any]


def main(
    bundle: Annotated[Path | None, typer.Argument(help="The bundle to measure.")] = None,
    prompts: Annotated[list[Path] | None, typer.Option(help="JSONL beside the demo's; may be given again.")] = None,
    requests: Annotated[int, typer.Option(help="Requests a policy, batch and round, at least.")] = REQUESTS,
    rounds: Annotated[int, typer.Option(help="Rounds, which are pooled.")] = ROUNDS,
    max_tokens: Annotated[int, typer.Option(help="New tokens a request.")] = MAX_TOKENS,
    stored: Annotated[Path | None, typer.Option("--from", help="Render this run again and measure nothing.")] = None,
) -> None:
    if (bundle is None) == (stored is None):
        raise typer.BadParameter("give a bundle to measure, or --from with a stored run.")
    if stored:
        run = json.loads(stored.read_text())
    else:
        run = measure(bundle, [DEMO, *(prompts or [])], requests, rounds, max_tokens)
    write(run, ROOT)


def measure(bundle: Path, prompts: list[Path], requests: int, rounds: int, max_tokens: int) -> Run:
    """Run ``echo-trt bench``; its figures, with the commit, the date and the command in ``published``."""
    options = ["--requests", str(requests), "--rounds", str(rounds), "--max-tokens", str(max_tokens)]
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"
        words = ["bench", str(bundle), "--policies", ",".join(p for p in NAMES if p != PLAIN), "--batch", BATCHES]
        words += [word for file in prompts for word in ("--prompts", str(file))]
        subprocess.run([sys.executable, "-m", "echo_trt.cli", *words, *options, "--json", str(out)], check=True)
        run = json.loads(out.read_text())
    named = [word for file in prompts if file != DEMO for word in ("--prompts", file.name)]
    command = ["python", "scripts/benchmarks/publish.py", f"bundles/{bundle.name}", *named, *options]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    made = {"commit": git.stdout.strip(), "date": today, "command": shlex.join(command)}
    made["trial"] = requests < REQUESTS or rounds < ROUNDS or max_tokens < MAX_TOKENS
    return {"published": made, **run}


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
    """README's part: speed by concurrent requests, and texts compared with plain decoding's."""
    batches = sorted({row["batch"] for row in run["results"]})
    rows = [[NAMES[p], *(_speed(_row(run, p, batch)) for batch in batches)] for p in (PLAIN, "static", DEFAULT)]
    equal = [
        ["fp32, every policy", "token for token, greedy and sampled", _equal(run, DEFAULT, "fp32")],
        [f"bf16 on CPUs, `{EXACT}`", "bit for bit", _equal(run, EXACT, "bf16")],
        [f"bf16, `{DEFAULT}`", "can part at near-ties", _equal(run, DEFAULT, "bf16")],
    ]
    made = run["published"]
    return "\n".join(
        [
            _prose(
                f"Decode tokens/s (times plain decoding) by concurrent requests: {run['bundle']}, {run['machine']}; "
                f"{made['date']}, commit {made['commit']}.{_trial(run)}"
            ),
            "",
            _table(["", *map(str, batches)], rows),
            "",
            _table(["Text beside plain decoding's", "promise", "equal in this run"], equal),
        ]
    )


def page(run: Run, earlier: list[dict[str, Any]]) -> str:
    """docs/benchmarks.md."""
    batches = sorted({row["batch"] for row in run["results"]})
    made = run["published"]
    prompts = ", ".join(f"{count} of {name}" for name, count in run["prompts"].items())
    command = made["command"].replace(" --", " \\\n    --")
    drafting = [policy for policy in NAMES if policy != PLAIN]
    apart = ", ".join(str(batch) for batch in batches if not _row(run, DEFAULT, batch)["side_by_side"])

    def by_batch(shown: Callable[[dict[str, Any]], str], policies: Iterable[str] = drafting) -> str:
        rows = [[NAMES[p], *(shown(_row(run, p, batch)) for batch in batches)] for p in policies]
        return _table(["requests", *map(str, batches)], rows)

    old = [
        [row["what"], row["machine"], row["version"], ", ".join(f"{key}: {value}" for key, value in row["at"].items())]
        for row in earlier
    ]
    sections = [
        "# Benchmarks",
        "Written by `scripts/benchmarks/publish.py` from [one run](benchmarks.json); not to be edited by hand.",
        f"{run['bundle']} on {run['machine']}; commit {made['commit']}, {made['date']}.{_trial(run)} "
        f"Prompts: {prompts}. Greedy, {run['max_tokens']} new tokens a request, policies in turns of a second."
        + (f" For want of KV blocks one after another at {apart} requests." if apart else ""),
        f"```\n{command}\n```",
        "![Speedup over plain decoding by concurrent requests](img/speedup.svg)",
        "## Speedup",
        "Decode tokens/s divided by plain decoding's, all rounds pooled.",
        by_batch(lambda row: _ratio(row["pooled_ratio"])),
        "The same with the time for prompts included:",
        by_batch(lambda row: _ratio(row["pooled_end_to_end_ratio"])),
        "## Tokens a second",
        "All requests together, decoding only, median of rounds.",
        by_batch(lambda row: _rate(row["decode_tokens_per_s"]), NAMES),
        "## Tokens a verification",
        by_batch(lambda row: _ratio(row["accepted_length"])),
        "## Where an iteration's time goes",
        "![Milliseconds of an iteration by phase and load](img/iteration.svg)",
        "## Texts equal to plain decoding's",
        _all_equal(run, drafting) or by_batch(lambda row: row["same_texts"].replace(" of ", "/")),
        "## Other machines, earlier versions",
        "Measured before, not repeated with this version; speedups are decode tokens/s of the default pair in bf16. "
        "CPUs are named by family and model, two cores each. `bench` measures [other "
        "engines](quickstart-gpu.md#beside-other-engines), too.",
        _table(["what", "machine", "version", "figures"], old),
    ]
    return "\n\n".join(part if part.startswith(("|", "`")) else _prose(part) for part in sections) + "\n"


def plots(run: Run) -> dict[str, str]:
    """SVGs by file name: the speedup by concurrent requests, drafted tokens, and the time of an iteration."""
    rows = [row for row in run["results"] if row["set"] == "all"]
    gains = speedup(rows, "pooled_ratio", {name: name for name in NAMES if name != PLAIN})
    return {f"{picture.name}.svg": picture.file() for picture in (gains, drafted(rows), iteration(rows))}


def _row(run: Run, policy: str, batch: int) -> dict[str, Any]:
    return next(r for r in run["results"] if (r["set"], r["policy"], r["batch"]) == ("all", policy, batch))


def _speed(row: dict[str, Any]) -> str:
    ratio = "" if row["policy"] == PLAIN else f" ({_ratio(row['pooled_ratio'])})"
    return _rate(row["decode_tokens_per_s"]) + ratio


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _equal(run: Run, policy: str, precision: str) -> str:
    """Texts equal to plain decoding's over all batches, where the run was in ``precision``."""
    if run["precision"] != precision:
        return "not in this run"
    pairs = [row["same_texts"].split(" of ") for row in run["results"] if row["policy"] == policy]
    return " of ".join(str(sum(map(int, column))) for column in zip(*pairs, strict=True))


def _all_equal(run: Run, policies: Iterable[str]) -> str:
    """A sentence where every text of ``policies`` is plain decoding's, else nothing."""
    pairs = [row["same_texts"].split(" of ") for row in run["results"] if row["policy"] in policies]
    equal, texts = (sum(map(int, column)) for column in zip(*pairs, strict=True))
    return f"All {texts:,} texts, of every policy at every load, were equal." if equal == texts else ""


def _trial(run: Run) -> str:
    """A warning, where the run was shorter than the published ones are."""
    return " **A short trial: not a result.**" if run["published"]["trial"] else ""


def _prose(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _table(head: list[str], rows: list[list[str]]) -> str:
    first, *others = ("| " + " | ".join(row) + " |" for row in (head, *rows))
    return "\n".join([first, "|---" * len(head) + "|", *others])


if __name__ == "__main__":
    typer.run(main)
