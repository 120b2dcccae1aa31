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

TERMS = (
    *("logit", "feature", "geometric", "rkd", "sp", "cc", "attention", "pkt", "dkd"),
    *("standardised", "dist", "moving", "remembered", "fixed", "balanced"),
)
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
        "pictures": 1000,
        "validation": 200,
        "stride": 2,
        "batch_size": 200,
        "learning_rate": 0.05,
        "teacher_network": "resnet8-24",
        "student_network": "resnet8-16",
        "epochs": 1,
        "temperature": 4.0,
        "stored": True,
        "balanced": [5, 8],
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


@pytest.mark.parametrize("kind", ["cifar", "torchvision"])
def test_featured_maps_are_what_attention_transfer_reads_of_what_is_pooled(kind):
    if kind == "cifar":
        network = models.cifar_resnet(8, width=16, classes=5, seed=3)
    else:
        network = models.build("resnet10", classes=5, seed=3, size=16, stem="small")
    featured = models.Featured(network, maps=True).eval()
    images = torch.randn(3, 3, 16, 16)
    joined = featured(images)
    maps, pooled = joined[:, featured.width + 5 :], featured.pooled.float()
    torch.testing.assert_close(
        pooled.mean((2, 3)), joined[:, : featured.width], rtol=0.02, atol=1e-3
    )
    torch.testing.assert_close(
        maps, pooled.square().mean(1).sqrt().flatten(1), rtol=1e-4, atol=1e-5
    )
    found = losses.attention_transfer(maps[:, None, None], maps[:, None, None].flip(0))
    expected = losses.attention_transfer(pooled, pooled.flip(0))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-8)
    maps.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in featured.parameters())


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


def test_of_a_copy_all_that_can_be_is_its_own_teachers(procedure_names):
    """A copy keeps all, by every measure; another network keeps what all have in common."""
    draw = np.random.default_rng(0)
    labels = np.arange(300) // 30
    common = draw.normal(size=(10, 6))[labels]
    given_, *strangers = (common + draw.normal(size=(300, 6)) for _ in range(4))
    found = procedure_names["whose"](given_, given_, strangers, labels)
    for name in ("pearson", "cka", "pictures"):
        assert found[name] == pytest.approx(1)
    assert found["specificity"] == pytest.approx(1 - found["strangers"])
    assert found["specificity"] == pytest.approx(found["room"])
    assert 0.01 < found["room"] < 0.9
    assert found["cka_specificity"] > 0.05
    assert found["pictures_specificity"] > 0.05
    nobodys = procedure_names["whose"](common, given_, strangers, labels)
    assert abs(nobodys["specificity"]) < 0.1
    assert nobodys["pearson"] > 0.5
    assert nobodys["room"] == pytest.approx(found["room"])  # the teacher's, whoever is asked
    alone = procedure_names["whose"](common, given_, [], labels)
    assert alone == {name: nobodys[name] for name in alone}
    assert "specificity" not in alone


def test_cosines_of_pictures_are_compared_without_regard_to_a_rotation(procedure_names):
    draw = np.random.default_rng(1)
    features, other = draw.normal(size=(2, 120, 5))
    turned = 3 * features @ np.linalg.qr(draw.normal(size=(5, 5)))[0]
    assert procedure_names["cosines_alike"](features, turned) == pytest.approx(1)
    assert abs(procedure_names["cosines_alike"](features, other)) < 0.5
    features[0] = 0
    assert math.isfinite(procedure_names["cosines_alike"](features, turned))


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
    maps = torch.rand(rows, 4, generator=draw, dtype=torch.float64)
    return names["Outputs"](*(part.requires_grad_() for part in (features, logits, maps)))


@pytest.mark.parametrize("term", TERMS)
def test_every_term_teaches_the_student_and_leaves_the_teacher_alone(procedure_names, term):
    own, given_ = drawn(procedure_names, 0, 6), drawn(procedure_names, 1, 4)
    given_ = procedure_names["Outputs"](*(part.detach() for part in given_))
    labels = torch.arange(12) % 5
    brought = procedure_names["modules"]([term], 6, 4, 5, 12, 0).double()
    aids = {"classes": 5, "temperature": 4.0, **brought}
    aids["fixed"] = losses.class_centres(given_.features.flip(0), labels, 5)
    found = procedure_names["value"](term, own, given_, labels, aids)
    found.backward()
    of_logits = ("logit", "dkd", "standardised", "dist")
    part = own.logits if term in of_logits else own.maps if term == "attention" else own.features
    assert float(found.detach()) > 0
    assert torch.isfinite(part.grad).all()
    assert part.grad.abs().max() > 0
    assert given_.features.grad is None


