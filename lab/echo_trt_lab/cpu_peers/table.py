"""One table of several benches: ours and every peer at every number of requests."""

from __future__ import annotations

from statistics import median
from typing import Any

OURS = {"autoregressive": "ours, plain", "goodput": "ours, goodput"}
DRAFT = ["requests", "engine", "precision", "decode tokens/s", "times plain", "whole tokens/s", "times plain"]
DRAFT += ["prefill tokens/s", "first token ms", "a token ms", "equal texts"]

Row = dict[str, Any]


def markdown(runs: list[dict[str, Any]]) -> str:
    """Tabulate the benches ``runs``. Figures are medians of the runs that have the row, ours of all of a precision.

    "times plain" is a rate divided by that of our plain decoding in the same run, all rounds pooled.
    """
    rows: dict[tuple[int, str, str], list[Row]] = {}
    for run in runs:
        for row in run["results"]:
            rows.setdefault((row["batch"], run["precision"], row["policy"]), []).append(row)
    lines = [DRAFT, ["---"] * len(DRAFT)]
    for batch, precision, policy in sorted(rows, key=lambda key: (key[0], key[1], key[2] not in OURS)):
        same = rows[batch, precision, policy]
        lines.append([str(batch), _named(policy, same), precision, *_figures(same)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _named(policy: str, rows: list[Row]) -> str:
    drafts = rows[-1].get("drafts")
    return OURS.get(policy, policy) + (f" ({drafts})" if drafts else "")


def _figures(rows: list[Row]) -> list[str]:
    return [
        _rate(rows, "decode_tokens_per_s"),
        _ratio(rows, "ratio"),
        _rate(rows, "end_to_end_tokens_per_s"),
        _ratio(rows, "end_to_end_ratio"),
        _rate(rows, "prefill_tokens_per_s"),
        _percentiles(rows, "ttft_ms"),
        _percentiles(rows, "time_per_token_ms"),
        _equal(rows),
    ]


def _median(rows: list[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return median(values) if values else None


def _rate(rows: list[Row], name: str) -> str:
    rate = _median(rows, name)
    return "-" if rate is None else f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}"


def _ratio(rows: list[Row], name: str) -> str:
    ratio = _median(rows, name)
    return "-" if ratio is None else f"{ratio:.2f}"


def _percentiles(rows: list[Row], name: str) -> str:
    found = [row[name] for row in rows if row.get(name)]
    return " / ".join(f"{median(one[p] for one in found):.0f}" for p in ("p50", "p99")) if found else "-"


def _equal(rows: list[Row]) -> str:
    pairs = [row["same_texts"].split(" of ") for row in rows]
    return "/".join(str(sum(map(int, column))) for column in zip(*pairs, strict=True))
