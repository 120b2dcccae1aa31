"""Pictures of two classes: brought in once from a folder or an archive, and read."""

import hashlib
import io
import re
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np

from kdutils import data, files
from kdutils.data import DataError

CLASSES = ("cat", "dog")
LARGEST = 64 * 2**20  # bytes of one picture's file; what is larger is no photograph
HIDDEN = re.compile(r"(^|/)(\.|(thumbs\.db|desktop\.ini)$)")  # systems' own, and thrown away


@dataclass(frozen=True)
class Pair:
    """All pictures of two classes: uint8 (N, H, W, 3), and labels (N,), 0 or 1 as ``names`` say."""

    images: np.ndarray
    labels: np.ndarray
    names: tuple[str, str]


@lru_cache(maxsize=1)
def pair(name: str, classes: tuple[str, str]) -> Pair:
    """The pictures of two classes of a dataset, all its splits together, in its own order.

    Raises :class:`DataError` as :func:`data.load` does, and when there is no such class.
    """
    images, labels, known = _heap(name)
    for wanted in classes:
        if wanted not in known:
            raise DataError(f"{name} has no class {wanted!r}; classes: {', '.join(known)}")
    of = labels == known.index(classes[1])
    chosen = of | (labels == known.index(classes[0]))
    if not chosen.all():
        images, of = images[chosen], of[chosen]
    return Pair(images, of.astype(np.uint8), tuple(classes))


@lru_cache(maxsize=1)
def pair_at(size: int, name: str, classes: tuple[str, str]) -> Pair:
    """:func:`pair` with pictures of as many pixels in each direction (:func:`nearest`)."""
    both = pair.__wrapped__(name, classes)  # not kept: these are smaller, and asked for again
    return Pair(nearest(both.images, size), both.labels, both.names)


def nearest(images: np.ndarray, size: int) -> np.ndarray:
    """Pictures (N, H, W, 3) as (N, size, size, 3), by the nearest pixel as in :func:`collect`."""
    down, right = (((np.arange(size) + 0.5) * n / size).astype(int) for n in images.shape[1:3])
    return images[:, down[:, None], right]


