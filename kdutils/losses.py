"""Knowledge terms: plain functions of tensors. They know no devices, teachers or data.

Give them float32 or float64, as Fabric's wrapped networks do: in 16 bits, and under autocast, sums
round to nothing. A teacher's tensors must not require a gradient; :class:`VID` alone detaches them.
Make modules with weights a part of the student before its optimizer (``student.hint =
FeatureKD(…)``): :func:`train.fit` keeps and resumes the network's weights alone.
"""

import math

import torch
import torch.nn.functional as F


def kd(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 4.0) -> torch.Tensor:
    """Hinton's knowledge distillation (Hinton, Vinyals, Dean 2015, section 2).

    T² · KL(softmax(teacher / T) ‖ softmax(student / T)), in nats, **summed over the classes** and
    averaged over the batch. Averaging over the classes as well would be too small by a factor C.

    Parameters: ``student`` and ``teacher`` logits, both (B, C): of sequences or maps, flatten all
    axes but the classes' first; ``temperature`` T > 0. Raises ValueError where shapes differ.
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


def dkd(student, teacher, labels, alpha=1.0, beta=8.0, temperature=4.0) -> torch.Tensor:
    """Decoupled knowledge distillation (Zhao et al. 2022, eq. 7): T² · (α · TCKD + β · NCKD).

    TCKD is the KL divergence between teacher and student of the two probabilities "the label" and
    "any other class"; NCKD that of the other classes among themselves, without the label. Both are
    summed over classes and averaged over the batch, in nats. :func:`kd` is the case α = 1 and
    β = the teacher's probability of all other classes at T, picture by picture (eq. 6). T² is the
    authors' code's; eq. 7 has none.

    Parameters: logits (B, C) with C of at least 2; ``labels`` (B,); ``beta`` a number or (B,), one
    a picture. The term does not see a constant added to all of a picture's logits. Returns a 0-d
    tensor. Raises ValueError for other shapes and for a temperature that is not above 0.
    """
    _check_logits(student, teacher, temperature)
    count, classes = student.shape
    found = tuple(labels.shape), tuple(torch.as_tensor(beta).shape)
    if found[0] != (count,) or found[1] not in ((), (count,)):
        raise ValueError(f"labels and beta are {found}; they must be ({count},), beta or a number")
    others = torch.arange(classes - 1, device=student.device)
    order = torch.cat([labels[:, None], others + (others >= labels[:, None])], 1)  # the label first

    def parts(logits):
        target, rest = (logits / temperature).gather(1, order).split([1, classes - 1], 1)
        both = torch.cat([target, rest.logsumexp(1, keepdim=True)], 1)
        return both.log_softmax(1), rest.log_softmax(1)

    pairs = zip(parts(student), parts(teacher), strict=True)
    tckd, nckd = (F.kl_div(*pair, reduction="none", log_target=True).sum(1) for pair in pairs)
    return (alpha * tckd + beta * nckd).mean() * temperature**2


def standardised(logits: torch.Tensor) -> torch.Tensor:
    """Logits (B, C) with mean 0 and standard deviation 1 over the classes of each picture.

    (Sun et al. 2024, algorithm 1 without its τ.) Teacher's and student's, put into :func:`kd` at
    temperature τ, give algorithm 2. No constant added to a picture's logits and no positive factor
    on them is seen. The deviation divides by C, as in the algorithm; the authors' figure 2 and code
    divide by C − 1, which is a τ larger by √(C / (C − 1)). A picture whose logits are all alike
    gets zeros and passes on no gradient. Raises ValueError when ``logits`` is not (B, C).
    """
    if logits.ndim != 2:
        raise ValueError(f"logits are {tuple(logits.shape)}; they must be (B, C)")
    return _deviations(logits) * math.sqrt(logits.shape[1])


def dist(
    student: torch.Tensor, teacher: torch.Tensor, beta=1.0, gamma=1.0, temperature: float = 4.0
) -> torch.Tensor:
    """Distillation by correlations (DIST, Huang et al. 2022): T² · (β · inter + γ · intra).

    Of the probabilities softmax(logits / T), (B, C), **inter** is the mean over pictures of
    Pearson's distance 1 − ρ between teacher's and student's C classes, **intra** the mean over
    classes of that between their B pictures. The distance is computed as half the squared distance
    of the two deviations at length 1, which is the same; a row or column that is constant has
    deviation 0. So it counts 0 where both sides are constant, ½ where one is, and has no gradient;
    of one picture all columns are constant.

    The term does not see a constant added to all of a picture's logits. Returns a 0-d tensor.
    Raises ValueError for logits that are not both (B, C) with C of at least 2, and for a
    temperature that is not above 0.
    """
    _check_logits(student, teacher, temperature)

    def distance(ours, theirs):
        return (_deviations(ours) - _deviations(theirs)).square().sum(1).mean() / 2

    ours, theirs = ((logits / temperature).softmax(1) for logits in (student, teacher))
    return temperature**2 * (beta * distance(ours, theirs) + gamma * distance(ours.T, theirs.T))


def _check_logits(student, teacher, temperature):
    if student.shape != teacher.shape or student.ndim != 2 or student.shape[1] < 2:
        found = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
        raise ValueError(f"logits must be (B, C), alike, of two or more classes: {found}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")


def _deviations(rows):
    """Rows (N, D) less their mean, at length 1; a constant row is zero, with no gradient."""
    moved = rows - rows.mean(1, keepdim=True)
    # What rounding leaves of a constant row is noise, and dividing by it would blow it up.
    noise = 100 * torch.finfo(rows.dtype).eps * rows.detach().norm(dim=1, keepdim=True)
    return moved / _nonzero(moved.norm(dim=1, keepdim=True), noise)


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
    student: tuple[torch.Tensor, torch.Tensor], teacher: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """The geometric term (Tatarnikova and Raskopina, section II): class similarities compared.

    The mean of (S_student − S_teacher)² over pairs of different classes that both know. S is the
    cosine of the angle between two centres, measured from the mean of the compared classes' centres
    (the paper names no similarity). It does not change when all features are rotated, mirrored,
    shifted, or scaled by one positive factor, or are embedded in a wider space. A factor for each
    channel or each class changes it.

    Parameters: ``student`` and ``teacher`` are (centres (C, D), mask (C,)) as from
    :func:`class_centres`. Returns a 0-d tensor. It is 0 with a gradient of 0 where fewer than two
    classes are common (and at two: their S is a constant). A centre at the mean itself has no
    direction: its cosines count as 0 and pass on no gradient.
    Raises ValueError for different numbers of classes.
    """
    _same_rows(student[0], teacher[0])
    common = student[1] & teacher[1]
    pairs = (common & common[:, None]).fill_diagonal_(False)
    ours, theirs = (_cosines(centres, common.to(centres)) for centres, _ in (student, teacher))
    # A mask in place of a selection, whose size a GPU would have to be waited for.
    return torch.where(pairs, ours - theirs, 0).square().sum() / pairs.sum().clamp(min=1)


def _cosines(centres, known):
    """Cosines (C, C) of centres (C, D) seen from the mean of those with a 1 in ``known`` (C,)."""
    mean = known / known.sum().clamp(min=1) @ centres
    moved = centres - mean
    products = moved @ moved.T  # all that follows is (C, C), which is less than (C, D)
    squares = products.diagonal()
    # What rounding leaves of a centre at the mean is noise, and dividing by it would blow it up.
    noise = (100 * torch.finfo(centres.dtype).eps) ** 2 * (squares.max() + mean @ mean).detach()
    inverse = _nonzero(squares, noise).rsqrt()
    return products * inverse * inverse[:, None]


class FeatureKD(torch.nn.Module):
    """Feature distillation: mean squared error between the projected student and the teacher.

    (After the hints of Romero et al. 2015, with a linear regressor on pooled features.) Features
    (B, ``student_width``) and (B, ``teacher_width``) to a 0-d tensor, the mean over both axes.
    ``projector`` is trained with the student, so make the module a part of it before the optimizer
    is made; :func:`train.fit` resumes no weights but the network's.
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


