"""Plots over concurrent requests, of rows as ``bench`` and ``simulate`` write them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from echo_trt.speculation.policy_names import PLAIN
from echo_trt_lab.pictures.palette import GREY, PHASES, colours_of
from echo_trt_lab.pictures.style import MARKERS, Picture, load_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[dict[str, Any]]


def speedup(rows: Rows, names: dict[str, str] | None = None) -> Picture:
    """Plot tokens/s as a multiple of plain decoding's, with the rounds' spread where rows have one.

    names  policy -> its name in the legend, of those that are plotted; None: all, by their own names
    """
    shown = names or {name: name for name in _policies(rows) if name != PLAIN}

    def draw(axes: Axes) -> None:
        axes.axhline(1, color=GREY, linestyle=(0, (4, 3)), linewidth=1.6, label="plain decoding")
        for at, (name, colour) in enumerate(colours_of(list(shown)).items()):
            points = _points(rows, name, "ratio")
            if not points:
                continue
            batches = [row["batch"] for row in points]
            axes.plot(batches, [row["ratio"] for row in points], color=colour, label=shown[name], **_line(at, name))
            if all(row.get("ratio_spread") for row in points):
                bounds = zip(*(row["ratio_spread"] for row in points), strict=True)
                axes.fill_between(batches, *bounds, color=colour, alpha=0.15, linewidth=0)
        load_axis(axes, [row["batch"] for row in rows])
        axes.set(ylabel="times plain decoding", ylim=(0, None))

    return Picture(
        "speedup",
        "Speedup by load",
        "Tokens per second, as a multiple of plain decoding at the same load: above the dashed line speculation pays, "
        "below it costs. A band reaches from the slowest to the fastest round, where rounds were measured.",
        draw,
        wide=True,
    )


def accepted_length(rows: Rows) -> Picture:
    return Picture(
        "accepted",
        "Accepted length",
        "Tokens that one verification of a request brings, the target's own included: 1 is plain decoding, and more "
        "means that drafts were right.",
        _lines(rows, lambda row: row.get("accepted_length"), "tokens per verification"),
    )


def drafted(rows: Rows) -> Picture:
    return Picture(
        "drafted",
        "Draft tokens verified",
        "Draft tokens of a request that one iteration verifies: a policy that knows the load drafts less as the "
        "machine fills up, and nothing where nothing pays.",
        _lines(rows, _drafts_per_request, "draft tokens per request"),
    )


def _drafts_per_request(row: dict[str, Any]) -> float | None:
    verified = row.get("verified_per_iteration")
    return None if verified is None else max(verified / row["batch"] - 1, 0.0)


def _lines(rows: Rows, value: Callable[[dict[str, Any]], float | None], label: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        names = [name for name in _policies(rows) if name != PLAIN]
        for at, (name, colour) in enumerate(colours_of(names).items()):
            points = [(row["batch"], value(row)) for row in rows if row["policy"] == name and value(row) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, label=name, **_line(at, name))
        load_axis(axes, [row["batch"] for row in rows])
        axes.set(ylabel=label, ylim=(0, None))

    return draw


def iteration(rows: Rows) -> Picture | None:
    """Plot the milliseconds of phases, of plain decoding and of goodput, else the first that drafts.

    An iteration with drafts takes longer and brings more tokens, so the time of a token stands beside it.
    """
    timed = [row for row in rows if "phases_ms" in row]
    others = [row["policy"] for row in timed if row["policy"] != PLAIN]
    drafting = "goodput" if "goodput" in others else next(iter(others), None)
    shown = [row for row in timed if row["policy"] in (PLAIN, drafting)]
    if not shown:
        return None

    def draw(*both: Axes) -> None:
        positions = [at + 0.5 * (at // 2) for at in range(len(shown))]
        names = [f"{row['batch']} x {'plain' if row['policy'] == PLAIN else row['policy']}" for row in shown]
        for axes, title, tokens in (
            (both[0], "ms per iteration", lambda row: 1.0),
            (both[1], "ms per token of a request", lambda row: row.get("accepted_length") or 1.0),
        ):
            base = [0.0] * len(shown)
            for phase, colour in PHASES.items():
                width = [row["phases_ms"].get(phase, 0.0) / tokens(row) for row in shown]
                axes.barh(positions, width, left=base, height=0.78, color=colour, label=phase)
                base = [b + w for b, w in zip(base, width, strict=True)]
            for position, total in zip(positions, base, strict=True):
                axes.text(total, position, f" {total:.1f}", va="center", fontsize=10)
            axes.set_title(title, fontsize=12.5)
            axes.set_xlim(0, 1.12 * max(base))
            axes.grid(visible=False)
            axes.tick_params(axis="y", length=0, labelsize=11 if len(shown) < 13 else 9)
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
        both[0].set_yticks(positions, names)
        both[0].invert_yaxis()

    return Picture(
        "iteration",
        "Where the time goes",
        f"Milliseconds by phase at each number of requests, plain decoding beside {drafting or 'it'}: passes of the "
        "two networks (draft, verify), and the host's work between them. Left an iteration; right the same over the "
        "tokens that it brings a request, which is the time that a reader waits.",
        draw,
        wide=True,
        panels=2,
    )


def _line(at: int, name: str) -> dict[str, Any]:
    """Return the marker of the line ``at``, and its place: the default policy's on top, then earlier on later ones."""
    return {"marker": MARKERS[at % len(MARKERS)], "zorder": 5 if name == "goodput" else 4 - at / 100}


def _policies(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["policy"] for row in rows))


def _points(rows: Rows, policy: str, key: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["policy"] == policy and row.get(key)]
