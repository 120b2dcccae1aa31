"""The knowledge terms against references that share no code with them (NumPy, SciPy)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from kdutils import losses

C = 100
LABELS = torch.arange(7) * 13 % C
seeds = st.integers(0, 2**32 - 1)
temperatures = st.floats(0.5, 50)


def logits(seed=0, rows=7, classes=C, spread=3.0):
    return np.random.default_rng(seed).normal(0, spread, (rows, classes))


def tensors(seed=0, **shape):
    """Student's and teacher's logits, in double precision."""
    return torch.tensor(logits(seed, **shape)), torch.tensor(logits(seed + 1, **shape))


def reference_kd(student, teacher, t):
    p, q = special.softmax(teacher / t, axis=1), special.softmax(student / t, axis=1)
    return t * t * special.rel_entr(p, q).sum(axis=1).mean()


@pytest.mark.parametrize("t", [0.7, 1.0, 4.0, 20.0])
def test_kd_is_hintons_formula(t):
    student, teacher = tensors()
    expected = reference_kd(student.numpy(), teacher.numpy(), t)
    assert float(losses.kd(student, teacher, t)) == pytest.approx(expected, rel=1e-12)
    single = losses.kd(student.float(), teacher.float(), t)
    assert float(single) == pytest.approx(expected, rel=1e-4)


def test_kd_is_none_of_the_two_known_wrong_reductions():
    student, teacher = tensors()
    t = 4.0
    found = losses.kd(student, teacher, t)
    log_q, p = F.log_softmax(student / t, 1), F.softmax(teacher / t, 1)
    over_classes_too = F.kl_div(log_q, p, reduction="none").mean() * t**2  # PyTorch's "mean"
    without_t_squared = F.kl_div(log_q, p, reduction="batchmean")
    assert float(found / over_classes_too) == pytest.approx(C)
    assert float(found / without_t_squared) == pytest.approx(t**2)


@given(seeds, temperatures)
def test_kd_is_positive_between_different_distributions(seed, t):
    student, teacher = tensors(seed, rows=3, classes=5)
    assert float(losses.kd(student, teacher, t)) > 1e-9


@given(seeds, temperatures, st.floats(-1e3, 1e3))
def test_kd_is_zero_when_logits_differ_by_a_constant_in_every_row(seed, t, constant):
    _, teacher = tensors(seed, rows=3, classes=5, spread=1.0)
    moved = teacher + constant * torch.tensor([[1.0], [-2.0], [0.5]])
    assert abs(float(losses.kd(moved, teacher, t))) < 1e-9
    moved[1, 2] += 0.1
    assert float(losses.kd(moved, teacher, t)) > 1e-9


@given(seeds, temperatures, st.floats(-100, 100), st.floats(-100, 100))
def test_kd_does_not_see_a_constant_added_to_a_row(seed, t, a, b):
    student, teacher = tensors(seed, rows=3, classes=5)
    rows = torch.tensor([[1.0], [-2.0], [0.5]])
    moved = losses.kd(student + a * rows, teacher + b * rows, t)
    assert float(moved) == pytest.approx(float(losses.kd(student, teacher, t)), abs=1e-9)


def test_kd_is_asymmetric_the_teacher_is_the_reference_distribution():
    student, teacher = tensors()
    expected = reference_kd(teacher.numpy(), student.numpy(), 4.0)
    assert float(losses.kd(teacher, student, 4.0)) == pytest.approx(expected)
    assert float(losses.kd(student, teacher, 4.0)) != pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("rows", [1, 7, 14])
def test_kd_is_a_mean_over_the_batch(rows):
    student, teacher = tensors(rows=rows)
    each = [float(losses.kd(s[None], t[None], 4.0)) for s, t in zip(student, teacher, strict=True)]
    assert float(losses.kd(student, teacher, 4.0)) == pytest.approx(np.mean(each))


@pytest.mark.parametrize("t", [1.0, 4.0])
def test_kd_gradient_is_t_times_the_difference_of_probabilities(t):
    student, teacher = tensors()
    student.requires_grad_()
    losses.kd(student, teacher, t).backward()
    s, p = student.detach().numpy(), teacher.numpy()
    expected = t * (special.softmax(s / t, 1) - special.softmax(p / t, 1)) / len(s)
    np.testing.assert_allclose(student.grad.numpy(), expected, atol=1e-14)


def test_kd_gradient_tends_to_the_difference_of_centred_logits():
    student, teacher = tensors()
    student.requires_grad_()
    losses.kd(student, teacher, 1e5).backward()
    difference = student.detach().numpy() - teacher.numpy()
    expected = (difference - difference.mean(axis=1, keepdims=True)) / C / len(difference)
    np.testing.assert_allclose(student.grad.numpy(), expected, atol=2e-4 * np.abs(expected).max())


def test_gradients_are_right_and_never_reach_a_detached_teacher():
    student, teacher = tensors(rows=3, classes=5)
    student.requires_grad_()
    teacher.requires_grad_()
    labels = torch.tensor([0, 4, 2])

    def function(s, t):
        return losses.distillation(s, t, labels, 3.0, 0.7)

    assert torch.autograd.gradcheck(function, (student, teacher))
    function(student, teacher.detach()).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


def test_distillation_with_alpha_0_is_cross_entropy_and_with_alpha_1_is_kd():
    student, teacher = tensors()
    cross_entropy = -special.log_softmax(student.numpy(), 1)[range(7), LABELS].mean()
    kd = reference_kd(student.numpy(), teacher.numpy(), 4.0)
    for alpha, expected in ((0, cross_entropy), (1, kd), (0.9, 0.9 * kd + 0.1 * cross_entropy)):
        found = losses.distillation(student, teacher, LABELS, 4.0, alpha)
        assert float(found) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("t", [0, 0.0, -4.0, float("nan")])
def test_a_temperature_that_is_not_above_0_is_named(t):
    student, teacher = tensors()
    with pytest.raises(ValueError, match=f"temperature is {t}"):
        losses.kd(student, teacher, t)
    with pytest.raises(ValueError, match=f"temperature is {t}"):
        losses.distillation(student, teacher, LABELS, t)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_an_alpha_outside_0_to_1_is_named(alpha):
    with pytest.raises(ValueError, match=f"alpha is {alpha}"):
        losses.distillation(*tensors(), LABELS, 4.0, alpha)


@pytest.mark.parametrize("shape", [(7, C - 1), (1, C), (C,)])
def test_logits_of_different_shapes_are_refused_even_where_they_would_broadcast(shape):
    student = torch.zeros(7, C)
    with pytest.raises(ValueError, match=r"student \(7, 100\), teacher \("):
        losses.kd(student, torch.zeros(shape))
