"""The verification budget: the paper's hinge cost model, whose knee is K_max."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Hinge:
    """The paper's cost model, T(N) = T_ar (1 + gamma [N - K_max]+); ``error`` is the largest relative error."""

    t_ar: float
    gamma: float
    k_max: int
    error: float


def fit_hinge(sizes: np.ndarray, seconds: np.ndarray, accuracy: float = 0.0) -> Hinge:
    """Fit by least squares of relative errors, trying every knee: the curve may be jagged.

    ``accuracy``: relative, of ``seconds`` float64 [m]. Timing noise makes near knees equally good. Of all knees whose
    mean error is within ``accuracy`` of the least, the largest is taken, since a small K_max leaves no room to draft.
    A single size has no bend, so K_max is that size.
    """
    if len(sizes) == 1:
        return Hinge(t_ar=float(seconds[0]), gamma=0.0, k_max=int(sizes[0]), error=0.0)
    fits: list[tuple[float, Hinge]] = []
    for knee in range(int(sizes[0]), int(sizes[-1])):
        beyond = np.maximum(sizes - knee, 0)
        matrix = np.stack((np.ones(len(sizes)), beyond), axis=1) / seconds[:, None]
        (t_ar, slope), *_ = np.linalg.lstsq(matrix, np.ones(len(sizes)), rcond=None)
        residual = matrix @ (t_ar, slope) - 1
        if t_ar > 0:
            hinge = Hinge(float(t_ar), float(slope / t_ar), knee, float(abs(residual).max()))
            fits.append((float(np.sqrt((residual**2).mean())), hinge))
    best, hinge = min(fits, key=lambda fit: fit[0])
    return max((h for error, h in fits if error < best + accuracy), key=lambda h: h.k_max, default=hinge)
