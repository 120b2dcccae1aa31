"""Study 2: its networks, its stored teacher, its three searches, and its page without records."""

import copy
import os
import subprocess
import sys

import jupytext
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from kdutils import losses, models, notebooks, parameters, results
from kdutils.runs import Run

PAIR = {"teacher": "convtiny", "network": "convverytiny", "seed": 0}
SETTING = {"dataset": "digits", "validation": 200, "batch_size": 64, "epochs": 2}
SETTING |= {"resnet_epochs": 1, "lr": 0.003}
SMOKE = {"scale": "smoke", "engine": "serial"}
LAPTOP = {"scale": "laptop", "engine": "serial", "train_missing": True}
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


# ------------------------------------------------------------------------- networks


@pytest.mark.parametrize("name", models.CNN_WIDTHS)
def test_small_networks_have_three_convolutions_and_two_fully_connected_layers(name):
    network = models.small_cnn(name, classes=7, seed=0)
    kinds = [type(m) for m in network if isinstance(m, nn.Conv2d | nn.Linear)]
    assert kinds == [nn.Conv2d] * 3 + [nn.Linear] * 2
    sizes = [m.weight.numel() for m in network if isinstance(m, nn.Conv2d | nn.Linear)]
    assert np.argmax(sizes) == 2, "the paper calls the third layer the largest"
    for side in (8, 16, 32):
        assert network(torch.zeros(2, 3, side, side)).shape == (2, 7)


