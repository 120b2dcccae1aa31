"""Deciding: who is before the camera, from one look or several, and what a look is worth.

NumPy alone. Thresholds and limits come from ``model.json``, where the study writes what it found
on people whom training never saw.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from kdutils.concierge.people import unit

MOST = 5  # looks that decide together


class Level(NamedTuple):
    """Cosines by which people are told apart, for so many enrolled and so many clips of a look.

    Up to ``stranger`` it is a stranger, above ``person`` the person, and between them unsure.
    """

    people: int
    clips: int
    stranger: float
    person: float


def level_for(levels: Sequence[Level], people: int, clips: int) -> Level:
    """The level for the next larger number of people, else the largest, and at most these clips."""
    size = min((k.people for k in levels if k.people >= people), default=max(levels).people)
    return max(one for one in levels if one.people == size and one.clips <= clips)


def answer(embedding, names: list[str], gallery, level: Level) -> tuple[str, str | None, float]:
    """``person``, ``unsure`` or ``stranger``; the person where it is one; the largest cosine."""
    cosine, name = max(zip((gallery @ embedding).tolist(), names, strict=True), default=(-1.0, ""))
    if cosine > level.person:
        return "person", name, cosine
    return ("unsure" if cosine > level.stranger else "stranger"), None, cosine


class Track:
    """The latest looks at one person: boxes overlap from one clip to the next, faces are alike."""

    def __init__(self, most: int = MOST, alike: float = -1.0):
        self.most, self.alike, self.looks = most, alike, []  # of an embedding and its weight
        self.box = self.together = np.zeros(4)

    def add(self, box, embedding, weight: float) -> tuple[np.ndarray, int]:
        """The embedding (D,) of all looks, large and sharp ones counting more, and their number."""
        if overlap(self.box, box) < 0.3 or self.together @ embedding < self.alike:
            self.looks = []  # somebody else
        self.looks = [*self.looks, (embedding, weight)][-self.most :]
        self.box, self.together = box, unit(sum(weight * seen for seen, weight in self.looks))
        return self.together, len(self.looks)


def entered(clip: np.ndarray) -> np.ndarray:
    """A clip (F, S, S, 3) uint8 as networks read it: (1, 3 F, S, S) float32 from -0.5 to 0.5."""
    values = np.moveaxis(clip, 3, 1).reshape(1, -1, *clip.shape[1:3])
    return np.ascontiguousarray(values.astype(np.float32) / 255 - np.float32(0.5))


def overlap(one, other) -> np.ndarray:
    """Intersection over union (...) of boxes (..., 4), each cx, cy, w, h."""
    x, y, w, h = np.moveaxis(np.asarray(one, float), -1, 0)
    cx, cy, wide, high = np.moveaxis(np.asarray(other, float), -1, 0)
    across = np.minimum(x + w / 2, cx + wide / 2) - np.maximum(x - w / 2, cx - wide / 2)
    down = np.minimum(y + h / 2, cy + high / 2) - np.maximum(y - h / 2, cy - high / 2)
    both = across.clip(0) * down.clip(0)
    return both / np.maximum(w * h + wide * high - both, 1e-12)


def quality(clip: np.ndarray, box) -> dict[str, float]:
    """Of the head in a clip's (F, S, S, 3) middle frame: its size (a share of the picture's side),
    its light (mean, 0 to 255) and its sharpness (mean difference of neighbours, in light's units
    over the light).
    """
    size = clip.shape[1]
    cx, cy, w, h = (np.asarray(box, float) * size).tolist()
    left, top = max(int(cx - w / 2), 0), max(int(cy - h / 2), 0)
    head = clip[len(clip) // 2, top : int(cy + h / 2) + 1, left : int(cx + w / 2) + 1]
    grey = head.astype(float).mean(2)
    pixels = max(grey.size, 1)
    light, steps = grey.sum() / pixels, [np.abs(np.diff(grey, axis=k)).sum() for k in (0, 1)]
    sharp = sum(steps) / 2 / pixels / max(light, 1.0)
    return {"small": min(w, h) / size, "dark": float(light), "blurred": float(sharp)}


def follows(look: Callable, clip: np.ndarray, box) -> float:
    """How far the box goes along when the clip (F, S, S, 3) is moved: about 1 with a head in it.

    Where there is nobody, a network still says where a head would be: about where most are.
    """
    size = clip.shape[1]
    step = size // 8 if box[0] < 0.5 else -(size // 8)  # towards the farther edge
    moved = clip[:, :, (np.arange(size) - step).clip(0, size - 1)]
    return float((look(moved)["box"][0] - box[0]) * size / step)
