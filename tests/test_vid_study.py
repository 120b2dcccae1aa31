"""Study 2: its pictures, networks and stored teacher, the authors' slips, its page."""

import csv
from types import SimpleNamespace

import jupytext
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import special, stats
from torch import nn

from kdutils import data, losses, models, notebooks, parameters, records, train
from kdutils.records import PROJECT

PAIR = {"teacher": "convtiny", "teacher_seed": 1000, "network": "convverytiny", "seed": 0}
SETTING = {"dataset": "digits", "pictures": 256, "validation": 400, "batch_size": 64}
SETTING |= {"epochs": 1, "lr": 0.001, "optimizer": "adam"}
LAYERED = {"mode": "eval", "share": 0.1, "share_of": "loss", "coded": False, "reduction": "sum"}
LAYERED |= {"weights": np.eye(4).tolist()}
SMOKE = {"scale": "smoke", "engine": "serial", "train_missing": True}
PAGE = notebooks.FOLDER / "2-vid.md"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the notebook defines; its runs lie in a folder of this test."""
    monkeypatch.setenv("KDUTILS_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("KDUTILS_RECORDS", str(tmp_path / "records"))
    return notebooks.procedure("vid", SMOKE)


# ------------------------------------------------------------------ networks, pictures


@pytest.mark.parametrize(("name", "weights"), [("convtiny", 57_994), ("convverytiny", 15_050)])
def test_small_networks_are_the_authors(name, weights):
    """As counted by hand from their files; the third convolution is the largest of the four."""
    network = models.small_cnn(name, classes=10, seed=0)
    assert sum(p.numel() for p in network.parameters()) == weights
    sizes = [m.weight.numel() for m in network if isinstance(m, nn.Conv2d)]
    assert np.argmax(sizes) == 2
    tapped = models.taps(network.eval(), ["layer1", "layer2", "layer3", "hidden"])
    with torch.no_grad():
        sides = [tuple(tap.shape[2:]) for tap in tapped(torch.zeros(2, 3, 32, 32)).values()]
    assert sides == [(15, 15), (6, 6), (2, 2), ()]


def test_pooling_before_relu_is_relu_before_pooling():
    network = models.small_cnn("convverytiny", classes=10, seed=0).eval()
    images = torch.randn(2, 3, 32, 32)
    maps = network.norm1(network.conv1(images))
    expected = torch.nn.functional.max_pool2d(maps.relu(), 2)
    assert torch.equal(network.layer1(network.pool1(maps)), expected)


def test_small_networks_are_drawn_from_the_seed_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two, other = (models.small_cnn("convtiny", classes=10, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.conv1.weight, two.conv1.weight)
    assert not torch.equal(one.conv1.weight, other.conv1.weight)


def test_an_unknown_small_network_is_named():
    with pytest.raises(ValueError, match="unknown network 'convhuge'; networks: convtiny, conv"):
        models.small_cnn("convhuge", classes=10, seed=0)


def test_pictures_are_the_first_in_their_order_and_those_held_out_the_last(names):
    known, found = data.load("digits"), names["parts"](0, SETTING)
    batches = list(found.train(1))
    assert torch.equal(torch.cat([b.index for b in batches]), torch.arange(256))
    assert torch.equal(torch.cat([b.labels for b in batches]), torch.tensor(known.y_train[:256]))
    assert torch.equal(found.validation.labels, torch.tensor(known.y_train[-400:]))
    first = torch.tensor(known.x_train[0].repeat(2, 0).repeat(2, 1)).float()
    mean, deviation = torch.tensor([125.3, 123.0, 113.9]), torch.tensor([63.0, 62.1, 66.7])
    torch.testing.assert_close(batches[0].images[0].permute(1, 2, 0), (first - mean) / deviation)
    again = list(found.train(2))
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, again, strict=True))


# ---------------------------------------------------------------------- teacher, student


def test_a_pre_activation_resnet_is_the_authors(names):
    """Its blocks add the first activation; weights as counted by hand from their file."""
    network = names["build"]("resnet10", 0, SETTING).eval()
    assert sum(p.numel() for p in network.parameters()) == 4_900_554
    assert names["build"]("resnet18", 0, SETTING).block8.conv2.weight.shape == (512, 512, 3, 3)
    layers = names["tapped_layers"]("resnet10")
    assert (len(layers), layers[1:4]) == (9, ["block1.conv1", "block1", "block2.conv1"])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = models.taps(network, [*layers, "logits"])(images)
        maps, first = found["stem"], network.block1
        assert torch.equal(maps, network.stem(images))
        active = first.norm1(maps).relu()
        assert torch.equal(found["block1.conv1"], first.conv1(active))
        inner = first.norm2(found["block1.conv1"]).relu()
        assert torch.equal(found["block1"], first.conv2(inner) + active)
        torch.testing.assert_close(found["logits"], network(images))
    assert [tuple(tap.shape[1:]) for tap in list(found.values())[-3:-1]] == [(512, 4, 4)] * 2


def test_large_layers_are_averaged_until_they_fit(names):
    tap = torch.randn(3, 64, 32, 32)
    found = names["shrunk"](tap)
    assert found.shape == (3, 64, 8, 8)
    torch.testing.assert_close(found[0, 0, 0, 0], tap[0, 0, :4, :4].mean())
    assert names["shrunk"](tap[:, :, :8, :8]).shape == (3, 64, 8, 8)


def test_stored_layers_are_the_teachers_in_either_mode(names):
    images = names["parts"](0, SETTING).train
    weights = names["alone"](network="convtiny", seed=1000, **SETTING).weights("e1")
    found, layers = {}, [*names["LAYERS"], "logits"]
    for mode in ("eval", "training"):
        found[mode], digest = names["knowledge"]("convtiny", 1000, mode, layers, images, SETTING)
        master = train.load_weights(names["build"]("convtiny", 0, SETTING), weights)
        tapped = models.taps(master.train(mode == "training"), layers)
        batch = list(images(1))[1]
        with torch.no_grad():
            expected = tapped(batch.images)
        assert list(found[mode]) == layers
        for name, tap in expected.items():
            stored = found[mode][name][batch.index].float()
            torch.testing.assert_close(stored, tap, rtol=0.05, atol=0.05)
    assert not torch.allclose(found["eval"]["logits"], found["training"]["logits"], atol=0.05)
    record = names["vid"](**PAIR, **LAYERED, **SETTING)
    assert record.results["teacher_weights"] == digest
    assert list(record.results["variances"]) == ["0-0", "1-1", "2-2", "3-3"]


def test_a_student_starts_as_the_network_alone_does(names):
    images, layers = names["parts"](0, SETTING).train, names["LAYERS"]
    stored, _ = names["knowledge"]("convtiny", 1000, "eval", layers, images, SETTING)
    taught = names["pupil"]("convverytiny", stored, np.eye(4), False, "sum", 0, SETTING)
    own = names["build"]("convverytiny", 0, SETTING).state_dict()
    for name, value in taught.student.state_dict().items():
        assert torch.equal(value, own[name]), name
    assert taught.training
    assert len(taught.vid.regressors) == 4


def test_a_share_of_the_gradient_is_measured_in_the_students_weights(names):
    images, layers = names["parts"](0, SETTING).train, names["LAYERS"]
    stored, _ = names["knowledge"]("convtiny", 1000, "eval", layers, images, SETTING)
    batch = next(iter(images(1)))
    given = {name: values[batch.index] for name, values in stored.items()}
    found = []
    for factor in (1.0, 50.0):
        weights = factor * np.eye(4)
        model = names["pupil"]("convverytiny", stored, weights, False, "sum", 0, SETTING)
        found.append(names["longer"](model, batch, given))
    assert found[0] == pytest.approx(50 * found[1], rel=0.02)  # bf16
    logits, term = model.float()(batch.images, given)
    lengths = []
    for one in (torch.nn.functional.cross_entropy(logits, batch.labels), term):
        model.zero_grad()
        one.backward(retain_graph=True)
        grads = [p.grad for p in model.student.parameters() if p.grad is not None]
        lengths.append(torch.cat([g.flatten() for g in grads]).norm().item())
    assert found[1] == pytest.approx(lengths[0] / lengths[1], rel=0.05)
    record = names["vid"](**PAIR, **LAYERED | {"share_of": "gradient"}, **SETTING)
    assert record.results["history"][-1]["loss"] < 10, "a summed loss would be hundreds of nats"


def test_training_mode_uses_a_batchs_statistics_and_leaves_the_network_alone(names):
    test = names["parts"](0, SETTING).test
    network = names["build"]("convverytiny", 3, SETTING)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = names["in_training_mode"](network, test, SETTING)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert test.batch_size != SETTING["batch_size"]
    right = 0
    for at in range(0, len(test.labels), 64):
        images = torch.cat([batch.images for batch in test(1)])[at : at + 64]
        with torch.no_grad():
            right += (network.train()(images).argmax(1) == test.labels[at : at + 64]).sum().item()
    assert found == pytest.approx(right / len(test.labels), abs=0.01)


# ------------------------------------------------------------------------- the slips


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_hintons_term_and_its_two_slips(names, reverse, scaled):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 6, 5)) * 3
    p, q = (special.softmax(logits / 3, axis=1) for logits in (teacher, student))
    pairs = zip(q, p, strict=True) if reverse else zip(p, q, strict=True)
    expected = np.mean([stats.entropy(a, b) for a, b in pairs]) * (9 if scaled else 1)
    found = names["softly"](torch.tensor(student), torch.tensor(teacher), 3.0, reverse, scaled)
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_reversed_kl_has_no_gradient_where_a_probability_is_0(names):
    """Why runs at low temperatures ended at chance: log 0, times nothing."""
    student = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    names["softly"](student, torch.zeros(1, 3), 0.2, True, False).backward()
    assert not student.grad.isfinite().all()
    student.grad = None
    names["softly"](student, torch.zeros(1, 3), 0.2, False, True).backward()
    assert student.grad.isfinite().all()


def test_as_coded_has_every_slip_and_each_other_setting_has_one(tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("KDUTILS_RECORDS", str(tmp_path / "records"))
    names = notebooks.procedure("vid", {"scale": "paper"}, ("runs",))
    for slips in (names["slips"], names["mistakes"]):
        *single, coded = slips
        assert coded == "as coded"
        assert all(len(slips[name]) == 1 for name in single)
        assert slips[coded] == {k: v for name in single for k, v in slips[name].items()}
    third = np.array(names["mistakes"]["last link only"]["weights"])
    assert third.sum() == third[2, 2] == 1
    for k, layer in enumerate(names["LAYERS"]):
        weights = np.array(names["all_to"][layer]["weights"])
        assert weights[k].sum() == weights.sum() == 1
    everything = np.array(names["all_to"]["all"]["weights"])
    assert (everything.sum(1) == 1).all()


def test_a_random_trial_is_fixed_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_RECORDS", str(tmp_path / "records"))
    names = notebooks.procedure("vid", {"scale": "paper"}, ("runs",))
    weights = np.array([names["summing_to_4"](names["uniform"](k)) for k in range(300)])
    np.testing.assert_allclose(weights.sum((1, 2)), 4, atol=0.001)
    assert weights.min() >= 0
    assert abs(weights.mean() - 0.25) < 1e-4
    assert stats.kstest(weights[:, 0, 0] / 4, stats.beta(1, 15).cdf).pvalue > 0.01  # Dirichlet's
    assert [one["weights"] for one in names["drawn"]] == weights[:30].tolist()


def test_a_random_trial_of_which_a_run_diverged_counts_it_as_0(tmp_path, monkeypatch):
    """The trial that would be best by its other seeds is not taken."""
    monkeypatch.setenv("KDUTILS_RECORDS", str(tmp_path / "records"))

    def ended(self, run, arguments, **_):
        if run.name != "vid" or [a["seed"] for a in arguments[:3]] != [100, 101, 102]:
            taken.extend(arguments if run.name == "vid" else [])
            return pd.DataFrame()
        trials = [{**a, "key": str(k), "epoch": a["epochs"]} for k, a in enumerate(arguments)]
        for k, row in enumerate(trials):
            row |= {"validation_accuracy": 0.5 + 0.01 * (k // 3 in (4, 7)) + 0.01 * (k // 3 == 7)}
        del trials[21]["epoch"], trials[21]["validation_accuracy"]
        return pd.DataFrame(trials)

    taken = []
    monkeypatch.setattr("kdutils.runs.Study.map", ended)
    names = notebooks.procedure("vid", {"scale": "paper"}, ("runs",))
    order = names["order"]
    assert (order.index[-1], order.index[0]) == (4, 7)
    assert order[7] == pytest.approx(2 / 3 * 0.52)
    best = [a for a in taken if a["weights"] == names["drawn"][4]["weights"]]
    assert [a["seed"] for a in best] == list(range(10))
    assert {(a["share"], a["share_of"]) for a in best} == {(0.5, "gradient")}


def test_tpe_finds_what_helps_and_keeps_what_each_trial_was(names, monkeypatch):
    """Of a study in which one link alone decides, and whose runs diverge where it has most."""
    asked = []

    def expected(how):
        link = how["weights"][0][0] / 4
        return 1 - abs(link - 0.2) if link < 0.4 else 0.0

    def computed(how):
        asked.append(how)
        ended = {"history": [{"validation_accuracy": expected(how)}]}
        return SimpleNamespace(content={"results": ended if expected(how) else {"error": "nan"}})

    monkeypatch.setattr(names["vid"], "find", lambda how: None)
    monkeypatch.setattr(names["vid"], "compute", computed)
    monkeypatch.setattr(names["vid"], "key", lambda how: f"{how['seed']} of {how['weights']}")
    search = names["search"].function
    trials = search(None, trials=30, seeds=[100, 101], seed=0, how={"coded": False})["trials"]
    assert [(one["seed"], one["teacher_seed"]) for one in asked] == [(100, 1100), (101, 1101)] * 30
    assert all(one["coded"] is False for one in asked)
    first = [names["summing_to_4"](names["uniform"](k)) for k in range(10)]
    assert [one["weights"] for one in trials[:10]] == first, "the random search's, already trained"
    assert trials[3]["runs"] == [f"{seed} of {first[3]}" for seed in (100, 101)]
    for one, told in zip(asked[::2], trials, strict=True):
        assert one["weights"] == told["weights"]
        assert told["validation_accuracy"] == pytest.approx(expected(one))
        weights = np.array(one["weights"])
        assert weights.shape == (4, 4)
        assert weights.sum() == pytest.approx(4, abs=0.001)
    late = np.mean([one["validation_accuracy"] for one in trials[15:]])
    assert late > np.mean([one["validation_accuracy"] for one in trials[:10]])
    again = search(None, trials=30, seeds=[100, 101], seed=0, how={"coded": False})["trials"]
    assert again == trials


def test_no_run_to_come_asks_for_weights_that_lie_elsewhere(monkeypatch):
    """Teachers of the Intel processor have left no weights: asked for, one would be trained again
    under the same key, by another processor, and its students would name weights of no record."""
    monkeypatch.setenv("KDUTILS_RUNS", "/nowhere")
    every = records.published("vid")
    published = {c["key"] for c in every}
    elsewhere = {c["key"] for c in every if c["made"]["processor"].startswith("Intel")}
    assert elsewhere
    asked = []

    def ended(self, run, arguments, **_):
        asked.extend((run, one) for one in arguments)
        if len(arguments) != 90:
            return pd.DataFrame()
        trials = [{**a, "key": str(k), "epoch": a["epochs"]} for k, a in enumerate(arguments)]
        return pd.DataFrame(trials).assign(validation_accuracy=0.5)

    monkeypatch.setattr("kdutils.runs.Study.map", ended)
    names = notebooks.procedure("vid", {"scale": "paper"}, ("runs",))
    to_come = [(run, a) for run, a in asked if "teacher" in a and run.key(a) not in published]
    kept = {"dataset", "pictures", "validation", "batch_size", "epochs", "lr", "optimizer"}
    for run, a in to_come:
        teacher = {"network": a["teacher"], "seed": a["teacher_seed"]}
        teacher |= {k: v for k, v in a.items() if k in kept}
        assert names["alone"].key(teacher) not in elsewhere, (run.name, a)


def test_the_thesiss_links_have_a_fourth_of_all(tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_RECORDS", str(tmp_path / "records"))
    asked = []
    monkeypatch.setattr(
        "kdutils.runs.Study.map",
        lambda self, run, arguments, **_: (
            asked.extend((run.name, one) for one in arguments) or pd.DataFrame()
        ),
    )
    names = notebooks.procedure("vid", {"scale": "paper"}, ("runs",))
    coded = [one for run, one in asked if run == "thesis"]
    written = [one for run, one in asked if run == "vid" and one["optimizer"] == "sgd"]
    assert [one["weights"] for one in coded] == [one["weights"] for one in written]
    assert {(one["lr"], one["epochs"]) for one in coded + written} == {(0.1, 100)}
    assert all(np.sum(one["weights"]) == 1 for one in coded)
    assert {(one["share"], one["coded"]) for one in written} == {(0.5, False)}
    assert list(names["by_thesis"])[2:5] == [
        "Hinton, as coded",
        "pairwise, as coded",
        "pairwise, as written",
    ]


def test_the_thesiss_variances_stay_where_they_began(names, monkeypatch):
    """And its loss is half the labels', half of Σ (t − μ)² ln 2 / 2 + ln(ln 2) / 2, weighted."""
    setting = SETTING | {"optimizer": "sgd", "lr": 0.1}
    kept, trained = {}, names["fit"]

    def fit(run, model, images, loss, s, **snapshots):
        if snapshots:  # the teacher
            return trained(run, model, images, loss, s, **snapshots)
        (batch, *_) = images.train(1)
        value = loss(model.train(), batch)
        value.backward()
        kept.update(model=model, value=value.item(), batch=batch)
        return {}

    monkeypatch.setitem(names["thesis"].function.__globals__, "fit", fit)
    weights = (np.eye(4) / 4).tolist()
    asked = {k: PAIR[k] for k in ("teacher", "teacher_seed", "network", "seed")}
    names["thesis"].function(None, weights=weights, **asked, **setting)
    model, batch = kept["model"], kept["batch"]
    assert all(alpha.grad is None and not alpha.any() for alpha in model.vid.alpha.values())
    assert all(p.grad is not None for p in model.student.parameters())
    stored, _ = names["knowledge"](
        "convtiny", 1000, "training", names["LAYERS"], names["parts"](0, setting).train, setting
    )
    fresh = names["pupil"]("convverytiny", stored, weights, True, "sum", 0, setting).train()
    own = fresh.student(batch.images)
    expected = torch.nn.functional.cross_entropy(own["logits"], batch.labels)
    for k, layer in enumerate(names["LAYERS"]):
        far = stored[layer][batch.index].float() - fresh.vid.regressors[f"{k}-{k}"](own[layer])
        expected = (
            expected
            + (far.square().flatten(1).sum(1).mean() * np.log(2) / 2 + np.log(np.log(2)) / 2) / 4
        )
    assert kept["value"] == pytest.approx(float(expected) / 2, rel=1e-3)


