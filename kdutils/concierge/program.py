"""The device's program: enrol people from a clip, recognise them, forget them. No PyTorch.

The totem is the paper's word for the device. Reads what the study's last run wrote (``model.json``
and the files it names), asks OpenVINO or ONNX Runtime, and keeps embeddings in SQLite. It must not
know how networks are trained.
"""

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from fractions import Fraction
from pathlib import Path
from typing import Annotated
from unicodedata import normalize

import numpy as np
import typer
from PIL import Image, ImageDraw

from kdutils import files
from kdutils.concierge import board, deciding, recordings
from kdutils.concierge.people import People, TotemError, checked, unit

HEADS = ("emotion", "face", "embedding")
STUDENT = {"openvino": "student-int8.xml", "onnxruntime": "student.onnx"}  # which file it reads
FAULTS = ("small", "dark", "blurred")  # what keeps a clip from being enrolled
app = typer.Typer(help="Box, emotion, and who it is, on a device.", pretty_exceptions_enable=False)


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
            self.square = bool(told.get("square"))  # the study's first models do not say
            self.heads = {name: slice(*map(int, told["heads"][name])) for name in HEADS}
            self.levels = [deciding.Level(*map(float, level)) for level in told["levels"]]
            self.least = {name: float(told["least"][name]) for name in ("nobody", "alike", *FAULTS)}
            self.cosines = {float(k): np.array(v, float) for k, v in told["cosines"].items()}
            named = dict(told["files"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TotemError(f"{path} is absent or damaged ({error!r}): run the study") from None
        for name, expected in named.items():
            file = folder / name
            if Path(name).name != name or not file.exists() or files.sha256(file) != expected:
                raise TotemError(f"{file} is absent or damaged: {path} names another SHA-256")
        self.identity = files.sha256(path)
        engine = board.chosen(engine, [name for name in STUDENT if STUDENT[name] in named])
        self._look, _ = board.opened(engine, folder / STUDENT[engine], threads)
        if engine == "openvino" and (apart := self._apart(folder)) > 0.05:
            # Where a processor lacks the instructions, sums of int8 overflow.
            typer.echo(f"int8 is {apart:.2f} off here: 32 bits are used", err=True)
            self._look, _ = board.opened(engine, folder / STUDENT["onnxruntime"], threads)

    def _apart(self, folder: Path) -> float:
        """How far int8's numbers for the check's clips are from those that the study's run had."""
        with np.load(folder / "check.npz") as kept:
            here = np.concatenate([self._look(clip[None]) for clip in kept["clips"]])
            return float(np.abs(here - kept["openvino-int8"]).max())

    def look(self, clip: np.ndarray) -> dict:
        """What is seen in a clip (F, S, S, 3) uint8: probabilities, box, embedding (D,)."""
        out = self._look(deciding.entered(clip))[0]
        logits = out[self.heads["emotion"]]
        powers = np.exp(logits - logits.max())
        found = {"probabilities": powers / powers.sum(), "box": out[self.heads["face"]]}
        return found | {"embedding": unit(out[self.heads["embedding"]])}


def shown(picture: Image.Image, size: int, square: bool) -> tuple[np.ndarray, np.ndarray]:
    """A picture as the student sees it, (S, S, 3) uint8: its middle square, or all, squashed.

    And the share (4,) that this is of the picture, by which a box's numbers shrink.
    """
    picture = recordings.as_viewed(picture)
    sides = np.array(picture.size)
    if square:
        corner = (sides - min(sides)) // 2
        picture = picture.crop((*corner, *corner + min(sides)))
    return recordings.squashed(picture, size), np.tile(picture.size / sides, 2)


def clips(source: str, frames: int, size: int, every=1, keep=True, square=False) -> Iterator[tuple]:
    """Clips (F, S, S, 3) uint8 of a film, camera (/dev/video0) or photograph, see :func:`shown`.

    With each the share that it shows, and its frames. Of a video every so many-th frame is looked
    at. Clips follow one another; an end that is shorter is left out. A photograph is a clip in
    which nothing moves. Frames are held only to ``keep`` them, since large ones need much memory.
    Raises :class:`TotemError` naming a source that cannot be read or is shorter than a clip.
    """
    small, held, count = [], [], 0
    try:
        if Path(source).suffix.lower() in recordings.PICTURES:
            with Image.open(source) as picture:
                picture.draft("RGB", (8 * size, 8 * size))  # a large JPEG is not decoded whole
                seen, share = shown(picture, size, square)
                yield np.stack([seen] * frames), share, []
            return
        for count, frame in enumerate(recordings.video(source), 1):
            held += [frame] * keep
            if count % every == 1 % every:
                seen, share = shown(recordings.upright(frame), size, square)
                small.append(seen)
            if count % (frames * every) == 0:
                yield np.stack(small), share, held
                small, held = [], []
    except Exception as error:  # whatever PyAV and Pillow raise
        raise TotemError(f"{source} cannot be read ({error})") from None
    if count < (least := frames * every):
        raise TotemError(f"{source} has {count} frames; a clip needs {least} (--every), or a .jpg")


def looks(totem: Totem, source: str, every: int, keep=False) -> Iterator[tuple[dict, list]]:
    """What is seen in each clip of a source, and its frames; ``why`` it would not do to enrol."""
    for clip, share, frames in clips(source, totem.frames, totem.size, every, keep, totem.square):
        found = totem.look(clip)
        worth = deciding.quality(clip, found["box"])
        worth["nobody"] = deciding.follows(totem.look, clip, found["box"])
        why = next((k for k in ("nobody", *FAULTS) if worth[k] < totem.least[k]), "")
        found["box"] = (1 - share) * [0.5, 0.5, 0, 0] + share * found["box"]
        yield found | {"why": why, "weight": worth["small"] * worth["blurred"]}, frames


@contextmanager
def film(path: Path) -> Iterator[Callable]:
    """A function that adds frames to a video file, with a box and a text drawn in.

    It plays as fast as where the frames are from. ``box`` is cx, cy, w, h in shares of the picture.
    Raises :class:`TotemError` where the file cannot be written.
    """
    import av

    try:
        if not os.access(path.parent, os.W_OK):  # it would be noticed at the first frame
            raise OSError("its folder is not there, or may not be written to")
        container = av.open(f"file:{path}", "w")
        stream = container.add_stream("mpeg4", rate=25, pix_fmt="yuv420p")
    except (av.FFmpegError, ValueError, OSError) as error:
        raise TotemError(f"{path} cannot be written ({error})") from None

    def add(frames: list, box, text: str) -> None:
        for frame in frames:
            picture = recordings.upright(frame)
            cx, cy, w, h = (box * np.array(picture.size * 2)).tolist()
            drawing = ImageDraw.Draw(picture)
            drawing.rectangle((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), None, "lime", 2)
            drawing.text((4, 4), text, "lime", font_size=max(10, picture.height // 16))
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
        raise TotemError("no model here: run the study with -p device=true, or --model FOLDER")
    return max(found, key=lambda path: path.stat().st_mtime).parent


Model = Annotated[Path | None, typer.Option(help="Folder with model.json; else the last made.")]
Database = Annotated[Path, typer.Option(help="The SQLite file of enrolled people, from here.")]
Engine = Annotated[str, typer.Option(help="openvino or onnxruntime; else the first there is.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads of the engine; 0: as it likes.")]
Every = Annotated[int, typer.Option(min=1, help="Frames from one that is looked at to the next.")]
PEOPLE = Path("concierge.sqlite3")
THRESHOLD = "Cosine above which it is somebody; says its cost. Else by how many are enrolled."


@app.command("enrol")
def enrol(
    name: Annotated[str, typer.Argument(help="The person's name.")],
    sources: Annotated[list[Path], typer.Argument(help="Films or photographs of them alone.")],
    add: Annotated[bool, typer.Option("--add", help="Add to a person who is enrolled.")] = False,
    model: Model = None,
    database: Database = PEOPLE,
    engine: Engine = "",
    threads: Threads = 0,
    every: Every = 6,
):
    """Keep a person's embedding; of the pictures nothing is kept."""
    name = checked(name)
    if any(str(source).startswith("/dev/video") for source in sources):
        raise TotemError("a camera does not end: enrol from a film, or from photographs")
    totem, used, refused = Totem(model or newest(), engine, threads), {}, Counter()
    for source in sources:
        for number, (found, _) in enumerate(looks(totem, str(source), every), 1):
            refused[found["why"].replace("nobody", "nobody or two people")] += 1
            if not found["why"]:
                used[f"{source}, clip {number},"] = found["embedding"]
    said = ", ".join(f"{count} {why}" for why, count in sorted(refused.items()) if why)
    if not used:
        raise TotemError(f"{name!r} was not enrolled; film again, for of the clips: {said}")
    seen = np.array(list(used.values()))
    for where, one in used.items() if len(used) > 1 else ():
        if unit(seen.sum(0) - one) @ one < totem.least["alike"]:
            raise TotemError(f"{where} and the others do not look like one person: leave one out")
    with People.opened(database, new=not add) as people:
        kept = dict(zip(*people.gallery(totem.identity, seen.shape[1]), strict=True))
        mean, limit = unit(seen.mean(0)), deciding.level_for(totem.levels, len(kept), 1).person
        if mean @ kept.pop(normalize("NFC", name), mean) < totem.least["alike"] and add:
            raise TotemError(f"these clips do not look like {name!r}, who is enrolled")
        people.add(name, mean, totem.identity, len(used), more=add)
        count, most = len(people.names()), max(level.people for level in totem.levels)
    print(f"{name}: {len(used)} clips {'added' if add else 'enrolled'}; left out: {said or 'none'}")
    if twins := [other for other, one in kept.items() if mean @ one > limit]:
        typer.echo(f"{name} looks like {', '.join(twins)}: they will be mistaken.", err=True)
    if count > most:
        typer.echo(f"Thresholds are for {most:g} people of {count}: more strangers pass.", err=True)


def enrolled(database: Path, totem: Totem) -> tuple[list[str], np.ndarray]:
    """Names and embeddings (N, D) of those in a database; nobody's where there is none."""
    width = totem.heads["embedding"].stop - totem.heads["embedding"].start
    if not database.exists():
        return [], np.empty((0, width))
    with People.opened(database) as people:
        return people.gallery(totem.identity, width)


@app.command("recognise")
def recognise(
    source: Annotated[str, typer.Argument(help="A film, a photograph, a camera: /dev/video0.")],
    model: Model = None,
    database: Database = PEOPLE,
    video: Annotated[Path | None, typer.Option(help="Write an annotated video here.")] = None,
    each: Annotated[bool, typer.Option("--each", help="Decide by each clip alone.")] = False,
    threshold: Annotated[float | None, typer.Option(min=-1, max=1, help=THRESHOLD)] = None,
    engine: Engine = "",
    threads: Threads = 0,
    every: Every = 6,
):
    """Box, emotion and person, unsure, stranger or nobody of every clip, as JSON lines."""
    if video and video.exists() and Path(source).exists() and video.samefile(source):
        raise TotemError(f"--video would overwrite {source}, which is to be read")
    made, of = (Path(str(one)).suffix.lower() for one in (video, source))
    if video and (made not in (".avi", ".mkv", ".mov", ".mp4") or of in recordings.PICTURES):
        raise TotemError(f"--video makes a film (.avi, .mkv, .mov, .mp4) of a film, not {video}")
    totem = Totem(model or newest(), engine, threads)
    names, _ = enrolled(database, totem)
    if not names:
        typer.echo(f"Nobody is enrolled in {database}: everybody is a stranger.", err=True)
    if threshold is not None:
        size = deciding.level_for(totem.levels, len(names), 1).people
        let_in, known = 100 * (totem.cosines[size] > threshold).mean(1)
        cost = f"one look lets in {let_in:.0f} % of strangers, names {known:.0f} % of people"
        typer.echo(f"Above {threshold:g}, with {size:g} enrolled, {cost}.", err=True)
        totem.levels = [one._replace(stranger=threshold, person=threshold) for one in totem.levels]
    track = deciding.Track(1 if each else deciding.MOST, totem.least["alike"])
    # Ctrl-C is how a camera's run ends, or a service's SIGTERM; the film is closed all the same.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, signal.default_int_handler)
    with film(video) if video else nullcontext() as add, suppress(KeyboardInterrupt):
        started = time.perf_counter()
        for number, (found, frames) in enumerate(looks(totem, source, every, keep=bool(video))):
            who, person, cosine, together, level = "nobody", None, -1.0, 0, None
            if found["why"] == "nobody":
                track.looks = []
            else:
                seen, together = track.add(found["box"], found["embedding"], found["weight"])
                names, gallery = enrolled(database, totem)  # somebody may be forgotten meanwhile
                level = deciding.level_for(totem.levels, len(names), together)
                who, person, cosine = deciding.answer(seen, names, gallery, level)
            sure, emotion = max(zip(found["probabilities"].tolist(), totem.emotions, strict=True))
            passed, started = time.perf_counter() - started, time.perf_counter()
            line = {"frame": number * totem.frames * every, "answer": who, "person": person}
            line |= {"cosine": round(cosine, 4), "needed": level and round(level.person, 4)}
            line |= {"clips": together, "emotion": emotion, "probability": round(sure, 4)}
            line["box"] = [round(float(v), 4) for v in found["box"]]
            line["frames_a_second"] = round(totem.frames * every / passed, 1)
            print(json.dumps(line), flush=True)  # in ASCII, which every terminal has
            if add:
                add(frames, found["box"], f"{emotion}, {person or who}")


@app.command("forget")
def forget(
    name: Annotated[str, typer.Argument(help="The person's name, or --all.")] = "",
    everybody: Annotated[bool, typer.Option("--all", help="Everybody who is enrolled.")] = False,
    database: Database = PEOPLE,
):
    """Remove a person's data, or that of all."""
    if everybody == bool(name):
        raise TotemError("whom? forget takes one name, or --all")
    with People.opened(database) as people:
        names = people.names() if everybody else [name]
        people.remove(None if everybody else name)
    print("".join(f"{one} is forgotten\n" for one in names), end="")


@app.command("list")
def list_people(
    as_json: Annotated[bool, typer.Option("--json", help="As a list in JSON.")] = False,
    database: Database = PEOPLE,
):
    """The names of enrolled people."""
    with People.opened(database) as people:
        names = people.names()
    text = json.dumps(names) if as_json else "\n".join(names)
    print(text, end="\n" * bool(text))
