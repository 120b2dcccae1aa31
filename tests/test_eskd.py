"""Study 3: what its claims are made of, against hand-computed numbers."""

import numpy as np
import pytest

from kdutils import notebooks, parameters


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


def test_a_judged_seed_is_no_calibration_seed(names):
    given = names["p"].model_dump() | {"calibration_seed": 3}
    with pytest.raises(parameters.ParameterError, match="calibration_seed must not be in seeds"):
        names["Setting"].check(given)


def test_the_sharp_teacher_differs_in_its_views_alone(names):
    p = names["p"]
    assert p.sharp != p.augmentation
    key = names["teacher"].key
    s = {"dataset": "cifar10", "augmentation": p.augmentation}
    common = {"network": "resnet18", "seed": 0}
    assert key(common | s) != key(common | s | {"augmentation": p.sharp})
