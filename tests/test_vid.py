"""Variational information distillation against references that share no code with it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy import stats
from torch import nn

from kdutils import data, losses, models, train

STUDENT = {"maps": (3, 8, 4), "small": (5, 3, 3), "fc": (6,), "logits": (4,)}
TEACHER = {"wide": (7, 5, 6), "pooled": (6, 1, 1), "fc": (5,), "logits": (4,)}
LAMBDA = torch.tensor([[0.5, 0, 1, 2], [0, 0, 0, 0.3], [1, 0, 0, 0], [0, 0, 3, 1]])
SINGLE = 2e-7  # λ and one over the number of channels are rounded to single precision once


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(shapes, seed, rows=9):
    """{layer: values of a normal distribution, float64}."""
    rng = np.random.default_rng(seed)
    return {name: torch.tensor(rng.normal(size=(rows, *shape))) for name, shape in shapes.items()}


def number(value):
    return value.detach().item()


def example(**options):
    """A VID in double precision whose variances all differ, with taps to put in."""
    student, teacher = drawn(STUDENT, 1), drawn(TEACHER, 2)
    vid = losses.VID(student=student, teacher=teacher, **options).double()
    nn.init.normal_(vid.alpha, generator=torch.Generator().manual_seed(3))
    return vid, student, teacher


def pooled(tap, size):
    """Adaptive average pooling of (B, C, H, W), written out."""
    out = np.empty((*tap.shape[:2], *size))
    for y, x in np.ndindex(*size):
        window = [
            slice(k * whole // part, math.ceil((k + 1) * whole / part))
            for k, whole, part in zip((y, x), tap.shape[2:], size, strict=True)
        ]
        out[:, :, y, x] = tap[:, :, window[0], window[1]].mean((2, 3))
    return out


def slow(vid, student, teacher):
    """The matrix of losses, pair by pair, by NumPy and SciPy."""
    found, start = np.zeros((len(vid.teacher), len(vid.student))), 0
    for i, t in enumerate(teacher[name] for name in vid.teacher):
        for j, s in enumerate(student[name] for name in vid.student):
            if vid.weights[i, j] == 0:
                continue
            maps = [tap.numpy().reshape(*tap.shape, *[1] * (4 - tap.ndim)) for tap in (s, t)]
            size = np.minimum(maps[0].shape[2:], maps[1].shape[2:])
            mean, target = (pooled(tap, size) for tap in maps)
            width, read = target.shape[1], mean.shape[1]
            matrices = vid.regressors[f"{i}-{j}"].detach().numpy()
            for lo, hi in ((0, read), (read, read + width), (read + width, read + 2 * width)):
                mean = mean if lo == 0 else np.maximum(mean, 0)
                mean = np.einsum("ck,bkyx->bcyx", matrices[:, lo:hi], mean)
            alpha = vid.alpha.detach().numpy()[start : start + width]
            scale = np.sqrt(np.logaddexp(0, alpha) + 1e-5)[:, None, None]
            log_likelihood = stats.norm.logpdf(target, mean, scale).mean()
            found[i, j], start = -log_likelihood - math.log(2 * math.pi) / 2, start + width
    assert start == len(vid.alpha)
    return found


# ------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("weights", [LAMBDA, torch.ones(4, 4), None], ids=["some", "all", "pairs"])
def test_grouped_regressors_equal_a_slow_loop_over_pairs(weights):
    vid, student, teacher = example(weights=weights)
    expected = slow(vid, student, teacher)
    np.testing.assert_allclose(vid.pairs(student, teacher).detach(), expected, rtol=SINGLE)
    total = (vid.weights.numpy() * expected).sum()
    assert number(vid(student, teacher)) == pytest.approx(total, rel=SINGLE)


@pytest.mark.parametrize("narrow", STUDENT.values(), ids=str)
@pytest.mark.parametrize("wide", TEACHER.values(), ids=str)
def test_any_layer_can_teach_any_layer(narrow, wide):
    """(conv, conv), (conv, fc), (fc, conv) and (fc, fc), of sizes that do not divide each other."""
    student, teacher = drawn({"s": narrow}, 1), drawn({"t": wide}, 2)
    vid = losses.VID(student=student, teacher=teacher).double()
    found = vid(student, teacher)
    assert number(found) == pytest.approx(slow(vid, student, teacher)[0, 0], rel=SINGLE)
    found.backward()
    assert all(p.grad.abs().sum() > 0 for p in vid.parameters())


def gaussian(correlation, rows=200_000):
    """Two channels t of variance 4 and 0.25, and s of correlation ±ρ with each, both N(0, ·)."""
    rng = np.random.default_rng(0)
    s = rng.normal(size=(rows, 1))
    noise = rng.normal(size=(rows, 2)) * math.sqrt(1 - correlation**2)
    t = (correlation * s * [1, -1] + noise) * [2, 0.5]
    return {"s": torch.tensor(s)}, {"t": torch.tensor(t)}


def with_variance(vid, variance):
    vid.alpha.data = (torch.tensor(variance) - vid.FLOOR).expm1().log().double()
    return vid


def test_a_known_gaussian_that_nothing_is_known_about_costs_its_entropy():
    student, teacher = gaussian(0)
    vid = with_variance(losses.VID(student=student, teacher=teacher).double(), [4.0, 0.25])
    nn.init.zeros_(vid.regressors["0-0"])
    entropy = np.mean([stats.norm(scale=2).entropy(), stats.norm(scale=0.5).entropy()])
    assert number(vid(student, teacher)) + math.log(2 * math.pi) / 2 == pytest.approx(
        entropy, abs=0.005
    )


@pytest.mark.parametrize("correlation", [0.3, 0.9])
def test_the_bound_is_the_mutual_information_where_it_is_known(correlation):
    """Jointly Gaussian, the best regressor is linear and I(t; s) = −½ log(1 − ρ²) a channel."""
    student, teacher = gaussian(correlation)
    left = 1 - correlation**2
    vid = losses.VID(student=student, teacher=teacher).double()
    with_variance(vid, [4 * left, 0.25 * left])
    first, second = [[1.0], [-1.0]], [[1.0, 0.0], [0.0, 1.0]]  # positive and negative part
    third = [[2 * correlation, -2 * correlation], [-0.5 * correlation, 0.5 * correlation]]
    vid.regressors["0-0"].data = torch.tensor(np.hstack([first, second, third]))
    entropy = np.mean([stats.norm(scale=2).entropy(), stats.norm(scale=0.5).entropy()])
    bound = entropy - number(vid(student, teacher)) - math.log(2 * math.pi) / 2
    assert bound == pytest.approx(-math.log(left) / 2, abs=0.01)


def test_the_variance_starts_at_5_and_never_reaches_0():
    vid, *_ = example()
    fresh = losses.VID(student=drawn(STUDENT, 1), teacher=drawn(TEACHER, 2))
    torch.testing.assert_close(fresh.variance, torch.full_like(fresh.alpha, 5))
    vid.alpha.data.fill_(-1e4)
    torch.testing.assert_close(vid.variance, torch.full_like(vid.alpha, 1e-5))


def test_the_mean_does_not_see_how_large_a_map_is():
    """The same values at more positions: the loss that a λ multiplies stays."""
    student, teacher = drawn({"s": (3, 2, 2)}, 1), drawn({"t": (5, 2, 2)}, 2)
    vid = losses.VID(student=student, teacher=teacher).double()
    larger = [{k: v.repeat(1, 1, 3, 4) for k, v in taps.items()} for taps in (student, teacher)]
    assert number(vid(*larger)) == pytest.approx(number(vid(student, teacher)), rel=1e-12)


# ------------------------------------------------------------------------------- λ


def test_lambda_identity_equals_pairwise():
    pairwise, student, teacher = example()
    identity, *_ = example(weights=torch.eye(4))
    expected = number(pairwise(student, teacher))
    assert number(identity(student, teacher)) == expected
    # As does all-to-all under an identity put in its place: the regressors are the same ones.
    everything = losses.VID(student=student, teacher=teacher, weights=np.ones((4, 4))).double()
    for (i, j), width in zip(everything.order, np.repeat([7, 6, 5, 4], 4), strict=True):
        if i == j:
            assert torch.equal(pairwise.regressors[f"{i}-{i}"], everything.regressors[f"{i}-{i}"])
        assert len(everything.regressors[f"{i}-{j}"]) == width
    fresh = losses.VID(student=student, teacher=teacher).double()
    found = torch.func.functional_call(
        everything, {"weights": torch.eye(4).double()}, (student, teacher)
    )
    assert number(found) == pytest.approx(number(fresh(student, teacher)), rel=1e-12)


def test_pairs_of_weight_0_have_no_regressor():
    vid, *_ = example(weights=LAMBDA)
    assert vid.order == [tuple(pair) for pair in LAMBDA.nonzero().tolist()]
    assert set(vid.regressors) == {f"{i}-{j}" for i, j in vid.order}


def test_lambda_can_be_learned():
    """Its gradient through functional_call is the matrix of losses; so are second derivatives."""
    vid, student, teacher = example(weights=torch.ones(4, 4))
    weights = torch.rand(4, 4, dtype=torch.float64, requires_grad=True)
    value = torch.func.functional_call(vid, {"weights": weights}, (student, teacher))
    (regressor,) = torch.autograd.grad(value, vid.regressors["2-1"], create_graph=True)
    torch.testing.assert_close(
        torch.autograd.grad(value, weights, retain_graph=True)[0], vid.pairs(student, teacher)
    )
    (mixed,) = torch.autograd.grad(regressor.sum(), weights)
    assert mixed[2, 1] != 0
    mixed[2, 1] = 0
    assert not mixed.any()


def test_lambda_is_copied_and_not_saved():
    weights = torch.eye(4)
    vid, student, teacher = example(weights=weights)
    before = number(vid(student, teacher))
    weights *= 2
    assert number(vid(student, teacher)) == before
    assert set(vid.state_dict()) == {"alpha", *(f"regressors.{i}-{i}" for i in range(4))}


def test_regressors_are_drawn_from_the_seed_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two, other = (example(seed=seed)[0].regressors["0-0"] for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one[:, :3].abs().max() <= 3**-0.5
    assert one[:, 3:].abs().max() <= 7**-0.5


# ----------------------------------------------------------------------- gradients


def test_gradients_reach_student_and_regressors_and_never_the_teacher():
    vid, student, teacher = example(weights=LAMBDA)
    for tap in (*student.values(), *teacher.values()):
        tap.requires_grad_()
    vid(student, teacher).backward()
    read = LAMBDA.any(0).tolist()
    assert [tap.grad is not None for tap in student.values()] == read
    assert all(tap.grad.abs().sum() > 0 for tap in student.values() if tap.grad is not None)
    assert all(p.grad.abs().sum() > 0 for p in vid.parameters())
    assert (vid.alpha.grad != 0).all()
    assert all(tap.grad is None for tap in teacher.values())


def test_gradients_are_right():
    vid, student, teacher = example(weights=LAMBDA)
    student = {name: tap[:2].requires_grad_() for name, tap in student.items()}
    teacher = {name: tap[:2] for name, tap in teacher.items()}

    def function(alpha, *taps):
        there = dict(zip(student, taps, strict=True))
        return torch.func.functional_call(vid, {"alpha": alpha}, (there, teacher))

    assert torch.autograd.gradcheck(function, (vid.alpha, *student.values()))


def test_autocast_keeps_the_squares_precise():
    vid, student, teacher = example(weights=LAMBDA)
    vid.float()
    student, teacher = ({k: v.float() for k, v in taps.items()} for taps in (student, teacher))
    with torch.autocast("cpu", torch.bfloat16):
        found = vid(student, teacher)
    assert found.dtype == torch.float32
    assert number(found) == pytest.approx(number(vid(student, teacher)), rel=0.01)


def test_wide_layers_are_predicted_in_bf16_and_judged_in_fp32():
    torch.manual_seed(0)
    student, teacher = {"s": torch.randn(64, 20, 4, 4)}, {"t": torch.randn(64, 96, 2, 2)}
    student["s"].requires_grad_()
    vid = losses.VID(student=student, teacher=teacher)
    vid.alpha.data.fill_(0.5)

    def both():
        value = vid(student, teacher)
        return value, *torch.autograd.grad(value, (student["s"], *vid.parameters()))

    exact = both()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = both()
    assert not torch.equal(exact[0], rounded[0])  # it did round
    for one, other in zip(exact, rounded, strict=True):
        assert other.dtype == torch.float32
        precision = 0.1 if one.dim() else 1e-4  # gradients carry bf16's noise, the loss does not
        assert (one - other).norm() < precision * one.norm()


# ------------------------------------------------------------------------- behaviour


def trained(level, rows=1000, steps=150):
    """Loss on new rows after training: s is a linear function of t, plus noise of this level.

    A level of infinity is noise alone.
    """
    generator = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
    t = torch.randn(2 * rows, 4, generator=generator)
    noise = torch.randn(2 * rows, 4, generator=generator)
    s = noise if math.isinf(level) else t @ mixing + level * noise
    taps = [({"s": s[half]}, {"t": t[half]}) for half in (slice(rows), slice(rows, None))]
    vid = losses.VID(student=taps[0][0], teacher=taps[0][1])
    optimizer = torch.optim.Adam(vid.parameters(), lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        vid(*taps[0]).backward()
        optimizer.step()
    return number(vid(*taps[1]))


def test_a_function_of_the_teacher_costs_less_than_noise_and_more_noise_costs_more():
    found = [trained(level) for level in (0, 0.3, 1, math.inf)]
    assert found == sorted(found)
    assert np.diff(found).min() > 0.05
    # Noise alone cannot beat the teacher's own entropy (here ½, without the constant).
    assert found[-1] == pytest.approx(0.5, abs=0.1)
    assert found[0] < found[-1] - 0.3


# -------------------------------------------------------------- in the training loop


def tiny(width, seed):
    """Two convolutions and two fully connected layers; taps on all four."""
    features = models.convnet((width, 2 * width), 10)[:-1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(*features, nn.Linear(2 * width, 8), nn.ReLU(), nn.Linear(8, 10))
        for module in network:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    layers = ["3", "7", "11", "12"]  # after pooling, after ReLU, logits
    return models.taps(network.to(memory_format=torch.channels_last), layers)


def fit(folder, epochs, weights=None):
    """A student learns from labels and its teacher's layers: networks, optimizer, history."""
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (120, 16, 16, 3), dtype=np.uint8)
    statistics = (np.full(3, 127.0), np.full(3, 60.0))
    batches = data.Batches(
        images, images[:, 0, 0, 0] % 10, statistics=statistics, batch_size=40, seed=0
    )
    student, teacher = tiny(4, 1), tiny(6, 2).eval()
    with torch.no_grad():
        some = torch.zeros(2, 3, 16, 16)
        vid = losses.VID(student=student.eval()(some), teacher=teacher(some), weights=weights)
    networks = nn.ModuleDict({"student": student, "vid": vid})
    optimizer = torch.optim.AdamW(losses.parameter_groups(networks, 0.1), lr=0.01)

    def loss(model, batch):
        taps = model.student(batch.images)
        with torch.no_grad():
            given = teacher(batch.images)
        task = F.cross_entropy(taps["12"], batch.labels)
        return losses.balanced(task, model.vid(taps, given), 0.5)

    history = train.fit(networks, batches, loss, epochs=epochs, optimizer=optimizer, folder=folder)
    return networks, optimizer, [{k: v for k, v in r.items() if k != "seconds"} for r in history]


