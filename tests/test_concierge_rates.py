"""How often people are recognised and strangers let in: on people whose likeness is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kdutils.concierge import rates
from kdutils.concierge.deciding import Level
from kdutils.concierge.people import unit


def drawn(people=60, clips=9, noise=0.3, width=16, seed=0):
    """Unit embeddings (N, D), each a person's direction and noise, and whose they are."""
    draw = np.random.default_rng(seed)
    centres = unit(draw.normal(size=(people, width)))
    whose = np.repeat(np.arange(people), clips)
    return unit(centres[whose] + noise * draw.normal(size=(len(whose), width))), whose


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=50), st.floats(0, 1))
def test_a_threshold_lets_in_no_more_than_its_share(scores, share):
    threshold = rates.threshold_for(scores, share)
    assert np.mean(np.array(scores) > threshold) <= share + 1e-12
    assert threshold in scores


@pytest.mark.parametrize(("count", "share"), [(160, 0.05), (80, 0.05), (20, 0.05), (1000, 0.01)])
def test_few_enough_is_the_most_whose_interval_ends_below(count, share):
    allowed = round(rates.few_enough(count, share) * count)

    def top(k):
        return stats.binomtest(k, count).proportion_ci(0.95, method="exact").high

    assert top(allowed) <= share or allowed == 0
    assert top(allowed + 1) > share


def test_trials_ask_everybody_and_never_by_the_clips_that_enrolled_them():
    embeddings, people = drawn(people=10, clips=4, noise=0)
    found = rates.trials(embeddings, people, size=3, clips=1, rounds=7)
    assert len(found["own"]) == len(found["right"]) == 7 * 3 * (4 - rates.ENROLLED)
    assert len(found["strangers"]) == 7 * 7 * 4
    np.testing.assert_allclose(found["own"], 1)
    assert found["right"].all()
    assert (found["strangers"] < 0.99).all()
    again = rates.trials(embeddings, people, size=3, clips=1, rounds=7)
    np.testing.assert_array_equal(found["strangers"], again["strangers"])


def test_what_levels_promise_comes_true_of_other_people():
    levels = rates.levels(*drawn(seed=1), sizes=[1, 10, 30], share=0.2)
    assert [(one.people, one.clips) for one in levels] == [
        (n, c) for n in (1, 10, 30) for c in range(1, rates.MOST + 1)
    ]
    assert all(one.stranger <= one.person for one in levels)
    found = rates.measured(*drawn(seed=2), levels)
    for shares in found.values():
        assert shares["let_in"] <= 0.2
        assert shares["let_in"] < shares["let_in_at_most"] < 0.35
        assert 0 <= shares["recognised"] + shares["misnamed"] + shares["unsure"] <= 1
    assert found["10x5"]["recognised"] > found["10x1"]["recognised"]  # several looks are surer
    assert found["1x1"]["recognised"] > found["30x1"]["recognised"]  # of fewer, one is easily found


def test_the_band_of_unsure_looks_is_no_wider_than_a_twentieth():
    embeddings, people = drawn(noise=0.6)
    for level in rates.levels(embeddings, people, sizes=[1, 20], share=0.5):
        tried = rates.trials(embeddings, people, int(level.people), int(level.clips))
        unsure = (tried["own"] > level.stranger) & (tried["own"] <= level.person)
        assert unsure.mean() <= 0.05 + 5 / len(unsure)  # equal cosines


def test_being_unsure_halves_the_strangers_let_in_where_that_costs_little():
    embeddings, people = drawn(noise=0.1, seed=1)
    levels = rates.levels(embeddings, people, sizes=[1, 20], share=0.5)
    sure = rates.measured(embeddings, people, levels)
    loose = [one._replace(person=one.stranger) for one in levels]
    for level, shares in rates.measured(embeddings, people, loose).items():
        assert sure[level]["unsure"] < 0.05
        assert 0 < sure[level]["let_in"] <= shares["let_in"] / 2 + 0.01


def test_a_level_that_nobody_reaches_recognises_nobody():
    found = rates.measured(*drawn(), [Level(5, 1, 2.0, 2.0)])
    most = found["5x1"].pop("let_in_at_most")
    assert found == {"5x1": dict.fromkeys(("recognised", "misnamed", "unsure", "let_in"), 0)}
    assert most == pytest.approx(rates.upper(0, 60))


def test_of_people_with_few_clips_nothing_is_said_of_several_looks():
    levels = rates.levels(*drawn(clips=6), sizes=[1, 5], share=0.3)
    assert {one.clips for one in levels} == {1, 2, 3, 4}  # two of the six are enrolled
    assert rates.measured(*drawn(clips=2), levels) == {}


def test_a_persons_clips_are_alike_to_the_mean_of_the_others():
    embeddings, people = drawn(people=3, clips=4, noise=0.4)
    own = embeddings[people == 1]
    expected = [own[k] @ unit(np.delete(own, k, 0).sum(0)) for k in range(4)]
    np.testing.assert_allclose(rates.alike(embeddings, people)[4:8], expected)
