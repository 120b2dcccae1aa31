"""Datasets and batches: the right pictures, the same view every time, and damage that is named."""

import errno
import urllib.error
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kdutils import data, files
from kdutils._torchvision import torchvision

STATISTICS = (np.array([125.3, 123.0, 113.9]), np.array([63.0, 62.1, 66.7]))


def pictures(n=50, size=12, seed=7):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return images, rng.integers(0, 10, n, dtype=np.uint8)


def batches(n=50, size=12, **options):
    options = {"statistics": STATISTICS, "batch_size": 16, "seed": 3} | options
    return data.Batches(*pictures(n, size), **options)


def by_image(of, epoch):
    """Every image's view in this epoch, in the order of the images."""
    out = torch.empty(len(of.labels), 3, *of.windows.shape[4:5] * 2)
    for batch in of(epoch):
        out[batch.index] = batch.images
    return out


# ------------------------------------------------------------------------------- augmentation


def test_crop_flip_and_normalise_equal_a_slow_reference_exactly():
    images, labels = pictures()
    of = batches()
    views = of.views(5)
    mean, deviation = STATISTICS
    scale, shift = np.float32(1 / deviation), np.float32(-mean / deviation)
    for batch in of(5):
        for view, label, index in zip(batch.images, batch.labels, batch.index, strict=True):
            flipped, down, right = views[:, index]
            canvas = np.zeros((20, 20, 3), np.uint8)
            canvas[4:16, 4:16] = images[index, :, ::-1] if flipped else images[index]
            crop = canvas[down : down + 12, right : right + 12]
            expected = crop.astype(np.float32) * scale + shift
            np.testing.assert_array_equal(view.permute(1, 2, 0).numpy(), expected)
            np.testing.assert_allclose(expected, (crop - mean) / deviation, atol=1e-6)
            assert label == labels[index]
    assert {0, 1} == set(views[0])  # both kinds were among them


@pytest.mark.parametrize(
    "other",
    [{"batch_size": 1}, {"batch_size": 50}, {"batch_size": 1000}, {"shuffle": False}],
    ids=str,
)
def test_a_view_depends_on_no_batch_and_no_order(other):
    assert torch.equal(by_image(batches(), 2), by_image(batches(**other), 2))


def test_a_view_depends_on_no_other_image():
    images, labels = pictures()
    first = data.Batches(images[:20], labels[:20], statistics=STATISTICS, batch_size=7, seed=3)
    assert torch.equal(by_image(first, 2), by_image(batches(), 2)[:20])


def test_a_view_depends_on_nothing_drawn_before():
    of = batches()
    expected = {epoch: by_image(of, epoch) for epoch in (1, 2, 3)}
    orders = {epoch: of.order(epoch) for epoch in (1, 2, 3)}
    again = batches()
    next(iter(again(7)))  # an epoch begun and left
    np.random.seed(1)
    torch.manual_seed(1)
    for epoch in (3, 1, 2, 3):
        assert torch.equal(by_image(again, epoch), expected[epoch])
        np.testing.assert_array_equal(again.order(epoch), orders[epoch])


def test_epochs_read_side_by_side_do_not_disturb_each_other():
    of = batches()
    for one, two in zip(of(1), of(2), strict=True):
        assert torch.equal(one.images, by_image(of, 1)[one.index])
        assert torch.equal(two.images, by_image(of, 2)[two.index])


numbers = st.integers(0, 2**31)


@given(numbers, numbers, st.integers(1, 40), st.integers(0, 40))
def test_views_of_the_first_images_do_not_depend_on_how_many_follow(seed, epoch, n, more):
    few, many = batches(n, 1, seed=seed), batches(n + more, 1, seed=seed)
    np.testing.assert_array_equal(few.views(epoch), many.views(epoch)[:, :n])