def test_small_networks_are_drawn_from_the_seed_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two, other = (models.small_cnn("convtiny", classes=10, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.conv1.weight, two.conv1.weight)
    assert not torch.equal(one.conv1.weight, other.conv1.weight)
    teacher, student = models.CNN_WIDTHS.values()
    assert all(narrow < wide for wide, narrow in zip(teacher, student, strict=True))


def test_an_unknown_small_network_is_named():
    with pytest.raises(ValueError, match="unknown network 'convhuge'; networks: convtiny, conv"):
        models.small_cnn("convhuge", classes=10, seed=0)


@pytest.mark.parametrize(
    ("network", "count"), [("convtiny", 5), ("convverytiny", 5), ("resnet10", 4), ("resnet18", 4)]
)
def test_the_layers_of_every_network_end_with_its_logits(names, network, count):
    built = names["build"](network, 0, SETTING).eval()
    tapped = models.taps(built, names["layers"](network))
    images = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        found = tapped(images)
        torch.testing.assert_close(list(found.values())[-1], built(images))
    assert len(found) == count
    with pytest.raises(ValueError, match="no layer 'pool9'; layers: "):
        models.taps(built, ["pool9"])


# ------------------------------------------------------------------------- the page's formula


def test_the_formula_on_the_page_is_the_loss():
    source = "".join(
        cell.source for cell in jupytext.read(PAGE).cells if "def pair_loss" in cell.source
    )
    page = {"np": np}
    exec(source, page)
    rng = np.random.default_rng(0)
    s, t = torch.tensor(rng.normal(size=(50, 3))), torch.tensor(rng.normal(size=(50, 4)))
    vid = losses.VID(student={"s": s}, teacher={"t": t}).double()
    nn.init.normal_(vid.alpha)
    first, second, third = vid.regressors["0-0"].detach().split([3, 4, 4], 1)
    mean = ((s @ first.T).relu() @ second.T).relu() @ third.T
    expected = page["pair_loss"](t.numpy(), mean.numpy(), vid.variance.detach().numpy())
    assert vid({"s": s}, {"t": t}).item() == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------------- teacher and student


def test_pictures_look_the_same_in_every_epoch(names):
    images = names["parts"](0, SETTING).train
    seen = []
    for epoch in (1, 2):
        every = torch.empty(len(images.labels), 3, 16, 16)
        for batch in images(epoch):
            every[batch.index] = batch.images
        seen.append(every)
    assert torch.equal(*seen)
    assert (images.order(1) != images.order(2)).any()


def test_stored_layers_are_the_teachers_for_each_picture(names):
    images = names["parts"](0, SETTING).train
    stored, digest = names["knowledge"]("convtiny", images, 0, SETTING)
    master, _, again = names["trained_teacher"]("convtiny", 0, SETTING)
    assert digest == again
    batch = next(iter(images(2)))
    with torch.no_grad():
        expected = models.taps(master.eval(), names["layers"]("convtiny"))(batch.images)
    found = names["read"](stored, batch.index)
    assert list(found) == list(expected)
    for name, tap in found.items():
        torch.testing.assert_close(tap, expected[name], rtol=0.03, atol=0.03)


def test_a_student_learns_from_the_teacher_that_its_record_names(names):
    record = names["vid"](**PAIR, **names["drawn"](0), **SETTING)
    losses_by_epoch = [row["loss"] for row in record.results["history"]]
    assert losses_by_epoch[1] < losses_by_epoch[0]
    _, _, digest = names["trained_teacher"]("convtiny", 0, SETTING)
    assert record.results["teacher_weights"] == digest


def test_a_student_starts_as_the_network_alone_does(names):
    images = names["parts"](0, SETTING).train
    weights = np.eye(5).tolist()
    taught, *_ = names["pupil"]("convtiny", "convverytiny", weights, images, 0, SETTING)
    own = names["build"]("convverytiny", 0, SETTING).state_dict()
    for name, value in taught.student.state_dict().items():
        assert torch.equal(value, own[name]), name
    assert len(taught.vid.regressors) == 5
    assert taught.training


def test_settings_of_equal_share_and_proportions_train_the_same_student(names):
    """(0.5, λ) and (0.25, λ / 3) are the same objective, halved: Adam does not see the factor."""
    base = np.array([[0.75, 0, 1.5, 0, 0.75]] * 5)
    found = [
        names["vid"](**PAIR, **SETTING, weights=weights.tolist(), beta=beta).results["history"]
        for weights, beta in [(base, 0.5), (base / 3, 0.25)]
    ]
    for one, two in zip(*found, strict=True):
        assert one["loss"] / 2 == pytest.approx(two["loss"], rel=1e-2)
        assert one["test_nll"] == pytest.approx(two["test_nll"], rel=2e-2)
    other = names["vid"](**PAIR, **SETTING, weights=base.tolist(), beta=0.25).results["history"]
    assert other[-1]["test_nll"] != pytest.approx(found[0][-1]["test_nll"], rel=1e-4)


# ------------------------------------------------------------------------- random and TPE


def test_a_random_trial_is_fixed_by_its_number(names):
    first = names["drawn"](0)
    assert first["beta"] == 0.2732
    assert first["weights"][0] == [0.8144, 0.4397, 0.2997, 0.6116, 0.8197]
    every = np.array([np.ravel(names["drawn"](k)["weights"]) for k in range(200)])
    assert every.shape == (200, 25)
    assert 0 <= every.min() < every.max() <= 1
    assert abs(every.mean() - 0.5) < 0.02
    assert len(np.unique(every, axis=0)) == 200
    assert np.shape(names["drawn"](0, 4)["weights"]) == (4, 5)
    assert names["drawn"](0, 4)["weights"] == first["weights"][:4]


def test_a_teacher_of_another_depth_can_teach(names):
    pair = PAIR | {"teacher": "resnet10"}
    record = names["vid"](**pair, **names["drawn"](0, 4), **SETTING | {"epochs": 1})
    assert np.isfinite(record.results["history"][-1]["loss"])
    with pytest.raises(ValueError, match=r"λ is \(5, 5\); it must be \(4, 5\)"):
        names["vid"](**pair, **names["drawn"](0), **SETTING | {"epochs": 1})


def score(weights, beta):
    """An accuracy that is known: best at β = 0.8 with a strong first link."""
    return 1 - abs(beta - 0.8) - 0.1 * abs(weights[0][0] - 0.9)


def search(names, trials, batch, kill_at=None):
    """TPE on the known accuracy; returns the trained settings in order, killed at a trial."""
    trained = []

    def distil(run, teacher, network, weights, beta, seed, s):
        if len(trained) == kill_at:
            raise KeyboardInterrupt
        trained.append((weights, beta))
        row = {"epoch": 1, "validation_accuracy": score(weights, beta), "seconds": 0.0}
        return {"history": [row]}

    names["distil"] = distil
    study, found = names["study"], []
    for start in range(0, trials, batch):
        rows = study.map(
            names["tpe"],
            [PAIR | SETTING | {"batch": batch, "trial": k} for k in range(start, start + batch)],
        )
        found += rows.sort_values("trial")[["trial", "weights", "beta"]].values.tolist()
    return trained, found


def test_a_killed_search_goes_on_without_repeating_a_trial(tmp_path, monkeypatch):
    def fresh(folder):
        monkeypatch.setenv("KDUTILS_RUNS", str(tmp_path / folder))
        return notebooks.procedure("vid", LAPTOP)

    whole, expected = search(fresh("whole"), 12, 4)
    with pytest.raises(KeyboardInterrupt):
        search(fresh("killed"), 12, 4, kill_at=6)
    rest, found = search(fresh("killed"), 12, 4)
    assert len(whole) == 12
    assert len(rest) == 12 - 6, "finished trials are read, not trained"
    assert found == expected
    nothing, again = search(fresh("killed"), 12, 4)
    assert nothing == []
    assert again == expected


def test_tpe_learns_from_earlier_batches_and_only_from_those(names):
    _, found = search(names, 40, 10)
    scores = [score(weights, beta) for _, weights, beta in found]
    assert np.mean(scores[30:]) > np.mean(scores[:10]) + 0.05
    proposed, seen = names["proposed"], []
    for _, weights, beta in found[:10]:
        seen.append(([*np.ravel(weights), beta], score(weights, beta)))
    assert proposed(10, 10, seen) == {"weights": found[10][1], "beta": found[10][2]}
    assert proposed(10, 10, seen) != proposed(11, 10, seen)
    assert proposed(10, 10, [(v, -a) for v, a in seen]) != proposed(10, 10, seen)


# ------------------------------------------------------------------------- the third layer


def settings(weights, accuracies):
    """Rows as a study's ``map`` gives them: two epochs a setting, the first of no account."""
    rows = [
        {"key": f"k{n}", "trial": n, "epoch": e, "weights": w, "validation_accuracy": a * (e - 1)}
        for n, (w, a) in enumerate(zip(weights, accuracies, strict=True))
        for e in (1, 2)
    ]
    frame = pd.DataFrame(rows)
    frame.attrs["history"] = ["epoch", "validation_accuracy"]
    return frame


def test_the_third_layers_lead_is_over_the_strongest_other(names):
    layers = np.array([0.1, 0.6, 0.9, 0.2, 0.4])
    first = (layers[:, None] + [-0.1, 0.1, 0, 0, 0]).tolist()  # the mean over links is the layer's
    second = np.tile(layers[::-1, None], 5).tolist()
    found = results.of_rows(
        names["lead"], settings([first, second], [0.5, 0.6]), "trial", "weights"
    )
    assert found.how == "lead"
    assert found.values.to_dict() == {0: 0.3, 1: 0.3}
    assert found.sources == {0: [("k0", "weights", first)], 1: [("k1", "weights", second)]}
    weak = settings([np.tile([[0.5], [0], [0.25], [1], [0]], 5).tolist()], [0.5])
    assert results.of_rows(names["lead"], weak, "trial", "weights").values[0] == -0.75


def test_the_third_layers_weight_is_ranked_within_each_quarter(names):
    thirds, accuracies = [0.1, 0.9, 0.3, 0.2, 0.2, 0.1], [0.5, 0.6, 0.7, 0.4, 0.6, 0.8]
    weights = [[[1.0] * 5] * 2 + [[third] * 5] + [[0.0] * 5] * 2 for third in thirds]
    frame = settings(weights, accuracies)
    frame["quarter"] = frame.trial % 2  # ranks 1 3 2 by 1 3 2, and 3 2 1 by 2 1 3
    both = ("weights/2", "validation_accuracy")
    found = results.of_rows(names["rank_correlation"], frame, "quarter", *both)
    assert found.values.to_dict() == {0: 1, 1: pytest.approx(-0.5)}
    assert found.sources[0][:1] == [("k0", "weights/2", [0.1] * 5)]
    assert found.sources[0][3:] == [
        (f"k{n}", "history/1/validation_accuracy", accuracies[n]) for n in (0, 2, 4)
    ]
    few = results.of_rows(names["rank_correlation"], frame[frame.trial < 4], "quarter", *both)
    assert not len(few.values), "two settings have no rank correlation"
    assert not len(results.of_rows(names["lead"], pd.DataFrame(), "trial", "weights").values)


# ------------------------------------------------------------------------- learned λ


def taught_example(names):
    images = names["parts"](0, SETTING)
    taught, stored, _ = names["pupil"](
        "convtiny", "convverytiny", torch.ones(5, 5), images.train, 0, SETTING
    )
    batch, held = next(iter(images.train(1))), next(iter(images.validation(1)))
    given = {name: tap.double() for name, tap in names["read"](stored, batch.index).items()}
    batch = batch._replace(images=batch.images.double())
    held = held._replace(images=held.images.double())
    return taught.double(), batch, given, held


def test_the_hypergradient_is_the_change_of_the_held_out_loss_after_a_step(names):
    """By finite differences: train one step with a little more of one pair, look at held-out."""
    taught, batch, given, held = taught_example(names)
    slope, along = names["slopes"](taught, batch, given, held)
    assert along.shape == (5, 5)
    assert not along.requires_grad
    beta, rate = 0.4, 1e-6
    weights = torch.tensor(names["drawn"](3)["weights"]).double()

    def after_a_step(weights, beta):
        own = copy.deepcopy(taught)
        taps = own.student(batch.images)
        task = F.cross_entropy(list(taps.values())[-1], batch.labels)
        knowledge = (weights * own.vid.pairs(taps, given)).sum()
        loss = losses.balanced(task, knowledge, beta)
        student = list(own.student.parameters())
        gradients = torch.autograd.grad(loss, student)
        with torch.no_grad():
            for parameter, gradient in zip(student, gradients, strict=True):
                parameter -= rate * gradient
            logits = list(own.student(held.images).values())[-1]
            return F.cross_entropy(logits, held.labels).item()

    def change(more, less):
        return (after_a_step(*more) - after_a_step(*less)) / rate

    for i, j in [(0, 0), (2, 1), (4, 4), (1, 3)]:
        bump = torch.zeros(5, 5).double()
        bump[i, j] = 0.5
        found = change((weights + bump, beta), (weights - bump, beta))
        assert found == pytest.approx(-(1 - beta) * along[i, j].item(), rel=0.02, abs=1e-4)
    found = change((weights, beta + 0.05), (weights, beta - 0.05)) / 0.1
    expected = -(slope - (weights * along).sum()).item()
    assert found == pytest.approx(expected, rel=0.02, abs=1e-4)


LEARNED = {"trial": 0, "meta_every": 4, "meta_lr": 0.05}


def test_learned_weights_move_stay_in_range_and_keep_their_total(names):
    found = names["learned"](**LEARNED, **PAIR, **SETTING).results
    start = names["drawn"](0)
    weights = np.array(found["weights"])
    assert weights.shape == (5, 5)
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(np.sum(start["weights"]), abs=0.01)
    assert np.abs(weights - start["weights"]).max() > 0.01
    assert 0 < found["beta"] < 1
    assert found["beta"] != start["beta"]


def test_learning_that_was_interrupted_ends_with_the_same_bits(names, tmp_path):
    learned = names["learned"].function

    def went(folder, epochs):
        (tmp_path / folder).mkdir(exist_ok=True)
        arguments = LEARNED | PAIR | SETTING | {"epochs": epochs}
        # A teacher is trained for as many epochs as its student; here one epoch for both lengths.
        names["duration"] = lambda network, s: 1
        return learned(Run(tmp_path / folder, "key"), **arguments)

    whole = went("whole", 2)
    went("parts", 1)
    state = load_file(tmp_path / "parts" / "state.safetensors")
    assert state["network.theta"].shape == (25,)
    assert "network.vid.alpha" in state
    resumed = went("parts", 2)
    for name in ("weights", "beta", "teacher_weights"):
        assert resumed[name] == whole[name]
    results = [{k: v for k, v in row.items() if k != "seconds"} for row in whole["history"]]
    again = [{k: v for k, v in row.items() if k != "seconds"} for row in resumed["history"]]
    assert again == results


def test_variances_learn_faster_and_nothing_decays_them(names, tmp_path, monkeypatch):
    images = names["parts"](0, SETTING)
    taught, *_ = names["pupil"](
        "convtiny", "convverytiny", np.eye(5).tolist(), images.train, 0, SETTING
    )
    seen = {}

    def stop(*args, optimizer, **rest):
        seen["groups"] = optimizer.param_groups
        return []

    monkeypatch.setattr("kdutils.train.fit", stop)
    taught.theta = nn.Parameter(torch.zeros(25))
    s = SETTING | {"meta_lr": 0.02}
    run = Run(tmp_path, "key")
    names["fit"](run, taught, images, None, s, epochs=1, meta=[taught.theta])
    weights, variances, meta = seen["groups"]
    assert [q is taught.vid.alpha for q in variances["params"]] == [True]
    assert [q is taught.theta for q in meta["params"]] == [True]
    assert (variances["weight_decay"], meta["weight_decay"]) == (0, 0)
    assert variances["lr"] == 10 * weights["lr"]
    listed = [*weights["params"], *variances["params"], *meta["params"]]
    assert sorted(map(id, listed)) == sorted(map(id, taught.parameters()))


# ------------------------------------------------------------------------- parameters, the page


def parameters_of():
    names = {"__name__": "parameters"}
    cell = next(c for c in jupytext.read(PAGE).cells if "parameters" in c.metadata.get("tags", []))
    exec(cell.source, names)
    return {k: v for k, v in names.items() if not k.startswith("_")}


def test_networks_trained_in_a_stack_go_where_they_go_alone(names):
    batches = list(names["parts"](0, SETTING).train(1))[:3]
    networks = [names["build"]("convverytiny", k, SETTING) for k in range(3)]
    first = [[weight.detach().clone() for weight in n.parameters()] for n in networks]
    stack, together = names["several"](copy.deepcopy(networks), batches, 0.003, stacked=True)
    turn, apart = names["several"](networks, batches, 0.003, stacked=False)
    for _ in range(6):
        assert stack() == pytest.approx(turn(), rel=0.02)
    for k, (before, alone) in enumerate(zip(first, apart, strict=True)):
        moved = [
            torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])
            for after in (alone, [weight[k] for weight in together.values()])
        ]
        assert F.cosine_similarity(*moved, dim=0) > 0.9
        assert 0.9 < moved[0].norm() / moved[1].norm() < 1.1


