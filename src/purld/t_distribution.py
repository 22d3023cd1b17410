"""Student's t distribution, for intervals of a few values; scipy is not a dependency."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

_POINTS = 2_001  # nodes of Simpson's rule


def two_sided_p(t: float, degrees: int) -> float:
    """Return P(|T| > |t|) for Student's t.

    With T = sqrt(v) tan(a) the density becomes cos(a)^(v-1) on (-pi/2, pi/2), which Simpson's rule integrates.
    """
    start = math.atan(abs(t) / math.sqrt(degrees))
    return _cosines(start, degrees) / _cosines(0.0, degrees)


def _cosines(start: float, degrees: int) -> float:
    """Return the integral of cos^(degrees - 1) from `start` to pi/2."""
    angles, step = np.linspace(start, math.pi / 2, _POINTS, retstep=True)
    heights = np.cos(angles).clip(min=0.0) ** (degrees - 1)
    weights = np.ones(_POINTS)
    weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0
    return float(step) / 3 * float(weights @ heights)


@lru_cache
def t_quantile(level: float, degrees: int) -> float:
    """Return the t below which Student's distribution has a share `level` > 0.5, by bisection."""
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        if 1 - two_sided_p(middle, degrees) / 2 < level:
            low = middle
        else:
            high = middle
    return (low + high) / 2
