"""`kdutils train`: what is missing and no more, said beforehand, stopped and gone on with."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jupytext
import psutil
import pytest
import torch
from nbformat import v4

from kdutils import notebooks, records, runs, spread

PARAMETERS = """
scale = "laptop"
seeds = [0, 1]
engine = "serial"
train_missing = False
"""
DEFINE = """
from kdutils import Study, grid

study = Study("tiny", scale=scale, engine=engine, train=train_missing)

@study.run
def teacher(run, seed):
    return {"accuracy": seed / 10}

@study.run
def student(run, seed, rate):
    return {"accuracy": teacher(seed=seed).results["accuracy"] + rate}
"""
RUNS = """
rate = {"rate": 0.5}  # stands in for what is chosen
teachers = study.map(teacher, grid(seed=seeds))
if len(teachers):
    rate["rate"] = teachers.accuracy.min()
display(teachers)
"""
MORE = """
students = study.map(student, grid(rate, seed=seeds))
best = students.accuracy.max()
"""
# A real training, which rests in the epoch that the environment says.
SLOW = """
@study.run
def network(run, seed):
    import os, time
    import torch
    from torch.nn.functional import cross_entropy
    from kdutils import data, models, train

    images = data.parts("digits", validation=200, batch_size=100, seed=seed)
    model = models.build("convnet", classes=10, seed=seed, widths=(4, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)

    def loss(model, batch):
        with open(run.folder / "log", "a") as log:
            log.write(f"{batch.epoch}\\n")
        time.sleep(600 * (os.environ.get("TINY_REST") == str(batch.epoch)))
        return cross_entropy(model(batch.images), batch.labels)

    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1])
    history = train.fit(model, images.train, loss, epochs=3, optimizer=optimizer,
                        schedule=schedule, folder=run.folder, snapshots=[3])
    return {"history": history}
"""
# The command line, where the notebooks lie in a folder of the test.
KDUTILS = """
import sys
from pathlib import Path
from kdutils import __main__, notebooks

notebooks.FOLDER = Path(sys.argv.pop(1))
__main__.main()
"""


def notebook(folder: Path, define: str, *trains: str) -> None:
    """Make the study ``tiny`` of these cells; one more, with no tag, must never be run."""
    tags = [["parameters"], ["define"], *[["runs"]] * len(trains), []]
    sources = [PARAMETERS, define, *trains, "raise SystemExit"]
    cells = [
        v4.new_code_cell(source.strip(), metadata={"tags": one})
        for source, one in zip(sources, tags, strict=True)
    ]
    made = v4.new_notebook(cells=cells)
    made.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python"}
    jupytext.write(made, folder / "9-tiny.md", fmt="md:myst")
    (folder / "9-tiny.ipynb").touch()
    (folder / "params").mkdir(exist_ok=True)
    (folder / "params" / "tiny.laptop.yaml").write_text("scale: laptop\n", encoding="utf-8")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder for the study ``tiny``, with places for records of its own."""
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    monkeypatch.setenv("KDUTILS_RECORDS", str(tmp_path / "records"))
    notebook(tmp_path, DEFINE, RUNS, MORE)
    return tmp_path


def made(kind: str) -> list[dict]:
    paths = sorted((records.runs_folder() / "tiny").glob(f"{kind}-*/record.json"))
    return [records.read(path) for path in paths]


def train(given=None, **options) -> spread.Plan:
    return notebooks.train("tiny", {"scale": "laptop"} | (given or {}), **options)


# What is to be trained


def test_what_has_no_record_is_trained_and_announced_and_nothing_else(tiny, capsys):
    assert train(workers=8).summary().startswith("trained 4 runs in ")
    assert {c["made"]["workers"] for c in made("teacher")} == {1}, "one after another"
    said = capsys.readouterr().out.splitlines()
    assert said == ["teacher: 2 runs to train", "student: 2 runs to train", "in all: 4 runs"]
    assert {c["arguments"]["rate"] for c in made("student")} == {0.0}, "not the one expected"
    before = made("teacher") + made("student")
    assert train({"seeds": [0, 1, 2]}).trained == 2
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("teacher: 1 run to train, about 0 s")
    after = made("teacher") + made("student")
    assert [c for c in after if c["arguments"]["seed"] < 2] == before
    assert len(after) == 6
    assert train({"seeds": [0, 1, 2]}).summary() == "every run has a record"
    assert capsys.readouterr().out == ""


