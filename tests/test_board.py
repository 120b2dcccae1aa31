"""Timing networks on a board: one file, NumPy and an engine, and nothing else."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kdutils import notebooks
from kdutils.concierge import board
from kdutils.files import sha256

pytest.importorskip("onnxruntime", reason="engines are in the extra 'edge'")
SHAPE = {"embedding": 8, "frames": 2, "size": 32}

# Whatever a board may lack cannot be imported, this project first of all.
ALONE = """
import runpy, sys
for name in ("kdutils", "torch", "pandas", "scipy", "typer", "platformdirs", "lazy_loader", "PIL"):
    sys.modules[name] = None
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small network as the study exports it."""
    study = notebooks.procedure("concierge", {"scale": "laptop", "train_missing": False})
    path = tmp_path_factory.mktemp("boards") / "student-face.onnx"
    network = study["build"]("face", [4, 1], 5, 0, SHAPE).eval()
    study["exported"](network, np.zeros((1, 6, 32, 32), np.float32), path)
    return path.parent


def on_a_board(cwd, *words):
    script = cwd / "board.py"
    shutil.copyfile(Path(board.__file__), script)
    command = [sys.executable, "-c", ALONE, "board.py", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8")


@pytest.mark.parametrize("engine", board.ENGINES)
def test_the_file_alone_times_networks_and_leaves_a_record(engine, folder, tmp_path):
    pytest.importorskip(engine, reason="engines are in the extra 'edge'")
    options = ["--board", "Płytka 4B", "--engine", engine, "--repeats", 3, "--output", "pi.json"]
    run = on_a_board(tmp_path, folder, *options)
    assert run.returncode == 0, run.stderr
    assert "student-face" in run.stdout
    found = json.loads((tmp_path / "pi.json").read_text(encoding="utf-8"))
    low, middle, high = found["milliseconds"]["student-face"]
    assert 0 < low <= middle <= high
    assert (found["board"], found["engine"], found["repeats"]) == ("Płytka 4B", engine, 3)
    assert found["sha256"] == {"student-face": sha256(folder / "student-face.onnx")}
    assert found["shapes"] == {"student-face": [1, 6, 32, 32]}
    assert not list(tmp_path.glob(".*"))


def test_what_is_wrong_is_said_and_no_file_is_left(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "a.onnx").write_bytes((folder / "student-face.onnx").read_bytes()[:999])
    for where, sentence in [
        ("missing", "board: there is no network in missing (.onnx"),
        ("empty", "board: there is no network in empty (.onnx"),
        ("torn", "board: onnxruntime cannot read torn/a.onnx ("),
    ]:
        options = ["--board", "pi", "--engine", "onnxruntime"]
        run = on_a_board(tmp_path, where, *options)
        assert run.returncode == 1
        assert run.stderr.startswith(sentence), run.stderr
    run = on_a_board(tmp_path, folder, "--board", "pi", "--output", "no/pi.json")
    assert "no is no folder" in run.stderr  # before minutes of timing
    assert not list(tmp_path.glob("*.json"))


def test_an_engine_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(board.EngineError, match="'openvino' cannot be used; usable: none"):
        board.chosen("openvino")
    with pytest.raises(board.EngineError, match="install openvino or onnxruntime"):
        board.chosen("")


def test_an_old_board_can_read_the_file():
    ast.parse(Path(board.__file__).read_text(encoding="utf-8"), feature_version=(3, 8))


def test_a_board_computes_what_the_study_does(folder):
    """In 32 bits, where a processor with 16-bit arithmetic would use that by itself."""
    pytest.importorskip("openvino", reason="engines are in the extra 'edge'")
    study = notebooks.procedure("concierge", {"scale": "laptop", "train_missing": False})
    network = study["build"]("face", [4, 1], 5, 0, SHAPE).eval()
    look, shape = board.openvino(folder / "student-face.onnx", 1)
    values = np.random.default_rng(0).random(shape, dtype=np.float32)
    expected = study["engine_for"]("torch", network, None, values, [])(values)
    np.testing.assert_allclose(look(values), expected, atol=1e-5)


def test_the_fingerprint_of_an_openvino_network_is_that_of_its_weights_too(tmp_path):
    (tmp_path / "a.xml").write_bytes(b"layers")
    found = []
    for weights in (b"1", b"2"):
        (tmp_path / "a.bin").write_bytes(weights)
        found.append(board.digest(tmp_path / "a.xml"))
    assert found[0] != found[1]


def test_two_networks_of_one_name_are_refused(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.onnx").touch()
    with pytest.raises(board.EngineError, match=r"one/a\.onnx and .*two/a\.onnx have one name"):
        board.networks([tmp_path / "one", tmp_path / "two"], "openvino")


def test_openvinos_own_files_are_preferred_by_openvino_alone(tmp_path):
    for name in ("a.onnx", "b.onnx", "b.xml", "c.xml"):
        (tmp_path / name).touch()
    found = board.networks([tmp_path], "openvino")
    assert {name: path.suffix for name, path in found.items()} == {
        "a": ".onnx",
        "b": ".xml",
        "c": ".xml",
    }
    assert sorted(board.networks([tmp_path], "onnxruntime")) == ["a", "b"]


def test_calls_take_turns_in_changing_order_and_the_warm_up_is_not_counted():
    order = []
    found = board.timed({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    rounds = {tuple(order[k : k + 2]) for k in range(0, len(order), 2)}
    assert len(order) == 2 * 8
    assert rounds == {("a", "b"), ("b", "a")}
    assert {len(values) for values in found.values()} == {3}


def test_a_call_finds_in_the_caches_what_it_left_itself():
    order, clock = [], []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    board.timed(calls, 1, lambda: clock.append(len(order)) or 0.0, warm=2)
    assert {tuple(order[k : k + 3]) for k in range(0, len(order), 3)} == {("a",) * 3, ("b",) * 3}
    assert all(end - start == 1 for start, end in zip(clock[::2], clock[1::2], strict=True))
