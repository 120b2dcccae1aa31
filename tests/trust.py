"""Measure trust: is anything lost to a kill, and is anything damaged ever used in silence?

``python tests/trust.py kills --times 200`` ends commands by SIGKILL, the whole process group, at
moments drawn from the time that they take undisturbed, and gives them again.
``python tests/trust.py damage --times 200`` spoils a file in one of six ways and looks at what the
commands that read it say and make. Both print a table, and exit with 1 where a goal is missed. All
happens in a temporary folder: a copy of the project with a tiny study, and folders of its own.
"""

import argparse
import atexit
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import chdir, suppress
from functools import cache, partial
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import psutil
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
SERVER = multiprocessing.get_context("forkserver")  # it imports once; a command is a fork of it
IMPORTED = ["kdutils.__main__", "kdutils.train", "kdutils.models", "kdutils.pages", "jupytext"]
IMPORTED += ["nbclient", "ipykernel.kernelspec", "jupyter_client.manager", "filelock", "PIL.Image"]
IMPORTED += ["sklearn.model_selection", "tqdm.contrib.concurrent"]
CELLS = {  # of the tiny study's page
    "parameters": 'scale, engine, train_missing = "laptop", "serial", False',
    "define": """
from tiny import tiny_study

from kdutils import claims, grid, pages, results

study, network = tiny_study(engine, scale, train_missing)
asked = grid(seed=[0, 1], dataset="tiny")

@study.run
def sure(run, seed, dataset):
    from kdutils import data, models, train

    images = data.parts(dataset, validation=200, batch_size=50, seed=seed)
    teacher = models.build("convnet", classes=10, seed=0, widths=(8, 16))
    train.load_weights(teacher, network(seed=seed, dataset=dataset).weights("e3"))
    said = train.stored_outputs(teacher, images.train, 9, run.folder)
    return {"accuracy": float(said.softmax(-1).amax(-1).mean())}
""",
    "runs": "one, two = study.map(network, asked), study.map(sure, asked, optional=True)",
    "claims": """
first, second = results.final(one), results.final(two, "accuracy")
claims.show(*claims.judge("tiny", scale, {"tiny-1": first, "tiny-2": second - first}))
""",
    "answer": "pages.provenance(study)",
}
CLAIMED = """tiny-1,tiny,here,"It learns, somewhat",accuracy,0.9,above,,0.2,,0.01,points,2
tiny-2,tiny,here,It knows,"how sure, and accuracy",0.1,above,,-0.5,0.6,0.01,points,2
"""
PAGE, REGISTER = "project/notebooks/9-tiny.ipynb", "project/data/claims.csv"
MADE, PUBLISHED, CRATE = "runs/tiny", "project/data/records/tiny", "project/crate.json"
FOLDERS = {"DATA": "data", "RUNS": "runs", "RECORDS": "project/data/records"}
PICTURES, TOOLS = "data/dogs-vs-cats.npz", "project/tools"
TRAIN, PUBLISH, SYNC = ["train", "tiny", "--scale", "laptop"], ["publish", "tiny"], ["sync", "tiny"]
WORKERS = [*TRAIN, "-p", "engine=processes", "--workers", "2"]
IMPORT, CLAIMS = ["data", "import", "kaggle.zip", "--size", "200"], ["claims", "--json"]
CHECK = ["-IS", f"{TOOLS}/check_claims.py", "project"]
ASK = [["-IS", f"{TOOLS}/read_crate.py", name, CRATE] for name in ("tiny-1", "tiny-2")]
WRITE = ["-B", f"{TOOLS}/write_crate.py", CRATE]
NBVAL = ["-m", "pytest", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider", PAGE]
KILLED = {  # a kind of work: its share in 20 kills, its command, what it is to make again
    "train": (6, TRAIN, [MADE, PUBLISHED]),
    "train, 2 workers": (1, WORKERS, [MADE, PUBLISHED]),
    "publish": (5, PUBLISH, [PUBLISHED]),
    "data import": (4, IMPORT, []),
    "sync": (4, SYNC, [f"{PUBLISHED}/sure-*"]),  # the page then says that they are missing
}
TIMES = rb'"(begun|seconds|workers|peak_memory_mb)": [^,\n}]+'  # two records of a run may differ in
HEAD = rb'(?s)\A.*?"arguments": \{.*?\}|"(test_)?accuracy": [\d.]+(?!.*accuracy)'
STORED, ANY = rb'(?sm)^( *)"application/vnd\.kdutils\.claims\+json": .*?^\1\]', rb"(?s).+"
DAMAGED = {  # a kind of file: where it lies, which bytes matter, what is to be made again, by what
    "record": (f"{PUBLISHED}/[ns]*", HEAD, [MADE], [CHECK, TRAIN, PUBLISH]),
    "weights": (f"{MADE}/network-*/e3.*", ANY, [f"{MADE}/sure-*", PUBLISHED], [TRAIN]),
    "dataset": ("data/tiny.npz", ANY, [MADE, PUBLISHED], [TRAIN]),
    "archive": ("kaggle.zip", ANY, [], [IMPORT]),
    "notebook": (PAGE, STORED, [], [CLAIMS, CHECK]),
    "register": (REGISTER, ANY, [], [CLAIMS, CHECK]),
    "crate": (CRATE, ANY, [], ASK),
}
WAYS = ("cut short", "a byte flipped", "emptied", "zeros", "a folder", "another kind of file")
GOOD = {"kills": ("tried",), "damage": ("tried", "clear error", "recovered", "unharmed")}
BAD = {"kills": ("lost", "different", "left over"), "damage": ("no sentence", "used")}
OUTSIDE = """Outside: in records, bytes are flipped that a run's key is made of or a claim names;
dates, durations, versions and other epochs are guarded by git alone. In notebooks, in what they
store of claims. Who reads a crate alone sees no flipped digit: it is found by writing it again. An
interrupted run's state and stored outputs have no checksum: a byte flipped there is not found."""


def command(words: list[str], folder: Path) -> None:
    """In a fork: what ``python -m kdutils`` does, in a process group of its own."""
    os.setpgid(0, 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder / "work")
    sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
    from kdutils import __main__

    multiprocessing.set_start_method(None, force=True)  # the default, as in a new Python
    sys.argv = ["kdutils", *words]
    try:
        __main__.main()
    finally:
        threading._shutdown()  # what a fork leaves out, in Python's order
        atexit._run_exitfuncs()


class Project:
    """A copy of the project in the folder ``base``, with a tiny study and all that is made of it.

    ``fresh`` makes it by new Pythons, as a user does, so that forks are compared with these.
    """

    def __init__(self, base: Path, fresh: bool = False, also=(PUBLISH, SYNC, IMPORT, WRITE)):
        self.base, self.work, self.whole, self.fresh = base, base / "work", base / "whole", fresh
        self.root, self.started = self.work / "project", set()
        path = [self.root, ROOT / "tests", os.environ.get("PYTHONPATH", "")]
        os.environ |= {f"KDUTILS_{name}": str(self.work / at) for name, at in FOLDERS.items()}
        os.environ |= {"TMPDIR": str(self.work / "tmp"), "PYTHONPATH": ":".join(map(str, path))}
        os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # for bits, and forks
        self._study()
        self._data()
        git = ["git", "-C", self.root, "-c", "user.name=a", "-c", "user.email=a@b.c"]
        for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all", "--no-gpg-sign"]):
            subprocess.run([*git, *words], check=True)
        SERVER.set_forkserver_preload(IMPORTED)
        with chdir(base):  # where no other kdutils lies
            forkserver.ensure_running()
        self.server = {process.pid for process in psutil.Process().children()}
        self.run(["data", "where"])  # so that it has imported all
        self.sound(TRAIN, fresh)
        record = next(self.work.glob(f"{MADE}/network-*/record.json"))
        content = json.loads(record.read_text(encoding="utf-8")) | {"run": "extra"}
        for k in range(60):  # four are published in no time
            path = record.parents[1] / f"extra-{k:012x}" / record.name
            path.parent.mkdir()
            path.write_text(json.dumps(content | {"key": f"{k:012x}"}), encoding="utf-8")
        for words in also:
            self.sound(words, fresh)
        shutil.copytree(self.work, self.whole)

    def _study(self):
        import jupytext

        for name in ("data", "tmp", "project/notebooks/params"):
            (self.work / name).mkdir(parents=True)
        unwanted = shutil.ignore_patterns("__pycache__", "records", "reported")
        for name in ("kdutils", "tools", "data"):
            shutil.copytree(ROOT / name, self.root / name, ignore=unwanted)
        shutil.copy(ROOT / "CITATION.cff", self.root)
        page, register = self.work / PAGE, self.work / REGISTER
        (page.parent / "params" / "tiny.laptop.yaml").write_text("scale: laptop", encoding="utf-8")
        text = "---\nkernelspec:\n  name: python3\n  display_name: Python 3\n---\n"
        for tag, source in CELLS.items():
            text += f"\n```{{code-cell}} ipython3\n:tags: [{tag}]\n\n{source.strip()}\n```\n"
        page.with_suffix(".md").write_text(text, encoding="utf-8")
        jupytext.write(jupytext.read(page.with_suffix(".md")), page)
        columns = register.read_text(encoding="utf-8").partition("\n")[0]
        register.write_text(f"{columns}\n{CLAIMED}", encoding="utf-8")

    def _data(self):
        from PIL import Image

        from kdutils import data

        rng, arrays, prints = np.random.default_rng(0), {"names": np.arange(10).astype(str)}, ""
        for split, n in (("train", 1200), ("test", 600)):
            x, y = rng.integers(0, 256, (n, 16, 16, 3), np.uint8), np.arange(n, dtype=np.uint8) % 10
            arrays |= {f"x_{split}": x, f"y_{split}": y}
            prints += f'fingerprints.{split} = "{data.fingerprint(x, y)}"\n'
        np.savez(self.work / "data" / "tiny.npz", **arrays)
        with open(self.root / "data" / "sources.toml", "a", encoding="utf-8") as file:
            file.write(f'\n[tiny]\ntitle = "noise"\n{prints}')
        with zipfile.ZipFile(self.work / "kaggle.zip", "w") as archive:
            for k in range(60):
                picture = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(picture, "PNG")
                archive.writestr(f"train/{('cat', 'dog')[k % 2]}.{k}.png", picture.getvalue())

    def begin(self, gone: list[str]) -> None:
        """All there is, without what is to be made again."""
        shutil.rmtree(self.work)
        shutil.copytree(self.whole, self.work)
        for path in [path for pattern in gone for path in self.work.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def start(self, words: list[str]):
        """The process of a command, which has begun."""
        process = SERVER.Process(target=command, args=(words, self.base))
        process.start()
        self.started.add(process.pid)
        with suppress(ProcessLookupError):
            while os.getpgid(process.pid) != process.pid:
                time.sleep(0.001)
        return process

    def run(self, words: list[str], fresh: bool = False) -> tuple[int, str, str]:
        """A command's exit status, what it says, durations aside, and what it says of errors."""
        if fresh or words[0].startswith("-"):  # the latter is none of kdutils
            python = [sys.executable, *(["-m", "kdutils"] * (words[0][0] != "-")), *words]
            options = {"cwd": self.work, "capture_output": True, "encoding": "utf-8"}
            done = subprocess.run(python, **options)
            return done.returncode, done.stdout, done.stderr
        process = self.start(words)
        process.join()
        out, err = ((self.base / name).read_text(encoding="utf-8") for name in ("out", "err"))
        return process.exitcode, re.sub(r"\d+ (s|min)\b", "", out), err

    def sound(self, words: list[str], fresh: bool = False) -> str:
        """What a command says that has to end well."""
        code, out, err = self.run(words, fresh)
        assert code == 0, (words, out, err)
        return out

    def tree(self) -> dict[str, str]:
        """Every file and folder there is, with its digest, times in records aside."""
        found = {}
        for path in self.work.rglob("*"):
            name = path.relative_to(self.work).as_posix()
            of_git = "/.git/" in name and path.suffix != ".lock"
            if not of_git and "__pycache__" not in name and path.name != "log":
                with suppress(OSError):  # what ends takes its files along
                    raw = path.read_bytes() if path.is_file() else b""  # a folder, a socket
                    raw = re.sub(TIMES, b"", raw) if path.suffix == ".json" else raw
                    found[name] = hashlib.sha256(raw).hexdigest()
        return found

    def living(self) -> list[psutil.Process]:
        """The processes of commands, and those that they started."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                mine = process.environ().get("KDUTILS_RUNS") == str(self.work / "runs")
                if mine and process.pid not in self.server:
                    found += [process] * (process.status() != psutil.STATUS_ZOMBIE)
        return found

    def left_over(self, wanted: dict[str, str]) -> list[str]:
        """Files, shared memory and processes that an undisturbed command does not leave."""
        last = time.monotonic() + 30  # a kernel looks every second whether its parent lives
        while (processes := self.living()) and time.monotonic() < last:
            time.sleep(0.05)
        for process in processes:
            process.kill()
        numbers = {name: re.search(r"[-_](\d+)[-_]", name) for name in os.listdir("/dev/shm")}
        shared = [name for name, n in numbers.items() if n and int(n[1]) in self.started]
        for path in (Path("/dev/shm", name) for name in shared):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return [*sorted(self.tree().keys() - wanted), *shared, *map(str, processes)]


def kills(project: Project, counts: dict[str, int], seed: int) -> tuple[dict[str, Counter], list]:
    """Kill each kind of work so often: what came of it, by kind, and a line for every fault."""
    rng, found, faults = random.Random(seed), {kind: Counter() for kind in counts}, []

    def fault(what, names):
        found[kind][what] += len(names)
        faults.extend(f"{kind}: {what}: {name}" for name in names)

    def compare(now, before):  # what was there stays, as it was or as it is to be
        fault("lost", sorted((before.keys() & wanted) - now.keys()))
        both = sorted(now.keys() & wanted)
        fault("different", [n for n in both if now[n] not in (wanted[n], before.get(n))])

    bar = tqdm(total=sum(counts.values()), unit="kill")
    for kind, count in counts.items():
        bar.set_description(kind)
        _, words, gone = KILLED[kind]
        wanted = None
        for fresh in (True, False, False) if project.fresh else (False,):
            project.begin(gone)
            started = time.monotonic()
            project.sound(words, fresh)
            longest = time.monotonic() - started  # that of the last
            wanted = wanted or project.tree()
            compare(project.tree(), wanted)
        project.started.clear()  # what ended well leaves nothing that a later sweep would not find
        while found[kind]["tried"] < count:
            project.begin(gone)
            before, killed, first = project.tree(), True, True
            while killed:
                kill = first or (rng.random() < 0.25 and found[kind]["tried"] < count)
                process, first = project.start(words), False
                process.join(rng.uniform(0, longest) if kill else 600)
                with suppress(ProcessLookupError):
                    if process.is_alive():
                        os.killpg(process.pid, signal.SIGKILL)
                process.join()
                killed = kill and process.exitcode == -signal.SIGKILL
                if killed:
                    found[kind]["tried"] += 1
                    bar.update()
                    now = project.tree()
                    compare(now, before)
                    before = now
            if process.exitcode:  # it cannot go on, or not within ten minutes
                fault("lost", [(project.base / "err").read_text(encoding="utf-8")[-300:]])
            compare(project.tree(), wanted)
            fault("left over", project.left_over(wanted))
    bar.close()
    return found, faults


def spoil(path: Path, way: str, matter: bytes, other: bytes, rng: random.Random) -> None:
    """Damage a file in one of the WAYS, a flipped byte being one of those that ``matter`` finds."""
    raw = bytearray(path.read_bytes())
    if way == "a byte flipped":
        spans = [range(*found.span()) for found in re.finditer(matter, raw)]
        places = [k for span in spans for k in span if raw[k] not in b" \n"]
        raw[rng.choice(places)] ^= 1 << rng.randrange(8)
    changed = {"cut short": raw[: rng.randrange(1, len(raw))], "emptied": b""}
    changed |= {"zeros": bytes(len(raw)), "another kind of file": other}
    path.unlink()
    path.mkdir() if way == "a folder" else path.write_bytes(changed.get(way, raw))


def outcome(project: Project, kind: str, path: Path, sound: Callable) -> tuple[str, str]:
    """What came of a damaged file, one word of GOOD or BAD, and what was said last.

    ``sound()`` is what commands say and leave where nothing is damaged.
    """
    heard = [(words, *project.run(words)) for words in DAMAGED[kind][3]]
    said, last, now = [out for _, _, out, _ in heard], [], project.tree()
    named = rf"{re.escape(path.name)}|(claim|for) (?!None)\S+"  # the file, or a claim
    for words, code, out, err in heard:
        last += [(err.strip() or out.strip()).rpartition("\n")[2]] * bool(code)
        if "Traceback" in out + err or (code and not re.search(named, last[-1])):
            return "no sentence", f"{' '.join(words)}: {last[-1]}"
    again = any(".damaged-" in name for name in now)
    if again and not any("; set aside as" in out for out in said):
        return "no sentence", "it was set aside in silence"
    if last and not again:
        return "clear error", last[0]
    if kind == "archive" and (skipped := said[0].count("skipped train/")):
        with np.load(project.work / PICTURES) as new, np.load(project.whole / PICTURES) as old:
            some, every = (Counter(map(bytes, of["x_all"])) for of in (new, old))
        named = some <= every and some.total() + skipped == every.total()
        return "clear error" if named else "used", said[0]
    compared = kind in ("record", "notebook", "register") and not again
    if compared and project.run(NBVAL)[0] == 1:
        return "clear error", "nbval: a cell shows something else"
    if kind == "crate":
        project.sound(WRITE)
        now, again = project.tree(), True
    as_said, wanted = sound()
    wrong = {name for name, digest in wanted.items() if now.get(name) != digest}
    if again:
        return "used" if wrong else "recovered", said[-1]
    wrong.discard(path.relative_to(project.work).as_posix())
    return "used" if wrong or said != as_said else "unharmed", said[-1]


def damage(project: Project, tried: list[tuple[str, str]], seed: int) -> tuple[dict, list]:
    """Damage files of these kinds in these ways: what came of it, and a line for every fault."""
    rng, found, faults = random.Random(seed), {}, []

    @cache
    def sound(kind):
        project.begin(DAMAGED[kind][2])
        return [project.sound(words) for words in DAMAGED[kind][3]], project.tree()

    for kind, way in tqdm(tried, unit="file"):
        where, matter, gone, _ = DAMAGED[kind]
        project.begin(gone)
        path = rng.choice(sorted(project.work.glob(where)))
        others = [DAMAGED[k][0] for k in DAMAGED if k != kind]
        other = next(project.whole.glob(rng.choice(others)), path)
        spoil(path, way, matter, other.read_bytes(), rng)
        what, said = outcome(project, kind, path, partial(sound, kind))
        found.setdefault(kind, Counter()).update(["tried", what])
        faults += [f"{kind}, {way}: {what}: {said}"] * (what in BAD["damage"])
    return found, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=GOOD)
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    what, times = options.what, range(options.times)
    with tempfile.TemporaryDirectory(prefix="trust-") as base:
        project = Project(Path(base), fresh=True)
        try:
            if what == "kills":
                kinds = [kind for kind, (share, *_) in KILLED.items() for _ in range(share)]
                counts = Counter(kinds[7 * k % len(kinds)] for k in times)
                found, faults = kills(project, counts, options.seed)
            else:
                project.sound(NBVAL)
                pairs = [(kind, way) for way in WAYS for kind in DAMAGED]
                tried = [pairs[k % len(pairs)] for k in times]
                found, faults = damage(project, tried, options.seed)
        finally:
            for process in project.living():
                process.kill()
    names = GOOD[what] + BAD[what]
    for kind, of in {"": dict(zip(names, names, strict=True)), **found}.items():
        print(f"{kind:18}" + "".join(f"{of[name]:>13}" for name in names))
    print(*faults, OUTSIDE if what == "damage" else "", sep="\n")
    return int(any(of[name] for of in found.values() for name in BAD[what]))


if __name__ == "__main__":
    sys.exit(main())