def pkt(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Probabilistic knowledge transfer (Passalis and Tefas 2018), with the cosine kernel.

    Given picture i, picture j has the probability k_ij / Σ_m k_im, with k = (1 + cosine) / 2 of
    the features. The term is the KL divergence of the student's probabilities from the teacher's,
    in nats, as a mean over i, where the paper sums. As in the paper j and m run over the pictures
    other than i; a widespread program counts i too, whose k is always 1. Kernels below the dtype's
    precision count as that and pass on no gradient.

    Features (B, D) to a 0-d tensor; 0 for fewer than three pictures, since one other is certain. A
    zero vector has cosine 0. No picture's length is seen. Raises ValueError when the numbers of
    pictures differ.
    """
    _same_rows(student, teacher)

    def logs(features):
        unit, precision = _unit(features), torch.finfo(features.dtype)
        kernel = ((1 + unit @ unit.T) / 2).clamp(min=precision.eps)
        return kernel.log().fill_diagonal_(precision.min).log_softmax(1)

    return F.kl_div(logs(student), logs(teacher), reduction="batchmean", log_target=True)


def attention_transfer(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Attention transfer (Zagoruyko and Komodakis 2017, section 3.1), activation-based.

    Of maps (B, C, H, W), Q is the mean over channels of the squares, flattened to (B, H · W), every
    row scaled to length 1; that of a map of zeros stays zero. The term is the mean of
    (Q_s − Q_t)² over pictures **and positions**, for one layer. In the paper's eq. 2 it is
    ½ ‖Q_s − Q_t‖₂. The mean of squares is what the authors' code and most others compute, so that
    coefficients can be compared, and its gradient fades as maps become alike, where the norm's
    keeps its size and jumps at zero. It is ‖Q_s − Q_t‖² / (H · W): between layers of different
    sizes coefficients mean different things.

    The numbers of channels may differ. No positive factor on a picture's map is seen. Returns a
    0-d tensor. Raises ValueError for other shapes, heights, widths or numbers of pictures.
    """
    if not student.ndim == teacher.ndim == 4 or student.shape[2:] != teacher.shape[2:]:
        found = f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
        raise ValueError(f"maps must be (B, C, H, W) of one height and width: {found}")
    _same_rows(student, teacher)
    ours, theirs = (_unit(maps.square().mean(1).flatten(1)) for maps in (student, teacher))
    return F.mse_loss(ours, theirs)


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
    mean μ(s) is a :func:`regressor`'s, its variance σ² = softplus(α) is trained from α = 0. The
    loss of a link is, in nats without the constant ½ log 2π,

        ½ [(t − μ(s))² / σ² + log σ²],

    the mean over pictures of the sum over channels and positions, as in eq. 5. Its variants:
    ``variance`` ``channel`` (one σ² a teacher channel) or ``link`` (one in all); ``reduction``
    ``sum`` or ``mean`` over channels and positions; and ``coded``, what the code of study 2's
    authors computes in its place (code/test_distill.ipynb, cell 16, at commit 9447244),

        ½ Σ (t − μ(s))² · σ² + ½ log σ²,

    with one σ² a link. There the variance **multiplies**: the loss falls without bound as σ² → 0,
    so the link weakens while it trains. It is no bound on any information.

    ``vid(student_taps, teacher_taps)`` is the sum of λ_ij · loss_ij over teacher layers i and
    student layers j. A link whose λ is 0 has no regressor and costs nothing.

    Parameters: ``student`` and ``teacher``, ``{layer: output}`` for any batch, of which only the
    shapes are read: (B, C) or (B, C, H, W), square. ``weights`` is λ, (teacher layers, student
    layers); None is the pairwise form of Ahn et al. 2019, λ = identity. ``seed`` draws the
    regressors, a link's the same whichever other links there are. λ is a setting and no state: it
    is not saved.
    Raises ValueError for an unknown variant, layers of another shape, for λ of the wrong shape,
    negative, not finite or all zero, and when λ is None and the numbers of layers differ.
    """

    def __init__(
        self, *, student, teacher, weights=None, seed=0, variance="channel", reduction="sum",
        coded=False,
    ):  # fmt: skip
        super().__init__()
        _one_of("variance", variance, ("channel", "link"))
        _one_of("reduction", reduction, ("sum", "mean"))
        if coded and (variance, reduction) != ("link", "sum"):
            raise ValueError("as coded, a link has one variance and a sum: variance='link'")
        self.student, self.teacher = _shapes("student", student), _shapes("teacher", teacher)
        self.reduction, self.coded = reduction, coded
        weights = _lambda(weights, len(teacher), len(student))
        self.register_buffer("weights", weights, persistent=False)
        self.regressors, self.alpha = torch.nn.ModuleDict(), torch.nn.ParameterDict()
        for i, after in enumerate(self.teacher.values()):
            for j, before in enumerate(self.student.values()):
                if weights[i, j] > 0:
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(1_000_003 * seed + 1009 * i + j)
                        self.regressors[f"{i}-{j}"] = regressor(before, after)
                    count = after[0] if variance == "channel" else 1
                    self.alpha[f"{i}-{j}"] = torch.nn.Parameter(torch.zeros(count))

    def variance(self, i: int, j: int) -> torch.Tensor:
        """σ² of the link from teacher layer i to student layer j: (channels,) or (1,)."""
        return F.softplus(self.alpha[f"{i}-{j}"])

    def forward(self, student: dict, teacher: dict) -> torch.Tensor:
        """Σ λ_ij · loss_ij, a 0-d tensor; gradients reach student and regressors, not the teacher.

        Taps may hold further layers. Raises ValueError when a layer is missing or has another
        shape, and when student and teacher saw different numbers of inputs.
        """
        own = _named("student", student, self.student)
        given = _named("teacher", teacher, self.teacher)
        _same_rows(own[0], given[0])
        total = 0.0
        for name, reader in self.regressors.items():
            i, j = map(int, name.split("-"))
            loss = self._link(given[i].detach(), reader(own[j]), self.variance(i, j))
            total = total + self.weights[i, j] * loss
        return total

    def _link(self, target, mean, variance):
        squares = F.mse_loss(mean.float(), target.float(), reduction="none")
        of_channels = squares.sum(0).flatten(1).sum(1) if squares.ndim > 2 else squares.sum(0)
        errors = of_channels / len(target)  # (C,), the mean over pictures of the sum over positions
        if self.coded:
            return (errors.sum() * variance + variance.log()).sum() / 2
        positions = target[0, 0].numel()
        logs = variance.log().expand(len(errors)).sum() * positions
        loss = ((errors / variance).sum() + logs) / 2
        return loss / target[0].numel() if self.reduction == "mean" else loss


def regressor(before: tuple[int, ...], after: tuple[int, ...]) -> torch.nn.Module:
    """From a student's layer to the mean of a teacher's, (C,) or (C, H, H) each.

    As study 2's authors have it (code/mut_info.py at commit 9447244): a linear map where one side
    is fully connected; else convolutions c → 2c → 2d → d with batch norm and ReLU between, 1 × 1
    between maps of one size. Of two sizes one convolution goes to the other, strided down or
    transposed up, where there are fewer positions; theirs spread that over all three.
    """
    if len(before) == 1 or len(after) == 1:
        flat = torch.nn.Linear(math.prod(before), math.prod(after))
        return torch.nn.Sequential(torch.nn.Flatten(), flat, torch.nn.Unflatten(1, after))
    c, d, (small, large) = before[0], after[0], sorted((before[1], after[1]))
    stride = large // small
    change = {"kernel_size": large - (small - 1) * stride, "stride": stride}
    up, down = after[1] > before[1], after[1] < before[1]
    first = torch.nn.Conv2d(c, 2 * c, **(change if down else {"kernel_size": 1}))
    last = torch.nn.ConvTranspose2d(2 * d, d, **change) if up else torch.nn.Conv2d(2 * d, d, 1)
    middle = [torch.nn.BatchNorm2d(2 * c), torch.nn.ReLU(), torch.nn.Conv2d(2 * c, 2 * d, 1)]
    return torch.nn.Sequential(
        first, *middle, torch.nn.BatchNorm2d(2 * d), torch.nn.ReLU(), last
    ).to(memory_format=torch.channels_last)


def balanced(task: torch.Tensor, knowledge: torch.Tensor, beta: float) -> torch.Tensor:
    """β · task + (1 − β) · knowledge: the objective of a student that a knowledge term helps."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; it must lie between 0 and 1")
    return beta * task + (1 - beta) * knowledge


