"""Study 4: its formulas, its optimizer, its shifts and split, its gate, and chains that go on."""

import json
import math
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from kdutils import claims, data, models, notebooks, pictures, records, runs, train

probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def logit(p):
    return torch.logit(torch.tensor(p, dtype=torch.float64))


@pytest.fixture(scope="module")
def study():
    return notebooks.procedure("binary", {"scale": "laptop", "train_missing": False})


# Formulas


def test_accuracy_uncertainty_and_loss_by_hand(study):
    found = study["measured"](logit([0.9, 0.5, 0.2, 0.6]), torch.tensor([1.0, 0.5, 0.7, 0.4]))
    # Right: 0.9 with 1; 0.5 with 0.5, both not above it. Wrong: 0.2 with 0.7, 0.6 with 0.4.
    assert found["accuracy"] == 0.5
    assert found["uncertainty"] == pytest.approx((0.01 + 0.25 + 0.04 + 0.16) / 4)
    terms = [math.log(0.9), math.log(0.5), 0.7 * math.log(0.2) + 0.3 * math.log(0.8)]
    terms += [0.4 * math.log(0.6) + 0.6 * math.log(0.4)]
    assert found["loss"] == pytest.approx(-sum(terms) / 4)


@given(probabilities, st.data())
def test_accuracy_is_formula_11_for_real_labels(study, p, draw):
    y = draw.draw(st.lists(st.floats(0, 1), min_size=len(p), max_size=len(p)))
    z = logit(p)
    p = z.sigmoid().tolist()  # what is left of p after going there and back
    same = [(a > 0.5 and b > 0.5) or (a <= 0.5 and b <= 0.5) for a, b in zip(p, y, strict=True)]
    labels = torch.tensor(y, dtype=torch.float64)
    if z.isfinite().all():
        assert study["measured"](z, labels)["accuracy"] == pytest.approx(np.mean(same))


@given(probabilities)
def test_uncertainty_is_between_0_and_a_quarter_and_blind_to_a_swap_of_classes(study, p):
    found = study["uncertainty"](torch.tensor(p, dtype=torch.float64))
    assert 0 <= found <= 0.25
    swapped = study["uncertainty"](1 - torch.tensor(p, dtype=torch.float64))
    assert found == pytest.approx(swapped, abs=1e-12)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1), st.floats(1e-6, 1 - 1e-6))
def test_uncertainty_is_0_only_where_all_are_sure(study, sure, other):
    assert study["uncertainty"](torch.tensor(sure)) == 0
    assert study["uncertainty"](torch.tensor([*sure, other], dtype=torch.float64)) > 0


def test_hard_and_soft_labels_by_hand(study):
    z = logit([0.9, 0.5, 0.2])
    assert study["labels_from"](z, "hard").tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(study["labels_from"](z, "soft"), torch.tensor([0.9, 0.5, 0.2]))
    sharp = study["labels_from"](z, "sharp", 0.5)
    torch.testing.assert_close(sharp, torch.tensor([81 / 82, 0.5, 1 / 17]))


@given(st.integers(0, 99), st.floats(0.002, 0.2))
def test_the_temperature_found_gives_the_uncertainty_wanted(study, seed, wanted):
    z = torch.as_tensor(np.random.default_rng(seed).normal(0, 3, 50))
    found = study["temperature_for"](z, wanted)
    assert study["uncertainty"]((z / found).sigmoid()) == pytest.approx(wanted, abs=1e-6)


def test_no_temperature_helps_where_nothing_is_known(study):
    with pytest.raises(ValueError, match="must have different signs"):
        study["temperature_for"](torch.zeros(5), 0.1)


def test_bins_count_every_prediction_and_the_last_one_holds_1(study):
    z = torch.tensor([-50.0, -2.0, 0.0, 0.1, 50.0])
    found = study["binned"](z, torch.tensor([0, 1, 0, 1, 1]))
    assert len(found["count"]) == 20
    assert found["count"][0] == found["count"][2] == found["count"][-1] == 1
    assert found["count"][10] == 2
    assert sum(found["second"]) == 3
    p = z.double().sigmoid()
    assert sum(found["sum"]) == pytest.approx(float(p.sum()))
    # One prediction a bin but for two, one of each class, in the bin from 0.5.
    off = [p[0], p[1] - 1, p[2] + p[3] - 1, p[4] - 1]
    assert found["ece"] == pytest.approx(float(sum(abs(x) for x in off)) / 5)


# Adam


def keras(parameter, gradients, lr, decay, epsilon=1e-7):
    """Keras 2's Adam, written from the paper's formulas 4, 5, 9 and 10, m and v as they are."""
    theta = np.array(parameter, float)
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(gradients, 1):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        eta = lr / (1 + decay * (t - 1)) * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        theta = theta - eta * m / (np.sqrt(v) + epsilon)
    return theta


def stepped(optimizer, parameter, gradients, schedule=None):
    for g in gradients:
        parameter.grad = torch.as_tensor(g)
        optimizer.step()
        if schedule:
            schedule.step()
    return parameter.detach().numpy()


@given(
    st.integers(0, 999), st.sampled_from([1e-9, 1e-7, 1e-4, 1.0]), st.sampled_from([0.0, 0.01, 0.5])
)
def test_the_optimizer_steps_as_keras_does_at_any_size_of_gradient(seed, size, decay):
    rng = np.random.default_rng(seed)
    start, gradients = rng.normal(size=4), rng.normal(size=(40, 4)) * size
    parameter = torch.nn.Parameter(torch.tensor(start))
    found = stepped(train.keras_adam([parameter], 0.01, decay), parameter, gradients)
    np.testing.assert_allclose(found, keras(start, gradients, 0.01, decay), rtol=1e-9, atol=1e-11)


