"""Whoever is forgotten leaves no byte; `forgetting.py` measures it with a thousand sequences."""

import subprocess
import sys
import tempfile
from pathlib import Path

import forgetting
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kdutils.concierge.people import People, TotemError, unit

HERE = Path(__file__).parent
FORGETFUL = """
import sys
from kdutils.concierge.people import People
import forgetting

def remove(self, name):
    self.database.execute("PRAGMA secure_delete = OFF")
    with self.database:
        self.database.execute("DELETE FROM people WHERE name = ?", (name,))

if sys.argv.pop() == "not overwritten":
    People.remove = remove
done, faults = forgetting.sequences(8)
print(done["journals left"], *faults, sep="\\n")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a process is copied by fork")
@pytest.mark.parametrize("way", ["overwritten", "not overwritten"])
def test_killed_at_random_moments_the_file_holds_nobody_who_is_not_enrolled(way):
    """In a process of its own, since this one has threads; the check finds what it looks for."""
    command = [sys.executable, "-c", FORGETFUL, way]
    run = subprocess.run(command, cwd=HERE, capture_output=True, encoding="utf-8", check=True)
    journals, *faults = run.stdout.splitlines()
    assert int(journals) > 0, "no kill came while something was written"
    assert bool(faults) == (way == "not overwritten"), run.stdout


class Device(RuleBasedStateMachine):
    """A database of people, beside a dict that has what it should hold."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "people.sqlite3"
        self.known, self.made = {}, []

    @rule(name=st.sampled_from(forgetting.NAMES), width=st.sampled_from([8, 32, 2000]))
    def enrol(self, name, width):
        new = np.random.default_rng(len(self.made)).random(width, "f4")
        with People.opened(self.path, new=True) as people:
            if name in self.known:
                with pytest.raises(TotemError, match="is enrolled already"):
                    people.add(name, new, "m")
            else:
                people.add(name, new, "m")
                self.known[name] = new
        self.made.append(new)

    @rule(name=st.sampled_from(forgetting.NAMES), clips=st.integers(1, 5))
    def add(self, name, clips):
        width = len(self.known.get(name, [0] * 8))
        new = np.random.default_rng(len(self.made)).random(width, "f4")
        with People.opened(self.path, new=True) as people:
            if name in self.known:
                people.add(name, new, "m", clips, more=True)
                (kept,) = people.database.execute(
                    "SELECT embedding FROM people WHERE name = ?", [name]
                ).fetchone()
                self.made.append(self.known[name])
                self.known[name] = np.frombuffer(kept, "<f4")
                toward = unit(self.made[-1]) @ self.known[name], unit(new) @ self.known[name]
                assert min(toward) > 0.5  # between the two
            else:
                with pytest.raises(TotemError, match="is not enrolled"):
                    people.add(name, new, "m", clips, more=True)
        self.made += [new, *([self.known[name]] if name in self.known else [])]

    @rule(name=st.sampled_from(forgetting.NAMES))
    def forget(self, name):
        with People.opened(self.path, new=True) as people:
            if name in self.known:
                people.remove(name)
                del self.known[name]
            else:
                with pytest.raises(TotemError, match="is not enrolled"):
                    people.remove(name)

    @rule()
    def forget_all(self):
        with People.opened(self.path, new=True) as people:
            people.remove(None)
        self.known.clear()

    @invariant()
    def it_holds_who_is_enrolled_and_nothing_of_anybody_else(self):
        with People.opened(self.path, new=True) as people:
            assert people.names() == sorted(self.known)
        kept = {id(one) for one in self.known.values()}
        for one in self.made:
            found = forgetting.left_over(one, self.path.parent)
            assert bool(found) == (id(one) in kept)

    def teardown(self):
        self.folder.cleanup()


TestDevice = Device.TestCase
TestDevice.settings = settings(max_examples=20, stateful_step_count=12, deadline=None)
