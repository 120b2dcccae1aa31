"""Files that hold the old content or the new, whole, whatever happens."""

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import platformdirs
import pytest

from kdutils import files, spread


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.fixture
def path(tmp_path):
    """A record that is there already."""
    path = tmp_path / "record.json"
    files.write(path, "the old content")
    return path


def test_write_makes_folders_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "a" / "b" / "record.json"
    for content in ("first, and longer", "ąćę", b"\x00\xff"):
        files.write(path, content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert os.listdir(path.parent) == ["record.json"]


@pytest.mark.parametrize(
    ("function", "fault"),
    [("fsync", full_disk), ("replace", full_disk), ("fsync", interrupt)],
)
def test_a_write_that_fails_midway_leaves_the_old_content_alone(monkeypatch, path, function, fault):
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fault)
        with pytest.raises((OSError, KeyboardInterrupt)):
            files.write(path, "the new content")
    assert path.read_text(encoding="utf-8") == "the old content"
    assert os.listdir(path.parent) == ["record.json"]
    files.write(path, "the new content")
    assert path.read_text(encoding="utf-8") == "the new content"


def in_a_process(code, path):
    code = f"import os, resource, signal, sys\nfrom kdutils import files\n{code}"
    command = [sys.executable, "-c", code, str(path)]
    return subprocess.run(command, capture_output=True, encoding="utf-8")


def test_a_file_that_cannot_grow_leaves_the_old_content_alone(path):
    done = in_a_process(
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "files.write(sys.argv[1], 'new' * 1000)",
        path,
    )
    assert "File too large" in done.stderr
    assert path.read_text(encoding="utf-8") == "the old content"
    assert os.listdir(path.parent) == ["record.json"]


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_process_killed_while_writing_leaves_the_old_content_alone(path, function):
    done = in_a_process(
        f"os.{function} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write(sys.argv[1], 'the new content')",
        path,
    )
    assert done.returncode == -signal.SIGKILL
    assert path.read_text(encoding="utf-8") == "the old content"
    left = set(os.listdir(path.parent)) - {"record.json"}
    assert all(name.endswith(".partial") for name in left)  # which git does not see
    files.sweep(path.parent)
    assert os.listdir(path.parent) == ["record.json"]


def test_what_killed_pools_left_in_shared_memory_is_removed_and_what_living_ones_hold_is_not(
    tmp_path,
):
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead, here = ended.pid, str(os.getpid())
    held = {f"sem.loky-{here}-a", f"sem.loky-{dead}1-a", f"kdpool-{'0' * 8}-{dead}-mark", "other"}
    names = {f"sem.loky-{dead}-a", f"kdpool-{files.owner().replace(f'-{here}', f'-{dead}')}-mark"}
    for name in held | names:
        (tmp_path / name).touch()
    (tmp_path / f"joblib_memmapping_folder_{dead}_b" / "deep").mkdir(parents=True)
    spread._mark_pool(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == held | {f"kdpool-{files.owner()}-mark"}
    spread._mark_pool(tmp_path / "not there")


def test_sweeping_leaves_a_living_owners_files_and_anothers_until_they_are_old(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead = files.owner().replace(str(os.getpid()), str(ended.pid))
    owners = {
        "living": files.owner(),
        "dead": dead,
        "elsewhere": f"{'0' * 8}-{ended.pid}",
        "nameless": "1234",
    }
    paths = {name: tmp_path / f"{name}.{who}-1.partial" for name, who in owners.items()}
    for path in [*paths.values(), tmp_path / "record.json"]:
        path.touch()
    (tmp_path / f"folder.{dead}-1.partial").mkdir()
    (tmp_path / f"folder.{dead}-1.partial" / "socket").touch()
    files.sweep(tmp_path)
    kept = {path.name.partition(".")[0] for path in tmp_path.iterdir()}
    assert kept == {"living", "elsewhere", "nameless", "record"}
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    files.sweep(tmp_path, hours=10**6)
    assert {path.name.partition(".")[0] for path in tmp_path.iterdir()} == kept
    files.sweep(tmp_path)
    assert os.listdir(tmp_path) == ["record.json"]


def test_a_killed_process_that_nobody_waited_for_has_ended(tmp_path):
    code = "from kdutils import files; print(files.owner(), flush=True); input()"
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
    with subprocess.Popen([sys.executable, "-c", code], **options) as process:
        partial = tmp_path / f"record.json.{process.stdout.readline().strip()}-1.partial"
        partial.touch()
        files.sweep(tmp_path)
        assert partial.exists()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        files.sweep(tmp_path)
        assert not partial.exists()


def test_the_content_is_on_disk_before_it_takes_the_name(monkeypatch, path):
    calls = []

    def spy(function):
        def call(*args):
            calls.append(function.__name__)
            assert path.read_text(encoding="utf-8") == "the old content"
            return function(*args)

        return call

    for function in (os.fsync, os.replace):
        monkeypatch.setattr(os, function.__name__, spy(function))
    files.write(path, "the new content")
    assert calls == ["fsync", "replace"]


def test_writers_at_the_same_time_leave_one_whole_content(path):
    contents = [str(n) * 50_000 for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for result in [pool.submit(files.write, path, c) for c in contents * 5]:
            assert path.read_text(encoding="utf-8") in [*contents, "the old content"]
            result.result()
    assert path.read_text(encoding="utf-8") in contents
    assert os.listdir(path.parent) == ["record.json"]


def test_others_may_read_what_is_written(path):
    umask = os.umask(0o022)
    try:
        files.write(path, "new")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644  # unlike the standard temporary files


def test_set_aside_renames_the_file_and_says_so(path, capsys):
    aside = files.set_aside(path, "its SHA-256 is wrong")
    assert not path.exists()
    assert aside.parent == path.parent
    assert aside.read_text(encoding="utf-8") == "the old content"
    said = capsys.readouterr().out
    for part in (str(path), "damaged", "its SHA-256 is wrong", aside.name):
        assert part in said


def test_files_set_aside_do_not_replace_each_other(path):
    aside = []
    for content in ("one", "two", "three"):
        files.write(path, content)
        aside.append(files.set_aside(path, "damaged"))
    assert [a.read_text(encoding="utf-8") for a in aside] == ["one", "two", "three"]


@pytest.mark.parametrize("content", [b"", b"abc", bytes(range(256)) * 9000])
def test_sha256_is_that_of_the_bytes(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert files.sha256(path) == hashlib.sha256(content).hexdigest()


def test_sha256_of_the_standards_own_example(tmp_path):
    (tmp_path / "abc").write_text("abc", encoding="utf-8")
    assert files.sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_the_cache_folder_is_the_variables_or_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path))
    assert files.cache_folder("KDUTILS_DATA", "data") == tmp_path
    expected = platformdirs.user_cache_path("kdutils") / "data"
    monkeypatch.setenv("KDUTILS_DATA", "")
    assert files.cache_folder("KDUTILS_DATA", "data") == expected
    monkeypatch.delenv("KDUTILS_DATA")
    assert files.cache_folder("KDUTILS_DATA", "data") == expected


def test_without_a_home_folder_a_sentence_names_the_variable(monkeypatch, tmp_path):
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}[0])  # no entry for this user
    monkeypatch.delenv("KDUTILS_DATA")
    with pytest.raises(OSError, match=r"no home folder to keep data in: .* \$KDUTILS_DATA"):
        files.cache_folder("KDUTILS_DATA", "data")
    monkeypatch.setenv("KDUTILS_DATA", str(tmp_path))
    assert files.cache_folder("KDUTILS_DATA", "data") == tmp_path
