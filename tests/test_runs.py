"""Runs: computed once, recorded, resumed, shared, judged by their source."""

import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

import joblib
import numpy as np
import pytest
import safetensors.torch as st
import tiny
from safetensors import safe_open
from tiny import tiny_study

from kdutils import files, records, runs
from kdutils.runs import Study, grid

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("KDUTILS_RECORDS", str(tmp_path / "records"))
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
    return tmp_path


def started(record_or_folder) -> int:
    """How often the run's function was begun."""
    folder = getattr(record_or_folder, "folder", record_or_folder)
    return len((folder / "log").read_text(encoding="utf-8").splitlines())


@cache
def server():
    """What starts processes: they are forks of one that has imported PyTorch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kdutils.train", "kdutils.models", "distributed"])
    forkserver.ensure_running()
    return context


def train_in_a_process(folder: Path, **environment: str) -> multiprocessing.Process:
    environment["KDUTILS_RUNS"] = str(folder)
    process = server().Process(target=tiny.alone, args=(0, environment))
    process.start()
    return process


def ended(process: multiprocessing.Process) -> int:
    process.join()
    return process.exitcode


@contextmanager
def cluster(**options):
    """A local Dask cluster, whose workers are such forks, and the address of its scheduler."""
    distributed = pytest.importorskip("dask.distributed", reason="needs the extra `cluster`")
    import dask

    server()
    options["env"] = {k: v for k, v in os.environ.items() if k.startswith("KDUTILS_")}
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}),
        distributed.LocalCluster(dashboard_address=":0", **options) as running,
    ):
        yield running


def train_here(folder: Path, monkeypatch) -> dict:
    """The record of the same run without a process of its own, which costs an import of PyTorch."""
    monkeypatch.setenv("KDUTILS_RUNS", str(folder))
    _, network = tiny_study()
    return network(seed=0).content


# Keys and grids


def test_grid_combines_axes_and_keeps_what_is_fixed():
    found = grid({"milestones": [6, 8]}, seed=[0, 1], network="a")
    assert found == [{"milestones": [6, 8], "seed": s, "network": "a"} for s in (0, 1)]


def test_key_depends_on_arguments_name_and_version_but_not_on_their_order():
    study = Study("keys", scale="laptop")

    def f(run, a, b=2, **rest):
        return {}

    def g(run, a, b=2, **rest):
        return {}

    one, two, other = study.run(f), study.run(version=2)(f), study.run(g)
    assert one.key({"a": 1, "c": 3}) == one.key({"c": 3, "a": 1}) == one.key(dict(a=1, b=2, c=3))
    keys = {one.key({"a": 1}), one.key({"a": 2}), one.key({"a": 1, "b": 3}), two.key({"a": 1})}
    assert len(keys | {other.key({"a": 1})}) == 5


def test_a_missing_or_unknown_argument_is_refused_before_anything_runs():
    study = Study("keys", scale="laptop")
    run = study.run(_returns)
    with pytest.raises(TypeError, match="value"):
        run()
    with pytest.raises(TypeError, match="colour"):
        run(value=1, colour="red")


def _returns(run, value):
    return {"value": value}


# Records


def test_a_run_is_computed_once_and_its_record_says_what_made_it():
    _, network = tiny_study()
    record = network(seed=3)
    again = tiny_study()[1](seed=3)
    assert again.content == record.content
    assert started(record) == 1
    made = record.content["made"]
    assert record.arguments == {"seed": 3, "dataset": "digits", "epochs": 3, "poison": None}
    assert made["data"]["digits"]["train"].startswith("349fd256")
    assert made["threads"] == 1
    assert made["source"] == network.source
    assert {"commit", "device", "precision", "processor", "python", "versions"} <= set(made)
    assert set(record.content["weights"]) == {"e1.safetensors", "e3.safetensors"}


def test_a_truncated_record_is_set_aside_and_the_run_computed_again(capsys):
    _, network = tiny_study()
    record = network(seed=0)
    path = record.folder / "record.json"
    path.write_text(path.read_text(encoding="utf-8")[:300], encoding="utf-8")
    again = network(seed=0)
    assert records.timeless(again.content) == records.timeless(record.content)
    assert started(record) == 2
    assert "record.json is damaged" in capsys.readouterr().out


def test_truncated_weights_are_set_aside_and_trained_again(capsys):
    _, network = tiny_study()
    record = network(seed=0)
    path = record.weights("e1")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert network(seed=0).weights("e1").read_bytes() == whole
    assert "e1.safetensors is damaged" in capsys.readouterr().out


def test_weights_that_were_never_kept_are_named():
    _, network = tiny_study()
    with pytest.raises(KeyError, match="e2"):
        network(seed=0).weights("e2")


def test_a_diverging_run_is_recorded_as_failed_and_not_tried_again():
    study, network = tiny_study()
    wanted = [{"seed": 0, "poison": [2, 25]}]
    for _ in range(2):
        with pytest.raises(runs.RunFailed, match="epoch 2, step 5"):
            study.map(network, wanted)
    content = network.find(wanted[0]).content
    assert content["status"] == "failed"
    assert (content["results"]["epoch"], content["results"]["step"]) == (2, 5)
    assert started(network.folder(wanted[0])) == 1


def test_a_full_disk_leaves_no_record_and_the_next_try_succeeds(monkeypatch):
    _, network = tiny_study()
    write = files.write

    def full(path, content):
        if Path(path).name == "record.json":
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(OSError, match="No space left"):
        network(seed=0)
    assert network.find({"seed": 0}) is None
    monkeypatch.undo()
    assert network(seed=0).content["status"] == "done"


@pytest.mark.parametrize("odd", [float("nan"), [0.5, {"dog": float("inf")}]])
def test_a_result_that_is_not_finite_fails_the_run_and_is_named_however_deep(odd):
    study = Study("names", scale="laptop", engine="serial")

    @study.run
    def measured(run):
        return {"entropy": odd, "found": 1.0}

    with pytest.raises(runs.RunFailed, match="entropy is not finite"):
        measured()


def test_a_finished_training_is_not_lost_by_what_its_result_is_made_of():
    import torch

    study = Study("names", scale="laptop", engine="serial")

    @study.run
    def numbers(run):
        rows = [{"epoch": 1, "loss": np.float64(0.5)}]  # no seconds
        return {"accuracy": np.float32(0.25), "counts": torch.arange(3), "history": rows}

    content = numbers().content
    assert content["results"] == {
        "accuracy": 0.25,
        "counts": [0, 1, 2],
        "history": [{"epoch": 1, "loss": 0.5}],
    }
    assert content["made"]["seconds"] >= 0


def test_an_argument_wins_over_an_entry_of_the_history_with_its_name():
    study = Study("names", scale="laptop", engine="serial")

    @study.run
    def falling(run, lr):
        return {"history": [{"epoch": k, "lr": lr / 10**k, "seconds": 0.0} for k in (1, 2)]}

    frame = study.map(falling, grid(lr=[0.1, 0.2]))
    assert frame.groupby("epoch").lr.apply(list).tolist() == [[0.1, 0.2], [0.1, 0.2]]


# Interruption, company


def test_killed_at_a_random_step_a_run_ends_as_if_it_had_not_been(folders, monkeypatch):
    step = random.randint(2, 59)  # of 60; `trust.py` kills as often as asked
    killed = train_in_a_process(folders / "killed", TINY_KILL_AT=str(step))
    assert ended(killed) == -signal.SIGKILL
    assert not list((folders / "killed").rglob("record.json"))
    contents = [train_here(folders / name, monkeypatch) for name in ("killed", "whole")]
    for name, content in zip(("killed", "whole"), contents, strict=True):
        (path,) = (folders / name).rglob("record.json")
        for weights, digest in content["weights"].items():
            assert files.sha256(path.parent / weights) == digest
    assert records.timeless(contents[0]) == records.timeless(contents[1]), f"killed at step {step}"


def test_what_a_killed_process_was_writing_is_swept_when_a_run_begins(folders):
    killed = train_in_a_process(folders / "runs", TINY_KILL_AT="45")
    assert ended(killed) == -signal.SIGKILL
    owner = files.owner().replace(f"-{os.getpid()}", f"-{killed.pid}")
    (folder,) = (folders / "runs" / "tiny").iterdir()
    (folder / f"e2.safetensors.{owner}-1.partial").touch()
    (folder / f"outputs-0123456789abcdef-5.safetensors.{owner}-1.partial").touch()
    tiny_study(train=False)  # reading leaves alone what it does not own
    assert len(list(folder.glob("*.partial"))) == 2
    assert ended(train_in_a_process(folders / "runs")) == 0
    assert not list(folder.glob("*.partial"))
    _, network = tiny_study()
    (folder / f"outputs-0123456789abcdef-5.safetensors.{owner}-1.partial").touch()
    network.compute({"seed": 0})  # as a worker does, whose study began elsewhere
    assert not list(folder.glob("*.partial"))
    (folder / f"outputs-0123456789abcdef-5.safetensors.{owner}-1.partial").touch()
    tiny_study()  # though this run has its record, and is never computed again
    assert not list(folder.glob("*.partial"))
    records.publish("tiny")
    (folders / "records" / "tiny" / f"record.json.{owner}-1.partial").touch()
    records.publish("tiny")
    assert not list((folders / "records").rglob("*.partial"))


def test_two_processes_that_want_one_run_share_one_result(folders):
    both = [train_in_a_process(folders / "runs") for _ in range(2)]
    assert list(map(ended, both)) == [0, 0]
    (path,) = (folders / "runs").rglob("record.json")
    assert started(path.parent) == 1


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a run that was killed at its third epoch, with a rate that it never had."""
    folder = tmp_path_factory.mktemp("killed")
    assert ended(train_in_a_process(folder, TINY_KILL_AT="45")) == -signal.SIGKILL
    (state,) = folder.rglob("state.safetensors")
    with safe_open(state, framework="pt") as file:
        rest = file.metadata()["rest"].replace('"lr": 0.1', '"lr": 777')
        st.save_file({k: file.get_tensor(k) for k in file.keys()}, state, {"rest": rest})  # noqa: SIM118
    return folder