def test_the_variance_is_trained_and_saved(tmp_path):
    networks, optimizer, history = fit(tmp_path, 1, weights=torch.ones(4, 4))
    start = losses.VID(student=drawn(STUDENT, 1), teacher=drawn(TEACHER, 2)).alpha[0]
    assert (networks.vid.alpha != start).all()
    assert any(p is networks.vid.alpha for g in optimizer.param_groups for p in g["params"])
    saved = load_file(tmp_path / "state.safetensors")
    assert torch.equal(saved["network.vid.alpha"], networks.vid.alpha)
    momenta = [v for k, v in saved.items() if k.startswith("optimizer.") and v.ndim]
    assert any(v.shape == networks.vid.alpha.shape and v.any() for v in momenta)
    assert np.isfinite(history[0]["loss"])


@pytest.mark.parametrize("weights", [None, torch.ones(4, 4)], ids=["pairwise", "all to all"])
def test_interrupted_training_ends_with_the_same_bits(tmp_path, weights):
    whole, _, history = fit(None, 3, weights)
    fit(tmp_path, 1, weights)
    resumed, optimizer, again = fit(tmp_path, 3, weights)
    assert again == history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_no_weight_decay_acts_on_the_variance():
    vid, student, teacher = example()
    networks = nn.ModuleDict({"student": nn.Linear(2, 2), "vid": vid})
    groups = losses.parameter_groups(networks, 0.5)
    listed = [p for group in groups for p in group["params"]]
    assert sorted(map(id, listed)) == sorted(map(id, networks.parameters()))
    before = {name: p.detach().clone() for name, p in networks.named_parameters()}
    optimizer = torch.optim.SGD(groups, lr=0.1)
    (0 * (vid(student, teacher) + networks.student(torch.ones(2)).sum())).backward()
    optimizer.step()
    for name, p in networks.named_parameters():
        kept = 1 if name == "vid.alpha" else 0.95
        torch.testing.assert_close(p.detach(), kept * before[name])


