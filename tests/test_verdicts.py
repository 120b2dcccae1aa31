"""Verdicts, word by word, against cases computed by hand; what must hold of all of them."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from kdutils import verdicts
from kdutils.verdicts import INCONCLUSIVE, NO_EFFECT, REPLICATED, REVERSED, SMALLER, Rule, Verdict

values = st.lists(st.floats(-10, 10), min_size=2, max_size=8)
bounds = st.floats(-5, 5)


# ---------------------------------------------------------------------------------- intervals


@given(values, st.floats(0.5, 0.99))
def test_interval_is_students(x, confidence):
    found = verdicts.interval(x, confidence)
    assert found.n == len(x)
    assert found.mean == pytest.approx(np.mean(x), abs=1e-12)
    error = np.std(x, ddof=1) / np.sqrt(len(x))
    if error < 1e-9:
        assert found.low == pytest.approx(found.high, abs=1e-6)
        return
    low, high = stats.t.interval(confidence, len(x) - 1, loc=np.mean(x), scale=error)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)


def test_interval_of_fewer_than_two_is_nan():
    one, none = verdicts.interval([0.7]), verdicts.interval([])
    assert (one.mean, one.n, none.n) == (0.7, 1, 0)
    assert np.isnan([one.low, one.high, none.mean, none.low, none.high]).all()


@pytest.mark.parametrize("n", [2, 3, 7])
def test_equal_values_have_an_interval_without_width(n):
    """NumPy's mean of three times 0.1 is not 0.1, so that an error in the last bit was judged."""
    assert verdicts.interval([0.1] * n) == verdicts.Interval(0.1, 0.1, 0.1, n)
    for kind in ("above", "below"):
        assert word(kind, 0.1, [0.1] * n) == INCONCLUSIVE


# -------------------------------------------------------------------------------------- words


def word(kind, bound, x, **more):
    return verdicts.judge(Rule(kind, bound, **more), x).word


# Of 0.9, 1.0 and 1.1 the mean is 1, the standard error 0.1 / sqrt 3, and Student's t of two
# degrees of freedom 4.3027: the interval is 0.7516 to 1.2484.
NEAR_1 = [1.0, 1.1, 0.9]


@pytest.mark.parametrize(
    ("kind", "bound", "more", "expected"),
    [
        ("above", 0.75, {}, REPLICATED),
        ("above", 0.76, {}, INCONCLUSIVE),
        ("above", 1.24, {}, INCONCLUSIVE),
        ("above", 1.25, {}, REVERSED),
        ("above", 0.75, {"effect": 0.4}, REPLICATED),  # the paper's 1.15 is in the interval
        ("above", 0.75, {"effect": 0.5}, SMALLER),  # its 1.25 is above
        ("above", 0.75, {"effect": -0.1}, REPLICATED),  # ours is larger
        ("above", 1.0, {"margin": 0.25}, NO_EFFECT),  # 1.25 is excluded
        ("above", 1.0, {"margin": 0.24}, INCONCLUSIVE),  # 1.24 is not
        ("above", 1.25, {"margin": 0.1}, REVERSED),  # and not only no effect
        ("above", 0.75, {"margin": 1.0}, REPLICATED),  # beyond the bound is enough
        ("above", 1.0, {"margin": 0.25, "effect": 0.25}, NO_EFFECT),
        ("below", 1.25, {}, REPLICATED),
        ("below", 1.24, {}, INCONCLUSIVE),
        ("below", 0.75, {}, REVERSED),
        ("below", 1.25, {"effect": 0.4}, REPLICATED),
        ("below", 1.25, {"effect": 0.5}, SMALLER),
        ("below", 1.0, {"margin": 0.25}, NO_EFFECT),
        ("below", 1.0, {"margin": 0.24}, INCONCLUSIVE),
        ("at most", 1.25, {}, REPLICATED),
        ("at most", 1.24, {}, INCONCLUSIVE),  # not refuted is not replicated
        ("at most", 0.76, {}, INCONCLUSIVE),
        ("at most", 0.75, {}, REVERSED),
        ("at least", 0.75, {}, REPLICATED),
        ("at least", 0.76, {}, INCONCLUSIVE),
        ("at least", 1.25, {}, REVERSED),
        ("at least", 0.76, {"margin": 9.0, "effect": 9.0}, INCONCLUSIVE),  # knows two words only
        ("within", 0.75, {"upper": 1.25}, REPLICATED),
        ("within", 0.76, {"upper": 1.25}, INCONCLUSIVE),
        ("within", 0.75, {"upper": 1.24}, INCONCLUSIVE),
        ("within", 0.9, {"upper": 1.1}, INCONCLUSIVE),  # the interval is the wider one
        ("within", 1.25, {"upper": 2.0}, REVERSED),
        ("within", 0.0, {"upper": 0.75}, REVERSED),
        ("every above", 0.89, {}, REPLICATED),
        ("every above", 0.9, {}, INCONCLUSIVE),
        ("every above", 1.1, {}, REVERSED),  # at the bound is not above it
        ("every below", 1.11, {}, REPLICATED),
        ("every below", 1.1, {}, INCONCLUSIVE),
        ("every below", 0.9, {}, REVERSED),
    ],
)
def test_words_by_hand(kind, bound, more, expected):
    found = verdicts.judge(Rule(kind, bound, **more), NEAR_1)
    assert found.word == expected
    span = (0.9, 1.1) if kind.startswith("every") else (0.75159, 1.24841)
    assert (found.mean, found.low, found.high) == pytest.approx((1, *span), abs=1e-5)
    assert found.n == 3


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("at most", REPLICATED),
        ("at least", REPLICATED),
        ("above", INCONCLUSIVE),
        ("below", INCONCLUSIVE),
        ("every above", REVERSED),
        ("every below", REVERSED),
    ],
)
def test_what_equals_the_bound_is_not_worse_and_not_better(kind, expected):
    assert word(kind, 0, [0.0, 0.0, 0.0]) == expected
    assert word("within", 0, [0.0, 0.0, 0.0], upper=0.0) == REPLICATED


