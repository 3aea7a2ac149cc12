"""What maps and features are like, as numbers: pure functions of arrays."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.floating]

FLAT = 1e-6
"""A map whose values differ by a smaller share than this is flat: what is left is the rounding of float32."""

INERT = 0.01
"""Attention is inert if replacing its maps by uniform ones changes the features by less than this share."""


def entropy_share(maps: Array) -> Array:
    """The entropy of maps [..., H, W], each of which sums to 1, as a share of log(H * W), that of a uniform map.

    >>> entropy_share(np.array([[[0.25, 0.25], [0.25, 0.25]], [[1, 0], [0, 0]]])).tolist()
    [1.0, 0.0]
    """
    height, width = maps.shape[-2:]
    if height * width == 1:
        return np.ones(maps.shape[:-2])
    exact = maps.astype(np.float64)
    terms = exact * np.log(exact, out=np.zeros_like(exact), where=exact > 0)
    share: Array = np.abs(terms.sum((-2, -1))) / math.log(height * width)
    return share


def peak(maps: Array) -> Array:
    """The largest value of maps [..., H, W] that sum to 1, times H * W: 1 for a uniform map.

    >>> peak(np.array([[0.5, 0.25, 0.25, 0.0]])).item()
    2.0
    """
    height, width = maps.shape[-2:]
    largest: Array = maps.max((-2, -1)) * (height * width)
    return largest


def max_effect(maps: Array) -> float:
    """The most by which maps [g, H, W], and not uniform ones, can change the features x that they amplify, x + A * x.

    The change is (A - 1 / (H * W)) * x: as a share of x, in the square mean, at most the largest factor in it.

    >>> max_effect(np.array([[[0.5, 0.0], [0.25, 0.25]]])), max_effect(np.full((1, 7, 7), 1 / 49))
    (0.25, 0.0)
    """
    height, width = maps.shape[-2:]
    return float(np.abs(maps - 1 / (height * width)).max())


def deviations(maps: Array) -> Array:
    """The values of maps [..., H, W] less their mean, [..., H * W] in float64; those of a flat map are 0.

    >>> deviations(np.array([[[0.75, 0.25]], [[0.5, 0.5]]])).tolist()
    [[0.25, -0.25], [0.0, 0.0]]
    """
    values = maps.reshape(*maps.shape[:-2], -1).astype(np.float64)
    deviation = values - values.mean(-1, keepdims=True)
    flat = np.linalg.norm(deviation, axis=-1) <= FLAT * np.linalg.norm(values, axis=-1)
    deviation[flat] = 0
    return deviation


def correlations(maps: Array) -> Array:
    """The correlation over positions of each two maps of an image [..., g, H, W], in one row; flat maps have none.

    >>> correlations(np.array([[[1.0, 0.0]], [[0.0, 1.0]], [[0.5, 0.5]]])).round(6).tolist()
    [-1.0]
    """
    deviation = deviations(maps)
    size = np.linalg.norm(deviation, axis=-1, keepdims=True)
    unit = ratio(deviation, size)
    pairs = np.triu_indices(maps.shape[-3], 1)
    bent = (size * size.swapaxes(-1, -2))[..., *pairs] > 0
    found: Array = (unit @ unit.swapaxes(-1, -2))[..., *pairs][bent]
    return found


def divergence(maps: Array) -> float | None:
    """The mean Jensen-Shannon divergence in bits of each two of the maps [g, H, W], which sum to 1; None for one map.

    0: all are equal; 1: no position has mass in two of them (Lin 1991, IEEE Trans. Inf. Theory 37).

    >>> divergence(np.array([[[1.0, 0.0]], [[0.0, 1.0]]])), divergence(np.array([[[0.5, 0.5]]]))
    (1.0, None)
    """
    flat = maps.reshape(len(maps), -1).astype(np.float64)

    def bits(values: Array) -> Array:
        terms: Array = -(values * np.log2(values, out=np.zeros_like(values), where=values > 0)).sum(-1)
        return terms

    first, second = np.triu_indices(len(maps), 1)
    own = bits(flat)
    between = bits((flat[first] + flat[second]) / 2) - (own[first] + own[second]) / 2
    return max(float(between.mean()), 0.0) if between.size else None


def share_within(maps: Array, area: Array) -> Array:
    """The share of the mass of maps [..., h, w], none of it negative, that lies in an area; 0 where there is no mass.

    Args:
        maps: any; what they sum to does not matter.
        area: [h, w], the share of each position that belongs to it.

    >>> share_within(np.array([[3.0, 1.0]]), np.array([[1.0, 0.0]])).item()
    0.75
    """
    mass = maps.sum((-2, -1), dtype=np.float64)
    inside = (maps * area).sum((-2, -1), dtype=np.float64)
    return ratio(inside, mass)


def ratio(part: Array, whole: Array) -> Array:
    """part / whole; 0 where the whole is 0.

    >>> ratio(np.array([1.0, 0.0]), np.array([2.0, 0.0])).tolist()
    [0.5, 0.0]
    """
    found: Array = np.divide(part, whole, out=np.zeros(np.broadcast_shapes(part.shape, whole.shape)), where=whole > 0)
    return found


def radial_content(x: Tensor) -> tuple[Tensor, Tensor]:
    """The power of features over spatial frequency, summed over images; the constant part (frequency 0) left out.

    Args:
        x: [B, C, H, W].

    Returns:
        The power of each channel, and the power times the radial frequency in cycles per width of the map, [C] each in
        float64. Their ratio is the power-weighted mean frequency.

    >>> wave = torch.cos(2 * torch.pi * 2 * torch.arange(8) / 8).expand(1, 1, 8, 8)
    >>> power, weighted = radial_content(wave)
    >>> round((weighted / power).item(), 6)
    2.0
    """
    height, width = x.shape[2:]
    power = torch.fft.fft2(x.double()).abs().square()
    power[..., 0, 0] = 0
    down = torch.fft.fftfreq(height, 1 / width, dtype=torch.float64)  # one pixel is 1 / width of the map's width
    across = torch.fft.fftfreq(width, 1 / width, dtype=torch.float64)
    radius = torch.hypot(down[:, None], across).to(x.device)
    return power.sum((0, 2, 3)).cpu(), (power * radius).sum((0, 2, 3)).cpu()


def spread_by_chance(
    power: Tensor, weighted: Tensor, groups: int, draws: int = 1000
) -> tuple[float, NDArray[np.float64]]:
    """How far the subspaces' mean frequencies lie apart, and how far those of random groups of as many channels do.

    Args:
        power, weighted: of :func:`radial_content`, [C]; the subspaces are ``groups`` runs of neighboring channels.
        draws: random groupings, of seed 0.

    Returns:
        The standard deviation over the subspaces, and those of the random groupings, [draws].

    >>> power, weighted = torch.ones(4), torch.tensor([1.0, 1.0, 3.0, 3.0])
    >>> found, chance = spread_by_chance(power, weighted, 2)
    >>> found, float(chance.max()), round(float(chance.mean()), 1)
    (1.0, 1.0, 0.3)
    """
    random = np.random.default_rng(0)
    order = np.stack([np.arange(len(power)), *(random.permutation(len(power)) for _ in range(draws))])
    grouped = [values.double().numpy()[order].reshape(draws + 1, groups, -1).sum(2) for values in (power, weighted)]
    spread: NDArray[np.float64] = ratio(grouped[1], grouped[0]).std(1)
    return float(spread[0]), spread[1:]