def test_torchs_own_adam_agrees_unless_gradients_are_as_small_as_epsilon():
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=4), rng.uniform(0.5, 2, (40, 4))  # of one sign

    def moved(size):
        parameter = torch.nn.Parameter(torch.tensor(start))
        optimizer = torch.optim.Adam([parameter], lr=0.01, eps=1e-7)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + 0.01 * t))
        found = stepped(optimizer, parameter, gradients * size, schedule) - start
        return found / (keras(start, gradients * size, 0.01, 0.01) - start)

    np.testing.assert_allclose(moved(1.0), 1, atol=1e-4)
    assert (moved(1e-7) > 1.5).all()  # the smaller ε lets torch go further


def test_correcting_twice_as_printed_would_shorten_the_first_step():
    """Formulas 6, 7 and 8 together: the first step is √(1 − β₂) / (1 − β₁) of the rate."""
    m, v = 0.1 * 3.0, 0.001 * 9.0
    corrected = (m / (1 - 0.9)) / math.sqrt(v / (1 - 0.999))
    assert corrected * math.sqrt(1 - 0.999) / (1 - 0.9) == pytest.approx(0.316, abs=1e-3)
    assert 1 - keras([1.0], [np.array([3.0])], 0.01, 0.0)[0] == pytest.approx(0.01, rel=1e-4)


def test_steps_are_counted_on_after_a_resumption():
    rng = np.random.default_rng(1)
    start, gradients = rng.normal(size=4), rng.normal(size=(30, 4))
    whole = torch.nn.Parameter(torch.tensor(start))
    stepped(train.keras_adam([whole], 0.01, 0.1), whole, gradients)
    part = torch.nn.Parameter(torch.tensor(start))
    first = train.keras_adam([part], 0.01, 0.1)
    stepped(first, part, gradients[:11])
    second = train.keras_adam([part], 0.01, 0.1)
    second.load_state_dict(first.state_dict())
    stepped(second, part, gradients[11:])
    torch.testing.assert_close(part, whole, rtol=0, atol=0)


# Shifts


def shifted(study, n=30, size=10, shift=0.4, **options):
    images = np.random.default_rng(5).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    options = {"batch_size": 7, "seed": 3} | options
    return images, study["shifted"](images, np.arange(n) % 2, shift, **options)


def test_shifted_pictures_equal_a_slow_reference_exactly(study):
    images, of = shifted(study)
    views = of.views(5)
    seen = []
    for batch in of(5):
        for view, index in zip(batch.images, batch.index.tolist(), strict=True):
            flipped, down, right = views[:, index]
            picture = images[index, :, ::-1] if flipped else images[index]
            for i in range(10):
                for j in range(10):
                    row = min(max(i + down - 4, 0), 9)
                    column = min(max(j + right - 4, 0), 9)
                    expected = picture[row, column].astype(np.float32) * np.float32(1 / 255)
                    np.testing.assert_array_equal(view[:, i, j].numpy(), expected)
            seen.append(index)
    assert sorted(seen) == list(range(30))
    assert {0, 1} == set(views[0])
    assert views[1:].min() == 0
    assert views[1:].max() == 8


def test_a_shift_of_0_flips_and_does_nothing_else(study):
    images, of = shifted(study, shift=0.0, shuffle=False, batch_size=30)
    (batch,) = of(1)
    flipped = of.views(1)[0].astype(bool)
    assert 0 < flipped.sum() < 30
    images[flipped] = images[flipped, :, ::-1]
    expected = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    np.testing.assert_allclose(batch.images.numpy(), expected, atol=1e-7)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_shifted_views_depend_on_no_batch_and_differ_between_epochs(study):
    def by_image(of, epoch):
        out = torch.empty(30, 3, 10, 10)
        for batch in of(epoch):
            out[batch.index] = batch.images
        return out

    one, other = shifted(study)[1], shifted(study, batch_size=30, shuffle=False)[1]
    assert torch.equal(by_image(one, 2), by_image(other, 2))
    assert not torch.equal(by_image(one, 2), by_image(one, 3))


@pytest.mark.parametrize(("before", "after"), [(96, 64), (224, 64), (32, 64), (50, 32)])
def test_a_smaller_size_has_the_pixels_that_an_import_at_that_size_has(before, after):
    images = np.random.default_rng(0).integers(0, 256, (3, before, before, 3), dtype=np.uint8)
    nearest = Image.Resampling.NEAREST  # as in pictures.collect
    expected = [np.asarray(Image.fromarray(x).resize((after, after), nearest)) for x in images]
    np.testing.assert_array_equal(pictures.nearest(images, after), expected)


def test_pictures_come_at_the_size_asked_for():
    whole = pictures.pair("digits", ("3", "8")).images
    small = pictures.pair_at(8, "digits", ("3", "8"))
    assert whole.shape[1:] == (16, 16, 3)
    np.testing.assert_array_equal(small.images, whole[:, 1::2, 1::2])
    np.testing.assert_array_equal(pictures.pair_at(16, "digits", ("3", "8")).images, whole)


# The split


@given(st.integers(0, 2**31), st.integers(7, 80), st.integers(7, 80))
def test_the_split_is_disjoint_whole_and_stratified(study, seed, cats, dogs):
    labels = np.random.default_rng(seed).permutation(np.repeat([0, 1], [cats, dogs]))
    found = study["thirds"](labels, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(cats + dogs))
    for part, share in zip(found, (0.7, 0.15, 0.15), strict=True):
        assert len(part)
        assert (np.diff(part) > 0).all()
        for label, n in ((0, cats), (1, dogs)):
            assert abs((labels[part] == label).sum() - share * n) < 1