def test_a_ratio_is_judged_on_its_logarithm():
    found = verdicts.judge(Rule("above", 1, margin=1.0, effect=3.0, ratio=True), [1.0, 4.0])
    assert found.mean == pytest.approx(2)  # the geometric mean
    assert found.low * found.high == pytest.approx(4)  # as far below as above, as a ratio
    half = stats.t.ppf(0.975, 1) * math.log(4) / 2  # two values' standard error: half their gap
    assert found.high == pytest.approx(2 * math.exp(half))
    assert found.word == INCONCLUSIVE
    above = [2.0, 2.2, 2.1]
    assert word("above", 1, above, margin=1.0, effect=3.0, ratio=True) == SMALLER  # 4 is excluded
    assert word("below", 1, [1 / x for x in above], margin=0.5, ratio=True) == REPLICATED
    with pytest.raises(ValueError, match=r"a ratio of 0\.0 has no logarithm"):
        word("above", 1, [1.0, 0.0], ratio=True)


def test_whether_the_interval_leaves_out_the_papers_effect():
    for effect, excluded in ((0.4, False), (0.5, True), (-0.1, True), (None, None)):
        found = verdicts.judge(Rule("above", 0.75, effect=effect), NEAR_1)
        assert found.effect_excluded is excluded
    assert verdicts.judge(Rule("at most", 1.25, effect=0.1), NEAR_1).effect_excluded is False
    assert verdicts.judge(Rule("at most", 1.25, effect=0.6), NEAR_1).effect_excluded is True


def test_p_is_two_sided_students_against_the_bound():
    found = verdicts.judge(Rule("below", 0.75), NEAR_1)
    assert found.p == pytest.approx(stats.ttest_1samp(NEAR_1, 0.75).pvalue)
    assert verdicts.judge(Rule("above", 0), [1.0, 1.0]).p == 0
    assert verdicts.judge(Rule("above", 1), [1.0, 1.0]).p == 1
    for kind in ("at most", "at least", "every above"):
        assert verdicts.judge(Rule(kind, 0), NEAR_1).p is None


@pytest.mark.parametrize("x", [[], [5.0]])
@pytest.mark.parametrize("kind", verdicts.KINDS)
def test_fewer_than_two_seeds_have_no_word(x, kind):
    assert verdicts.judge(Rule(kind, 0, upper=1), x) == Verdict(None, n=len(x))


@pytest.mark.parametrize("kind", verdicts.KINDS)
def test_a_value_that_is_not_a_number_is_refused(kind):
    with pytest.raises(ValueError, match="nan"):
        word(kind, 0, [1.0, float("nan"), 1.1], upper=1.0)


# -------------------------------------------------------------------------------- of all cases

