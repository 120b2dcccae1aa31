"""Clips of faces with what is to be found in them: drawn once and kept, or a folder of one's own.

Knows files and batches of clips; knows no networks and no losses.
"""

import hashlib
import re
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import NamedTuple
from unicodedata import normalize

import numpy as np

from kdutils import data, files
from kdutils.concierge import scenes
from kdutils.concierge.scenes import EMOTIONS
from kdutils.data import DataError
from kdutils.pictures import as_viewed

BOX = ("cx", "cy", "w", "h")
COLUMNS = ("clip", "emotion", *BOX, "registered")
PICTURES = (".png", ".jpg", ".jpeg")
LAYOUT = "clip, row, column, frame and colour"  # of clips in a kept file


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

    def fingerprint(self) -> str:
        """SHA-256 over everything."""
        digest = hashlib.sha256()
        for values in self:
            digest.update(values.ravel())
        return digest.hexdigest()


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
        parts = [part.fingerprint() for part in self[:3]]
        return hashlib.sha256(f"{self.registered} {self.known} {parts}".encode()).hexdigest()


def side_by_side(clips: np.ndarray) -> np.ndarray:
    """Clips (N, F, S, S, 3) as a :class:`Part` has them, (N, S, S, 3 F)."""
    return np.moveaxis(clips, 1, 3).reshape(*clips.shape[:1], *clips.shape[2:4], -1)


@lru_cache(maxsize=1)
def drawn(
    *, registered: int, others: int, strangers: tuple, clips: tuple, seed: int, **options
) -> Recordings:
    """Talking scenes, drawn once and kept as one file in the folder of datasets.

    People: ``registered`` ones, ``others`` who are in training too, and ``strangers`` of validation
    and of test. ``clips`` are counts for training, validation and test; half of validation and test
    are strangers'; ``options`` are those of :func:`scenes.draw`. A file that is damaged is set
    aside, and one drawn by other code is not read.
    """
    from filelock import FileLock

    jobs, known = options.pop("jobs", 1), registered + others
    options["play"] = scenes.Play(*options.get("play", ()))
    wanted = (registered, known, strangers, clips, seed, options)
    drawing = files.sha256(Path(scenes.__file__))
    name = hashlib.sha256(f"{wanted} {drawing} {LAYOUT}".encode()).hexdigest()[:16]
    path = data.folder() / f"scenes-{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        files.sweep(path.parent)
        if path.exists():
            try:
                with np.load(path) as kept:
                    parts = [Part(*(kept[f"{k}_{i}"] for k in Part._fields)) for i in range(3)]
                return Recordings(*parts, registered, known)
            except Exception as error:  # zip, header, size and key errors all mean the same here
                files.set_aside(path, str(error))
        found = _draw(*wanted, jobs)
        named = [(i, *item) for i in range(3) for item in found[i]._asdict().items()]
        with files.replacing(path) as file:
            np.savez(file, **{f"{k}_{i}": values for i, k, values in named})
    return found


