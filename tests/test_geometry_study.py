"""Study 5: what it adds to kdutils, and its procedure, against slow or independent references."""

import math
import shutil

import jupytext
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from kdutils import losses, metrics, models, notebooks, parameters, records

TERMS = ("logit", "feature", "geometric", "rkd", "sp", "cc", "moving", "rbf", "fixed")
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The study's notebook, made from its source, in a folder of its own."""
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "params").mkdir()
    source = notebooks.FOLDER / "5-geometry.md"
    shutil.copy(source, folder)
    jupytext.write(jupytext.read(source), folder / "5-geometry.ipynb")
    return folder


@pytest.fixture
def procedure(page, monkeypatch):
    """The names that the notebook defines, at smoke scale."""
    smoke = notebooks.scale_parameters("geometry", "smoke") | {"engine": "serial"}
    monkeypatch.setattr(notebooks, "FOLDER", page)
    return notebooks.procedure("geometry", smoke)


def setting(**changed):
    s = {
        "dataset": "digits",
        "transfer": "digits",
        "validation": 200,
        "stride": 2,
        "batch_size": 200,
        "learning_rate": 0.05,
        "teacher_network": "resnet8-4",
        "student_network": "resnet8-2",
        "epochs": 1,
        "temperature": 4.0,
        "stored": True,
    }
    return s | changed


# Networks


