"""Records: what a run leaves behind, where it lies, what code made it, whether two agree."""

import ast
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import resource
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from kdutils import data, files

PROJECT = Path(__file__).parent.parent
SOURCE_ROOMS = ("centres", "data", "losses", "metrics", "models", "pictures", "train")
PACKAGE = "concierge"  # rooms that lie in a folder of their own
WHOLE_ROOMS = ("deciding", "rates", "recordings", "scenes")  # its, whole, where the room is named
CONSTANTS = (bool, int, float, str, tuple, list, dict, np.ndarray)  # of a notebook, hashed by value
VERSIONS = ("lightning-fabric", "numpy", "torch", "torchmetrics", "torchvision")


def published_folder() -> Path:
    """Where published records lie: ``$KDUTILS_RECORDS``, else ``data/records`` of the project."""
    return Path(os.environ.get("KDUTILS_RECORDS") or PROJECT / "data" / "records")


def runs_folder() -> Path:
    """Where runs are kept: ``$KDUTILS_RUNS``, else the user's cache folder."""
    return files.cache_folder("KDUTILS_RUNS", "runs")


def read(path: Path) -> dict | None:
    """The record at ``path``; None where there is none. A damaged one is set aside, and said."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for key in ("run", "key", "scale", "arguments", "status", "results", "weights", "made"):
            content[key]
        return content
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        files.set_aside(path, f"not a record: {error!r}")
        return None


def published(study: str) -> list[dict]:
    """The contents of a study's published records."""
    return [c for c in map(read, sorted((published_folder() / study).glob("*.json"))) if c]


def publish(study: str, scales: Iterable[str] = ("laptop", "paper")) -> list[Path]:
    """Copy this machine's records of a study, those of failed runs too, to the published ones.

    Returns the files written. A published record is never overwritten, and one of a ``folder`` of
    one's own never published: it may hold what people are recognised by.
    """
    written = []
    files.sweep(published_folder() / study)
    for path in sorted((runs_folder() / study).glob("*/record.json")):
        content = read(path)
        # What diverged was tried too.
        if content and content["scale"] in scales and not content["arguments"].get("folder"):
            target = published_folder() / study / f"{path.parent.name}.json"
            if not target.exists():
                files.write(target, path.read_bytes())
                written.append(target)
    return written


def compare(old: dict, new: dict) -> tuple[bool, str]:
    """Whether a record made anew agrees with the old one, and a sentence saying how.

    Made by the same source, processor, threads, precision and versions, they must be equal, times
    aside; otherwise the accuracies of the last epoch may differ by 0.03.
    """
    conditions = ("source", "device", "processor", "precision", "threads")
    before, after = (record["made"] | record["made"]["versions"] for record in (old, new))
    differ = [k for k in (*conditions, *VERSIONS) if before.get(k) != after.get(k)]
    if not differ:
        if timeless(old) == timeless(new):
            return True, "the same numbers and weights, bit for bit"
        return False, "NOT the same numbers, though source, processor, threads and versions are"
    other = f"made with another {', '.join(differ)}"
    if timeless(old)["results"] == timeless(new)["results"]:
        return True, f"{other}; the same numbers"
    found, again = _accuracies(old["results"]), _accuracies(new["results"])
    if not found:
        return False, f"{other}; it holds no accuracy by which to compare"
    largest = max(abs(v - again.get(k, float("inf"))) for k, v in found.items())
    return largest <= 0.03, f"{other}; accuracies differ by at most {largest:.4f}"


def _accuracies(results: dict) -> dict:
    """Accuracies of the last epoch and of the end, by their path in the results."""
    import pandas as pd

    last = (results.get("history") or [{}])[-1]
    flat = pd.json_normalize(results | last, sep=" ").iloc[0]
    return {k: float(v) for k, v in flat.items() if "accuracy" in k and isinstance(v, float)}


def timeless(content: dict) -> dict:
    """What must be equal in two records of one run: arguments, results and weights, no times."""
    timed, found = ("milliseconds", "time_shares", "history"), content["results"]
    results = {k: v for k, v in found.items() if k not in timed}
    rows = [{k: v for k, v in r.items() if k != "seconds"} for r in found.get("history", [])]
    kept = {k: content[k] for k in ("key", "arguments", "status", "weights")}
    return kept | {"results": results | {"history": rows}}


def made_with(described: dict) -> dict:
    """What the bits of a result may depend on; ``described`` is device, precision and threads.

    Python itself decides none, so :func:`compare` leaves it out; but an interrupted run does not go
    on in another.
    """
    found = described | {"processor": _processor(), "python": platform.python_version()}
    return found | {"versions": {name: importlib.metadata.version(name) for name in VERSIONS}}


def place(made: dict) -> str:
    """Where a run was made. Of two processors of one name, one may have bf16, one may not."""
    return f"{made['processor' if made['device'] == 'cpu' else 'device']}, {made['precision']}"