rules = st.builds(
    Rule,
    st.sampled_from(verdicts.KINDS),
    bounds,
    margin=st.floats(0.01, 5),
    effect=st.none() | st.floats(0.01, 5),
    upper=st.floats(5, 9),
)


@given(rules, values, st.integers(2, 4))
def test_more_seeds_of_the_same_values_never_turn_replicated_into_reversed(rule, x, times):
    few, many = verdicts.judge(rule, x).word, verdicts.judge(rule, x * times).word
    for word, opposite in ((REPLICATED, REVERSED), (REVERSED, REPLICATED)):
        if few in (word, *([SMALLER] if word == REPLICATED else [])):
            assert many != opposite
            assert many in (few, SMALLER)  # a narrower interval may leave the paper's effect out


@given(rules, values)
def test_swapping_the_sides_of_everything_keeps_the_word(rule, x):
    swapped = {"above": "below", "at most": "at least", "every above": "every below"}
    swapped |= {b: a for a, b in swapped.items()} | {"within": "within"}
    bounds = (-rule.upper, -rule.bound) if rule.kind == "within" else (-rule.bound, None)
    mirror = Rule(swapped[rule.kind], bounds[0], rule.margin, rule.effect, bounds[1])
    found, other = verdicts.judge(rule, x), verdicts.judge(mirror, [-value for value in x])
    assert found.word == other.word
    assert (found.low, found.high) == (-other.high, -other.low)


@given(st.sampled_from(["above", "every above"]), bounds, values)
def test_the_opposite_claim_has_the_opposite_word(kind, bound, x):
    assume(all(value != bound for value in x))
    opposite = {REPLICATED: REVERSED, REVERSED: REPLICATED, INCONCLUSIVE: INCONCLUSIVE}
    other = kind.replace("above", "below")
    assert word(other, bound, x) == opposite[word(kind, bound, x)]


@given(values, bounds)
def test_moving_all_values_across_the_bound_turns_the_word(x, bound):
    x = np.array(x) - np.mean(x)
    half = verdicts.interval(x).high
    assume(half > 1e-6)
    words = [
        word("above", bound, x + bound + shift * half)
        for shift in (-3, -1.01, -0.99, 0, 0.99, 1.01, 3)
    ]
    assert words == [REVERSED] * 2 + [INCONCLUSIVE] * 3 + [REPLICATED] * 2


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=8), st.integers(-20, 20))
def test_the_unit_of_the_values_does_not_matter(x, power):
    x = np.array(x) / 64
    scale = 2.0**power  # exact
    one = word("above", 0, x, margin=1.0, effect=2.0)
    assert word("above", 0, x * scale, margin=scale, effect=2 * scale) == one


# ------------------------------------------------------------------------------- several parts


def part(word, lead=0.0, p=None, n=3):
    return Verdict(word, mean=lead, lead=lead, p=p, n=n)


def test_a_claim_of_several_parts_is_its_weakest_which_is_named():
    parts = {"good": part(REPLICATED, 2, 0.001), "better": part(SMALLER, 9, 0.002)}
    assert verdicts.weakest(parts).part == "better"  # by its word, whatever its lead
    for weak in (INCONCLUSIVE, NO_EFFECT):
        found = verdicts.weakest(parts | {"bad": part(weak, -1, 0.3)})
        assert (found.word, found.part, found.lead, found.p) == (weak, "bad", -1, 0.3)
    equal = {"far": part(REPLICATED, 2, 0.01), "near": part(REPLICATED, 1, 0.001)}
    found = verdicts.weakest(equal)
    assert (found.part, found.p) == ("near", 0.01)  # the smaller lead, the larger p
    order = [
        verdicts.weakest({"a": part(a), "b": part(b)}).word
        for a, b in zip(verdicts.WORDS, verdicts.WORDS[1:], strict=False)
    ]
    assert order == [REVERSED, NO_EFFECT, INCONCLUSIVE, SMALLER]


def test_what_reverses_a_claim_of_several_parts_is_tested_by_itself():
    """Three parts: one clearly on the other side, one at the bound, whose p says nothing of it."""
    parts = {"at the bound": part(INCONCLUSIVE, 0, 0.98), "good": part(REPLICATED, 3, 0.002)}
    found = verdicts.weakest(parts | {"bad": part(REVERSED, -5, 0.001)})
    assert (found.word, found.part, found.p) == (REVERSED, "bad", pytest.approx(0.003))
    both = parts | {"bad": part(REVERSED, -5, 0.001), "worse": part(REVERSED, -6, 0.004)}
    assert verdicts.weakest(both, 3).p == pytest.approx(0.016)  # at most two of four hold
    assert verdicts.weakest({k: part(REVERSED, p=0.9) for k in "ab"}).p == 1