def test_the_split_is_the_papers_at_its_size_and_the_same_on_any_machine(study):
    labels, thirds = np.arange(25_000) % 2, study["thirds"]
    found = thirds(labels, 0)
    assert [len(part) for part in found] == [17_500, 3_750, 3_750]
    assert [np.bincount(labels[part]).tolist() for part in found[1:]] == [[1875, 1875]] * 2
    # Philox's bits and a stable sort: these numbers are the same everywhere.
    assert [part[:4].tolist() for part in thirds(np.arange(40) % 2, 7)] == SPLIT_OF_SEED_7
    assert not np.array_equal(found[2], thirds(labels, 1)[2])


SPLIT_OF_SEED_7 = [[1, 2, 3, 4], [9, 14, 15, 18], [0, 10, 13, 27]]


def test_too_few_pictures_for_three_parts_are_named(study):
    with pytest.raises(ValueError, match="a class has 3 pictures; at least 7"):
        study["thirds"](np.array([0] * 20 + [1] * 3), 0)


def test_a_picture_in_two_parts_is_named_and_stays_in_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_RUNS", str(tmp_path))
    both = pictures.pair("digits", ("3", "8"))
    images = both.images.copy()
    images[1::2] = images[: 2 * (len(images) // 2) : 2]  # of any two neighbours, one
    twins = (images, both.labels, ["3", "8"])
    monkeypatch.setattr(pictures, "_heap", lambda name: twins)
    pictures.pair_at.cache_clear()
    names = notebooks.procedure("binary", {"scale": "laptop", "train_missing": True})
    setting = {"dataset": "digits", "classes": ["3", "8"], "size": 16}
    found = names["splits"](seed=1, **setting).results
    shown = names["parts"](1, 0, 0.0, setting | {"batch_size": 50})
    pictures.pair_at.cache_clear()
    seen, expected, left = set(), [], []
    for part in names["thirds"](both.labels, 1):
        new = [i for i in part if images[i].tobytes() not in seen]
        left.append(new)
        expected += sorted({*part} - {*new})
        seen |= {images[i].tobytes() for i in part}
    assert found["in_two_parts"] == sorted(expected)
    assert len(expected) > 9
    assert found["fingerprint"] == data.fingerprint(images, both.labels)
    for part, kept in zip(("train", "validation", "test"), left, strict=True):
        assert shown["hand"][part].tolist() == both.labels[kept].tolist()
    assert sum(len(batch.index) for batch in shown["shown"](1)) == len(left[0])


def test_a_smaller_size_is_cut_once_and_the_larger_pictures_are_let_go():
    pictures.pair_at.cache_clear()
    pictures.pair.cache_clear()
    one = pictures.pair_at(8, "digits", ("3", "8"))
    assert pictures.pair_at(8, "digits", ("3", "8")) is one
    assert pictures.pair.cache_info().currsize == 0


# Chains

CHAIN = """
import os, signal, sys
from kdutils import notebooks, train

(kill_at, *folders), fits, plain = sys.argv[1:], [0], train.fit

def fit(network, batches, loss, **options):
    fits[0] += 1
    number, steps = fits[0], [0]

    def counted(model, batch):
        steps[0] += 1
        if number == int(kill_at) and steps[0] == len(batches) + 2:  # in the second epoch
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(model, batch)

    return plain(network, batches, counted, **options)

train.fit = fit
setting = {"dataset": "digits", "classes": ["3", "8"], "size": 16, "batch_size": 64, "views": 1}
recipe = {"optimizer": "sgd", "decay": 0.0, "shift": 0.4, "lr": 0.003, "epochs": 2}
master = {"network": "resnet10", "recipe": recipe | {"epochs": 1, "shift": 0.0}, "before": None}
for folder in folders:
    fits[0], os.environ["KDUTILS_RUNS"] = 0, folder
    names = notebooks.procedure("binary", {"scale": "laptop", "train_missing": True})
    how = {"master": master, "network": "resnet10", "recipe": recipe, **setting}
    names["student"](labels="hard", generation=5, seed=0, **how)
    print(fits[0])
"""


def chain(*folders, kill_at=0):
    """The same chain of runs in each folder, one after the other; says how many were trained."""
    return subprocess.run(
        [sys.executable, "-c", CHAIN, str(kill_at), *folders],
        cwd=records.PROJECT,
        capture_output=True,
        encoding="utf-8",
    )


def found_in(folder):
    contents = [
        json.loads(path.read_text(encoding="utf-8")) for path in Path(folder).rglob("record.json")
    ]
    return {c["arguments"].get("generation", -1): c for c in contents}


def test_a_chain_killed_at_generation_4_goes_on_at_generation_4(study, tmp_path):
    killed = chain(tmp_path / "killed", kill_at=6)  # teacher, generations 0 to 3, then this one
    assert killed.returncode == -signal.SIGKILL
    before = found_in(tmp_path / "killed")
    assert sorted(before) == [-1, 0, 1, 2, 3]
    rest = chain(tmp_path / "killed", tmp_path / "whole")
    assert rest.returncode == 0, rest.stderr
    assert rest.stdout.split() == ["2", "7"]  # generations 4 and 5 alone were trained; all
    after, expected = found_in(tmp_path / "killed"), found_in(tmp_path / "whole")
    for generation, content in before.items():
        assert after[generation] == content
    for generation in range(-1, 6):
        assert records.timeless(after[generation]) == records.timeless(expected[generation])
    for generation, content in expected.items():  # what nobody reads of links is not measured
        found, link = content["results"], generation > 0
        assert len(found["augmented"]) == len(found["augmented_own"]) == (0 if link else 1)
        assert all(("validation_accuracy" in row) != link for row in found["history"])
        wrong = (1 - found["measured"]["unseen"]["accuracy"]) * found["asked"]
        all_right = np.packbits(np.ones(found["asked"], int)).tobytes().hex()
        assert study["right_alone"](all_right, found["right"], found["asked"]) == round(wrong)
        both = [found["measured"][part]["accuracy"] for part in ("validation", "test")]
        assert np.mean(both) == pytest.approx(found["measured"]["unseen"]["accuracy"], abs=0.02)
        assert set(found["own"]) == {"train", "validation", "test", "unseen"}
        assert any(name[0] == "e" for name in content["weights"]) != link
        if generation >= 0:  # a hard label is wrong where the network before is
            before = expected[generation - 1]["results"]["measured"]["train"]["accuracy"]
            assert found["differ"] == round(sum(found["bins"]["train"]["count"]) * (1 - before))


def test_what_is_taught_by_a_diverged_network_counts_as_diverged(tmp_path, monkeypatch):
    """And nothing else does: other seeds, and the training as a whole, go on."""
    monkeypatch.setenv("KDUTILS_RUNS", str(tmp_path))
    names = notebooks.procedure("binary", {"scale": "laptop", "train_missing": True})
    names["study"].engine = "serial"
    setting = {"dataset": "digits", "classes": ["3", "8"], "size": 16, "batch_size": 64, "views": 1}
    recipe = {"optimizer": "sgd", "decay": 0.0, "shift": 0.4, "lr": 0.003, "epochs": 1}
    master = {"network": "resnet10", "recipe": recipe | {"shift": 0.0}, "before": None}
    fixed = setting | {"master": master, "network": "resnet10", "recipe": recipe}
    lost = fixed | {"labels": "soft", "generation": 1, "seed": 0}
    student = names["student"]

    def fit(*_, folder, **rest):
        if folder == student.folder(lost):
            raise train.Diverged(3, 17)
        return [{"epoch": 1, "loss": 0.5, "seconds": 0.1}]

    monkeypatch.setattr(train, "fit", fit)
    asked = runs.grid(fixed, labels=["soft"], generation=[0, 1, 2, 3], seed=[0, 1])
    asked += runs.grid(fixed, labels=["sharp"], generation=[2, 3], seed=[0, 1])
    rows = names["study"].map(student, asked, optional=True, failing=True)
    told = {(r.labels, r.generation, r.seed): r.error for r in rows.itertuples()}
    failed = {k: error for k, error in told.items() if isinstance(error, str)}
    behind = [("soft", 2, 0), ("soft", 3, 0), ("sharp", 2, 0), ("sharp", 3, 0)]
    assert set(failed) == {("soft", 1, 0), *behind}
    assert failed["soft", 1, 0] == "the loss is not finite in epoch 3, step 17"
    before = "the loss of a network before it is not finite in epoch 3, step 17"
    assert {failed[one] for one in behind} == {before}
    assert len(told) == len(asked)


def test_a_rate_rises_for_15_of_100_epochs_and_falls_to_0_and_momentum_stays(study, monkeypatch):
    monkeypatch.setattr(train, "fit", lambda *_, **rest: rest)
    recipe = {"optimizer": "sgd", "lr": 0.1, "epochs": 100}
    run, model = runs.Run(Path()), torch.nn.Linear(2, 1)
    given = study["fit"](run, model, None, None, recipe)
    optimizer, rates = given["optimizer"], []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[0]["momentum"] == 0.9
        optimizer.step()
        given["schedule"].step()
    top = int(np.argmax(rates))
    assert top in (14, 15)
    assert max(rates) == pytest.approx(0.1, rel=0.02)
    assert (np.diff(rates[: top + 1]) > 0).all()
    assert (np.diff(rates[top:]) < 0).all()
    assert rates[-1] < 0.001
    half = top + (100 - top) // 2  # of a cosine, at half of its way
    assert rates[half] == pytest.approx(0.05, rel=0.03)


# What the teacher knows already


def test_a_teacher_starts_from_its_pretraining_in_all_but_its_head(tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_RUNS", str(tmp_path))
    names = notebooks.procedure("binary", {"scale": "laptop", "train_missing": True})
    recipe = {"optimizer": "sgd", "decay": 0.0, "shift": 1 / 16, "lr": 0.01, "epochs": 1}
    before = {"network": "resnet10", "dataset": "digits", "recipe": recipe}
    before |= {"batch_size": 256, "size": 16, "seed": 0}
    fresh = models.build("resnet10", classes=1, seed=5, size=16)
    head = {k: v.clone() for k, v in fresh.state_dict().items() if k.startswith("fc")}
    model, digest = names["with_knowledge"](fresh, "resnet10", before, {"size": 16})
    made = names["pretraining"](**before)
    weights = safetensors.torch.load_file(made.weights("e1"))
    assert digest == made.content["weights"]["e1.safetensors"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, (head if name.startswith("fc") else weights)[name])
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 1)


# The gate


def test_what_does_not_pass_the_gate_stops_with_one_sentence(tmp_path, monkeypatch):
    """Every shift is tried, then every length of the best, and nothing else is trained."""
    monkeypatch.setenv("KDUTILS_RUNS", str(tmp_path))
    smoke = notebooks.scale_parameters("binary", "smoke")
    given = smoke | {"scale": "laptop", "gate": 1.0, "epochs": [1, 2], "network": "resnet10"}
    given |= {"shifts": [0.2, 0.4]}
    sentence = (
        r"hand-made labels reach 0\.\d{3} on unseen pictures, less than gate = 1: give more than 2 "
    )
    with pytest.raises(runs.RunFailed, match=sentence):
        notebooks.train("binary", given)
    contents = [
        json.loads(path.read_text(encoding="utf-8")) for path in tmp_path.rglob("record.json")
    ]
    assert {c["run"] for c in contents} == {"student"}
    assert {c["arguments"]["labels"] for c in contents} == {"hand"}
    recipes = [c["arguments"]["recipe"] for c in contents]
    assert sorted(recipe["epochs"] for recipe in recipes) == [1, 1, 2]
    assert {r["shift"] for r in recipes if r["epochs"] == 1} == {0.2, 0.4}


class Enough(Exception):
    """What was to be seen has been seen."""


class Told:
    """In place of Study.map: every run has a record, whose accuracies are told; what was asked."""

    def __init__(self, student, teacher=None):
        self.student, self.teacher = student, teacher
        self.asked = []

    def __call__(self, run, arguments, **options):
        rows = []
        for one in arguments:
            self.asked += [(run.name, one)] * ((run.name, one) not in self.asked)
            row = one | {"key": json.dumps(one), "epoch": 1}
            if "recipe" in one:
                of = self.student if run.name == "student" else self.teacher
                if of is None:
                    raise Enough
                both = of(one["recipe"])
                if both is None:
                    rows.append(row | {"error": "the loss is not finite"})
                    continue
                validation, test = both
                found = {"validation": validation, "test": test, "unseen": test}
                found = {part: {"accuracy": accuracy} for part, accuracy in found.items()}
                row |= {"measured": found}
            rows.append(row)
        return pd.DataFrame(rows)

    def tried(self):
        """The pilots of students as shift, rate and epochs, in the order in which they came."""
        of = [a["recipe"] for name, a in self.asked if name == "student" and a["seed"] == 100]
        return [(r["shift"], r["lr"], r["epochs"]) for r in of]


def chosen(monkeypatch, told, **given):
    """The names of the page after its cells of runs, or as far as they came."""
    seen, smoke = [], notebooks.scale_parameters("binary", "smoke")
    smoke |= {"lrs": [0.2, 0.1], "epochs": [1, 2, 3], "shifts": [0.2, 0.4, 0.1], "gate": 0.9}
    monkeypatch.setattr(runs.Study, "map", lambda study, *a, **options: told(*a, **options))
    with suppress(Enough):
        notebooks.procedure("binary", smoke | given, ("runs",), seen.append)
    return seen[0]


def test_of_the_widest_shift_that_passes_the_gate_the_rate_best_on_validation_is_taken(monkeypatch):
    accuracies = {
        (0.4, 0.2, 1): (0.95, 0.85),
        (0.2, 0.2, 1): (0.90, 0.91),
        (0.2, 0.1, 1): (0.91, 0.92),
    }
    told = Told(lambda r: accuracies[r["shift"], r["lr"], r["epochs"]])
    names = chosen(monkeypatch, told)
    assert told.tried() == list(accuracies)  # and no more than these
    assert names["recipe"] == {
        "optimizer": "sgd", "decay": 0.0, "shift": 0.2, "lr": 0.1, "epochs": 1
    }  # fmt: skip
    assert (names["reached"], names["passed"]) == (0.92, True)


def test_where_no_shift_passes_the_best_pair_is_trained_for_longer(monkeypatch):
    accuracies = {
        (0.4, 0.2, 1): None,  # it diverged
        (0.2, 0.2, 1): (0.83, 0.84),
        (0.1, 0.2, 1): (0.82, 0.89),
        (0.2, 0.1, 1): (0.80, 0.84),
        (0.2, 0.2, 2): (0.90, 0.91),
    }
    told = Told(lambda r: accuracies[r["shift"], r["lr"], r["epochs"]])
    names = chosen(monkeypatch, told)
    assert told.tried() == list(accuracies)
    assert (names["recipe"]["epochs"], names["reached"], names["passed"]) == (2, 0.91, True)


def test_where_all_diverge_the_gate_is_not_passed(monkeypatch):
    with pytest.raises(runs.RunFailed, match="hand-made labels reach 0"):
        chosen(monkeypatch, Told(lambda r: None))


@pytest.mark.parametrize(("longer", "expected"), [(0.95, 4), (0.99, 2)])
def test_a_teacher_that_does_not_lead_by_a_point_and_a_half_is_trained_for_longer(
    longer, expected, monkeypatch
):
    def teacher(recipe):
        return {2: (0.99, longer), 4: (0.99, 0.96)}[recipe["epochs"]]

    told = Told(lambda r: (0.94, 0.945), teacher)
    names = chosen(monkeypatch, told, teacher_epochs=[2, 4])
    assert names["master"]["recipe"]["epochs"] == expected
    assert names["complete"]


def test_a_teachers_shift_is_chosen_at_its_first_length_alone(monkeypatch):
    accuracies = {(2, 0.0): (0.95, 0.95), (2, 0.4): (0.96, 0.95), (4, 0.4): (0.96, 0.97)}
    told = Told(lambda r: (0.94, 0.945), lambda r: accuracies[r["epochs"], r["shift"]])
    names = chosen(monkeypatch, told, teacher_epochs=[2, 4], teacher_shifts=[0.0, 0.4])
    assert (names["master"]["recipe"]["epochs"], names["master"]["recipe"]["shift"]) == (4, 0.4)


def test_where_no_teacher_leads_nothing_is_taught(monkeypatch):
    told = Told(lambda r: (0.94, 0.945), lambda r: (0.99, 0.959))
    said = r"the teacher reaches 0\.959 on unseen pictures, hand-made labels 0\.945: give more"
    with pytest.raises(runs.RunFailed, match=said):
        chosen(monkeypatch, told, teacher_epochs=[2, 4])
    assert {a["labels"] for name, a in told.asked if name == "student"} == {"hand"}


def test_runs_come_in_the_order_in_which_claims_need_them(monkeypatch):
    told = Told(lambda r: (0.95, 0.95), lambda r: (0.97, 0.97))
    given = {"seeds": [0, 1, 2], "chains": 2, "generations": 3, "pretrained": "cifar100"}
    given["sharpened"] = 3
    names = chosen(monkeypatch, told, **given)
    order = [
        (name, a.get("labels"), a.get("generation"), a.get("seed") if "seed" in a else None)
        for name, a in told.asked
        if a.get("seed") != 100 and name in ("student", "teacher", "pretraining")
    ]
    both, first, links = ["soft", "hard"], [0, 1], []
    for k in range(4):
        links += [("student", kind, k, seed) for kind in both for seed in first]
    assert order == [
        *[("student", "hand", 0, seed) for seed in (0, 1, 2)],
        ("pretraining", None, None, 0),
        *[("teacher", None, None, seed) for seed in first],
        *links,
        ("teacher", None, None, 2),
        *[("student", kind, 0, 2) for kind in both],
        *[("student", "sharp", k, seed) for k in (2, 3) for seed in first],
    ]
    name, arguments = told.asked[-1]
    assert (name, arguments["before"], arguments["seed"]) == ("teacher", None, 100)
    assert len(names["students"]) == 3 + len(links) + 2 + 4


# The page


def test_a_wrong_setting_stops_with_one_sentence(study):
    given = {k: study[k] for k in study["Setting"].model_fields}
    check = study["Setting"].check
    check(given)
    wrong = [
        ({"classes": ["cat", "cat"]}, "classes must be two different ones"),
        ({"generations": 1}, "parameter generations is 1"),
        ({"sharpened": 1}, "parameter sharpened is 1"),
        ({"choice_seed": 3}, "choice_seed must not be in seeds"),
        ({"pretrained": "imagenet", "teacher_network": "resnet10"}, "needs a resnet18, 34 or 50"),
        ({"pretrained": "cifar10"}, "parameter pretrained is 'cifar10'"),
        ({"epochs": [30, 20]}, "parameter epochs is"),
        ({"optimizer": "rmsprop"}, "parameter optimizer is 'rmsprop'"),
        ({"teacher_epochs": [20, 10]}, "parameter teacher_epochs is"),
        ({"shifts": [0.4, 1.5]}, r"parameter shifts\[1\] is 1.5"),
        ({"shifts": []}, r"parameter shifts is \[\]"),
        ({"lrs": [0.1, 0.1]}, "parameter lrs is"),
        ({"runtimes": ["tflite"]}, r"parameter runtimes\[0\] is 'tflite'"),
    ]
    for change, sentence in wrong:
        with pytest.raises(ValueError, match=sentence):
            check(given | change)


def test_a_missing_runtime_is_said_before_anything_is_trained(study, monkeypatch):
    given = {k: study[k] for k in study["Setting"].model_fields} | {"train_missing": True}
    monkeypatch.setitem(study, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="onnxruntime, which is not installed"):
        study["Setting"].check(given)
    study["Setting"].check(given | {"runtimes": ["torch"]})


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_both_runtimes_give_the_networks_answer(study, runtime):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten()).eval()
    picture = torch.randn(1, 3, 8, 8)
    found = study["call"](model, picture, runtime)()
    with torch.no_grad():
        expected = model(picture).numpy()
    np.testing.assert_allclose(np.asarray(found).reshape(expected.shape), expected, atol=1e-5)


def test_the_papers_bins_are_as_the_page_says():
    bins = pd.read_csv(records.PROJECT / "data" / "reported" / "binary-bins.csv")
    sums = bins.groupby(["network", "part"]).share.agg(["size", "sum"])
    assert len(sums) == 11  # the soft student's on test is missing
    assert (sums["size"] == 20).all()
    np.testing.assert_allclose(sums["sum"], 1, atol=3e-5)


def test_what_the_paper_prints_is_as_the_page_says():
    printed = pd.read_csv(records.PROJECT / "data" / "reported" / "binary-accuracies.csv")
    of = {part: set(rows.accuracy) for part, rows in printed.groupby("part")}
    assert {part: len(values) for part, values in of.items()}["validation"] == 14

    def whole(values, n):
        return sum(f"{round(v * n) / n:.5f}" == f"{v:.5f}" for v in values)

    assert whole(of["validation"], 3750) == 0
    assert [n for n in range(1, 7436) if whole(of["validation"], n) == 14] == [116 * 32 + 6]
    assert whole(of["test"], 3750) == len(of["test"])
    at = printed.set_index(["network", "part"]).sort_index()
    assert round(17_500 * (1 - at.loc[("teacher", "train"), "accuracy"].item())) == 3
    tests = printed[(printed.part == "test") & ~(printed.generation > 0)].set_index("network")
    errors = (3750 * (1 - tests.accuracy)).round()
    assert errors[["soft", "classical"]].tolist() == [138, 144]


def test_the_papers_uncertainties_lie_between_what_its_bins_allow():
    folder = records.PROJECT / "data" / "reported"
    bins, printed = (pd.read_csv(folder / f"binary-{k}.csv") for k in ("bins", "accuracies"))
    printed = printed[~(printed.generation > 0)].set_index(["network", "part"]).uncertainty
    low = np.linspace(0, 0.95, 20)
    near = np.minimum(low, 0.95 - low).clip(0)
    for name, rows in bins.groupby(["network", "part"]):
        share = rows.share.to_numpy()
        assert share @ near**2 <= printed[name] <= share @ (near + 0.05) ** 2


# Verdicts


def test_what_chains_and_bins_come_to_by_hand(study):
    assert study["rank_over_generations"](0.1, 0.2, 0.4, 0.3) == pytest.approx(0.8)
    assert study["slope_over_generations"](0.1, 0.2, 0.4, 0.3) == pytest.approx(0.08)
    assert study["mean_of"](0.1, 0.2, 0.6) == pytest.approx(0.3)
    assert study["outer_share"]([[3, 0, 4, 1]]) == pytest.approx(0.5)
    cats, dogs = [9, *[1] * 9], [*[2] * 9, 5]  # twenty bins
    assert study["doubts_dogs"]([cats + dogs]) == pytest.approx((18 - 9) / 41)


def test_who_is_least_sure_leads_in_most_of_the_inner_bins(study):
    one, other, third = np.zeros((3, 20), int)
    one[1:10], other[10:16], third[16:19] = 5, 5, 5
    one[0] = other[19] = 99  # outer bins do not count
    assert study["leads_most"]([one, other, third]) == pytest.approx(9 / 18)
    third[16:19], one[16:19] = 5, 5  # ties count for both
    assert study["leads_most"]([one, other, third]) == pytest.approx(12 / 18)
    assert math.isnan(study["leads_most"]([one, other]))


def test_how_sure_and_how_often_right_by_hand(study):
    """Of two networks' bins together; what holds fewer than 20 predictions is left out."""
    empty = [0] * 18
    one = {"count": [10, 15, *empty], "second": [1, 3, *empty], "sum": [0.25, 1.0, *empty]}
    other = {"count": [12, 4, *empty], "second": [3, 4, *empty], "sum": [0.3, 0.25, *empty]}
    found = study["reliability"]([{"unseen": one}, {"unseen": other}])
    assert found.to_dict() == {0.55 / 22: 4 / 22}


def test_time_to_a_level_by_hand(study):
    slow, fast, never = [0.5, 0.6, 0.75, 0.9], [0.76, 0.5, 0.9, 0.9], [0.5] * 4
    assert study["LEVEL"] == 0.75
    assert "accuracy of 0.75 " in claims.registered()["binary-5"].texts["quantity"]
    assert study["sooner"](fast, slow) == pytest.approx(1 / 3)
    assert study["sooner"](slow, never) == pytest.approx(3 / 5)  # one epoch more than there are


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_who_alone_is_right_is_counted_from_records(study, pictures):
    soft, hand = ([int(one[k]) for one in pictures] for k in (0, 1))
    n, packed = len(pictures), [np.packbits(x).tobytes().hex() for x in (soft, hand)]
    expected = sum(a and not b for a, b in pictures), sum(b and not a for a, b in pictures)
    assert study["right_alone"](*packed, n) == expected[0]
    assert study["right_alone"](*packed[::-1], n) == expected[1]


def cochran_mantel_haenszel(tables):
    """Of tables (K, 2, 2): the sum of a less its mean, squared, by its variance; uncorrected."""
    tables = np.asarray(tables, float)
    rows, columns, n = tables.sum(2), tables.sum(1), tables.sum((1, 2))
    excess = (tables[:, 0, 0] - rows[:, 0] * columns[:, 0] / n).sum()
    variance = (rows.prod(1) * columns.prod(1) / (n**2 * (n - 1))).sum()
    return excess**2 / variance


@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=4))
def test_pooled_mcnemar_is_cochran_mantel_haenszel_with_a_stratum_a_picture(study, seeds):
    """Of each seed: pictures that both get right, the first alone, the second alone, none."""
    every = np.array(seeds)
    strata = [[[1, 0], [1, 0]], [[1, 0], [0, 1]], [[0, 1], [1, 0]], [[0, 1], [0, 1]]]
    asked = every.sum(1)
    if every[:, 1:3].sum() == 0:
        return
    tables = [strata[kind] for seed in seeds for kind in range(4) for _ in range(seed[kind])]
    p, span, _ = study["pooled"](every[:, 1], every[:, 2], asked)
    assert p == pytest.approx(stats.chi2.sf(cochran_mantel_haenszel(tables), 1), abs=1e-12)
    assert span.mean == pytest.approx((every[:, 1] - every[:, 2]).sum() / asked.sum())
    assert span.n == len(seeds)


