"""`kdutils run` stopped, killed, started in odd places: one sentence, nothing left, it goes on."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
import psutil
import pytest
from nbclient import NotebookClient
from nbformat import v4

from kdutils import files, notebooks, records

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


def wait_until(condition, seconds=240.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


def test_what_a_killed_ones_kernel_wrote_after_the_sweep_is_swept_at_the_end(monkeypatch):
    short = Path(tempfile.mkdtemp(dir="/tmp"))  # else another is taken
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(short))
    ended = subprocess.Popen(["true"])
    ended.wait()
    with notebooks._kernel():
        late = short / f"kd-{files.owner().replace(f'-{os.getpid()}', f'-{ended.pid}')}-late"
        late.mkdir()
    short.rmdir()  # which is empty


def test_stopped_and_killed_it_leaves_nothing_behind_and_goes_on(folder):
    partials = set()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process = start(folder, TINY_WRITES="600")
        wait_until(lambda old=partials: len(set(leftovers("*.partial")) - old) == 2)
        partials = set(leftovers("*.partial"))
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) >= 3, "a kernel and its two workers"
        process.send_signal(signum)
        said = process.communicate(timeout=240)[1]
        if signum == signal.SIGKILL:
            assert process.returncode == -signum
            wait_until(lambda below=below: not any(map(alive, below)))
        else:
            assert process.returncode == 128 + signum
            assert said.strip().splitlines()[-1] == (
                "kdutils: stopped; what is finished is kept (not at smoke), "
                "and the same command goes on"
            )
            assert "Traceback" not in said
            assert not any(map(alive, below))
            assert leftovers("kd-*") == []
    assert len(leftovers("kd-*")) == 1  # until the next one starts
    assert last_line(folder, "-p", "engine=serial", code=0)
    assert leftovers("kd-*") == leftovers("*.partial") == []
    assert len(list(Path(os.environ["KDUTILS_RUNS"]).rglob("record.json"))) == 2
    assert os.listdir(os.environ["TMPDIR"]) == []


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# In Jupyter, through papermill, with the user's own settings


def test_a_parameter_is_changed_in_one_kernel_whatever_the_startup_files_say(
    folder, monkeypatch, tmp_path
):
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "own.py").write_text("DEBUG = True\n", encoding="utf-8")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    changed = PARAMETERS.replace("epochs = 1", "epochs = 2")
    again = [changed, CHECK, changed.replace("2", "3"), CHECK, "print(p.epochs, DEBUG, early)"]
    study(folder, PARAMETERS, CHECK, "early = 3", *again)
    notebook = nbformat.read(folder / "9-tiny.ipynb", as_version=4)
    NotebookClient(notebook).execute()
    assert notebook.cells[-1].outputs[0].text == "3 True 3\n"


def test_papermill_by_hand_stops_at_a_misspelling(folder):
    study(folder, PARAMETERS, CHECK)
    command = [sys.executable, "-m", "papermill", "9-tiny.ipynb", "out.ipynb", "-p"]
    done = subprocess.run([*command, "epocs", "3"], cwd=folder, capture_output=True)
    assert done.returncode == 1
    assert b"ParameterError: unknown parameter 'epocs'; did you mean 'epochs'?" in done.stderr
    subprocess.run([*command, "epochs", "3"], cwd=folder, capture_output=True, check=True)


@pytest.mark.parametrize("name", notebooks.studies())
def test_every_study_can_be_given_its_parameters_again(name):
    """As in Jupyter: its own names are no parameters."""
    from IPython.core.interactiveshell import InteractiveShell

    cells = nbformat.read(notebooks.find(name), as_version=4).cells
    tagged = [c for c in cells if {"parameters", "define"} & set(c.metadata.get("tags", []))]
    shell = InteractiveShell()
    for cell in [*tagged, *tagged[:2]]:
        shell.run_cell(cell.source, store_history=True).raise_error()


def test_figures_are_kept_whatever_the_environment_says(folder, monkeypatch):
    monkeypatch.setattr(notebooks, "FOLDER", folder)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    study(folder, PARAMETERS, CHECK, FIGURE)
    path = folder / "9-tiny.ipynb"
    jupytext.write(nbformat.read(path, as_version=4), path.with_suffix(".md"), fmt="md:myst")
    notebooks.sync("tiny")
    assert "image/png" in nbformat.read(path, as_version=4).cells[-1].outputs[0].data


def test_a_figure_less_is_an_error_and_the_old_page_stays(folder, monkeypatch):
    monkeypatch.setattr(notebooks, "FOLDER", folder)
    drawn = f"import os\nif 'TINY_DRAWS' in os.environ:\n    {FIGURE.replace(chr(10), '; ')}"
    study(folder, PARAMETERS, CHECK, drawn)
    path = folder / "9-tiny.ipynb"
    jupytext.write(nbformat.read(path, as_version=4), path.with_suffix(".md"), fmt="md:myst")
    monkeypatch.setenv("TINY_DRAWS", "1")
    notebooks.sync("tiny")
    monkeypatch.delenv("TINY_DRAWS")
    before = path.read_bytes()
    with pytest.raises(notebooks.NotebookFailed, match="a figure is gone, of the cell that begins"):
        notebooks.sync("tiny")
    assert path.read_bytes() == before
    path.unlink()
    notebooks.sync("tiny")


# One sentence each


def test_a_kernel_killed_for_memory_is_one_sentence(folder):
    study(folder, PARAMETERS, CHECK, "import os\nos.kill(os.getpid(), 9)")
    assert "kernel was killed, often for want of memory" in last_line(folder)
    assert leftovers("kd-*") == []


def test_a_worker_killed_for_memory_is_one_sentence(folder):
    killing = RUN.replace("import os, time", "import os; os.kill(os.getpid(), 9)")
    killing = killing.replace("seed=[0, 1]", "seed=[0]")
    study(folder, PARAMETERS, CHECK, killing)
    assert "a worker was killed, most often for want of memory" in last_line(folder)


def test_another_kernel_of_the_same_name_and_a_long_temporary_folder_do_no_harm(folder, tmp_path):
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    other = {"argv": ["/bin/false"], "display_name": "", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(other), encoding="utf-8")
    long = tmp_path / ("long" * 25)
    long.mkdir()
    study(folder, PARAMETERS, CHECK)
    environment = {"JUPYTER_PATH": str(spec.parent.parent), "TMPDIR": str(long)}
    last_line(folder, code=0, **environment)
    assert os.listdir(long) == []


def test_what_yaml_cannot_read_is_named_and_powers_of_ten_are_numbers(folder):
    study(folder, PARAMETERS, CHECK)
    said = last_line(folder, "-p", "seeds=[0, 1")
    assert said.startswith("kdutils: -p seeds=[0, 1: not a value in YAML")
    last_line(folder, "-p", "lr=1e-3", code=0)
    assert "lr = 0.001" in str(nbformat.read(folder / "out" / "9-tiny.smoke.ipynb", 4).cells)
    (folder / "params" / "tiny.smoke.yaml").write_text("epochs: [1\n", encoding="utf-8")
    assert "tiny.smoke.yaml: not a value in YAML" in last_line(folder)


def test_a_folder_that_cannot_be_written_says_what_helps(folder):
    (folder / "file").touch()
    said = last_line(folder, "--output", str(folder / "file" / "out"))
    assert said.endswith("(Not a directory): --output takes another folder")


def test_where_there_are_no_notebooks_a_sentence_says_so(tmp_path):
    command = [sys.executable, "-c", KDUTILS, str(tmp_path)]
    for words in (["run"], ["run", "eskd"], ["sync"]):
        done = subprocess.run([*command, *words], capture_output=True, encoding="utf-8")
        assert done.returncode == 2
        assert done.stderr.startswith(f"kdutils: no studies in {tmp_path}: ")
        assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def first(tmp_path):
    """What makes every Python that a test starts run some lines first."""

    def make(lines: str) -> str:
        (tmp_path / "first").mkdir()
        (tmp_path / "first" / "sitecustomize.py").write_text(lines, encoding="utf-8")
        return f"{tmp_path / 'first'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"

    return make


def test_an_engine_that_is_not_installed_is_named(folder, first):
    study(folder, PARAMETERS, CHECK)
    path = first("import sys\nsys.modules['distributed'] = None")
    said = last_line(folder, "--engine", "dask", PYTHONPATH=path)
    assert "parameter engine is 'dask': it needs the extra `cluster`" in said


def test_a_user_without_a_home_is_told_which_folder_to_name(folder, first, monkeypatch):
    study(folder, PARAMETERS, CHECK)
    path = first("import pwd\npwd.getpwuid = lambda _: {}[0]")
    for name in ("HOME", "XDG_CACHE_HOME", "KDUTILS_RUNS"):
        monkeypatch.delenv(name, raising=False)
    said = last_line(folder, PYTHONPATH=path)
    assert "no home folder to keep runs in: name a folder by $KDUTILS_RUNS" in said
    runs = str(folder / "runs")
    last_line(folder, "-p", "engine=serial", code=0, PYTHONPATH=path, KDUTILS_RUNS=runs)


def test_a_kernel_that_does_not_start_is_one_sentence(folder, first):
    path = first("import os, sys\nif 'ipykernel_launcher' in sys.orig_argv: os._exit(1)")
    said = last_line(folder, PYTHONPATH=path)
    assert said == "kdutils: the notebook's kernel did not start; why is said above"


# Locales, other repositories


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0"}  # the strictest locale: no letter beyond ASCII
HASHES = """import json
from kdutils import notebooks, runs

