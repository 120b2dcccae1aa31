"""Rates: how often people are recognised and strangers let in, by how many are enrolled.

NumPy and SciPy, for the study; the device reads what comes of it.
"""

from collections.abc import Sequence

import numpy as np

from kdutils.concierge.deciding import MOST, Level

ENROLLED = 2  # clips by which somebody is enrolled here


def rows(values: np.ndarray) -> np.ndarray:
    """Vectors (N, D) at length 1."""
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def threshold_for(scores, share: float) -> float:
    """The score that at most this share of strangers' scores (N,) lie above."""
    return float(np.quantile(np.asarray(scores), 1 - share, method="higher"))


def few_enough(count: int, share: float) -> float:
    """The share of ``count`` people let in whose 95 % interval still ends below ``share``.

    Two-sided, exact (Clopper and Pearson 1934); 0 where even nobody of so few would not do.
    """
    from scipy.stats import beta

    tops = beta.ppf(0.975, np.arange(count) + 1, count - np.arange(count))
    return max(int((tops <= share).sum()) - 1, 0) / count


def trials(
    embeddings: np.ndarray, people: np.ndarray, size: int, clips: int, rounds: int = 40
) -> dict[str, np.ndarray]:
    """What cosines come out where ``size`` of these people, drawn anew each round, are enrolled.

    ``embeddings`` (N, D) are of clips of ``people`` (N,). A look is the mean of so many clips.
    ``strangers`` holds the largest cosine of each look at somebody else, ``own`` the largest one of
    each look at somebody enrolled, and ``right`` whether that is the person's own.
    """
    rng, found = np.random.default_rng([size, clips]), {"strangers": [], "own": [], "right": []}
    for _ in range(rounds):
        order = rng.permutation(np.unique(people))
        of_whom = {k: embeddings[rng.permutation(np.flatnonzero(people == k))] for k in order}
        gallery = rows(np.array([of_whom[k][:ENROLLED].mean(0) for k in order[:size]]))
        for place, who in enumerate(order):
            rest = of_whom[who][ENROLLED * (place < size) :]
            whole = len(rest) // clips
            looks = rows(rest[: whole * clips].reshape(whole, clips, rest.shape[1]).mean(1))
            cosines = looks @ gallery.T
            found["own" if place < size else "strangers"] += cosines.max(1).tolist()
            found["right"] += (cosines.argmax(1) == place).tolist() if place < size else []
    return {name: np.array(values) for name, values in found.items()}


def levels(embeddings, people, sizes: Sequence[int], share: float) -> list[Level]:
    """A level for each number of enrolled people, by one clip and by several.

    As many strangers as are let in for sure at most with this share, see :func:`few_enough`, are
    not refused; half of them are taken for somebody, the others leave the program unsure, unless
    that would cost more than 5 % of looks at enrolled people.
    """
    found = []
    for size in sizes:
        allowed = few_enough(len(np.unique(people)) - size, share)
        for clips in (1, MOST):
            tried = trials(embeddings, people, size, clips)
            if not len(tried["own"]):  # nobody has so many clips left
                continue
            low = threshold_for(tried["strangers"], allowed)
            between = np.sort(tried["own"][tried["own"] > low])[: int(0.05 * len(tried["own"])) + 1]
            halved = threshold_for(tried["strangers"], allowed / 2)
            found.append(Level(size, clips, low, min(halved, max(between, default=low))))
    return found


def measured(embeddings, people, these: Sequence[Level]) -> dict[str, dict]:
    """Shares by these levels, named ``<people>x<clips>``: recognised, unsure of, let in."""
    found = {}
    for level in these:
        tried = trials(embeddings, people, int(level.people), int(level.clips))
        if not len(tried["own"]):
            continue
        sure, passed = tried["own"] > level.person, tried["own"] > level.stranger
        found[f"{level.people:g}x{level.clips:g}"] = {
            "recognised": float((sure & tried["right"]).mean()),
            "unsure": float((passed & ~sure).mean()),
            "let_in": float((tried["strangers"] > level.person).mean()),
            "not_refused": float((tried["strangers"] > level.stranger).mean()),
        }
    return found