@given(numbers, numbers, numbers, numbers)
def test_other_seeds_and_other_epochs_give_other_views_and_orders(seed, epoch, d_seed, d_epoch):
    one, two = batches(40, 1, seed=seed), batches(40, 1, seed=seed + d_seed)
    same = d_seed == d_epoch == 0
    assert np.array_equal(one.views(epoch), two.views(epoch + d_epoch)) == same
    assert np.array_equal(one.order(epoch), two.order(epoch + d_epoch)) == same


def test_flips_and_offsets_are_uniform_and_independent():
    flipped, down, right = batches(20_000, 1).views(1)
    table = np.zeros((2, 9, 9))
    np.add.at(table, (flipped, down, right), 1)  # fails for an offset outside 0 to 8
    assert stats.chisquare(table.ravel()).pvalue > 0.01  # 162 cells, all alike
    assert stats.binomtest(int(flipped.sum()), 20_000).pvalue > 0.01


def test_one_image_is_seen_in_every_way_over_the_epochs():
    of = batches(2, 1)
    seen = np.array([of.views(epoch)[:, 1] for epoch in range(1, 2001)])
    assert stats.binomtest(int(seen[:, 0].sum()), 2000).pvalue > 0.01
    for offsets in seen[:, 1:].T:
        assert stats.chisquare(np.bincount(offsets, minlength=9)).pvalue > 0.01
    pairs = seen[:-1, 1] * 9 + seen[1:, 1]  # an epoch's offset and the next one's
    assert stats.chisquare(np.bincount(pairs, minlength=81)).pvalue > 0.01


@pytest.mark.parametrize("later", [-1, 0, 1])
def test_orders_are_uniform_and_independent_of_the_views(later):
    of, epochs = batches(5, 1), range(1, 2001)
    place = np.array([np.argsort(of.order(epoch + later))[0] for epoch in epochs])
    seen = np.array([of.views(epoch)[:, 0] for epoch in epochs])
    assert stats.chisquare(np.bincount(place, minlength=5)).pvalue > 0.01
    for drawn, kinds in zip(seen.T, (2, 9, 9), strict=True):
        table = np.zeros((5, kinds))
        np.add.at(table, (place, drawn), 1)
        assert stats.chi2_contingency(table).pvalue > 0.005


def test_no_seed_repeats_another_seeds_epoch():
    grid = [(seed, epoch) for seed in range(6) for epoch in range(1, 21)]
    for kind in ("views", "order"):
        seen = {getattr(batches(40, 1, seed=s), kind)(epoch).tobytes() for s, epoch in grid}
        assert len(seen) == len(grid)


@given(st.integers(1, 70), st.integers(1, 80), st.integers(1, 5), st.booleans())
def test_an_epoch_holds_every_image_once(n, batch_size, epoch, shuffle):
    of = batches(n, 2, batch_size=batch_size, shuffle=shuffle)
    index = [batch.index for batch in of(epoch)]
    assert sorted(torch.cat(index).tolist()) == list(range(n))
    assert len(index) == len(of)
    assert [len(i) for i in index[:-1]] == [batch_size] * (len(of) - 1)
    assert len(index[-1]) == (n % batch_size or batch_size)


def test_batches_are_channels_last_and_say_their_epoch():
    for batch in batches()(4):
        assert batch.images.dtype == torch.float32
        assert batch.images.shape[1:] == (3, 12, 12)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == torch.int64
        assert batch.epoch == 4


def test_whole_is_the_images_in_order_as_they_are():
    images, labels = pictures()
    of = data.whole(images, labels, statistics=STATISTICS)
    mean, deviation = STATISTICS
    expected = ((images - mean) / deviation).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(by_image(of, 1).numpy(), expected, atol=1e-6)
    assert torch.equal(by_image(of, 1), by_image(of, 2))
    assert [batch.index.tolist() for batch in of(9)] == [list(range(50))]


