"""What is measured on a network's logits: accuracy, calibration, entropy."""

import torch
import torch.nn.functional as F

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
