"""Spread: runs side by side, what they will cost, and one bar that says how long they still take.

Knows engines, workers and time; knows nothing of what a run is and does.
"""

import atexit
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

from kdutils import files, records

_ONE_AT_A_TIME = threading.Lock()  # a process has one random state and one number of threads


class WorkerLost(RuntimeError):
    """A worker process ended in the middle of a run."""


class Plan:
    """All runs that a command has to train, as far as is known, and one bar for them.

    A ``dry`` plan only collects what would be trained. A part of that may stand in for what is
    chosen later, so the runs that are then asked for take the place of those expected.
    """

    def __init__(self, dry=False):
        self.dry, self.training, self.trained = dry, False, 0
        self.calls = []  # of Study.map: kind of run, how many were asked for, workers, new folders
        self.announced, self.begun = set(), time.monotonic()
        self.folder = self.past = self.due = self.shown = None

    def compute(self, run, asked: list[dict], missing: list[dict]) -> list[dict]:
        """Train those of the runs ``asked`` for that are ``missing``: their records' contents."""
        from tqdm.auto import tqdm

        study, found, self.folder = run.study, [], run.study.folder
        self.past = past(study) if self.past is None else self.past
        share = workers(study, self.past.get(run.name, []))
        self._expect((run.name, len(asked)), share, [run.folder(a).name for a in missing])
        if self.dry or not missing:
            return []
        self.say(study.only)
        style = {"desc": run.name, "total": 1, "bar_format": "{desc} |{bar}|", "leave": False}
        self.training = True
        with closing(_contents(run, missing, share)) as contents, tqdm(**style) as bar:
            self._show(bar, run.name, news=True)
            for content in contents:
                if content:
                    path = run.folder(content["arguments"]) / "record.json"
                    if not path.exists():  # a worker with a disk of its own
                        files.write(path, json.dumps(content, indent=1))
                    self.past.setdefault(run.name, []).append(content["made"])
                    found.append(content)
                    self.trained += 1
                self._show(bar, run.name, news=content is not None)
        self.training = False
        return found

    def say(self, only="") -> None:
        """What is to be trained and how long that will take, a line a kind, unless said before.

        Before all, where that is so, that no run so far was made on such a machine as this: a
        claim that mixes them would compare machines.
        """
        from kdutils import train

        new = {name: how for name, how in self._left().items() if name not in self.announced}
        here = records.place(records.made_with(train.device_description()))
        places = {records.place(made) for of in self.past.values() for made in of}
        if new and places and here not in places and not self.announced:
            told = f"this is {here}, published runs are of {'; '.join(sorted(places))}"
            print(f"{told}: other bits, another speed; keep a seed to one kind of machine")
        self.announced |= new.keys()
        kinds = Counter(new.values())
        for (kind, share), n in kinds.items():
            line = f"{kind}: {n} run{'s' * (n > 1)} to train" + f", {share} at a time" * (share > 1)
            if self.past.get(kind):
                line += f", about {duration(estimate([(kind, share)] * n, self.past))}"
            print(line + ", without those that they need" * bool(only))
        if len(kinds) > 1:
            seconds = estimate(new.values(), self.past)
            about = "" if seconds is None else f", about {duration(seconds)}"
            print(f"in all: {len(new)} runs{about}")

    def summary(self) -> str:
        """What was trained, in one sentence."""
        spent = duration(time.monotonic() - self.begun)
        count = f"{self.trained} run{'s' * (self.trained > 1)}"
        return f"trained {count} in {spent}" if self.trained else "every run has a record"

    def _expect(self, call: tuple[str, int], share: int, folders: list[str]) -> None:
        """Note what a call of ``Study.map`` trains, in place of what it had been expected to."""
        same = [k for k, one in enumerate(self.calls) if one[:2] == call and not one[4]]
        at = same[0] if same and not self.dry else len(self.calls)
        before = self.calls[at][3] if at < len(self.calls) else []
        if len(folders) <= len(before) and self.announced.issuperset(before):
            self.announced |= set(folders)
        self.calls[at : at + 1] = [(*call, share, folders, not self.dry)]

    def _left(self) -> dict[str, tuple[str, int]]:
        """What has no record yet: by folder its kind, and how many go side by side."""
        every = {f: (kind, share) for kind, _, share, folders, _ in self.calls for f in folders}
        return {f: v for f, v in every.items() if not (self.folder / f / "record.json").exists()}

    def _show(self, bar, kind: str, news: bool) -> None:
        """Draw the bar; between one finished run and the next the time left is counted down."""
        now, often = time.monotonic(), 1 if sys.stderr.isatty() else 60
        if not news and now - self.shown < often:
            return
        left = self._left()
        if news:
            seconds = estimate(left.values(), self.past)
            self.due = None if seconds is None else now + seconds
        every = {f for one in self.calls if one[0] == kind for f in one[3]}
        if self.due is None:
            bar.n, text = self.trained / (self.trained + len(left)), "time left not known yet"
        else:
            rest = max(self.due - now, 0)
            bar.n = (now - self.begun) / (now - self.begun + rest) if rest else 1
            text = f"{100 * bar.n:.0f} %, {duration(rest)} left"
        done = f"{len(every - left.keys())}/{len(every)}"
        bar.set_description_str(f"{kind} {done}, {text}", refresh=False)
        bar.refresh()
        self.shown = now