def test_any_k_of_several_is_the_kth_strongest():
    parts = {
        "a": part(REVERSED, -1, 0.001),
        "b": part(REPLICATED, 1, 0.02),
        "c": part(INCONCLUSIVE, 0.5, 0.2),
    }
    for need, (name, p) in {1: ("b", 0.003), 2: ("c", 0.06), 3: ("a", 0.003)}.items():
        found = verdicts.weakest(parts, need)
        assert (found.part, found.p) == (name, pytest.approx(p))
    assert verdicts.weakest({k: part(REPLICATED, p=0.9) for k in "ab"}, 1).p == 1


def test_parts_without_a_word_leave_the_claim_without():
    parts = {"a": part(REPLICATED, 1, 0.01), "b": part(None, n=2), "c": part(None, n=1)}
    for need in (None, 1, 3):
        found = verdicts.weakest(parts, need)
        assert (found.word, found.n, found.part) == (None, 1, "c")


def test_holm_by_hand():
    """Of Holm 1979: the smallest against level / n, the next against level / (n − 1), and so on."""
    ps = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}  # against 0.0125, 0.0167, 0.025, 0.05
    assert verdicts.holm(ps) == {"a": True, "b": False, "c": False, "d": True}
    # 0.04 is below 0.05, but 0.03 had already failed at 0.025.
    assert verdicts.holm({"a": 0.0125, "b": 0.016, "c": 0.02, "d": 0.04}) == dict.fromkeys(
        "abcd", True
    )
    assert verdicts.holm({"a": 0.06}) == {"a": False}
    assert verdicts.holm({}) == {}
    assert verdicts.holm({"a": 0.02, "b": 0.02}, level=0.04) == {"a": True, "b": True}


# -------------------------------------------------------------------------------- seeds needed


@given(values, st.floats(0.05, 4), st.booleans())
def test_seeds_needed_against_counting_up(x, margin, ratio):
    if ratio:
        x = [math.exp(value / 10) for value in x]
    rule = Rule("above", 1, margin=margin, ratio=ratio)
    scaled = np.log(x) if ratio else np.array(x)
    spread, width = np.std(scaled, ddof=1), math.log(1 + margin) if ratio else margin
    assume(spread < 3 * width and (spread == 0 or spread > 1e-9))
    expected = next(
        n
        for n in range(2, 10_000)
        if 2 * stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n) <= width * (1 + 1e-12)
    )
    assert verdicts.seeds_needed(rule, x) == expected


@given(values, st.sampled_from(["at most", "at least", "within"]), st.booleans())
def test_seeds_needed_take_the_nearest_bound_out_if_the_mean_stays(x, kind, ratio):
    if ratio:
        x = [math.exp(value / 10) for value in x]
    rule = Rule(kind, 0.9, upper=1.4 if kind == "within" else None, ratio=ratio)
    scaled = np.log(x) if ratio else np.array(x)
    ends = np.array([0.9, 1.4][: 2 if kind == "within" else 1])
    distance = np.abs(scaled.mean() - (np.log(ends) if ratio else ends)).min()
    spread = scaled.std(ddof=1)
    assume(distance > 1e-6 and spread < 3 * distance and (spread == 0 or spread > 1e-9))
    expected = next(
        n
        for n in range(2, 10_000)
        if stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n) <= distance * (1 + 1e-12)
    )
    assert verdicts.seeds_needed(rule, x) == expected


def test_seeds_needed_only_where_seeds_can_decide():
    assert verdicts.seeds_needed(Rule("above", 0), NEAR_1) is None  # no margin
    assert verdicts.seeds_needed(Rule("above", 0, margin=1.0), [1.0]) is None
    for kind in ("every above", "every below"):
        assert verdicts.seeds_needed(Rule(kind, 0, margin=1.0), NEAR_1) is None
    assert verdicts.seeds_needed(Rule("at most", 1), [0.5, 1.5]) is None  # at the bound
    assert verdicts.seeds_needed(Rule("at most", 1), [0.5, 1.0]) == 11
    assert verdicts.seeds_needed(Rule("above", 0, margin=0.001), NEAR_1) > 100_000


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown kind 'Below'; kinds: above, below, at most"):
        verdicts.Rule("Below", 0.0)
