"""Runs: functions of plain arguments that are computed once and leave a record.

Knows folders, keys and records; knows nothing of what is trained.
"""

import hashlib
import inspect
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pandas as pd

from kdutils import files, records, spread


class RunFailed(RuntimeError):
    """A run ended without a result; its record says where."""


def grid(fixed: dict | None = None, /, **axes) -> list[dict]:
    """All combinations of the axes (an axis that is no list has one value), each with ``fixed``.

    >>> grid({"milestones": [6, 8]}, seed=[0, 1])
    [{'milestones': [6, 8], 'seed': 0}, {'milestones': [6, 8], 'seed': 1}]
    """
    lists = [v if isinstance(v, list | tuple | range) else [v] for v in axes.values()]
    combinations = itertools.product(*lists)
    return [(fixed or {}) | dict(zip(axes, values, strict=True)) for values in combinations]


class Study:
    """A named set of runs at one scale.

    ``engine`` says where :meth:`map` computes: ``serial``, ``processes``, ``dask`` (a cluster of
    this machine's cores) or the address of a Dask scheduler. Every run uses ``threads`` threads,
    wherever it is computed, because the last bits of a result depend on their number. How many go
    side by side on this machine is its ``workers``, or :func:`spread.workers` while that is None.
    With ``train=False`` only published records are read, so that the same is shown on every
    machine. ``smoke`` reads no records: it trains.
    """

    def __init__(self, name: str, *, scale: str, engine="processes", threads=1, train=True):
        self.name, self.scale, self.engine = name, scale, engine
        self.threads, self.train = threads, train or scale == "smoke"
        self.workers, self.sharing = None, 1  # sharing: of a run that is being computed
        self.only, self.plan = "", None  # see notebooks.train
        self.records: list[Record] = []
        self.commit, self.register = records.commit(), records.register(name)
        self._scratch = tempfile.TemporaryDirectory() if scale == "smoke" else None
        self.folder = Path(self._scratch.name) if self._scratch else self._own_folder()
        self.published = None if self._scratch else records.published_folder() / name
        if self.train:
            files.sweep(self.folder, "*/*.partial")

    def run(self, function: Callable | None = None, *, version: int = 1):
        """Make ``function(run, **arguments)`` a run: computed once, afterwards read.

        The function gets a :class:`Run` first, then plain (JSON) arguments by name, and returns a
        dict of what it found, as plain; a ``history`` in it is a list of dicts, one an epoch, that
        may say its ``seconds``. A number that is not finite makes the run a failed one. Raise
        ``version`` when the function's meaning changes: it is part of the key.
        """
        made = partial(RunFunction, self, version=version)
        return made(function) if function else made

    def map(self, run, arguments: list[dict], *, optional=False, failing=False) -> pd.DataFrame:
        """One row a run and epoch: arguments, history, and the run's other results.

        Runs without a record are computed by the engine (with ``train=False``: left out, and
        having none at all is a RunFailed unless the runs are ``optional``). Says beforehand how
        many there are to compute and, where records tell, how long that will take. A run that
        diverged is a RunFailed too; with ``failing`` it is one row, with its ``error``.
        """
        found = {run.key(a): run.find(a) for a in arguments}
        missing = [a for a in arguments if found[run.key(a)] is None]
        if (missing or self.plan) and self.train and self.only in ("", run.name):
            for content in (self.plan or spread.Plan()).compute(run, arguments, missing):
                found[content["key"]] = Record(content, run.folder(content["arguments"]), run)
        elif missing and not self.plan:
            print(f"{run.name}: {len(missing)} of {len(arguments)} runs have no record yet")
        done = [record for record in found.values() if record is not None]
        if not done and not (optional or self.only or (self.plan and self.plan.dry)):
            raise RunFailed(f"no run of {run.name!r} has a record: let them be trained")
        failed = [r for r in done if r.content["status"] == "failed"]
        if failed and not failing:
            raise RunFailed("; ".join(_failure(r) for r in failed))
        known = {r.content["key"] for r in self.records}
        self.records += [r for r in done if r.content["key"] not in known]
        frame = pd.DataFrame([row for record in done for row in record.rows()])
        frame.attrs["history"] = sorted({k for r in done for k in r.history_names()})
        return frame

    def _own_folder(self) -> Path:
        return records.runs_folder() / self.name

    def __getstate__(self):
        """What a worker needs; the scratch folder stays with the study that made it."""
        far = "://" in self.engine and self.folder == self._own_folder()
        own = {"_scratch": None, "records": [], "plan": None} | ({"folder": None} if far else {})
        return self.__dict__ | own

    def __setstate__(self, state):
        """On a far worker, whose disk may be its own: so are the folders of runs and records."""
        self.__dict__ |= state
        if self.folder is None:
            self.folder = self._own_folder()
            self.published = self.published and records.published_folder() / self.name


@dataclass
class Run:
    """What a run's function is told of itself: the folder that is its own."""

    folder: Path


