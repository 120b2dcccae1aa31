"""What is measured on a network: accuracy, calibration, entropy of logits; geometry of features."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats

from kdutils import _torchvision  # noqa: F401 - torchmetrics imports torchvision, after this


def classification(logits, labels, temperature: float = 1.0) -> dict[str, float]:
    """Accuracy, cross-entropy (nats), expected calibration error (15 bins), mean entropy (nats).

    ``logits`` is a tensor (N, C), ``labels`` a tensor (N,). Probabilities are
    softmax(logits / temperature).
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits = logits.float() / temperature
    probabilities = logits.softmax(1)
    ece = multiclass_calibration_error(probabilities, labels, logits.shape[1], n_bins=15)
    return {
        "accuracy": float((logits.argmax(1) == labels).float().mean()),
        "nll": float(F.cross_entropy(logits, labels)),
        "ece": float(ece),
        "entropy": mean_entropy(logits),
    }


def mean_entropy(logits, temperature: float = 1.0) -> float:
    """Mean entropy (nats) of softmax(logits / temperature); ``logits`` is a tensor (..., C)."""
    return float(torch.distributions.Categorical(logits=logits / temperature).entropy().mean())


def fidelity(student, teacher) -> dict[str, float]:
    """How far a student (N, C) answers as its teacher (N, C) does, both logits.

    ``agreement`` is the share of pictures on which both name the same class, ``kl`` the mean
    KL(teacher ‖ student) in nats (Stanton et al. 2021, section 3).
    """
    log_student, log_teacher = (x.float().log_softmax(1) for x in (student, teacher))
    kl = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    same = student.argmax(1) == teacher.argmax(1)
    return {"agreement": float(same.float().mean()), "kl": float(kl)}


def class_similarity(features, labels) -> np.ndarray:
    """Cosines (C, C) between class centres, measured from the centres' mean.

    ``features`` (N, D) and ``labels`` (N,) of test pictures; rows and columns are the C classes
    that occur, in ascending order. A centre at the mean has no direction and gets zeros.
    """
    _, members, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sums = np.eye(len(counts))[:, members] @ np.asarray(features, dtype=float)
    centres = _centred(sums / counts[:, None])
    length = np.linalg.norm(centres, axis=1, keepdims=True)
    unit = centres / np.where(length > 0, length, np.inf)
    return unit @ unit.T


def similarity_kept(student: np.ndarray, teacher: np.ndarray) -> dict[str, float]:
    """How well a student's class similarities (C, C) agree with its teacher's.

    ``pearson`` and ``spearman`` are correlations over the pairs of different classes, nan where
    one side is constant; ``frobenius`` is ‖S_t − S_s‖_F / ‖S_t‖_F of the whole matrices. Only the
    correlations are blind to a shift or scale of all similarities.
    Raises ValueError when the shapes differ or there are fewer than three classes.
    """
    if student.shape != teacher.shape or len(teacher) < 3:
        shapes = f"student {student.shape}, teacher {teacher.shape}"
        raise ValueError(f"needs the same three or more classes on both sides: {shapes}")
    ours, theirs = (m[np.triu_indices(len(teacher), 1)] for m in (student, teacher))
    return {
        "pearson": float(stats.pearsonr(ours, theirs).statistic),
        "spearman": float(stats.spearmanr(ours, theirs).statistic),
        "frobenius": float(np.linalg.norm(teacher - student) / np.linalg.norm(teacher)),
    }


