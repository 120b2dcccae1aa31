"""The device's program: enrol people from a clip, recognise them, forget them. No PyTorch.

The totem is the paper's word for the device. Reads what the study's last run wrote (``model.json``
and the files it names), asks OpenVINO or ONNX Runtime, and keeps embeddings in SQLite. It must not
know how networks are trained.
"""

import json
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Annotated
from unicodedata import normalize

import numpy as np
import typer

from kdutils import files
from kdutils.concierge import board, recordings

HEADS = ("emotion", "face", "embedding")
STUDENT = {"openvino": "student-int8.xml", "onnxruntime": "student.onnx"}  # which file it reads
app = typer.Typer(help="Box, emotion, and who it is, on a device.", pretty_exceptions_enable=False)


class TotemError(RuntimeError):
    """A model, a database, a video or a name cannot be used; the message says which and why."""


class Totem:
    """A student in an engine, as ``model.json`` in ``folder`` describes it.

    ``engine`` is ``openvino`` (int8), ``onnxruntime``, or empty for the first that is there.
    Raises :class:`TotemError` naming the file that is absent or damaged, and
    :class:`board.EngineError` where no engine reads it.
    """

    def __init__(self, folder: Path, engine: str = "", threads: int = 0):
        path = folder / "model.json"
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            self.frames, self.size, self.emotions = told["frames"], told["size"], told["emotions"]
            self.heads = {name: slice(*map(int, told["heads"][name])) for name in HEADS}
            self.threshold, named = float(told["threshold"]), dict(told["files"])
            self.people = int(told.get("false_accepts", {}).get("people", 0))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what_now = "run the study, or name its folder"
            raise TotemError(f"{path} is absent or damaged ({error!r}): {what_now}") from None
        for name, expected in named.items():
            file = folder / name
            if Path(name).name != name or not file.exists() or files.sha256(file) != expected:
                raise TotemError(f"{file} is absent or damaged: {path} names another SHA-256")
        self.identity = files.sha256(path)
        engine = board.chosen(engine, [name for name in STUDENT if STUDENT[name] in named])
        self._look, _ = board.opened(engine, folder / STUDENT[engine], threads)

    def look(self, clip: np.ndarray) -> dict:
        """What is seen in a clip (F, S, S, 3) uint8: probabilities, box, embedding (D,)."""
        values = clip.transpose(1, 2, 0, 3).reshape(self.size, self.size, -1)
        values = values.transpose(2, 0, 1)[None].astype(np.float32) / 255 - np.float32(0.5)
        out = self._look(np.ascontiguousarray(values))[0]
        logits = out[self.heads["emotion"]]
        powers = np.exp(logits - logits.max())
        found = {"probabilities": powers / powers.sum(), "box": out[self.heads["face"]]}
        return found | {"embedding": _unit(out[self.heads["embedding"]])}


def _unit(values: np.ndarray) -> np.ndarray:
    return values / max(float(np.linalg.norm(values)), 1e-12)


