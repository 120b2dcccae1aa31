"""Clips of faces with what is to be found in them: drawn once and kept, or a folder of one's own.

Knows files and batches of clips; knows no networks and no losses.
"""

import csv
import hashlib
import json
import math
import os
import tempfile
from functools import lru_cache
from itertools import pairwise
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np

from kdutils import data, files
from kdutils.concierge import scenes
from kdutils.concierge.scenes import EMOTIONS
from kdutils.data import DataError

COLUMNS = ("clip", "emotion", "cx", "cy", "w", "h", "registered")
PICTURES = (".png", ".jpg", ".jpeg")
LAYOUT = "clip, row, column, frame and colour"  # of clips in a kept file
LARGEST = 4096  # pixels of a side; what is larger is no frame of a clip, and may be a trap


class Part(NamedTuple):
    """Clips (N, S, S, 3 F) uint8 and their labels; what to train on, choose by, or report.

    A pixel has the three colours of every frame, a frame's after another's: networks read them so.
    ``boxes`` (N, 4) float32 is (cx, cy, w, h) in shares of the picture, of the middle frame;
    ``emotions`` (N,) counts in ``scenes.EMOTIONS``; ``people`` (N,) numbers people, registered ones
    first, and ``registered`` (N,) says whether the person is one of them.
    """

    clips: np.ndarray
    boxes: np.ndarray
    emotions: np.ndarray
    people: np.ndarray
    registered: np.ndarray

    def pick(self, chosen: np.ndarray) -> "Part":
        """The clips that an index or a mask (N,) names."""
        return Part(*(values[chosen] for values in self))


class Recordings(NamedTuple):
    """Three parts, and how many people training knows; registered people are the first of these.

    Registered people are in all parts, in other clips each. Training may know more people, who are
    not registered. Validation and test have strangers of their own, whom no other part knows.
    """

    train: Part
    validation: Part
    test: Part
    registered: int
    known: int

    def fingerprint(self) -> str:
        """SHA-256 over everything."""
        digest = hashlib.sha256(f"{self.registered} {self.known}".encode())
        for part in self[:3]:
            for values in part:
                digest.update(_bytes(values))
        return digest.hexdigest()


def side_by_side(clips: np.ndarray) -> np.ndarray:
    """Clips (N, F, S, S, 3) as a :class:`Part` has them, (N, S, S, 3 F)."""
    return np.moveaxis(clips, 1, 3).reshape(*clips.shape[:1], *clips.shape[2:4], -1)


