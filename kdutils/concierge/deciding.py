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
    sizes = sorted({one.people for one in levels})
    size = next((size for size in sizes if size >= people), sizes[-1])
    return max(one for one in levels if one.people == size and one.clips <= clips)


def answer(embedding, names: list[str], gallery, level: Level) -> tuple[str, str | None, float]:
    """``person``, ``unsure`` or ``stranger``; the person where it is one; the largest cosine."""
    if not names:
        return "stranger", None, -1.0
    cosines = gallery @ embedding
    best = int(cosines.argmax())
    cosine = float(cosines[best])
    if cosine > level.person:
        return "person", names[best], cosine
    return ("unsure" if cosine > level.stranger else "stranger"), None, cosine


class Track:
    """The latest looks at one person: boxes that overlap from one clip to the next."""

    def __init__(self, most: int = MOST):
        self.most, self.looks = most, []  # of box, embedding, weight

    def add(self, box, embedding, weight: float) -> tuple[np.ndarray, int]:
        """The embedding (D,) of all looks, large and sharp ones counting more, and their number."""
        if self.looks and overlap(self.looks[-1][0], box) < 0.3:
            self.looks = []
        self.looks = [*self.looks, (box, embedding, weight)][-self.most :]
        return unit(sum(weight * seen for _, seen, weight in self.looks)), len(self.looks)


def entered(clip: np.ndarray) -> np.ndarray:
    """A clip (F, S, S, 3) uint8 as networks read it: (1, 3 F, S, S) float32 from -0.5 to 0.5."""
    values = np.moveaxis(clip, 3, 1).reshape(1, -1, *clip.shape[1:3])
    return np.ascontiguousarray(values.astype(np.float32) / 255 - np.float32(0.5))


def overlap(one, other) -> np.ndarray:
    """Intersection over union (...) of boxes (..., 4), each cx, cy, w, h."""
    (x, y, w, h), (cx, cy, wide, high) = (
        np.moveaxis(np.asarray(b, float), -1, 0) for b in (one, other)
    )
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
    rows, columns = (
        slice(max(int(at - long / 2), 0), max(int(at + long / 2), 2))
        for at, long in ((cy, h), (cx, w))
    )
    grey = clip[len(clip) // 2, rows, columns].astype(float).mean(2)
    light = float(grey.mean()) if grey.size else 0.0
    steps = [
        float(np.abs(np.diff(grey, axis=k)).mean()) if grey.shape[k] > 1 else 0 for k in (0, 1)
    ]
    found = {"small": min(w, h) / size, "dark": light}
    return found | {"blurred": sum(steps) / 2 / max(light, 1.0)}


def follows(look: Callable, clip: np.ndarray, box) -> float:
    """How far the box goes along when the clip (F, S, S, 3) is moved: about 1 with a head in it.

    Where there is nobody, a network still says where a head would be: about where most are.
    """
    size = clip.shape[1]
    step = size // 8 if box[0] < 0.5 else -(size // 8)  # towards the farther edge
    moved = np.roll(clip, step, axis=2)
    edge = slice(0, step) if step > 0 else slice(step, None)
    moved[:, :, edge] = clip[:, :, :1] if step > 0 else clip[:, :, -1:]
    return float((look(moved)["box"][0] - box[0]) * size / step)