def specificity(student: np.ndarray, teacher: np.ndarray, strangers) -> dict[str, float]:
    """How far a student's class similarities (C, C) are its own teacher's, not any network's.

    ``strangers`` are the class similarities of one or more teachers that it never met. Of Pearson's
    correlations, as in :func:`similarity_kept`: ``strangers`` is the mean of those with them;
    ``specificity`` is that with its own teacher less this mean (of a copy of the teacher 1 less it,
    and 0 to expect where student and teacher share only what all networks share); ``partial`` is
    the same of partial correlations, given the mean of the other strangers: that with its own
    teacher less that with a stranger, as a mean over strangers. Its own teacher alone would not do,
    for few strangers show what all share only roughly, and what they leave of it would count. It is
    nan with one stranger, and where what all share explains one side wholly.
    Raises ValueError without strangers, when shapes differ, or for fewer than three classes.
    """
    if not len(strangers):
        raise ValueError("strangers is empty; it must hold at least one teacher's similarities")

    def correlation(one, other):
        return similarity_kept(one, other)["pearson"]

    def beyond(one, other, usual):
        r, a, b = correlation(one, other), correlation(one, usual), correlation(other, usual)
        return (r - a * b) / left**0.5 if (left := (1 - a**2) * (1 - b**2)) > 1e-12 else np.nan

    own, others = correlation(student, teacher), [correlation(student, one) for one in strangers]
    apart = [np.nan] * (len(strangers) == 1)
    for k in range(len(strangers) * (len(strangers) > 1)):
        usual = np.delete(np.asarray(strangers), k, 0).mean(0)
        apart += [beyond(student, teacher, usual) - beyond(student, strangers[k], usual)]
    mean = float(np.mean(others))
    return {"strangers": mean, "specificity": own - mean, "partial": float(np.mean(apart))}


def linear_cka(student, teacher) -> float:
    """Linear centred kernel alignment of features (N, D_s) and (N, D_t) (Kornblith et al. 2019).

    ‖XᵀY‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) of column-centred features: 1 for a rotated, shifted or scaled
    copy, in [0, 1] always, nan where all rows of one are equal. Biased upwards unless N is much
    larger than the widths, so compare it only between equal N.
    Raises ValueError when the numbers of rows differ.
    """
    x, y = (_centred(np.asarray(features, dtype=float)) for features in (student, teacher))
    if len(x) != len(y):
        raise ValueError(f"student has {len(x)} rows, teacher {len(y)}")
    scale = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(x.T @ y) ** 2 / scale) if scale else float("nan")


def retrieval(features, labels) -> dict[str, float]:
    """How well pictures of one class find one another: ``recall_at_1`` and ``map``, in [0, 1].

    Every picture asks once and ranks all others by the cosine of their features (N, D); those with
    its own label (N,) are hits. ``recall_at_1`` is the share of pictures whose first is a hit;
    ``map`` the mean over pictures of the average precision (the mean, over hits, of the share of
    hits up to there). A picture alone in its class does not ask. Equal cosines keep the pictures'
    order. Raises ValueError where all are alone in their class.
    """
    unit = F.normalize(torch.as_tensor(features, dtype=torch.float32))
    labels, places = torch.as_tensor(labels), torch.arange(1, len(unit))
    first, precise = [], []
    for rows in torch.arange(len(unit)).split(500):  # all cosines at once would be large
        cosines = unit[rows] @ unit.T
        cosines[torch.arange(len(rows)), rows] = -torch.inf  # nobody's own answer: ranked last
        order = cosines.argsort(dim=1, descending=True, stable=True)[:, :-1]
        hits = (labels[order] == labels[rows, None]).float()
        asking = hits.sum(1) > 0
        precision = (hits.cumsum(1) / places * hits).sum(1) / hits.sum(1)
        first.append(hits[asking, 0])
        precise.append(precision[asking])
    if not len(torch.cat(first)):
        raise ValueError("no two pictures share a label")
    return {"recall_at_1": float(torch.cat(first).mean()), "map": float(torch.cat(precise).mean())}


def _centred(rows: np.ndarray) -> np.ndarray:
    """Rows less their mean; what rounding leaves of a row equal to it is zero."""
    moved = rows - rows.mean(axis=0)
    length = np.linalg.norm(moved, axis=1, keepdims=True)
    noise = 1e-12 * np.linalg.norm(rows, axis=1).max()
    return np.where(length > noise, moved, 0.0)
