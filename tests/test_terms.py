"""Knowledge terms of later papers against references in NumPy and SciPy, and counts by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, special, stats
from scipy.spatial import distance

from kdutils import losses

seeds = st.integers(0, 2**32 - 1)
temperatures = st.floats(0.5, 20)
few = settings(max_examples=25)

LABELS = np.array([3, 0, 4, 1, 3, 2])
ON_LOGITS = {
    "dkd": lambda s, t: losses.dkd(s, t, torch.tensor(LABELS), 1.5, 3.0, 2.0),
    "dist": lambda s, t: losses.dist(s, t, 2.0, 3.0, 2.0),
    "standardised": lambda s, t: losses.kd(*map(losses.standardised, (s, t)), 2.0),
}
TERMS = ON_LOGITS | {"attention_transfer": losses.attention_transfer, "pkt": losses.pkt}
every = pytest.mark.parametrize("name", TERMS)
of_logits = pytest.mark.parametrize("name", ON_LOGITS)


def drawn(seed, *shape, spread=2.0):
    return np.random.default_rng(seed).normal(0.5, spread, shape)


def inputs(name, seed=0):
    """Student's and teacher's tensors of six pictures: logits, features or maps."""
    ours = {"pkt": (6, 4), "attention_transfer": (6, 3, 2, 5)}.get(name, (6, 5))
    theirs = {"pkt": (6, 7), "attention_transfer": (6, 4, 2, 5)}.get(name, (6, 5))
    return torch.tensor(drawn(seed, *ours)), torch.tensor(drawn(seed + 1, *theirs))


def number(term, *given, **rest):
    return float(term(*map(torch.as_tensor, given), **rest))


# All of them


@every
@few
@given(seed=seeds)
def test_a_term_is_zero_for_equal_inputs_and_else_positive(name, seed):
    student, teacher = inputs(name, seed)
    assert abs(float(TERMS[name](teacher, teacher))) < 1e-14
    assert float(TERMS[name](student, teacher)) > 1e-6


@every
def test_gradients_of_a_term_are_right_and_the_teachers_is_not_needed(name):
    student, teacher = inputs(name)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: TERMS[name](x, teacher), student)
    TERMS[name](student, teacher).backward()
    assert student.grad.abs().max() > 1e-4
    assert teacher.grad is None


@every
@few
@given(seed=seeds)
def test_a_term_does_not_know_the_batchs_order(name, seed):
    student, teacher = inputs(name, seed)
    order = np.random.default_rng(seed).permutation(6)
    if name == "dkd":
        found = losses.dkd(student[order], teacher[order], torch.tensor(LABELS[order]), 1.5, 3, 2)
    else:
        found = TERMS[name](student[order], teacher[order])
    assert float(found) == pytest.approx(float(TERMS[name](student, teacher)), rel=1e-10)


@of_logits
@few
@given(seed=seeds, shift=st.floats(-100, 100))
def test_no_term_on_logits_sees_a_constant_added_to_a_picture(name, seed, shift):
    student, teacher = inputs(name, seed)
    rows = shift * torch.tensor(drawn(seed, 6, 1))
    moved = float(TERMS[name](student + rows, teacher - 2 * rows))
    assert moved == pytest.approx(float(TERMS[name](student, teacher)), rel=1e-8, abs=1e-10)


@of_logits
@pytest.mark.parametrize("shapes", [((6, 5), (6, 4)), ((6, 5), (1, 5)), ((5,), (5,))])
def test_logits_that_do_not_fit_are_named_even_where_they_would_broadcast(name, shapes):
    with pytest.raises(ValueError, match=r"student|logits are \(5,\)"):
        TERMS[name](*map(torch.zeros, shapes))


@pytest.mark.parametrize("t", [0, -1.0, float("nan")])
def test_a_temperature_that_is_not_above_0_is_named(t):
    student, teacher = inputs("dist")
    with pytest.raises(ValueError, match=f"temperature is {t}"):
        losses.dist(student, teacher, temperature=t)
    with pytest.raises(ValueError, match=f"temperature is {t}"):
        losses.dkd(student, teacher, torch.tensor(LABELS), temperature=t)


@pytest.mark.parametrize("term", [losses.dist, lambda *both: losses.dkd(*both, torch.zeros(4))])
def test_one_class_alone_is_refused(term):
    with pytest.raises(ValueError, match=r"two or more classes: student \(4, 1\)"):
        term(torch.zeros(4, 1), torch.zeros(4, 1))


# Decoupled distillation


def slow_dkd(student, teacher, labels, alpha, beta, t):
    def kl(p, q):
        return special.rel_entr(p, q).sum()

    total = 0.0
    for s, z, label, own in zip(student, teacher, labels, np.broadcast_to(beta, 6), strict=True):
        q, p = special.softmax(s / t), special.softmax(z / t)
        rest_q, rest_p = np.delete(q, label), np.delete(p, label)
        total += alpha * kl([p[label], rest_p.sum()], [q[label], rest_q.sum()])
        total += own * kl(rest_p / rest_p.sum(), rest_q / rest_q.sum())
    return t * t * total / len(student)


@few
@given(seeds, temperatures, st.floats(0, 5), st.floats(0, 10))
def test_dkd_is_its_definition_one_picture_at_a_time(seed, t, alpha, beta):
    student, teacher = drawn(seed, 6, 5), drawn(seed + 1, 6, 5)
    for each in (beta, beta * np.arange(6.0)):
        expected = slow_dkd(student, teacher, LABELS, alpha, each, t)
        given = each if np.isscalar(each) else torch.tensor(each)
        found = losses.dkd(
            *map(torch.tensor, (student, teacher, LABELS)), alpha=alpha, beta=given, temperature=t
        )
        assert float(found) == pytest.approx(expected, rel=1e-8, abs=1e-12)


@few
@given(seeds, temperatures)
def test_dkd_with_the_teachers_mass_beside_the_label_is_kd(seed, t):
    student, teacher = inputs("dkd", seed)
    mass = 1 - special.softmax(teacher.numpy() / t, axis=1)[range(6), LABELS]
    found = losses.dkd(student, teacher, torch.tensor(LABELS), 1.0, torch.tensor(mass), t)
    expected = float(losses.kd(student, teacher, t))
    assert float(found) == pytest.approx(expected, rel=1e-10, abs=1e-13)


def test_dkd_of_three_pictures_by_hand():
    student = np.log([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25], [0.2, 0.6, 0.2]])
    teacher = np.log([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.2, 0.6, 0.2]])
    labels = [0, 2, 1]
    target = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)  # the second's is 0
    rest = 0.5 * math.log(3 / 2) + 0.5 * math.log(3 / 4)
    rest += 1 / 3 * math.log(1 / 2) + 2 / 3 * math.log(2)
    found = number(losses.dkd, student, teacher, labels, alpha=1.0, beta=1.0, temperature=1.0)
    assert found == pytest.approx((target + rest) / 3)


def test_dkd_is_finite_where_the_teacher_is_sure():
    student = torch.zeros(6, 5, requires_grad=True)
    teacher = 1e4 * torch.eye(5)[torch.tensor(LABELS)]
    loss = losses.dkd(student, teacher, torch.tensor(LABELS))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(16 * math.log(5), rel=1e-5)  # T² ln 5, and no NCKD
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ("labels", "beta"), [((6, 1), ()), ((5,), ()), ((6,), (5,)), ((6,), (6, 1))]
)
def test_dkd_names_labels_and_weights_that_are_not_one_a_picture(labels, beta):
    with pytest.raises(ValueError, match=r"labels and beta are .*; they must be \(6,\)"):
        losses.dkd(*inputs("dkd"), torch.zeros(labels, dtype=torch.long), beta=torch.ones(beta))


# Standardised logits


@few
@given(seeds, st.floats(1e-3, 1e3), st.floats(-100, 100))
def test_standardised_logits_are_z_scores_and_blind_to_shift_and_scale(seed, scale, shift):
    logits = drawn(seed, 6, 5)
    found = losses.standardised(torch.tensor(scale * logits + shift))
    np.testing.assert_allclose(found, stats.zscore(logits, axis=1), atol=1e-8)
    assert float(found.abs().max()) <= math.sqrt(5 - 1) + 1e-9  # the paper's bound
    assert (found.argsort(1) == torch.tensor(logits).argsort(1)).all()


def test_the_papers_figure_2_comes_out_with_a_temperature_for_its_other_deviation():
    """It prints z-scores with C − 1 and the losses 0.0995 and 0, at temperature 1 and no T²."""
    first, teacher = [[-1.320, 0.660, 0.880, -0.22]], [[-1.162, 1.162, 0.387, -0.387]]
    second = 0.3 * np.array(teacher) + 2
    t = math.sqrt(4 / 3)
    given = (losses.standardised(torch.tensor(x, dtype=torch.float64)) for x in (first, teacher))
    assert float(losses.kd(*given, t)) / t**2 == pytest.approx(0.0995, abs=2e-4)
    given = (losses.standardised(torch.tensor(x, dtype=torch.float64)) for x in (second, teacher))
    assert abs(float(losses.kd(*given, t))) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
def test_logits_that_are_all_alike_give_zeros_and_no_gradient(dtype, value):
    x = torch.full((2, 7), value, dtype=dtype)
    x[1] = torch.arange(7)
    x.requires_grad_()
    found = losses.standardised(x)
    assert torch.equal(found[0], torch.zeros(7, dtype=dtype))
    losses.kd(
        found, losses.standardised(torch.arange(14.0).reshape(2, 7).sin().to(dtype))
    ).backward()
    assert torch.equal(x.grad[0], torch.zeros(7, dtype=dtype))
    assert 0 < float(x.grad[1].abs().max()) < 10


# DIST


@few
@given(seeds, temperatures, st.integers(2, 6), st.integers(3, 6))
def test_dist_is_pearsons_distance_over_classes_and_over_pictures(seed, t, rows, classes):
    student, teacher = drawn(seed, rows, classes), drawn(seed + 1, rows, classes)
    q, p = special.softmax(student / t, axis=1), special.softmax(teacher / t, axis=1)
    inter = np.mean([distance.correlation(a, b) for a, b in zip(q, p, strict=True)])
    intra = np.mean([distance.correlation(a, b) for a, b in zip(q.T, p.T, strict=True)])
    found = number(losses.dist, student, teacher, beta=0.7, gamma=1.9, temperature=t)
    assert found == pytest.approx(t * t * (0.7 * inter + 1.9 * intra), rel=1e-7)


def test_dist_of_three_pictures_by_hand():
    """Of two classes a row's correlation is 1 or -1; the columns mirror each other."""
    student, teacher = [[0.9, 0.1], [0.6, 0.4], [0.3, 0.7]], [[0.8, 0.2], [0.3, 0.7], [0.4, 0.6]]
    found = number(losses.dist, np.log(student), np.log(teacher), temperature=1.0)
    rho = 0.3 * 0.3 + 0.3 * 0.1  # deviations 0.3, 0, -0.3 and 0.3, -0.2, -0.1
    rho /= math.sqrt((0.09 + 0.09) * (0.09 + 0.04 + 0.01))
    assert found == pytest.approx(2 / 3 + (1 - rho))


