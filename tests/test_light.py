"""Reading installs light: pages run from records where nothing of the extra `train` is installed.

It is hidden from every Python that is started here, kernels too; `.ci/light` really leaves it out.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kdutils import __main__, claims, notebooks

PROJECT = Path(__file__).parent.parent
STUDY = "eskd"
HIDING = """
import sys
from importlib.machinery import PathFinder


class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {names}
        return None if hidden else super().find_spec(name, path, target)


sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""


def modules() -> dict[str, set[str]]:
    """What can be imported of each distribution of the extra, as pyproject.toml lists it."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = [Requirement(line).name for line in project["optional-dependencies"]["train"]]
    found = {canonicalize_name(name): set() for name in extra}
    for module, names in packages_distributions().items():
        for name in map(canonicalize_name, names):
            found.get(name, set()).add(module)
    return found


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """Runs commands in a copy of the project, by a Python that finds nothing of the extra."""
    folder = tmp_path_factory.mktemp("light")
    for name in ("kdutils", "notebooks", "data"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns(".*", "*.npz"))
    names = set().union(*modules().values())
    (folder / "sitecustomize.py").write_text(HIDING.format(names=names), encoding="utf-8")

    def run(*words):
        return subprocess.run(
            [sys.executable, *words],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(folder)},
            capture_output=True,
            encoding="utf-8",
        )

    run.folder = folder
    return run


def test_nothing_of_the_extra_is_found_and_the_command_line_knows_how_that_is_said(light):
    for name, found in modules().items():
        assert found, f"{name} is not installed"
        said = light("-c", f"import {min(found)}").stderr.strip().splitlines()[-1]
        assert said == f"ModuleNotFoundError: No module named '{min(found)}'"
        assert any(re.match(__main__.ABSENT, f"No module named '{one}'") for one in found), name


def kept(folder: Path, page: str) -> list:
    cells = nbformat.read(folder / "notebooks" / f"{page}.ipynb", as_version=4).cells
    return [output for cell in cells for output in cell.get("outputs", [])]


def test_verdicts_and_a_study_run_from_records(light):
    study = notebooks.find(STUDY).stem
    for name in (f"{study}.ipynb", "verdicts.ipynb", "index.md", "together.md"):
        (light.folder / "notebooks" / name).unlink()
    run = light("-m", "kdutils", "sync", STUDY)
    assert run.returncode == 0, run.stderr[-2000:]
    assert f"{light.folder}/notebooks/verdicts.ipynb" in run.stdout.splitlines()
    stored = [o.data[claims.MIME] for o in kept(PROJECT, study) if claims.MIME in o.get("data", {})]
    again = [
        o.data[claims.MIME] for o in kept(light.folder, study) if claims.MIME in o.get("data", {})
    ]
    assert again == stored
    assert len(again) == 1
    shown = kept(light.folder, "verdicts")
    assert sum("image/png" in output.get("data", {}) for output in shown) > len(notebooks.studies())


@pytest.mark.parametrize(
    "words",
    ["run eskd --output .", "train eskd --scale laptop -p seeds=[77]", "data get cifar10"],
)
def test_what_trains_says_in_one_sentence_what_it_needs(light, words):
    run = light("-m", "kdutils", *words.split())
    assert run.returncode == 2, run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert re.search(r"kdutils: .*No module named '\w+'", last), last
    assert last.endswith('; training needs pip install -e ".[train]"')
    assert "Traceback" not in run.stderr.replace(last, "")