def test_lead_and_rank_of_the_third_layer(names):
    only_third = (np.eye(4)[2][:, None] * np.ones(4)).tolist()
    even = np.ones((4, 4)).tolist()
    assert names["lead"]([only_third, only_third]) == 1
    assert names["lead"]([even]) == 0
    assert names["rank_correlation"]([even, only_third], [0.5, 0.6]) == pytest.approx(1)


FASHION = [0.839, 0.849, 0.852, 0.853, 0.859, 0.857]  # the second column of the thesis's table


def test_what_the_authors_printed_has_its_place():
    with open(PROJECT / "data" / "reported" / "vid.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    thesis = [row for row in rows if row["commit"] == "0ee33d9"]
    of_text = [float(row["accuracy"]) for row in thesis if row["file"].endswith(".tex")]
    assert of_text == [0.541, 0.563, 0.591, 0.590, 0.595, 0.608, *FASHION]
    assert [k for k, row in enumerate(thesis) if row["dataset"]] == list(range(6, 12))
    logs = {}
    for row in thesis[12:]:
        assert (row["file"], int(row["cell"]) > 0) == ("code/run_wandb_experiments.ipynb", True)
        logs.setdefault(row["method"], []).append(float(row["accuracy"]))
    assert [len(found) for found in logs.values()] == [5, 5, 5, 5, 5, 30, 50]
    assert logs["pairwise, as coded"] == [0.1] * 5
    assert max(logs["Optuna"]) == 0.6081
    rows = [row for row in rows if row not in thesis]
    assert {row["commit"] for row in rows} == {"9447244"}
    assert all(row["file"].startswith("code/") and int(row["cell"]) for row in rows)
    failed = [row for row in rows if row["method"] == "Hinton" and row["accuracy"] == "0.1"]
    by_student = [sum(row["network"] == n for row in failed) for n in models.CNN_WIDTHS]
    assert by_student == [7, 7], "as the page says"
    paired = [float(r["accuracy"]) for r in rows if r["method"].startswith("pairwise")]
    assert (len(paired), max(paired)) == (15, 0.5979)


# ------------------------------------------------------------------------- parameters, the page


def parameters_of():
    names = {"__name__": "parameters"}
    cell = next(c for c in jupytext.read(PAGE).cells if "parameters" in c.metadata.get("tags", []))
    exec(cell.source, names)
    return {k: v for k, v in names.items() if not k.startswith("_")}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"pictures": 46_000}, "pictures = 46000 and validation = 5000 overlap: cifar10 has 50000"),
        ({"dataset": "digits"}, "pictures = 45000 and validation = 5000 overlap: digits has 1200"),
        ({"share": 1.5}, "parameter share is 1.5"),
        ({"soft_share": -0.1}, "parameter soft_share is -0.1"),
        ({"temperature": 0.0}, "parameter temperature is 0.0"),
        ({"choosing_seeds": [3]}, "choosing_seeds must not be in seeds"),
        ({"large": ["resnet10"]}, "parameter large is .*at least 2 items"),
        ({"epoch": 3}, "unknown parameter 'epoch'; did you mean 'epochs'?"),
    ],
    ids=str,
)
def test_a_wrong_parameter_is_named(names, wrong, sentence):
    assert names["Setting"].check(parameters_of())
    with pytest.raises(parameters.ParameterError, match=sentence):
        names["Setting"].check(parameters_of() | wrong)


def test_the_formula_that_the_page_shows_is_the_one_that_is_trained():
    source = "".join(cell.source for cell in jupytext.read(PAGE).cells)
    assert 'pages.source("losses.VID._link"' in source
    assert losses.VID._link.__name__ == "_link"