def test_dist_sees_only_correlations_of_probabilities():
    """A teacher nearer to even probabilities, along a line, is the same teacher."""
    p = special.softmax(drawn(0, 6, 5), axis=1)
    blended = np.log(0.3 * p + 0.7 / 5)
    assert abs(number(losses.dist, np.log(p), blended, temperature=1.0)) < 1e-12
    assert number(losses.kd, np.log(p), blended, temperature=1.0) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 4])
def test_dist_counts_what_is_constant_as_alike_or_half_and_gives_it_no_gradient(dtype, rows):
    teacher = torch.tensor(drawn(1, rows, 5), dtype=dtype)
    even = torch.full((rows, 5), 0.1, dtype=dtype, requires_grad=True)
    loss = losses.dist(even, teacher, 1.0, 1.0, 1.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.5 if rows == 1 else 1.0)  # intra: 0, or ½
    assert torch.equal(even.grad, torch.zeros_like(even))
    for x, other in ((teacher, even.detach()), (teacher[:1].expand(rows, -1), teacher)):
        x = x.clone().requires_grad_()
        loss = losses.dist(x, other, 1.0, 1.0, 1.0)
        loss.backward()
        assert torch.isfinite(loss.detach())
        assert torch.isfinite(x.grad).all()
        assert float(x.grad.abs().max()) < 10
    assert abs(float(losses.dist(teacher, teacher))) < 1e-6


