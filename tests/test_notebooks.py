"""Studies as notebooks: every one of them from nothing at `smoke`, wrong parameters, claims."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import nbformat
import pytest
import yaml
from typer.testing import CliRunner

from kdutils import __main__, claims, notebooks, parameters, records, runs

KDUTILS = [sys.executable, "-m", "kdutils"]
ROOT = records.PROJECT


def without_network() -> list[str]:
    """A prefix that cuts a command off from every network, where the system has one."""
    for prefix in (["unshare", "-n"], ["unshare", "-rn"]):
        if shutil.which("unshare") and not subprocess.run([*prefix, "true"]).returncode:
            return prefix
    warnings.warn("no unshare here: smoke runs keep their network", stacklevel=2)
    return []


def kdutils(*words, prefix=()) -> subprocess.CompletedProcess:
    command = [*prefix, *KDUTILS, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")


@pytest.mark.parametrize("study", notebooks.studies())
def test_smoke_trains_everything_without_a_network(study, tmp_path):
    started = time.monotonic()
    run = kdutils("run", study, "--output", str(tmp_path), prefix=without_network())
    seconds = time.monotonic() - started
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Executing:" in run.stderr, "a progress bar is shown"
    if seconds > 60:
        warnings.warn(f"{study} took {seconds:.0f} s at smoke scale; the goal is 60", stacklevel=2)
    (path,) = tmp_path.glob("*.smoke.ipynb")
    cells = nbformat.read(path, as_version=4).cells
    found = [
        o.data[claims.MIME]
        for c in cells
        for o in c.get("outputs", [])
        if claims.MIME in o.get("data", {})
    ]
    (rows,) = found
    registered = {c.id: c for c in claims.registered().values() if c.study == study}
    assert [row["id"] for row in rows] == list(registered)
    for row in rows:
        assert row["scale"] == "smoke"
        assert set(row["parts"]) == set(registered[row["id"]].rules)
        for name, part in row["parts"].items():
            # A rank correlation in each quarter of the settings, a partial one over three strangers
            # and ten people who are enrolled need more than smoke has, and smoke does not need the
            # extra with ONNX Runtime.
            absent = {"vid-7 matters", "geometry-14", "binary-4 ONNX Runtime", "concierge-10"}
            absent |= {f"concierge-9 {n} enrolled" for n in (10, 40, 80)}
            assert part["values"] or f"{row['id']} {name}".strip() in absent, row["id"]
            assert all(map(math.isfinite, part["values"].values()))


@pytest.mark.parametrize("study", notebooks.studies())
def test_the_page_stands_without_records_and_without_pytorch(study, tmp_path):
    page = notebooks.find(study).with_suffix(".md")
    program = f"""
import linecache, sys
import jupytext, matplotlib
matplotlib.use("Agg")
names = {{"__name__": "page", "display": lambda *shown, **how: print(*shown)}}
for number, cell in enumerate(jupytext.read({str(page)!r}).cells):
    if cell.cell_type == "code":
        name = f"cell {{number}}"
        linecache.cache[name] = (1, None, cell.source.splitlines(keepends=True), name)
        exec(compile(cell.source, name, "exec"), names)
assert "torch" not in sys.modules
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "KDUTILS_RECORDS": str(tmp_path)},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for name in [one.id for one in claims.registered().values() if one.study == study]:
        assert f"{name}: no verdict" in run.stdout


@pytest.mark.parametrize("study", notebooks.studies())
def test_every_run_knows_all_its_code_when_it_is_defined(study):
    """A helper that the notebook defines only after a run is missing from the run's source hash."""
    names = notebooks.procedure(study, {"scale": "paper", "train_missing": False})
    found = [value for value in names.values() if isinstance(value, runs.RunFunction)]
    assert found
    late = [run.name for run in found if run.source != records.source_hash(run.function)]
    assert not late, "move what they call before them"


BAD = {
    "epocs=3": r"unknown parameter 'epocs'; did you mean 'epochs'\?",
    "epochs=hello": r"parameter epochs is 'hello': input should be a valid integer",
    "epochs=-1": r"parameter epochs is -1: input should be greater than or equal to 1",
    "dataset=cifar1000": r"parameter dataset is 'cifar1000': input should be 'cifar10'",
    "seeds=[0, -1]": r"parameter seeds\[1\] is -1",
    "snapshots=[1, 2, 3, 40]": r"must not exceed epochs = 4",
    "snapshots=[1, 2, 2, 3]": r"parameter snapshots is \[1, 2, 2, 3\]: its values must rise",
    "teachers=[resnet18]": r"parameter teachers is \['resnet18'\]: list should have at least 2",
    "teachers=[resnet18, resnet18]": r"parameter teachers is .*: its values must differ",
    "train_missing=false": "scale smoke has its sizes in notebooks/params",
    "engine=spark": r"parameter engine is 'spark': it must be serial, processes, dask or",
}


