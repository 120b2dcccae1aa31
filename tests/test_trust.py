"""Trust in short: two kills, and a damage of each kind; `trust.py` measures hundreds.

Kills of trainings are in `test_runs.py`, of notebooks in `test_stopping.py`; damaged claims are in
`test_claims.py`, damaged crates in `test_crate.py`.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import trust

from kdutils import files


@pytest.fixture(scope="module")
def project():
    if sys.platform != "linux":
        pytest.skip("what is left over is looked for where Linux keeps it")
    with tempfile.TemporaryDirectory(prefix="trust-") as base, mock.patch.dict(os.environ):
        yield trust.Project(Path(base), also=(trust.PUBLISH, trust.SYNC, trust.IMPORT))


def test_a_killed_command_given_again_loses_nothing_and_leaves_nothing(project):
    wanted = {"publish": 1, "data import": 1}
    found, faults = trust.kills(project, wanted, seed=0)
    assert faults == []
    assert {kind: of["tried"] for kind, of in found.items()} == wanted


def test_what_is_damaged_is_named_or_made_again_and_never_used(project):
    ways = {"record": "cut short", "weights": "a byte flipped", "dataset": "zeros"}
    ways |= {"archive": "another kind of file", "register": "emptied"}
    found, faults = trust.damage(project, list(ways.items()), seed=0)
    assert faults == []
    made_again = {kind for kind, of in found.items() if of["recovered"]}
    assert made_again == {"record", "weights"}


def test_an_import_removes_what_a_killed_one_left(project):
    project.begin([])
    ended = subprocess.Popen(["true"])
    ended.wait()
    owner = files.owner().replace(f"-{os.getpid()}", f"-{ended.pid}")
    left = project.work / "data" / f"{owner}-abc.partial"
    left.mkdir()
    (left / "whole.npz").touch()
    project.sound(trust.IMPORT)
    assert not left.exists()


def test_an_archive_in_which_a_picture_has_two_names_is_refused(project):
    """By the damaged one it would be no picture of a cat, and left out without a word."""
    project.begin([])
    path = project.work / "kaggle.zip"
    before, name, after = path.read_bytes().rpartition(b"train/cat.0.png")
    path.write_bytes(before + name.replace(b"cat", b"bat") + after)
    code, _, err = project.run(trust.IMPORT)
    assert code == 2
    assert "kaggle.zip was not imported" in err
    assert "train/bat.0.png" in err
