"""Pictures and labels: where they come from, whether they are the right ones, and batches of them.

Knows no models and no losses. Images are uint8, N x H x W x 3, in memory.
"""

import hashlib
import os
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kdutils import files

SOURCES = Path(__file__).parent.parent / "data" / "sources.toml"


class DataError(RuntimeError):
    """Data is absent, damaged or unknown; the message says what to do."""


@dataclass(frozen=True)
class Dataset:
    """Images (N, H, W, 3) and labels (N,), both uint8, of a training and a test split."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    names: list[str]
    fingerprints: dict[str, str]

    @property
    def classes(self) -> int:
        return len(self.names)

    @property
    def size(self) -> int:
        """Height and width of an image in pixels."""
        return self.x_train.shape[1]

    @cached_property
    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation per channel over the training images, in units of 1/255."""
        histogram = [np.bincount(self.x_train[..., c].ravel(), minlength=256) for c in range(3)]
        weights = np.array(histogram) / np.sum(histogram[0])
        levels = np.arange(256.0)
        mean = weights @ levels
        return mean, np.sqrt(weights @ levels**2 - mean**2)

    def split(self, validation: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the training images kept and of ``validation`` held out, stratified by class.

        The split is the same for every seed: what is compared across seeds sees the same images.
        """
        from sklearn.model_selection import train_test_split

        everything = np.arange(len(self.y_train))
        kept, held = train_test_split(
            everything, test_size=validation, stratify=self.y_train, random_state=0
        )
        return np.sort(kept), np.sort(held)


def fingerprint(images: np.ndarray, labels: np.ndarray) -> str:
    """SHA-256 over the sorted SHA-256 of each image's bytes and label byte: order does not matter.

    ``images`` is uint8 (N, H, W, 3), ``labels`` uint8 (N,).
    """
    pairs = zip(images, labels, strict=True)
    each = sorted(hashlib.sha256(x.tobytes() + bytes([y])).digest() for x, y in pairs)
    return hashlib.sha256(b"".join(each)).hexdigest()


def sources() -> dict[str, dict]:
    """The known datasets: their source, size and fingerprints (``data/sources.toml``)."""
    return tomllib.loads(SOURCES.read_text())


def folder() -> Path:
    """Where datasets lie: ``$KDUTILS_DATA``, else the user's cache folder."""
    return files.cache_folder("KDUTILS_DATA", "data")


@lru_cache(maxsize=2)
def load(name: str) -> Dataset:
    """Read a dataset by name, checked against its fingerprints.

    Raises :class:`DataError` when the name is unknown, the file is absent, or its content is not
    what ``data/sources.toml`` says.
    """
    known = sources()
    if name not in known:
        raise DataError(f"unknown dataset {name!r}; known datasets: {', '.join(known)}")
    if name == "digits":
        return _digits(known[name])
    path = folder() / f"{name}.npz"
    if not path.exists():
        raise DataError(
            f"{path} does not exist: run `python -m kdutils data get {name}` (needs a network), "
            f"or point $KDUTILS_DATA at a folder that holds {name}.npz"
        )
    return _checked(name, _read(path), known[name], str(path))


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except Exception as error:  # zip, zlib, header and size errors all mean the same here
        raise DataError(
            f"{path} is damaged and was not used ({error}; SHA-256 of the file "
            f"{files.sha256(path)}): delete it and run `python -m kdutils data get {path.stem}`"
        ) from None


def _checked(name: str, arrays: dict[str, np.ndarray], source: dict, where: str) -> Dataset:
    found = {}
    for split in ("train", "test"):
        missing = {f"x_{split}", f"y_{split}", "names"} - set(arrays)
        if missing:
            raise DataError(f"{where} was not used: it has no array {sorted(missing)[0]!r}")
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        sound = x.dtype == y.dtype == np.uint8 and x.ndim == 4 and x.shape[3] == 3
        if not sound or y.shape != x.shape[:1] or y.max(initial=0) >= arrays["names"].size:
            raise DataError(
                f"{where} was not used: its {split} split must be uint8 images (N, H, W, 3) with "
                f"uint8 labels (N,) of named classes, not {x.dtype} {x.shape}, {y.dtype} {y.shape}"
            )
        found[split] = fingerprint(x, y)
        expected = source["fingerprints"][split]
        if found[split] != expected:
            raise DataError(
                f"{where} was not used: the fingerprint of its {split} split is {found[split]}, "
                f"expected {expected}; delete the file and run `python -m kdutils data get {name}`"
            )
    images = {key: arrays[key] for key in ("x_train", "y_train", "x_test", "y_test")}
    return Dataset(name=name, names=[str(n) for n in arrays["names"]], fingerprints=found, **images)


def _digits(source: dict) -> Dataset:
    """Scikit-learn's 1,797 handwritten digits, 8 x 8, doubled to 16 x 16, for runs without data."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * 15.9375).astype(np.uint8).repeat(2, 1).repeat(2, 2)
    images = np.repeat(images[..., None], 3, axis=3)
    labels = digits.target.astype(np.uint8)
    arrays = {
        "x_train": images[:1200],
        "y_train": labels[:1200],
        "x_test": images[1200:],
        "y_test": labels[1200:],
        "names": np.array([str(n) for n in range(10)]),
    }
    return _checked("digits", arrays, source, "scikit-learn's digits")


def get(name: str) -> Path:
    """Download a dataset through torchvision and write ``<folder>/<name>.npz``, checked.

    A file that is already there and sound is left alone.
    """
    known = sources()
    downloadable = [n for n in known if "torchvision" in known[n]]
    if name not in downloadable:
        raise DataError(f"cannot download {name!r}; downloadable: {', '.join(downloadable)}")
    path = folder() / f"{name}.npz"
    if path.exists():
        load(name)
        return path
    from kdutils._torchvision import torchvision

    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = getattr(torchvision.datasets, known[name]["torchvision"])
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        try:
            train, test = (dataset(scratch, train=flag, download=True) for flag in (True, False))
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"could not download {name} ({error}): check the network, or put {name}.npz into "
                f"{path.parent}, or point $KDUTILS_DATA at the folder that holds it"
            ) from None
        arrays = {
            "x_train": train.data,
            "y_train": np.array(train.targets, np.uint8),
            "x_test": test.data,
            "y_test": np.array(test.targets, np.uint8),
            "names": np.array(train.classes),
        }
        _checked(name, arrays, known[name], "the download")
        partial = Path(scratch) / "checked.npz"
        np.savez(partial, **arrays)
        os.replace(partial, path)
    return path


class Batch(NamedTuple):
    """Augmented, normalised images (B, 3, H, W) with labels (B,), and where they came from."""

    images: "torch.Tensor"  # noqa: F821
    labels: "torch.Tensor"  # noqa: F821
    index: "torch.Tensor"  # noqa: F821
    epoch: int


class Batches:
    """Shuffled, cropped and flipped batches held in memory.

    The view of image ``index`` in an epoch depends on (seed, epoch, index) and on nothing else:
    not on the batch, the order, the device, or what was drawn before. So a teacher sees its
    student's crops, an interrupted run continues bit for bit, and a teacher's outputs can be
    stored. Crops are taken from the image padded by ``pad`` black pixels; flips are left to right.

    Parameters: NumPy's ``images``, uint8 (N, H, H, 3) and square (what is not is scrambled), and
    ``labels`` (N,); ``statistics`` the mean and the standard deviation of each channel in units
    of 1/255 (:attr:`Dataset.statistics`).

    ``for batch in batches(epoch)`` yields :class:`Batch`; epochs count from 1.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        statistics: tuple[np.ndarray, np.ndarray],
        batch_size: int,
        seed: int,
        pad: int = 4,
        flip: bool = True,
        shuffle: bool = True,
        device="cpu",
    ):
        import torch

        self.batch_size, self.seed, self.pad = batch_size, seed, pad
        self.flip, self.shuffle = flip, shuffle
        self.device = torch.device(device)
        self.labels = torch.as_tensor(labels, dtype=torch.int64, device=self.device)
        self._content = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        n, size = images.shape[:2]
        around = ((0, 0), (pad, pad), (pad, pad), (0, 0))
        padded = torch.as_tensor(np.pad(images, around), device=self.device)
        # A flipped copy doubles the memory and turns crop and flip into one gather.
        both = torch.stack([padded, padded.flip(2)] if flip else [padded])
        side, row = size + 2 * pad, (size + 2 * pad) * 3
        self.windows = both.as_strided(
            (len(both), n, 2 * pad + 1, 2 * pad + 1, size, size * 3),
            (n * side * row, side * row, row, 3, row, 1),
        )
        mean, deviation = (np.tile(values, size) for values in statistics)
        self.scale = torch.as_tensor(1 / deviation, dtype=torch.float32, device=self.device)
        self.shift = torch.as_tensor(-mean / deviation, dtype=torch.float32, device=self.device)

    def __len__(self) -> int:
        """Batches in an epoch; the last may be smaller."""
        return -(-len(self.labels) // self.batch_size)

    def identity(self) -> str:
        """Says which views these are: equal for equal images, labels, seed and augmentation."""
        scale = hashlib.sha256(
            self.scale.cpu().numpy().tobytes() + self.shift.cpu().numpy().tobytes()
        )
        options = (self.batch_size, self.seed, self.pad, self.flip, self.shuffle)
        return f"{self._content} {scale.hexdigest()} {options}"

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's indices, shuffled unless ``shuffle`` is off."""
        if not self.shuffle:
            return np.arange(len(self.labels))
        return np.argsort(_random(self.seed, epoch, 0, len(self.labels)), kind="stable")

    def views(self, epoch: int) -> np.ndarray:
        """For every image: flipped or not, and the crop's offset down and right, (3, N)."""
        raw = _random(self.seed, epoch, 1, len(self.labels))
        offsets = np.uint64(2 * self.pad + 1)
        flipped = (raw >> np.uint64(63)) * np.uint64(self.flip)
        down = (raw & np.uint64(0xFFFFFF)) % offsets
        right = ((raw >> np.uint64(24)) & np.uint64(0xFFFFFF)) % offsets
        return np.stack([flipped, down, right]).astype(np.int64)

    def __call__(self, epoch: int) -> Iterator[Batch]:
        import torch

        order = torch.as_tensor(self.order(epoch), device=self.device)
        flipped, down, right = torch.as_tensor(self.views(epoch), device=self.device)[:, order]
        for start in range(0, len(order), self.batch_size):
            at = slice(start, start + self.batch_size)
            index = order[at]
            windows = self.windows[flipped[at], index, down[at], right[at]]
            yield Batch(self._normalise(windows), self.labels[index], index, epoch)

    def _normalise(self, windows):
        """(B, H, W * 3) uint8 to (B, 3, H, W) float32 in channels-last memory order."""
        images = windows.float().mul_(self.scale).add_(self.shift)
        return images.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)


