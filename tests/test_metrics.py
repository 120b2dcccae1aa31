"""Measures against NumPy and SciPy; verdicts, word by word."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import special, stats

from kdutils import metrics, verdicts
from kdutils.verdicts import INCONCLUSIVE, NOT_REPLICATED, REPLICATED, Verdict


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


# ---------------------------------------------------------------------------------- intervals

values = st.lists(st.floats(-10, 10), min_size=2, max_size=8)


@given(values, st.floats(0.5, 0.99))
def test_interval_is_students(x, confidence):
    found = verdicts.interval(x, confidence)
    assert found.n == len(x)
    assert found.mean == pytest.approx(np.mean(x), abs=1e-12)
    error = np.std(x, ddof=1) / np.sqrt(len(x))
    if error < 1e-9:
        assert found.low == pytest.approx(found.high, abs=1e-6)
        return
    low, high = stats.t.interval(confidence, len(x) - 1, loc=np.mean(x), scale=error)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)


def test_interval_of_fewer_than_two_is_nan():
    one, none = verdicts.interval([0.7]), verdicts.interval([])
    assert (one.mean, one.n, none.n) == (0.7, 1, 0)
    assert np.isnan([one.low, one.high, none.mean, none.low, none.high]).all()


def test_paired_subtracts_by_seed_and_drops_seeds_of_only_one():
    a = pd.Series({2: 0.9, 0: 0.5, 1: 0.7, 7: 9.0})
    b = pd.Series({0: 0.1, 1: 0.2, 2: 0.3, 8: 9.0})
    assert verdicts.paired(a, b).to_dict() == pytest.approx({0: 0.4, 1: 0.5, 2: 0.6})


# ----------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("x", "test", "word"),
    [
        ([1.0, 1.1, 0.9], "> 0", REPLICATED),
        ([-1.0, -1.1, -0.9], "> 0", NOT_REPLICATED),
        ([1.0, -1.1, 0.9], "> 0", INCONCLUSIVE),
        ([1.0, 1.1, 0.9], "< 0", NOT_REPLICATED),
        ([-1.0, -1.1, -0.9], "< 0", REPLICATED),
        ([1.0, -1.1, 0.9], "< 0", INCONCLUSIVE),
        ([1.0, 1.1, 0.9], "> 2", NOT_REPLICATED),
        ([1.0, 1.1, 0.9], "> 1.05", INCONCLUSIVE),
        ([1.0, 1.1, 0.9], "< 2", REPLICATED),
        ([-0.2, -0.21, -0.19], "> -0.3", REPLICATED),
        ([0.0, 0.0, 0.0], "> 0", INCONCLUSIVE),
        ([0.0, 0.0, 0.0], "< 0", INCONCLUSIVE),
    ],
)
def test_verdict_is_the_side_of_the_whole_interval(x, test, word):
    found = verdicts.verdict(x, test)
    assert found.verdict == word
    expected = verdicts.interval(x)
    numbers = (found.estimate, found.low, found.high, found.seeds)
    assert numbers == (expected.mean, expected.low, expected.high, 3)


@given(values, st.floats(-5, 5))
def test_moving_all_values_across_the_bound_turns_the_verdict(x, bound):
    x = np.array(x) - np.mean(x)
    half = verdicts.interval(x).high
    assume(half > 1e-6)
    words = [
        verdicts.verdict(x + bound + shift * half, f"> {bound}").verdict
        for shift in (-3, -1.01, -0.99, 0, 0.99, 1.01, 3)
    ]
    assert words == [NOT_REPLICATED] * 2 + [INCONCLUSIVE] * 3 + [REPLICATED] * 2


@given(values, st.floats(-5, 5))
def test_below_is_the_mirror_of_above(x, bound):
    above, below = verdicts.verdict(x, f"> {bound}"), verdicts.verdict(-np.array(x), f"< {-bound}")
    assert above.verdict == below.verdict
    assert (above.low, above.high) == (-below.high, -below.low)
    opposite = {REPLICATED: NOT_REPLICATED, NOT_REPLICATED: REPLICATED, INCONCLUSIVE: INCONCLUSIVE}
    assert verdicts.verdict(x, f"< {bound}").verdict == opposite[above.verdict]


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=8), st.integers(-20, 20))
def test_the_unit_of_the_values_does_not_matter_at_bound_0(x, power):
    x = np.array(x) / 64
    scaled = x * 2.0**power  # exact
    assert verdicts.verdict(scaled).verdict == verdicts.verdict(x).verdict


@pytest.mark.parametrize("x", [[], [5.0]])
def test_fewer_than_two_seeds_give_no_verdict(x):
    for found in (
        verdicts.verdict(x),
        verdicts.verdict_every_seed(x),
        verdicts.verdict_not_worse(x, 0),
    ):
        assert found == verdicts.NO_RECORD
        assert set(found.as_dict().values()) == {None}


@pytest.mark.parametrize(
    ("x", "test", "word"),
    [
        ([-0.1, -9.0, -0.2], "< 0", REPLICATED),  # all pass, though the mean's interval contains 0
        ([-0.1, -9.0, 0.01], "< 0", NOT_REPLICATED),
        ([-0.1, -9.0, 0.0], "< 0", NOT_REPLICATED),
        ([0.2, 0.3], "> 0.1", REPLICATED),
        ([0.2, 0.1], "> 0.1", NOT_REPLICATED),
    ],
)
def test_every_seed_must_pass(x, test, word):
    found = verdicts.verdict_every_seed(x, test)
    assert found.verdict == word
    assert (found.estimate, found.seeds) == (pytest.approx(np.mean(x)), len(x))
    assert (found.low, found.high) == (min(x), max(x))


@pytest.mark.parametrize(
    ("x", "bound", "word"),
    [
        ([1.0, 1.1, 0.9], 2, REPLICATED),
        ([1.0, 1.1, 0.9], 0.95, REPLICATED),  # above the bound, but it is in the interval
        ([1.0, 1.1, 0.9], 0.5, NOT_REPLICATED),
    ],
)
def test_not_worse_is_refuted_only_by_the_whole_interval(x, bound, word):
    assert verdicts.verdict_not_worse(x, bound).verdict == word


def test_a_mean_that_equals_the_bound_is_not_worse():
    assert verdicts.verdict_not_worse([0.0, 0.0, 0.0], 0).verdict == REPLICATED


def test_a_claim_of_several_is_judged_by_its_weakest():
    good = Verdict(0.4, 0.3, 0.5, 3, REPLICATED)
    better = dataclasses.replace(good, estimate=0.9)
    unclear = Verdict(0.6, -0.1, 1.3, 3, INCONCLUSIVE)
    bad = Verdict(0.7, -2.0, -0.1, 3, NOT_REPLICATED)
    none = verdicts.NO_RECORD
    for several, weakest in (
        ([better, good], good),
        ([good, unclear, better], unclear),
        ([unclear, bad, good], bad),
        ([bad, none, good], none),
        ([none, none], none),
    ):
        assert verdicts.verdict_all(several) == weakest
        assert verdicts.verdict_all(several[::-1]) == weakest
    assert verdicts.verdict_all([good, better], "<") == better  # the larger loss is the weaker
    assert verdicts.verdict_all([unclear, better, good], "<") == unclear


def test_values_count_only_if_every_seed_has_one():
    values = pd.Series({0: 0.1, 2: 0.3})
    assert verdicts.of_all(values, [2, 0]).equals(values)
    assert verdicts.of_all(values, [0, 1, 2]).empty
    assert verdicts.of_all(values, [0]).empty


@pytest.mark.parametrize("test", ["", ">", "> ", ">0", "0", "= 0", ">= 0", "=> 0", "above 0"])
def test_a_test_that_cannot_be_read_is_named(test):
    for judge in (verdicts.verdict, verdicts.verdict_every_seed):
        with pytest.raises(ValueError, match=f"test is {test!r}; it must read like '> 0'"):
            judge([1.0, 2.0], test)


@pytest.mark.parametrize("test", [" 0", "<> 0", "> x", "> nan"])
def test_more_tests_that_cannot_be_read_are_named(test):
    with pytest.raises(ValueError, match=f"test is {test!r}; it must read like '> 0'"):
        verdicts.verdict([1.0, 2.0], test)


@pytest.mark.parametrize(
    "judge",
    [verdicts.verdict, verdicts.verdict_every_seed, lambda x: verdicts.verdict_not_worse(x, 0)],
)
def test_a_value_that_is_not_a_number_is_refused(judge):
    with pytest.raises(ValueError, match="nan"):
        judge([1.0, float("nan"), 1.1])


def test_a_verdict_can_be_written_as_json():
    found = json.loads(json.dumps(verdicts.verdict([1.0, 1.1, 0.9]).as_dict(), allow_nan=False))
    assert found["verdict"] == REPLICATED
    assert found["seeds"] == 3
    assert found["low"] < found["estimate"] < found["high"]
    assert found["estimate"] == pytest.approx(1.0)