def test_pooled_mcnemar_by_hand(study):
    # 121 and 59 of 314 pairs: (121 - 59)^2 / 180 = 21.36, whose p is 3.8e-6.
    p, span, seen = study["pooled"]([100, 21], [50, 9], [200, 114])
    assert p == pytest.approx(3.8e-6, rel=0.02)
    assert span.mean == pytest.approx(62 / 314)
    half = 1.96 * math.sqrt(180 - 62**2 / 314) / 314
    assert span.high - span.mean == pytest.approx(half, rel=1e-3)
    assert seen == pytest.approx(2.8016 * math.sqrt(180) / 314, rel=1e-4)
    assert study["pooled"]([0], [0], [10])[0] == 1


def test_a_difference_that_is_seen_four_times_in_five_is(study):
    draw = np.random.default_rng(0)
    apart, n = 0.1, 3750
    _, _, seen = study["pooled"]([int(apart * n / 2)], [int(apart * n / 2)], [n])
    ones = draw.binomial(n, (apart + seen) / 2, 4000)
    others = draw.binomial(n, (apart - seen) / 2, 4000)
    found = [study["pooled"]([b], [c], [n])[0] < 0.05 for b, c in zip(ones, others, strict=True)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)


def test_every_claim_has_its_runs_and_the_papers_numbers_are_its_tables():
    registered = {k: c for k, c in claims.registered().items() if c.study == "binary"}
    folder = records.PROJECT / "data" / "reported"
    table = pd.read_csv(folder / "binary-accuracies.csv")
    test = (
        table[table.part == "test"].fillna({"generation": 0}).set_index(["network", "generation"])
    )
    lead = [test.accuracy["soft", k] - test.accuracy["hard", k] for k in range(1, 7)]

    def effects(name):
        return [rule.effect for rule in registered[f"binary-{name}"].rules.values()]

    accuracy, unsure = test.accuracy, test.uncertainty
    assert effects(1) == pytest.approx([accuracy["soft", 0] - accuracy["classical", 0]])
    assert effects(2) == pytest.approx([accuracy["hard", 0] - accuracy["classical", 0] + 0.01])
    assert effects(3) == pytest.approx([0.03 - accuracy["teacher", 0] + accuracy["soft", 0]])
    assert effects(7) == pytest.approx(
        [0.003 + unsure["hard", k] - unsure["hard", 0] for k in range(1, 7)]
    )
    assert effects(8) == pytest.approx([np.mean(lead) + 0.005], abs=5e-6)
    lost = [accuracy[k, 0] - accuracy[k, 6] for k in ("hard", "soft")]
    assert effects(9) == pytest.approx([0.03 - x for x in lost])
    gained = [accuracy[k, 1] - accuracy[k, 0] for k in ("hard", "soft")]
    assert effects(13) == pytest.approx([0.01 + x for x in gained])
    assert effects(17) == pytest.approx([accuracy["teacher", 0] - accuracy["classical", 0]])
    bins = pd.read_csv(folder / "binary-bins.csv")
    of = {k: rows.share.to_numpy() for k, rows in bins.groupby(["network", "part"])}
    doubt = {k: x[10:-1].sum() - x[1:10].sum() for k, x in of.items()}
    outer = {k: x[[0, -1]].sum() for k, x in of.items()}
    assert effects(11) == pytest.approx(
        [doubt["soft", "train"] - doubt["classical", "train"]], abs=5e-5
    )
    lowest = min(x for (_, part), x in outer.items() if part == "train")
    assert effects(10) == pytest.approx([lowest - 0.91], abs=5e-5)
    later = [outer[k, "validation"] - outer[k, "test"] for k in ("classical", "hard")]
    assert effects(14) == [pytest.approx(later[0], abs=5e-5), None, None]
    assert later[1] < 0  # against what is said
    inner = of["hard", "test"][1:-1] > of["classical", "test"][1:-1]
    assert (
        registered["binary-15"]
        .texts["paper_value"]
        .startswith(f"hard above classical in {inner.sum()} of {len(inner)}")
    )