def test_a_new_study_gets_its_notebook_and_a_failing_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    header = "---\nkernelspec:\n  name: python3\n  display_name: Python 3\n---\n"
    source = tmp_path / "9-new.md"
    source.write_text(f"{header}\n```{{code-cell}} ipython3\nprint(6 * 7)\n```\n", encoding="utf-8")
    (made,) = notebooks.sync("new")
    good = made.read_text(encoding="utf-8")
    assert nbformat.reads(good, as_version=4).cells[0].outputs[0].text == "42\n"
    source.write_text(
        source.read_text(encoding="utf-8").replace("6 * 7", "6 / 0"), encoding="utf-8"
    )
    with pytest.raises(notebooks.NotebookFailed, match=r"9-new\.md: ZeroDivisionError"):
        notebooks.sync("new")
    assert made.read_text(encoding="utf-8") == good


def test_a_copy_beside_a_study_is_no_study_and_a_note_no_notebook(tmp_path, monkeypatch):
    """Jupyter's "Duplicate" makes the first name, editors and people make the others."""
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    for name in ("3-eskd", "3-eskd-Copy1", "3-eskd (1)", "03-eskd.old", "eskd", "3-", "3-eskd~"):
        nbformat.write(nbformat.v4.new_notebook(), tmp_path / f"{name}.ipynb")
    assert notebooks.studies() == {"eskd": tmp_path / "3-eskd.ipynb"}
    (tmp_path / "notes.md").write_text("# Mine\n", encoding="utf-8")
    assert notebooks.sync() == []
    assert not (tmp_path / "notes.ipynb").exists()


def test_a_page_whose_records_are_elsewhere_says_so_in_one_sentence(tmp_path, monkeypatch):
    shown, study = [], partial(runs.Study, "vid", scale="paper", train=False)
    monkeypatch.setattr("IPython.display.display", lambda markdown: shown.append(markdown.data))
    monkeypatch.setenv("KDUTILS_RECORDS", str(ROOT / "data" / ".." / "data" / "records"))
    notebooks.notice(study())
    assert shown == []  # the repository's own, however they are named
    monkeypatch.setenv("KDUTILS_RECORDS", str(tmp_path))
    notebooks.notice(study())
    (tmp_path / "vid").mkdir()
    (tmp_path / "vid" / "alone-0.json").write_text("{}", encoding="utf-8")
    notebooks.notice(study())
    where = f"`{tmp_path / 'vid'}`, which `$KDUTILS_RECORDS` names."
    assert shown == [
        f"**This page shows no record of {where}**",
        f"**This page shows the records of {where}**",
    ]


@pytest.mark.parametrize("wrong", BAD)
def test_a_wrong_parameter_is_named_with_what_is_allowed(wrong):
    name, _, value = wrong.partition("=")
    given = notebooks.scale_parameters("eskd", "smoke") | {name: yaml.safe_load(value)}
    with pytest.raises(parameters.ParameterError, match=BAD[wrong]):
        notebooks.procedure("eskd", given)


@pytest.mark.parametrize("wrong", ["epocs=3", "snapshots=[1, 2, 3, 40]"])
def test_a_wrong_parameter_stops_before_training_with_one_sentence(wrong, tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_RUNS", str(tmp_path / "runs"))
    run = kdutils("run", "eskd", "--output", str(tmp_path), "-p", wrong)
    assert run.returncode == 2
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("kdutils: ")
    assert re.search(BAD[wrong], last), last
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "esdk"], "unknown study 'esdk'; studies: "),
        (["run", "eskd", "--scale", "huge"], "unknown scale 'huge'; scales: smoke, laptop, paper."),
        (["run", "vid", "-p", "seeds=[0,1,2,3,4,5,6,7,8,9,10]"], "seeds has 11; data/claims.csv"),
        (["run", "eskd", "-p", "epochs"], "-p takes name=value, not 'epochs'."),
        (["data", "get", "mnist"], "cannot download 'mnist'; downloadable: cifar10, cifar100"),
        (["publish", "esdk"], "unknown study 'esdk'; studies: "),
        (["verify", "eskd", "--key", "nosuch"], "no published record of eskd with key 'nosuch'"),
    ],
)
def test_the_command_line_says_what_is_wrong_in_one_sentence(words, sentence):
    run = kdutils(*words)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1].startswith(f"kdutils: {sentence}")


@pytest.mark.parametrize("command", ["run", "train", "data", "publish", "verify", "claims"])
def test_every_command_has_help(command):
    run = CliRunner().invoke(__main__.app, [command, "--help"])
    assert run.exit_code == 0
    assert "Usage" in run.output