@pytest.mark.parametrize("classes", [5, 20])  # fewer and more than pictures in the batch
@pytest.mark.parametrize("variant", ["geometric", "moving", "remembered", "fixed", "balanced"])
def test_a_variant_is_the_geometric_term_of_its_own_centres(procedure_names, variant, classes):
    own, given_ = (drawn(procedure_names, s, w).features.detach() for s, w in ((0, 6), (1, 4)))
    labels = torch.arange(12) % 4  # class 4 has no picture
    brought = procedure_names["modules"]([variant], 6, 4, classes, 24, 0).double()
    aids = {"classes": classes, **brought}
    training = drawn(procedure_names, 2, 4).features.detach()
    aids["fixed"] = losses.class_centres(training, torch.arange(12) % 5, classes)
    found = procedure_names["geometric"](variant, own, given_, labels, aids)
    ours, theirs = (losses.class_centres(x, labels, classes) for x in (own, given_))
    plain = losses.geometric(ours, theirs)
    # At first sight an average and a memory are the batch's own.
    expected = losses.geometric(ours, aids["fixed"]) if variant == "fixed" else plain
    assert float(found) == pytest.approx(float(expected), rel=1e-12)
    if variant in ("moving", "remembered"):
        again = procedure_names["geometric"](variant, own.flip(0), given_, labels, aids)
        fresh = losses.geometric(losses.class_centres(own.flip(0), labels, classes), theirs)
        assert float(again) != pytest.approx(float(fresh), rel=1e-3)