def test_identity_tells_batches_apart_that_show_other_views():
    images, labels = pictures()
    other_image, other_label = images.copy(), labels.copy()
    other_image[3, 2, 1, 0] ^= 1
    other_label[3] ^= 1
    options = {"statistics": STATISTICS, "batch_size": 16, "seed": 3}
    sets = [(images, labels), (other_image, labels), (images, other_label)]
    changes = [{"seed": 4}, {"flip": False}, {"pad": 3}, {"batch_size": 8}]
    found = [data.Batches(*s, **options).identity() for s in sets]
    found += [data.Batches(images, labels, **options | change).identity() for change in changes]
    assert len(set(found)) == len(sets) + len(changes)
    assert data.Batches(images, labels, **options).identity() == found[0]


@pytest.mark.parametrize("change", [{"statistics": (STATISTICS[0], STATISTICS[0])}], ids=str)
def test_identity_tells_normalisations_apart(change):
    assert batches().identity() != batches(**change).identity()


# ----------------------------------------------------------------------------------- datasets


def test_fingerprint_knows_every_pixel_and_label_but_no_order():
    images, labels = pictures()
    found = data.fingerprint(images, labels)
    order = np.random.default_rng(0).permutation(50)
    assert data.fingerprint(images[order], labels[order]) == found
    assert data.fingerprint(images[order], labels) != found
    assert data.fingerprint(images[1:], labels[1:]) != found
    other = images.copy()
    other[17, 5, 6, 2] ^= 1
    assert data.fingerprint(other, labels) != found
    other = labels.copy()
    other[17] ^= 1
    assert data.fingerprint(images, other) != found


def test_digits_need_neither_network_nor_file():
    digits = data.load("digits")
    assert digits.x_train.shape == (1200, 16, 16, 3)
    assert digits.x_test.shape == (597, 16, 16, 3)
    assert digits.x_train.dtype == digits.y_train.dtype == np.uint8
    assert (digits.classes, digits.size) == (10, 16)
    assert digits.fingerprints == data.sources()["digits"]["fingerprints"]


def test_statistics_are_numpys_mean_and_deviation():
    digits = data.load("digits")
    images, labels = pictures(n=60)
    images[..., 1] //= 2  # channels that differ
    coloured = data.Dataset("c", images, labels, images, labels, ["a"], {})
    for dataset in (digits, coloured):
        mean, deviation = dataset.statistics
        np.testing.assert_allclose(mean, dataset.x_train.mean((0, 1, 2)), rtol=1e-12)
        np.testing.assert_allclose(deviation, dataset.x_train.std((0, 1, 2)), rtol=1e-9)


def test_split_is_disjoint_stratified_and_always_the_same():
    digits = data.load("digits")
    kept, held = digits.split(200)
    assert len(held) == 200
    assert sorted([*kept, *held]) == list(range(1200))
    share = np.bincount(digits.y_train[held]) / np.bincount(digits.y_train)
    assert np.abs(share * np.bincount(digits.y_train) - np.bincount(digits.y_train) / 6).max() < 1
    np.random.seed(5)
    data.load.cache_clear()
    again = data.load("digits").split(200)
    np.testing.assert_array_equal(kept, again[0])
    np.testing.assert_array_equal(held, again[1])


def test_parts_share_no_image_and_only_training_is_augmented():
    parts = data.parts("digits", validation=200, batch_size=64, seed=1)
    digits = data.load("digits")
    kept, held = digits.split(200)
    np.testing.assert_array_equal(parts.train.labels.numpy(), digits.y_train[kept])
    np.testing.assert_array_equal(parts.validation.labels.numpy(), digits.y_train[held])
    np.testing.assert_array_equal(parts.test.labels.numpy(), digits.y_test)
    mean, deviation = digits.statistics
    for part, images in ((parts.validation, digits.x_train[held]), (parts.test, digits.x_test)):
        expected = ((images - mean) / deviation).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(by_image(part, 1).numpy(), expected, atol=1e-5)
    assert not torch.equal(by_image(parts.train, 1), by_image(parts.train, 2))


