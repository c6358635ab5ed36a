"""Bootstrap intervals of ratios of rates, over the prompts that were answered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

DRAWS = 2000  # resamples; larger: the interval's ends vary less from seed to seed
Parts = Mapping[int, tuple[float, float]]  # prompt -> tokens and seconds


def pooled(runs: Iterable[Parts]) -> dict[int, tuple[float, float]]:
    """Add up the tokens and seconds of each prompt over ``runs``."""
    total: dict[int, tuple[float, float]] = {}
    for run in runs:
        for prompt, (tokens, seconds) in run.items():
            before = total.get(prompt, (0.0, 0.0))
            total[prompt] = before[0] + tokens, before[1] + seconds
    return total


def rate(parts: Parts) -> float:
    """Return tokens per second over all prompts."""
    tokens, seconds = map(sum, zip(*parts.values(), strict=True))
    return tokens / seconds


def interval(parts: Parts, base: Parts, share: float = 0.95) -> tuple[float, float]:
    """Return the bounds of ``rate(parts) / rate(base)``, where the same prompts are drawn again for both."""
    prompts = sorted(set(parts) | set(base))
    both = np.array([[run.get(prompt, (0.0, 0.0)) for prompt in prompts] for run in (parts, base)])
    weights = np.random.default_rng(0).multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), DRAWS)
    sums = np.einsum("dp,rpk->rkd", weights, both)  # runs, tokens and seconds, draws
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (sums[0, 0] / sums[0, 1]) / (sums[1, 0] / sums[1, 1])
    low, high = np.quantile(ratios[np.isfinite(ratios)], [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)
