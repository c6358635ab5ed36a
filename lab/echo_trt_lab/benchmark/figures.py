"""Figures from samples: rates and ratios of all rounds pooled, and the spread of the rounds' ratios."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from echo_trt.speculation.pacer import Latency
from echo_trt_lab.benchmark.closed_loop import PHASES, PhaseSums, StepSample
from echo_trt_lab.benchmark.peer import PeerRun, Work
from echo_trt_lab.bootstrap import interval, pooled


def figures(policy: str, batch: int, rounds: list[StepSample], plain: list[StepSample], k_max: int) -> dict[str, Any]:
    """Make a policy's row of the results; ``plain`` are plain decoding's rounds, run beside ``rounds``.

    accepted_by_source      accepted draft tokens, where the policy counts them (``Planner.totals``)
    draft_utilisation       share of the verified draft tokens that was accepted
    verified_per_iteration  tokens of the trees with their roots, without padding
    """
    decode = [s.decode for s in rounds]
    iterations, verifications = sum(t.iterations for t in decode), sum(t.verifications for t in decode)
    accepted = sum(t.tokens - t.verifications for t in decode)
    drafted, verified = sum(t.drafted for t in decode), sum(t.verified for t in decode)
    ratios = [_ratio(_rate(a.decode), _rate(b.decode)) for a, b in zip(rounds, plain, strict=True)]
    return {
        "policy": policy,
        "batch": batch,
        "rounds": len(rounds),
        **_speed(rounds, plain),
        "ratio_spread": _spread(ratios),
        "ratio_interval": _interval(rounds, plain),
        "accepted_length": round(sum(t.tokens for t in decode) / verifications, 4) if verifications else None,
        "draft_utilisation": round(accepted / drafted, 4) if drafted else None,
        "verified_per_iteration": round(verified / max(iterations, 1), 2),
        "budget_used": round(verified / max(iterations, 1) / k_max, 4) if k_max else None,
        "draft_levels_per_iteration": round(sum(t.draft_passes for t in decode) / max(iterations, 1), 3),
        "iteration_ms": round(1e3 * sum(t.elapsed for t in decode) / max(iterations, 1), 3),
        "phases_ms": {p: round(1e3 * sum(t.phases[p] for t in decode) / max(iterations, 1), 4) for p in PHASES},
        "ttft_ms": _percentiles([x for s in rounds for x in s.ttft]),
        "inter_token_ms": _percentiles([x for s in rounds for x in s.gaps]),
        "time_per_token_ms": _percentiles([x for s in rounds for x in s.pace]),
        "progress_spread": round(_variation([x for s in rounds for x in s.progress]), 4),
        "same_texts": _same(rounds, plain),
        "accepted_by_source": dict(sum((s.accepted for s in rounds), Counter())),
    }


def attainment(rounds: list[StepSample], latency: Latency) -> dict[str, Any]:
    """Return what came of requests with latency targets: the share that kept them, and their seconds per token."""
    times = [each for sample in rounds for each in sample.targeted]
    kept = [latency.kept(*each) for each in times]
    paces = [1e3 * pace for _, pace in times]
    return {
        "attained": round(kept.count(True) / max(len(kept), 1), 4),
        "targeted_per_token_ms": {f"p{p}": round(float(np.percentile(paces, p)), 2) for p in (50, 90)},
    }


def _speed(rounds: Sequence[StepSample | PeerRun], plain: Sequence[StepSample]) -> dict[str, float | None]:
    """Rates and ratios to ``plain``, all rounds as one: a round weighs by its time."""
    decode, whole = _rate_of_all([r.decode for r in rounds]), _rate_of_all([r.whole for r in rounds])
    return {
        "decode_tokens_per_s": _rounded(decode, 2),
        "end_to_end_tokens_per_s": _rounded(whole, 2),
        "prefill_tokens_per_s": _rounded(_rate_of_all([r.prefill for r in rounds]), 2),
        "ratio": _rounded(_ratio(decode, _rate_of_all([s.decode for s in plain])), 4),
        "end_to_end_ratio": _rounded(_ratio(whole, _rate_of_all([s.whole for s in plain])), 4),
    }


def peer_figures(
    name: str, batch: int, rounds: list[PeerRun], plain: list[StepSample], text_of: Callable[[list[int]], str]
) -> dict[str, Any]:
    """Make a peer's row, with ratios to our plain decoding of the same rounds; ``text_of`` decodes our answers."""
    decode = [_ratio(_rate(a.decode), _rate(b.decode)) for a, b in zip(rounds, plain, strict=True)]
    return {
        "policy": name,
        "batch": batch,
        "rounds": len(rounds),
        **_speed(rounds, plain),
        "ratio_spread": _spread(decode),
        "accepted_length": _median([r.accepted_length for r in rounds]),
        "ttft_ms": _percentiles([x for r in rounds for x in r.ttft]),
        "time_per_token_ms": _percentiles([x for r in rounds for x in r.pace]),
        "reported_time_per_token_ms": _percentiles([x for r in rounds for x in r.reported]),
        "same_texts": _share([_equal(r.answers, s.texts, text_of) for r, s in zip(rounds, plain, strict=True)]),
        "drafts": rounds[-1].drafts,
        "cached_prompt_tokens": sum(r.cached for r in rounds),
    }


def _equal(
    answers: Sequence[list[int]] | Sequence[str], ours: dict[int, list[int]], text_of: Callable[[list[int]], str]
) -> list[bool]:
    """Compare token ids, or texts where a server gives no ids: without the white space and broken character at ends."""
    return [
        (_bare(answer) == _bare(text_of(ours[i]))) if isinstance(answer, str) else answer == ours[i]
        for i, answer in enumerate(answers)
    ]


def _bare(text: str) -> str:
    return text.rstrip("\ufffd").strip()


def _ratio(rate: float | None, plain: float | None) -> float | None:
    return None if rate is None or plain is None else rate / plain


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _rate_of_all(tallies: Sequence[PhaseSums | Work]) -> float | None:
    return _rate(Work(sum(t.tokens for t in tallies), sum(t.elapsed for t in tallies)))


def _median(values: list[float | None]) -> float | None:
    measured = [v for v in values if v is not None]
    return round(float(np.median(measured)), 4) if measured else None


def _spread(values: list[float | None]) -> list[float] | None:
    measured = [v for v in values if v is not None]
    return [round(min(measured), 4), round(max(measured), 4)] if measured else None


def _interval(rounds: list[StepSample], plain: list[StepSample]) -> list[float] | None:
    """Bound the ratio by a bootstrap over prompts, 95 %; None where no iteration decoded alone."""
    ours, base = (pooled(sample.by_prompt for sample in samples) for samples in (rounds, plain))
    return [round(bound, 4) for bound in interval(ours, base)] if ours and base else None


def _rate(tally: PhaseSums | Work) -> float | None:
    """Compute tokens per second; None where no time was measured, as where every iteration computed prompts."""
    return tally.tokens / tally.elapsed if tally.elapsed else None


def _percentiles(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {f"p{p}": round(1e3 * float(np.percentile(seconds, p)), 2) for p in (50, 99)}


def _variation(values: list[float]) -> float:
    return float(np.std(values) / np.mean(values)) if values else 0.0


def _same(rounds: list[StepSample], plain: list[StepSample]) -> str:
    return _share([[a.texts[i] == b.texts[i] for i in a.texts] for a, b in zip(rounds, plain, strict=True)])


def _share(equal: list[list[bool]]) -> str:
    flat = [same for one in equal for same in one]
    return f"{flat.count(True)} of {len(flat)}"