def _draw(registered, known, strangers, clips, seed, options, jobs) -> Recordings:
    seeds = iter(range(5 * seed, 5 * seed + 5))

    def part(*groups):
        each = [scenes.draw(who, n, seed=next(seeds), jobs=jobs, **options) for who, n in groups]
        pictures, *labels = (np.concatenate(values) for values in zip(*each, strict=True))
        return Part(side_by_side(pictures), *labels, labels[2] < registered)

    def held(n, first, count):
        return part((range(registered), n - n // 2), (range(first, first + count), n // 2))

    train = part((range(known), clips[0]))  # in this order, since each takes the next seeds
    validation = held(clips[1], known, strangers[0])
    test = held(clips[2], known + strangers[0], strangers[1])
    return Recordings(train, validation, test, registered, known)


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

    def __init__(self, part, *, batch_size, seed=0, pad=0, flip=False, shuffle=False, device="cpu"):
        import torch

        self.batch_size, self.seed, self.pad = batch_size, seed, pad
        self.flip, self.shuffle = flip, shuffle
        self.device = torch.device(device)
        self.part, self._content = part, part.fingerprint()
        tensors = [torch.as_tensor(values, device=self.device) for values in part[:4]]
        self.clips, self.boxes, self.labels, self.people = tensors

    def identity(self) -> str:
        options = (self.batch_size, self.seed, self.pad, self.flip, self.shuffle)
        return f"clips {self._content} {options}"

    def __call__(self, epoch: int):
        import torch

        order = torch.as_tensor(self.order(epoch), device=self.device)
        views = torch.as_tensor(self.views(epoch), device=self.device)[:, order]
        steps = order.split(self.batch_size), views.split(self.batch_size, 1)
        for index, moved in zip(*steps, strict=True):
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

    A clip is a folder of pictures (``frame_*.png`` or ``.jpg``, in the order of their numbers) or a
    video file; ``frames`` of it, evenly spaced from first to last, are squashed to ``size`` ×
    ``size``. A row of the table has the clip (``<identity>/<clip>``), its emotion, the box of the
    middle frame taken (cx, cy, w, h, shares of the picture) and ``registered``, 0 or 1.
    Clips of registered people are split 70, 15 and 15 %, at least one each; people who are not
    registered are strangers, half of them in validation and half in test.
    Raises :class:`DataError` naming row and file; nothing is kept of a folder with a fault.
    """
    import pandas as pd

    rows = _table(Path(path))
    users = rows.identity[rows.registered].nunique()
    ordered = rows.sort_values(["registered", "identity"], ascending=[False, True])
    people = pd.Index(ordered.identity.unique()).get_indexer(rows.identity)
    clips = [_frames(row.file, row.where, frames, size) for row in rows.itertuples()]
    boxes, emotions = rows[list(BOX)].astype(float), pd.Index(EMOTIONS).get_indexer(rows.emotion)
    labels = boxes.to_numpy(np.float32), emotions, people, people < users
    whole = Part(side_by_side(np.stack(clips)), *labels)
    parts = np.where(people < users, 0, 1 + (people - users) % 2)
    for i in range(users):
        own = np.flatnonzero(people == i)
        # A table may be in the order of emotions.
        own = own[np.argsort(data._random(0, i, 0, len(own)))]
        held = max(1, round(0.15 * len(own)))
        parts[own[-held:]], parts[own[-2 * held : -held]] = 2, 1
    return Recordings(*(whole.pick(parts == k) for k in range(3)), users, users)


def _table(path: Path) -> "pd.DataFrame":  # noqa: F821
    """The rows of ``labels.csv``, checked; ``where`` in each says file and line."""
    import pandas as pd

    table, places = path / "labels.csv", path / "clips"
    options = {"dtype": str, "encoding": "utf-8-sig", "skip_blank_lines": False}
    options |= {"na_values": "", "keep_default_na": False, "skipinitialspace": True}
    try:
        rows = pd.read_csv(table, **options).reset_index(drop=True)[list(COLUMNS)]
    except (OSError, ValueError, KeyError) as error:
        wanted = f"it must be UTF-8, separated by commas, and have the columns {', '.join(COLUMNS)}"
        raise DataError(f"{table} was not read ({str(error).strip()}); {wanted}") from None
    rows = rows.dropna(how="all").fillna("")
    lines = zip(rows.index + 2, rows["clip"], strict=True)
    rows["where"] = [f"{table}, line {number}, clip {clip!r}" for number, clip in lines]
    names = [PureWindowsPath(clip).parent.name for clip in rows["clip"]]
    rows["identity"] = [normalize("NFC", name) for name in names]
    rows["file"] = [_file(places, clip) for clip in rows["clip"]]
    rows["box"] = rows[list(BOX)].to_numpy().tolist()
    cx, cy, w, h = (pd.to_numeric(rows[name], errors="coerce") for name in BOX)
    edges = np.minimum.reduce([cx - w / 2, 1 - cx - w / 2, cy - h / 2, 1 - cy - h / 2])
    boxes = (w > 0) & (h > 0) & (edges >= -1e-6)
    of_one = rows.groupby("identity").registered
    rows["number of clips"] = of_one.transform("size")
    few = rows["number of clips"] < 3  # to train on, to choose by, to report
    faults = [
        (rows.file.isna(), "clip", f"it must be <identity>/<clip> and lie in {places}"),
        (rows.file.duplicated(), "clip", "it must have one line alone"),
        (~rows.emotion.isin(EMOTIONS), "emotion", f"it must be one of {', '.join(EMOTIONS)}"),
        (~boxes, "box", "it must have a size and lie in the picture (in shares)"),
        (~rows.registered.isin(["0", "1"]), "registered", "it must be 0 or 1"),
        (of_one.transform("nunique") > 1, "registered", "it must be so in all of a person's lines"),
        (few, "number of clips", "everybody needs 3"),
    ]
    for faulty, column, allowed in faults:
        if faulty.any():
            row = rows[faulty].to_dict("records")[0]
            raise DataError(f"{row['where']}: {column} is {row[column]!r}; {allowed}")
    rows["registered"] = rows.registered == "1"
    kinds = [rows.identity[rows.registered == kind].nunique() for kind in (True, False)]
    if kinds[0] < 2 or kinds[1] < 4:  # half of the others are of validation, half of test
        found = f"{kinds[0]} registered people and {kinds[1]} others"
        raise DataError(f"{table} has {found}; 2 and 4 are needed")
    return rows


def _file(places: Path, clip: str) -> Path | None:
    """Where the clip ``<identity>/<clip>`` lies; None where that is not in these places."""
    parts = PureWindowsPath(clip).parts  # knows both kinds of slashes
    for form in ("NFC", "NFD"):  # two spellings of one letter, and each system has its own
        file = places.joinpath(*(normalize(form, part) for part in parts)).resolve()
        if len(parts) == 2 and file.is_relative_to(places.resolve()) and file.exists():
            return file
    return None


def _frames(file: Path, where: str, frames: int, size: int) -> np.ndarray:
    """Frames (F, S, S, 3) uint8 of a clip, evenly spaced."""
    from PIL import Image

    read = file
    try:
        if file.is_dir():
            every = [p for p in file.glob("frame_*") if p.suffix.lower() in PICTURES]
            every, kind = sorted(every, key=_numbered), f"frames (frame_*{', '.join(PICTURES)})"
        else:  # counted first, so that a long film is never in memory whole
            every, kind = [None for _ in video(str(file))], "frames"
        if len(every) < frames:
            raise ValueError(f"it has {len(every)} {kind}, and {frames} are asked for")
        wanted = np.linspace(0, len(every) - 1, frames).round().astype(int)
        if file.is_dir():
            taken = (Image.open(read := every[i]) for i in wanted)
        else:
            taken = (upright(one) for i, one in enumerate(video(str(file))) if i in wanted)
        return np.stack([squashed(picture, size) for picture in taken])
    except Exception as error:  # a broken file can make Pillow raise nearly anything
        raise DataError(f"{where}: {read} cannot be read ({error})") from None


def _numbered(file: Path) -> list:
    """A key by which ``frame_2`` comes before ``frame_10``."""
    return [int(part) if part.isdigit() else part for part in re.split("([0-9]+)", file.name)]


def squashed(picture, size: int) -> np.ndarray:
    """A picture as (S, S, 3) uint8: a device sees in the way in which one trains."""
    from PIL import Image

    return np.asarray(as_viewed(picture).resize((size, size), Image.Resampling.BILINEAR))


def upright(frame: "av.VideoFrame") -> "PIL.Image.Image":  # noqa: F821
    """A frame as a picture, turned as the film says; a telephone's often lies on its side."""
    return frame.to_image().rotate(frame.rotation, expand=True)


def video(source: str):
    """The frames of a video file or camera (/dev/video0); raises whatever PyAV does."""
    try:
        import av
    except ImportError:
        raise ImportError("video needs PyAV: install the project's extra 'edge'") from None
    camera = source.startswith("/dev/video")
    how = {"file": source, "format": "v4l2"} if camera else {"file": f"file:{source}"}
    with av.open(**how) as container:  # else 12:30.mp4 would be a place on a network
        if not container.streams.video:
            raise ValueError("it holds no pictures")
        yield from container.decode(video=0)