@dataclass
class Record:
    """What went into a run, what came out, and where it ran; see ``content``."""

    content: dict
    folder: Path
    run: "RunFunction"

    @property
    def arguments(self) -> dict:
        return self.content["arguments"]

    @property
    def results(self) -> dict:
        return self.content["results"]

    def done(self) -> "Record":
        """The record itself; a RunFailed where the run has no result."""
        if self.content["status"] == "failed":
            raise RunFailed(_failure(self))
        return self

    def rows(self) -> list[dict]:
        """One row an epoch (one in all where there is no history).

        A run's argument wins over an entry of the history that has its name (a first learning rate
        over that of the epoch).
        """
        rest = {k: v for k, v in self.results.items() if k != "history"}
        common = {**self.arguments, **rest, "key": self.content["key"]}
        return [{**row, **common} for row in self.results.get("history", [{}])]

    def history_names(self) -> set[str]:
        """Which of the columns of :meth:`rows` are of the history."""
        names = {k for row in self.results.get("history", []) for k in row}
        return names - self.arguments.keys() - self.results.keys()

    def weights(self, name: str) -> Path:
        """The file of weights ``name``, e.g. ``e6``. What is gone or damaged is trained again.

        The record is then that of the training that made the file, as other machines' bits differ.
        """
        file = f"{name}.safetensors"
        if file not in self.content["weights"]:
            raise KeyError(f"run {self.content['key']} kept no weights {name!r}")
        made = self.run.compute(self.arguments, needs=file).done()
        self.content = made.content
        return made.folder / file


class RunFunction:
    """A function made a run by :meth:`Study.run`; call it with its arguments for its record."""

    def __init__(self, study: Study, function: Callable, version: int):
        self.study, self.function, self.version = study, function, version
        self.name, self.__doc__ = function.__name__, function.__doc__
        self.source = records.source_hash(function)

    def bind(self, arguments: dict) -> dict:
        """The arguments by name, defaults filled in, as JSON would give them back."""
        signature = inspect.signature(self.function)
        signature.bind(None, **arguments)  # a TypeError names what is missing or unknown
        known = {k: v.default for k, v in signature.parameters.items() if v.default is not v.empty}
        return json.loads(json.dumps(known | arguments))

    def key(self, arguments: dict) -> str:
        """Twelve hexadecimal digits made of study, function, version and arguments."""
        parts = [self.study.name, self.name, self.version, self.bind(arguments)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

    def folder(self, arguments: dict) -> Path:
        return self.study.folder / f"{self.name}-{self.key(arguments)}"

    def find(self, arguments: dict) -> Record | None:
        """The record of this run, from this machine or published; None where there is none.

        A study that does not train looks at published ones alone.
        """
        folder = self.folder(arguments)
        places = [folder / "record.json"] if self.study.train else []
        if self.study.published:
            places.append(self.study.published / f"{folder.name}.json")
        content = next(filter(None, map(records.read, places)), None)
        return Record(content, folder, self) if content else None

    def __call__(self, **arguments) -> Record:
        """The run's record, computed now if there is none."""
        return (self.find(arguments) or self.compute(arguments)).done()

    def compute(self, arguments: dict, needs: str = "record.json") -> Record:
        """Compute the run here, unless this machine has its record and the file it ``needs``.

        A lock makes a second process that wants the same run wait for the first one's result;
        what is sound is decided under it, and by this machine's own record alone.
        """
        from filelock import FileLock

        folder = self.folder(arguments)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            files.sweep(folder)
            content, path = records.read(folder / "record.json"), folder / needs
            expected = content["weights"].get(needs) if content else None
            if expected and path.exists() and files.sha256(path) != expected:
                files.set_aside(path, "its SHA-256 is not the record's")
            if not content or not path.exists():
                content = self._execute(arguments, folder)
        return Record(content, folder, self)

    def _execute(self, arguments: dict, folder: Path) -> dict:
        import torch

        from kdutils import train

        bound = self.bind(arguments)
        threads = torch.get_num_threads()
        torch.set_num_threads(self.study.threads)
        made_with = records.made_with(train.device_description()) | {"source": self.source}
        text, begun_with = json.dumps(made_with, indent=1), folder / "made_with.json"
        if not begun_with.exists() or begun_with.read_text(encoding="utf-8") != text:
            for path in folder.glob("*.safetensors"):  # other bits would follow: begin again
                path.unlink()
        files.write(begun_with, text)
        started, begun = time.perf_counter(), datetime.now(UTC)
        content = {"study": self.study.name, "run": self.name, "version": self.version}
        content |= {"key": self.key(arguments), "scale": self.study.scale, "arguments": bound}
        content["status"] = "done"
        try:
            found, odd = self.function(Run(folder), **bound), []
            text = json.dumps(found, default=lambda array: array.tolist())  # NumPy's and torch's
            results = json.loads(text, parse_constant=odd.append)  # NaN and infinities
            if odd:
                broken = [k for k, v in results.items() if "null" in json.dumps(v)]
                results = {"error": f"{', '.join(broken)} is not finite"}
                content["status"] = "failed"
        except train.Diverged as error:
            results = {"error": str(error), "epoch": error.epoch, "step": error.step}
            content["status"] = "failed"
        finally:
            torch.set_num_threads(threads)
        every = sorted(folder.glob("*.safetensors"))
        kept = [p for p in every if not p.name.startswith(("outputs-", "state."))]
        wall = time.perf_counter() - started
        content["results"] = results
        content["weights"] = {path.name: files.sha256(path) for path in kept}
        epochs = sum(row.get("seconds", 0) for row in results.get("history", []))
        made = {"begun": begun.isoformat(timespec="seconds"), "seconds": round(epochs or wall, 1)}
        made |= {"peak_memory_mb": records.peak_memory_mb(), "workers": self.study.sharing}
        made |= made_with | {"commit": self.study.commit, "register": self.study.register}
        content["made"] = made | {"data": records.data_named_in(bound)}
        files.write(folder / "record.json", json.dumps(content, indent=1, allow_nan=False))
        (folder / "state.safetensors").unlink(missing_ok=True)  # not before the record is safe
        return content


def _failure(record: Record) -> str:
    what = f"{record.content['key']} ({record.content['run']} {record.arguments})"
    what_now = f"change its arguments, or delete {record.folder} to try again"
    return f"run {what} failed: {record.results['error']}; {what_now}"
