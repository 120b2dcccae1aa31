"""Measures against NumPy and SciPy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from kdutils import metrics


def outputs(seed=0, n=400, classes=10, spread=2.0):
    """Logits (double precision) and labels that they know something of."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (n, classes))
    labels = rng.integers(classes, size=n)
    logits[np.arange(n), labels] += 1.5 * spread
    return logits, labels


def measure(logits, labels, **options):
    return metrics.classification(torch.tensor(logits), torch.tensor(labels), **options)


def reference_ece(logits, labels, bins=15):
    """Guo et al. 2017: the mean gap of accuracy and confidence, bin by bin, weighted by size."""
    p = special.softmax(logits, axis=1)
    confidence, right = p.max(1), p.argmax(1) == labels
    gaps = []
    for k in range(bins):
        inside = np.minimum(np.floor(confidence * bins), bins - 1) == k
        if inside.any():
            gaps.append(inside.mean() * abs(right[inside].mean() - confidence[inside].mean()))
    return sum(gaps)


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 10, 100]), st.floats(0.2, 2))
def test_classification_equals_independent_references(seed, classes, spread):
    logits, labels = outputs(seed, 200, classes, spread)
    found = measure(logits, labels)
    log_p = special.log_softmax(logits, axis=1)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
    assert found["nll"] == pytest.approx(-log_p[np.arange(200), labels].mean(), rel=1e-5)
    assert found["entropy"] == pytest.approx(stats.entropy(np.exp(log_p), axis=1).mean(), rel=1e-4)
    assert found["ece"] == pytest.approx(reference_ece(logits, labels), abs=1e-5)


def test_classification_at_a_temperature_is_of_the_divided_logits():
    logits, labels = outputs()
    expected = measure(logits / 4, labels)
    assert measure(logits, labels, temperature=4.0) == pytest.approx(expected, rel=1e-5)
    assert expected["accuracy"] == measure(logits, labels)["accuracy"]


def test_calibration_error_of_networks_whose_error_is_known():
    sure = np.array([[50.0, 0, 0]] * 10)
    assert measure(sure, np.zeros(10, int))["ece"] == 0  # always sure, always right
    assert measure(sure, np.ones(10, int))["ece"] == pytest.approx(1)  # always sure, always wrong
    half = np.log([[0.75, 0.25]] * 8)
    assert measure(half, np.array([0] * 6 + [1] * 2))["ece"] == pytest.approx(0, abs=1e-6)
    assert measure(half, np.array([0] * 4 + [1] * 4))["ece"] == pytest.approx(0.25)


def test_confidences_of_exactly_1_have_a_bin_of_their_own_as_methods_says():
    logits, labels = np.array([[40.0, 0], [3.5, 0]]), np.array([1, 0])  # wrong at 1, right at 0.97
    certain, unsure = 1.0, 1 / (1 + np.exp(-3.5))
    expected = (abs(0 - certain) + abs(1 - unsure)) / 2
    assert measure(logits, labels)["ece"] == pytest.approx(expected, abs=1e-5)


def test_the_16th_bin_changes_nothing_where_the_network_is_too_sure():
    logits, labels = outputs(spread=2.0)
    logits *= 8  # as a network is that was trained for long: many confidences are exactly 1
    single = special.softmax(logits.astype(np.float32), axis=1).max(1)
    assert 0.1 < (single == 1).mean() < 0.9
    assert measure(logits, labels)["ece"] == pytest.approx(reference_ece(logits, labels), abs=1e-5)


def test_entropy_is_between_none_and_that_of_guessing():
    assert metrics.mean_entropy(torch.zeros(3, 100)) == pytest.approx(np.log(100))
    assert metrics.mean_entropy(torch.eye(3) * 1000) == pytest.approx(0, abs=1e-6)
    stacked = torch.tensor(outputs()[0]).reshape(4, 100, 10)
    expected = stats.entropy(special.softmax(stacked.numpy() / 3, axis=-1), axis=-1).mean()
    assert metrics.mean_entropy(stacked, 3.0) == pytest.approx(expected)


def test_logits_of_low_precision_are_measured_in_single_precision():
    logits, labels = (torch.tensor(a) for a in outputs())
    logits = logits.to(torch.bfloat16)
    found = metrics.classification(logits, labels)
    assert found["nll"] == pytest.approx(float(F.cross_entropy(logits.double(), labels)), rel=1e-5)


def test_fidelity_is_agreement_and_the_divergence_from_the_teacher():
    teacher, student = np.log([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]), np.log([[0.6, 0.3, 0.1]] * 2)
    found = metrics.fidelity(torch.tensor(student), torch.tensor(teacher))
    p, q = np.exp(teacher), np.exp(student)
    assert found["agreement"] == 0.5
    assert found["kl"] == pytest.approx(special.rel_entr(p, q).sum(1).mean(), abs=1e-6)
    assert metrics.fidelity(torch.tensor(teacher), torch.tensor(teacher))["kl"] == pytest.approx(0)