@pytest.mark.parametrize("changed", ["nothing", "source", "precision", "versions", "everything"])
def test_a_run_begun_by_other_source_or_otherwise_begins_again(
    killed, folders, monkeypatch, changed
):
    shutil.copytree(killed, folders / "runs")
    (begun_with,) = (folders / "runs").rglob("made_with.json")
    made_with = json.loads(begun_with.read_text(encoding="utf-8"))
    if changed == "everything":
        begun_with.unlink()
    elif changed != "nothing":
        begun_with.write_text(
            json.dumps(made_with | {changed: "another"}, indent=1), encoding="utf-8"
        )
    rates = [row["lr"] for row in train_here(folders / "runs", monkeypatch)["results"]["history"]]
    assert rates == pytest.approx([777 if changed == "nothing" else 0.1, 0.01, 0.001])
    assert json.loads(begun_with.read_text(encoding="utf-8")) == made_with


# Fan-out


def test_processes_and_serial_give_the_same_records():
    seeds = grid(seed=[0, 1, 2])
    serial = _timeless(*tiny_study("serial"), seeds)
    os.environ["KDUTILS_RUNS"] += "-processes"
    study, network = tiny_study("processes")
    study.workers = 2
    assert _timeless(study, network, seeds) == serial
    assert {r.content["made"]["workers"] for r in study.records} == {2}


