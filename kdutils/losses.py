"""Knowledge terms: plain functions of tensors. They know no devices, teachers or data."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from scipy.special import entr


def kd(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 4.0) -> torch.Tensor:
    """Hinton's knowledge distillation (Hinton, Vinyals, Dean 2015, section 2).

    T² · KL(softmax(teacher / T) ‖ softmax(student / T)), in nats, **summed over the classes** and
    averaged over the batch. Averaging over the classes as well would be too small by a factor C.

    Parameters: ``student`` and ``teacher`` logits, both (B, C); ``temperature`` T > 0.
    Returns a 0-d tensor; its gradient with respect to the logits keeps its size as T grows.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"logits differ: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def distillation(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 4.0,
    alpha: float = 0.9,
) -> torch.Tensor:
    """α · :func:`kd` + (1 − α) · cross-entropy with the labels (B,); a 0-d tensor, in nats."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must lie between 0 and 1")
    hard = F.cross_entropy(student, labels)
    return alpha * kd(student, teacher, temperature) + (1 - alpha) * hard


def smoothed_logits(labels: torch.Tensor, classes: int, epsilon: float) -> torch.Tensor:
    """Log-probabilities (B, C) of smoothed labels: 1 − ε on the label, plus ε / C on every class.

    (Szegedy et al. 2016, section 7.) At temperature 1 they stand in for a teacher's logits that
    knows how soft to be and nothing of how classes resemble each other.
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon is {epsilon}; it must lie between 0 and 1")
    return torch.log(F.one_hot(labels, classes) * (1 - epsilon) + epsilon / classes)


def smoothing_for_entropy(entropy: float, classes: int) -> float:
    """The ε whose smoothed labels over ``classes`` classes have this entropy (nats)."""

    def excess(epsilon):
        rest = epsilon / classes
        return entr(1 - epsilon + rest) + (classes - 1) * entr(rest) - entropy

    if not 0 < entropy < np.log(classes):
        raise ValueError(f"entropy is {entropy}; it must lie between 0 and {np.log(classes):.4f}")
    return float(brentq(excess, 0.0, 1.0))


def temperature_for_entropy(logits: np.ndarray, entropy: float) -> float:
    """The temperature at which softmax(logits / T), logits (N, C), has this mean entropy (nats)."""
    logits = torch.as_tensor(logits, dtype=torch.float64)

    def excess(log_temperature):
        scaled = logits / np.exp(log_temperature)
        return float(torch.distributions.Categorical(logits=scaled).entropy().mean()) - entropy

    try:
        return float(np.exp(brentq(excess, np.log(0.01), np.log(1000.0))))
    except ValueError:
        raise ValueError(f"no temperature gives these logits a mean entropy of {entropy}") from None