def peak_memory_mb() -> int:
    """The most memory this process has held, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB, but bytes on macOS
    return peak // (1024**2 if sys.platform == "darwin" else 1024)


def register(study: str) -> str:
    """SHA-256 of a study's rows of ``data/claims.csv``: what was registered when a run began."""
    lines = (PROJECT / "data" / "claims.csv").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith(f"{study}-")]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def data_named_in(arguments: dict) -> dict:
    """Fingerprints of the datasets that arguments name; ``data.load`` let no others pass."""
    known = data.sources()
    named = [v for v in arguments.values() if isinstance(v, str) and v in known]
    return {name: known[name]["fingerprints"] for name in named}


def source_hash(function: Callable) -> str:
    """SHA-256 of the code a run is made by, comments, docstrings and layout aside.

    Covers the function, and whatever it and what it reaches call by name: functions and constants
    of its own module (a notebook), and definitions of the rooms that decide what a training does.
    So a room can grow without touching the hash of runs that do not use what is new. Rooms that
    make data (``WHOLE_ROOMS``) count whole where they are named. What the notebook defines only
    after the function is not seen: a test holds that no run needs it.
    """
    reached, waiting = {}, [(_definition(function), function.__globals__)]
    rooms = {}
    for room in SOURCE_ROOMS:
        for node in _tree(room).body:
            named = [getattr(node, "name", ""), *getattr(node, "targets", [])]
            rooms |= {getattr(one, "id", one): node for one in named}
    while waiting:
        node, notebook = waiting.pop()
        shape, names, read = _facts(node)
        if shape in reached:
            continue
        reached[shape] = None
        for name in read & notebook.keys():
            other = getattr(notebook[name], "function", notebook[name])  # a run: its function
            if isinstance(other, types.FunctionType) and other.__module__ == function.__module__:
                waiting.append((_definition(other), notebook))
            elif isinstance(other, CONSTANTS):
                value = other.tolist() if isinstance(other, np.ndarray) else other
                reached[f"{name} = {value!r}"] = None
        for name in names:
            whole = _tree(f"{PACKAGE}/{name}") if name in WHOLE_ROOMS else None
            waiting += [(found, {}) for found in (rooms.get(name), whole) if found is not None]
    return hashlib.sha256("\n".join(sorted(reached)).encode()).hexdigest()


def _tree(room: str) -> ast.Module:
    return _parsed((Path(__file__).parent / f"{room}.py").read_text(encoding="utf-8"))


def _definition(function: Callable) -> ast.AST:
    return _parsed(textwrap.dedent(inspect.getsource(function))).body[0]


@functools.cache
def _parsed(text: str) -> ast.Module:
    """The text's tree without docstrings, and as if the package's rooms lay beside the others.

    So they did when runs that are still shown were published. Always the same object, to be read
    and not changed.
    """
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            node.module = node.module.replace(f".{PACKAGE}", "")
        match getattr(node, "body", None):  # a list, but of a lambda
            case [ast.Expr(ast.Constant(str())), _, *_]:
                node.body.pop(0)
    return tree


@functools.cache
def _facts(tree: ast.AST) -> tuple[str, set[str], set[str]]:
    """What :func:`source_hash` asks of a tree: its shape, names, and globals read.

    The names are all names and attributes: more than is called, never less. The globals are the
    names that are bound nowhere in the tree: no attributes, no local names.
    """
    nodes = list(ast.walk(tree))
    names = {n.id for n in nodes if isinstance(n, ast.Name)}
    bound = {n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    bound |= {n.arg for n in nodes if isinstance(n, ast.arg)}
    attributes = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    return _shape(tree), names | attributes, names - bound


def _shape(part) -> str:
    """A tree as text, as ``ast.dump`` gives it, but the same in every Python."""
    if isinstance(part, ast.AST):
        fields = [f"{k}={_shape(v)}" for k, v in ast.iter_fields(part) if v is not None and v != []]
        return f"{type(part).__name__}({', '.join(fields)})"
    return f"[{', '.join(map(_shape, part))}]" if isinstance(part, list) else repr(part)


def commit() -> str:
    """The project's commit, with ``+changes`` where its code differs from it.

    ``unknown`` where the project is no repository of its own, whatever repository it lies in and
    whichever the environment names.
    """
    own = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or "CONFIG" in k}
    here = [f"--git-dir={PROJECT / '.git'}", f"--work-tree={PROJECT}"]

    def git(*words):  # without locks, which git would leave behind where it is killed
        command = ["git", *here, "--no-optional-locks", *words]
        return subprocess.run(command, cwd=PROJECT, env=own, capture_output=True).stdout.decode()

    try:
        head = git("rev-parse", "--verify", "HEAD").strip()
        changed = git("status", "--porcelain", "--", "kdutils", "notebooks/*.md")
    except OSError:  # there is no git
        head = ""
    return head + "+changes" * bool(changed) if head else "unknown"


def _processor() -> str:
    try:  # where /proc says, it says more than Python does; on ARM it does not
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
