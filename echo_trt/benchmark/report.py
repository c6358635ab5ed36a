"""The results as a terminal table, and as one self-contained HTML file with plots."""

from __future__ import annotations

import io
from typing import Any

from jinja2 import Environment, PackageLoader
from rich.table import Table

from echo_trt.benchmark.closed_loop import PHASES
from echo_trt.decoding.policy_names import PLAIN

COLUMNS = {
    "set": "prompts",
    "batch": "batch",
    "policy": "policy",
    "decode_tokens_per_s": "decode tokens/s",
    "ratio": "to plain",
    "ratio_spread": "spread",
    "pooled_ratio": "all rounds as one",
    "end_to_end_tokens_per_s": "with prompts, tokens/s",
    "end_to_end_ratio": "to plain",
    "prefill_tokens_per_s": "prefill tokens/s",
    "accepted_length": "accepted length",
    "draft_utilisation": "draft used",
    "verified_per_iteration": "verified",
    "inter_token_ms": "between emissions p50 / p99 ms",
    "time_per_token_ms": "a token p50 / p99 ms",
    "ttft_ms": "first token p50 / p99 ms",
    "same_texts": "same texts",
}
KEYS = {"set": "prompts", "batch": "batch", "policy": "policy"}
SPEED = {
    "decode_tokens_per_s": "tokens/s",
    "ratio": "ratio",
    "ratio_spread": "spread",
    "pooled_ratio": "pooled",
    "accepted_length": "accepted",
    "same_texts": "texts",
}
LATENCY = {
    "ttft_ms": "first token ms",
    "time_per_token_ms": "a token ms",
    "prefill_tokens_per_s": "prefill/s",
    "end_to_end_tokens_per_s": "whole/s",
    "end_to_end_ratio": "ratio",
}


def results_table(result: dict[str, Any]) -> Table:
    """Tabulate the speed of decoding; the HTML report has all columns."""
    return _table(result, SPEED, f"{result['bundle']} {result['precision']}, greedy, {result['machine']}")


def latency_table(result: dict[str, Any]) -> Table:
    """Tabulate latencies (p50 / p99), and the rates of prompts and of whole requests."""
    return _table(result, LATENCY, "Latency p50 / p99; tokens/s of prompts, and of whole requests")


def _table(result: dict[str, Any], figures: dict[str, str], title: str) -> Table:
    several = len({row["set"] for row in result["results"]}) > 1
    columns = {name: head for name, head in (KEYS | figures).items() if name != "set" or several}
    table = Table(title=title, title_justify="left")
    table.collapse_padding = True  # 80 columns are enough
    for name, head in columns.items():
        table.add_column(head, justify="left" if name in ("set", "policy") else "right")
    last = None
    for row in result["results"]:
        key = row["set"], row["batch"]
        if last is not None and key != last:
            table.add_section()
        last = key
        table.add_row(*(_shown(name, row.get(name)).replace(" to ", "-").replace(" of ", "/") for name in columns))
    return table


def html_report(result: dict[str, Any]) -> bytes:
    """Render table and plots into one file without scripts or links."""
    environment = Environment(loader=PackageLoader("echo_trt.benchmark", "."), autoescape=True)
    template = environment.get_template("report.html.j2")
    policies = [", ".join(filter(None, (row["policy"], row.get("drafts")))) for row in result["results"]]
    named = [row | {"policy": policy} for row, policy in zip(result["results"], policies, strict=True)]
    rows = [[_shown(name, row.get(name)) for name in COLUMNS] for row in named]
    return template.render(result=result, columns=list(COLUMNS.values()), rows=rows, plots=_plots(result)).encode()


def _shown(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return " / ".join(f"{v:.0f}" for v in value.values())
    if "ratio" in name:
        return " to ".join(f"{v:.2f}" for v in (value if isinstance(value, list) else [value]))
    if isinstance(value, float):
        return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return str(value)


def _plots(result: dict[str, Any]) -> list[str]:
    from matplotlib.figure import Figure

    rows = [row for row in result["results"] if row["set"] == "all"]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    ratio, length, phases = figure.subplots(1, 3)
    for policy in dict.fromkeys(row["policy"] for row in rows):
        points = [row for row in rows if row["policy"] == policy and row.get("ratio")]
        batches = [row["batch"] for row in points]
        ratio.plot(batches, [row["ratio"] for row in points], "o-", label=policy)
        length.plot(batches, [row.get("accepted_length") or 1 for row in points], "o-", label=policy)
    ratio.set(title="decode tokens/s, to plain decoding", xlabel="batch", xscale="log")
    length.set(title="accepted length", xlabel="batch", xscale="log")
    ratio.legend()
    _stack(phases, rows)
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    return [stream.getvalue()[stream.getvalue().index("<svg") :]]


def _stack(axes, rows: list[dict[str, Any]]) -> None:
    """Plot the milliseconds of an iteration's phases by batch, for plain decoding and goodput."""
    shown = [row for row in rows if row["policy"] in (PLAIN, "goodput") and "phases_ms" in row]
    names = [f"{'plain' if row['policy'] == PLAIN else 'goodput'} {row['batch']}" for row in shown]
    base = [0.0] * len(shown)
    for phase in PHASES:
        height = [row["phases_ms"][phase] for row in shown]
        axes.bar(names, height, bottom=base, label=phase)
        base = [b + h for b, h in zip(base, height, strict=True)]
    axes.set(title="an iteration, ms")
    axes.tick_params(axis="x", rotation=60)
    axes.legend()
