"""Relations between classes and pictures: terms and measures against slow loops in NumPy."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats

from kdutils import losses, metrics

CLASSES = 7
ROWS = 12
LABELS = np.array([0, 3, 3, 5, 6, 0, 1, 3, 6, 5, 1, 0])  # classes 2 and 4 have no picture
RELATIONS = (
    losses.rkd_distance,
    losses.rkd_angle,
    losses.similarity_preserving,
    losses.correlation_congruence,
)
seeds = st.integers(0, 2**32 - 1)
scales = st.floats(1e-3, 1e3)
related = pytest.mark.parametrize("term", RELATIONS, ids=lambda term: term.__name__)


def features(seed=0, rows=ROWS, width=5, shift=1.0):
    """Not centred, like pooled features, so that a forgotten centring shows."""
    return np.random.default_rng(seed).normal(shift, 1.0, (rows, width))


def rotation(seed, width, wider=0):
    """An orthogonal map (width, width + wider): a rotation or mirroring, into a wider space."""
    square = np.random.default_rng(seed).normal(size=(width + wider, width + wider))
    return linalg.qr(square)[0][:width]


def knowing(x, labels=LABELS, classes=CLASSES):
    return losses.class_centres(torch.as_tensor(x), torch.as_tensor(labels), classes)


def geometric(student, teacher, labels=LABELS, classes=CLASSES):
    ours, theirs = knowing(student, labels, classes), knowing(teacher, labels, classes)
    return float(losses.geometric(ours, theirs))


def number(term, student, teacher):
    return float(term(torch.as_tensor(student), torch.as_tensor(teacher)).detach())


def slow_similarities(x, labels):
    """{(k, m): cosine} for pairs of different classes, one at a time."""
    centres = {k: np.mean([r for r, y in zip(x, labels, strict=True) if y == k], 0) for k in labels}
    mean = sum(centres.values()) / len(centres)
    found = {}
    for k, m in itertools.permutations(sorted(centres), 2):
        a, b = centres[k] - mean, centres[m] - mean
        found[k, m] = a @ b / math.sqrt((a @ a) * (b @ b))
    return found


# Class centres


def test_centres_are_means_and_a_class_without_pictures_is_marked():
    x = features()
    centres, present = knowing(x)
    assert present.tolist() == [k in LABELS for k in range(CLASSES)]
    for k in range(CLASSES):
        expected = x[np.equal(LABELS, k)].mean(axis=0) if k in LABELS else 0
        np.testing.assert_allclose(centres[k], expected, atol=1e-15)


def test_a_label_beyond_the_classes_is_refused():
    with pytest.raises(RuntimeError, match="smaller than num_classes"):
        knowing(features(), LABELS + 1)


def test_without_a_number_of_classes_every_picture_has_the_row_of_its_class():
    x, labels = torch.tensor(features()), torch.tensor(LABELS)
    centres, first = losses.class_centres(x, labels)
    every, _ = losses.class_centres(x, labels, CLASSES)
    np.testing.assert_allclose(centres, every[labels], atol=1e-15)
    met = np.unique(LABELS, return_index=True)[1]
    assert torch.nonzero(first).flatten().tolist() == sorted(met)


def test_geometric_is_the_same_with_a_row_a_picture_as_with_a_row_a_class():
    x, labels = torch.tensor(features(), requires_grad=True), torch.tensor(LABELS)
    teacher = torch.tensor(features(1, width=7))
    found = []
    for classes in (None, CLASSES, 1000):
        both = [losses.class_centres(each, labels, classes) for each in (x, teacher)]
        loss = losses.geometric(*both)
        found.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-10, atol=1e-15)


def test_moving_centres_are_an_average_over_batches_that_starts_at_the_first_sight():
    average = losses.MovingCentres(CLASSES, 5, momentum=0.8).double()
    expected = np.zeros((CLASSES, 5))
    seen = set()
    for step in range(4):
        x, labels = features(step), (LABELS * (step + 1) + step) % CLASSES
        centres, present = average(torch.tensor(x), torch.tensor(labels))
        for k in set(labels.tolist()):
            kept = 0.8 if k in seen else 0.0
            expected[k] = kept * expected[k] + (1 - kept) * x[labels == k].mean(axis=0)
        seen |= set(labels.tolist())
        np.testing.assert_allclose(centres, expected, atol=1e-14)
        assert set(torch.nonzero(present).flatten().tolist()) == set(labels.tolist())
        assert set(torch.nonzero(average.seen).flatten().tolist()) == seen
    other = losses.MovingCentres(CLASSES, 5).double()
    other.load_state_dict(average.state_dict())  # what is saved is all there is
    np.testing.assert_array_equal(other.centres, average.centres)


def test_moving_centres_store_nothing_in_eval_mode_and_without_momentum_are_the_batchs():
    x, labels = torch.tensor(features(1)), torch.tensor(LABELS)
    average = losses.MovingCentres(CLASSES, 5, momentum=0).double()
    average(torch.tensor(features()), labels)
    before = average.centres.clone()
    centres, present = average.eval()(x, labels)
    np.testing.assert_allclose(centres, knowing(x)[0], atol=1e-15)
    assert torch.equal(present, knowing(x)[1])
    assert torch.equal(average.centres, before)


def test_the_gradient_of_moving_centres_runs_through_the_present_batch_alone():
    average = losses.MovingCentres(CLASSES, 5, momentum=0.75).double()
    for step in range(3):  # a graph kept from an earlier batch would raise here
        x = torch.tensor(features(step), requires_grad=True)
        average(x, torch.tensor(LABELS))[0].sum().backward()
        share = 1.0 if step == 0 else 0.25
        expected = np.array([share / np.equal(LABELS, k).sum() for k in LABELS])
        np.testing.assert_allclose(x.grad, np.repeat(expected[:, None], 5, axis=1), atol=1e-15)
    assert not average.centres.requires_grad


@pytest.mark.parametrize("momentum", [-0.1, 1, 1.5, float("nan")])
def test_a_momentum_that_is_not_in_0_to_1_is_named(momentum):
    with pytest.raises(ValueError, match=f"momentum is {momentum}"):
        losses.MovingCentres(CLASSES, 5, momentum)


def test_moving_centres_name_a_width_that_differs():
    with pytest.raises(ValueError, match="features have width 4, the centres 5"):
        losses.MovingCentres(CLASSES, 5)(torch.zeros(3, 4), torch.zeros(3, dtype=torch.long))


# The geometric term


@given(seeds, st.integers(2, 12))
def test_geometric_is_a_slow_loop_over_classes(seed, classes):
    labels = np.random.default_rng(seed).integers(0, classes, 20)
    labels[:2] = 0, 1  # at least one pair
    student, teacher = features(seed, 20, 4), features(seed + 1, 20, 6)
    ours, theirs = (slow_similarities(x, labels) for x in (student, teacher))
    expected = np.mean([(ours[pair] - theirs[pair]) ** 2 for pair in ours])
    found = geometric(student, teacher, labels, classes)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-14)


@given(seeds, scales, st.floats(-10, 10), st.integers(0, 3))
def test_geometric_is_zero_for_a_rotated_scaled_shifted_or_embedded_copy(seed, scale, shift, wider):
    teacher = features(seed)
    student = scale * (teacher @ rotation(seed, 5, wider) + shift)
    assert geometric(student, teacher) < 1e-20


@given(seeds)
def test_geometric_is_positive_for_other_features_channel_scales_and_class_scales(seed):
    teacher = features(seed)
    factors = np.linspace(1, 3, CLASSES)
    for student in (
        features(seed + 1),
        teacher * factors[:5],
        teacher * factors[LABELS, None],
        -teacher[::-1],
    ):
        assert geometric(student, teacher) > 1e-7


def test_how_far_centres_lie_from_the_mean_is_not_seen():
    teacher = np.array([[1.0, 0, 0], [-1, 0, 0], [0.6, 1, 0], [-0.6, -1, 0]])
    student = teacher * [[1], [1], [3], [3]]  # the mean stays, and so do directions from it
    assert geometric(student, teacher, range(4), 4) < 1e-30


@given(seeds)
def test_geometric_knows_neither_the_batchs_order_nor_the_classes_names(seed):
    rng = np.random.default_rng(seed)
    student, teacher = features(seed), features(seed + 1, width=3)
    expected = pytest.approx(geometric(student, teacher), rel=1e-12)
    order = rng.permutation(ROWS)
    assert geometric(student[order], teacher[order], LABELS[order]) == expected
    names = rng.permutation(CLASSES + 2)
    assert geometric(student, teacher, names[LABELS], CLASSES + 2) == expected


def test_gradients_of_geometric_are_right_and_never_reach_the_teacher():
    labels = torch.tensor(LABELS)
    average = losses.MovingCentres(CLASSES, 5).double()
    average(torch.tensor(features(2)), labels)
    average.eval()
    teacher = knowing(features(1, width=3))
    x = torch.tensor(features(), requires_grad=True)
    for centres in (
        lambda x: losses.class_centres(x, labels, CLASSES),
        lambda x: average(x, labels),
    ):
        assert torch.autograd.gradcheck(lambda x, c=centres: losses.geometric(c(x), teacher), x)
    loss = losses.geometric(knowing(x), teacher)
    loss.backward()
    assert x.grad.abs().max() > 1e-4
    assert not teacher[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("student_labels", "teacher_labels"),
    [([3, 3, 3, 3], [3, 3, 3, 3]), ([0, 0, 1, 1], [2, 2, 3, 3]), ([0, 0, 1, 2], [2, 3, 3, 4])],
    ids=["one class", "none in common", "one in common"],
)
def test_geometric_is_zero_with_a_zero_gradient_where_there_is_no_pair(
    dtype, student_labels, teacher_labels
):
    x = torch.tensor(features(rows=4), dtype=dtype, requires_grad=True)
    teacher = knowing(features(1, rows=4), teacher_labels)
    loss = losses.geometric(knowing(x, student_labels), teacher)
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_two_classes_are_always_alike():
    x = torch.tensor(features(rows=4), requires_grad=True)
    labels = [0, 0, 1, 1]
    loss = losses.geometric(knowing(x, labels), knowing(features(1, rows=4), labels))
    loss.backward()
    assert float(loss.detach()) < 1e-30
    assert float(x.grad.abs().max()) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
def test_a_student_whose_centres_are_all_alike_is_charged_without_a_gradient(dtype, value):
    """Rounding leaves centres apart by some last bits; their gradient would be huge."""
    x = torch.full((ROWS, 5), value, dtype=dtype, requires_grad=True)
    loss = losses.geometric(knowing(x), knowing(features(1)))
    loss.backward()
    assert float(loss.detach()) > 1e-3
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_centre_at_the_mean_has_no_direction_so_its_cosines_are_zero(dtype):
    x = torch.tensor([[0.4, 0.3], [0.1, 0.7], [0.8, -0.3]], dtype=dtype)
    x = torch.cat([x, x.mean(0, keepdim=True)]).requires_grad_()  # exactly zero, or almost
    teacher = features(rows=4)
    loss = losses.geometric(knowing(x, range(4)), knowing(teacher, range(4)))
    loss.backward()
    theirs = slow_similarities(teacher, range(4))
    ours = slow_similarities(x.detach().double().numpy()[:3], range(3))
    expected = np.mean([(ours.get(pair, 0) - theirs[pair]) ** 2 for pair in theirs])
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert float(x.grad.abs().max()) < 10


def test_a_class_that_the_teacher_never_saw_is_left_out():
    """Fixed centres from a training set without class 3, against a batch that has it."""
    student, training = features(), features(1, rows=30, width=3)
    training_labels = np.arange(30) % CLASSES
    fewer = training_labels != 3
    teacher = knowing(training[fewer], training_labels[fewer])
    found = losses.geometric(knowing(student), teacher)
    rest = LABELS != 3
    expected = losses.geometric(knowing(student[rest], LABELS[rest]), teacher)
    assert float(found) == pytest.approx(float(expected), rel=1e-12)
    assert float(found) > 1e-3


def test_geometric_names_another_number_of_classes():
    for other in (1, CLASSES - 1):
        with pytest.raises(ValueError, match=f"student has {CLASSES} rows, teacher {other}"):
            losses.geometric(knowing(features()), knowing(features(), LABELS * 0, other))


# Features


def test_feature_kd_is_the_mean_squared_error_of_the_projected_student():
    term = losses.FeatureKD(5, 3).double()
    student, teacher = features(), features(1, width=3)
    weight, bias = (p.detach().numpy() for p in term.projector.parameters())
    expected = np.mean((student @ weight.T + bias - teacher) ** 2)
    assert number(term, student, teacher) == pytest.approx(expected)
    assert number(term, student, student @ weight.T + bias) < 1e-30
    x = torch.tensor(student, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: term(x, torch.tensor(teacher)), x)
    term(x.detach(), torch.tensor(teacher)).backward()
    assert term.projector.weight.grad.abs().max() > 0


@pytest.mark.parametrize(("student", "teacher"), [(4, 3), (5, 5), (5, 1), (3, 5)])
def test_feature_kd_names_widths_that_its_projector_does_not_have(student, teacher):
    with pytest.raises(ValueError, match=rf"\({student}, {teacher}\), the projector's \(5, 3\)"):
        losses.FeatureKD(5, 3)(torch.zeros(2, student), torch.zeros(2, teacher))


# Relations between pictures


def huber(difference):
    size = abs(difference)
    return size**2 / 2 if size <= 1 else size - 0.5


def slow_rkd_distance(student, teacher):
    pairs = list(itertools.permutations(range(len(student)), 2))
    apart = [[math.dist(x[i], x[j]) for i, j in pairs] for x in (student, teacher)]
    ours, theirs = ([d / (sum(each) / len(pairs)) for d in each] for each in apart)
    return sum(huber(a - b) for a, b in zip(ours, theirs, strict=True)) / len(pairs)


def slow_rkd_angle(student, teacher):
    def cosine(x, i, j, k):
        a, b = x[i] - x[j], x[k] - x[j]
        return (a @ b) / (math.hypot(*a) * math.hypot(*b) or 1)  # 0 where two pictures coincide

    triples = list(itertools.permutations(range(len(student)), 3))
    return np.mean([huber(cosine(student, *t) - cosine(teacher, *t)) for t in triples])


def slow_similarity_preserving(student, teacher):
    total = 0.0
    for i in range(len(student)):
        ours, theirs = ([x[i] @ x[j] for j in range(len(x))] for x in (student, teacher))
        for a, b in zip(ours, theirs, strict=True):
            total += (a / math.hypot(*ours) - b / math.hypot(*theirs)) ** 2
    return total / len(student) ** 2


def slow_correlation_congruence(student, teacher):
    def kernel(a, b):
        x = 2 * 0.4 * (a @ b) / (math.hypot(*a) * math.hypot(*b))
        return math.exp(-2 * 0.4) * (1 + x + x * x / 2)

    pairs = itertools.product(range(len(student)), repeat=2)
    differences = [kernel(*student[[i, j]]) - kernel(*teacher[[i, j]]) for i, j in pairs]
    return np.mean(np.square(differences))


@related
@given(seeds, st.integers(3, 7), st.integers(1, 6), st.integers(1, 6))
def test_a_relation_is_its_slow_loop_for_any_two_widths(term, seed, rows, width, other):
    student, teacher = features(seed, rows, width), features(seed + 1, rows, other)
    expected = globals()[f"slow_{term.__name__}"](student, teacher)
    assert number(term, student, teacher) == pytest.approx(expected, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("term", [losses.rkd_distance, losses.rkd_angle])
def test_pictures_that_coincide_for_the_student_count_as_pairs_and_triples_do(term):
    student, teacher = features(rows=5), features(1, rows=5)
    student[3] = student[0]
    expected = globals()[f"slow_{term.__name__}"](student, teacher)
    assert number(term, student, teacher) == pytest.approx(expected, rel=1e-12)


@related
@given(seeds)
def test_a_relation_does_not_know_the_batchs_order(term, seed):
    student, teacher = features(seed), features(seed + 1, width=3)
    order = np.random.default_rng(seed).permutation(len(student))
    expected = number(term, student, teacher)
    assert number(term, student[order], teacher[order]) == pytest.approx(expected, rel=1e-10)


def test_the_widespread_correlation_congruence_does_know_the_batchs_order():
    """It multiplies the differences of neighbours in the batch; the paper compares all pairs."""
    student, teacher = features(), features(1)
    order = np.random.default_rng(0).permutation(len(student))
    gaps = np.abs(student - teacher)
    as_given, reordered = ((g[1:] * g[:-1]).sum(axis=1).mean() for g in (gaps, gaps[order]))
    assert abs(as_given / reordered - 1) > 0.01
    ours = number(losses.correlation_congruence, student, teacher)
    assert ours != pytest.approx(as_given, rel=0.01)


def test_correlation_congruence_of_high_order_is_the_gaussian_kernel():
    def kernel(x):
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        return np.exp(-1.5 * ((x[:, None] - x) ** 2).sum(axis=2))

    student, teacher = features(), features(1, width=3)
    expected = np.mean((kernel(student) - kernel(teacher)) ** 2)
    found = losses.correlation_congruence(torch.tensor(student), torch.tensor(teacher), 1.5, 30)
    assert float(found) == pytest.approx(expected, rel=1e-10)


@related
@given(seeds, scales)
def test_a_relation_is_zero_for_a_rotated_or_scaled_copy_and_else_positive(term, seed, scale):
    teacher = features(seed)
    student = scale * teacher @ rotation(seed, 5, 2)
    assert number(term, student, teacher) < 1e-20
    assert number(term, features(seed + 1), teacher) > 1e-6
    moved = number(term, student + 3.0 * scale, teacher)
    if term in (losses.rkd_distance, losses.rkd_angle):  # distances and angles know no origin
        assert moved < 1e-20
    else:
        assert moved > 1e-7


@related
def test_gradients_of_a_relation_are_right(term):
    teacher = torch.tensor(features(1, rows=5, width=4))
    x = torch.tensor(features(rows=5, width=3), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: term(x, teacher), x)
    term(x, teacher).backward()
    assert x.grad.abs().max() > 1e-4


@related
@pytest.mark.parametrize("rows", [1, 2, 6])
@pytest.mark.parametrize("kind", ["equal", "zero", "twice", "one zero"])
def test_a_relation_is_finite_for_pictures_alike_zero_vectors_and_tiny_batches(term, rows, kind):
    x = features(rows=rows)
    if kind == "equal":
        x[:] = x[0]
    elif kind == "zero":
        x[:] = 0
    elif kind == "twice":
        x[-1] = x[0]
    else:
        x[0] = 0
    x = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    for teacher in (torch.tensor(features(1, rows=rows), dtype=torch.float32), x.detach()):
        x.grad = None
        loss = term(x, teacher)
        loss.backward()
        assert torch.isfinite(loss.detach())
        assert float(loss.detach()) >= 0
        assert torch.isfinite(x.grad).all()
        assert float(x.grad.abs().max()) < 10


@pytest.mark.parametrize(
    "term",
    [*RELATIONS, losses.FeatureKD(5, 5)],
    ids=lambda term: getattr(term, "__name__", str(term)),
)
def test_batches_of_different_sizes_are_refused_even_where_they_would_broadcast(term):
    with pytest.raises(ValueError, match="student has 4 rows, teacher 1"):
        term(torch.zeros(4, 5), torch.zeros(1, 5))


# Measures


@given(seeds)
def test_class_similarity_is_a_slow_loop_and_what_the_term_compares(seed):
    student, teacher = features(seed), features(seed + 1, width=3)
    found = [metrics.class_similarity(x, LABELS) for x in (student, teacher)]
    names = sorted(set(LABELS))
    for matrix, x in zip(found, (student, teacher), strict=True):
        slow = slow_similarities(x, LABELS)
        expected = [[slow.get((k, m), 1.0) for m in names] for k in names]
        np.testing.assert_allclose(matrix, expected, atol=1e-9)
    pairs = ~np.eye(len(names), dtype=bool)
    compared = np.mean((found[0] - found[1])[pairs] ** 2)
    assert geometric(student, teacher) == pytest.approx(compared, rel=1e-9)


def test_class_similarity_of_a_collapsed_network_is_zero_and_has_no_correlation():
    same = metrics.class_similarity(np.full((ROWS, 5), 0.1), LABELS)
    assert not same.any()
    teacher = metrics.class_similarity(features(), LABELS)
    with pytest.warns(stats.ConstantInputWarning):
        kept = metrics.similarity_kept(same, teacher)
    assert np.isnan([kept["pearson"], kept["spearman"]]).all()
    assert kept["frobenius"] == 1


@given(seeds, scales)
def test_a_rotated_scaled_shifted_copy_keeps_all_of_the_geometry(seed, scale):
    teacher = features(seed)
    student = scale * (teacher @ rotation(seed, 5, 2) - 2.0)
    matrices = [metrics.class_similarity(x, LABELS) for x in (student, teacher)]
    kept = metrics.similarity_kept(*matrices)
    assert kept["pearson"] == pytest.approx(1)
    assert kept["spearman"] > 0.99  # ranks of equal similarities may be swapped by rounding
    assert kept["frobenius"] < 1e-9
    assert metrics.linear_cka(student, teacher) == pytest.approx(1, abs=1e-12)


@given(seeds)
def test_similarity_kept_is_each_measures_definition(seed):
    student, teacher = (metrics.class_similarity(features(seed + n), LABELS) for n in range(2))
    kept = metrics.similarity_kept(student, teacher)
    pairs = list(itertools.combinations(range(len(teacher)), 2))
    ours, theirs = ([m[pair] for pair in pairs] for m in (student, teacher))
    assert kept["pearson"] == pytest.approx(np.corrcoef(ours, theirs)[0, 1])
    ranks = [stats.rankdata(each) for each in (ours, theirs)]
    assert kept["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    squares = [sum(v**2 for v in m.flat) for m in (teacher - student, teacher)]
    assert kept["frobenius"] == pytest.approx(math.sqrt(squares[0] / squares[1]))
    straight = metrics.similarity_kept(np.exp(3 * teacher), teacher)
    assert straight["spearman"] == pytest.approx(1)
    assert straight["pearson"] < 1 - 1e-6
    half = metrics.similarity_kept(teacher / 2, teacher)
    assert half == {
        "pearson": pytest.approx(1),
        "spearman": pytest.approx(1),
        "frobenius": pytest.approx(0.5),
    }


def similar_to(shared, seed, own=0.5, classes=6):
    """Class similarities that are partly ``shared``, partly a network's own."""
    noise = drawn_similarities(seed, classes)
    return np.where(np.eye(classes) == 1, 1.0, (1 - own) * shared + own * noise)