def test_joblib_computes_on_in_a_kernel_that_has_trained_with_processes(monkeypatch):
    # Both ask joblib for its one pool; as in a kernel where joblib has not been used before.
    monkeypatch.setattr("joblib.executor._executor_args", None)
    study, network = tiny_study("processes")
    study.workers = 2
    _timeless(study, network, grid(seed=[0, 1]))
    calls = [joblib.delayed(os.getppid)() for _ in range(2)]
    assert len(joblib.Parallel(n_jobs=2)(calls)) == 2


def test_a_dask_cluster_that_loses_a_worker_gives_the_records_of_a_serial_run():
    seeds = grid(seed=[0, 1, 2], epochs=10)  # long enough to be caught in the middle
    serial = _timeless(*tiny_study("serial"), seeds)
    os.environ["KDUTILS_RUNS"] += "-dask"
    with cluster(n_workers=2, threads_per_worker=1) as running:
        pids = [worker.pid for worker in running.workers.values()]
        killed = threading.Thread(target=_kill_when_busy, args=(records.runs_folder(), pids))
        killed.start()
        study, network = tiny_study(running.scheduler_address)
        assert _timeless(study, network, seeds) == serial
        killed.join()
    begun = [started(network.folder(a)) for a in seeds]
    assert max(begun) > 1, "the worker was killed between runs, not midway"


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_a_dask_worker_keeps_memory_for_its_next_step_and_computes_one_run_at_a_time():
    with cluster(n_workers=1, threads_per_worker=2) as running:
        study = Study("memory", scale="laptop", engine=running.scheduler_address)
        found = study.map(study.run(_page_faults), grid(trial=[0, 1]))
    assert found.faults.max() < 20_000, "each of a hundred tensors of 1,024 pages comes anew"
    assert found.pid.nunique() == 1
    assert os.getpid() not in set(found.pid), "computed here, not by the worker"
    first, second = found.sort_values("begun").itertuples()
    assert first.ended <= second.begun