def test_every_loss_is_timed_and_an_impossible_one_left_out(names):
    found = names["step_cost"](
        teachers=["convtiny", "resnet10"], network="convverytiny", repeats=2, seed=0, **SETTING
    ).results
    assert set(found["milliseconds"]) == {
        "labels", "pairwise, convtiny", "all to all, convtiny", "Hinton, convtiny",
        "all to all, resnet10", "Hinton, resnet10", "four in turn", "four stacked",
    }  # fmt: skip
    assert all(0 < low <= mid <= high for low, mid, high in found["milliseconds"].values())
    assert 0.3 < sum(found["time_shares"].values()) <= 1


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"tuning_seed": 0}, "tuning_seed is 0; it must not be in seeds"),
        ({"sweep_seeds": [7]}, "sweep_seeds has 7; all of them must be in seeds"),
        ({"temperature": 3.5}, "temperature is 3.5; it must be in sweep_temperatures"),
        ({"tuning_betas": [0.5, 0.5]}, "tuning_betas"),
        ({"sweep_betas": [0.5, 1.5]}, r"parameter sweep_betas\[1\] is 1.5"),
        ({"beta": -0.1}, "parameter beta is -0.1"),
        ({"trials": 3}, "parameter trials is 3: .* greater than or equal to 4"),
        ({"sweep_temperatures": [0.0]}, r"parameter sweep_temperatures\[0\] is 0.0"),
        ({"trails": 3}, "unknown parameter 'trails'; did you mean 'trials'?"),
    ],
    ids=str,
)
def test_a_wrong_parameter_is_named(names, wrong, sentence):
    assert names["Setting"].check(parameters_of())
    with pytest.raises(parameters.ParameterError, match=sentence):
        names["Setting"].check(parameters_of() | wrong)


def test_the_page_stands_without_records_and_without_pytorch(tmp_path):
    program = f"""
import linecache, sys
import jupytext, matplotlib
matplotlib.use("Agg")
names = {{"__name__": "page"}}
for number, cell in enumerate(jupytext.read({str(PAGE)!r}).cells):
    if cell.cell_type == "code":
        name = f"cell {{number}}"
        linecache.cache[name] = (1, None, cell.source.splitlines(keepends=True), name)
        exec(compile(cell.source, name, "exec"), names)
assert "torch" not in sys.modules
assert "optuna" not in sys.modules
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "KDUTILS_RECORDS": str(tmp_path)},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "vid-7: no verdict" in run.stdout
