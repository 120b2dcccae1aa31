"""Forgetting, measured: random sequences of enrolling, forgetting and SIGKILL, and what is left.

    python tests/forgetting.py --sequences 1000

Each step is done by a process of its own, as the device's program does it; about half of them are
killed at a random moment. After each, the database is read as it lies there, with its journal, and
then opened, which is when SQLite undoes what was half done.
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

from kdutils.concierge.program import People, TotemError

NAMES, WIDTH, STEPS = ("Ada", "Bo", "Żaneta"), 32, 8
PIECE = 8  # bytes, two numbers: shorter ones would be found by chance


def left_over(embedding: np.ndarray, folder: Path) -> str:
    """The file in which a piece of an embedding (D,) is found; empty where there is none."""
    content = embedding.astype("<f4").tobytes()
    pieces = [content[at : at + PIECE] for at in range(0, len(content), PIECE)]
    for path in sorted(folder.iterdir()):
        held = path.read_bytes()
        if any(piece in held for piece in pieces):
            return path.name
    return ""


def step(path: Path, name: str, embedding: np.ndarray | None) -> None:
    """Enrol somebody, or forget them where no embedding is given, as a command does."""
    with People.opened(path, new=True) as people:
        people.remove(name) if embedding is None else people.add(name, embedding, "m")


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
    done, faults, made, known = Counter(), [], [], {}  # known: as the last command left it
    for at in range(STEPS):
        name = draw.choice(NAMES)
        new = np.random.default_rng([seed, at]).random(WIDTH, "f4") if draw.random() < 0.6 else None
        made += [] if new is None else [new]
        kill_after = draw.random() * 0.008 if draw.random() < 0.5 else None
        ended = in_a_process((path, name, new), kill_after)
        done["killed" if not ended else "enrolled" if new is not None else "forgotten"] += 1
        if ended:
            known = ({name: new} if new is not None else {}) | known
            if new is None:
                gone = known.pop(name, None)
                if gone is not None and (file := left_over(gone, folder)):
                    faults.append(f"seed {seed}, step {at}: {name} is forgotten, and in {file}")
        with People.opened(path, new=True) as people:
            names, gallery = people.gallery("m", WIDTH)
        there = dict(zip(names, gallery, strict=True))
        both = there.keys() | known.keys()
        other = {n for n in both if not np.array_equal(there.get(n), known.get(n))}
        if (ended and other) or other - {name}:
            faults.append(f"seed {seed}, step {at}: {', '.join(sorted(other))} changed")
        known = there
        kept = {one.tobytes() for one in there.values()}
        for one in made:
            if one.tobytes() not in kept and (file := left_over(one, folder)):
                faults.append(f"seed {seed}, step {at}: of nobody who is enrolled, in {file}")
    return done, faults


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
