"""Study 3: what its claims are made of, against hand-computed numbers."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats

from kdutils import data, losses, notebooks, parameters, results

C = 100
LABELS = torch.arange(7) * 13 % C


def logits(seed=0, rows=7, classes=C):
    return np.random.default_rng(seed).normal(0, 3.0, (rows, classes))


@pytest.fixture(scope="module")
def names():
    return notebooks.procedure("eskd", {})


def test_roughness_is_the_spread_of_changes_in_the_second_half(names):
    curve = [0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.6, 0.8, 0.8, 0.9]
    changes = [0.2, -0.1, 0.2, 0.0, 0.1]  # those that end in epochs 6 to 10
    assert names["roughness"](curve) == pytest.approx(np.std(changes, ddof=1))


def test_while_taught_is_the_mean_over_the_taught_epochs(names):
    assert names["p"].kd_epochs == 5
    assert names["while_taught"]([0.1, 0.2, 0.3, 0.4, 0.5, 0.9, 0.9]) == pytest.approx(0.3)


def test_falling_counts_a_seed_by_its_larger_correlation(names):
    assert names["falling"]([3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert names["falling"]([3.0, 2.0, 1.0], [1.0, 3.0, 2.0]) == pytest.approx(0.5)


def found(*values):
    series = pd.Series(dict(enumerate(values)), dtype=float)
    return results.Found(series, {k: [(f"k{k}", "accuracy", v)] for k, v in series.items()})


def test_the_chosen_one_is_best_held_out_in_the_other_seeds(names):
    held = {"x": found(0.9, 0.1, 0.1), "y": found(0.5, 0.5, 0.5)}
    test = {"x": found(1, 2, 3), "y": found(10, 20, 30)}
    best, chosen = names["best_elsewhere"](held, test)
    # Without seed 0, x has 0.1 and y 0.5; without seed 1 or 2 both have 0.5, and the first wins.
    assert chosen == {0: "y", 1: "x", 2: "x"}
    assert best.values.to_dict() == {0: 10, 1: 2, 2: 3}
    assert best.sources[1] == test["x"].sources[1]
    for few in (found(1), results.NOTHING):
        best, chosen = names["best_elsewhere"]({"x": few, "y": few}, test)
        assert best.values.empty
        assert best.sources == chosen == {}


def test_a_judged_seed_is_no_calibration_seed(names):
    given = names["p"].model_dump() | {"calibration_seed": 3}
    with pytest.raises(parameters.ParameterError, match="calibration_seed must not be in seeds"):
        names["Setting"].check(given)


def test_the_sharp_teacher_is_another_one_and_its_students_see_what_it_has_seen(names):
    p = names["p"]
    assert p.sharp_recipe["augmentation"] != p.augmentation
    key = names["teacher"].key
    s = {"dataset": "cifar10", "augmentation": p.augmentation}
    common = {"network": "resnet18", "seed": 0}
    assert key(common | s) != key(common | s | p.sharp_recipe)
    pupils = notebooks.procedure("eskd", {"train_missing": False}, ("runs",))["sharpened"]
    assert pupils["augmentation"] == p.sharp_recipe["augmentation"]
    assert pupils["recipe"] == p.sharp_recipe


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"second_recipe": {"rate": 0.1}},
            r"second_recipe\['rate'\] is 0.1: extra inputs are not permitted",
        ),
        ({"sharp_recipe": {"epochs": 3}}, "a recipe's epochs must be 10 or more, and come with"),
        ({"sharp_recipe": {"epochs": 15}}, "a recipe's epochs must be 10 or more, and come with"),
        ({"sharp_recipe": {"milestones": [3, 2]}}, "its values must rise"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(names, changed, said):
    with pytest.raises(parameters.ParameterError, match=said):
        names["Setting"].check(names["p"].model_dump() | changed)


def test_every_teacher_is_trained_by_the_recipe_that_came_nearest_to_the_papers():
    found = notebooks.procedure("eskd", {"train_missing": False}, ("runs",))
    tried, p = found["calibrated"], found["p"]
    for name, paper in zip(p.teachers, (0.7848, 0.8041), strict=True):
        wanted = [of for of in found["tried"].values() if of["network"] == name]
        wanted = [found["labels_only"].key(of) for of in wanted if of["epochs"] == p.epochs]
        rows = results.rows_of(tried, key=wanted, epoch=p.epochs)
        assert len(rows) == len(wanted)
        nearest = rows.loc[(rows.test_accuracy - paper).abs().idxmin()]
        taken = found["setting"] | found["recipes"][name]
        for varied in ("augmentation", "batch_size", "lr", "milestones"):
            assert nearest[varied] == taken[varied], (name, varied)


def test_the_sharp_teachers_recipe_is_the_shortest_that_becomes_sharp():
    found = notebooks.procedure("eskd", {"train_missing": False}, ("runs",))
    tried, p = found["calibrated"], found["p"]
    ended = tried.loc[tried.groupby("key").epoch.idxmax()]
    ended = results.rows_of(ended, network=p.teachers[0], augmentation="none", lr=0.01)
    sharp = ended[ended.loss <= 0.05].sort_values("epochs").iloc[0]
    assert sharp.epochs == p.sharp_recipe["epochs"]
    assert sharp.milestones == p.sharp_recipe["milestones"]


def test_falls_are_what_a_curve_loses_in_sum(names):
    assert names["falls"]([0.1, 0.3, 0.2, 0.25, 0.2]) == pytest.approx(0.15)
    assert names["falls"]([0.1, 0.1, 0.4]) == 0


def test_what_a_student_is_told_is_measured_at_its_temperature(names):
    z = torch.tensor(
        [[[0.0, 0.0], [0.0, 3.0]], [[0.0, 0.0], [3.0, 0.0]]]
    )  # two epochs, two pictures
    found = names["told"](z, torch.tensor([0, 1]), 3.0)
    sure = 1 / (1 + np.exp(-1))
    assert found["confidence"] == pytest.approx((0.5 + sure) / 2)
    assert found["accuracy"] == pytest.approx(0.75)  # a tie counts for the first class
    each = [stats.entropy([0.5, 0.5]), stats.entropy([sure, 1 - sure])]
    assert found["entropy"] == pytest.approx(np.mean(each), rel=1e-5)


# Views


def test_parts_differ_in_their_training_views_alone(names):
    options = {"validation": 200, "batch_size": 50}
    usual = data.parts("digits", seed=3, **options)

    def parts(augmentation):
        return names["parts"](3, options | {"dataset": "digits", "augmentation": augmentation})

    for augmentation, (pad, flip) in {
        "crops and flips": (4, True),
        "flips": (0, True),
        "none": (0, False),
    }.items():
        found = parts(augmentation)
        assert (found.train.pad, found.train.flip) == (pad, flip)
        assert np.array_equal(found.train.order(2), usual.train.order(2))
        assert found.test.identity() == usual.test.identity()
        assert found.validation.identity() == usual.validation.identity()
    assert parts("crops and flips").train.identity() == usual.train.identity()
    plain = parts("none").train
    first, again = (next(iter(plain(epoch))) for epoch in (1, 1))
    assert torch.equal(first.images, again.images)
    assert plain.views(1).max() == 0


def test_an_unknown_augmentation_is_refused_by_name(names):
    given = names["p"].model_dump() | {"augmentation": "mixup"}
    said = "augmentation is 'mixup': input should be 'crops and flips', 'flips' or 'none'"
    with pytest.raises(parameters.ParameterError, match=said):
        names["Setting"].check(given)


# Targets as soft as others


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.5])
def test_smoothed_logits_train_like_label_smoothing(names, epsilon):
    student = torch.tensor(logits())
    smoothed = names["smoothed_logits"](LABELS, C, epsilon).double()
    own = float(stats.entropy(smoothed.exp().numpy(), axis=1).mean())
    expected = float(F.cross_entropy(student, LABELS, label_smoothing=epsilon))
    assert float(losses.kd(student, smoothed, 1.0)) + own == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(smoothed.exp().sum(1), 1, atol=1e-6)
    assert (smoothed.argmax(1) == LABELS).all()


@pytest.mark.parametrize("epsilon", [-0.1, 0, 1, 2, float("nan")])
def test_an_epsilon_outside_0_to_1_is_named(names, epsilon):
    with pytest.raises(ValueError, match=f"epsilon is {epsilon}"):
        names["smoothed_logits"](LABELS, C, epsilon)


@given(st.floats(1e-4, 0.999), st.integers(2, 200))
def test_smoothing_for_entropy_inverts_the_entropy_of_smoothed_labels(names, epsilon, classes):
    smoothed = np.full(classes, epsilon / classes)
    smoothed[0] += 1 - epsilon
    found = names["smoothing_for_entropy"](stats.entropy(smoothed), classes)
    # Near 1 the entropy is flat in epsilon, as at a maximum: half the digits are lost.
    assert found == pytest.approx(epsilon, rel=1e-9, abs=1e-9 / (1 - epsilon))


@pytest.mark.parametrize("entropy", [-1, 0, np.log(10), 3])
def test_an_entropy_no_smoothing_can_have_is_named(names, entropy):
    with pytest.raises(ValueError, match="entropy is"):
        names["smoothing_for_entropy"](entropy, 10)


@given(st.integers(0, 2**32 - 1), st.floats(0.3, 100))
def test_temperature_for_entropy_inverts_the_mean_entropy(names, seed, t):
    z = logits(seed, rows=20, classes=10)
    entropy = stats.entropy(special.softmax(z / t, axis=1), axis=1).mean()
    assert names["temperature_for_entropy"](z, entropy) == pytest.approx(t, rel=1e-6)
    single = torch.tensor(z, dtype=torch.float32)
    assert names["temperature_for_entropy"](single, entropy) == pytest.approx(t, rel=1e-4)


@pytest.mark.parametrize("entropy", [-0.1, 2.31, float("nan")])
def test_an_entropy_no_temperature_can_give_is_named(names, entropy):
    with pytest.raises(ValueError, match=f"mean entropy of {entropy}"):
        names["temperature_for_entropy"](logits(rows=20, classes=10), entropy)
