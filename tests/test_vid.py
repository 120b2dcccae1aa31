"""Variational information distillation against references that share no code with it."""

import ast
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from kdutils import data, losses, models, train

STUDENT = {"maps": (3, 7, 7), "small": (5, 3, 3), "fc": (6,), "logits": (4,)}
TEACHER = {"wide": (7, 5, 5), "pooled": (6, 1, 1), "fc": (5,), "logits": (4,)}
LAMBDA = torch.tensor([[0.5, 0, 1, 2], [0, 0, 0, 0.3], [1, 0, 0, 0], [0, 0, 3, 1]])
VARIANTS = {
    "a channel, summed": {},
    "a channel, averaged": {"reduction": "mean"},
    "a link, summed": {"variance": "link"},
    "a link, averaged": {"variance": "link", "reduction": "mean"},
    "as coded": {"variance": "link", "coded": True},
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(shapes, seed, rows=9):
    """{layer: values of a normal distribution}."""
    rng = np.random.default_rng(seed)
    return {
        name: torch.tensor(rng.normal(size=(rows, *shape))).float()
        for name, shape in shapes.items()
    }


def number(value):
    return value.detach().item()


def example(**options):
    """A VID whose variances all differ, with taps to put in."""
    student, teacher = drawn(STUDENT, 1), drawn(TEACHER, 2)
    vid = losses.VID(student=student, teacher=teacher, **options)
    torch.manual_seed(3)
    for alpha in vid.alpha.values():
        nn.init.normal_(alpha)
    return vid, student, teacher


# ------------------------------------------------------------------------- the formula


def slow(vid, student, teacher, variance="channel", reduction="sum", coded=False):
    """Σ λ · loss, link by link, by NumPy and SciPy, from what the regressors say."""
    total = 0.0
    for i, t in enumerate(teacher.values()):
        for j, s in enumerate(student.values()):
            if vid.weights[i, j] == 0:
                continue
            mean = vid.regressors[f"{i}-{j}"](s).detach().double().numpy()
            alpha = vid.alpha[f"{i}-{j}"].detach().double().numpy()
            variances = np.logaddexp(0, alpha).reshape(-1, *[1] * (t.ndim - 2))
            assert len(alpha) == (t.shape[1] if variance == "channel" else 1)
            if coded:
                squares = ((t.numpy() - mean) ** 2).reshape(len(t), -1).sum(1).mean()
                found = squares / 2 * variances.item() + 0.5 * math.log(variances.item())
            else:
                of_one = -stats.norm.logpdf(t.double().numpy(), mean, np.sqrt(variances))
                of_one -= math.log(2 * math.pi) / 2
                of_picture = of_one.reshape(len(t), -1)
                found = (of_picture.sum(1) if reduction == "sum" else of_picture.mean(1)).mean()
            total += float(vid.weights[i, j]) * found
    return total


@pytest.mark.parametrize("weights", [LAMBDA, torch.ones(4, 4), None], ids=["some", "all", "pairs"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_the_loss_is_the_formula(options, weights):
    vid, student, teacher = example(weights=weights, **options)
    expected = slow(vid, student, teacher, **options)
    assert number(vid(student, teacher)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.9])
def test_the_bound_is_the_mutual_information_where_it_is_known(correlation, reduction):
    """Jointly Gaussian, the best regressor is linear and I(t; s) = −½ log(1 − ρ²) a channel."""
    rng = np.random.default_rng(0)
    s = rng.normal(size=(200_000, 1))
    noise = rng.normal(size=(200_000, 2)) * math.sqrt(1 - correlation**2)
    t = (correlation * s * [1, -1] + noise) * [2, 0.5]
    taps = {"s": torch.tensor(s).float()}, {"t": torch.tensor(t).float()}
    vid = losses.VID(student=taps[0], teacher=taps[1], reduction=reduction)
    linear = vid.regressors["0-0"][1]
    linear.weight.data = torch.tensor([[2 * correlation], [-0.5 * correlation]])
    nn.init.zeros_(linear.bias)
    left = torch.tensor([4.0, 0.25]) * (1 - correlation**2)
    vid.alpha["0-0"].data = left.expm1().log()
    channels = 2 if reduction == "sum" else 1
    entropy = np.mean([stats.norm(scale=2).entropy(), stats.norm(scale=0.5).entropy()])
    bound = (entropy - math.log(2 * math.pi) / 2) * channels - number(vid(*taps))
    assert bound == pytest.approx(-channels * math.log(1 - correlation**2) / 2, abs=0.01)


def test_as_coded_the_variance_multiplies_and_nothing_else_changes():
    written, student, teacher = example(variance="link")
    coded, *_ = example(variance="link", coded=True)
    coded.load_state_dict(written.state_dict())
    expected = found = 0.0
    for k, (s, t) in enumerate(zip(student.values(), teacher.values(), strict=True)):
        name, size = f"{k}-{k}", t[0].numel()
        errors = number(((t - written.regressors[name](s)) ** 2).flatten(1).sum(1).mean())
        variance = number(written.variance(k, k))
        expected += (errors / variance + size * math.log(variance)) / 2
        found += (errors * variance + math.log(variance)) / 2
    assert number(written(student, teacher)) == pytest.approx(expected, rel=1e-5)
    assert number(coded(student, teacher)) == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("coded", [True, False])
def test_as_coded_links_switch_themselves_off_and_as_written_they_do_not(coded):
    """σ² against a fixed error of 2 an element: written it goes there, coded towards 0."""
    student, teacher = {"s": torch.zeros(4, 3)}, {"t": torch.full((4, 8), 2**0.5)}
    vid = losses.VID(student=student, teacher=teacher, variance="link", coded=coded)
    for parameter in vid.regressors.parameters():
        nn.init.zeros_(parameter).requires_grad_(False)
    optimizer = torch.optim.Adam(vid.alpha.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        vid(student, teacher).backward()
        optimizer.step()
    found = number(vid.variance(0, 0))
    assert found < 1e-3 if coded else found == pytest.approx(2, rel=0.02)


def test_what_design_md_shows_for_a_project_of_ones_own_trains(capsys):
    text = (Path(__file__).parent.parent / "book" / "design.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import numpy.*?)```", text, re.DOTALL)
    names = {}
    exec(code, names)
    assert math.isfinite(ast.literal_eval(capsys.readouterr().out)[0]["loss"])
    assert any(name.startswith("vid.regressors") for name, _ in names["student"].named_parameters())


def test_a_variance_starts_at_log_2():
    vid = losses.VID(student=drawn(STUDENT, 1), teacher=drawn(TEACHER, 2))
    assert {len(vid.variance(k, k)) for k in range(4)} == {7, 6, 5, 4}
    assert all((vid.variance(k, k) == math.log(2)).all() for k in range(4))


# ------------------------------------------------------------------------------ regressors


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 17), st.integers(1, 17))
def test_a_regressor_leads_from_any_map_to_any_other(c, d, before, after):
    student, teacher = torch.randn(4, c, before, before), (d, after, after)
    assert losses.regressor((c, before, before), teacher)(student).shape[1:] == teacher


@pytest.mark.parametrize("after", TEACHER.values(), ids=str)
@pytest.mark.parametrize("before", STUDENT.values(), ids=str)
def test_any_layer_can_teach_any_layer(before, after):
    student, teacher = drawn({"s": before}, 1), drawn({"t": after}, 2)
    vid = losses.VID(student=student, teacher=teacher)
    vid(student, teacher).backward()
    assert all(p.grad.abs().sum() > 0 for p in vid.regressors.parameters() if p.ndim > 1)
    kinds = {type(m) for m in vid.regressors["0-0"].modules()}
    assert (nn.Linear in kinds) == (len(before) == 1 or len(after) == 1)
    assert (nn.BatchNorm2d in kinds) == (nn.Linear not in kinds)


def test_links_of_weight_0_have_no_regressor():
    vid, *_ = example(weights=LAMBDA)
    assert set(vid.regressors) == {f"{i}-{j}" for i, j in LAMBDA.nonzero().tolist()}
    assert set(vid.alpha) == set(vid.regressors)


def test_regressors_are_drawn_from_the_seed_and_the_link_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two, other = (example(seed=seed)[0] for seed in (5, 5, 6))
    every = example(seed=5, weights=torch.ones(4, 4))[0]
    torch.manual_seed(0)
    losses.VID(student=drawn(STUDENT, 1), teacher=drawn(TEACHER, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for link in ("0-0", "2-2"):
        first = [v.regressors[link].state_dict() for v in (one, two, every)]
        assert all(torch.equal(first[0][k], one[k]) for one in first[1:] for k in first[0])
    assert not torch.equal(one.regressors["2-2"][1].weight, other.regressors["2-2"][1].weight)


# ------------------------------------------------------------------------------- λ


def test_lambda_identity_equals_pairwise_and_scales():
    pairwise, student, teacher = example()
    identity, *_ = example(weights=torch.eye(4))
    double, *_ = example(weights=2 * torch.eye(4))
    expected = number(pairwise(student, teacher))
    assert number(identity(student, teacher)) == expected
    assert number(double(student, teacher)) == pytest.approx(2 * expected, rel=1e-6)


def test_lambda_is_copied_and_not_saved():
    weights = torch.eye(4)
    vid, student, teacher = example(weights=weights)
    before = number(vid(student, teacher))
    weights *= 2
    assert number(vid(student, teacher)) == before
    assert "weights" not in vid.state_dict()


# ----------------------------------------------------------------------- gradients


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_gradients_reach_student_regressors_and_variances_and_never_the_teacher(options):
    vid, student, teacher = example(weights=LAMBDA, **options)
    for tap in (*student.values(), *teacher.values()):
        tap.requires_grad_()
    vid(student, teacher).backward()
    read = LAMBDA.any(0).tolist()
    assert [tap.grad is not None for tap in student.values()] == read
    assert all(tap.grad.abs().sum() > 0 for tap in student.values() if tap.grad is not None)
    assert all((alpha.grad != 0).all() for alpha in vid.alpha.values())
    assert all(p.grad is not None for p in vid.regressors.parameters())
    assert all(tap.grad is None for tap in teacher.values())


def test_autocast_keeps_the_squares_precise():
    vid, student, teacher = example(weights=LAMBDA)
    with torch.autocast("cpu", torch.bfloat16):
        found = vid(student, teacher)
    assert found.dtype == torch.float32
    assert number(found) == pytest.approx(number(vid(student, teacher)), rel=0.01)


# -------------------------------------------------------------- in the training loop


def fit(folder, epochs, weights=None, **options):
    """A student learns from labels and its teacher's layers: networks and history."""
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (120, 24, 24, 3), dtype=np.uint8)
    statistics = (np.full(3, 127.0), np.full(3, 60.0))
    batches = data.Batches(
        images, images[:, 0, 0, 0] % 10, statistics=statistics, batch_size=40, seed=0
    )
    layers = ["layer1", "layer3", "hidden", "logits"]
    student, teacher = (
        models.taps(models.small_cnn(name, classes=10, seed=seed, size=24), layers)
        for seed, name in enumerate(("convverytiny", "convtiny"))
    )
    with torch.no_grad():
        some = torch.zeros(2, 3, 24, 24)
        own, given = student.eval()(some), teacher.eval()(some)
        vid = losses.VID(student=own, teacher=given, weights=weights, **options)
    networks = nn.ModuleDict({"student": student.train(), "vid": vid})
    optimizer = torch.optim.Adam(networks.parameters(), lr=0.01)

    def loss(model, batch):
        taps = model.student(batch.images)
        with torch.no_grad():
            given = teacher(batch.images)
        task = F.cross_entropy(taps["logits"], batch.labels)
        return losses.balanced(task, model.vid(taps, given), 0.5)

    history = train.fit(networks, batches, loss, epochs=epochs, optimizer=optimizer, folder=folder)
    return networks, [{k: v for k, v in r.items() if k != "seconds"} for r in history]


@pytest.mark.parametrize(
    ("weights", "options"),
    [(None, {}), (torch.ones(4, 4), {"variance": "link", "coded": True})],
    ids=["pairwise", "all to all, as coded"],
)
def test_interrupted_training_ends_with_the_same_bits(tmp_path, weights, options):
    whole, history = fit(None, 3, weights, **options)
    fit(tmp_path, 1, weights, **options)
    resumed, again = fit(tmp_path, 3, weights, **options)
    assert again == history
    assert history[-1]["loss"] < history[0]["loss"]
    assert (whole.vid.alpha["0-0"] != 0).all()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


# ------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        (torch.ones(4, 3), r"λ is \(4, 3\); it must be \(4, 4\)"),
        (torch.ones(4), r"λ is \(4,\); it must be \(4, 4\)"),
        (1.0, r"λ is \(\); it must be \(4, 4\)"),
        ([[1.0, 0.0], [1.0]], "λ must be numbers in rows of one length"),
        ([["a"]], "λ must be numbers in rows of one length"),
        (torch.eye(4) - 0.5, r"λ holds -0\.5; .* not negative"),
        (torch.eye(4) * math.nan, "λ holds nan; .* finite"),
        (torch.eye(4) / 0, r"λ holds (inf|nan); .* finite"),
        (np.zeros((4, 4)), "λ is all zero"),
    ],
)
def test_a_wrong_lambda_is_named(weights, sentence):
    with pytest.raises(ValueError, match=sentence):
        example(weights=weights)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"variance": "pixel"}, "unknown variance 'pixel'; variance: channel or link"),
        ({"reduction": "max"}, "unknown reduction 'max'; reduction: sum or mean"),
        ({"coded": True}, "as coded, a link has one variance"),
        ({"coded": True, "variance": "link", "reduction": "mean"}, "as coded, a link has one"),
    ],
)
def test_an_unknown_variant_is_named(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        example(**options)


def test_pairwise_needs_as_many_layers():
    with pytest.raises(ValueError, match="3 teacher layers cannot pair 4 student layers"):
        losses.VID(student=drawn(STUDENT, 1), teacher=drawn(dict(list(TEACHER.items())[:3]), 2))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_missing_or_changed_layer_is_named_beside_those_there_are(side):
    vid, *taps = example()
    given = taps[side == "teacher"]
    tap = given.pop("fc")
    with pytest.raises(ValueError, match=rf"no {side} layer 'fc' of \(\d,\); .*logits \(4,\)"):
        vid(*taps)
    given["fc"] = tap[:, 1:]
    with pytest.raises(ValueError, match=rf"no {side} layer 'fc' of \(\d,\); .*fc \(\d,\)"):
        vid(*taps)
    given["fc"] = tap[:, :, None]
    with pytest.raises(ValueError, match=rf"{side} layer 'fc' is \(9, \d, 1\), not \(B, C\)"):
        vid(*taps)


def test_student_and_teacher_on_different_inputs_are_refused():
    vid, student, teacher = example()
    with pytest.raises(ValueError, match="student has 9 rows, teacher 1"):
        vid(student, {name: tap[:1] for name, tap in teacher.items()})


def test_further_layers_are_left_alone():
    vid, student, teacher = example()
    expected = number(vid(student, teacher))
    assert number(vid(student | {"more": torch.ones(9, 2)}, teacher)) == expected


def test_balanced_is_the_papers_objective():
    task, knowledge = torch.tensor(2.0), torch.tensor(-1.0)
    found = [float(losses.balanced(task, knowledge, beta)) for beta in (0, 0.25, 1)]
    assert found == [-1, -0.25, 2]


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_a_beta_outside_0_to_1_is_named(beta):
    with pytest.raises(ValueError, match=f"beta is {beta}"):
        losses.balanced(torch.tensor(1.0), torch.tensor(1.0), beta)
