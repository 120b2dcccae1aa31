"""`kdutils run` stopped, killed, started in odd places: one sentence, nothing left, it goes on."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat import v4

PARAMETERS = """epochs = 1
lr = 0.1
engine = "processes"
"""
CHECK = """from kdutils import Parameters, Study, grid
from kdutils.parameters import Count, Engine, Positive

class Setting(Parameters):
    epochs: Count
    lr: Positive
    engine: Engine

p = Setting.read(globals())
study = Study("tiny", scale="laptop", engine=p.engine)
"""
RUN = """@study.run
def writing(run, seed):
    "Writes for as many seconds as the environment says."
    import os, time
    from kdutils import files

    os.fsync = lambda _: time.sleep(float(os.environ.get("TINY_WRITES", 0)))
    files.write(run.folder / "e1.safetensors", b"weights")
    return {"found": 1.0}

len(study.map(writing, grid(seed=[0, 1])))
"""
FIGURE = "import matplotlib.pyplot as plt\nplt.plot([1, 2]);"
# The command line, where the notebooks lie in a folder of the test.
KDUTILS = """import sys
from pathlib import Path
from kdutils import __main__, notebooks

notebooks.FOLDER = Path(sys.argv.pop(1))
__main__.main()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with one small study, beside it an own, short folder for temporary files."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setenv("TMPDIR", short)
        yield study(tmp_path, PARAMETERS, CHECK, RUN)


def study(folder: Path, *sources: str) -> Path:
    """Make the study ``tiny`` of these cells, the first of which holds the parameters."""
    notebook = v4.new_notebook(cells=[v4.new_code_cell(source) for source in sources])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.cells[1].metadata["tags"] = ["define"]
    notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": ""}
    (folder / "params").mkdir(exist_ok=True)
    (folder / "params" / "tiny.smoke.yaml").write_text("epochs: 1\n", encoding="utf-8")
    nbformat.write(notebook, folder / "9-tiny.ipynb")
    return folder


def start(folder: Path, *words: str, **environment) -> subprocess.Popen:
    command = [sys.executable, "-c", KDUTILS, str(folder), "run", "tiny", *words]
    if "--output" not in words:
        command += ["--output", str(folder / "out")]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen(command, env=os.environ | environment, **options)


def last_line(folder: Path, *words: str, code: int = 2, **environment) -> str:
    """What is said on standard error in the end, where the command ends with this code."""
    process = start(folder, *words, **environment)
    said = process.communicate()[1]
    assert process.returncode == code, said
    assert "Traceback" not in said
    return said.strip().splitlines()[-1] if said else ""


def leftovers(kind: str) -> list[Path]:
    where = {"kd-*": os.environ["TMPDIR"], "*.partial": os.environ["KDUTILS_RUNS"]}
    return list(Path(where[kind]).rglob(kind))


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def test_stopped_and_killed_it_leaves_nothing_behind_and_goes_on(folder):
    partials = set()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process = start(folder, TINY_WRITES="600")
        wait_until(lambda: len(set(leftovers("*.partial")) - partials) == 2)
        partials = set(leftovers("*.partial"))
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) >= 3, "a kernel and its two workers"
        process.send_signal(signum)
        said = process.communicate(timeout=60)[1]
        if signum == signal.SIGKILL:
            assert process.returncode == -signum
            wait_until(lambda below=below: not any(map(alive, below)))
        else:
            assert process.returncode == 128 + signum
            assert said.strip().splitlines()[-1] == (
                "kdutils: stopped; what is finished is kept, and the same command goes on"
            )
            assert "Traceback" not in said
            assert not any(map(alive, below))
            assert leftovers("kd-*") == []
    assert len(leftovers("kd-*")) == 1  # until the next one starts
    assert last_line(folder, code=0)
    assert leftovers("kd-*") == leftovers("*.partial") == []
    assert len(list(Path(os.environ["KDUTILS_RUNS"]).rglob("record.json"))) == 2
    assert os.listdir(os.environ["TMPDIR"]) == []


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
