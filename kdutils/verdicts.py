"""From numbers, one a seed, to what they say: intervals, words, Holm's correction.

Knows numbers alone: no claims' texts, records or tensors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, mean, stdev

import scipy  # its parts are imported when they are first used

REPLICATED, SMALLER = "replicated", "replicated, smaller"
NO_EFFECT, REVERSED, INCONCLUSIVE = "no effect", "reversed", "inconclusive"
WORDS = (REVERSED, NO_EFFECT, INCONCLUSIVE, SMALLER, REPLICATED)  # the weakest first
KINDS = ("above", "below", "at most", "at least", "within", "every above", "every below")


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` seeds with its confidence interval, NaN where n < 2."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval for the mean of ``values``, one a seed.

    Sums are exact, so that equal values have no spread and the order of seeds does not matter.
    """
    values = [float(value) for value in values]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"there is no interval for values that are not finite: {values}")
    n = len(values)
    if n < 2:
        return Interval(values[0] if values else math.nan, math.nan, math.nan, n)
    half = float(scipy.stats.t.ppf((1 + confidence) / 2, n - 1)) * stdev(values) / math.sqrt(n)
    return Interval(mean(values), mean(values) - half, mean(values) + half, n)


@dataclass(frozen=True)
class Rule:
    """What has to hold of a quantity's values, fixed before they are known.

    ``kind`` is one of :data:`KINDS`. ``margin`` is the smallest effect that would matter and
    ``effect`` the paper's, both counted from ``bound`` towards the claimed side in the quantity's
    unit. ``within`` lies between ``bound`` and ``upper``. A ``ratio`` is judged on its logarithm.
    """

    kind: str
    bound: float
    margin: float | None = None
    effect: float | None = None
    upper: float | None = None
    ratio: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}; kinds: {', '.join(KINDS)}")

    @property
    def side(self) -> int:
        """1 where greater values support the claim, −1 where smaller ones do."""
        return -1 if self.kind in ("below", "at most", "every below") else 1

    def scaled(self, value: float) -> float:
        """A value of the quantity on the scale on which it is judged."""
        if self.ratio and value <= 0:
            raise ValueError(f"a ratio of {value} has no logarithm")
        return math.log(value) if self.ratio else float(value)

    def beyond(self, value: float) -> float:
        """How far a value lies beyond the bound, towards the claimed side, as it is judged."""
        return self.side * (self.scaled(value) - self.scaled(self.bound))

    def reach(self, distance: float) -> float:
        """The value that lies ``distance`` (of the quantity's unit) beyond the bound."""
        return self.bound + self.side * distance


@dataclass(frozen=True)
class Verdict:
    """A word, the mean with its 95 % interval over ``n`` seeds, and p against the bound.

    For ``every`` the interval is the range of the seeds. ``lead`` is the mean's distance beyond the
    bound as it is judged; ``effect_excluded`` says whether the interval leaves out the paper's
    effect. What was not given, or cannot be had, is None.
    """

    word: str | None
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    p: float | None = None
    lead: float = 0.0
    effect_excluded: bool | None = None
    part: str = ""


def judge(rule: Rule, values: Sequence[float], confidence: float = 0.95) -> Verdict:
    """The word for ``values``, one a seed, by ``rule``; None for fewer than two seeds.

    ``above``, ``below``: *replicated* where the whole interval is beyond the bound (*smaller* where
    it ends short of the paper's effect), *reversed* where all of it is on the other side, *no
    effect* where it ends short of the margin. ``at most``, ``at least``, ``within``: *replicated*
    where the whole interval is inside, *reversed* where it is outside. ``every``: by the seeds
    themselves. Otherwise *inconclusive*.
    """
    if len(values) < 2:
        return Verdict(None, n=len(values))
    scaled, every = [rule.scaled(v) for v in values], rule.kind.startswith("every")
    found = interval(scaled, confidence)
    low, high = (min(scaled), max(scaled)) if every else (found.low, found.high)
    start = rule.scaled(rule.bound)
    near, far = sorted((rule.side * (low - start), rule.side * (high - start)))
    effect = None if rule.effect is None else rule.beyond(rule.reach(rule.effect))
    if rule.kind in ("above", "below"):
        word, p = _one_sided(rule, near, far, effect), _p(scaled, start)
    else:
        end = rule.scaled(rule.upper) if rule.kind == "within" else math.inf
        inside = near > 0 if every else near >= 0 and high <= end
        outside = far <= 0 if every else far < 0 or low > end
        word, p = REPLICATED if inside else REVERSED if outside else INCONCLUSIVE, None
    numbers = [math.exp(x) if rule.ratio else x for x in (found.mean, low, high)]
    lead = rule.side * (found.mean - start)
    excluded = None if effect is None else not near <= effect <= far
    return Verdict(word, *numbers, len(values), p, lead, excluded)