# Probabilistic knowledge transfer


def slow_pkt(student, teacher):
    def given(x, i):
        others = [j for j in range(len(x)) if j != i]
        kernel = np.array([1 - distance.cosine(x[i], x[j]) / 2 for j in others])
        return kernel / kernel.sum()

    rows = range(len(student))
    return np.mean([stats.entropy(given(teacher, i), given(student, i)) for i in rows])


@few
@given(seeds, st.integers(2, 7), st.integers(2, 6), st.integers(2, 6))
def test_pkt_is_a_slow_loop_over_other_pictures(seed, rows, width, other):
    student, teacher = drawn(seed, rows, width), drawn(seed + 1, rows, other)
    expected = slow_pkt(student, teacher)
    assert number(losses.pkt, student, teacher) == pytest.approx(expected, rel=1e-8, abs=1e-13)


def test_pkt_of_three_pictures_by_hand():
    """Student: all at right angles, so ½ each. Teacher: two alike (k = 1), one at right angles."""
    found = number(losses.pkt, np.eye(3), [[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    alike = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert found == pytest.approx(2 / 3 * alike)


@few
@given(seeds)
def test_pkt_does_not_see_a_rotation_or_a_pictures_length_and_sees_an_origin(seed):
    student, teacher = inputs("pkt", seed)
    expected = float(losses.pkt(student, teacher))
    turned = student @ torch.tensor(linalg.qr(drawn(seed, 4, 4))[0])
    lengths = torch.tensor(np.random.default_rng(seed).uniform(0.01, 100, (6, 1)))
    assert float(losses.pkt(lengths * turned, teacher)) == pytest.approx(expected, rel=1e-8)
    assert float(losses.pkt(student + 3, teacher)) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("kind", ["equal", "zero", "opposite"])
def test_pkt_is_finite_for_pictures_alike_opposite_zero_and_tiny_batches(rows, kind, dtype):
    x = torch.ones(rows, 4, dtype=dtype) * {"equal": 1, "zero": 0, "opposite": 1}[kind]
    if kind == "opposite":
        x[0] *= -1
    x.requires_grad_()
    loss = losses.pkt(x, torch.tensor(drawn(1, rows, 4), dtype=dtype))
    loss.backward()
    assert torch.isfinite(loss.detach())
    assert (abs(float(loss.detach())) < 1e-6) == (rows < 3)
    assert torch.isfinite(x.grad).all()
    assert float(x.grad.abs().max()) < 10


# Attention transfer


def slow_attention(student, teacher):
    total = []
    for s, t in zip(student, teacher, strict=True):
        q, p = (np.einsum("chw,chw->hw", x, x) / len(x) for x in (s, t))
        total.append((q / math.sqrt((q * q).sum()) - p / math.sqrt((p * p).sum())) ** 2)
    return np.mean(total)


@few
@given(seeds, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(2, 3))
def test_attention_transfer_is_a_slow_loop_over_pictures(seed, channels, other, height, width):
    student = drawn(seed, 3, channels, height, width)
    teacher = drawn(seed + 1, 3, other, height, width)
    expected = slow_attention(student, teacher)
    found = number(losses.attention_transfer, student, teacher)
    assert found == pytest.approx(expected, rel=1e-10)


def test_attention_of_three_pictures_by_hand():
    """Maps of 1 × 2 with two channels: attention (1, 0), (3, 4) / 5 and (0, 0)."""
    student = np.array([[[1, 0], [1, 0]], [[1, 2], [2**0.5, 0]], [[0, 0], [0, 0]]])[:, :, None]
    teacher = np.array([[[0, 3]], [[3**0.5, 2]], [[0, 0]]])[:, :, None]
    found = number(losses.attention_transfer, student.astype(float), teacher.astype(float))
    assert found == pytest.approx((1 + 1) / 6)


@few
@given(seeds, st.floats(1e-3, 1e3))
def test_attention_does_not_see_channels_turned_or_a_picture_scaled(seed, scale):
    student, teacher = inputs("attention_transfer", seed)
    expected = float(losses.attention_transfer(student, teacher))
    turn = torch.tensor(linalg.qr(drawn(seed, 3, 3))[0])
    moved = torch.einsum("kc,bchw->bkhw", turn, student)
    moved[2] *= scale
    assert float(losses.attention_transfer(moved, -teacher)) == pytest.approx(expected, rel=1e-9)


def test_attention_of_a_map_of_zeros_has_no_gradient():
    x = torch.zeros(2, 3, 2, 2, requires_grad=True)
    loss = losses.attention_transfer(x, torch.ones(2, 3, 2, 2))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.25)
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("other", [(4, 3, 5, 6), (4, 3, 6, 5), (4, 3), (1, 3, 5, 5)])
def test_maps_of_other_sizes_and_batches_of_other_sizes_are_refused(other):
    with pytest.raises(ValueError, match=r"maps must be|student has 4 rows, teacher 1"):
        losses.attention_transfer(torch.zeros(4, 3, 5, 5), torch.zeros(other))


def test_pkt_refuses_another_number_of_pictures():
    with pytest.raises(ValueError, match="student has 4 rows, teacher 1"):
        losses.pkt(torch.zeros(4, 5), torch.zeros(1, 5))
