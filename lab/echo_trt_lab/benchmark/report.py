"""The results as terminal tables, and as one self-contained HTML file with plots."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rich.table import Table

from echo_trt_lab.pictures.by_load import accepted_length, drafted, iteration, speedup
from echo_trt_lab.pictures.page import Figures, Report

COLUMNS = {
    "set": "prompts",
    "batch": "batch",
    "policy": "policy",
    "decode_tokens_per_s": "decode tokens/s",
    "ratio": "to plain",
    "ratio_spread": "spread",
    "ratio_interval": "95 % interval",
    "end_to_end_tokens_per_s": "with prompts, tokens/s",
    "end_to_end_ratio": "to plain, with prompts",
    "prefill_tokens_per_s": "prefill tokens/s",
    "accepted_length": "accepted length",
    "draft_utilisation": "draft used",
    "verified_per_iteration": "verified",
    "inter_token_ms": "between emissions p50 / p99 ms",
    "time_per_token_ms": "a token p50 / p99 ms",
    "ttft_ms": "first token p50 / p99 ms",
    "same_texts": "same texts",
    "attained": "targets kept",
    "targeted_per_token_ms": "a token with a target p50 / p90 ms",
}
TARGETED = ("attained", "targeted_per_token_ms")
KEY_HEADS = tuple(COLUMNS[name] for name in ("set", "batch", "policy"))
LATENCY_HEADS = tuple(
    COLUMNS[name]
    for name in (
        "inter_token_ms",
        "time_per_token_ms",
        "ttft_ms",
        "prefill_tokens_per_s",
        "end_to_end_tokens_per_s",
        "end_to_end_ratio",
        *TARGETED,
    )
)
SPEED_HEADS = tuple(head for head in COLUMNS.values() if head not in LATENCY_HEADS)
SPEED_WORDS = (
    "Decoding",
    "Iterations without prompts. Spread: the slowest and the fastest round. Interval: of the ratio, bootstrapped over "
    "prompts. Draft used: the share of verified draft tokens that was accepted. Verified: tokens per iteration over "
    "all requests.",
)
LATENCY_WORDS = (
    "Latency and whole requests",
    "Milliseconds, median / 99th percentile. With prompts: all iterations, those that computed prompts included.",
)
KEYS = {"set": "prompts", "batch": "batch", "policy": "policy"}
SPEED = {
    "decode_tokens_per_s": "tokens/s",
    "ratio": "ratio",
    "ratio_interval": "95 %",
    "accepted_length": "accepted",
    "same_texts": "texts",
}
LATENCY = {
    "ttft_ms": "first token ms",
    "time_per_token_ms": "a token ms",
    "prefill_tokens_per_s": "prefill/s",
    "end_to_end_tokens_per_s": "whole/s",
    "end_to_end_ratio": "ratio",
    "attained": "targets kept",
    "targeted_per_token_ms": "with target ms",
}


def results_table(result: dict[str, Any]) -> Table:
    """Tabulate the speed of decoding; the HTML report has all columns."""
    stated = f"; {result['synthetic_text']}" if "synthetic_text" in result else ""
    about = ", ".join(result[key] for key in ("texts", "static", "machine"))
    return _table(result, SPEED, f"{result['bundle']} {result['precision']}, {about}{stated}")


def latency_table(result: dict[str, Any]) -> Table:
    """Tabulate latencies (p50 / p99), and the rates of prompts and of whole requests."""
    return _table(result, LATENCY, "Latency p50 / p99; tokens/s of prompts, and of whole requests")


def _table(result: dict[str, Any], figures: dict[str, str], title: str) -> Table:
    several = len({row["set"] for row in result["results"]}) > 1
    columns = {name: head for name, head in _known(result, KEYS | figures).items() if name != "set" or several}
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
    """Render plots and tables into one file without scripts or links."""
    rows = result["results"]
    pooled = [row for row in rows if row["set"] == "all"]
    pictures = [speedup(pooled), accepted_length(pooled), drafted(pooled), iteration(pooled)]
    columns = _known(result, COLUMNS)
    cells = [[_shown(name, row.get(name)) for name in columns] for row in _named(rows)]
    words, keys = frozenset(COLUMNS[name] for name in ("set", "policy")), frozenset((COLUMNS["batch"],))
    groups = [(row["set"], row["batch"]) for row in rows]
    whole, alike = Figures("", "", list(columns.values()), cells, groups, words).without_constants(keys)
    return Report(
        f"{result['bundle']} in {result['precision']}: speculation against plain decoding",
        _lead(result),
        [picture for picture in pictures if picture],
        [_part(whole, SPEED_HEADS, *SPEED_WORDS), _part(whole, LATENCY_HEADS, *LATENCY_WORDS)],
        _facts(result) | {f"{name}, in every row": value for name, value in alike.items() if value != "all"},
    ).html()


def _known(result: dict[str, Any], columns: dict[str, str]) -> dict[str, str]:
    """Leave out the columns of latency targets where there were none."""
    rows = result["results"]
    return {name: head for name, head in columns.items() if name not in TARGETED or any(name in row for row in rows)}


def _named(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add the kind of a peer's drafts to its name."""
    return [row | {"policy": ", ".join(filter(None, (row["policy"], row.get("drafts"))))} for row in rows]


def _lead(result: dict[str, Any]) -> list[str]:
    apart = sorted({row["batch"] for row in result["results"] if row.get("side_by_side") is False})
    turns = "Policies ran side by side, a second each in turn"
    if apart:
        turns += f"; at batch {', '.join(map(str, apart))} one after another, for want of KV blocks"
    stated = [f"{result['synthetic_text'].capitalize()}."] if "synthetic_text" in result else []
    return [
        *stated,
        f"{result['texts'].capitalize()}, up to {result['max_tokens']} new tokens per request, every slot kept busy "
        f"(closed loop). {turns}. Rates and ratios are of all rounds as one.",
    ]


def _facts(result: dict[str, Any]) -> dict[str, str]:
    hinge = result["hinge"]
    return {
        "machine": result["machine"],
        "static": result["static"],
        "prompts": ", ".join(f"{count} of {name}" for name, count in result["prompts"].items()),
        "a pass of the target": f"{1e3 * hinge['t_ar']:.1f} ms up to {hinge['k_max']:.0f} tokens (K_max), then "
        f"{hinge['gamma']:.1%} more for each token",
    }


def _part(whole: Figures, heads: Collection[str], title: str, sentence: str) -> Figures:
    """Take the columns of ``heads`` that are left, with those that name the row."""
    chosen = [at for at, name in enumerate(whole.columns) if name in heads or name in KEY_HEADS]
    rows = [[row[at] for at in chosen] for row in whole.rows]
    return Figures(title, sentence, [whole.columns[at] for at in chosen], rows, whole.groups, whole.words)


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