def _one_sided(rule: Rule, near: float, far: float, effect: float | None) -> str:
    if near > 0:
        return SMALLER if effect is not None and far < effect else REPLICATED
    if far < 0:
        return REVERSED
    return NO_EFFECT if rule.margin and far < rule.beyond(rule.reach(rule.margin)) else INCONCLUSIVE


def _p(values: Sequence[float], bound: float) -> float:
    """Two-sided p of Student's t for the mean being the bound."""
    if len(set(values)) == 1:
        return float(values[0] == bound)
    return float(scipy.stats.ttest_1samp(values, bound).pvalue)


def weakest(parts: Mapping[str, Verdict], need: int | None = None) -> Verdict:
    """A claim of several parts: as its weakest part, or as the ``need``-th strongest of them.

    It keeps that part's numbers and its name; p is the largest, or the ``need``-th smallest times
    the number of parts. A reversed claim is so by that part and those behind it: p is the largest
    of theirs, times the number of parts. No word while a part has none.
    """
    named = [replace(verdict, part=name) for name, verdict in parts.items()]
    if any(verdict.word is None for verdict in named):
        return min(named, key=lambda v: v.n if v.word is None else math.inf)
    ordered = sorted(named, key=lambda v: (-WORDS.index(v.word), -v.lead))
    chosen, *behind = ordered[(need or len(named)) - 1 :]
    if any(verdict.p is None for verdict in named):
        return chosen
    lost, place = chosen.word == REVERSED, len(named) - len(behind) - 1
    p = max(v.p for v in [chosen, *behind]) if lost else sorted(v.p for v in named)[place]
    return replace(chosen, p=min(1.0, p * (len(named) if need or lost else 1)))


def holm(ps: Mapping[str, float], level: float = 0.05) -> dict[str, bool]:
    """Which of these p survive Holm's correction (Holm 1979): by name, in the order given."""
    passed = {}
    for tried, name in enumerate(sorted(ps, key=ps.get)):
        passed[name] = all(passed.values()) and ps[name] <= level / (len(ps) - tried)
    return {name: passed[name] for name in ps}


def seeds_needed(rule: Rule, values: Sequence[float], confidence: float = 0.95) -> int | None:
    """How many seeds of this spread would decide.

    ``above`` and ``below``: as many as make the interval no wider than the margin, for then it
    cannot hold both the bound and the margin. ``at most``, ``at least``, ``within``: as many as
    take the nearest bound out of it, if the mean stays where it is. None for ``every``, which more
    seeds cannot decide, and where there is no spread, no margin or no distance to go by.
    """
    if len(values) < 2 or rule.kind.startswith("every"):
        return None
    scaled = [rule.scaled(v) for v in values]
    half = abs(rule.beyond(rule.reach(rule.margin or 0))) / 2
    if rule.kind not in ("above", "below"):
        half = min(abs(mean(scaled) - rule.scaled(x)) for x in {rule.bound, rule.upper} - {None})
    if not half:
        return None
    n = max(2, int((NormalDist().inv_cdf((1 + confidence) / 2) * stdev(scaled) / half) ** 2))
    while scipy.stats.t.ppf((1 + confidence) / 2, n - 1) * stdev(scaled) / math.sqrt(n) > half:
        n += 1
    return n
