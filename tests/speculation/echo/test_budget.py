"""The hinge that is fitted to a measured curve, and its knee."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_trt.speculation.echo.budget import Hinge, fit_hinge


@given(st.floats(1e-4, 1.0), st.floats(0.005, 0.5), st.integers(2, 60))
def test_a_hinge_is_found_again(t_ar, gamma, k_max):
    sizes = np.array([1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128])
    hinge = fit_hinge(sizes, t_ar * (1 + gamma * np.maximum(sizes - k_max, 0)))
    assert (hinge.t_ar, hinge.gamma) == pytest.approx((t_ar, gamma), rel=1e-6)
    assert hinge.k_max == k_max
    assert hinge.error < 1e-9


def test_of_a_jagged_curve_the_hinge_tells_its_error():
    sizes = np.array([1, 2, 4, 8, 16, 32, 64])
    seconds = np.array([0.010, 0.010, 0.010, 0.013, 0.012, 0.030, 0.060])
    hinge = fit_hinge(sizes, seconds)
    model = hinge.t_ar * (1 + hinge.gamma * np.maximum(sizes - hinge.k_max, 0))
    assert hinge.error == pytest.approx(abs(model / seconds - 1).max())
    assert 0.1 < hinge.error < 0.3
    assert 8 <= hinge.k_max <= 20


def test_the_hinge_of_a_single_size_allows_nothing_beyond_it():
    """All that is left of a table where a pass over one token seemed to be far shorter than any other."""
    assert fit_hinge(np.array([1]), np.array([0.02]), accuracy=0.02) == Hinge(t_ar=0.02, gamma=0.0, k_max=1, error=0.0)