def test_a_projector_is_drawn_from_the_seed_alone(procedure_names):
    state = torch.random.get_rng_state()
    first, same, other = (
        procedure_names["modules"]({"feature": 1.0}, 6, 4, 5, 12, seed)[
            "projector"
        ].projector.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_clusters_that_are_classes_score_one(procedure_names):
    labels = np.repeat(np.arange(4), 6)
    noise = np.random.default_rng(0).normal(0, 0.01, (24, 4))
    found = procedure_names["clustered"](np.eye(4)[labels] + noise, labels)
    assert found == pytest.approx(1)


def test_losses_start_higher_by_the_least_and_end_as_far_apart_as_the_farthest(procedure_names):
    alone, logit, feature = [3.0, 1.0], [3.5, 0.9], [3.25, 1.3]
    assert procedure_names["starts_higher"](alone, logit, feature) == pytest.approx(0.25)
    assert procedure_names["starts_higher"](alone, [2.0, 1.0], feature) == -1
    assert procedure_names["ends_close"](alone, logit, feature) == pytest.approx(0.2 - 0.3)
    assert procedure_names["ends_close"](alone, logit, alone) == pytest.approx(0.2 - 0.1)


def test_a_loss_falls_fastest_by_its_own_fall(procedure_names):
    fast, slow = [4.0, 1.0, 0.5, 0.0], [40.0, 30.0, 10.0, 0.0]  # ¾ and ¼ after a third
    assert procedure_names["falls_fastest"](fast, slow, slow) == pytest.approx(0.5)
    assert procedure_names["falls_fastest"](slow, fast, slow) == pytest.approx(-0.5)


def test_a_trade_off_is_a_rank_correlation_of_accuracy_and_what_is_kept(procedure_names):
    assert procedure_names["trade"](0.5, 0.4, 0.3, 0.7, 0.8, 0.9) == pytest.approx(-1)
    assert procedure_names["trade"](0.5, 0.4, 0.3, 0.9, 0.8, 0.7) == pytest.approx(1)


# Runs, tiny


def test_stored_and_asked_answers_teach_almost_the_same(procedure):
    """Stored as 16-bit floats they differ in the last digits alone, so do the losses."""
    terms = {"geometric": 10.0, "logit": 1.0, "attention": 1.0}
    common = {"terms": terms, "total_epochs": 1, "seed": 0, "strangers": []}
    found = [
        procedure["student"](**common, **setting(stored=stored)).results for stored in (True, False)
    ]
    stored, asked = (results["history"][0] for results in found)
    assert stored["loss"] == pytest.approx(asked["loss"], rel=1e-2)
    assert stored["loss"] > stored["cross_entropy"]
    assert found[0]["taught_by"] == found[1]["taught_by"]
    known = {name: setting()[name] for name in procedure["SEEN"]}
    kept = procedure["views"](total_epochs=1, seed=0, **known)
    assert kept.results["gigabytes"] < 1
    assert set(kept.content["weights"]) == {"views.safetensors"}


def test_a_student_alone_has_its_measures_and_no_answers_are_asked_for(procedure, monkeypatch):
    monkeypatch.setitem(procedure, "answers", None)
    common = {"total_epochs": 1, "seed": 0, **setting()}
    results = procedure["student"](terms={}, strangers=[1, 2], **common).results
    last = results["history"][-1]
    assert last["loss"] == pytest.approx(last["cross_entropy"], rel=1e-5)
    names = ("pearson", "cka", "pictures", "strangers", "specificity", "partial", "cka_specificity")
    for name in (*names, "nmi", "recall_at_1", "map", "agreement", "kl", "room"):
        assert math.isfinite(results[name]), name
    assert 0 <= results["linear_probe"] <= 1
    fewer = procedure["student"](terms={}, strangers=[], **common).results
    assert fewer["history"][0]["loss"] == last["loss"]
    assert "specificity" not in fewer


def test_in_balanced_batches_the_control_has_labels_alone(procedure, monkeypatch):
    common = {"total_epochs": 1, "seed": 0, "strangers": [], **setting(batch_size=40)}
    taught, plain = (
        procedure["student"](terms=terms, **common).results["history"][0]
        for terms in ({"balanced": 10.0}, {})
    )
    monkeypatch.setitem(procedure, "answers", None)
    control = procedure["student"](terms={"balanced": 0.0}, **common).results["history"][0]
    assert control["loss"] == pytest.approx(control["cross_entropy"], rel=1e-5)
    assert control["loss"] != plain["loss"]
    assert taught["loss"] > taught["cross_entropy"]


def test_training_pictures_are_the_first_of_every_class(procedure):
    images = procedure["parts"](0, setting(pictures=100)).train
    assert torch.bincount(images.labels).tolist() == [10] * 10
    every = procedure["parts"](0, setting(pictures=5000)).train
    assert len(every.labels) == 1000  # of what is not held out


def test_a_step_and_all_terms_are_timed(procedure):
    needed = {k: v for k, v in setting(batch_size=16).items() if k in procedure["NEEDED"]}
    timed = {"teacher_network": "resnet8-24", "student_network": "resnet8-16"}
    seconds = procedure["cost"](**timed, **needed).results
    assert seconds.keys() == {"step", *TERMS}
    assert min(seconds.values()) > 0


def test_neighbours_of_the_best_are_tried_until_both_have_been(procedure):
    assert procedure["beside"](pd.Series({0: 0.4})) == {-1, 1}
    assert procedure["beside"](pd.Series({-1: 0.5, 0: 0.4, 1: 0.3})) == {-2}
    assert procedure["beside"](pd.Series({-1: 0.3, 0: 0.4, 1: 0.3})) == set()
    assert procedure["beside"](pd.Series(dtype=float)) == set()
    assert [procedure["at"](10.0, step) for step in (-1, 0, 2)] == [3.33, 10.0, 90.0]


def test_a_coefficient_is_chosen_once_all_choice_seeds_have_run_and_by_their_mean(procedure):
    rows = [(1.0, 100, 0.4), (1.0, 101, 0.6), (3.0, 100, 0.7), (3.0, 101, None), (9.0, 100, 0.9)]
    found = pd.DataFrame(rows, columns=["coefficient", "seed", "validation_accuracy"])
    means = procedure["held_out"](found, [100, 101], "coefficient")
    assert means.to_dict() == {1.0: pytest.approx(0.5), 3.0: pytest.approx(0.35)}  # it diverged
    assert not len(procedure["held_out"](found[:0], [100], "coefficient"))


WRONG = {
    "teacher_network": ("resnet9-8", "string should match pattern"),
    "student_network": ("vgg", "string should match pattern"),
    "stride": (3, "less than or equal to 2"),
    "coefficients": ({"logit": 1.0}, "has none for 'feature'"),
    "worse_epochs": ([2, 1], "must rise"),
    "choice_seeds": ([7, 1], "must not hold 1 of seeds"),
    "balanced": ([8], "at least 2 items"),
    "factor": (1.0, "greater than 1"),
    "timed": (["resnet8-4"], "at least 2 items"),
    "temperature": (0, "greater than 0"),
    "seeds": ([0, 0], "must differ from one another"),
    "learning_rates": ([0.2, 0.1], "must rise"),
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
    given_["coefficients"] = given_["coefficients"] | {"magic": 1.0}
    with pytest.raises(parameters.ParameterError, match="coefficients"):
        procedure["Setting"].check(given_)
