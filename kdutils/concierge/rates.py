"""Rates: how often people are recognised and strangers let in, by how many are enrolled.

NumPy and SciPy, for the study; the device reads what comes of it.
"""

from collections.abc import Sequence

import numpy as np

from kdutils.concierge.deciding import MOST, Level
from kdutils.concierge.people import unit

ENROLLED = 2  # clips by which somebody is enrolled here


def threshold_for(scores, share: float) -> float:
    """The score that at most this share of strangers' scores (N,) lie above."""
    return float(np.quantile(np.asarray(scores), 1 - share, method="higher"))


def upper(share, count: int):
    """The upper end of a share's 95 % interval, of ``count`` people (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    return beta.ppf(0.975, np.asarray(share) * count + 1, count - np.asarray(share) * count)


def few_enough(count: int, share: float) -> float:
    """The largest share of ``count`` people whose interval still ends below ``share``, or 0.

    Of fewer than about 72 people nobody let in is still no proof of a share of 5 %.
    """
    shares = np.arange(count) / count
    return max(shares[upper(shares, count) <= share], default=0.0)


def alike(embeddings: np.ndarray, people: np.ndarray) -> np.ndarray:
    """Cosines (N,) of each clip with the mean of its person's other clips."""
    found = []
    for who in np.unique(people):
        own = embeddings[people == who]
        found += (unit(own.sum(0) - own) * unit(own)).sum(1).tolist()
    return np.array(found)


def trials(
    embeddings: np.ndarray, people: np.ndarray, size: int, clips: int, rounds: int = 0, shown=None
) -> dict[str, np.ndarray]:
    """What cosines come out where ``size`` of these people, drawn anew each round, are enrolled.

    ``embeddings`` (N, D) are of clips of ``people`` (N,). A look is the mean of so many clips.
    ``strangers`` holds the largest cosine of each look at somebody else, ``own`` the largest one of
    each look at somebody enrolled, and ``right`` whether that is the person's own. ``shown`` (N, D)
    are embeddings that looks are of in place of the clips', so of the same clips seen otherwise.
    """
    rng, found = np.random.default_rng([size, clips]), {"strangers": [], "own": [], "right": []}
    for _ in range(rounds or max(40, 400 // size)):
        order = rng.permutation(np.unique(people))
        at = {k: rng.permutation(np.flatnonzero(people == k)) for k in order}
        gallery = unit(np.array([embeddings[at[k][:ENROLLED]].mean(0) for k in order[:size]]))
        for place, who in enumerate(order):
            rest = (embeddings if shown is None else shown)[at[who][ENROLLED * (place < size) :]]
            whole = len(rest) // clips
            looks = unit(rest[: whole * clips].reshape(whole, clips, rest.shape[1]).mean(1))
            cosines = looks @ gallery.T
            found["own" if place < size else "strangers"] += cosines.max(1).tolist()
            found["right"] += (cosines.argmax(1) == place).tolist() if place < size else []
    return {name: np.array(values) for name, values in found.items()}


def levels(embeddings, people, sizes: Sequence[int], share: float) -> list[Level]:
    """A level for each number of enrolled people, by one clip and by several.

    At most :func:`few_enough` of strangers' looks are above ``stranger``, and half as many above
    ``person``; in between the program is unsure, of at most 5 % of looks at enrolled people.
    """
    found, allowed = [], few_enough(len(np.unique(people)), share)
    for size in sizes:
        for clips in range(1, MOST + 1):
            tried = trials(embeddings, people, size, clips)
            if not len(tried["own"]):  # nobody has so many clips left
                continue
            low = threshold_for(tried["strangers"], allowed)
            between = np.sort(tried["own"][tried["own"] > low])[: int(0.05 * len(tried["own"]))]
            halved = threshold_for(tried["strangers"], allowed / 2)
            found.append(Level(size, clips, low, min(halved, max(between, default=low))))
    return found


def measured(embeddings, people, these: Sequence[Level], shown=None) -> dict[str, dict]:
    """Shares by these levels, named ``<people>x<clips>``: recognised, misnamed, unsure of, let in.

    Arguments are those of :func:`trials`. ``let_in_at_most`` is the upper end of the last one's
    interval, people taken as the sample.
    """
    found = {}
    for level in these:
        tried = trials(embeddings, people, int(level.people), int(level.clips), shown=shown)
        if not len(tried["own"]):
            continue
        sure, passed = tried["own"] > level.person, tried["own"] > level.stranger
        found[f"{level.people:g}x{level.clips:g}"] = {
            "recognised": float((sure & tried["right"]).mean()),
            "misnamed": float((sure & ~tried["right"]).mean()),
            "unsure": float((passed & ~sure).mean()),
            "let_in": (let_in := float((tried["strangers"] > level.person).mean())),
            "let_in_at_most": float(upper(let_in, len(np.unique(people)))),
        }
    return found