def test_absent_data_without_a_network_says_what_helps(tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path))
    code = "from kdutils import data; data.load('cifar10')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert "python -m kdutils data get cifar10" in run.stderr
    assert "KDUTILS_DATA" in run.stderr


def test_scales_change_parameters_that_exist():
    for study, path in notebooks.studies().items():
        known = _parameters_of(path)
        for scale in ("smoke", "laptop", "paper"):
            given = notebooks.scale_parameters(study, scale)
            assert given["scale"] == scale
            assert set(given) <= known


def _parameters_of(path: Path) -> set[str]:
    cells = nbformat.read(path, as_version=4).cells
    (source,) = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
    return set(re.findall(r"^(\w+) =", source, re.MULTILINE))


def test_one_changed_digit_of_a_stored_output_is_found():
    study = "vid"  # whichever: `make test` compares the outputs of them all
    notebook = nbformat.read(notebooks.find(study), as_version=4)
    outputs = [(k, o) for k, c in enumerate(notebook.cells) for o in c.get("outputs", [])]
    places = [(k, o.get("data", o), n) for k, o in outputs for n in ("text/plain", "text")]
    # A result where there is one; a study without records still says how many runs have none.
    for pattern in (r"\d\.\d{4}", r"\d"):
        hits = [
            (k, p, n, found) for k, p, n in places if (found := re.search(pattern, p.get(n, "")))
        ]
        if hits:
            break
    cell, place, name, found = hits[0]
    notebook.cells = notebook.cells[: cell + 1]  # what comes after it costs time and tells nothing
    at, text = found.end() - 1, place[name]
    place[name] = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
    copy = ROOT / "notebooks" / f".changed-{study}.ipynb"  # beside it: paths stay true
    nbformat.write(notebook, copy)
    try:
        command = ["-m", "pytest", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider"]
        run = subprocess.run(
            [sys.executable, *command, str(copy)], cwd=ROOT, capture_output=True, encoding="utf-8"
        )
    finally:
        copy.unlink()
    assert run.returncode == 1, run.stdout
    assert "1 failed" in run.stdout
    assert "Cell execution caused an exception" not in run.stdout


def test_neither_tests_nor_notebooks_follow_the_users_settings(tmp_path, monkeypatch):
    """As `make test` calls them: tests and stored outputs in one go."""
    for name in ("DATA", "RUNS", "RECORDS", "SOMETHING"):
        monkeypatch.setenv(f"KDUTILS_{name}", str(tmp_path / "mine"))
    source = "import os\nprint([name for name in os.environ if name.startswith('KDUTILS_')])"
    output = nbformat.v4.new_output("stream", text="[]\n")
    cell = nbformat.v4.new_code_cell(source, outputs=[output], execution_count=1)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "one.ipynb")
    command = ["pytest", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env"]
    command += ["tests/test_house.py::test_workflows_exist", str(tmp_path / "one.ipynb")]
    run = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert "2 passed" in run.stdout, run.stdout


def test_verify_trains_a_published_run_again_and_finds_a_changed_digit(tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("KDUTILS_RECORDS", str(tmp_path / "records"))
    names = notebooks.procedure("eskd", {"scale": "laptop", "train_missing": True})
    setting = {"dataset": "digits", "validation": 1000, "batch_size": 100, "stem": "imagenet"}
    setting |= {"epochs": 2, "milestones": [1], "lr": 0.02, "network": "resnet10", "seed": 0}
    setting["augmentation"] = "flips"
    taught = {"teacher_network": "resnet10", "recipe": {}, "snapshot": 1, "kd_epochs": 1}
    names["student"](temperature=4.0, alpha=0.9, **taught, **setting)
    sound, changed = sorted(records.publish("eskd"), key=lambda path: "student" in path.name)
    content = json.loads(changed.read_text(encoding="utf-8"))
    content["results"]["history"][-1]["test_accuracy"] += 0.0001
    changed.write_text(json.dumps(content), encoding="utf-8")
    for path, code, said in (
        (sound, 0, "the same numbers and weights, bit for bit"),
        (changed, 1, "NOT the same numbers"),
    ):
        run = kdutils("verify", "eskd", "--key", path.stem.partition("-")[2])
        assert run.returncode == code, run.stdout + run.stderr
        assert f"{path.stem}: {said}" in run.stdout


def test_reading_parameters_takes_plain_public_variables_only():
    class Two(parameters.Parameters):
        a: int
        b: list[int]

    variables = {"a": 1, "b": [2], "_c": 3, "In": ["x"], "Out": {}, "function": max, "Two": Two}
    assert Two.read(variables) == Two(a=1, b=[2])
