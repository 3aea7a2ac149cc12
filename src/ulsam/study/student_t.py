"""Quantiles of Student's t distribution, for any number of degrees of freedom."""

import functools
import math
from statistics import NormalDist


@functools.lru_cache(maxsize=256)
def t_quantile(tail: float, freedom: float) -> float:
    """The t above which a share of ``tail`` lies.

    By mpmath, which comes with PyTorch. scipy has this function, and is larger than all else that a comparison needs.

    Args:
        tail: above 0, below 0.5.
        freedom: degrees of freedom, above 0; they need not be whole.

    >>> [round(t_quantile(0.025, freedom), 4) for freedom in (1, 4, 1000)]
    [12.7062, 2.7764, 1.9623]
    """
    from mpmath import betainc

    beta = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    t = NormalDist().inv_cdf(1 - tail)  # too small: the tails of t are heavier
    while True:  # Newton's method; the tail is convex, so it comes from below and stops where rounding ends the way up
        above = float(betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True)) / 2
        further = t + (above - tail) / math.exp(beta - (freedom + 1) / 2 * math.log1p(t * t / freedom))
        if further <= t * (1 + 1e-12):
            return further
        t = further