def test_a_small_resnet_has_the_known_number_of_weights_and_layers():
    network = models.cifar_resnet(20, classes=10, seed=0)
    # 269,722 with shortcuts without weights; two of 1 × 1, 16 to 32 and 32 to 64, and their norms.
    expected = 269_722 + 16 * 32 + 32 * 64 + 2 * (32 + 64)
    assert sum(p.numel() for p in network.parameters()) == expected
    kernels = [m.kernel_size[0] for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert (kernels.count(3), kernels.count(1)) == (19, 2)


@pytest.mark.parametrize(("stride", "last"), [(1, 8), (2, 4)])
def test_a_small_resnet_halves_the_map_after_its_first_stage(stride, last):
    network = models.cifar_resnet(14, width=4, stride=stride, classes=7, seed=0)
    before = network[: [type(m).__name__ for m in network].index("AdaptiveAvgPool2d")]
    assert before(torch.zeros(2, 3, 32, 32)).shape == (2, 16, last, last)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_a_small_resnet_is_drawn_from_its_seed_alone():
    state = torch.random.get_rng_state()
    one, same, other = (models.cifar_resnet(8, width=2, classes=3, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b, c in zip(one.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        if a.ndim > 1:
            assert not torch.equal(a, c)


@pytest.mark.parametrize("depth", [2, 7, 9, 18, -4])
def test_a_depth_that_no_small_resnet_has_is_named(depth):
    with pytest.raises(ValueError, match=f"depth is {depth}; it must be 8, 14, 20"):
        models.cifar_resnet(depth, classes=3, seed=0)


@pytest.mark.parametrize("kind", ["cifar", "torchvision"])
def test_featured_gives_what_the_last_layer_reads_and_the_networks_own_logits(kind):
    def fresh():
        if kind == "cifar":
            return models.cifar_resnet(8, width=4, classes=5, seed=3).eval()
        return models.build("resnet10", classes=5, seed=3, size=16, stem="small").eval()

    images = torch.randn(2, 3, 16, 16)
    plain = fresh()
    featured = models.Featured(fresh()).eval()
    joined = featured(images)
    features, logits = joined[:, : featured.width], joined[:, featured.width :]
    assert featured.width == plain.fc.in_features
    torch.testing.assert_close(logits, plain(images))
    torch.testing.assert_close(plain.fc(features), logits)
    assert (features >= 0).all()  # after a ReLU and an average


# Search


def slow_retrieval(features, labels):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    first, precise = [], []
    for i in range(len(unit)):
        others = [j for j in range(len(unit)) if j != i]
        hits = [labels[j] == labels[i] for j in others]
        if any(hits):
            cosines = [float(unit[i] @ unit[j]) for j in others]
            first.append(hits[int(np.argmax(cosines))])
            precise.append(average_precision_score(hits, cosines))
    return {"recall_at_1": np.mean(first), "map": np.mean(precise)}


@given(seeds, st.integers(2, 6), st.integers(6, 20))
def test_retrieval_is_a_slow_loop(seed, classes, rows):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, 4)).astype(np.float32)
    labels = rng.integers(0, classes, rows)
    labels[:2] = 0
    assert metrics.retrieval(features, labels) == pytest.approx(
        slow_retrieval(features, labels), abs=1e-5
    )


def test_retrieval_in_parts_is_that_of_the_whole():
    """More rows than a part holds: every picture still ranks all others and never itself."""
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(530, 3)).astype(np.float32), rng.integers(0, 40, 530)
    expected = slow_retrieval(features, labels)
    assert metrics.retrieval(features, labels) == pytest.approx(expected, abs=1e-5)


@given(seeds, st.floats(1e-2, 1e2))
def test_retrieval_knows_angles_alone_and_neither_order_nor_names(seed, scale):
    rng = np.random.default_rng(seed)
    features, labels = rng.normal(size=(15, 3)), rng.integers(0, 3, 15)
    expected = pytest.approx(metrics.retrieval(features, labels), abs=1e-4)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    assert metrics.retrieval(scale * features @ rotation, labels) == expected
    order = rng.permutation(15)
    assert metrics.retrieval(features[order], 7 - labels[order]) == expected


def test_classes_far_apart_are_always_found():
    labels = np.repeat(np.arange(4), 5)
    features = np.eye(4)[labels] + 0.01
    assert metrics.retrieval(features, labels) == {"recall_at_1": 1, "map": 1}


def test_a_picture_alone_in_its_class_does_not_ask():
    features = np.array([[1.0, 0], [0.9, 0.1], [0, 1.0]])
    assert metrics.retrieval(features, [0, 0, 1]) == {"recall_at_1": 1, "map": 1}
    with pytest.raises(ValueError, match="no two pictures share a label"):
        metrics.retrieval(features, [0, 1, 2])


def test_a_network_whose_features_are_zero_is_measured_all_the_same():
    found = metrics.retrieval(np.zeros((6, 3)), [0, 0, 0, 1, 1, 1])
    assert all(math.isfinite(value) for value in found.values())


# Superclasses


def test_every_superclass_has_five_classes_in_the_order_of_labels():
    table = pd.read_csv(records.PROJECT / "data" / "superclasses.csv")
    assert len(table) == 100
    assert table["class"].tolist() == sorted(set(table["class"]))  # as CIFAR-100 numbers them
    assert (table.superclass.value_counts() == 5).all()
    assert table.superclass.nunique() == 20


# The procedure


@given(seeds, st.integers(2, 12))
def test_a_packed_matrix_comes_back_to_a_thousandth(procedure_names, seed, size):
    half = np.random.default_rng(seed).uniform(-1, 1, (size, size))
    matrix = (half + half.T) / 2
    np.fill_diagonal(matrix, 1)
    text = procedure_names["packed"](matrix)
    assert text.replace("-", "").replace(" ", "").isdigit()
    expected = matrix[np.triu_indices(size, 1)]
    np.testing.assert_allclose(procedure_names["upper"](text), expected, atol=0.000501)


def test_likeness_tells_the_own_teacher_from_strangers(procedure_names):
    """Copies of teachers are all their own teacher's; what no teacher made is nobody's."""
    draw = np.random.default_rng(0)
    common = draw.uniform(-0.5, 0.5, (30, 30))

    def packed(own):
        matrix = common + own
        return procedure_names["packed"](matrix + matrix.T)

    teachers = {seed: packed(draw.uniform(-0.2, 0.2, (30, 30))) for seed in (0, 1, 2)}
    values = {seed: procedure_names["upper"](text) for seed, text in teachers.items()}
    found = procedure_names["likeness"](teachers, teachers)
    np.testing.assert_allclose(found.own, 1)
    two = [np.corrcoef(values[0], values[other])[0, 1] for other in (1, 2)]
    assert found.strangers[0] == pytest.approx(np.mean(two))
    assert (found.strangers < 0.95).all()
    free = {seed: packed(0) for seed in teachers}  # what all teachers have in common
    found = procedure_names["likeness"](free, teachers)
    assert abs((found.own - found.strangers).mean()) < 1e-12  # each teacher counts on both sides
    assert not len(procedure_names["likeness"]({0: teachers[0]}, {0: teachers[0]}))
    assert list(procedure_names["likeness"]({}, {})) == ["own", "strangers"]


@pytest.fixture(scope="module")
def procedure_names(page):
    smoke = notebooks.scale_parameters("geometry", "smoke")
    kept, notebooks.FOLDER = notebooks.FOLDER, page
    try:
        return notebooks.procedure("geometry", smoke)
    finally:
        notebooks.FOLDER = kept


def drawn(names, seed, width, rows=12, classes=5):
    draw = torch.Generator().manual_seed(seed)
    features = torch.rand(rows, width, generator=draw, dtype=torch.float64)
    logits = torch.randn(rows, classes, generator=draw, dtype=torch.float64)
    return names["Outputs"](features.requires_grad_(), logits.requires_grad_())


@pytest.mark.parametrize("term", TERMS)
def test_every_term_teaches_the_student_and_leaves_the_teacher_alone(procedure_names, term):
    own, given_ = drawn(procedure_names, 0, 6), drawn(procedure_names, 1, 4)
    given_ = procedure_names["Outputs"](*(part.detach() for part in given_))
    labels = torch.arange(12) % 5
    brought = procedure_names["modules"]([term], 6, 4, 5, 0).double()
    aids = {"classes": 5, "temperature": 4.0, **brought}
    aids["fixed"] = losses.class_centres(given_.features.flip(0), labels, 5)
    found = procedure_names["value"](term, own, given_, labels, aids)
    found.backward()
    part = own.logits if term == "logit" else own.features
    assert float(found.detach()) > 0
    assert torch.isfinite(part.grad).all()
    assert part.grad.abs().max() > 0
    assert given_.features.grad is None


@pytest.mark.parametrize("classes", [5, 20])  # fewer and more than pictures in the batch
@pytest.mark.parametrize("variant", ["geometric", "moving", "rbf", "fixed"])
def test_a_variant_is_the_geometric_term_of_its_own_centres(procedure_names, variant, classes):
    own, given_ = (drawn(procedure_names, s, w).features.detach() for s, w in ((0, 6), (1, 4)))
    labels = torch.arange(12) % 4  # class 4 has no picture
    aids = {"classes": classes, **procedure_names["modules"]([variant], 6, 4, classes, 0).double()}
    training = drawn(procedure_names, 2, 4).features.detach()
    aids["fixed"] = losses.class_centres(training, torch.arange(12) % 5, classes)
    found = procedure_names["geometric"](variant, own, given_, labels, aids)
    ours, theirs = (losses.class_centres(x, labels, classes) for x in (own, given_))
    plain = losses.geometric(ours, theirs)
    expected = {
        "geometric": plain,
        "moving": plain,  # at first sight an average is the batch's own
        "rbf": losses.geometric(ours, theirs, "rbf"),
        "fixed": losses.geometric(ours, aids["fixed"]),
    }[variant]
    assert float(found) == pytest.approx(float(expected), rel=1e-12)
    if variant == "moving":
        again = procedure_names["geometric"](variant, own.flip(0), given_, labels, aids)
        fresh = losses.geometric(losses.class_centres(own.flip(0), labels, classes), theirs)
        assert float(again) != pytest.approx(float(fresh), rel=1e-3)


def test_a_projector_is_drawn_from_the_seed_alone(procedure_names):
    state = torch.random.get_rng_state()
    first, same, other = (
        procedure_names["modules"]({"feature": 1.0}, 6, 4, 5, seed)["projector"].projector.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_clusters_that_are_classes_score_one(procedure_names):
    labels = np.repeat(np.arange(4), 6)
    noise = np.random.default_rng(0).normal(0, 0.01, (24, 4))
    found = procedure_names["clustered"](np.eye(4)[labels] + noise, labels)
    assert found == {"nmi": pytest.approx(1), "ari": pytest.approx(1)}


def test_losses_start_higher_by_the_least_and_end_as_far_apart_as_the_farthest(procedure_names):
    alone, logit, feature = [3.0, 1.0], [3.5, 0.9], [3.25, 1.3]
    assert procedure_names["starts_higher"](alone, logit, feature) == pytest.approx(0.25)
    assert procedure_names["ends_close"](alone, logit, feature) == pytest.approx(0.1 - 0.3)
    assert procedure_names["ends_close"](alone, logit, alone) == pytest.approx(0.0)
    assert procedure_names["starts_higher"](alone, [2.0, 1.0], feature) == -1


# Runs, tiny


def test_stored_and_asked_answers_teach_almost_the_same(procedure):
    """Stored as 16-bit floats they differ in the last digits alone, so do the losses."""
    terms, common = {"geometric": 10.0, "logit": 1.0}, {"total_epochs": 1, "seed": 0}
    found = [
        procedure["student"](terms=terms, **common, **setting(stored=stored)).results
        for stored in (True, False)
    ]
    stored, asked = (results["history"][0] for results in found)
    assert stored["loss"] == pytest.approx(asked["loss"], rel=1e-2)
    assert stored["loss"] > stored["cross_entropy"]
    assert found[0]["taught_by"] == found[1]["taught_by"]
    kept = procedure["views"](total_epochs=1, seed=0, **setting())
    assert kept.results["gigabytes"] < 1
    assert set(kept.content["weights"]) == {"views.safetensors"}


def test_a_student_alone_has_its_measures_and_no_answers_are_asked_for(procedure, monkeypatch):
    monkeypatch.setitem(procedure, "answers", None)
    results = procedure["student"](terms={}, total_epochs=1, seed=0, **setting()).results
    last = results["history"][-1]
    assert last["loss"] == pytest.approx(last["cross_entropy"], rel=1e-5)
    for name in ("pearson", "spearman", "cka", "frobenius", "nmi", "ari", "recall_at_1", "map"):
        assert math.isfinite(results[name]), name
    assert 0 <= results["transfer_accuracy"] <= 1
    assert len(procedure["upper"](results["similarity"])) == 10 * 9 / 2


def test_all_terms_are_timed_for_all_sizes(procedure):
    s = {k: v for k, v in setting(batch_size=16).items() if not k.endswith("_network")}
    timed = {"teacher_network": "resnet8-4", "student_network": "resnet8-2"}
    rows = procedure["cost"](batches=[8, 16], class_counts=[10, 20], **timed, **s).results
    table = pd.DataFrame(rows["history"])
    assert (table.seconds > 0).all()
    terms = table[table.term != "step"]
    cases = {(8, 10), (16, 10), (16, 20)}
    assert set(zip(terms.batch, terms.classes, strict=True)) == cases
    assert len(terms) == len(cases) * len(procedure["TIMED"])
    assert sorted(table[table.term == "step"].batch) == [8, 16]


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (3.0, [1.0, 3.0, 10.0]),
        (10.0, [1.0, 3.0, 10.0, 33.3]),
        (1.0, [0.333, 1.0, 3.0, 10.0]),
        (None, [1.0, 3.0, 10.0]),
    ],
)
def test_a_list_is_made_longer_where_its_best_is_at_an_edge(procedure, best, expected):
    assert procedure["longer"]([1.0, 3.0, 10.0], best) == expected
    assert procedure["longer"]([2.0], best) == [2.0]


