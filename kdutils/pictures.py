"""Pictures of two classes: brought in once from a folder, an archive or torchvision, and read."""

import io
import os
import re
import tempfile
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from kdutils import data
from kdutils.data import DataError

CLASSES = ("cat", "dog")
LARGEST = 64 * 2**20  # bytes of one picture's file; what is larger is no photograph


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
    name begins with (``cat.0.jpg``); other files are left alone. Pictures become RGB, of several
    frames the first, and ``size`` × ``size`` pixels by the nearest one. Returns the file written,
    and a line for every picture that could not be read and was skipped.
    Raises :class:`DataError` when there is nothing of one class, or an archive's entry climbs out.
    """
    path = Path(path)
    names, read = _files(path)
    found = [(entry, kind) for entry in names if (kind := _class(entry)) is not None]
    if not found and any(entry.endswith(".zip") for entry in names):
        inner = next(entry for entry in names if entry.endswith(".zip"))
        raise DataError(f"{path} was not imported: unpack its {inner} first, and give that")

    def decode(i):
        from PIL import Image

        with Image.open(io.BytesIO(read(found[i][0]))) as picture:
            return _small(picture, size)

    labels = np.array([kind for _, kind in found], np.uint8)
    return _write(name, str(path), size, labels, decode, lambda i: found[i][0])


def pets(name: str, size: int) -> tuple[Path, list[str]]:
    """Download Oxford-IIIT Pet through torchvision and keep its cats and dogs as :func:`collect`.

    Both of its splits go together; the study draws its own.
    """
    from kdutils._torchvision import torchvision

    with tempfile.TemporaryDirectory() as scratch:
        options = {"target_types": "binary-category", "download": True}
        try:
            halves = [
                torchvision.datasets.OxfordIIITPet(scratch, split=split, **options)
                for split in ("trainval", "test")
            ]
        except (OSError, RuntimeError) as error:
            raise DataError(f"could not download {name} ({error}): check the network") from None
        places = [(half, i) for half in halves for i in range(len(half))]
        labels = np.zeros(len(places), np.uint8)

        def decode(i):
            half, at = places[i]
            picture, labels[i] = half[at]
            return _small(picture, size)

        return _write(name, name, size, labels, decode, lambda i: f"picture {i}")


def _small(picture, size: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.NEAREST))


def _class(entry: str) -> int | None:
    """0 for a cat's file, 1 for a dog's, None for any other."""
    path = PurePosixPath(entry.lower())
    words = [path.parent.name.removesuffix("s"), *re.findall(r"^[a-z]+", path.name)]
    return next((CLASSES.index(word) for word in words if word in CLASSES), None)


def _files(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    """The names of all files in a folder or zip archive, sorted, and how to read one."""
    if path.is_dir():
        inside = (p for p in path.rglob("*") if p.is_file())
        return sorted(p.relative_to(path).as_posix() for p in inside), lambda e: _whole(path / e)
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        reason = f"it is no folder and no zip archive that can be read ({error})"
        raise DataError(f"{path} was not imported: {reason}") from None
    entries = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    for entry in entries:
        windows = PureWindowsPath(entry)  # knows both kinds of slashes
        if windows.drive or windows.root or ".." in windows.parts:
            raise DataError(f"{path} was not imported: its entry {entry!r} climbs out of it")

    def read(entry):
        if entries[entry].file_size > LARGEST:
            raise ValueError(f"{entries[entry].file_size} bytes are too many for a picture")
        return archive.read(entry)

    return sorted(entries), read


def _whole(path: Path) -> bytes:
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path.stat().st_size} bytes are too many for a picture")
    return path.read_bytes()


def _write(name, source, size, labels, decode, called) -> tuple[Path, list[str]]:
    """Decode pictures side by side (Pillow lets go of the interpreter) and write what was read."""
    from tqdm.auto import tqdm

    images = np.empty((len(labels), size, size, 3), np.uint8)

    def one(i):
        try:
            images[i] = decode(i)
        except Exception as error:  # a broken file can make Pillow raise nearly anything
            return f"{called(i)}: {str(error) or type(error).__name__}"

    with ThreadPoolExecutor() as pool:
        reasons = list(tqdm(pool.map(one, range(len(labels))), total=len(labels), unit="picture"))
    skipped = [reason for reason in reasons if reason]
    good = np.array([reason is None for reason in reasons], bool)
    counts = np.bincount(labels[good], minlength=2)
    if not counts.all():
        text = " and ".join(f"{n} of class {c!r}" for n, c in zip(counts, CLASSES, strict=True))
        unread = f"; {len(skipped)} could not be read, first {skipped[0]}" if skipped else ""
        raise DataError(f"{source} was not imported: it has {text}, and both are needed{unread}")
    images, labels = (images, labels) if good.all() else (images[good], labels[good])
    path = data.folder() / f"{name}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        partial = Path(scratch) / "whole.npz"
        np.savez(
            partial,
            x_all=images,
            y_all=labels,
            names=np.array(CLASSES),
            fingerprint=np.array(data.fingerprint(images, labels)),
            skipped=np.array(skipped, dtype=str),
        )
        os.replace(partial, path)
    return path, skipped