def test_only_trains_one_kind_and_what_it_needs(tiny, capsys):
    assert train(only="student", given={"seeds": [1]}).trained == 1
    assert capsys.readouterr().out == "student: 1 run to train, without those that they need\n"
    assert len(made("teacher")) == 1, "the student asked for it"
    with pytest.raises(notebooks.NotebookFailed, match=r"no run 'studnet'; its runs: teacher, stu"):
        train(only="studnet")


def test_only_ends_in_one_sentence_where_other_runs_are_wanted(tiny):
    with pytest.raises(
        notebooks.NotebookFailed,
        match=r"^2 runs of teacher were trained; going on needs others first \(AttributeError: ",
    ):
        train(only="teacher")
    notebook(tiny, DEFINE.replace("seed / 10", "seed / 0"), RUNS)
    with pytest.raises(ZeroDivisionError):  # a fault of the run itself
        train(only="teacher", given={"seeds": [5]})


def test_a_notebook_without_runs_says_so(tiny):
    notebook(tiny, DEFINE)
    with pytest.raises(notebooks.NotebookFailed, match=r"9-tiny\.md has no cell tagged runs"):
        train()


@pytest.mark.parametrize("study", notebooks.studies())
def test_the_cells_tagged_runs_go_on_in_plain_python_where_no_run_has_a_record(study):
    plan = spread.Plan(dry=True)

    def begin(names):
        names["study"].plan = plan

    given = notebooks.scale_parameters(study, "smoke") | {"train_missing": True}
    names = notebooks.procedure(study, given, ("runs",), begin)
    used = {kind for kind, *_ in plan.calls}
    known = {name for name, one in names.items() if isinstance(one, runs.RunFunction)}
    assert known - used <= {"pretraining", "boards"}, "smoke asks for all others"


# Side by side


@pytest.mark.parametrize(
    ("cores", "card", "options", "peaks", "expected"),
    [
        (8, False, {}, [], 8),
        (8, False, {"threads": 3}, [], 2),
        (1, False, {"threads": 2}, [], 1),
        (16, True, {}, [], 8),
        (1, True, {}, [], 1),
        (16, True, {"threads": 2}, [], 8),
        (8, False, {}, [1000, 3000], 3),  # of 10,000 MB
        (8, False, {}, [20_000], 1),
        (8, False, {"workers": 5}, [20_000], 5),
        (8, True, {"workers": 12}, [], 12),
        (8, False, {"engine": "serial", "workers": 5}, [], 1),
        (8, False, {"engine": "tcp://host:8786"}, [], 1),
        (8, False, {"engine": "dask"}, [], 8),
    ],
)
def test_as_many_side_by_side_as_fit(monkeypatch, cores, card, options, peaks, expected):
    monkeypatch.setattr("joblib.cpu_count", lambda: cores)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
    pages = {"SC_PHYS_PAGES": 10_000, "SC_PAGE_SIZE": 1024**2}
    monkeypatch.setattr(spread.os, "sysconf", pages.__getitem__)
    wanted = options.pop("workers", None)
    study = runs.Study("tiny", scale="laptop", **options)
    study.workers = wanted
    assert spread.workers(study, [{"peak_memory_mb": peak} for peak in peaks]) == expected


# How long it takes


PAST = {"teacher": [{"seconds": 100}, {"seconds": 200}], "student": [{"seconds": 50}]}


@pytest.mark.parametrize(
    ("missing", "seconds"),
    [
        ([], 0),
        ([("teacher", 1)] * 3, 450),
        ([("teacher", 2)] * 4, 300),
        ([("teacher", 8)], 150),  # the others have nothing to do
        ([("teacher", 2)] * 2 + [("student", 2)] * 6, 300),
        ([("control", 1)] * 2, 200),  # unknown: as the mean of 150 and 50
        ([("student", 1)] * 2 + [("student", 2)] * 2, 150),
    ],
)
def test_estimate(missing, seconds):
    assert spread.estimate(missing, PAST) == pytest.approx(seconds)


def test_no_record_no_estimate():
    assert spread.estimate([("teacher", 1)], {}) is None
    assert spread.estimate([], {}) == 0


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3570, "1 h 0 min"), (16_200, "4 h 30 min")],
)
def test_duration(seconds, said):
    assert spread.duration(seconds) == said


