"""Milliseconds a clip of study 1's networks on a board; needs NumPy and one engine, nothing else.

Copy this file and a folder of networks to the board, then

    python board.py boards --board "Raspberry Pi 4B" --output pi.json

The study's page shows every such file in ``data/records/concierge/boards`` beside the paper's
tables. It must not import from kdutils, since the board has none of it, and runs on Python 3.8,
since boards are old.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np


class EngineError(RuntimeError):
    """There is no engine, no network, or one that cannot be read; the message says which."""


def openvino(path: Path, threads: int) -> tuple[Callable, tuple]:
    """A network in OpenVINO, from an array to its outputs, and the shape that it takes.

    What is not int8 is computed in 32 bits, as in the study, which some processors would not do
    by themselves.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # it would report over the network
    import openvino

    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    options["INFERENCE_NUM_THREADS"] = threads
    model = openvino.Core().compile_model(str(path), "CPU", options)
    return lambda values: next(iter(model(values).values())), tuple(model.input(0).shape)


def onnxruntime(path: Path, threads: int) -> tuple[Callable, tuple]:
    """A network in ONNX Runtime, from an array to its outputs, and the shape that it takes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    return lambda values: session.run(None, {entry.name: values})[0], tuple(entry.shape)


ENGINES = {"openvino": openvino, "onnxruntime": onnxruntime}  # in this order they are tried
READS = {"openvino": (".onnx", ".xml"), "onnxruntime": (".onnx",)}  # the last is preferred


WARM = 3  # calls before the one that is timed, as in the study


def timed(
    calls: dict[str, Callable], repeats: int, clock=time.perf_counter, warm: int = 0
) -> dict[str, list]:
    """Quartiles of the milliseconds that each call takes by the clock, after a warm-up.

    They take turns, in another order each time: what a call finds in the processor's caches is
    what the one before it left. With ``warm`` that is itself: it is called so many times before
    the one that counts, which is the least that it takes.
    """
    taken, order = {name: [] for name in calls}, random.Random(0)
    for _ in range(5 + repeats):
        for name in order.sample(list(calls), len(calls)):
            for _ in range(warm):
                calls[name]()
            started = clock()
            calls[name]()
            taken[name].append(1000 * (clock() - started))
    return {k: np.percentile(values[5:], [25, 50, 75]).tolist() for k, values in taken.items()}


def chosen(wanted: str, able: Iterable[str] = ENGINES) -> str:
    """The wanted engine, or the first that is installed, of those that are able to read a model."""
    from importlib.util import find_spec

    usable = [name for name in able if find_spec(name)]
    if wanted not in usable and (wanted or not usable):
        here, needed = ", ".join(usable) or "none", " or ".join(ENGINES)
        raise EngineError(f"engine {wanted!r} cannot be used; usable: {here}; install {needed}")
    return wanted or usable[0]


def opened(engine: str, path: Path, threads: int) -> tuple[Callable, tuple]:
    """A network in an engine, from an array to its outputs, and the shape that it takes."""
    try:
        return ENGINES[engine](path, threads)
    except Exception as error:  # whatever an engine raises for a damaged file
        raise EngineError(f"{engine} cannot read {path} ({error})") from None


def networks(folders: list[Path], engine: str) -> dict[str, Path]:
    """The networks in these folders that the engine reads, by name.

    Raises :class:`EngineError` for a folder without any, and where two folders have one of the same
    name.
    """
    found = {}
    for folder in folders:
        here = {p.stem: p for suffix in READS[engine] for p in sorted(folder.glob(f"*{suffix}"))}
        if not here:
            raise EngineError(f"there is no network in {folder} ({' or '.join(READS[engine])})")
        for name in found.keys() & here.keys():
            raise EngineError(f"{found[name]} and {here[name]} have one name; rename one")
        found.update(here)
    return found


def measured(board: str, folders: list[Path], engine: str, threads: int, repeats: int) -> dict:
    """What is written: the quartiles of every network, and on what they were measured.

    Times are milliseconds. Raises :class:`EngineError` naming what cannot be read.
    """
    engine = chosen(engine)
    rng, calls, digests, shapes = np.random.default_rng(0), {}, {}, {}
    for name, path in networks(folders, engine).items():
        look, shape = opened(engine, path, threads)
        values = rng.random(shape, dtype=np.float32) - np.float32(0.5)
        calls[name] = lambda look=look, values=values: look(values)
        digests[name] = digest(path)
        shapes[name] = list(shape)
    found = {"board": board, "measured": time.strftime("%Y-%m-%d", time.gmtime())}
    found["milliseconds"] = timed(calls, repeats, warm=WARM)
    found.update({"warm": WARM, "repeats": repeats, "threads": threads, "engine": engine})
    found.update({"version": sys.modules[engine].__version__, "python": platform.python_version()})
    found.update({"machine": platform.machine(), "system": platform.platform()})
    found.update({"sha256": digests, "shapes": shapes})
    return found


def digest(path: Path) -> str:
    """The SHA-256 of a network's file; OpenVINO keeps the weights in a second one, ``.bin``."""
    both = (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,)
    return hashlib.sha256(b"".join(part.read_bytes() for part in both)).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", help="folders of networks")
    parser.add_argument("--board", required=True, help="the board's name, for the book")
    parser.add_argument("--engine", choices=ENGINES, default="", help="default: the first found")
    parser.add_argument("--threads", type=int, default=1, help="of the engine; 0: as it likes")
    parser.add_argument("--repeats", type=int, default=200, help="how often each is timed")
    parser.add_argument("--output", type=Path, default=Path("board.json"), help="the record")
    given = parser.parse_args()
    if given.threads < 0 or given.repeats < 1:
        parser.error("--threads must be 0 or more and --repeats 1 or more")
    if not given.output.parent.is_dir():
        parser.error(f"{given.output.parent} is no folder")
    try:
        found = measured(given.board, given.folders, given.engine, given.threads, given.repeats)
    except EngineError as error:
        sys.exit(f"board: {error}")
    for name, (low, middle, high) in found["milliseconds"].items():
        print(f"{name:24}{middle:10.3f} ms   ({low:.3f} to {high:.3f})")
    scratch = given.output.with_name(f".{given.output.name}")
    scratch.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, given.output)
    print(f"written: {given.output}")


if __name__ == "__main__":
    main()