def test_a_network_without_a_vid_has_one_group():
    (group,) = losses.parameter_groups(nn.Linear(2, 2), 0.5)
    assert len(group["params"]) == 2
    assert group["weight_decay"] == 0.5


def test_a_resnet_can_teach_a_small_network():
    student = tiny(4, 1).eval()
    teacher = models.build("resnet10", classes=10, seed=0)
    teacher = models.taps(teacher.eval(), ["layer1", "layer4", "fc"])
    images = torch.randn(3, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.no_grad():
        own, given = student(images), teacher(images)
        vid = losses.VID(student=own, teacher=given, weights=torch.ones(3, 4))
        found = vid.pairs(own, given).numpy()
    np.testing.assert_allclose(found, slow(vid, own, given), rtol=1e-5)


# ------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        (torch.ones(4, 3), r"λ is \(4, 3\); it must be \(4, 4\)"),
        (torch.ones(4), r"λ is \(4,\); it must be \(4, 4\)"),
        (1.0, r"λ is \(\); it must be \(4, 4\)"),
        (torch.eye(4) - 0.5, r"λ holds -0\.5; .* not negative"),
        (torch.eye(4) * math.nan, "λ holds nan; .* finite"),
        (torch.eye(4) / 0, r"λ holds (inf|nan); .* finite"),
        (np.zeros((4, 4)), "λ is all zero"),
    ],
)
def test_a_wrong_lambda_is_named(weights, sentence):
    with pytest.raises(ValueError, match=sentence):
        example(weights=weights)


def test_pairwise_needs_as_many_layers():
    with pytest.raises(ValueError, match="3 teacher layers cannot pair 4 student layers"):
        losses.VID(student=drawn(STUDENT, 1), teacher=drawn(dict(list(TEACHER.items())[:3]), 2))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_missing_or_changed_layer_is_named_beside_those_there_are(side):
    vid, *taps = example()
    given = taps[side == "teacher"]
    tap = given.pop("fc")
    with pytest.raises(ValueError, match=rf"no {side} layer 'fc' of \d channels; .*logits \(4\)"):
        vid(*taps)
    given["fc"] = tap[:, 1:]
    with pytest.raises(ValueError, match=rf"no {side} layer 'fc' of \d channels; .*fc \(\d\)"):
        vid(*taps)
    given["fc"] = tap[:, :, None]
    with pytest.raises(ValueError, match=rf"{side} layer 'fc' is \(9, \d, 1\), not \(B, C\)"):
        vid(*taps)


def test_student_and_teacher_on_different_inputs_are_refused():
    vid, student, teacher = example()
    with pytest.raises(ValueError, match="must see the same inputs, not 9 and 1"):
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