# --------------------------------------------------------------- files: absent, damaged, fetched


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A small dataset that ``sources`` knows; nothing of it lies in the folder yet."""
    x_train, y_train = pictures(40, 4, seed=1)
    x_test, y_test = pictures(20, 4, seed=2)
    names = np.array([f"class {n}" for n in range(10)])
    arrays = dict(x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, names=names)
    found = {s: data.fingerprint(arrays[f"x_{s}"], arrays[f"y_{s}"]) for s in ("train", "test")}
    toml = tmp_path / "sources.toml"
    toml.write_text(
        f'[tiny]\ntorchvision = "CIFAR10"\nfingerprints.train = "{found["train"]}"\n'
        f'fingerprints.test = "{found["test"]}"\n[digits]\n',
        encoding="utf-8",
    )
    monkeypatch.setattr(data, "SOURCES", toml)
    return arrays


@pytest.fixture
def write(own_folders):
    """Writes arrays as ``tiny.npz`` into the data folder."""

    def write(arrays):
        own_folders.mkdir(exist_ok=True)
        np.savez(own_folders / "tiny.npz", **arrays)
        return own_folders / "tiny.npz"

    return write


def torchvision_of(arrays):
    """Stands in for torchvision's CIFAR10: the same interface, these arrays."""

    def dataset(root, train, download):
        assert download
        x, y = ("x_train", "y_train") if train else ("x_test", "y_test")
        targets, classes = arrays[y].tolist(), arrays["names"].tolist()
        return SimpleNamespace(data=arrays[x], targets=targets, classes=classes)

    return dataset


def assert_is(dataset, arrays):
    for key in ("x_train", "y_train", "x_test", "y_test"):
        np.testing.assert_array_equal(getattr(dataset, key), arrays[key])
        assert getattr(dataset, key).dtype == np.uint8
    assert dataset.names == arrays["names"].tolist()


def test_load_reads_the_file_in_the_data_folder(tiny, write):
    write(tiny)
    assert_is(data.load("tiny"), tiny)
    assert data.load("tiny") is data.load("tiny")


def test_an_unknown_dataset_is_named_with_the_known_ones():
    with pytest.raises(data.DataError, match=r"'cifar'; known datasets: cifar10, cifar100, digits"):
        data.load("cifar")
    with pytest.raises(data.DataError, match=r"'digits'; downloadable: cifar10, cifar100$"):
        data.get("digits")


def test_an_absent_file_says_which_command_or_folder_helps(own_folders):
    with pytest.raises(data.DataError) as caught:
        data.load("cifar10")
    text = str(caught.value)
    assert str(own_folders / "cifar10.npz") in text
    assert "python -m kdutils data get cifar10" in text
    assert "$KDUTILS_DATA" in text
    assert "\n" not in text


def truncated(path):
    path.write_bytes(path.read_bytes()[:-300])


def emptied(path):
    path.write_bytes(b"")