# Records that are published

PUBLISHED = pytest.mark.skipif(
    not any((records.PROJECT / "data" / "records" / "binary").glob("*.json")),
    reason="no run has been published yet",
)


def without(folder, unwanted):
    """A copy of the published records without those that ``unwanted`` picks; how many it picked."""
    target, gone = folder / "records" / "binary", 0
    target.mkdir(parents=True)
    for path in (records.published_folder() / "binary").glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if unwanted(content["run"], content["arguments"]):
            gone += 1
        else:
            (target / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    return gone


def verdicts_on(folder, monkeypatch):
    """What the page says of each claim, from the records in a folder."""
    monkeypatch.setenv("KDUTILS_RECORDS", str(folder / "records"))
    page = notebooks.run("binary", {}, folder / "page.ipynb")
    cells = nbformat.read(page, as_version=4).cells
    stored = [o.data for c in cells for o in c.get("outputs", []) if "data" in o]
    (rows,) = [data[claims.MIME] for data in stored if claims.MIME in data]
    found = [row for row in claims.judged(rows) if row["study"] == "binary"]
    return {row["id"].removeprefix("binary-"): row["verdict"] for row in found}


@PUBLISHED
def test_no_verdict_rests_on_a_part_of_the_seeds(tmp_path, monkeypatch):
    def soft_student(run, arguments):
        found = arguments.get("labels"), arguments.get("generation"), arguments.get("seed")
        return run == "student" and found == ("soft", 0, 2)

    assert without(tmp_path, soft_student) == 1
    found = verdicts_on(tmp_path, monkeypatch)
    silent = {name for name, verdict in found.items() if verdict is None}
    assert silent >= {"1", "3", "6", "9", "10", "11", "12", "13", "14", "15"}


@PUBLISHED
def test_no_verdict_before_the_recipe_was_tried(tmp_path, monkeypatch):
    def tried(run, arguments):
        return run == "student" and arguments["seed"] == 100 and arguments["labels"] == "hand"

    assert without(tmp_path, tried) >= 1
    found = verdicts_on(tmp_path, monkeypatch)
    assert {name for name, verdict in found.items() if verdict} <= {"4"}  # speed needs no rate