def test_own_records_tell_more_than_published_ones(tiny):
    train({"seeds": [0]})
    records.publish("tiny")
    for path in (tiny / "records" / "tiny").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace('"seconds": ', '"seconds": 9'), encoding="utf-8")
    study = runs.Study("tiny", scale="laptop")
    assert {made[0]["seconds"] < 1 for made in spread.past(study).values()} == {True}
    study.folder = tiny / "elsewhere"
    assert {made[0]["seconds"] > 89 for made in spread.past(study).values()} == {True}
    assert spread.past(runs.Study("tiny", scale="paper")) == {}


def test_another_kind_of_machine_is_named_before_training(tiny, monkeypatch, capsys):
    train({"seeds": [0]})
    records.publish("tiny")
    paths = [*(tiny / "records" / "tiny").glob("*.json")]
    here = records.place(records.read(paths[0])["made"])
    monkeypatch.setenv("KDUTILS_RUNS", str(tiny / "elsewhere"))
    train({"seeds": [1]})
    assert "this is" not in capsys.readouterr().out, "of this very machine"
    monkeypatch.setenv("KDUTILS_RUNS", str(tiny / "still elsewhere"))
    chip, precision = here.split(", ")
    for path in paths:
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(precision, "64-true"), encoding="utf-8")
    train({"seeds": [0]})
    assert capsys.readouterr().out == "", "nothing to train"
    train({"seeds": [2]})
    said = f"this is {here}, published runs are of {chip}, 64-true: other bits, another speed; "
    assert capsys.readouterr().out.startswith(said)


def test_the_bar_shows_runs_and_the_time_left(tiny, capsys):
    train({"seeds": [0, 1, 2]})
    shown = capsys.readouterr().err
    for text in ("teacher 0/3, time left not known yet", "teacher 3/3, ", "student 3/3, 100 %"):
        assert text in shown, shown


# Stopping


def test_stopped_it_says_so_leaves_no_process_and_goes_on_from_the_last_epoch(tiny):
    notebook(tiny, DEFINE + SLOW, "study.map(network, grid(seed=seeds))")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    options["start_new_session"] = True
    for seeds, rest, signum, send in (
        ([0, 1], 2, signal.SIGINT, os.killpg),
        ([0], 3, signal.SIGTERM, os.kill),
    ):
        words = ["train", "tiny", "--scale", "laptop", "--workers", str(len(seeds))]
        words += ["-p", "engine=processes", "-p", f"seeds={seeds}"]
        command = [sys.executable, "-c", KDUTILS, str(tiny), *words]
        process = subprocess.Popen(command, env=os.environ | {"TINY_REST": str(rest)}, **options)
        _wait(lambda a=rest, b=seeds: [log[-1] for log in _logs()].count(a) == len(b))
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= len(seeds)
        send(process.pid, signum)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 128 + signum, said
        assert said.strip().splitlines()[-1] == (
            "kdutils: stopped; what is finished is kept (not at smoke), "
            "and the same command goes on"
        )
        assert "Traceback" not in said
        _wait(lambda workers=workers: not any(map(_alive, workers)))
        assert list(records.runs_folder().rglob("*.partial")) == made("network") == []
    assert train().trained == 2  # here, and one after another: as it is where one wants
    for log in _logs():  # an epoch that was rested in is begun again, and none before it
        n = log.count(1)
        assert log in ([1] * n + [2] + [2] * n + last for last in ([3] * n, [3] + [3] * n))
    assert len(made("network")) == 2


def test_what_a_pool_leaves_is_removed_without_a_word_after_the_last_line(tiny):
    gone = "\nimport atexit\nfrom joblib.externals.loky.backend import resource_tracker"
    gone += "\natexit.register(resource_tracker.register, '/gone/already', 'folder')"
    notebook(tiny, DEFINE + SLOW, "study.map(network, grid(seed=seeds))" + gone)
    words = ["train", "tiny", "--scale", "laptop", "--workers", "1", "-p", "engine=processes"]
    command = [sys.executable, "-c", KDUTILS, str(tiny), *words]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert "resource_tracker" not in ended.stderr


def _logs() -> list[list[int]]:
    """Of each run the epochs that its steps were of."""
    paths = (records.runs_folder() / "tiny").glob("network-*/log")
    return [
        found
        for path in paths
        if (found := list(map(int, path.read_text(encoding="utf-8").split())))
    ]


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait(condition, seconds=240.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)