def _one_of(name, value, known):
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; {name}: {' or '.join(known)}")


def _shapes(side, taps):
    """{layer: shape of one output}: square maps (C, H, H), or (C,) where fully connected."""
    for name, tap in taps.items():
        shape = tuple(tap.shape)
        if len(shape) not in (2, 4) or shape[2:3] != shape[3:]:
            raise ValueError(f"{side} layer {name!r} is {shape}, not (B, C) or (B, C, H, H)")
    return {name: tuple(tap.shape[1:]) for name, tap in taps.items()}


def _named(side, taps, shapes):
    there = _shapes(side, taps)
    for name, shape in shapes.items():
        if there.get(name) != shape:
            layers = ", ".join(f"{name} {found}" for name, found in there.items())
            raise ValueError(f"no {side} layer {name!r} of {shape}; layers: {layers}")
    return [taps[name] for name in shapes]


def _lambda(weights, rows, columns):
    """λ as a tensor of its own, checked; None is the identity."""
    if weights is None and rows != columns:
        raise ValueError(f"without λ, {rows} teacher layers cannot pair {columns} student layers")
    try:
        weights = torch.eye(rows) if weights is None else torch.as_tensor(weights)
    except (TypeError, ValueError):
        raise ValueError("λ must be numbers in rows of one length") from None
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
