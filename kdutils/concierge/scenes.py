"""Talking scenes: short clips of one drawn head, made from seeds alone.

An identity fixes the geometry and the colours of a head; an emotion drives facial action units
(Ekman, Friesen & Hager, Facial Action Coding System, 2002) from neutral to apex; pose, light,
clutter, speech, blinking and occlusion are the clip's own. Pixels are computed by + - * / and
square roots in float32, which IEEE 754 fixes to the bit, from Philox's raw numbers: the same seeds
give the same bytes on any machine.
"""

from typing import NamedTuple

import numpy as np

EMOTIONS = ("sadness", "disgust", "fear", "happiness", "anger", "surprise", "neutral")
UNITS = {  # FACS number: how strongly each emotion, in the order above, moves it
    "inner_brow": (1, (1.0, 0.0, 0.8, 0.0, 0.0, 1.0, 0.0)),
    "outer_brow": (2, (0.0, 0.0, 0.7, 0.0, 0.0, 1.0, 0.0)),
    "brow_lower": (4, (0.6, 0.5, 0.5, 0.0, 1.0, 0.0, 0.0)),
    "lid_up": (5, (0.0, 0.0, 0.9, 0.0, 0.4, 0.9, 0.0)),
    "cheek": (6, (0.0, 0.3, 0.0, 1.0, 0.0, 0.0, 0.0)),
    "lid_tight": (7, (0.1, 0.5, 0.2, 0.2, 0.8, 0.0, 0.0)),
    "nose_wrinkle": (9, (0.0, 1.0, 0.0, 0.0, 0.2, 0.0, 0.0)),
    "corner_up": (12, (0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)),
    "corner_down": (15, (1.0, 0.6, 0.2, 0.0, 0.2, 0.0, 0.0)),
    "stretch": (20, (0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0)),
    "lip_tight": (23, (0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0)),
    "jaw_drop": (26, (0.0, 0.0, 0.5, 0.2, 0.0, 1.0, 0.0)),
}
NOBODY = 2**62  # an identity without a head
PEOPLE = 2**64 - 1  # the key of all people's draws, which no clip's seed may be
SKINS = ((0.96, 0.82, 0.72), (0.87, 0.67, 0.52), (0.68, 0.47, 0.34), (0.43, 0.28, 0.20))
HAIRS = ((0.10, 0.08, 0.07), (0.32, 0.19, 0.11), (0.72, 0.55, 0.28), (0.58, 0.58, 0.60))
IRISES = ((0.25, 0.15, 0.08), (0.20, 0.38, 0.60), (0.25, 0.45, 0.25), (0.40, 0.42, 0.45))


class Play(NamedTuple):
    """How hard clips are to read: faint emotions, moving and covered heads.

    ``weakest`` (0 to 1) is the smallest strength of an emotion, the largest being 1; ``drift`` how
    far a head moves during a clip at most, as a share of the picture; ``covered`` the share of
    clips in which something hides a part of the face.
    """

    weakest: float = 0.45
    drift: float = 0.06
    covered: float = 0.25


USUAL = Play()


class Scenes(NamedTuple):
    """Clips (N, F, H, W, 3) uint8, with what is to be found in them.

    ``boxes`` (N, 4) float32 holds the head in the middle frame as (cx, cy, w, h), shares of the
    picture; ``emotions`` (N,) counts in :data:`EMOTIONS`; ``identities`` (N,) numbers people.
    """

    clips: np.ndarray
    boxes: np.ndarray
    emotions: np.ndarray
    identities: np.ndarray


