"""Quantiles of Student's t distribution, for any number of degrees of freedom."""

import functools
import math
from statistics import NormalDist


@functools.lru_cache(maxsize=256)
def t_quantile(tail: float, freedom: float) -> float:
    """The t above which a share of ``tail`` lies.

    Args:
        tail: above 0, below 0.5.
        freedom: degrees of freedom, above 0; they need not be whole.

    >>> [round(t_quantile(0.025, freedom), 4) for freedom in (1, 4, 1000)]
    [12.7062, 2.7764, 1.9623]
    """
    t = NormalDist().inv_cdf(1 - tail)  # too small: the tails of t are heavier
    while True:  # Newton's method; the tail is convex, so it comes from below and never goes too far
        slope = math.exp(_log_density(t, freedom))
        further = t + (_tail(t, freedom) - tail) / slope
        if further <= t * (1 + 1e-14):
            return t
        t = further


def _log_density(t: float, freedom: float) -> float:
    return (
        math.lgamma((freedom + 1) / 2)
        - math.lgamma(freedom / 2)
        - math.log(freedom * math.pi) / 2
        - (freedom + 1) / 2 * math.log1p(t * t / freedom)
    )


def _tail(t: float, freedom: float) -> float:
    """The share above t > 0: half the regularised incomplete beta function of freedom / (freedom + t^2)."""
    below, above = freedom / (freedom + t * t), t * t / (freedom + t * t)
    # I_x(a, b) = x^a (1 - x)^b / (a B(a, b)) times the fraction, and 1 - I_{1-x}(b, a) where that converges faster;
    # both have this factor, by the density
    factor = t * math.exp(_log_density(t, freedom))
    if above > 1.5 / (freedom / 2 + 2.5):
        return factor * _fraction(below, freedom / 2, 0.5) / freedom
    return 0.5 - factor * _fraction(above, 0.5, freedom / 2)


def _fraction(x: float, a: float, b: float) -> float:
    """The continued fraction of the incomplete beta function, by Lentz's method.

    Source: Press et al., Numerical Recipes, third edition (2007), section 6.4.
    """
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    value, m = d, 0
    while True:
        m += 1
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            c, d = 1 + step / c, 1 / (1 + step * d)
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            return value
