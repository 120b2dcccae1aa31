"""Forgetting, measured: random sequences of enrolling, adding, forgetting and SIGKILL.

    python tests/forgetting.py --sequences 1000

Each step is done by a process of its own, as the device's program does it; about half of them are
to be killed at a random moment. After each, the database and its journal are read as they lie
there, for whoever was forgotten; then it is opened, which is when SQLite undoes what was half done,
and read again, for anybody who is not enrolled.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from kdutils.concierge.people import People, TotemError, unit

NAMES, WIDTH, STEPS = ("Ada Lovelace", "Boleslaw", "Żaneta"), 32, 8
PIECE = 8  # bytes, two numbers: shorter ones would be found by chance


def left_over(embedding: np.ndarray, folder: Path) -> str:
    """The file in which a piece of an embedding (D,) is found; empty where there is none."""
    content = embedding.astype("<f4").tobytes()
    return holding([content[at : at + PIECE] for at in range(0, len(content), PIECE)], folder)


def holding(pieces: list[bytes], folder: Path) -> str:
    """The first file of a folder that holds one of these; empty where there is none."""
    for path in sorted(folder.iterdir()):
        held = path.read_bytes()
        if any(piece in held for piece in pieces):
            return path.name
    return ""


def step(path: Path, name: str, embedding: np.ndarray | None, more: bool) -> None:
    """Enrol or add, or forget where no embedding is given, as a command does."""
    with People.opened(path, new=True) as people:
        people.remove(name) if embedding is None else people.add(name, embedding, "m", more=more)


def in_a_process(told, kill_after: float | None) -> bool:
    """Do it in a process of its own; whether that had ended, or was killed on the way."""
    child = os.fork()
    if not child:
        try:
            step(*told)
        except TotemError:  # there already, or not there
            pass
        finally:
            os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


def sequence(folder: Path, seed: int) -> tuple[Counter, list[str]]:
    """Do one random sequence in an empty folder: what was done, and a sentence for each fault."""
    draw, path = random.Random(seed), folder / "people.sqlite3"
    done, faults, made, gone, known, clips = Counter(), [], [], [], {}, {}
    for at in range(STEPS):
        name = draw.choice(NAMES)
        new = np.random.default_rng([seed, at]).random(WIDTH, "f4") if draw.random() < 0.6 else None
        more = new is not None and draw.random() < (0.8 if name in known else 0.2)
        kill_after = draw.random() * 0.008 if draw.random() < 0.5 else None
        wanted = after(known, clips, name, new, more)
        made += [one for one in (new, wanted.get(name)) if one is not None]
        ended = in_a_process((path, name, new, more), kill_after)
        if ended and name in known and not same(known[name], wanted.get(name)):
            gone.append(known[name])
        done["journals left"] += path.with_name(f"{path.name}-journal").exists()
        faults += [
            f"seed {seed}, step {at}: forgotten, and as it lies there in {file}"
            for file in (left_over(one, folder) for one in gone)
            if file
        ]
        with People.opened(path, new=True) as people:
            names, gallery = people.gallery("m", WIDTH)
            clips = dict(people.database.execute("SELECT name, clips FROM people"))
        there = dict(zip(names, gallery, strict=True))
        wanted = wanted if ended else known
        differ = {n for n in there.keys() | wanted if not same(there.get(n), wanted.get(n))}
        if (ended and differ) or differ - {name}:
            faults.append(f"seed {seed}, step {at}: {', '.join(sorted(differ))} changed")
        before, now = known.get(name), there.get(name)
        kinds = {(False, True): "enrolled", (True, False): "forgotten", (True, True): "added to"}
        kind = kinds.get((before is not None, now is not None))
        done["without effect" if same(before, now) else kind] += 1
        done["killed"] += not ended
        kept = {one.tobytes() for one in there.values()}
        nobody = [one for one in made if one.tobytes() not in kept]
        left = [left_over(one, folder) for one in nobody]
        left += [holding([n.encode()], folder) for n in NAMES if n not in there]
        faults += [f"seed {seed}, step {at}: of nobody who is enrolled, in {f}" for f in left if f]
        known = there
    return done, faults


def after(known: dict, clips: dict, name: str, new, more: bool) -> dict:
    """Who is enrolled, by what, once a step has ended."""
    if new is None:
        return {one: kept for one, kept in known.items() if one != name}
    if more and name in known:
        return known | {name: unit(clips[name] * known[name] + new).astype("<f4")}
    return known | ({name: new} if not more and name not in known else {})


def same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    """Whether both are absent, or alike."""
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def sequences(count: int, first: int = 0) -> tuple[Counter, list[str]]:
    """So many sequences, each in a folder of its own."""
    done, faults = Counter(), []
    for seed in range(first, first + count):
        with tempfile.TemporaryDirectory() as folder:
            more, found = sequence(Path(folder), seed)
        done, faults = done + more, faults + found
    return done, faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sequences", type=int, default=1000)
    done, faults = sequences(parser.parse_args().sequences)
    print(", ".join(f"{count:,} {what}" for what, count in sorted(done.items())))
    print(*faults, f"{len(faults)} faults", sep="\n")
    sys.exit(bool(faults))