class People:
    """Enrolled people: one embedding each, in an SQLite file of their own."""

    TABLE = "people (name TEXT PRIMARY KEY, embedding BLOB NOT NULL, model TEXT NOT NULL)"

    def __init__(self, path: Path, database: sqlite3.Connection):
        self.path, self.database = path, database

    @classmethod
    @contextmanager
    def opened(cls, path: Path, new: bool = False) -> Iterator["People"]:
        """Those in a file, which ``new`` makes where there is none.

        Raises :class:`TotemError` where the file is absent, damaged, no database of ours, or cannot
        be used: locked by another program, not to be written, on a full disk.
        """
        if not path.exists():
            if not new:
                raise TotemError(f"{path} does not exist: nobody is enrolled")
            path.touch(0o600)  # its owner's alone, and so is SQLite's journal
        try:
            with closing(sqlite3.connect(path)) as database:
                database.execute("PRAGMA secure_delete = ON")  # what is removed is overwritten
                database.create_function("nfc", 1, partial(normalize, "NFC"))  # one spelling of ë
                (state,) = database.execute("PRAGMA quick_check").fetchone()
                database.execute(f"CREATE TABLE IF NOT EXISTS {cls.TABLE}")
                columns = [column[1] for column in database.execute("PRAGMA table_info(people)")]
                if [state, *columns] != ["ok", "name", "embedding", "model"]:
                    raise sqlite3.DatabaseError(f"{state}; columns: {', '.join(columns)}")
                yield cls(path, database)
        except sqlite3.Error as error:
            busy = isinstance(error, sqlite3.OperationalError)
            what = "cannot be used now" if busy else "is damaged and was not used"
            raise TotemError(f"{path} {what} ({error})") from None

    def add(self, name: str, embedding: np.ndarray, model: str) -> None:
        """Keep a person's embedding (D,); a name that is there already is refused."""
        if not name.strip():
            raise TotemError("the name is empty")
        row = (name, embedding.astype("<f4").tobytes(), model)
        try:
            with self.database:
                self.database.execute("INSERT INTO people VALUES (nfc(?), ?, ?)", row)
        except sqlite3.IntegrityError:
            raise TotemError(f"{name!r} is enrolled already; forget {name!r} first") from None

    def remove(self, name: str = "") -> None:
        """Remove a person's data, or that of all; what the file held of it is overwritten."""
        which = " WHERE nfc(name) = nfc(?)" if name else ""
        with self.database:
            gone = self.database.execute(f"DELETE FROM people{which}", [name] * bool(name)).rowcount
        if name and not gone:
            raise TotemError(f"{name!r} is not enrolled in {self.path}")
        self.database.execute("VACUUM")

    def names(self) -> list[str]:
        """All enrolled people, in the order of their names."""
        return [name for (name,) in self.database.execute("SELECT name FROM people ORDER BY name")]

    def gallery(self, model: str, width: int) -> tuple[list[str], np.ndarray]:
        """Names, and their embeddings (N, D); all must have been made by this model."""
        rows = self.database.execute("SELECT name, embedding, model FROM people ORDER BY name")
        names, found = [], []
        for name, content, made_by in rows:
            if made_by != model:
                raise TotemError(f"{name!r} was enrolled with another model: forget and enrol anew")
            values = np.frombuffer(content, "<f4") if len(content) == 4 * width else None
            if values is None or not np.isfinite(values).all():
                raise TotemError(f"{self.path} is damaged: the embedding of {name!r} is none")
            names.append(name)
            found.append(values)
        return names, np.array(found).reshape(len(names), width)


def recognised(embedding, names: list[str], gallery, threshold: float) -> tuple[str | None, float]:
    """The enrolled person with the largest cosine, None below the threshold, and that cosine."""
    if not names:
        return None, -1.0
    cosines = gallery @ embedding
    best = int(cosines.argmax())
    return (names[best] if cosines[best] > threshold else None), float(cosines[best])


def clips(source: str, frames: int, size: int, every: int = 1) -> Iterator[tuple]:
    """Clips (F, S, S, 3) uint8 of a video file or camera (/dev/video0), with their frames.

    Of the video, every so many-th frame is looked at. Clips follow one another; an end that is
    shorter is left out. Raises :class:`TotemError` naming a video that cannot be read or is shorter
    than a clip.
    """
    held, any_yet = [], False
    try:
        for frame in recordings.video(source):
            held.append(frame)
            if len(held) == frames * every:
                pictures = map(recordings.upright, held[::every])
                yield np.stack([recordings.squashed(one, size) for one in pictures]), held
                held, any_yet = [], True
    except Exception as error:  # whatever PyAV raises
        raise TotemError(f"{source} cannot be read ({error})") from None
    if not any_yet:
        raise TotemError(f"{source} has {len(held)} frames; a clip needs {frames * every}")


@contextmanager
def film(path: Path) -> Iterator[Callable]:
    """A function that adds frames to a video file, with a box and a text drawn in.

    It plays as fast as where the frames are from. ``box`` is cx, cy, w, h in shares of the picture.
    Raises :class:`TotemError` where the file cannot be written.
    """
    import av
    from PIL import ImageDraw

    try:
        path.parent.stat()  # a folder that is not there would be noticed at the first frame
        container = av.open(f"file:{path}", "w")
        stream = container.add_stream("mpeg4", rate=25, pix_fmt="yuv420p")
    except (av.FFmpegError, ValueError, OSError) as error:
        raise TotemError(f"{path} cannot be written ({error})") from None

    def add(frames: list, box, text: str) -> None:
        for frame in frames:
            picture = recordings.upright(frame)
            cx, cy, w, h = (box * np.array(picture.size * 2)).tolist()
            drawing = ImageDraw.Draw(picture)
            edges = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
            drawing.rectangle(edges, outline=(0, 255, 0), width=2)
            drawing.text((4, 4), text, fill=(0, 255, 0))
            if not stream.codec_context.is_open:
                stream.width, stream.height = picture.size
                if lasted := (frames[-1].time or 0) - (frames[0].time or 0):  # else it is unknown
                    each = Fraction(lasted / (len(frames) - 1)).limit_denominator(30_000)
                    stream.codec_context.time_base = each
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))

    with container:
        try:
            yield add
        finally:  # without what is left the file cannot be played
            container.mux(stream.encode())


