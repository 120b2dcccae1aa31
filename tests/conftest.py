"""Shared by all tests: one thread, no network, and folders of their own instead of the user's."""

import os
import shutil
import signal
from collections import Counter

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported; subprocesses inherit it

import pytest
from hypothesis import settings

from kdutils import data

# The same examples every time: a failure on another machine is a failure here.
settings.register_profile("kdutils", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("kdutils")


def pytest_configure():
    """The user's settings are set aside, for the notebooks' kernels too.

    What a script starts in the background ignores SIGINT, and so would all that the tests start.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in [name for name in os.environ if name.startswith("KDUTILS_")]:
        del os.environ[name]


# Long tests, each of which sets up its own: several workers share these files.
DIVIDED = ("test_notebooks.py", "test_spread.py", "test_stopping.py")
# What takes longest begins first, or one core waits at the end while the other computes it.
LONGEST = (
    "test_smoke_trains_everything",
    "test_book.py",
    "test_stopped_and_killed",
    "test_runs.py",
    "test_binary.py",
    "test_trust.py",
    "test_light.py",
    "test_concierge_device.py",
    "test_verify_trains",
    "test_a_worker_killed_for_memory",
    "test_sixth.py",
    "test_spread.py",
)


def scope(nodeid):
    """What goes to one worker: a file, for what it sets up, but of the divided ones a test."""
    file = nodeid.partition("::")[0]
    return nodeid if file.endswith(DIVIDED) else file


def pytest_collection_modifyitems(items):
    """The longest first, then the files of most tests; single short ones fill the end."""
    tests = Counter(scope(item.nodeid) for item in items)

    def place(item):
        rank = next((k for k, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST))
        return rank, -tests[scope(item.nodeid)]

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling

    class ByScope(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return scope(nodeid)

    config.option.loadscopereorder = False  # or the number of tests would order them
    return ByScope(config, log)


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path_factory):
    """Datasets and runs of a test lie in a fresh folder; the user's are neither read nor touched.

    Returns the folder of the datasets, which does not exist yet.
    """
    folder = tmp_path_factory.mktemp("own")
    monkeypatch.setenv("KDUTILS_DATA", str(folder / "data"))
    monkeypatch.setenv("KDUTILS_RUNS", str(folder / "runs"))
    monkeypatch.delenv("KDUTILS_RECORDS", raising=False)
    data.load.cache_clear()
    yield folder / "data"
    data.load.cache_clear()


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no other machine is found
]


@pytest.fixture(scope="session")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        say = pytest.fail if os.environ.get("CI") else pytest.skip
        say(f"no browser: none of {', '.join(BROWSERS)} is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield running
        running.close()