def _page_faults(run, trial):
    import resource
    import time

    import torch

    def used(times):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(times):
            torch.ones(2**20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    begun = time.monotonic()
    used(10)
    time.sleep(0.2)
    return {"faults": used(100), "pid": os.getpid(), "begun": begun, "ended": time.monotonic()}


def test_a_worker_keeps_runs_where_its_own_machine_does(folders, monkeypatch):
    far = Study("far", scale="laptop", engine="tcp://host:8786")
    near = Study("far", scale="laptop", engine="processes")  # its workers may be older than it
    smoke = Study("far", scale="smoke", engine="tcp://host:8786")
    sent = pickle.dumps([far, near, smoke])
    monkeypatch.setenv("KDUTILS_RUNS", str(folders / "worker"))
    received = [study.folder for study in pickle.loads(sent)]
    assert received == [folders / "worker" / "far", near.folder, smoke.folder]


def _kill_when_busy(folder: Path, pids: list[int]):
    """Kill the worker that is in the middle of a run, once a state of it has been kept."""
    deadline = time.monotonic() + 300  # a busy machine is slow to import
    while time.monotonic() < deadline:
        for state in folder.rglob("state.safetensors"):
            pid = int((state.parent / "log").read_text(encoding="utf-8").split()[-1])
            if pid in pids:
                os.kill(pid, signal.SIGKILL)
                return
        time.sleep(0.005)


def _timeless(study, network, arguments):
    study.map(network, arguments)
    return {r.content["key"]: records.timeless(r.content) for r in study.records}


# Publishing, reading


def test_published_records_are_read_without_training(folders):
    network = tiny_study()[1]
    network(seed=0)
    assert len(records.publish("tiny")) == 1
    assert records.publish("tiny") == []
    network(seed=1)  # on this machine alone
    study, network = tiny_study(train=False)
    frame = study.map(network, grid(seed=[0, 1]))
    assert frame.seed.unique().tolist() == [0]
    assert len(frame) == 3


def test_a_published_run_is_trained_again_when_its_weights_are_wanted(folders):
    first = tiny_study()[1](seed=0)
    expected = first.weights("e3").read_bytes()
    (published,) = records.publish("tiny")
    content = json.loads(published.read_text(encoding="utf-8"))
    content["results"]["another_machine"] = True
    published.write_text(json.dumps(content), encoding="utf-8")
    os.environ["KDUTILS_RUNS"] = str(folders / "elsewhere")
    record = tiny_study()[1](seed=0)
    assert not record.folder.exists()
    assert record.results["another_machine"]
    assert record.weights("e3").read_bytes() == expected
    assert "another_machine" not in record.results  # what was measured goes with the weights


def test_smoke_trains_whatever_is_published():
    tiny_study()[1](seed=0)
    records.publish("tiny")
    study, network = tiny_study(scale="smoke", train=False)
    study.map(network, grid(seed=[0]))
    assert started(network.find({"seed": 0})) == 1


def test_other_scales_are_not_published():
    tiny_study()[1](seed=1)
    assert records.publish("tiny", scales=["paper"]) == []


def test_what_was_trained_on_a_folder_of_ones_own_is_not_published():
    tiny_study()[1](seed=1)
    (path,) = (records.runs_folder() / "tiny").glob("*/record.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    content["arguments"]["folder"] = "recordings"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert records.publish("tiny") == []


def test_a_search_reads_failed_candidates_also_where_only_published_records_are(folders):
    study, network = tiny_study()
    tries = [{"seed": 0, "poison": [1, 1]}, {"seed": 0}]
    found = study.map(network, tries, failing=True)
    assert len(records.publish("tiny")) == 2
    os.environ["KDUTILS_RUNS"] = str(folders / "elsewhere")
    study, network = tiny_study(train=False)
    again = study.map(network, tries, failing=True)
    assert list(again.key) == list(found.key)
    failed = again[again.error.notna()]
    assert failed.epoch.tolist() == [1]
    assert failed.test_accuracy.isna().all()
    with pytest.raises(runs.RunFailed, match="failed: "):
        study.map(network, tries)


def test_map_says_what_it_will_train_and_how_long_it_will_take(capsys):
    study, network = tiny_study()
    study.map(network, grid(seed=[0]))
    assert "network: 1 run to train\n" in capsys.readouterr().out
    study.map(network, grid(seed=[0, 1, 2]))
    said = capsys.readouterr().out
    assert re.search(r"network: 2 runs to train, about \d+ s\n", said), said


def test_compare_tells_same_bits_from_close_numbers_from_neither():
    old = tiny_study()[1](seed=0).content
    new = json.loads(json.dumps(old))
    new["made"] |= {"seconds": 1000, "workers": 2}
    assert records.compare(old, new) == (True, "the same numbers and weights, bit for bit")
    new["results"]["history"][-1]["test_accuracy"] += 0.01
    assert not records.compare(old, new)[0]
    new["made"] |= {"threads": 2, "source": "another"}
    good, sentence = records.compare(old, new)
    assert good
    assert sentence == "made with another source, threads; accuracies differ by at most 0.0100"
    new["results"]["history"][-1]["test_accuracy"] += 0.03
    assert not records.compare(old, new)[0]
    new["results"] = {"history": []}
    assert not records.compare(old, new)[0]
    assert not records.compare(new, old)[0]


def test_compare_leaves_times_out_and_finds_accuracies_inside_results():
    old = tiny_study()[1](seed=0).content
    times = {"milliseconds": {"a": [1.0]}, "time_shares": {"aten::mm": 0.5}}
    old = old | {"results": times | {"engines": {"a": {"box_accuracy": 0.9}}}}
    new = json.loads(json.dumps(old))
    new["results"] |= {"milliseconds": {"a": [2.0]}, "time_shares": {"aten::cat": 0.4}}
    assert records.compare(old, new) == (True, "the same numbers and weights, bit for bit")
    new["made"]["source"] = "another"
    assert records.compare(old, new) == (True, "made with another source; the same numbers")
    for value, close in ((0.88, True), (0.8, False)):
        new["results"]["engines"]["a"]["box_accuracy"] = value
        assert records.compare(old, new)[0] is close


# Source


def _hash(tmp_path, text):
    path = tmp_path / f"m{abs(hash(text))}.py"
    path.write_text(text, encoding="utf-8")
    names = {"__name__": "some_notebook"}
    exec(compile(text, str(path), "exec"), names)
    return records.source_hash(names["f"])


def test_source_hash_is_the_same_in_every_python(tmp_path):
    text = 'def f(run, a=None, *, b=1):\n    return {"x": [a, -b, *()], f"{a!r:>3}": not a}\n'
    assert _hash(tmp_path, text).startswith("8937d33aba7dd2df")


def test_source_hash_ignores_comments_and_docstrings_but_no_code(tmp_path):
    text = 'def g():\n    return 1\n\ndef f(run):\n    """Doc."""\n    return {"x": g()}\n'
    same = text.replace('"""Doc."""', '"""Other words."""  # and a comment')
    assert _hash(tmp_path, same) == _hash(tmp_path, text)
    assert _hash(tmp_path, text.replace('"x"', '"y"')) != _hash(tmp_path, text)
    helper = text.replace("return 1", "return 2")
    assert _hash(tmp_path, helper) != _hash(tmp_path, text)
    unused = text + "\ndef h():\n    return 3\n"
    assert _hash(tmp_path, unused) == _hash(tmp_path, text)


def test_source_hash_does_not_count_in_which_folder_of_ours_a_room_lies(tmp_path):
    def run(line):
        return _hash(tmp_path, f"def f(run):\n    {line}\n    return timed\n")

    inside = run("from kdutils.concierge.board import timed")
    assert inside == run("from kdutils.board import timed")
    assert inside != run("from kdutils.concierge.board import measured as timed")


def test_source_hash_counts_what_is_called_and_read_and_nothing_that_looks_like_it(tmp_path):
    helper, run = "def other():\n    return {}\n\n", "def f(run):\n    {}\n"

    def moved(body):
        """Whether another ``other`` makes another hash of this run."""
        texts = [helper.format(k) + run.format(body) for k in (1, 2)]
        return len({_hash(tmp_path, text) for text in texts}) == 2

    assert moved("return other()")
    assert not moved("return run.other")
    assert not moved("other = 1\n    return other")
    constants = [f"LIMIT = {k}\n" + run.format("return LIMIT") for k in (1, 2)]
    assert len({_hash(tmp_path, text) for text in constants}) == 2


def test_source_hash_follows_what_is_reached_into_the_rooms(tmp_path, monkeypatch):
    rooms = tmp_path / "rooms"
    rooms.mkdir()
    for room in records.SOURCE_ROOMS:
        (rooms / f"{room}.py").write_text(f"def of_{room}():\n    pass\n", encoding="utf-8")
    losses = "LIMIT = 3\n\ndef deep():\n    return LIMIT\n\ndef fit():\n    return deep()\n"
    (rooms / "losses.py").write_text(losses, encoding="utf-8")
    monkeypatch.setattr(records, "__file__", str(rooms / "records.py"))
    # A helper has the name of a room's function that it calls: both count.
    text = "def fit(run):\n    return losses.fit()\n\ndef f(run):\n    return fit(run)\n"
    first = _hash(tmp_path, text)
    (rooms / "losses.py").write_text(losses + "\n\ndef later():\n    return 1\n", encoding="utf-8")
    assert _hash(tmp_path, text) == first
    (rooms / "losses.py").write_text(losses.replace("LIMIT = 3", "LIMIT = 4"), encoding="utf-8")
    assert _hash(tmp_path, text) != first
