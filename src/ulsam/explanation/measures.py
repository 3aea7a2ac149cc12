"""What maps and features are like, as numbers: pure functions of arrays."""

import itertools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ulsam.explanation.inspect_maps import FLAT

Array = NDArray[np.floating]


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


def correlation(maps: Array) -> float | None:
    """The mean of the correlations over positions of each two of the maps [g, H, W]; flat maps have none.

    >>> round(correlation(np.array([[[1.0, 0.0]], [[0.0, 1.0]], [[0.5, 0.5]]])), 6)
    -1.0
    """
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    deviation = flat - flat.mean(1, keepdims=True)
    size = np.linalg.norm(deviation, axis=1)
    bent = size > FLAT * np.linalg.norm(flat, axis=1)
    unit = deviation[bent] / size[bent, None]
    return _mean_of_pairs(unit @ unit.T)


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

    own = bits(flat)
    between = bits((flat[:, None] + flat[None]) / 2) - (own[:, None] + own[None]) / 2
    found = _mean_of_pairs(between)
    return None if found is None else max(found, 0.0)


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
    share: Array = np.divide(inside, mass, out=np.zeros_like(mass), where=mass > 0)
    return share


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
        power, weighted: of :func:`radial_content`, [C]; the subspaces are ``groups`` runs of neighbouring channels.
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
    mean = np.divide(grouped[1], grouped[0], out=np.zeros_like(grouped[1]), where=grouped[0] > 0)
    spread: NDArray[np.float64] = mean.std(1)
    return float(spread[0]), spread[1:]


def _mean_of_pairs(square: Array) -> float | None:
    pairs = [float(square[a, b]) for a, b in itertools.combinations(range(len(square)), 2)]
    return sum(pairs) / len(pairs) if pairs else None
