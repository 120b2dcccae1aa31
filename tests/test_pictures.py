"""Pictures brought in: from folders and archives; what is broken is named."""

import io
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdutils import data, pictures, records

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def fresh():
    pictures.pair.cache_clear()
    yield
    pictures.pair.cache_clear()


def drawn(seed, mode="RGB", size=(40, 30)):
    """A picture of blocks of colour; the seed decides which."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.NEAREST).convert(mode)


def encoded(picture, kind="PNG", **options) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Three cats and two dogs, as Kaggle names them."""
    path = tmp_path / "train"
    path.mkdir()
    for i in range(3):
        (path / f"cat.{i}.png").write_bytes(encoded(drawn(i)))
    for i in range(2):
        (path / f"dog.{i}.png").write_bytes(encoded(drawn(10 + i)))
    return path


def zipped(folder, path, extra=()):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, f"{folder.name}/{file.relative_to(folder)}")
        for name, content in extra:
            archive.writestr(name, content)
    return path


def test_a_folder_becomes_one_file_of_nearest_pixels(folder, own_folders):
    path, skipped = pictures.collect("dogs-vs-cats", folder, 16)
    assert path == own_folders / "dogs-vs-cats.npz"
    assert [file.name for file in own_folders.iterdir()] == [path.name]
    assert skipped == []
    both = pictures.pair("dogs-vs-cats", ("cat", "dog"))
    assert both.labels.tolist() == [0, 0, 0, 1, 1]
    assert both.images.shape == (5, 16, 16, 3)
    picture = np.asarray(drawn(11))  # 30 rows, 40 columns
    rows = ((np.arange(16) + 0.5) * 30 / 16).astype(int)
    columns = ((np.arange(16) + 0.5) * 40 / 16).astype(int)
    np.testing.assert_array_equal(both.images[4], picture[rows[:, None], columns])


def test_an_archive_and_folders_by_class_give_the_same_pictures(folder, tmp_path):
    pictures.collect("dogs-vs-cats", folder, 16)
    expected = pictures.pair("dogs-vs-cats", ("cat", "dog"))
    other = tmp_path / "PetImages"
    for kind, name in (("cat", "Cat"), ("dog", "Dog")):
        (other / name).mkdir(parents=True)
        for file in folder.glob(f"{kind}.*"):
            (other / name / file.name.split(".", 1)[1]).write_bytes(file.read_bytes())
    for source in (zipped(folder, tmp_path / "kaggle.zip"), other):
        pictures.collect("dogs-vs-cats", source, 16)
        pictures.pair.cache_clear()
        found = pictures.pair("dogs-vs-cats", ("cat", "dog"))
        np.testing.assert_array_equal(found.images, expected.images)
        np.testing.assert_array_equal(found.labels, expected.labels)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1", "LA"])