def drawn_similarities(seed, classes=6):
    half = np.triu(np.random.default_rng(seed).normal(0, 0.4, (classes, classes)), 1)
    return half + half.T


@settings(max_examples=15)
@given(seeds, st.integers(1, 4))
def test_specificity_is_the_own_teacher_less_the_strangers_and_what_regression_leaves(seed, count):
    shared = drawn_similarities(seed)
    student, teacher, *strangers = (similar_to(shared, seed + 1 + n) for n in range(2 + count))
    found = metrics.specificity(student, teacher, strangers)
    pairs = np.triu_indices(6, 1)
    ours, theirs, *others = (m[pairs] for m in (student, teacher, *strangers))
    expected = np.mean([np.corrcoef(ours, other)[0, 1] for other in others])
    assert found["strangers"] == pytest.approx(expected)
    own = np.corrcoef(ours, theirs)[0, 1]
    assert found["specificity"] == pytest.approx(own - expected)
    apart = []
    for k, stranger in enumerate(others):
        rest = others[:k] + others[k + 1 :]
        if rest:
            usual = np.stack([np.ones(len(ours)), np.mean(rest, axis=0)], axis=1)
            left = [x - usual @ np.linalg.lstsq(usual, x)[0] for x in (ours, theirs, stranger)]
            apart.append(np.corrcoef(left[0], left[1])[0, 1] - np.corrcoef(left[0], left[2])[0, 1])
    expected = np.mean(apart) if apart else np.nan
    assert found["partial"] == pytest.approx(expected, abs=1e-9, nan_ok=True)


