"""What the scores of a sweep say: means and spreads, how wide a setting may be missed, and what explains the variance.

Pure functions of numbers.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Spread:
    """The mean of some runs, and how far they lie apart."""

    mean: float
    deviation: float | None  # standard deviation of a sample, divided by n - 1; None for one run
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Return mean, standard deviation and number of values, of which there is at least one."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


# ---- how wide a setting may be missed ----


@dataclass(frozen=True)
class Stable:
    """The interval of a setting in which the score stays close to its best."""

    best: float  # the setting that scored best
    low: float
    high: float
    open_low: bool  # the lowest setting tried is still inside
    open_high: bool

    @property
    def factors(self) -> float:
        """The width in factors of two: log2(high / low). A lower bound if an end is open."""
        return math.log2(self.high / self.low)

    @property
    def is_open(self) -> bool:
        return self.open_low or self.open_high


def stable_interval(
    scores: Mapping[float, float | None], part: float = 0.05, higher_is_better: bool = True
) -> Stable | None:
    """Return the interval around the best of the tried settings in which the score loses at most `part` of the best.

    `scores` has the mean score of each setting, which is positive; None if a run failed there. Between two settings the
    score is a straight line over the setting's logarithm, and the interval ends where that line crosses the limit

        best - part · |best|        or + if lower is better

    for the first time on each side. An end that lies beyond the settings tried is open, and counts as the last of them.
    A setting with a failure ends the interval at its neighbour. Returns None if no setting has a score.
    """
    sign = 1 if higher_is_better else -1
    tried = sorted(scores.items())
    known = [(sign * score, setting) for setting, score in tried if score is not None]
    if not known:
        return None
    best, setting = max(known, key=lambda entry: (entry[0], -entry[1]))
    limit = best - part * abs(best)
    place = [setting for setting, _ in tried].index(setting)
    signed = [(setting, None if score is None else sign * score) for setting, score in tried]
    low, open_low = _end(signed[place::-1], limit)
    high, open_high = _end(signed[place:], limit)
    return Stable(setting, low, high, open_low, open_high)


def _end(outwards: Sequence[tuple[float, float | None]], limit: float) -> tuple[float, bool]:
    """Return where scores fall below the limit, going outwards from the best, and whether they never do."""
    for (inner, inner_score), (outer, outer_score) in zip(outwards, outwards[1:]):
        if outer_score is None or inner_score is None:
            return inner, False
        if outer_score < limit:
            way = (inner_score - limit) / (inner_score - outer_score)
            return inner * (outer / inner) ** way, False
    return outwards[-1][0], True


# ---- what explains the variance ----


@dataclass(frozen=True)
class Explained:
    """How the variance of a score divides over the axes of a sweep."""

    shares: Mapping[str, float]  # axis -> eta squared, of the total sum of squares
    count: int  # runs

    @property
    def rest(self) -> float:
        """What the main effects leave: interactions and chance. Negative if the axes are so unbalanced that shares
        overlap."""
        return 1 - sum(self.shares.values())


def explained_variance(runs: Sequence[tuple[Mapping[str, str], float]], axes: Sequence[str]) -> Explained | None:
    """Return the main effect of each axis on the score: one-way eta², the sum of squares between its entries over the
    total sum of squares.

        eta² = Σ_entries n_entry (mean_entry - mean)² / Σ_runs (score - mean)²

    `runs` are (labels by axis, score). In a full grid, shares and rest add up to 1. None if all scores are equal.
    """
    mean = fmean(score for _, score in runs) if runs else 0.0
    total = math.fsum((score - mean) ** 2 for _, score in runs)
    if total <= 1e-24 * max(1.0, mean * mean):
        return None
    shares = {}
    for axis in axes:
        groups: dict[Hashable, list[float]] = {}
        for labels, score in runs:
            groups.setdefault(labels.get(axis), []).append(score)
        shares[axis] = math.fsum(len(group) * (fmean(group) - mean) ** 2 for group in groups.values()) / total
    return Explained(shares, len(runs))


# ---- trade-offs ----


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the places of the points that no other beats in both coordinates, larger being better, by the first."""
    best = -math.inf
    found = []
    for place in sorted(range(len(points)), key=lambda place: (-points[place][0], -points[place][1], place)):
        if points[place][1] > best:
            best = points[place][1]
            found.append(place)
    return found[::-1]