def test_grey_cmyk_and_palettes_become_rgb(folder, mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    (folder / "cat.9.png").write_bytes(encoded(drawn(3, mode), kind))
    _, skipped = pictures.collect("dogs-vs-cats", folder, 16)
    assert skipped == []
    found = pictures.pair("dogs-vs-cats", ("cat", "dog")).images[3]
    expected = drawn(3, mode).convert("RGB").resize((16, 16), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(found, np.asarray(expected))


def last_of(folder, count) -> np.ndarray:
    """The last of a folder's pictures, 16 × 16, where all ``count`` of them were read."""
    _, skipped = pictures.collect("dogs-vs-cats", folder, 16)
    pictures.pair.cache_clear()
    found = pictures.pair("dogs-vs-cats", ("cat", "dog")).images
    assert (skipped, len(found)) == ([], count)
    return found[-1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_upright_as_its_exif_mark_says(folder, orientation):
    seen = np.asarray(drawn(5, size=(16, 16)))
    turned = {  # what lies in the file, by the standard's names of its first row and column
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.swapaxes(0, 1),
        6: np.rot90(seen),
        7: seen.swapaxes(0, 1)[::-1, ::-1],
        8: np.rot90(seen, -1),
    }
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turned[orientation]))
    (folder / "dog.9.jpg").write_bytes(encoded(stored, "PNG", exif=exif))
    np.testing.assert_array_equal(last_of(folder, 6), seen)


def test_sixteen_bits_are_scaled_and_not_cut_off(folder):
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    (folder / "dog.9.png").write_bytes(encoded(Image.fromarray(grey)))
    np.testing.assert_array_equal(last_of(folder, 6)[..., 0], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(folder, mode):
    hidden = np.zeros((16, 16, 4), np.uint8)
    hidden[:8] = [200, 200, 200, 255]  # the rest is black, but not shown
    picture = Image.fromarray(hidden).convert(mode)
    options = {"transparency": picture.getpixel((0, 15))} if mode == "P" else {}
    (folder / "dog.9.png").write_bytes(encoded(picture, **options))
    found = last_of(folder, 6)
    assert np.abs(found[:8].astype(int) - 200).max() <= 3  # a palette's own colours
    assert (found[8:] == 255).all()


def test_hidden_files_and_those_of_systems_are_no_pictures(folder):
    for name in (".DS_Store", "Thumbs.db", "cat/Thumbs.db", ".ipynb_checkpoints/cat.7.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(encoded(drawn(7)))
    (folder / ".Trash-1000" / "cat").mkdir(parents=True)
    (folder / ".Trash-1000" / "cat" / "8.png").write_bytes(encoded(drawn(8)))
    last_of(folder, 5)


def test_of_equal_pictures_one_is_kept_and_the_others_are_named(folder):
    """Else one could come into training and test."""
    (folder / "dog.7.png").write_bytes(encoded(drawn(10)))  # as dog.0
    (folder / "dog.8.bmp").write_bytes(encoded(drawn(0), "BMP"))  # as cat.0
    _, skipped = pictures.collect("dogs-vs-cats", folder, 16)
    assert skipped == [
        "dog.7.png: the same picture as dog.0.png",
        "dog.8.bmp: the same picture as cat.0.png",
    ]
    assert len(pictures.pair("dogs-vs-cats", ("cat", "dog")).images) == 5


def test_an_archive_packed_on_windows_has_the_same_pictures(folder, tmp_path):
    expected = last_of(folder, 5)
    with zipfile.ZipFile(tmp_path / "k.zip", "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.writestr(f"train\\{file.name}", file.read_bytes())
    np.testing.assert_array_equal(last_of(tmp_path / "k.zip", 5), expected)


def test_of_kaggles_archive_in_archives_the_one_with_classes_is_named(folder, tmp_path):
    train = zipped(folder, tmp_path / "train.zip")
    with zipfile.ZipFile(tmp_path / "test1.zip", "w") as archive:
        archive.writestr("test1/1.jpg", encoded(drawn(1)))
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for inner in (tmp_path / "test1.zip", train):
            archive.write(inner, inner.name)
        archive.writestr("broken.zip", b"PK no")
    with pytest.raises(data.DataError, match=r"all\.zip was not imported: unpack its train\.zip"):
        pictures.collect("dogs-vs-cats", tmp_path / "all.zip", 16)


def test_a_broken_picture_costs_no_second_copy_of_all(folder, monkeypatch):
    (folder / "cat.1.png").write_bytes(b"")
    made, empty = [], np.empty
    monkeypatch.setattr(np, "empty", lambda *a, **k: made.append(empty(*a, **k)) or made[-1])
    monkeypatch.setattr(np, "savez", lambda _, **arrays: made.append(arrays["x_all"]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pictures.collect("dogs-vs-cats", folder, 16)
    (whole,) = [array for array in made[:-1] if array.shape == (5, 16, 16, 3)]
    assert np.shares_memory(whole, made[-1])


def test_of_an_animation_the_first_frame_counts(folder):
    frames = [drawn(i, "P") for i in (4, 5)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    (folder / "dog.9.gif").write_bytes(content)
    pictures.collect("dogs-vs-cats", folder, 16)
    found = pictures.pair("dogs-vs-cats", ("cat", "dog")).images[5]
    expected = drawn(4, "P").convert("RGB").resize((16, 16), Image.Resampling.NEAREST)
    assert np.abs(found.astype(int) - np.asarray(expected)).max() < 40  # a GIF's own colours


def bomb() -> bytes:
    """A PNG that says it has four billion pixels."""
    content = bytearray(encoded(drawn(0)))
    content[16:24] = struct.pack(">II", 65535, 65535)
    return bytes(content)


BROKEN = {
    "cut short": encoded(drawn(1), "JPEG")[:-200],
    "empty": b"",
    "a page": b"<html>404</html>",
    "half a header": encoded(drawn(1))[:20],
    "far too large": bomb(),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("archive", [False, True])
def test_what_is_no_picture_is_named_counted_and_skipped(folder, tmp_path, case, archive):
    (folder / "cat.1.png").write_bytes(BROKEN[case])
    source = zipped(folder, tmp_path / "k.zip") if archive else folder
    path, skipped = pictures.collect("dogs-vs-cats", source, 16)
    (line,) = skipped
    assert "cat.1.png: " in line
    assert "BytesIO" not in line
    assert "\n" not in line
    assert pictures.pair("dogs-vs-cats", ("cat", "dog")).labels.tolist() == [0, 0, 1, 1]
    with np.load(path) as arrays:
        assert arrays["skipped"].tolist() == skipped


def test_a_damaged_entry_of_an_archive_is_skipped(folder, tmp_path):
    path = zipped(folder, tmp_path / "k.zip")
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("train/dog.0.png")
    content = bytearray(path.read_bytes())
    content[info.header_offset + 60] ^= 255
    path.write_bytes(content)
    _, skipped = pictures.collect("dogs-vs-cats", path, 16)
    assert [line.split(":")[0] for line in skipped] == ["train/dog.0.png"]


def test_an_archive_in_an_archive_is_to_be_unpacked(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(zipped(folder, tmp_path / "train.zip"), "train.zip")
    with pytest.raises(data.DataError, match=r"all\.zip was not imported: unpack its train\.zip"):
        pictures.collect("dogs-vs-cats", tmp_path / "all.zip", 16)


def test_one_class_or_none_is_refused_and_the_folder_named(folder, own_folders):
    for file in folder.glob("dog.*"):
        file.unlink()
    with pytest.raises(data.DataError, match="3 of class 'cat' and 0 of class 'dog'") as caught:
        pictures.collect("dogs-vs-cats", folder, 16)
    assert str(folder) in str(caught.value)
    (folder / "dog.1.png").write_bytes(b"not a picture")
    with pytest.raises(data.DataError, match=r"0 of class 'dog'.*first dog\.1\.png"):
        pictures.collect("dogs-vs-cats", folder, 16)
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(data.DataError, match="0 of class 'cat' and 0 of class 'dog'"):
        pictures.collect("dogs-vs-cats", folder, 16)
    assert not own_folders.exists()


def test_what_is_neither_folder_nor_archive_is_named(tmp_path):
    (tmp_path / "k.zip").write_bytes(b"PK no")
    for path in (tmp_path / "k.zip", tmp_path / "nothing"):
        with pytest.raises(data.DataError, match="no folder and no zip archive") as caught:
            pictures.collect("dogs-vs-cats", path, 16)
        assert str(path) in str(caught.value)


def test_one_changed_pixel_of_an_imported_file_is_noticed(folder):
    path, _ = pictures.collect("dogs-vs-cats", folder, 16)
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays["x_all"][1, 2, 3, 0] ^= 1
    np.savez(path, **arrays)
    with pytest.raises(data.DataError, match="fingerprint") as caught:
        pictures.pair("dogs-vs-cats", ("cat", "dog"))
    assert str(path) in str(caught.value)


WRONG = {
    "no array": lambda a: {"names": None},
    "labels of no class": lambda a: {"y_all": a["y_all"] + 2},
    "channels first": lambda a: {"x_all": a["x_all"].transpose(0, 3, 1, 2)},
    "too few labels": lambda a: {"y_all": a["y_all"][1:]},
}


@pytest.mark.parametrize("case", WRONG)
def test_arrays_that_do_not_fit_are_refused_and_the_file_named(folder, case):
    path, _ = pictures.collect("dogs-vs-cats", folder, 16)
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays |= WRONG[case](arrays)
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(data.DataError) as caught:
        pictures.pair("dogs-vs-cats", ("cat", "dog"))
    assert str(path) in str(caught.value)


def test_two_classes_of_a_dataset_with_splits():
    digits = data.load("digits")
    both = pictures.pair("digits", ("8", "3"))
    images = np.concatenate([digits.x_train, digits.x_test])
    labels = np.concatenate([digits.y_train, digits.y_test])
    chosen = np.isin(labels, [3, 8])
    np.testing.assert_array_equal(both.images, images[chosen])
    np.testing.assert_array_equal(both.labels, labels[chosen] == 3)


def test_absent_data_and_unknown_classes_are_named(own_folders):
    with pytest.raises(data.DataError, match="digits has no class 'cat'; classes: 0, 1"):
        pictures.pair("digits", ("cat", "dog"))
    with pytest.raises(data.DataError, match="data import PATH") as caught:
        pictures.pair("dogs-vs-cats", ("cat", "dog"))
    assert str(own_folders / "dogs-vs-cats.npz") in str(caught.value)
    with pytest.raises(data.DataError, match="unknown dataset 'cats'"):
        pictures.pair("cats", ("cat", "dog"))


def test_a_record_can_name_data_without_a_stated_fingerprint():
    assert records.data_named_in({"dataset": "dogs-vs-cats"}) == {"dogs-vs-cats": {}}


def test_the_command_line_imports_and_says_what_it_skipped(folder, own_folders):
    (folder / "cat.1.png").write_bytes(b"")
    command = [sys.executable, "-m", "kdutils", "data"]
    run = subprocess.run(
        [*command, "import", str(folder), "--size", "16"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[0].startswith("skipped cat.1.png: ")
    assert run.stdout.splitlines()[1:] == [
        "1 pictures skipped",
        str(own_folders / "dogs-vs-cats.npz"),
    ]
    run = subprocess.run(
        [*command, "get", "dogs-vs-cats"], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert run.returncode == 2
    assert "data import PATH" in run.stderr.splitlines()[-1]
