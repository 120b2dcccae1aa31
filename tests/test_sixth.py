"""A sixth study, as CONTRIBUTING.md shows it: what stands there is run, word for word."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from kdutils import claims

PROJECT = Path(__file__).parent.parent
SCREEN = 50  # lines of claim, notebook and sizes together


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    """The section's blocks by their language."""
    text = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (section,) = re.findall(r"^## Adding a study\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^(```+)(\w+)\n(.*?)^\1$", section, re.MULTILINE | re.DOTALL)
    assert [language for _, language, _ in blocks] == ["csv", "md", "yaml", "sh"]
    return {language: block for _, language, block in blocks}


def test_a_study_fits_one_screen(shown):
    assert sum(shown[language].count("\n") for language in ("csv", "md", "yaml")) <= SCREEN
    assert max(map(len, shown["md"].splitlines())) <= 100


def test_a_study_that_is_written_so_is_run_and_judged(shown, tmp_path):
    for name in ("kdutils", "data"):
        ignored = shutil.ignore_patterns("__pycache__", "records", "*.npz")
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=ignored)
    folder = tmp_path / "notebooks"
    (folder / "params").mkdir(parents=True)
    (folder / "6-toy.md").write_text(shown["md"], encoding="utf-8")
    (folder / "params" / "toy.smoke.yaml").write_text(shown["yaml"], encoding="utf-8")
    with open(tmp_path / "data" / "claims.csv", "a", encoding="utf-8") as register:
        register.write(shown["csv"])
    places = {f"KDUTILS_{name}": str(tmp_path / name) for name in ("DATA", "RUNS", "RECORDS")}
    run_env = os.environ | places | {"PYTHONPATH": str(tmp_path)}
    for line in shown["sh"].splitlines():
        command = line.replace(".venv/bin", str(Path(sys.executable).parent)).split()
        run = subprocess.run(
            command,
            cwd=tmp_path,
            env=run_env,
            capture_output=True,
            encoding="utf-8",
        )
        assert run.returncode == 0, run.stdout + run.stderr
    made = Path(run.stdout.splitlines()[-1])
    cells = nbformat.read(tmp_path / made, as_version=4).cells
    (data,) = (o.data for o in cells[-1].outputs if claims.MIME in o.get("data", {}))
    assert re.fullmatch(r"toy-1: replicated, \+\d+\.\d points \(.*\)", data["text/plain"])
    (row,) = data[claims.MIME]
    assert list(row["parts"][""]["values"]) == ["0", "1", "2"]
    # The pages that show all studies stand with it, before it has an answer, records and times.
    pages = ["index", "cost"]
    for page in pages:
        shutil.copy(PROJECT / "notebooks" / f"{page}.md", folder)
    words = [sys.executable, "-c", f"from kdutils import notebooks as n; [*map(n.sync, {pages})]"]
    put = subprocess.run(words, cwd=tmp_path, env=run_env, capture_output=True, encoding="utf-8")
    assert put.returncode == 0, put.stderr
    assert "(toy) No answer yet." in (folder / "index.ipynb").read_text(encoding="utf-8")