@settings(max_examples=15)
@given(seeds, st.floats(0.1, 10), st.floats(-1, 1))
def test_of_a_copy_of_its_teacher_specificity_is_1_less_what_strangers_have(seed, scale, shift):
    shared = drawn_similarities(seed)
    teacher, *strangers = (similar_to(shared, seed + n) for n in range(1, 4))
    found = metrics.specificity(scale * teacher + shift, teacher, strangers)
    kept = [metrics.similarity_kept(teacher, each)["pearson"] for each in strangers]
    assert found["strangers"] == pytest.approx(np.mean(kept))
    assert found["specificity"] == pytest.approx(1 - np.mean(kept))
    assert 0 < found["partial"] <= 2


@pytest.mark.parametrize("near", [0.5, 0.1])  # how much is a student's own, not everybody's
def test_a_student_of_nobody_has_nothing_of_its_teachers_own_however_near_it_is_to_all(near):
    found = []
    for seed in range(30):
        shared = drawn_similarities(seed, 40)
        teacher, *strangers = (similar_to(shared, 100 * seed + n, classes=40) for n in range(1, 7))
        student = similar_to(shared, 100 * seed + 9, own=near, classes=40)
        found.append(metrics.specificity(student, teacher, strangers))
    for name in ("specificity", "partial"):
        values = [one[name] for one in found]
        assert abs(np.mean(values)) < 4 * np.std(values) / len(values) ** 0.5