def whole(images: np.ndarray, labels: np.ndarray, *, statistics, device="cpu") -> Batches:
    """The images in order, neither cropped nor flipped: what a network is measured on."""
    options = dict(batch_size=500, seed=0, pad=0, flip=False, shuffle=False)
    return Batches(images, labels, statistics=statistics, device=device, **options)


class Parts(NamedTuple):
    """The three parts of a dataset, as batches: to train on, to choose by, to report."""

    train: Batches
    validation: Batches
    test: Batches


def parts(name: str, *, validation: int, batch_size: int, seed: int, device="cpu") -> Parts:
    """Training batches augmented by ``seed``, ``validation`` held-out images, and the test set."""
    dataset = load(name)
    kept, held = dataset.split(validation)
    x, y = dataset.x_train, dataset.y_train
    common = {"statistics": dataset.statistics, "device": device}
    return Parts(
        Batches(x[kept], y[kept], batch_size=batch_size, seed=seed, **common),
        whole(x[held], y[held], **common),
        whole(dataset.x_test, dataset.y_test, **common),
    )


def _random(seed: int, epoch: int, stream: int, n: int) -> np.ndarray:
    """n raw 64-bit numbers of the counter-based generator Philox, keyed by seed, epoch, stream."""
    return np.random.Philox(key=[seed, 2 * epoch + stream]).random_raw(n)
