"""Study 4: its formulas, its optimizer, its shifts and split, and chains that go on."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdutils import claims, data, notebooks, records, train

PAGE = notebooks.FOLDER / "4-binary.md"
BYTES = (np.zeros(3), np.full(3, 255.0))
probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def logit(p):
    return torch.logit(torch.tensor(p, dtype=torch.float64))


@pytest.fixture(scope="module")
def study():
    return notebooks.procedure("binary", {"scale": "laptop", "train_missing": False})


# Formulas


def test_accuracy_uncertainty_and_loss_by_hand(study):
    found = study["binary"](logit([0.9, 0.5, 0.2, 0.6]), torch.tensor([1.0, 0.5, 0.7, 0.4]))
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
        assert study["binary"](z, labels)["accuracy"] == pytest.approx(np.mean(same))


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


@pytest.mark.parametrize("wrong", [-0.1, 1.5, float("nan")])
def test_a_label_outside_0_to_1_is_named(study, wrong):
    with pytest.raises(ValueError, match=f"a label is {wrong:g}; labels must lie between 0 and 1"):
        study["binary"](torch.zeros(3), torch.tensor([0.0, wrong, 1.0]))


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
    with pytest.raises(ValueError, match="no temperature gives these logits"):
        study["temperature_for"](torch.zeros(5), 0.1)


def test_bins_count_every_prediction_and_the_last_one_holds_1(study):
    z = torch.tensor([-50.0, -2.0, 0.0, 0.1, 50.0])
    found = study["binned"](z, torch.tensor([0, 1, 0, 1, 1]))
    assert len(found["count"]) == 20
    assert found["count"][0] == found["count"][2] == found["count"][-1] == 1
    assert found["count"][10] == 2
    assert sum(found["second"]) == 3
    assert sum(found["sum"]) == pytest.approx(float(z.double().sigmoid().sum()))


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


# Best weights


def test_the_best_weights_stay_and_know_their_value(study, tmp_path):
    network, path = torch.nn.Linear(2, 1), tmp_path / "best.safetensors"
    kept = []
    for value, better in ((0.5, True), (0.5, False), (0.4, False), (0.7, True), (0.6, False)):
        torch.nn.init.normal_(network.weight)
        assert study["keep_best"](network, path, value) == better
        kept += [network.weight.detach().clone()] if better else []
    again = train.load_weights(torch.nn.Linear(2, 1), path)
    assert torch.equal(again.weight, kept[-1])


# Shifts


def shifted(study, n=30, size=10, **options):
    images = np.random.default_rng(5).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    options = {"statistics": BYTES, "batch_size": 7, "seed": 3, "shift": 0.4} | options
    return images, study["shifted"](images, np.arange(n) % 2, **options)


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


def test_a_shift_of_0_is_the_picture_or_its_mirror_image(study):
    images, of = shifted(study, shift=0.0, shuffle=False, batch_size=30)
    (batch,) = of(1)
    mirrored = of.views(1)[0].astype(bool)[:, None, None, None]
    seen = np.where(mirrored, images[:, :, ::-1], images).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(batch.images.numpy(), seen.astype(np.float32) / 255, atol=1e-7)
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
    labels = np.arange(25_000) % 2
    found = study["thirds"](labels, 0)
    assert [len(part) for part in found] == [17_500, 3_750, 3_750]
    assert [np.bincount(labels[part]).tolist() for part in found[1:]] == [[1875, 1875]] * 2
    # Philox's bits and a stable sort: these numbers are the same everywhere.
    assert [part[:4].tolist() for part in study["thirds"](np.arange(40) % 2, 7)] == SPLIT_OF_SEED_7
    assert not np.array_equal(found[2], study["thirds"](labels, 1)[2])


SPLIT_OF_SEED_7 = [[1, 2, 3, 4], [9, 14, 15, 18], [0, 10, 13, 27]]


def test_too_few_pictures_for_three_parts_are_named(study):
    with pytest.raises(ValueError, match="a class has 3 pictures; at least 7"):
        study["thirds"](np.array([0] * 20 + [1] * 3), 0)


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
setting = {"dataset": "digits", "classes": ["3", "8"], "stem": "imagenet", "batch_size": 64}
setting |= {"views": 1}
master = {"network": "resnet10", "epochs": 1, "decay": 0.01, "dropout": 0.5, "before": None}
for folder in folders:
    fits[0], os.environ["KDUTILS_RUNS"] = 0, folder
    names = notebooks.procedure("binary", {"scale": "laptop", "train_missing": True})
    names["student"](
        labels="hard", generation=5, master=master | {"lr": 0.001}, network="resnet10", seed=0,
        lr=0.001, epochs=2, shift=0.4, **setting,
    )
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


# What the teacher knows already


def test_a_teacher_starts_from_its_pretraining_in_all_but_its_head(tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_RUNS", str(tmp_path))
    names = notebooks.procedure("binary", {"scale": "laptop", "train_missing": True})
    shared = {"network": "resnet10", "stem": "imagenet", "batch_size": 256, "seed": 0}
    made = names["pretraining"](**shared, dataset="digits", epochs=1, lr=0.05)
    s = {"dataset": "digits", "classes": ["3", "8"], "stem": "imagenet"}
    fresh = names["build"]("resnet10", 5, s, dropout=0.5)
    head = {k: v.clone() for k, v in fresh.state_dict().items() if k.startswith("fc")}
    model, digest = names["with_knowledge"](fresh, made, "resnet10", "imagenet")
    weights = safetensors.torch.load_file(made.weights("e1"))
    assert digest == made.content["weights"]["e1.safetensors"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, (head if name.startswith("fc") else weights)[name])
    side = data.load("digits").size
    assert model(torch.zeros(2, 3, side, side)).shape == (2, 1)


# The page


def test_a_wrong_setting_stops_with_one_sentence(study):
    given = {k: study[k] for k in study["Setting"].model_fields}
    check = study["Setting"].check
    check(given)
    wrong = [
        ({"classes": ["cat", "cat"]}, "classes must be two different ones"),
        ({"generations": 1}, "parameter generations is 1"),
        ({"pretrained": "imagenet", "stem": "small"}, "needs a resnet18, 34 or 50"),
        ({"pretrained": "cifar100", "dataset": "dogs-vs-cats"}, "dataset must then be cifar10"),
        ({"pretrained": "cifar10"}, "parameter pretrained is 'cifar10'"),
        ({"shift": 1.5}, "parameter shift is 1.5"),
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
    import pandas as pd

    bins = pd.read_csv(records.PROJECT / "data" / "reported" / "binary-bins.csv")
    sums = bins.groupby(["network", "part"]).share.agg(["size", "sum"])
    assert len(sums) == 11  # the soft student's on test is missing
    assert (sums["size"] == 20).all()
    np.testing.assert_allclose(sums["sum"], 1, atol=3e-5)


def test_what_the_paper_prints_is_as_the_page_says():
    import pandas as pd

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
    import pandas as pd

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
    assert study["mean_over_generations"](0.1, 0.2, 0.6) == pytest.approx(0.3)
    assert study["outer_share"]([[3, 0, 4, 1]]) == pytest.approx(0.5)
    assert study["lowest"](0.5, 0.2, 0.9) == 0.2


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


def test_no_verdict_rests_on_a_part_of_the_seeds(tmp_path, monkeypatch):
    def soft_student(run, arguments):
        found = arguments.get("labels"), arguments.get("generation"), arguments.get("seed")
        return run == "student" and found == ("soft", 0, 2)

    assert without(tmp_path, soft_student) == 1
    found = verdicts_on(tmp_path, monkeypatch)
    silent = {name for name, verdict in found.items() if verdict is None}
    assert silent == {"1", "3", "6", "9", "10"}


def test_no_verdict_before_all_rates_were_tried(tmp_path, monkeypatch):
    assert without(tmp_path, lambda run, a: run == "teacher" and a["lr"] == 0.0001) == 1
    found = verdicts_on(tmp_path, monkeypatch)
    assert {name for name, verdict in found.items() if verdict} == {"4"}  # speed needs no rate
