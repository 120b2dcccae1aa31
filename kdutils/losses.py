"""Knowledge terms: plain functions of tensors. They know no devices, teachers or data."""

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import brentq
from scipy.special import entr


def kd(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 4.0) -> torch.Tensor:
    """Hinton's knowledge distillation (Hinton, Vinyals, Dean 2015, section 2).

    T² · KL(softmax(teacher / T) ‖ softmax(student / T)), in nats, **summed over the classes** and
    averaged over the batch. Averaging over the classes as well would be too small by a factor C.

    Parameters: ``student`` and ``teacher`` logits, both (B, C); ``temperature`` T > 0.
    Returns a 0-d tensor; its gradient with respect to the logits keeps its size as T grows.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"logits differ: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def distillation(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 4.0,
    alpha: float = 0.9,
) -> torch.Tensor:
    """α · :func:`kd` + (1 − α) · cross-entropy with the labels (B,); a 0-d tensor, in nats."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must lie between 0 and 1")
    hard = F.cross_entropy(student, labels)
    return alpha * kd(student, teacher, temperature) + (1 - alpha) * hard


def smoothed_logits(labels: torch.Tensor, classes: int, epsilon: float) -> torch.Tensor:
    """Log-probabilities (B, C) of smoothed labels: 1 − ε on the label, plus ε / C on every class.

    (Szegedy et al. 2016, section 7.) At temperature 1 they stand in for a teacher's logits that
    knows how soft to be and nothing of how classes resemble each other.
    """
    if not 0 < epsilon < 1:
        raise ValueError(f"epsilon is {epsilon}; it must lie between 0 and 1")
    return torch.log(F.one_hot(labels, classes) * (1 - epsilon) + epsilon / classes)


def smoothing_for_entropy(entropy: float, classes: int) -> float:
    """The ε whose smoothed labels over ``classes`` classes have this entropy (nats)."""

    def excess(epsilon):
        rest = epsilon / classes
        return entr(1 - epsilon + rest) + (classes - 1) * entr(rest) - entropy

    if not 0 < entropy < np.log(classes):
        raise ValueError(f"entropy is {entropy}; it must lie between 0 and {np.log(classes):.4f}")
    return float(brentq(excess, 0.0, 1.0))


def temperature_for_entropy(logits: np.ndarray, entropy: float) -> float:
    """The temperature at which softmax(logits / T), logits (N, C), has this mean entropy (nats)."""
    logits = torch.as_tensor(logits, dtype=torch.float64)

    def excess(log_temperature):
        scaled = logits / np.exp(log_temperature)
        return float(torch.distributions.Categorical(logits=scaled).entropy().mean()) - entropy

    try:
        return float(np.exp(brentq(excess, np.log(0.01), np.log(1000.0))))
    except ValueError:
        raise ValueError(f"no temperature gives these logits a mean entropy of {entropy}") from None


# Terms on pooled features (B, D), in float32 or float64. All but FeatureKD compare relations inside
# a batch, so the widths D of teacher and student may differ.


