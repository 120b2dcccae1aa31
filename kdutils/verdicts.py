"""From numbers, one a seed, to what they say: intervals, paired comparisons, verdicts."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` seeds with its confidence interval, NaN where n < 2."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        span = "" if math.isnan(self.low) else f" [{self.low:+.4f}, {self.high:+.4f}]"
        return "–" if math.isnan(self.mean) else f"{self.mean:+.4f}{span}"


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval for the mean of ``values``, one a seed."""
    from scipy import stats

    values = np.asarray(values, float)
    if not np.isfinite(values).all():
        raise ValueError(f"there is no interval for values that are not finite: {values}")
    if len(values) < 2:
        mean = float(values[0]) if len(values) else np.nan
        return Interval(mean, np.nan, np.nan, len(values))
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values)
    return Interval(values.mean(), values.mean() - half, values.mean() + half, len(values))


def paired(a: pd.Series, b: pd.Series) -> pd.Series:
    """a − b, seed by seed; both are indexed by seed, and seeds that only one of them has drop."""
    return (a - b).dropna()


def of_all(values: pd.Series, seeds: Sequence[int]) -> pd.Series:
    """``values``, indexed by seed, if each of ``seeds`` has one; otherwise none of them."""
    return values if set(values.index) == set(seeds) else values[:0]


REPLICATED, NOT_REPLICATED, INCONCLUSIVE = "replicated", "not replicated", "inconclusive"
ORDER = [None, NOT_REPLICATED, INCONCLUSIVE, REPLICATED]  # the weakest first


@dataclass(frozen=True)
class Verdict:
    """A claim's estimate with its 95 % interval over seeds, and what follows from it."""

    estimate: float | None
    low: float | None
    high: float | None
    seeds: int
    verdict: str | None

    def as_dict(self) -> dict:
        """Plain numbers, rounded where their digits stop meaning anything, None for no record."""
        rounded = {
            k: v if v is None else round(float(v), 6)
            for k, v in asdict(self).items()
            if k in ("estimate", "low", "high")
        }
        return asdict(self) | rounded | {"seeds": self.seeds or None}

    def __str__(self) -> str:
        if self.estimate is None:
            return "–"
        return f"{self.estimate:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


NO_RECORD = Verdict(None, None, None, 0, None)


def verdict(values: Sequence[float], test: str = "> 0") -> Verdict:
    """Judge the claim that the mean of ``values`` (one a seed) is on one side of a bound.

    ``test`` is ``"> bound"`` or ``"< bound"``. Replicated: the whole interval is on the claimed
    side. Not replicated: the whole interval is on the other side. Otherwise inconclusive. Fewer
    than two seeds give no verdict.
    """
    side, bound = _parse(test)
    found = interval(values)
    if found.n < 2:
        return NO_RECORD
    low, high = sorted((side * (found.low - bound), side * (found.high - bound)))
    word = REPLICATED if low > 0 else NOT_REPLICATED if high < 0 else INCONCLUSIVE
    return Verdict(found.mean, found.low, found.high, found.n, word)


def verdict_every_seed(values: Sequence[float], test: str = "< 0") -> Verdict:
    """Judge the claim that every seed's value passes ``test``: replicated if all do, else not.

    Its ``low`` and ``high`` are the smallest and the largest value, since a claim about every seed
    is not one about their mean.
    """
    side, bound = _parse(test)
    found = interval(values)
    if found.n < 2:
        return NO_RECORD
    passed = all(side * (value - bound) > 0 for value in values)
    word = REPLICATED if passed else NOT_REPLICATED
    return Verdict(found.mean, min(values), max(values), found.n, word)


def verdict_not_worse(values: Sequence[float], bound: float) -> Verdict:
    """Judge the claim that the mean is not above ``bound``: refuted only if the interval is."""
    found = interval(values)
    if found.n < 2:
        return NO_RECORD
    word = REPLICATED if found.low <= bound else NOT_REPLICATED
    return Verdict(found.mean, found.low, found.high, found.n, word)


def verdict_all(verdicts: Sequence[Verdict], side: str = ">") -> Verdict:
    """Judge a claim that needs several others: as its weakest, whose numbers it shows.

    Not replicated if any is not, replicated if all are, otherwise inconclusive; no verdict while
    any has no record. Of equally weak ones it shows the smallest estimate, or the largest where the
    claims are on ``side`` ``"<"`` of a bound.
    """
    sign = 1 if side == ">" else -1
    return min(verdicts, key=lambda v: (ORDER.index(v.verdict), sign * (v.estimate or 0)))


def _parse(test: str) -> tuple[int, float]:
    side, _, bound = test.partition(" ")
    try:
        if side in ("<", ">") and math.isfinite(float(bound)):
            return (1 if side == ">" else -1), float(bound)
    except ValueError:
        pass
    raise ValueError(f"test is {test!r}; it must read like '> 0' or '< 0.01'")