def newest() -> Path:
    """The folder that the study wrote last on this machine."""
    from kdutils import records

    found = list((records.runs_folder() / "concierge").glob("edge-*/model.json"))
    if not found:
        raise TotemError("no model on this machine: run the study, or name a folder with --model")
    return max(found, key=lambda path: path.stat().st_mtime).parent


Model = Annotated[Path | None, typer.Option(help="Folder with model.json; else the newest.")]
Database = Annotated[Path, typer.Option(help="The SQLite file of enrolled people.")]
Engine = Annotated[str, typer.Option(help="openvino or onnxruntime; else the first there is.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads of the engine; 0: as it likes.")]
Every = Annotated[int, typer.Option(min=1, help="A clip has every so many-th frame of the video.")]
PEOPLE = Path("concierge.sqlite3")


@app.command("enrol")
def enrol(
    name: Annotated[str, typer.Argument(help="The person's name.")],
    video: Annotated[Path, typer.Argument(help="A video file of this person alone.")],
    model: Model = None,
    database: Database = PEOPLE,
    engine: Engine = "",
    threads: Threads = 0,
    every: Every = 6,
):
    """Keep a person's embedding; of the pictures nothing is kept."""
    totem = Totem(model or newest(), engine, threads)
    looked_at = clips(str(video), totem.frames, totem.size, every)
    seen = [totem.look(clip)["embedding"] for clip, _ in looked_at]
    with People.opened(database, new=True) as people:
        people.add(name, _unit(np.mean(seen, 0)), totem.identity)
        count = len(people.names())
    print(f"{name} is enrolled from {len(seen)} clips")
    if 0 < totem.people < count:
        rate = f"The rate at which strangers are let in was set with {totem.people} people enrolled"
        typer.echo(f"{rate}; with {count} it is higher.", err=True)


@app.command("recognise")
def recognise(
    source: Annotated[str, typer.Argument(help="A video file, or a camera: /dev/video0.")],
    model: Model = None,
    database: Database = PEOPLE,
    video: Annotated[Path | None, typer.Option(help="Write an annotated video here.")] = None,
    engine: Engine = "",
    threads: Threads = 0,
    every: Every = 6,
):
    """Box, emotion and person or stranger of every clip, as JSON lines with frames a second."""
    if video and video.resolve() == Path(source).resolve():
        raise TotemError(f"--video would overwrite {source}, which is to be read")
    totem = Totem(model or newest(), engine, threads)
    width = totem.heads["embedding"].stop - totem.heads["embedding"].start
    names, gallery = [], np.empty((0, width))
    if database.exists():
        with People.opened(database) as people:
            names, gallery = people.gallery(totem.identity, width)
    if not names:
        typer.echo(f"Nobody is enrolled in {database}: everybody is a stranger.", err=True)
    # Ctrl-C is how a camera's run ends, or a service's SIGTERM; the film is closed all the same.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with film(video) if video else nullcontext() as add, suppress(KeyboardInterrupt):
        started = time.perf_counter()
        for number, (clip, frames) in enumerate(clips(source, totem.frames, totem.size, every)):
            found = totem.look(clip)
            who, cosine = recognised(found["embedding"], names, gallery, totem.threshold)
            best = int(found["probabilities"].argmax())
            passed, started = time.perf_counter() - started, time.perf_counter()
            line = {
                "frame": number * totem.frames * every,
                "box": [round(float(v), 4) for v in found["box"]],
                "emotion": totem.emotions[best],
                "probability": round(float(found["probabilities"][best]), 4),
                "person": who,
                "cosine": round(cosine, 4),
                "frames_a_second": round(len(frames) / passed, 1),
            }
            print(json.dumps(line, ensure_ascii=False), flush=True)
            if add:
                add(frames, found["box"], f"{line['emotion']}, {who or 'stranger'}")


@app.command("forget")
def forget(
    name: Annotated[str, typer.Argument(help="The person's name.")] = "",
    everybody: Annotated[bool, typer.Option("--all", help="Everybody who is enrolled.")] = False,
    database: Database = PEOPLE,
):
    """Remove a person's data, or that of all."""
    if everybody == bool(name):
        raise TotemError("whom? forget takes one name, or --all")
    with People.opened(database) as people:
        names = people.names() if everybody else [name]
        people.remove(name)
    print("".join(f"{one} is forgotten\n" for one in names), end="")


@app.command("list")
def list_people(
    as_json: Annotated[bool, typer.Option("--json", help="As a list in JSON.")] = False,
    database: Database = PEOPLE,
):
    """The names of enrolled people."""
    with People.opened(database) as people:
        names = people.names()
    text = json.dumps(names, ensure_ascii=False) if as_json else "\n".join(names)
    print(text, end="\n" * bool(text))