found = {}
for study in ("concierge", "vid"):  # their sources have letters beyond ASCII
    names = notebooks.procedure(study, {"scale": "paper", "train_missing": False})
    kinds = [value for value in names.values() if isinstance(value, runs.RunFunction)]
    found |= {f"{study}-{run.name}": run.source for run in kinds}
print(json.dumps(found))
"""


def test_the_locale_changes_no_source_hash():
    options = {"capture_output": True, "encoding": "utf-8", "check": True}
    command = [sys.executable, "-c", HASHES]
    here = subprocess.run(command, **options).stdout
    assert json.loads(here)
    assert subprocess.run(command, env=os.environ | ASCII, **options).stdout == here


def test_a_notebook_runs_and_claims_are_said_in_any_locale(folder):
    study(folder, "# α − β\n" + PARAMETERS, CHECK, 'print("α", p.lr)')
    last_line(folder, code=0, **ASCII)
    path = folder / "out" / "9-tiny.smoke.ipynb"
    assert nbformat.read(path, as_version=4).cells[-1].outputs[0].text == "α 0.1\n"
    command = [sys.executable, "-m", "kdutils", "claims"]
    for words in ([], ["--json"]):
        subprocess.run([*command, *words], env=os.environ | ASCII, check=True, capture_output=True)


def git(*words, cwd):
    own = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b.c"}
    own |= {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b.c"}
    options = {"capture_output": True, "encoding": "utf-8", "check": True}
    return subprocess.run(["git", *words], cwd=cwd, env=os.environ | own, **options).stdout.strip()


def test_a_record_names_the_projects_own_commit_or_none(tmp_path, monkeypatch):
    other, project = tmp_path / "other", tmp_path / "other" / "project"
    (project / "kdutils").mkdir(parents=True)
    (project / "kdutils" / "code.py").touch()
    monkeypatch.setattr(records, "PROJECT", project)
    assert records.commit() == "unknown"
    for folder in (other, tmp_path):
        git("init", "-q", cwd=folder)
        git("commit", "-q", "--allow-empty", "-m", "another's", cwd=folder)
    assert records.commit() == "unknown", "unpacked inside another repository"
    git("add", ".", cwd=other)
    git("commit", "-q", "-m", "even if it keeps it", cwd=other)
    assert records.commit() == "unknown"
    git("init", "-q", cwd=project)
    git("add", ".", cwd=project)
    git("commit", "-q", "-m", "its own", cwd=project)
    head = git("rev-parse", "HEAD", cwd=project)
    assert records.commit() == head
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    assert records.commit() == head
    (project / "kdutils" / "code.py").write_text("changed", encoding="utf-8")
    assert records.commit() == head + "+changes"