def draw(identities, n: int, *, frames=8, size=64, jobs=1, **options) -> Scenes:
    """``n`` clips of these people, people and emotions in turn, so that all occur equally often.

    Clip i depends on (seed, i, its person, its emotion) alone; a person is the same in every clip.
    ``options`` are those of :func:`clip`. Raises ValueError when there are no people and clips, or
    frames or size are too small to show a face.
    """
    import joblib

    if not len(identities) or n < 1 or frames < 2 or size < 16:
        given = f"identities, n, frames, size are {list(identities)}, {n}, {frames}, {size}"
        raise ValueError(f"{given}: one person, one clip, 2 frames, 16 pixels are the least")
    people = [int(identities[i % len(identities)]) for i in range(n)]
    feelings = [i // len(identities) % len(EMOTIONS) for i in range(n)]
    options |= {"frames": frames, "size": size}
    each = enumerate(zip(people, feelings, strict=True))
    calls = (joblib.delayed(clip)(*who, index=i, **options) for i, who in each)
    clips, boxes = zip(*joblib.Parallel(n_jobs=jobs, batch_size=64)(calls), strict=True)
    labels = (np.array(values, np.int64) for values in (feelings, people))
    return Scenes(np.stack(clips), np.stack(boxes), *labels)


def clip(identity: int, emotion: int, *, seed: int, index: int, frames=8, size=64, play=USUAL):
    """One clip (F, H, W, 3) uint8 and the box of its middle frame (cx, cy, w, h), float32.

    Of the identity :data:`NOBODY` it shows the room; the box is where a head would have been.
    """
    person, take = _Draws(PEOPLE, identity), _Draws(seed, index)
    canvas = _Canvas(take, person(0.70, 0.92), frames, size, play)
    _background(canvas, take, shoulders=identity != NOBODY)
    if identity != NOBODY:
        _head(canvas, person, _units(emotion, take, frames, play.weakest), take)
    canvas.finish(take)
    return canvas.bytes(take), canvas.box(frames // 2)


class _Draws:
    """Uniform numbers keyed by two integers, one after another."""

    def __init__(self, *key: int):
        self.philox = np.random.Philox(key=np.array(key, np.uint64))

    def __call__(self, low: float = 0.0, high: float = 1.0) -> np.float32:
        share = int(self.philox.random_raw()) >> 40  # 24 bits: exact in float32
        return np.float32(low + (high - low) * (share / 2**24))

    def colour(self) -> list[np.float32]:
        return [self(0.05, 0.95) for _ in range(3)]

    def mixed(self, colours) -> np.ndarray:
        """A colour between two neighbours of a list."""
        at = self(0, len(colours) - 1.001)
        first, second = (np.array(colours[int(at) + k], np.float32) for k in (0, 1))
        return first + (second - first) * (at - np.float32(int(at)))


def _units(emotion: int, take: _Draws, frames: int, weakest=0.45) -> dict[str, np.ndarray]:
    """Each action unit over time, (F, 1, 1): from about 0 to the clip's own apex."""
    onset, rise, strength = take(0.0, 0.3), take(0.3, 0.6), take(weakest, 1.0)
    time = np.arange(frames, dtype=np.float32) / np.float32(frames - 1)
    ramp = np.clip((time - onset) / rise, 0, 1)
    ramp = (ramp * ramp * (3 - 2 * ramp))[:, None, None]
    moved = {}
    for name, (_, strengths) in UNITS.items():
        apex = np.float32(strengths[emotion]) * strength * take(0.6, 1.1) + take(-0.08, 0.12)
        moved[name] = ramp * apex
    pace, phase, loud = take(1.5, 3.5), take(), take(0.0, 0.35)
    speech = time * pace + phase
    speech = np.abs(speech - np.floor(speech) - np.float32(0.5)) * 2
    moved["speech"] = (speech * loud)[:, None, None]
    moved["blink"] = np.zeros((frames, 1, 1), np.float32)
    if take() < 0.3:
        moved["blink"][int(take(0, frames - 0.001))] = 1
    return moved


class _Canvas:
    """Frames (F, H, W) of three colours, and where the head is in each of them."""

    def __init__(self, take: _Draws, aspect: np.float32, frames: int, size: int, play: Play):
        self.size, self.aspect, self.covered = size, aspect, play.covered
        height = take(0.20, 0.33)  # of the head: half of it, as a share of the picture
        half = take(-0.14, 0.14)  # tangent of half the angle of rotation
        self.cos, self.sin = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
        wide, tall = aspect * self.cos, aspect * self.sin  # no **2: it is not x * x to the bit
        reach = np.sqrt(wide * wide + self.sin * self.sin) * height
        stand = np.sqrt(tall * tall + self.cos * self.cos) * height
        time = (np.arange(frames, dtype=np.float32) / np.float32(frames - 1))[:, None, None]
        drift = take(-play.drift, play.drift), take(-play.drift / 2, play.drift / 2)
        margin = np.float32(0.04)
        self.x = np.clip(take(0.25, 0.75) + drift[0] * time, reach + margin, 1 - reach - margin)
        self.y = np.clip(take(0.35, 0.60) + drift[1] * time, stand + margin, 1 - stand - margin)
        self.height, self.half_size = height, (reach, stand)
        at = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
        self.picture = at[None, None, :], at[None, :, None]
        dx, dy = self.picture[0] - self.x, self.picture[1] - self.y
        self.u = (self.cos * dx + self.sin * dy) / height  # to the right, in half heads
        self.v = (self.cos * dy - self.sin * dx) / height  # down
        self.colours = [np.empty((frames, size, size), np.float32) for _ in range(3)]

    def box(self, frame: int) -> np.ndarray:
        x, y = self.x[frame, 0, 0], self.y[frame, 0, 0]
        return np.array([x, y, 2 * self.half_size[0], 2 * self.half_size[1]], np.float32)

    def paint(self, cover: np.ndarray, colour) -> None:
        for channel, value in zip(self.colours, colour, strict=True):
            channel += cover * (value - channel)

    def ellipse(self, x, y, a, b, u=None, v=None, unit=None) -> np.ndarray:
        """How much of each pixel an ellipse covers; in half heads, or in shares of the picture."""
        u, v = self.u if u is None else u, self.v if v is None else v
        unit = self.height if unit is None else unit
        p, q = (u - x) / a, (v - y) / b
        distance = (np.sqrt(p * p + q * q) - 1) * np.minimum(a, b)
        return np.clip(np.float32(0.5) - distance * (self.size * unit), 0, 1)

    def band(self, x, y, length, thickness, slope, bend) -> np.ndarray:
        """A stroke around (x, y): its middle line is y + slope·t + bend·t², t = (u − x)/length."""
        t = (self.u - x) / length
        distance = np.abs(self.v - (y + slope * t + bend * t * t)) - thickness
        distance = np.maximum(distance, (np.abs(t) - 1) * length)
        return np.clip(np.float32(0.5) - distance * (self.size * self.height), 0, 1)

    def finish(self, take: _Draws) -> None:
        """Occlusion, light, blur."""
        if take() < self.covered:
            x, y = take(-0.9, 0.9) * self.aspect, take(-0.6, 1.0)
            cover = self.ellipse(x, y, take(0.15, 0.45), take(0.15, 0.45))
            self.paint(cover, take.colour())
        slant, gain, tint = (take(-0.5, 0.5), take(-0.4, 0.4)), take(0.6, 1.15), take(-0.08, 0.08)
        light = gain + slant[0] * (self.picture[0] - np.float32(0.5))
        light = light + slant[1] * (self.picture[1] - np.float32(0.5))
        blurred = take() < 0.4
        for channel, warm in zip(self.colours, (1 + tint, np.float32(1), 1 - tint), strict=True):
            channel *= light * warm
            if blurred:
                for moved in (channel, channel.transpose(0, 2, 1)):  # along y, then along x
                    middle = moved[:, 1:-1].copy()
                    middle += (moved[:, :-2] + moved[:, 2:] - 2 * middle) * np.float32(0.25)
                    moved[:, 1:-1] = middle

    def bytes(self, take: _Draws) -> np.ndarray:
        """The frames as uint8 with noise, (F, H, W, 3)."""
        out = np.stack(self.colours, -1)
        raw = take.philox.random_raw(-(-out.size // 4))  # a number makes four pairs of bytes
        noise = raw.astype("<u8").view(np.uint8)[: 2 * out.size].astype(np.int16)
        noise = (noise[::2] + noise[1::2] - 255).reshape(out.shape).astype(np.float32)
        out = out * 255 + noise * take(0.01, 0.06)
        return np.clip(out, 0, 255).astype(np.uint8)


def _background(canvas: _Canvas, take: _Draws, shoulders: bool) -> None:
    """Two colours that run into each other, clutter, and a person's shoulders."""
    x, y = canvas.picture
    share = np.clip(y * take(0.5, 1.2) + x * take(-0.4, 0.4), 0, 1)
    for channel, top, bottom in zip(canvas.colours, take.colour(), take.colour(), strict=True):
        channel[:] = top + (bottom - top) * share
    for _ in range(6):
        a, b = take(0.04, 0.25), take(0.04, 0.25)
        shape = canvas.ellipse(take(), take(), a, b, u=x, v=y, unit=np.float32(1))
        canvas.paint(shape, take.colour())
    if shoulders:
        tall = canvas.height
        cover = canvas.ellipse(canvas.x, canvas.y + tall * 2, tall * 1.7, tall, x, y, 1)
        canvas.paint(cover, take.colour())


def _head(canvas: _Canvas, person: _Draws, units: dict, take: _Draws) -> None:
    """A person's head, its action units moved."""
    skin, hair, iris = person.mixed(SKINS), person.mixed(HAIRS), person.mixed(IRISES)
    wide, lips = canvas.aspect, skin * np.array([0.85, 0.55, 0.55], np.float32)
    hairline, volume, long = person(-0.75, -0.45), person(1.02, 1.18), person() < 0.4
    if long:
        canvas.paint(canvas.ellipse(0, 0.15, wide * 1.2, person(0.95, 1.25)), hair)
    canvas.paint(canvas.ellipse(0, -0.12, wide * volume, volume * np.float32(0.95)), hair)
    chin = person(0.70, 0.95)
    canvas.paint(canvas.ellipse(0, 0.22, wide * chin, 0.78), skin)
    canvas.paint(canvas.ellipse(0, -0.02, wide, 0.86), skin)
    fringe = canvas.ellipse(0, -0.55 + hairline, wide * volume, 0.62)
    canvas.paint(fringe * canvas.ellipse(0, -0.12, wide * volume, volume), hair)
    if person() < 0.25:  # a beard
        beard = canvas.ellipse(0, 0.62, wide * chin * np.float32(0.85), 0.36)
        canvas.paint(beard * person(0.5, 0.9), hair)
    _eyes(canvas, person, units, hair, iris, skin)
    _nose(canvas, person, units, skin)
    _mouth(canvas, person, units, lips)


def _eyes(canvas, person, units, hair, iris, skin) -> None:
    apart, eye, high = person(0.36, 0.50) * canvas.aspect, person(0.13, 0.19), person(-0.22, -0.08)
    thick, arch, tilt = person(0.025, 0.06), person(0.02, 0.08), person(-0.03, 0.03)
    glasses, look = person() < 0.25, person(0.42, 0.6)
    open_ = 0.5 + 0.45 * units["lid_up"] - 0.3 * units["lid_tight"] - 0.22 * units["cheek"]
    open_ = np.clip(open_ * (1 - units["blink"]), np.float32(0.06), 1) * eye
    raised = 0.16 * (units["inner_brow"] + units["outer_brow"]) * np.float32(0.5)
    raised = raised - 0.12 * units["brow_lower"]
    # Positive where the inner end is the higher one.
    inner = 0.10 * (units["inner_brow"] - units["outer_brow"] - units["brow_lower"]) + tilt
    for side in (-1, 1):
        x = side * apart
        white = canvas.ellipse(x, high, eye, open_)
        canvas.paint(white, (0.95, 0.95, 0.93))
        canvas.paint(white * canvas.ellipse(x, high, eye * look, eye * look), iris)
        canvas.paint(white * canvas.ellipse(x, high, eye * 0.24, eye * 0.24), (0.02, 0.02, 0.02))
        bags = canvas.band(x, high + eye + 0.05 - 0.05 * units["cheek"], eye, 0.012, 0, -0.03)
        canvas.paint(bags * np.clip(units["cheek"] + units["lid_tight"], 0, 1), skin * 0.6)
        closer = -0.03 * side * units["brow_lower"]
        place = high - eye - 0.10 - raised
        brow = canvas.band(x + closer, place, eye * 1.35, thick, side * inner, arch)
        canvas.paint(brow, hair * 0.8)
        if glasses:
            rim = canvas.ellipse(x, high, eye * 1.5, eye * 1.4)
            rim = rim - canvas.ellipse(x, high, eye * 1.28, eye * 1.18)
            canvas.paint(np.clip(rim, 0, 1), (0.1, 0.1, 0.1))
    frown = canvas.band(0, high - 0.12, 0.02, 0.09, 0, 0)
    canvas.paint(frown * np.clip(units["brow_lower"], 0, 1) * np.float32(0.6), skin * 0.55)


def _nose(canvas, person, units, skin) -> None:
    width, length = person(0.07, 0.13), person(0.16, 0.28)
    tip = length - 0.05 * units["nose_wrinkle"]
    canvas.paint(canvas.ellipse(0, tip, width, 0.06), skin * 0.82)
    canvas.paint(canvas.ellipse(width * 0.3, tip / 2, width * 0.25, length * 0.6), skin * 0.9)
    for side in (-1, 1):
        fold = canvas.band(side * (width + 0.05), tip - 0.07, 0.06, 0.014, side * 0.05, 0)
        canvas.paint(fold * np.clip(units["nose_wrinkle"], 0, 1), skin * 0.5)


def _mouth(canvas, person, units, lips) -> None:
    width, low, thick = person(0.20, 0.32), person(0.46, 0.56), person(0.025, 0.055)
    width = width * (1 + 0.25 * units["stretch"] + 0.2 * units["corner_up"])
    width = width * (1 - 0.15 * units["lip_tight"] - 0.2 * units["jaw_drop"])
    gap = np.clip(0.20 * units["jaw_drop"] + 0.10 * units["speech"], 0, 1)
    gap = gap + 0.04 * np.clip(units["stretch"], 0, 1)
    # Corners are the ends of a parabola: up where it bends upwards.
    bend = 0.15 * (units["corner_down"] - units["corner_up"])
    centre = low - bend * np.float32(0.4) - 0.05 * units["nose_wrinkle"]
    thick = thick * np.clip(1 - 0.6 * units["lip_tight"], np.float32(0.2), 1)
    canvas.paint(canvas.band(0, centre + gap / 2, width, thick + gap / 2, 0, bend), lips)
    inside = canvas.ellipse(0, centre + gap / 2, width * 0.8, np.maximum(gap * 0.5, 0.004))
    canvas.paint(inside * (gap > 0.02), (0.15, 0.05, 0.05))