def class_centres(
    features: torch.Tensor, labels: torch.Tensor, classes: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean feature vector of each class, and which classes there are.

    ``features`` (B, D), ``labels`` (B,) whole numbers below ``classes`` = C. Returns centres (C, D)
    and a mask (C,); the centre of a class without a picture is zero and the mask is False there.
    A batch gives a batch's centres; a whole training set gives fixed ones.

    Without ``classes`` row i is the class of picture i, (B, D) and (B,); the mask is True at the
    first picture of each class. Less work where C is above B. Rows of one batch belong together in
    all networks, those of two batches do not.
    """
    members = labels[:, None] == labels if classes is None else F.one_hot(labels, classes).T
    present = ~members.tril(-1).any(1) if classes is None else members.any(1)
    share = members.to(features) / members.sum(1, keepdim=True).clamp(min=1)
    # A product in place of a loop or of scattered sums, whose order varies on a GPU.
    return share @ features, present


class MovingCentres(torch.nn.Module):
    """Class centres as an exponential moving average over batches; call as :func:`class_centres`.

    A class in the batch gets ``momentum`` · (its stored centre) + (1 − ``momentum``) · (the
    batch's), and at first sight the batch's alone. The gradient runs through the batch's part, so
    it is smaller by the factor 1 − ``momentum``. Returns centres (C, D) and the mask of the classes
    in this batch; ``seen`` is the mask of all classes seen so far. Stores nothing in eval mode.
    As a part of the network that is trained, it is saved and resumed with it.
    Raises ValueError when ``momentum`` is not in [0, 1) or the features' width is not ``width``.
    """

    def __init__(self, classes: int, width: int, momentum: float = 0.9):
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; it must be at least 0 and below 1")
        self.momentum = momentum
        self.register_buffer("centres", torch.zeros(classes, width))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))

    def forward(self, features, labels):
        if (found := features.shape[1]) != (width := self.centres.shape[1]):
            raise ValueError(f"features have width {found}, the centres {width}")
        centres, present = class_centres(features, labels, len(self.seen))
        kept = self.momentum * self.seen[:, None].to(centres)
        centres = kept * self.centres + (1 - kept) * centres
        centres = torch.where(present[:, None], centres, self.centres)
        if self.training:
            self.centres, self.seen = centres.detach(), self.seen | present
        return centres, present


def geometric(
    student: tuple[torch.Tensor, torch.Tensor],
    teacher: tuple[torch.Tensor, torch.Tensor],
    similarity: str = "cosine",
) -> torch.Tensor:
    """The geometric term (Tatarnikova and Raskopina, section II): class similarities compared.

    The mean of (S_student − S_teacher)² over pairs of different classes that both know. S is, of
    centres c measured from the mean of the compared classes' centres,

    - ``cosine``: the cosine of the angle between two of them;
    - ``rbf``: exp(−d² / 2σ²) of their distance d; σ² is the mean d² over the pairs compared, taken
      in each network's own space.

    Neither S changes when all features are rotated, mirrored, shifted, or scaled by one positive
    factor, or are embedded in a wider space. A factor for each channel or each class changes it.
    Only ``rbf`` sees how far centres lie from the mean.

    Parameters: ``student`` and ``teacher`` are (centres (C, D), mask (C,)) as from
    :func:`class_centres`. Returns a 0-d tensor. It is 0 with a gradient of 0 where fewer than two
    classes are common (and at two: their S is a constant). A centre at the mean itself has no
    direction: its cosines count as 0 and pass on no gradient.
    Raises ValueError for an unknown ``similarity`` or different numbers of classes.
    """
    if similarity not in ("cosine", "rbf"):
        raise ValueError(f"unknown similarity {similarity!r}; similarities: cosine, rbf")
    _same_rows(student[0], teacher[0])
    common = student[1] & teacher[1]
    pairs = (common & common[:, None]).fill_diagonal_(False)
    ours, theirs = (_similarities(centres, common, similarity) for centres, _ in (student, teacher))
    # A mask in place of a selection, whose size a GPU would have to be waited for.
    return torch.where(pairs, ours - theirs, 0).square().sum() / pairs.sum().clamp(min=1)


def _similarities(centres, common, similarity):
    known = common.to(centres)
    mean = known / known.sum().clamp(min=1) @ centres
    moved = centres - mean
    products = moved @ moved.T  # all that follows is (C, C), which is less than (C, D)
    squares = products.diagonal()
    # What rounding leaves of a centre at the mean is noise, and dividing by it would blow it up.
    noise = (100 * torch.finfo(centres.dtype).eps) ** 2 * (squares.max() + mean @ mean).detach()
    if similarity == "cosine":
        inverse = _nonzero(squares, noise).rsqrt()
        return products * inverse * inverse[:, None]
    usual = 2 * known @ squares / (known.sum() - 1).clamp(min=1)  # the mean distance of two classes
    return torch.exp((2 * products - squares - squares[:, None]) / (2 * _nonzero(usual, noise)))


class FeatureKD(torch.nn.Module):
    """Feature distillation: mean squared error between the projected student and the teacher.

    (After the hints of Romero et al. 2015, with a linear regressor on pooled features.) Features
    (B, ``student_width``) and (B, ``teacher_width``) to a 0-d tensor, the mean over both axes.
    ``projector`` is trained with the student, so its weights belong into the optimizer.
    Raises ValueError when the features have other widths.
    """

    def __init__(self, student_width: int, teacher_width: int):
        super().__init__()
        self.projector = torch.nn.Linear(student_width, teacher_width)

    def forward(self, student, teacher):
        _same_rows(student, teacher)
        found = student.shape[1], teacher.shape[1]
        widths = self.projector.in_features, self.projector.out_features
        if found != widths:
            raise ValueError(f"widths of student and teacher are {found}, the projector's {widths}")
        return F.mse_loss(self.projector(student), teacher)


def rkd_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Relational distillation by distances (Park et al. 2019, the distance-wise loss).

    Huber's loss (bend at 1) between ψ = ‖x_i − x_j‖ / μ of teacher and student, μ being a network's
    mean distance over the batch. The paper sums over pairs; this is the mean over pairs of
    different pictures. Features (B, D) to a 0-d tensor; 0 for fewer than two pictures.
    """
    _same_rows(student, teacher)

    def potentials(features):
        distances = F.pdist(features)
        return distances / _nonzero(distances.sum() / max(1, len(distances)))

    ours, theirs = potentials(student), potentials(teacher)
    return F.huber_loss(ours, theirs, reduction="sum") / max(1, len(ours))


def rkd_angle(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Relational distillation by angles (Park et al. 2019, the angle-wise loss).

    Huber's loss (bend at 1) between the cosines of the angles that pictures i and k make at j, as
    a mean over triples of three different pictures, where the paper sums. Features (B, D) to a 0-d
    tensor; 0 for fewer than three pictures. Needs memory for B² · D and B³ numbers.
    """
    _same_rows(student, teacher)
    count = len(student)
    same = torch.eye(count, dtype=torch.bool, device=student.device)

    def cosines(features):
        towards = _unit(features - features[:, None])  # [j, i]: from j to i, and zero for i = j
        return (towards @ towards.mT).masked_fill(same, 0)

    loss = F.huber_loss(cosines(student), cosines(teacher), reduction="sum")
    return loss / max(1, count * (count - 1) * (count - 2))


def similarity_preserving(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Similarity-preserving distillation (Tung and Mori 2019): ‖G_t − G_s‖²_F / B².

    G is the matrix X Xᵀ of a batch's features (B, ...), flattened to X, with every row scaled to
    length 1; the row of a zero vector stays zero. Returns a 0-d tensor.
    """
    _same_rows(student, teacher)
    ours, theirs = (_unit(x @ x.T) for x in (student.flatten(1), teacher.flatten(1)))
    return F.mse_loss(ours, theirs)


def correlation_congruence(
    student: torch.Tensor, teacher: torch.Tensor, gamma: float = 0.4, order: int = 2
) -> torch.Tensor:
    """Correlation congruence (Peng et al. 2019): ‖K_t − K_s‖²_F / B².

    K_ij is the Taylor series, up to ``order``, of the Gaussian kernel exp(−γ ‖x_i − x_j‖²) for
    features of length 1: e^(−2γ) · Σ_p (2γ x_i·x_j)^p / p!. Pairs of all pictures count, not only
    neighbours in the batch as in a widespread program, whose value depends on the batch's order.
    Features (B, D) to a 0-d tensor; a zero vector stays zero.
    """
    _same_rows(student, teacher)

    def kernel(features):
        cosines = _unit(features) @ _unit(features).T
        weights = [(2 * gamma) ** p / math.factorial(p) for p in range(order + 1)]
        return math.exp(-2 * gamma) * sum(w * cosines**p for p, w in enumerate(weights))

    return F.mse_loss(kernel(student), kernel(teacher))


def _unit(vectors):
    """Vectors (..., D) at length 1; one of no length stays zero and passes on no gradient."""
    return vectors / _nonzero(vectors.norm(dim=-1, keepdim=True))


def _nonzero(divisor, noise=0.0):
    """Infinity in place of 0, or of ``noise`` and less: the quotient and its gradient are 0."""
    return divisor.masked_fill(divisor <= noise, torch.inf)


def _same_rows(student, teacher):
    if len(student) != len(teacher):  # one row would be repeated in silence
        raise ValueError(f"student has {len(student)} rows, teacher {len(teacher)}")


class VID(torch.nn.Module):
    """Variational information distillation between layers of two networks, as a loss.

    For a teacher layer t and a student layer s, I(t; s) = H(t) − H(t|s) ≥ H(t) + E[log q(t|s)]
    (Barber and Agakov 2003; Ahn et al. 2019, eq. 3). H(t) does not depend on the student, so the
    bound rises as −log q falls. As in Ahn et al. 2019 (section 2.1, eq. 5), q is a Gaussian: its
    mean μ(s) is a regressor's, its variance σ² = softplus(α) + ε is trained, one a teacher channel.
    The loss of a pair is the **mean** over images, channels and positions of

        ½ [(t − μ(s))² / σ² + log σ²],

    in nats an element, without the constant ½ log 2π. Where eq. 5 sums we average, so that a λ
    means the same whatever the layer's size. ``vid(student_taps, teacher_taps)`` is the sum of
    λ_ij · loss_ij over teacher layers i and student layers j, in nats an element. A pair whose λ
    is 0 has no regressor and costs nothing.

    Of two maps the larger is averaged down to the smaller, in height and in width; a fully
    connected layer is a map of 1 × 1. The regressor is three 1 × 1 convolutions without bias, with
    ReLU between, all as wide as the teacher's layer. The variance starts at 5; no weight decay may
    act on it (:func:`parameter_groups`).

    Parameters: ``student`` and ``teacher``, ``{layer: output}`` for any batch, of which only the
    channels are read: (B, C) or (B, C, H, W). ``weights`` is λ, (teacher layers, student layers);
    None is the pairwise form of Ahn et al. 2019, λ = identity. ``seed`` draws the regressors, a
    pair's the same whichever other pairs have one. λ is a setting and no state: it is not saved.
    ``torch.func.functional_call`` can put a λ of its own, with a gradient, in place of ``weights``.
    Raises ValueError for layers of another shape, for λ of the wrong shape, negative, not finite
    or all zero, and when λ is None and the numbers of layers differ.
    """

    VARIANCE, FLOOR = 5.0, 1e-5

    def __init__(self, *, student: dict, teacher: dict, weights=None, seed: int = 0):
        super().__init__()
        self.student, self.teacher = _channels("student", student), _channels("teacher", teacher)
        weights = _lambda(weights, len(teacher), len(student))
        self.register_buffer("weights", weights, persistent=False)
        generator = torch.Generator().manual_seed(seed)

        def drawn(rows, columns):  # as PyTorch draws a convolution
            bound = columns**-0.5
            return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

        self.regressors, self.order, shares = torch.nn.ParameterDict(), [], []
        for i, c in enumerate(self.teacher.values()):
            for j, channels in enumerate(self.student.values()):
                matrices = torch.cat([drawn(c, channels), drawn(c, c), drawn(c, c)], 1)
                if weights[i, j] > 0:
                    self.regressors[f"{i}-{j}"] = torch.nn.Parameter(matrices)
                    self.order.append((i, j))
                    shares.append(torch.zeros(*weights.shape, c))
                    shares[-1][i, j] = 1 / c
        # (teacher layers, student layers, channels of all pairs): a channel's part in each mean.
        self.register_buffer("shares", torch.cat(shares, 2), persistent=False)
        start = torch.tensor(self.VARIANCE - self.FLOOR).expm1().log()
        self.alpha = torch.nn.Parameter(start.repeat(self.shares.shape[2]))

    @property
    def variance(self) -> torch.Tensor:
        """σ² of the channels of the pairs whose λ is above 0, end to end, in rows of λ."""
        return F.softplus(self.alpha) + self.FLOOR

    def forward(self, student: dict, teacher: dict) -> torch.Tensor:
        """Σ λ_ij · loss_ij, a 0-d tensor; gradients reach student and regressors, not the teacher.

        Taps may hold further layers. Raises ValueError when a layer is missing or has other
        channels, and when student and teacher saw different numbers of inputs. The teacher's taps
        may come from ``torch.no_grad``, not from ``inference_mode``, which autograd cannot keep.
        """
        return (self.weights * self.pairs(student, teacher)).sum()

    def pairs(self, student: dict, teacher: dict) -> torch.Tensor:
        """The losses of the pairs before λ, (teacher layers, student layers); 0 where λ is 0."""
        own = _named("student", student, self.student)
        given = _named("teacher", teacher, self.teacher)
        saw, shown = len(own[0]), len(given[0])
        if saw != shown:
            raise ValueError(f"student and teacher must see the same inputs, not {saw} and {shown}")
        errors = self._errors([tap.to(self.alpha.dtype) for tap in own], given)
        variance = self.variance
        squares = torch.cat([errors[pair] for pair in self.order])
        return (self.shares * (squares / variance + variance.log()) / 2).sum(2)

    def _errors(self, own: list, given: list) -> dict:
        """Mean squared errors of the regressors by channel, {(i, j): (C of teacher layer i,)}."""
        target = cache(lambda i, size: _rows(given[i].detach().to(self.alpha.dtype), size))
        errors, device = {}, self.alpha.device.type
        for j, layer in enumerate(own):
            groups = {}  # regressors that read this layer at one size share their first product
            for i in (i for i, k in self.order if k == j):
                size = tuple(map(min, _size(layer), _size(given[i])))
                groups.setdefault(size, []).append(i)
            for size, group in groups.items():
                matrices = [self.regressors[f"{i}-{j}"] for i in group]
                split = [m.split([layer.shape[1], len(m), len(m)], 1) for m in matrices]
                one, two, three = zip(*split, strict=True)
                # Narrow matrices are slower in bf16: its casts cost more than its products save.
                wide = torch.is_autocast_enabled(device) and min(map(len, matrices)) >= 64
                with torch.autocast(device, torch.bfloat16, enabled=wide):
                    hidden = F.linear(_rows(layer, size), torch.cat(one)).relu_()
                    hidden = hidden.split([len(m) for m in matrices], 1)
                    means = [
                        F.linear(F.linear(x, second).relu_(), third)
                        for x, second, third in zip(hidden, two, three, strict=True)
                    ]
                for i, mean in zip(group, means, strict=True):
                    squares = F.mse_loss(mean.to(layer.dtype), target(i, size), reduction="none")
                    errors[i, j] = squares.mean(0)  # σ² is constant within a channel
        return errors


def parameter_groups(network: torch.nn.Module, weight_decay: float) -> list[dict]:
    """An optimizer's groups: weight decay for all parameters but the variances of :class:`VID`.

    Decay would pull α to 0, which is a variance of log 2 chosen by nobody.
    """
    variances = [module.alpha for module in network.modules() if isinstance(module, VID)]
    rest = [p for p in network.parameters() if not any(p is alpha for alpha in variances)]
    decayed = {"params": rest, "weight_decay": weight_decay}
    return [decayed, {"params": variances, "weight_decay": 0.0}] if variances else [decayed]


def balanced(task: torch.Tensor, knowledge: torch.Tensor, beta: float) -> torch.Tensor:
    """β · task + (1 − β) · knowledge: the objective of a student that a knowledge term helps."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; it must lie between 0 and 1")
    return beta * task + (1 - beta) * knowledge


def _channels(side, taps):
    """{layer: channels} of maps (B, C, H, W) and of fully connected layers (B, C)."""
    for name, tap in taps.items():
        if tap.ndim not in (2, 4):
            shape = tuple(tap.shape)
            raise ValueError(f"{side} layer {name!r} is {shape}, not (B, C) or (B, C, H, W)")
    return {name: tap.shape[1] for name, tap in taps.items()}


def _named(side, taps, channels):
    there = _channels(side, taps)
    for name, c in channels.items():
        if there.get(name) != c:
            layers = ", ".join(f"{name} ({found})" for name, found in there.items())
            raise ValueError(f"no {side} layer {name!r} of {c} channels; layers: {layers}")
    return [taps[name] for name in channels]


def _size(tap):
    return tuple(tap.shape[2:]) or (1, 1)


def _rows(tap, size):
    """A layer averaged down to ``size``, a row for each position: (B · height · width, C)."""
    tap = tap if _size(tap) == size else F.adaptive_avg_pool2d(tap, size)
    return tap if tap.ndim == 2 else tap.permute(0, 2, 3, 1).flatten(0, 2)


def _lambda(weights, rows, columns):
    """λ as a tensor of its own, checked; None is the identity."""
    if weights is None and rows != columns:
        raise ValueError(f"without λ, {rows} teacher layers cannot pair {columns} student layers")
    weights = torch.eye(rows) if weights is None else torch.as_tensor(weights)
    weights = weights.detach().float().clone()
    if weights.shape != (rows, columns):
        raise ValueError(
            f"λ is {tuple(weights.shape)}; it must be {(rows, columns)}: teacher × student layers"
        )
    wrong = weights[~((weights >= 0) & weights.isfinite())]
    if len(wrong):
        raise ValueError(f"λ holds {float(wrong[0]):g}; all must be finite and not negative")
    if not weights.any():
        raise ValueError("λ is all zero; at least one pair of layers must count")
    return weights