def test_what_is_taken_from_the_teacher_counts_in_both():
    shared = drawn_similarities(0, 40)
    teacher, *strangers = (similar_to(shared, 1 + n, classes=40) for n in range(6))
    student = (similar_to(shared, 9, classes=40) + teacher) / 2
    found = metrics.specificity(student, teacher, strangers)
    assert found["specificity"] > 0.05
    assert found["partial"] > 0.2


def test_specificity_names_what_it_cannot_compare_and_has_no_partial_beside_a_twin():
    teacher = similar_to(drawn_similarities(0), 1)
    with pytest.raises(ValueError, match="strangers is empty; it must hold at least one"):
        metrics.specificity(teacher, teacher, [])
    with pytest.raises(ValueError, match=r"three or more classes.*student \(6, 6\), teacher \(5, "):
        metrics.specificity(teacher, teacher, [teacher[:5, :5]])
    found = metrics.specificity(similar_to(drawn_similarities(0), 2), teacher, [teacher])
    assert found["specificity"] == 0
    assert np.isnan(found["partial"])  # one stranger


@given(seeds)
def test_cka_is_the_alignment_of_centred_kernels(seed):
    x, y = features(seed, rows=20), features(seed + 1, rows=20, width=3)
    centring = np.eye(20) - 1 / 20
    ours, theirs = (centring @ z @ z.T @ centring for z in (x, y))
    expected = np.trace(ours @ theirs) / math.sqrt(
        np.trace(ours @ ours) * np.trace(theirs @ theirs)
    )
    assert metrics.linear_cka(x, y) == pytest.approx(expected, rel=1e-9)
    assert metrics.linear_cka(y, x) == pytest.approx(expected, rel=1e-9)
    order = np.random.default_rng(seed).permutation(20)
    assert metrics.linear_cka(x[order], y[order]) == pytest.approx(expected, rel=1e-9)
    assert 0 <= expected < 0.999


def test_cka_takes_tensors_and_has_no_value_for_features_that_never_change():
    x = torch.tensor(features(), dtype=torch.float32)
    assert metrics.linear_cka(x, x.numpy()) == pytest.approx(1)
    assert np.isnan(metrics.linear_cka(x, np.full((len(x), 2), 0.1)))


def test_measures_name_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="student has 11 rows, teacher 12"):
        metrics.linear_cka(features()[1:], features())
    for student, teacher in ((4, 5), (2, 2)):
        with pytest.raises(ValueError, match=rf"three or more classes.*student \({student}, "):
            metrics.similarity_kept(np.eye(student), np.eye(teacher))
