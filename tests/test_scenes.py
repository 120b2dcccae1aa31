"""Drawn scenes: the same bytes everywhere, faces that move as their emotion says."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdutils.concierge import scenes
from kdutils.concierge.scenes import EMOTIONS, UNITS


def test_the_same_seeds_give_these_bytes_on_every_machine():
    found = scenes.draw([0, 5, 11], 21, seed=3, frames=4, size=32)
    digest = hashlib.sha256(found.clips.tobytes() + found.boxes.tobytes()).hexdigest()
    assert digest.startswith("48c1b77a90bcbb77")


def test_a_clip_depends_on_its_own_number_alone_and_not_on_who_draws_it():
    some = scenes.draw([4, 9], 20, seed=1, frames=3, size=24)
    fewer = scenes.draw([4, 9], 5, seed=1, frames=3, size=24, jobs=2)
    assert np.array_equal(some.clips[:5], fewer.clips)
    assert np.array_equal(some.boxes[:5], fewer.boxes)
    alone, _ = scenes.clip(9, int(some.emotions[17]), seed=1, index=17, frames=3, size=24)
    assert np.array_equal(some.clips[17], alone)


def test_people_and_emotions_occur_equally_often_and_together():
    found = scenes.draw([2, 3, 8], 42, seed=0, frames=2, size=16)
    pairs = set(zip(found.identities.tolist(), found.emotions.tolist(), strict=True))
    assert len(pairs) == 21
    assert np.bincount(found.emotions).tolist() == [6] * 7
    assert {k: int((found.identities == k).sum()) for k in (2, 3, 8)} == {2: 14, 3: 14, 8: 14}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 6), st.integers(0, 999))
def test_the_box_lies_in_the_picture_and_has_the_size_of_a_head(seed, index, emotion, identity):
    pictures, (x, y, w, h) = scenes.clip(
        identity, emotion, seed=seed, index=index, frames=3, size=16
    )
    assert pictures.shape == (3, 16, 16, 3)
    assert pictures.dtype == np.uint8
    assert 0 <= x - w / 2 < x + w / 2 <= 1
    assert 0 <= y - h / 2 < y + h / 2 <= 1
    assert 0.2 < w < 0.75
    assert 0.35 < h < 0.75


def test_the_box_is_where_the_head_was_drawn(monkeypatch):
    """Without clutter, light and noise, skin and hair fill the box and little lies outside it."""
    monkeypatch.setattr(
        scenes, "_background", lambda canvas, take, shoulders: [c.fill(0) for c in canvas.colours]
    )
    monkeypatch.setattr(scenes._Canvas, "finish", lambda canvas, take: None)
    for k in range(12):
        pictures, (x, y, w, h) = scenes.clip(k, 6, seed=2, index=k, frames=3, size=64)
        drawn = pictures[1].max(-1) > 25
        rows = np.arange(64)[:, None] + 0.5, np.arange(64)[None, :] + 0.5
        inside = (abs(rows[1] / 64 - x) <= w / 2) & (abs(rows[0] / 64 - y) <= h / 2)
        assert (drawn & inside).sum() / inside.sum() > 0.6
        assert (drawn & ~inside).sum() / drawn.sum() < 0.35  # hair


def moved(emotion, draws=200):
    """Mean of each action unit at the end of many clips."""
    ends = [scenes._units(emotion, scenes._Draws(1, k), 8) for k in range(draws)]
    return {name: float(np.mean([units[name][-1, 0, 0] for units in ends])) for name in UNITS}


@pytest.mark.parametrize("emotion", range(7))
def test_every_emotion_moves_its_action_units_and_no_others(emotion):
    ends = moved(emotion)
    for name, (_, strengths) in UNITS.items():
        assert ends[name] == pytest.approx(0.62 * strengths[emotion] + 0.02, abs=0.08), name


def test_a_face_is_neutral_at_first_and_stays_so_only_when_neutral():
    for emotion, name in enumerate(EMOTIONS):
        units = scenes._units(emotion, scenes._Draws(1, 2), 8)
        assert max(abs(float(units[key][0, 0, 0])) for key in UNITS) == 0
        apex = max(float(units[key][-1, 0, 0]) for key in UNITS)
        assert (apex < 0.15) == (name == "neutral")


def test_no_two_emotions_are_told_by_one_unit_alone_where_the_paper_mixes_them_up():
    shared = {name: set(np.flatnonzero(strengths)) for name, (_, strengths) in UNITS.items()}
    disgust, anger, fear, surprise = (
        EMOTIONS.index(name) for name in ("disgust", "anger", "fear", "surprise")
    )
    assert sum({disgust, anger} <= found for found in shared.values()) >= 3
    assert sum({fear, surprise} <= found for found in shared.values()) >= 3


def test_a_person_is_the_same_in_every_clip_and_people_differ(monkeypatch):
    """Colours of a person's skin, hair and eyes do not depend on the clip, nor on its number."""
    mixed, seen = scenes._Draws.mixed, []

    def noted(draws, colours):
        seen.append(mixed(draws, colours).tolist())
        return np.array(seen[-1], np.float32)

    monkeypatch.setattr(scenes._Draws, "mixed", noted)

    def looks(identity, seed, index):
        seen.clear()
        scenes.clip(identity, 0, seed=seed, index=index, frames=2, size=16)
        return list(seen)

    first = looks(3, 7, 0)
    assert first == looks(3, 7, 3) == looks(3, 8, 1)
    assert first != looks(4, 7, 0)


@pytest.mark.parametrize(
    ("identities", "n", "frames", "size"),
    [([], 3, 8, 64), ([1], 0, 8, 64), ([1], 3, 1, 64), ([1], 3, 8, 15)],
)
def test_too_little_to_draw_is_refused_in_one_sentence(identities, n, frames, size):
    with pytest.raises(ValueError, match="one person, one clip, 2 frames, 16 pixels are the least"):
        scenes.draw(identities, n, seed=0, frames=frames, size=size)


def test_play_decides_how_hard_clips_are():
    hard = scenes.clip(1, 4, seed=0, index=0, frames=3, size=32)
    assert np.array_equal(hard[0], scenes.clip(1, 4, seed=0, index=0, frames=3, size=32)[0])
    still = scenes.Play(weakest=1.0, drift=0.0, covered=0.0)
    canvas = scenes._Canvas(scenes._Draws(0, 1), np.float32(0.8), 4, 32, still)
    assert np.ptp(canvas.x) == np.ptp(canvas.y) == 0
    ends = [
        float(scenes._units(6, scenes._Draws(1, k), 8, w)["jaw_drop"][-1, 0, 0])
        for k in range(5)
        for w in (0.45, 1.0)
    ]
    assert ends[::2] == ends[1::2]  # neutral has no strength
    apex = [
        float(scenes._units(5, scenes._Draws(1, k), 8, 1.0)["jaw_drop"][-1, 0, 0])
        for k in range(40)
    ]
    assert min(apex) >= 0.5


def test_a_room_without_anybody_has_no_head_and_no_shoulders(monkeypatch):
    drawn, head = [], scenes._head
    monkeypatch.setattr(scenes, "_head", lambda *a: drawn.append("head") or head(*a))
    options = {"seed": 4, "index": 2, "frames": 3, "size": 48}
    room, box = scenes.clip(scenes.NOBODY, 3, **options)
    assert not drawn
    assert room.shape == (3, 48, 48, 3)
    assert (box > 0).all()
    assert room.std() > 5  # it is a room
    scenes.clip(5, 3, **options)
    assert drawn == ["head"]