def bit_flipped(path):
    """One bit of the stored images, in the middle of the archive."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("x_train.npy")
    content = bytearray(path.read_bytes())
    content[info.header_offset + info.compress_size // 2] ^= 4
    path.write_bytes(content)


def replaced_by_text(path):
    path.write_text("<html>404</html>", encoding="utf-8")


def replaced_by_one_array(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


@pytest.mark.parametrize(
    "damage", [truncated, emptied, bit_flipped, replaced_by_text, replaced_by_one_array]
)
def test_a_damaged_file_is_named_with_its_fingerprint_and_not_used(tiny, write, damage):
    path = write(tiny)
    damage(path)
    for _ in range(2):  # what failed is not remembered as good
        with pytest.raises(data.DataError) as caught:
            data.load("tiny")
        for part in (str(path), files.sha256(path), "not used", "data get tiny"):
            assert part in str(caught.value)
    write(tiny)
    assert_is(data.load("tiny"), tiny)


@pytest.mark.parametrize("key", ["x_train", "y_train", "x_test", "y_test"])
def test_one_changed_pixel_or_label_is_noticed_and_its_fingerprint_shown(tiny, write, key):
    changed = tiny | {key: tiny[key].copy()}
    changed[key].flat[5] ^= 1
    path = write(changed)
    with pytest.raises(data.DataError) as caught:
        data.load("tiny")
    split = key[2:]
    found = data.fingerprint(changed[f"x_{split}"], changed[f"y_{split}"])
    expected = data.sources()["tiny"]["fingerprints"][split]
    for part in (str(path), split, found, expected, "not used", "data get tiny"):
        assert part in str(caught.value)


@pytest.mark.parametrize("key", ["x_train", "y_train", "x_test", "y_test", "names"])
def test_a_missing_array_is_named(tiny, write, key):
    path = write({k: v for k, v in tiny.items() if k != key})
    with pytest.raises(data.DataError) as caught:
        data.load("tiny")
    assert str(path) in str(caught.value)
    assert f"no array '{key}'" in str(caught.value)


class Trap:
    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


def test_pickled_objects_are_refused_and_never_run(tiny, write):
    path = write(tiny | {"names": np.array([Trap()], dtype=object)})
    with pytest.raises(data.DataError, match="not used") as caught:
        data.load("tiny")
    assert not Trap.sprung
    assert files.sha256(path) in str(caught.value)


SHAPES = {
    "labels too few": lambda a: {"y_train": a["y_train"][:-1]},
    "labels of another type": lambda a: {"y_train": a["y_train"].astype(np.int64) + 300},
    "channels first": lambda a: {"x_train": a["x_train"].reshape(40, 3, 4, 4)},
    "no images": lambda a: {"x_train": np.array(3, np.uint8)},
    "names too few": lambda a: {"names": a["names"][:3]},
}


@pytest.mark.parametrize("case", SHAPES)
def test_arrays_of_the_wrong_shape_or_type_are_refused(tiny, write, case):
    path = write(tiny | SHAPES[case](tiny))
    with pytest.raises(data.DataError, match=str(path)):
        data.load("tiny")


def test_get_writes_exactly_what_is_loadable(tiny, own_folders, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", torchvision_of(tiny))
    written, savez = [], np.savez
    monkeypatch.setattr(np, "savez", lambda at, **kw: (written.append(at), savez(at, **kw)))
    path = data.get("tiny")
    assert path == own_folders / "tiny.npz"
    assert path not in written  # it was written elsewhere, then put in place whole
    assert [p.name for p in own_folders.iterdir()] == ["tiny.npz"]  # scratch is gone
    assert_is(data.load("tiny"), tiny)


def raises(error):
    def dataset(root, train, download):
        raise error

    return dataset


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("Network is unreachable"), RuntimeError("Network is unreachable")],
    ids=repr,
)
def test_get_without_a_network_says_what_helps(tiny, own_folders, monkeypatch, error):
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", raises(error))
    with pytest.raises(data.DataError) as caught:
        data.get("tiny")
    for part in ("Network is unreachable", "tiny.npz", str(own_folders), "$KDUTILS_DATA"):
        assert part in str(caught.value)
    assert list(own_folders.iterdir()) == []


def test_get_leaves_a_sound_file_alone(tiny, write, monkeypatch):
    path = write(tiny)
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", raises(OSError("not to be asked")))
    assert data.get("tiny") == path
    assert path.stat().st_mtime_ns == before


def test_get_does_not_take_a_damaged_file_for_sound(tiny, write, monkeypatch):
    path = write(tiny)
    truncated(path)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", torchvision_of(tiny))
    with pytest.raises(data.DataError, match="delete it"):
        data.get("tiny")


def test_get_refuses_a_download_that_is_not_the_dataset(tiny, own_folders, monkeypatch):
    wrong = tiny | {"x_test": tiny["x_test"][::-1]}  # images of other labels
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", torchvision_of(wrong))
    with pytest.raises(data.DataError, match="fingerprint of its test split"):
        data.get("tiny")
    assert list(own_folders.iterdir()) == []


def test_get_on_a_full_disk_leaves_nothing_behind(tiny, own_folders, monkeypatch):
    def savez(path, **arrays):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", torchvision_of(tiny))
    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(OSError, match="No space left"):
        data.get("tiny")
    assert list(own_folders.iterdir()) == []
