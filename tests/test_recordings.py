"""Clips: drawn once and kept, batches whose boxes move along, and folders with every fault."""

import csv
import itertools
import shutil
import struct
import weakref
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image

from kdutils.concierge import recordings, scenes
from kdutils.data import DataError

SMALL = dict(
    registered=3, others=2, strangers=(2, 2), clips=(35, 26, 26), seed=0, frames=2, size=16
)


@pytest.fixture
def small():
    recordings.drawn.cache_clear()
    yield recordings.drawn(**SMALL)
    recordings.drawn.cache_clear()


def test_strangers_are_never_in_training_and_differ_between_parts(small):
    people = [set(part.people.tolist()) for part in small[:3]]
    assert people[0] == set(range(5))
    for part in (small.validation, small.test):
        assert set(part.people[part.registered].tolist()) == {0, 1, 2}
        assert not set(part.people[~part.registered].tolist()) & people[0]
        assert part.registered.sum() == 13
    validation, test = (
        set(p.people[~p.registered].tolist()) for p in (small.validation, small.test)
    )
    assert not validation & test
    assert (small.registered, small.known) == (3, 5)


def test_no_clip_of_one_part_equals_a_clip_of_another(small):
    clips = [clip.tobytes() for part in small[:3] for clip in part.clips]
    assert len(set(clips)) == len(clips)


def test_labels_are_those_of_what_is_drawn(small):
    for seed, part, base in ((0, small.train, 0), (3, small.test, 0)):
        for i in (0, 4, 11):
            pictures, box = scenes.clip(
                base + int(part.people[i]),
                int(part.emotions[i]),
                seed=seed,
                index=i,
                frames=2,
                size=16,
            )
            expected = recordings.side_by_side(pictures[None])[0]
            np.testing.assert_array_equal(part.clips[i], expected)
            np.testing.assert_array_equal(part.boxes[i], box)


def test_a_kept_file_is_read_and_a_damaged_one_drawn_again(small, own_folders, monkeypatch):
    (path,) = own_folders.glob("scenes-*.npz")
    drew = []
    draw = recordings._draw
    monkeypatch.setattr(recordings, "_draw", lambda *a: drew.append(1) or draw(*a))
    recordings.drawn.cache_clear()
    assert recordings.drawn(**SMALL).fingerprint() == small.fingerprint()
    assert not drew
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    recordings.drawn.cache_clear()
    assert recordings.drawn(**SMALL).fingerprint() == small.fingerprint()
    assert drew
    assert list(own_folders.glob("*.damaged-*"))


def test_batches_are_whole_and_a_box_moves_with_its_picture():
    """A white box on black is found again, by its pixels, where the batch says it is."""
    clips = np.zeros((9, 2, 16, 16, 3), np.uint8)
    boxes = np.zeros((9, 4), np.float32)
    for i in range(9):
        x, y = 3 + i % 4, 4 + i % 3
        clips[i, :, y : y + 6, x : x + 5] = 255
        boxes[i] = [(x + 2.5) / 16, (y + 3) / 16, 5 / 16, 6 / 16]
    clips = recordings.side_by_side(clips)
    part = recordings.Part(clips, boxes, np.arange(9) % 7, np.arange(9), np.ones(9, bool))
    batches = recordings.Clips(part, batch_size=4, seed=5, pad=2, flip=True, shuffle=True)
    seen, moved = [], 0
    for batch in batches(3):
        for image, box, index in zip(batch.images, batch.boxes, batch.index, strict=True):
            rows, columns = np.nonzero(image[4].numpy() > 0)
            found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            cx, cy, w, h = box.numpy() * 16
            np.testing.assert_allclose(
                found, [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], atol=1e-4
            )
            moved += not np.allclose(box, boxes[index])
            assert image.shape == (6, 16, 16)
            seen.append(int(index))
    assert sorted(seen) == list(range(9))
    assert moved > 3
    assert {float(batch.images.min()), float(batch.images.max())} == {-0.5, 0.5}