def test_a_coefficient_is_chosen_once_all_were_tried(procedure):
    rows = [("sp", 1.0, 0.4), ("sp", 3.0, 0.5), ("sp", 10.0, 0.0), ("cc", 1.0, 0.9)]
    found = pd.DataFrame(rows, columns=["method", "coefficient", "validation_accuracy"])
    assert procedure["best_of"](found, "sp", [1.0, 3.0, 10.0]) == 3.0
    assert procedure["best_of"](found, "cc", [1.0, 3.0]) is None


def test_the_second_teacher_is_worse_by_what_was_asked_where_one_is(procedure):
    lengths = pd.Series({3: 0.30, 4: 0.41, 5: 0.39, 6: 0.45})
    assert procedure["length_of"](lengths, 0.44) == 5
    assert procedure["length_of"](lengths, 0.2) == 3


WRONG = {
    "teacher_network": ("resnet9-8", "string should match pattern"),
    "student_network": ("vgg", "string should match pattern"),
    "stride": (3, "less than or equal to 2"),
    "coefficients": ({"logit": [1.0]}, "no list for 'feature'"),
    "other_lengths": ([2], "must not hold teacher_epochs"),
    "choice_seed": (0, "must not be one of seeds"),
    "timed": (["resnet8-4"], "timed must hold pairs"),
    "temperature": (0, "greater than 0"),
    "seeds": ([0, 0], "must differ from one another"),
    "timed_batches": ([64, 32], "must rise"),
    "engine": ("cloud", "it must be serial"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_parameter_is_named_in_one_sentence(procedure, name):
    wrong, sentence = WRONG[name]
    with pytest.raises(parameters.ParameterError, match=sentence) as error:
        procedure["Setting"].check(procedure["p"].model_dump() | {name: wrong})
    assert name in str(error.value)


def test_an_unknown_term_has_no_coefficients(procedure):
    given_ = procedure["p"].model_dump()
    given_["coefficients"] = given_["coefficients"] | {"magic": [1.0]}
    with pytest.raises(parameters.ParameterError, match="coefficients"):
        procedure["Setting"].check(given_)
