"""What people put before the device: odd films, photographs and databases, each answered rightly.

The network is made by hand: a head is what is bright, and who it is its colour.
"""

import json
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_recordings import QUARTERS, film, turned
from typer.testing import CliRunner

from kdutils import files, notebooks
from kdutils.concierge import program, recordings, scenes
from kdutils.concierge.people import People, TotemError

av = pytest.importorskip("av", reason="PyAV is in the extra 'edge'")
pytest.importorskip("onnxruntime", reason="engines are in the extra 'edge'")

SIZE, FRAMES = 32, 4
RED, BLUE, GREEN = (230, 60, 60), (60, 60, 230), (60, 230, 60)


class Seer(torch.nn.Module):
    """From clips (B, 12, S, S) to seven emotions, a box and a person: where light is, in colour."""

    def forward(self, clips):
        middle = clips[:, 6:9] + 0.5
        bright = middle.amax(1).flatten(1)
        share = torch.softmax(20 * bright, 1)
        pixels = torch.arange(SIZE**2)
        x, y = (pixels % SIZE + 0.5) / SIZE, (pixels // SIZE + 0.5) / SIZE
        centre = torch.stack([share @ x, share @ y], 1)
        colour = (middle.flatten(2) * share[:, None]).sum(2)
        person = colour - colour.mean(1, keepdim=True)
        sides = torch.full_like(centre, 0.4)
        return torch.cat([torch.zeros_like(clips[:, :7, 0, 0]), centre, sides, person], 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a device that tells heads by their colours."""
    study = notebooks.procedure("concierge", {"scale": "laptop", "train_missing": False})
    folder = tmp_path_factory.mktemp("seer")
    clip = np.zeros((1, 3 * FRAMES, SIZE, SIZE), np.float32)
    study["exported"](Seer(), clip, folder / "student.onnx")
    content = {"frames": FRAMES, "size": SIZE, "emotions": list(scenes.EMOTIONS)}
    content |= {"levels": [[1, 1, 0.9, 0.95]], "cosines": {"1": [[0.0, 0.5], [0.9, 1.0]]}}
    content["least"] = {"nobody": 0.6, "alike": 0.5, "small": 0.1, "dark": 20, "blurred": 0.001}
    content["heads"] = {"emotion": [0, 7], "face": [7, 11], "embedding": [11, 14]}
    content["files"] = {"student.onnx": files.sha256(folder / "student.onnx")}
    (folder / "model.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def heads(colour, count=8, at=(28, 36), size=(64, 64)):
    """Pictures (count, H, W, 3) of a bright disc in a dark room."""
    rows, columns = np.mgrid[: size[1], : size[0]]
    inside = (rows - at[1]) ** 2 + (columns - at[0]) ** 2 < 100
    picture = np.where(inside[..., None], np.array(colour), 40).astype(np.uint8)
    return np.stack([picture] * count)


@pytest.fixture
def device(model, tmp_path):
    """The program, with this model and a fresh database; ``device.said`` is what it said last."""

    def run(*words):
        options = [] if "--database" in words else ["--database", tmp_path / "p.sqlite3"]
        options += (
            ["--model", run.model, "--every", 1] if words[0] in ("enrol", "recognise") else []
        )
        found = CliRunner().invoke(program.app, list(map(str, [*words, *options])))
        run.said = found.output
        if found.exception:
            raise found.exception
        return [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]

    run.model = model
    return run


def answers(lines):
    return [line["person"] or line["answer"] for line in lines]


@pytest.fixture
def of(tmp_path):
    """The path of a film of a head in this colour."""

    def made(colour, name, **options):
        film(tmp_path / name, heads(colour, **options))
        return tmp_path / name

    return made


def test_colours_are_told_apart(device, of):
    device("enrol", "Ada", of(RED, "ada.mp4"))
    device("enrol", "Bo", of(BLUE, "bo.mp4", at=(40, 30)))
    assert answers(device("recognise", of(RED, "door.mp4", at=(34, 28)))) == ["Ada"] * 2
    assert answers(device("recognise", of(BLUE, "door.mp4"))) == ["Bo"] * 2
    assert answers(device("recognise", of(GREEN, "door.mp4"))) == ["stranger"] * 2


@pytest.mark.parametrize("light", [0, 90, 255])
def test_a_wall_is_nobody_and_is_not_enrolled(device, tmp_path, light):
    Image.new("RGB", (90, 60), (light,) * 3).save(tmp_path / "wall.png")
    (line,) = device("recognise", tmp_path / "wall.png")
    assert (line["answer"], line["person"], line["clips"]) == ("nobody", None, 0)
    with pytest.raises(TotemError, match="of the clips: 1 nobody or two people"):
        device("enrol", "Ada", tmp_path / "wall.png")
    assert not (tmp_path / "p.sqlite3").exists()


def test_two_people_are_not_enrolled_as_one(device, of, tmp_path):
    with pytest.raises(TotemError, match=r"ada\.mp4, clip 1, and the others do not look like one"):
        device("enrol", "both", of(RED, "ada.mp4"), of(BLUE, "bo.mp4"))
    assert not (tmp_path / "p.sqlite3").exists()


def resized(path):
    """A film of a head whose pictures become larger after the first clip, as Motion JPEG allows."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        small = Image.fromarray(heads(RED)[0])
        for k, side in enumerate([64] * FRAMES + [128] * FRAMES):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height, encoder.pix_fmt = side, side, "yuvj420p"
            encoder.time_base = Fraction(1, 10)
            for packet in encoder.encode(av.VideoFrame.from_image(small.resize((side, side)))):
                packet.stream, packet.time_base = stream, encoder.time_base
                packet.pts = packet.dts = k
                container.mux(packet)


def test_a_film_may_change_its_size_midway(device, tmp_path):
    resized(tmp_path / "grows.mkv")
    sizes = [frame.width for frame in recordings.video(str(tmp_path / "grows.mkv"))]
    assert sizes == [64] * 4 + [128] * 4
    device("enrol", "Ada", tmp_path / "grows.mkv")
    lines = device("recognise", tmp_path / "grows.mkv", "--video", tmp_path / "seen.mp4")
    assert answers(lines) == ["Ada", "Ada"]
    np.testing.assert_allclose(lines[0]["box"], lines[1]["box"], atol=0.02)
    assert [f.width for f in recordings.video(str(tmp_path / "seen.mp4"))] == [64] * 8


def test_who_learned_from_squares_is_shown_the_middle_square(device, of, model, tmp_path):
    """At 128 × 72 pixels, with a lamp outside the square; the box is the whole picture's."""
    wide = heads(RED, at=(60, 40), size=(128, 72))
    film(tmp_path / "wide.mp4", wide)
    lit = wide.copy()
    lit[:, 10:30, :20] = 255
    film(tmp_path / "lit.mp4", lit)
    Image.fromarray(lit[0]).save(tmp_path / "lit.png")
    square = tmp_path / "square"
    shutil.copytree(model, square)
    told = json.loads((square / "model.json").read_text(encoding="utf-8")) | {"square": True}
    (square / "model.json").write_text(json.dumps(told), encoding="utf-8")
    device.model = square
    for name in ("wide.mp4", "lit.mp4", "lit.png"):
        box = device("recognise", tmp_path / name)[0]["box"]
        side = 0.4 * 72 / 128
        np.testing.assert_allclose(box, [60.5 / 128, 40.5 / 72, side, 0.4], atol=0.02)
    device.model = model  # it learned from whole pictures, squashed
    box = device("recognise", tmp_path / "wide.mp4")[0]["box"]
    np.testing.assert_allclose(box, [60.5 / 128, 40.5 / 72, 0.4, 0.4], atol=0.02)
    assert device("recognise", tmp_path / "lit.mp4")[0]["box"][0] < 0.3


def test_a_film_is_never_written_over_its_source(device, of, tmp_path):
    source = of(RED, "a.mp4")
    (tmp_path / "same.mp4").hardlink_to(source)
    for video in (source, tmp_path / "same.mp4"):
        with pytest.raises(TotemError, match=r"--video would overwrite .*a\.mp4"):
            device("recognise", source, "--video", video)
    photograph = tmp_path / "a.jpg"
    photograph.write_bytes(b"a photograph")
    with pytest.raises(TotemError, match=r"--video makes a film .* not .*a\.jpg"):
        device("recognise", source, "--video", photograph)
    assert photograph.read_bytes() == b"a photograph"
    with pytest.raises(TotemError, match=r"no/b\.mp4 cannot be written \(its folder is not there"):
        device("recognise", source, "--video", tmp_path / "no" / "b.mp4")


def test_what_holds_no_pictures_says_so(device, tmp_path):
    with wave.open(str(tmp_path / "talk.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    with pytest.raises(TotemError, match=r"talk\.wav cannot be read \(it holds no pictures\)"):
        device("recognise", tmp_path / "talk.wav")
    with pytest.raises(TotemError, match=r"talk\.wav cannot be read \(it holds no pictures\)"):
        device("enrol", "Ada", tmp_path / "talk.wav")


def cut(path, share=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    return path


def test_of_a_film_that_was_cut_off_the_whole_clips_are_seen_or_it_is_named(device, of, tmp_path):
    device("enrol", "Ada", of(RED, "ada.mp4"))
    with pytest.raises(TotemError, match=r"door\.mp4 cannot be read"):  # its index was at the end
        device("recognise", cut(of(RED, "door.mp4", count=40)))
    seen = answers(device("recognise", cut(of(RED, "door.mkv", count=40))))
    assert 2 < len(seen) < 10
    assert set(seen) == {"Ada"}
    with pytest.raises(TotemError, match=r"bo\.mp4 cannot be read"):
        device("enrol", "Bo", cut(of(BLUE, "bo.mp4")))
    Image.fromarray(heads(BLUE)[0]).resize((200, 200)).save(tmp_path / "bo.png")
    with pytest.raises(TotemError, match=r"bo\.png cannot be read"):
        device("enrol", "Bo", cut(tmp_path / "bo.png"))
    device("list")
    assert device.said == "Ada\n"


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("mark", range(1, 9))
def test_a_photograph_is_seen_as_its_exif_mark_says(device, tmp_path, mark, kind):
    """The JPEG is large enough to be decoded at a part of its size."""
    upright = Image.fromarray(heads(RED, at=(16, 24), size=(64, 96))[0])
    upright = upright if kind == "png" else upright.resize((640, 960))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transposition that undoes each
    stored = upright if mark == 1 else upright.transpose(Image.Transpose(back[mark]))
    exif = Image.Exif()
    exif[274] = mark
    stored.save(tmp_path / f"ada.{kind}", exif=exif)
    (line,) = device("recognise", tmp_path / f"ada.{kind}")
    np.testing.assert_allclose(line["box"][:2], [16 / 64, 24 / 96], atol=0.03)


@pytest.mark.parametrize("degrees", QUARTERS)
def test_a_film_is_seen_as_its_mark_says(device, tmp_path, degrees):
    pictures = np.rot90(heads(RED, at=(16, 36)), degrees // 90, axes=(1, 2))
    film(tmp_path / "a.mp4", np.ascontiguousarray(pictures))
    turned(tmp_path / "a.mp4", degrees)
    for line in device("recognise", tmp_path / "a.mp4"):
        np.testing.assert_allclose(line["box"][:2], [16 / 64, 36 / 64], atol=0.03)


def test_who_looks_like_somebody_enrolled_is_said(device, of, tmp_path):
    device("enrol", "Ada", of(RED, "ada.mp4"))
    device("enrol", "Bo", of(BLUE, "bo.mp4"))
    assert "looks like" not in device.said
    device("enrol", "Ida", of(RED, "ida.mp4"))
    assert "Ida looks like Ada: they will be mistaken." in device.said
    device("enrol", "Ada", of(RED, "again.mp4"), "--add")
    assert "Ada looks like Ida: they" in device.said


def test_a_database_may_lie_in_a_folder_that_is_not_there_yet(device, of, tmp_path):
    device(
        "enrol", "Ada", of(RED, "ada.mp4"), "--database", tmp_path / "new" / "door" / "d.sqlite3"
    )
    device("list", "--database", tmp_path / "new" / "door" / "d.sqlite3")
    assert device.said == "Ada\n"


def test_a_camera_that_goes_away_is_said_and_the_film_can_be_played(device, tmp_path, monkeypatch):
    def camera(source):
        for picture in heads(RED, count=10):
            yield av.VideoFrame.from_ndarray(picture)
        raise OSError(19, "No such device")

    monkeypatch.setattr(recordings, "video", camera)
    with pytest.raises(TotemError, match=r"/dev/video0 cannot be read .*No such device"):
        device("recognise", "/dev/video0", "--video", tmp_path / "seen.mp4")
    assert device.said.count('"answer": "stranger"') == 2
    monkeypatch.undo()
    assert len(list(recordings.video(str(tmp_path / "seen.mp4")))) == 8


def test_whoever_is_forgotten_or_enrolled_meanwhile_is_so_at_once(
    device, of, tmp_path, monkeypatch
):
    """While the program looks at a camera, another one is given the command."""
    device("enrol", "Ada", of(RED, "ada.mp4"))
    others = {4: ["forget", "Ada"], 8: ["enrol", "Ida", of(RED, "ida.mp4")]}
    video = recordings.video

    def camera(source):
        if source != "/dev/video0":
            yield from video(source)
            return
        for k, picture in enumerate(heads(RED, count=12)):
            if k in others:
                said = CliRunner().invoke(program.app, list(map(str, [*others[k], *options])))
                assert said.exit_code == 0, said.output
            yield av.VideoFrame.from_ndarray(picture)

    options = ["--database", tmp_path / "p.sqlite3"]
    others[8] += ["--model", device.model, "--every", "1"]
    monkeypatch.setattr(recordings, "video", camera)
    assert answers(device("recognise", "/dev/video0")) == ["Ada", "stranger", "Ida"]


def test_damaged_databases_are_named_and_left_as_they_are(device, of, tmp_path):
    path = tmp_path / "p.sqlite3"
    device("enrol", "Ada", of(RED, "ada.mp4"))
    with People.opened(path) as people:
        for k in range(200):  # several pages
            people.database.execute("INSERT INTO people VALUES (?, x'00', 'm', 1)", [f"Bo {k}"])
        people.database.commit()
    cut(path)
    left = path.read_bytes()
    for words in (["recognise", of(RED, "a.mp4")], ["enrol", "Ce", of(BLUE, "b.mp4")], ["list"]):
        with pytest.raises(TotemError, match=r"p\.sqlite3 is damaged or not ours"):
            device(*words)
    assert path.read_bytes() == left
    path.write_bytes(b"")  # an empty file is an empty database
    assert answers(device("recognise", of(RED, "a.mp4"))) == ["stranger"] * 2
    device("enrol", "Ada", of(RED, "a.mp4"))
    device("list")
    assert device.said == "Ada\n"


def test_a_database_is_made_its_owners_alone_and_another_programs_is_left(device, of, tmp_path):
    path = tmp_path / "p.sqlite3"
    device("enrol", "Ada", of(RED, "ada.mp4"))
    for before, after in ((0o644, 0o600), (0o444, 0o400)):  # the first is of the first version
        path.chmod(before)
        device("list")
        assert path.stat().st_mode & 0o777 == after
    other = tmp_path / "other.sqlite3"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE theirs (x)")
    other.chmod(0o644)
    left = other.read_bytes()
    for words in (["list"], ["recognise", of(RED, "a.mp4")], ["enrol", "Bo", of(BLUE, "b.mp4")]):
        with pytest.raises(TotemError, match=r"other\.sqlite3 is damaged or not ours"):
            device(*words, "--database", other)
    assert (other.read_bytes(), other.stat().st_mode & 0o777) == (left, 0o644)


def test_a_database_that_another_tool_gave_a_wal_keeps_nothing_there(device, of, tmp_path):
    path = tmp_path / "p.sqlite3"
    device("enrol", "Ada", of(RED, "ada.mp4"))
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA journal_mode = WAL")
    database.close()
    with People.opened(path) as people:
        people.add("Bo", np.arange(3, dtype="<f4"), "m")
        assert not list(tmp_path.glob("p.sqlite3-*"))
    device("forget", "--all")
    held = path.read_bytes()
    assert not [name for name in (b"Ada", b"Bo") if name in held]


def test_a_databases_name_is_a_files_name(device, of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    device("enrol", "Ada", of(RED, "ada.mp4"), "--database", ":memory:")
    device("list", "--database", ":memory:")
    assert device.said == "Ada\n"


def test_names_are_one_without_spaces_around_and_said_in_every_encoding(device, of):
    device("enrol", " Żoë ", of(RED, "ada.mp4"))
    with pytest.raises(TotemError, match="'Żoë' is enrolled already"):
        device("enrol", "Żoë", of(RED, "ada.mp4"))
    (line, _) = device("recognise", of(RED, "a.mp4"))
    assert line["person"] == "Żoë"
    assert device.said.isascii()
    device("list", "--json")
    assert (json.loads(device.said), device.said.isascii()) == (["Żoë"], True)


def test_on_a_full_disk_who_is_forgotten_is_so(device, of, tmp_path, monkeypatch):
    """What overwrites a person needs no room; what makes the file smaller does."""
    device("enrol", "Ada", of(RED, "ada.mp4"))
    kept = People.remove

    def remove(self, name=""):
        connection, self.database = self.database, Full(self.database)
        kept(self, name)
        self.database = connection

    class Full:
        def __init__(self, database):
            self.own = database

        def __enter__(self):
            return self.own.__enter__()

        def __exit__(self, *error):
            return self.own.__exit__(*error)

        def execute(self, text, *given):
            if text == "VACUUM":
                raise sqlite3.OperationalError("database or disk is full")
            return self.own.execute(text, *given)

    monkeypatch.setattr(People, "remove", remove)
    device("forget", "Ada")
    assert device.said == "Ada is forgotten\n"
    device("list")
    assert device.said == ""


def test_of_a_database_that_may_only_be_read_people_are_recognised(
    device, of, tmp_path, monkeypatch
):
    connect = sqlite3.connect
    device("enrol", "Ada", of(RED, "ada.mp4"))
    monkeypatch.setattr(sqlite3, "connect", lambda at, **_: connect(f"file:{at}?mode=ro", uri=True))
    assert answers(device("recognise", of(RED, "a.mp4"))) == ["Ada"] * 2
    for words in (["enrol", "Bo", of(BLUE, "b.mp4")], ["forget", "Ada"], ["forget", "--all"]):
        with pytest.raises(TotemError, match=r"p\.sqlite3 cannot be used now .*readonly"):
            device(*words)
    device("list")
    assert device.said == "Ada\n"


def test_forgetting_one_of_a_thousand_takes_less_than_a_second(device, tmp_path):
    rng = np.random.default_rng(0)
    with People.opened(tmp_path / "p.sqlite3", new=True) as people:
        rows = [(f"P{k}", rng.random(32, "f4").tobytes(), "m", 1) for k in range(1000)]
        people.database.executemany("INSERT INTO people VALUES (?, ?, ?, ?)", rows)
        people.database.commit()
    started = time.perf_counter()
    device("forget", "P500")
    assert time.perf_counter() - started < 1
    assert rows[500][1] not in (tmp_path / "p.sqlite3").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_large_film_is_looked_at_faster_than_it_plays_in_little_memory(model, tmp_path):
    """As a user does it, on one thread; 1280 × 720 at 30 frames a second, annotated."""
    path, many = tmp_path / "large.mp4", 30 * 12  # a shorter one would measure the start
    picture = np.asarray(Image.fromarray(heads(RED)[0]).resize((1280, 720)))
    film(path, np.stack([picture] * many), rate=30)
    code = """
import sys
from pathlib import Path
from kdutils.__main__ import main
try:
    main()
finally:  # getrusage would count what the test's own process has had
    print(Path("/proc/self/status").read_text(encoding="utf-8"), file=sys.stderr)
"""
    words = ["recognise", path, "--model", model, "--database", tmp_path / "none.sqlite3"]
    words += ["--video", tmp_path / "seen.mp4", "--threads", "1"]
    command = [sys.executable, "-c", code, "concierge", *map(str, words)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(command, capture_output=True, encoding="utf-8")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == many // (6 * FRAMES)
    taken = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert taken < many / 30  # of the processor, its start too: other tests run beside
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", run.stderr)
    assert int(peak) < 600_000