def _bytes(values: np.ndarray) -> np.ndarray:
    """An array's bytes without a copy of them."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


@lru_cache(maxsize=1)
def drawn(
    *,
    registered: int,
    others: int,
    strangers: tuple[int, int],
    clips: tuple[int, int, int],
    seed: int,
    frames: int,
    size: int,
    play: tuple[float, float, float] = scenes.Play(),
    jobs: int = 1,
) -> Recordings:
    """Talking scenes, drawn once and kept as one file in the folder of datasets.

    People: ``registered`` ones, ``others`` who are in training too, and ``strangers`` of validation
    and of test. ``clips`` are counts for training, validation and test; half of validation and test
    are strangers'; ``play`` is :class:`scenes.Play`. A file that is damaged is set aside, and one
    drawn by other code is not read. Raises ValueError naming what is too small.
    """
    from filelock import FileLock

    wanted = {"registered": registered, "others": others, "strangers": strangers, "clips": clips}
    if registered < 1 or min(strangers) < 1 or min(clips) < 2:
        raise ValueError(f"{wanted}: one registered person, one stranger and 2 clips are needed")
    wanted |= {"seed": seed, "frames": frames, "size": size, "play": play}
    drawing = files.sha256(Path(scenes.__file__))
    name = hashlib.sha256(f"{json.dumps(wanted)} {drawing} {LAYOUT}".encode()).hexdigest()[:16]
    path = data.folder() / f"scenes-{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if path.exists():
            try:
                return _kept(path, registered, registered + others)
            except Exception as error:  # zip, header, size and key errors all mean the same here
                files.set_aside(path, str(error))
        found = _draw(wanted, jobs)
        arrays = {f"{k}_{i}": v for i, part in enumerate(found[:3]) for k, v in _named(part)}
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            partial = Path(scratch) / "whole.npz"
            np.savez(partial, fingerprint=np.array(found.fingerprint()), **arrays)
            os.replace(partial, path)
    return found


def _named(part: Part):
    return part._asdict().items()


def _kept(path: Path, registered: int, known: int) -> Recordings:
    with np.load(path, allow_pickle=False) as archive:
        parts = [Part(*(archive[f"{k}_{i}"] for k in Part._fields)) for i in range(3)]
        expected = str(archive["fingerprint"])
    found = Recordings(*parts, registered, known)
    if found.fingerprint() != expected:
        raise DataError("its fingerprint is not its content's")
    return found


def _draw(wanted: dict, jobs: int) -> Recordings:
    registered, others = wanted["registered"], wanted["others"]
    ends = np.cumsum([registered, others, *wanted["strangers"]]).tolist()
    users, known = list(range(registered)), list(range(ends[1]))
    unknown = [list(range(a, b)) for a, b in pairwise(ends[1:])]
    options = {"frames": wanted["frames"], "size": wanted["size"], "jobs": jobs}
    options["play"] = scenes.Play(*wanted["play"])
    seeds = iter(range(5 * wanted["seed"], 5 * wanted["seed"] + 5))

    def part(*groups):
        each = [scenes.draw(who, n, seed=next(seeds), **options) for who, n in groups]
        each = [found._replace(clips=side_by_side(found.clips)) for found in each]
        joined = [np.concatenate(values) for values in zip(*each, strict=True)]
        return Part(*joined, joined[3] < registered)

    train, *counts = wanted["clips"]
    halves = [
        [(users, n - n // 2), (them, n // 2)] for n, them in zip(counts, unknown, strict=True)
    ]
    return Recordings(part((known, train)), part(*halves[0]), part(*halves[1]), registered, ends[1])


class Batch(NamedTuple):
    """Augmented clips (B, 3 F, S, S), a frame's three colours after another's, and their labels.

    Values lie between -0.5 and 0.5. ``boxes`` are those of the augmented clips.
    """

    images: "torch.Tensor"  # noqa: F821
    emotions: "torch.Tensor"  # noqa: F821
    people: "torch.Tensor"  # noqa: F821
    boxes: "torch.Tensor"  # noqa: F821
    index: "torch.Tensor"  # noqa: F821
    epoch: int


class Clips(data.Batches):
    """Batches of clips, keyed as :class:`data.Batches` are; all frames of a clip move together.

    A box moves with its picture. Gaps are black.
    """

    def __init__(
        self, part: Part, *, batch_size: int, seed=0, pad=0, flip=False, shuffle=False, device="cpu"
    ):
        import torch

        self.batch_size, self.seed, self.pad = batch_size, seed, pad
        self.flip, self.shuffle = flip, shuffle
        self.device = torch.device(device)
        self.part = part
        digest = hashlib.sha256()
        for values in part:
            digest.update(_bytes(values))
        self._content = digest.hexdigest()
        self.clips = torch.as_tensor(part.clips, device=self.device)
        self.boxes = torch.as_tensor(part.boxes, device=self.device)
        self.labels = torch.as_tensor(part.emotions, device=self.device)
        self.people = torch.as_tensor(part.people, device=self.device)

    def identity(self) -> str:
        options = (self.batch_size, self.seed, self.pad, self.flip, self.shuffle)
        return f"clips {self._content} {options}"

    def __call__(self, epoch: int):
        import torch

        order = torch.as_tensor(self.order(epoch), device=self.device)
        views = torch.as_tensor(self.views(epoch), device=self.device)[:, order]
        for start in range(0, len(order), self.batch_size):
            index = order[start : start + self.batch_size]
            moved = views[:, start : start + self.batch_size]
            images = self._windows(index, *moved).float().div_(255).sub_(0.5).permute(0, 3, 1, 2)
            labels = self.labels[index], self.people[index]
            yield Batch(images, *labels, self._boxes(self.boxes[index], *moved), index, epoch)

    def _windows(self, index, flipped, down, right):
        """Clips (B, S, S, 3 F), flipped and moved: every pixel is fetched from where it was."""
        import torch

        side = self.clips.shape[1]
        across = torch.arange(side, device=self.device)
        rows, columns = across + down[:, None] - self.pad, across + right[:, None] - self.pad
        columns = torch.where(flipped[:, None].bool(), side - 1 - columns, columns)
        rows, columns = rows[:, :, None], columns[:, None]
        inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
        rows, columns = rows.clamp(0, side - 1), columns.clamp(0, side - 1)
        pixels = (index[:, None, None] * side + rows) * side + columns
        found = self.clips.flatten(0, 2).index_select(0, pixels.flatten())
        return found.view(*pixels.shape, -1).mul_(inside[..., None])

    def _boxes(self, boxes, flipped, down, right):
        import torch

        side = self.clips.shape[1]
        cx = torch.where(flipped.bool(), 1 - boxes[:, 0], boxes[:, 0])
        cx, cy = cx + (self.pad - right) / side, boxes[:, 1] + (self.pad - down) / side
        return torch.stack([cx, cy, boxes[:, 2], boxes[:, 3]], 1)


def read_folder(path: Path, *, frames: int, size: int) -> Recordings:
    """A folder of one's own recordings: ``labels.csv`` and ``clips/<identity>/<clip>``.

    A clip is a folder of pictures (``frame_*.png`` or ``.jpg``, in the order of their names) or a
    video file; ``frames`` of it, evenly spaced from first to last, are squashed to ``size`` ×
    ``size``. A row of the table has the clip (``<identity>/<clip>``), its emotion, the box of the
    middle frame taken (cx, cy, w, h, shares of the picture) and ``registered``, 0 or 1.
    Clips of registered people are split 70, 15 and 15 %, at least one each; people who are not
    registered are strangers, half of them in validation and half in test.
    Raises :class:`DataError` naming row and file; nothing is kept of a folder with a fault.
    """
    path = Path(path)
    rows = _table(path)
    by_person = {}
    for row in rows:
        by_person.setdefault(row["identity"], []).append(row)
    _check_people(path, by_person)
    clips = side_by_side(np.stack([_frames(row, frames, size) for row in rows]))
    users = sorted(name for name, found in by_person.items() if found[0]["registered"])
    strangers = sorted(set(by_person) - set(users))
    number = {name: i for i, name in enumerate(users + strangers)}
    people = np.array([number[row["identity"]] for row in rows], np.int64)
    whole = Part(
        clips,
        np.array([row["box"] for row in rows], np.float32),
        np.array([EMOTIONS.index(row["emotion"]) for row in rows], np.int64),
        people,
        people < len(users),
    )
    parts = np.full(len(rows), 0)
    for i in range(len(users)):
        own = np.flatnonzero(people == i)
        # A table may be in the order of emotions.
        own = own[np.argsort(data._random(0, i, 0, len(own)))]
        held = max(1, round(0.15 * len(own)))
        parts[own[-held:]], parts[own[-2 * held : -held]] = 2, 1
    for k, name in enumerate(strangers):
        parts[people == number[name]] = 1 + k % 2
    found = (whole.pick(parts == k) for k in range(3))
    return Recordings(*found, len(users), len(users))


def _table(path: Path) -> list[dict]:
    """The rows of ``labels.csv``, checked; ``where`` in each says file and line."""
    table = path / "labels.csv"
    try:
        text = table.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{table} does not exist; it must have {', '.join(COLUMNS)}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{table} was not read: it is not UTF-8 ({error})") from None
    reader = csv.DictReader(text.splitlines())
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
    if missing:
        raise DataError(f"{table} has no column {missing[0]!r}; columns: {', '.join(COLUMNS)}")
    rows, seen = [], set()
    for row in reader:
        where = f"{table}, line {reader.line_num}, clip {row['clip']!r}"
        rows.append(_row(path, row, where))
        if rows[-1]["file"] in seen:
            raise DataError(f"{where}: the clip is in an earlier line too")
        seen.add(rows[-1]["file"])
    if not rows:
        raise DataError(f"{table} has no rows")
    return rows


def _row(path: Path, row: dict, where: str) -> dict:
    if None in row or None in row.values():
        raise DataError(f"{where}: the line has not as many fields as the first line")
    clip = PureWindowsPath(row["clip"])  # knows both kinds of slashes
    root = (path / "clips").resolve()
    file = root.joinpath(*clip.parts).resolve()
    if clip.drive or clip.root or ".." in clip.parts or not file.is_relative_to(root):
        raise DataError(f"{where}: it climbs out of {path / 'clips'}")
    if len(clip.parts) != 2:
        raise DataError(f"{where}: a clip is written <identity>/<clip>")
    if not file.exists():
        raise DataError(f"{where}: {file} does not exist")
    if row["emotion"] not in EMOTIONS:
        known = ", ".join(EMOTIONS)
        raise DataError(f"{where}: unknown emotion {row['emotion']!r}; emotions: {known}")
    if row["registered"] not in ("0", "1"):
        raise DataError(f"{where}: registered is {row['registered']!r}; it must be 0 or 1")
    try:
        box = [float(row[name]) for name in ("cx", "cy", "w", "h")]
    except ValueError as error:
        raise DataError(f"{where}: the box is no four numbers ({error})") from None
    cx, cy, w, h = box
    if not all(map(math.isfinite, box)) or w <= 0 or h <= 0:
        raise DataError(f"{where}: the box {box} has no size")
    edges = (cx - w / 2, 1 - cx - w / 2, cy - h / 2, 1 - cy - h / 2)
    if min(edges) < -1e-6:
        raise DataError(f"{where}: the box {box} lies outside the picture; it is in its shares")
    rest = {"identity": clip.parts[0], "file": file, "box": box, "where": where}
    return rest | {"emotion": row["emotion"], "registered": row["registered"] == "1"}


def _check_people(path: Path, by_person: dict) -> None:
    for name, rows in by_person.items():
        if len({row["registered"] for row in rows}) > 1:
            raise DataError(f"{rows[-1]['where']}: {name!r} is registered in some lines only")
        if rows[0]["registered"] and len(rows) < 3:
            raise DataError(
                f"{rows[0]['where']}: {name!r} is registered and has {len(rows)} of the 3 clips "
                "needed, one each to train on, to choose by and to report"
            )
    kinds = [rows[0]["registered"] for rows in by_person.values()]
    if sum(kinds) < 2 or len(kinds) - sum(kinds) < 2:
        raise DataError(
            f"{path / 'labels.csv'} has {sum(kinds)} registered people and "
            f"{len(kinds) - sum(kinds)} others; 2 of each are needed"
        )


def _frames(row: dict, frames: int, size: int) -> np.ndarray:
    """Frames (F, S, S, 3) uint8 of a clip, evenly spaced."""
    from PIL import Image

    file = row["file"]
    if file.is_dir():
        every = [p for p in sorted(file.glob("frame_*")) if p.suffix.lower() in PICTURES]
        chosen = every
    else:
        chosen = every = list(_video(file, row["where"]))
    if len(every) < frames:
        raise DataError(f"{row['where']}: it has {len(every)} frames, and {frames} are asked for")
    chosen = [every[i] for i in np.linspace(0, len(every) - 1, frames).round().astype(int)]
    out = np.empty((frames, size, size, 3), np.uint8)
    for i, one in enumerate(chosen):
        try:
            picture = Image.open(one) if isinstance(one, Path) else one
            if max(picture.size) > LARGEST:
                raise ValueError(f"{picture.size} pixels are too many")
            out[i] = picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        except Exception as error:  # a broken file can make Pillow raise nearly anything
            name = one if isinstance(one, Path) else file
            raise DataError(f"{row['where']}: {name} cannot be read ({error})") from None
    return out


def _video(file: Path, where: str):
    """The frames of a video file as pictures."""
    try:
        import av
    except ImportError:
        raise DataError(f"{where}: video needs the project's extra 'edge' (PyAV)") from None
    try:
        with av.open(str(file)) as container:
            for frame in container.decode(video=0):
                yield frame.to_image()
    except (av.FFmpegError, IndexError) as error:
        raise DataError(f"{where}: {file} cannot be read ({error})") from None