def _heap(name: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images, labels and class names of a dataset; of one without splits, what ``*_all`` holds."""
    source = data.sources().get(name)
    if not source or "train" in source["fingerprints"]:
        both = data.load(name)
        x = np.concatenate([both.x_train, both.x_test])
        return x, np.concatenate([both.y_train, both.y_test]), both.names
    path = data.folder() / f"{name}.npz"
    if not path.exists():
        raise DataError(f"{path} does not exist: {source['how']}")
    arrays = data._read(path)
    try:
        x, y, names = arrays["x_all"], arrays["y_all"], [str(n) for n in arrays["names"]]
        expected = source["fingerprints"].get("all") or str(arrays["fingerprint"])
    except KeyError as error:
        raise DataError(f"{path} was not used: it has no array {error}") from None
    sound = x.dtype == y.dtype == np.uint8 and x.ndim == 4 and x.shape[3] == 3
    if not sound or y.shape != x.shape[:1] or y.max(initial=0) >= len(names):
        raise DataError(f"{path} was not used: it must hold uint8 images with labels of {names}")
    if data.fingerprint(x, y) != expected:
        raise DataError(f"{path} was not used: its fingerprint is not {expected}; {source['how']}")
    return x, y, names


def collect(name: str, path: Path, size: int) -> tuple[Path, list[str]]:
    """Decode the cats and dogs in a folder or zip archive into ``<data folder>/<name>.npz``.

    A picture's class is its folder's name (``Cat/0.jpg``, ``dogs/1.png``), else the word its own
    name begins with (``cat.0.jpg``); other and hidden files are left alone. Pictures become RGB
    (:func:`as_viewed`), of several frames the first, and ``size`` × ``size`` pixels by the nearest
    one. Returns the file written, and a line for every picture that was skipped, since it could not
    be read or its pixels are another one's.
    Raises :class:`DataError` when there is nothing of one class.
    """
    from PIL import Image, UnidentifiedImageError
    from tqdm.contrib.concurrent import thread_map

    names, opened = _files(path := Path(path))
    found = [(entry, kind) for entry in names if (kind := _class(entry)) is not None]
    inner = [entry for entry in names if entry.lower().endswith(".zip")]
    if inner and not found:  # as Kaggle packs: one archive of two, and the second has no classes
        held = [sum(_class(one) is not None for one in _listed(opened(entry))) for entry in inner]
        best = inner[held.index(max(held))]
        raise DataError(f"{path} was not imported: unpack its {best} first, and give that")

    images = np.empty((len(found), size, size, 3), np.uint8)
    labels = np.array([kind for _, kind in found], np.uint8)

    def one(i):  # side by side: Pillow lets go of the interpreter
        entry, _ = found[i]
        try:
            with opened(entry) as file:
                content = file.read(LARGEST + 1)
            if len(content) > LARGEST:
                raise ValueError(f"more than {LARGEST} bytes are too many for a picture")
            seen = as_viewed(Image.open(io.BytesIO(content)))
            images[i] = np.asarray(seen.resize((size, size), Image.Resampling.NEAREST))
        except UnidentifiedImageError:
            return f"{entry}: no picture that can be read"
        except Exception as error:  # a broken file can make Pillow raise nearly anything
            return f"{entry}: {str(error) or type(error).__name__}"

    reasons = thread_map(one, range(len(found)), unit="picture")
    first = {}  # by content: a copy of a picture could come into another part of the split
    for i in range(len(found)):
        same = i if reasons[i] else first.setdefault(hashlib.sha256(images[i]).digest(), i)
        if same != i:
            reasons[i] = f"{found[i][0]}: the same picture as {found[same][0]}"
    skipped = [reason for reason in reasons if reason]
    for k, i in enumerate(first.values()):  # in place: a copy would take as much memory again
        images[k], labels[k] = images[i], labels[i]
    images, labels = images[: len(first)], labels[: len(first)]
    counts = np.bincount(labels, minlength=2)
    if not counts.all():
        text = " and ".join(f"{n} of class {c!r}" for n, c in zip(counts, CLASSES, strict=True))
        unread = f"; {len(skipped)} were skipped, first {skipped[0]}" if skipped else ""
        raise DataError(f"{path} was not imported: it has {text}, and both are needed{unread}")
    path = data.folder() / f"{name}.npz"
    files.sweep(path.parent)
    arrays = {"x_all": images, "y_all": labels, "names": CLASSES}
    arrays |= {"fingerprint": data.fingerprint(images, labels), "skipped": np.array(skipped, str)}
    with files.replacing(path) as file:
        np.savez(file, **arrays)
    return path, skipped


def as_viewed(picture: "Image.Image") -> "Image.Image":  # noqa: F821
    """A picture as viewers show it: 8 bits, RGB, upright (EXIF), white where it is transparent."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode[0] == "I":  # 16 bits, which Pillow would cut off at 255
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) / 257 + 0.5).astype(np.uint8))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


def _class(entry: str) -> int | None:
    """0 for a cat's file, 1 for a dog's, None for any other, or one that is hidden."""
    path = PurePosixPath(entry.lower().replace("\\", "/"))  # some programs pack so on Windows
    words = [path.parent.name.removesuffix("s"), *re.findall(r"^[a-z]+", path.name)]
    words *= not HIDDEN.search(str(path))
    return next((CLASSES.index(word) for word in words if word in CLASSES), None)


def _listed(file) -> list[str]:
    """What an archive holds; nothing where it cannot be read."""
    with suppress(Exception):  # a damaged one can make zipfile raise nearly anything
        return zipfile.ZipFile(file).namelist()
    return []


def _files(path: Path) -> tuple[list[str], Callable]:
    """The names of all files in a folder or zip archive, sorted, and how to open one."""
    if path.is_dir():
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        return names, lambda entry: open(path / entry, "rb")
    try:
        archive = zipfile.ZipFile(path)
        for info in archive.infolist():
            archive.open(info).close()  # else a picture is left out whose name here is damaged
    except Exception as error:  # a damaged one can make zipfile raise nearly anything
        reason = f"it is no folder and no zip archive that can be read ({error})"
        raise DataError(f"{path} was not imported: {reason}") from None
    entries = sorted({entry for entry in archive.namelist() if entry[-1:] != "/"})
    return entries, archive.open