def test_a_view_is_a_window_of_the_padded_clip_flipped_or_not(small):
    batches = recordings.Clips(small.train, batch_size=99, seed=1, pad=3, flip=True)
    (batch,) = batches(2)
    flipped, down, right = np.asarray(batches.views(2))
    assert len(set(flipped)) == 2
    assert len(set(down)) > 2
    side = small.train.clips.shape[1]
    for image, clip, flip, y, x in zip(
        batch.images, small.train.clips, flipped, down, right, strict=True
    ):
        padded = np.pad(clip, ((3, 3), (3, 3), (0, 0)))
        window = (padded[:, ::-1] if flip else padded)[y : y + side, x : x + side]
        expected = window.astype(np.float32) / 255 - 0.5
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_colours_of_a_frame_stand_together_and_frames_in_order():
    clips = np.arange(2 * 2 * 2 * 2 * 3).reshape(2, 2, 2, 2, 3)
    found = recordings.side_by_side(clips)
    assert found.shape == (2, 2, 2, 6)
    np.testing.assert_array_equal(found[1, 0, 1], [*clips[1, 0, 0, 1], *clips[1, 1, 0, 1]])


def test_plain_batches_are_the_clips(small):
    (batch,) = recordings.Clips(small.test, batch_size=99)(1)
    expected = small.test.clips[5, :, :, 5] / 255 - 0.5  # blue of the second frame
    np.testing.assert_allclose(batch.images[5, 5].numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(batch.boxes.numpy(), small.test.boxes, atol=1e-6)


# Folders


PEOPLE = (("Żaneta", 1), ("Jan", 1), ("Eve", 0), ("Bo", 0), ("Ivo", 0), ("Ola", 0))


def folder(path, people=PEOPLE, clips=3, frames=3):
    """A sound folder of recordings; returns its rows."""
    rows = []
    for k, (name, registered) in enumerate(people):
        for j in range(clips):
            place = path / "clips" / name / f"c{j}"
            place.mkdir(parents=True)
            for f in range(frames):
                picture = np.full((20, 24, 3), 40 * k + 10 * j + f, np.uint8)
                Image.fromarray(picture).save(place / f"frame_{f}.png")
            box = {"cx": 0.5, "cy": 0.5, "w": 0.4, "h": 0.6}
            emotion = scenes.EMOTIONS[(k + j) % 7]
            rows.append(
                {"clip": f"{name}/c{j}", "emotion": emotion, **box, "registered": registered}
            )
    write(path, rows)
    return rows


def write(path, rows, columns=recordings.COLUMNS):
    with open(path / "labels.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def read(path):
    return recordings.read_folder(path, frames=2, size=16)


def test_a_sound_folder_is_read_whole(tmp_path):
    folder(tmp_path)
    found = read(tmp_path)
    assert sum(len(part.clips) for part in found[:3]) == 18
    assert (found.registered, found.known) == (2, 2)
    assert found.train.registered.all()
    assert set(found.train.people.tolist()) == {0, 1}
    for part in (found.validation, found.test):
        assert set(part.people[part.registered].tolist()) == {0, 1}
        assert (~part.registered).sum() == 6
    assert found.fingerprint() == read(tmp_path).fingerprint()


def test_spaces_after_commas_do_no_harm(tmp_path):
    folder(tmp_path)
    text = (tmp_path / "labels.csv").read_text(encoding="utf-8")
    (tmp_path / "labels.csv").write_text(text.replace(",", ", "), encoding="utf-8")
    assert read(tmp_path).known == 2


def change(**values):
    def made(path, rows):
        rows[4] |= values
        write(path, rows)

    return made


def without_column(path, rows):
    write(path, rows, [c for c in recordings.COLUMNS if c != "emotion"])


def unreadable(path, rows):
    (path / "clips" / "Jan" / "c1" / "frame_2.png").write_bytes(b"no picture")


def short(path, rows):
    for f in (1, 2):
        (path / "clips" / "Jan" / "c1" / f"frame_{f}.png").unlink()


def renamed(path, rows):
    for f in range(4):
        frame = path / "clips" / "Jan" / "c1" / f"frame_{f}.png"
        if frame.exists():
            frame.rename(frame.with_name(f"IMG_{f}.png"))


def sound_alone(path, rows):
    av = pytest.importorskip("av", reason="PyAV is in the extra 'edge'")
    with av.open(str(path / "clips" / "Jan" / "c1.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        tone.sample_rate = 8000
        container.mux(stream.encode(tone))
        container.mux(stream.encode())
    change(clip="Jan/c1.mp4")(path, rows)


def one_clip(path, rows):
    write(path, [r for r in rows if r["clip"] not in ("Jan/c1", "Jan/c2")])


def no_strangers(path, rows):
    write(path, [r for r in rows if r["registered"]])


def linked_out(path, rows):
    shutil.rmtree(path / "clips" / "Jan" / "c1")
    (path / "clips" / "Jan" / "c1").symlink_to("/etc")


def not_utf8(path, rows):
    content = (path / "labels.csv").read_text(encoding="utf-8")
    (path / "labels.csv").write_bytes(content.encode("iso-8859-2"))


def written(path, between, first=""):
    """As spreadsheets write the table in some countries."""
    content = (path / "labels.csv").read_text(encoding="utf-8")
    (path / "labels.csv").write_text(first + content.replace(",", between), encoding="utf-8")


def twice(path, rows):
    write(path, [*rows, rows[4]])


def line_6(path, rows, change):
    lines = (path / "labels.csv").read_text(encoding="utf-8").splitlines()
    lines[5] = change(lines[5])
    (path / "labels.csv").write_text("\n".join(lines), encoding="utf-8")


def longer(path, rows):
    line_6(path, rows, lambda line: f"{line},more")


def shorter(path, rows):
    line_6(path, rows, lambda line: line.rpartition(",")[0])


FAULTS = {
    "no table": (
        lambda path, rows: (path / "labels.csv").unlink(),
        r"labels\.csv was .* No such f",
    ),
    "a column": (
        without_column,
        r"labels\.csv was not read .*'emotion'.*the columns clip, emotion,",
    ),
    "emotion": (
        change(emotion="joy"),
        r"line 6, clip 'Jan/c1': emotion is 'joy'; it must be one of sadness, ",
    ),
    "no emotion": (change(emotion="NA"), r"line 6, .*emotion is 'NA'; it must be one of sadness, "),
    "outside": (change(cx=0.9), r"line 6, clip 'Jan/c1': box is \['0.9', .* lie in the picture"),
    "no size": (change(w=0), r"line 6, clip 'Jan/c1': box is .*'0', '0.6'.; it must have a size"),
    "no number": (change(h="tall"), r"line 6, .*box is .*'tall'.; it must have a size"),
    "not finite": (change(h="nan"), r"line 6, .*box is .*'nan'.; it must have a size"),
    "endless": (change(cx="inf", w="inf"), r"line 6, .*box is .'inf', .*; it must have a size"),
    "registered": (change(registered="yes"), r"line 6, .*registered is 'yes'; it must be 0 or 1"),
    "in some lines": (change(registered=0), r"clip 'Jan/c0': registered is '1'; it must be so in "),
    "climbs out": (change(clip="../../Jan/c1"), r"line 6, clip '../../Jan/c1': .* and lie in"),
    "climbs, Windows": (change(clip="..\\Jan\\c1"), r"line 6, .* and lie in"),
    "absolute": (change(clip="/etc/passwd"), r"line 6, clip '/etc/passwd': .* and lie in"),
    "a root": (change(clip="/etc"), r"line 6, clip '/etc': .* and lie in"),
    "link": (linked_out, r"line 6, clip 'Jan/c1': .* and lie in"),
    "absent": (change(clip="Jan/c9"), r"line 6, clip 'Jan/c9': .* and lie in .*clips"),
    "too deep": (change(clip="Jan"), r"line 6, .*clip is 'Jan'; it must be <identity>/<clip>"),
    "unreadable": (unreadable, r"line 6, clip 'Jan/c1': .*frame_2\.png cannot be read"),
    "short": (
        short,
        r"line 6, clip 'Jan/c1': .*it has 1 frames \(frame_\*\.png, .*, and 2 are asked for",
    ),
    "a camera's names": (renamed, r"line 6, .*it has 0 frames \(frame_\*\.png, .* are asked for"),
    "sound alone": (sound_alone, r"line 6, .*c1\.mp4 cannot be read \(it holds no pictures\)"),
    "one clip": (one_clip, r"'Jan/c0': number of clips is 1; everybody needs 3"),
    "no strangers": (no_strangers, r"has 2 registered people and 0 others; 2 and 4"),
    "not UTF-8": (not_utf8, r"labels\.csv was not read .*; it must be UTF-8"),
    "tabs": (
        lambda path, rows: written(path, "\t"),
        r"labels\.csv was not read .*; it must be .* separated by commas",
    ),
    "sep=": (
        lambda path, rows: written(path, ",", "sep=,\n"),
        r"labels\.csv was not read .*; it must be .* have the columns clip, emotion",
    ),
    "semicolons": (
        lambda path, rows: written(path, ";"),
        r"labels\.csv was not read .*; it must be .* separated by commas",
    ),
    "twice": (twice, r"line 20, clip 'Jan/c1': .*it must have one line alone"),
    "a field too many": (longer, r"labels\.csv was not read .*line 6.*; it must "),
    "a field too few": (shorter, r"line 6, clip 'Jan/c1': registered is ''; it must be 0 or 1"),
    "no rows": (lambda path, rows: write(path, []), r"labels\.csv has 0 registered people and 0 "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_folder_is_named_with_row_and_file(fault, tmp_path):
    make, sentence = FAULTS[fault]
    make(tmp_path, folder(tmp_path))
    with pytest.raises(DataError, match=sentence):
        read(tmp_path)


def film(path, pictures, rate=10):
    """A video file of pictures (F, H, W, 3)."""
    av = pytest.importorskip("av", reason="PyAV is in the extra 'edge'")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def is_read(path, rows, picture):
    """Assert that the film c1.mp4 of Jan's ends with this picture."""
    rows[4]["clip"] = "Jan/c1.mp4"
    write(path, rows)
    found = recordings.read_folder(path, frames=2, size=64)
    whole = np.concatenate([part.clips for part in found[:3]])
    nearest = min(np.abs(clip[..., 3:].astype(int) - picture).mean() for clip in whole)
    assert nearest < 12  # the codec's loss


def test_a_video_file_is_a_clip_and_a_broken_one_is_named(tmp_path):
    rows = folder(tmp_path)
    pictures, _ = scenes.clip(3, 2, seed=0, index=0, frames=4, size=64)
    film(tmp_path / "clips" / "Jan" / "c1.mp4", pictures)
    is_read(tmp_path, rows, pictures[3])
    (tmp_path / "clips" / "Jan" / "c1.mp4").write_bytes(b"no video at all")
    with pytest.raises(DataError, match=r"line 6, clip 'Jan/c1\.mp4': .*c1\.mp4 cannot be read"):
        read(tmp_path)


QUARTERS = {  # the matrix of a film's header, of how it is to be turned clockwise
    0: (1, 0, 0, 1),
    90: (0, 1, -1, 0),
    180: (-1, 0, 0, -1),
    270: (0, -1, 1, 0),
}


def turned(path, degrees):
    """Write into an MP4 file that players turn it: as telephones do, which store it as it came."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    a, b, c, d = (65536 * v for v in QUARTERS[degrees])
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


@pytest.mark.parametrize("degrees", QUARTERS)
def test_a_film_is_read_upright_as_players_show_it(tmp_path, degrees):
    rows, (pictures, _) = folder(tmp_path), scenes.clip(3, 2, seed=0, index=0, frames=4, size=64)
    path = tmp_path / "clips" / "Jan" / "c1.mp4"
    film(path, np.ascontiguousarray(np.rot90(pictures, degrees // 90, axes=(1, 2))))
    turned(path, degrees)
    is_read(tmp_path, rows, pictures[3])


def test_a_long_film_is_never_in_memory_whole(tmp_path, monkeypatch):
    folder(tmp_path)
    film(tmp_path / "long.mp4", np.zeros((60, 32, 32, 3), np.uint8))
    alive, most, plain = weakref.WeakSet(), [0], recordings.video

    class Held:  # a frame itself cannot be watched
        def __init__(self, frame):
            self.frame = frame
            alive.add(self)

        def __getattr__(self, name):
            return getattr(self.frame, name)

    def counted(source):
        for held in map(Held, plain(source)):
            most[0] = max(most[0], len(alive))
            yield held
            del held

    monkeypatch.setattr(recordings, "video", counted)
    assert recordings._frames(tmp_path / "long.mp4", "here", 8, 16).shape == (8, 16, 16, 3)
    assert most[0] <= 3


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    for k in range(1, 13):
        grey = Image.fromarray(np.full((16, 16, 3), 20 * k, np.uint8))
        grey.save(tmp_path / f"frame_{k}.png")
    found = recordings._frames(tmp_path, "here", 12, 16)
    assert found[:, 0, 0, 0].tolist() == [20 * k for k in range(1, 13)]


@pytest.mark.parametrize(("on_disk", "in_table"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_one_name_in_two_spellings_is_one_person(tmp_path, on_disk, in_table):
    rows = folder(tmp_path)
    (tmp_path / "clips" / "Jan").rename(tmp_path / "clips" / normalize(on_disk, "Zoë"))
    for k, row in enumerate(rows):
        form = in_table if k % 2 else on_disk
        row["clip"] = row["clip"].replace("Jan", normalize(form, "Zoë"))
    write(tmp_path, rows)
    assert read(tmp_path).known == 2


def test_a_field_may_hold_any_letter_that_is_no_line_end(tmp_path):
    rows = folder(tmp_path)
    odd = "c\u2028one\x85"
    (tmp_path / "clips" / "Jan" / "c1").rename(tmp_path / "clips" / "Jan" / odd)
    rows[4]["clip"] = f"Jan/{odd}"
    write(tmp_path, rows)
    assert read(tmp_path).known == 2


# As databases of faces are: greyscale, wider than high, one box for all


def database(path, people=15):
    """A folder of recordings like the Yale faces: from a normal face to the expression."""
    rows, box = [], {"cx": 0.5, "cy": 0.55, "w": 0.55, "h": 0.85}
    for k, emotion in itertools.product(range(people), ("happiness", "sadness", "surprise")):
        drawn, _ = scenes.clip(
            k, scenes.EMOTIONS.index(emotion), seed=0, index=k, frames=3, size=64
        )
        place = path / "clips" / f"subject{k:02d}" / emotion
        place.mkdir(parents=True)
        for f, picture in enumerate(drawn):
            Image.fromarray(picture).convert("L").resize((320, 243)).save(place / f"frame_{f}.png")
        row = {"clip": f"subject{k:02d}/{emotion}", "emotion": emotion, **box}
        rows.append(row | {"registered": int(k < people - 6)})
    write(path, rows)


def test_a_database_of_grey_faces_is_read_as_recordings(tmp_path):
    database(tmp_path)
    found = recordings.read_folder(tmp_path, frames=3, size=32)
    assert found.registered == 9
    assert sum(len(part.clips) for part in found[:3]) == 45
    assert set(found.train.emotions.tolist()) == {
        scenes.EMOTIONS.index(name) for name in ("happiness", "sadness", "surprise")
    }