def past(study) -> dict[str, list[dict]]:
    """How runs of this study and scale were made, by kind: here, or if none was, elsewhere."""
    here, elsewhere = {}, {}
    shared = study.published.glob("*.json") if study.published else []
    for found, paths in ((here, study.folder.glob("*/record.json")), (elsewhere, shared)):
        for content in map(records.read, paths):
            if content and content["scale"] == study.scale:
                found.setdefault(content["run"], []).append(content["made"])
    return elsewhere | here


def estimate(missing: Iterable[tuple[str, int]], past: dict[str, list[dict]]) -> float | None:
    """Seconds that runs will take: of each its kind and how many of them go side by side.

    ``past`` is what :func:`past` returns. A kind without records is taken for an average one; None
    where no kind has any. However many go side by side, a kind takes as long as one run of it.
    """
    counts = Counter(missing)
    known = [(kind, sum(m["seconds"] for m in made) / len(made)) for kind, made in past.items()]
    if counts and not known:
        return None
    usual = sum(mean for _, mean in known) / max(len(known), 1)
    return sum(dict(known).get(k, usual) * max(n / share, 1) for (k, share), n in counts.items())


def duration(seconds: float) -> str:
    """As people say it: ``40 s``, ``12 min``, ``4 h 30 min``."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def workers(study, made: list[dict]) -> int:
    """How many runs this machine computes side by side; what a far cluster does is not known.

    On a graphics card half as many as there are cores, otherwise one a core (or as many cores as a
    run has threads); fewer where the memory that such runs took (``made``) leaves no room.
    """
    if study.engine == "serial" or "://" in study.engine:
        return 1
    if study.workers:
        return study.workers
    import joblib
    import torch

    most = joblib.cpu_count() // (2 if torch.cuda.is_available() else study.threads)
    peak = max((m["peak_memory_mb"] for m in made), default=0)
    memory_mb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 1024**2
    return max(1, min(most, memory_mb // peak if peak else most))


def _contents(run, missing: list[dict], share: int) -> Iterator[dict | None]:
    """Compute the runs where the engine says: contents as they end, None when a second went by."""
    study = run.study
    share = min(share, len(missing))
    if study.engine == "serial":
        yield from (_compute(run, 1, arguments) for arguments in missing)
    elif study.engine == "processes":
        yield from _in_processes(run, missing, share)
    else:
        from dask.distributed import Client, as_completed

        here = study.engine == "dask"
        where = {"n_workers": share, "threads_per_worker": 1} if here else {"address": study.engine}
        with Client(**where) as client:
            one = partial(_compute, run, share if here else None)
            futures = client.map(one, missing, pure=False)
            yield from (content for _, content in as_completed(futures, with_results=True))


def _in_processes(run, missing: list[dict], share: int) -> Iterator[dict | None]:
    import multiprocessing
    from concurrent.futures import FIRST_COMPLETED, wait
    from concurrent.futures.process import BrokenProcessPool

    from joblib.executor import get_memmapping_executor  # joblib's own: a page may use both

    _mark_pool()
    # What removes a stopped pool's leftovers outlives us, and would warn after our last line if
    # some were gone already; it is begun with our options.
    sys.warnoptions += {"ignore:resource_tracker:UserWarning"} - {*sys.warnoptions}
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    threads = dict.fromkeys(names, str(run.study.threads))
    begin = {"initializer": _begin, "initargs": (os.getpid(),), "env": threads, "timeout": 300}
    pool = get_memmapping_executor(share, max_nbytes=None, **begin)
    try:
        waiting = {pool.submit(_compute, run, share, arguments) for arguments in missing}
        while waiting:
            ended, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in ended) if ended else [None]
    except BrokenProcessPool:
        raise WorkerLost(
            "a worker was killed, most often for want of memory; what is finished is kept, and the "
            "same command goes on (fewer workers need less memory)"
        ) from None
    except BaseException:  # an interruption, above all: leave no process and no half file behind
        for process in multiprocessing.active_children():
            process.terminate()
            process.join(5)  # else the last line is at times a warning of joblib's
        pool.shutdown(kill_workers=True)
        files.sweep(run.study.folder, "*/*.partial")
        raise


def _mark_pool(shared=Path("/dev/shm")) -> None:
    """Remove what killed pools left in shared memory; joblib's names for it say no machine.

    By process number: containers that share this folder must share the numbers too.
    """
    for mark in shared.glob("kdpool-*-mark"):
        if pid := files.ended(mark):
            for left in (f"sem.loky-{pid}-*", f"joblib_memmapping_folder_{pid}_*", mark.name):
                files.sweep(shared, left, hours=0)
    mark = shared / f"kdpool-{files.owner()}-mark"
    with suppress(OSError):  # no such folder, or another user's mark
        mark.touch()
        atexit.register(mark.unlink, missing_ok=True)


def _begin(parent: int) -> None:
    """In a worker: end when the parent has ended.

    Ctrl-C reaches all processes of a terminal; it is the parent that then ends its workers.
    """

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(143)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def _compute(run, share: int | None, arguments: dict) -> dict:
    """Compute a run here, one of ``share`` side by side; the content of its record."""
    if "MALLOC_TRIM_THRESHOLD_" in os.environ and sys.platform == "linux":
        # Dask has its workers give freed memory back at once. That is each step's: it would be
        # faulted in anew, page by page, and two workers would wait for one kernel.
        for option, value in {-1: 2**31 - 1, -3: 2**25}.items():  # M_TRIM_, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    with _ONE_AT_A_TIME:
        run.study.sharing = share
        return run.compute(arguments).content
