"""Who is before the camera: by which level, from how many looks, and what a look is worth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdutils.concierge import deciding, scenes
from kdutils.concierge.deciding import Level

LEVELS = [Level(n, c, n / 100 + c / 1000, n / 100 + 0.5) for n in (1, 10, 40) for c in (1, 5)]


@pytest.mark.parametrize(
    ("people", "clips", "expected"),
    [(1, 1, (1, 1)), (2, 1, (10, 1)), (10, 4, (10, 1)), (11, 5, (40, 5)), (99, 7, (40, 5))],
)
def test_the_level_is_that_of_as_many_people_or_more_and_of_no_more_clips(people, clips, expected):
    level = deciding.level_for(LEVELS, people, clips)
    assert (level.people, level.clips) == expected
    assert deciding.level_for(LEVELS[::-1], people, clips) == level


@pytest.mark.parametrize(
    ("embedding", "said"),
    [
        ([0.6, 0.8, 0], ("person", "b", 0.8)),
        ([0.8, 0.6, 0], ("person", "a", 0.8)),
        ([0.6, 0, 0.8], ("unsure", None, 0.6)),
        ([0, 0, 1.0], ("stranger", None, 0.0)),
    ],
)
def test_the_nearest_is_the_person_unsure_or_a_stranger(embedding, said):
    level = Level(2, 1, 0.5, 0.7)
    found = deciding.answer(np.array(embedding), ["a", "b"], np.eye(3)[:2], level)
    assert found == said


def test_where_nobody_is_enrolled_all_are_strangers():
    none = deciding.answer(np.ones(3), [], np.empty((0, 3)), Level(1, 1, -1, -1))
    assert none == ("stranger", None, -1.0)


def test_looks_count_by_their_weight_and_the_latest_alone():
    track = deciding.Track(most=2)
    box, (x, y, z) = np.array([0.5, 0.5, 0.4, 0.4]), np.eye(3)
    np.testing.assert_allclose(track.add(box, x, 3.0)[0], x)
    seen, count = track.add(box + 0.01, y, 4.0)
    np.testing.assert_allclose(seen, [0.6, 0.8, 0])
    assert count == 2
    seen, count = track.add(box, z, 3.0)  # the first is forgotten
    np.testing.assert_allclose(seen, [0, 0.8, 0.6])
    assert count == 2


def test_somebody_elsewhere_in_the_picture_is_somebody_else():
    track = deciding.Track()
    track.add(np.array([0.2, 0.5, 0.3, 0.4]), np.eye(3)[0], 1.0)
    seen, count = track.add(np.array([0.8, 0.5, 0.3, 0.4]), np.eye(3)[1], 1.0)
    np.testing.assert_allclose(seen, np.eye(3)[1])
    assert count == 1


def test_another_face_at_the_same_place_is_somebody_else():
    track, box = deciding.Track(alike=0.5), np.array([0.5, 0.5, 0.4, 0.4])
    for count in (1, 2, 3):
        assert track.add(box, np.array([0.8, 0.6, 0]), 1.0)[1] == count
    seen, count = track.add(box, np.array([0, 0, 1.0]), 1.0)
    np.testing.assert_allclose(seen, [0, 0, 1])
    assert count == 1


boxes = st.tuples(*[st.floats(0.2, 0.8)] * 2, *[st.floats(0.05, 0.4)] * 2)


@given(boxes, boxes)
def test_overlap_is_that_of_many_points(one, other):
    at = (np.arange(400) + 0.5) / 400

    def inside(box):
        cx, cy, w, h = box
        return (abs(at - cx) < w / 2)[:, None] & (abs(at - cy) < h / 2)

    a, b = inside(one), inside(other)
    expected = (a & b).sum() / (a | b).sum()
    assert deciding.overlap(one, other) == pytest.approx(expected, abs=0.12)
    assert deciding.overlap(one, other) == pytest.approx(deciding.overlap(other, one))
    assert deciding.overlap(one, one) == pytest.approx(1)


def test_a_look_is_worth_less_small_dark_or_blurred():
    clip, box = scenes.clip(3, 2, seed=1, index=0)
    found = deciding.quality(clip, box)
    assert found["small"] == pytest.approx(min(box[2:]), abs=1e-6)
    assert 20 < found["dark"] < 235
    darker = deciding.quality(clip // 4, box)
    assert darker["dark"] == pytest.approx(found["dark"] / 4, abs=1)
    assert darker["blurred"] == pytest.approx(found["blurred"], rel=0.15)  # light is not sharpness
    soft = clip.astype(float)
    for _ in range(4):
        soft = (soft + np.roll(soft, 1, 1) + np.roll(soft, 1, 2) + np.roll(soft, 1, (1, 2))) / 4
    assert deciding.quality(soft.astype(np.uint8), box)["blurred"] < 0.7 * found["blurred"]


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (1, 1, 0.01, 0.01), (2, 2, 1, 1), (0.5, 0.5, 3, 3)])
def test_any_box_has_a_worth(box):
    found = deciding.quality(np.zeros((4, 16, 16, 3), np.uint8), box)
    assert all(np.isfinite(value) for value in found.values())
    assert found["dark"] == 0


@pytest.mark.parametrize("cx", [0.3, 0.7])
def test_a_box_follows_what_it_is_of(cx):
    clip = np.zeros((4, 64, 64, 3), np.uint8)
    clip[:, 20:40, int(64 * cx) - 6 : int(64 * cx) + 6] = 200

    def finder(moved):
        return {"box": [float(np.argwhere(moved[2, 30, :, 0]).mean() + 0.5) / 64, 0.5, 0.2, 0.3]}

    def blind(moved):
        return {"box": [cx, 0.5, 0.2, 0.3]}

    kept = clip.copy()
    assert deciding.follows(finder, clip, finder(clip)["box"]) == pytest.approx(1)
    assert deciding.follows(blind, clip, blind(clip)["box"]) == 0
    np.testing.assert_array_equal(clip, kept)
