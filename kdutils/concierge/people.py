"""Enrolled people: one embedding each, in an SQLite file of their own. No PyTorch."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from unicodedata import normalize

import numpy as np

WAIT = 30  # seconds for another program, a backup for instance, to let go of the database


class TotemError(RuntimeError):
    """A model, a database, a source or a name cannot be used; the message says which and why."""


def unit(values: np.ndarray) -> np.ndarray:
    """A vector (D,) at length 1."""
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)


def checked(name: str) -> str:
    """A name without spaces around it; a :class:`TotemError` where it cannot be read."""
    if not name.strip() or not name.isprintable():
        raise TotemError(f"the name {name!r} is empty, or has characters that cannot be shown")
    return name.strip()


class People:
    """Those in a database; ``clips`` says from how many an embedding is the mean."""

    COLUMNS = ("name TEXT PRIMARY KEY", "embedding BLOB NOT NULL", "model TEXT NOT NULL")
    COLUMNS += ("clips INTEGER NOT NULL DEFAULT 1",)  # the program's first version had none

    def __init__(self, path: Path, database: sqlite3.Connection):
        self.path, self.database = path, database

    @classmethod
    @contextmanager
    def opened(cls, path: Path, new: bool = False) -> Iterator["People"]:
        """Those in a file, which ``new`` makes where there is none.

        One of the program's first version is carried over. Raises :class:`TotemError` where the
        file is absent, damaged, no database of ours, or cannot be used: locked by another program,
        not to be written, on a full disk.
        """
        if not path.exists():
            if not new:
                raise TotemError(f"{path} does not exist: nobody is enrolled")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(0o600)  # its owner's alone, and so is SQLite's journal
        wanted = [column.split()[0] for column in cls.COLUMNS]
        try:
            with closing(sqlite3.connect(path.absolute(), timeout=WAIT)) as database:
                database.execute("PRAGMA secure_delete = ON")  # what is removed is overwritten
                database.create_function("nfc", 1, partial(normalize, "NFC"))  # one spelling of ë
                (state,) = database.execute("PRAGMA quick_check").fetchone()
                if not database.execute("SELECT * FROM sqlite_master").fetchall():
                    database.execute(f"CREATE TABLE people ({', '.join(cls.COLUMNS)})")
                found = [column[1] for column in database.execute("PRAGMA table_info(people)")]
                if found == wanted[:-1]:
                    database.execute(f"ALTER TABLE people ADD COLUMN {cls.COLUMNS[-1]}")
                    found = wanted
                if [state, *found] != ["ok", *wanted]:
                    raise sqlite3.DatabaseError(f"{state}; columns: {', '.join(found)}")
                with suppress(OSError):  # it is another user's
                    path.chmod(path.stat().st_mode & 0o700)  # as the first version did not
                database.execute("PRAGMA journal_mode = DELETE")  # a WAL keeps what is removed
                yield cls(path, database)
        except sqlite3.Error as error:
            busy = isinstance(error, sqlite3.OperationalError)
            what = "cannot be used now" if busy else "is damaged or not ours, and stays as it is"
            raise TotemError(f"{path} {what} ({error})" + "; try again" * busy) from None

    def add(self, name: str, embedding: np.ndarray, model: str, clips: int = 1, more: bool = False):
        """Keep a person's embedding (D,), the mean over so many clips.

        A name that is there already is refused; with ``more`` it has to be there, made by the same
        model, and the mean goes over the clips of both.
        """
        name = checked(name)
        with self.database:
            self.database.execute("BEGIN IMMEDIATE")
            query = "SELECT name, embedding, model, clips FROM people WHERE nfc(name) = nfc(?)"
            there = self.database.execute(query, [name]).fetchall()
            if bool(there) != more:
                known = f"is enrolled already; add to {name!r} with --add, or forget {name!r} first"
                raise TotemError(f"{name!r} {'is not enrolled: omit --add' if more else known}")
            for _, content, made_by, count in there:
                before = self._embedding(name, content, made_by, model, len(embedding))
                embedding, clips = unit(count * before + clips * embedding), count + clips
            self.database.execute("DELETE FROM people WHERE nfc(name) = nfc(?)", [name])
            row = (name, embedding.astype("<f4").tobytes(), model, clips)
            self.database.execute("INSERT INTO people VALUES (nfc(?), ?, ?, ?)", row)

    def remove(self, name: str | None) -> None:
        """Remove a person's data, or with None all; what the file held of it is overwritten."""
        which = " WHERE nfc(name) = nfc(?)" if name is not None else ""
        named = [name.encode(errors="replace").decode()] if which else []
        with self.database:
            gone = self.database.execute(f"DELETE FROM people{which}", named).rowcount
        if named and not gone:
            raise TotemError(f"{named[0]!r} is not enrolled in {self.path}; list says who is")
        with suppress(sqlite3.OperationalError):  # a full disk: overwritten it is
            self.database.execute("VACUUM")

    def names(self) -> list[str]:
        """All enrolled people, in the order of their names."""
        return [name for (name,) in self.database.execute("SELECT name FROM people ORDER BY name")]

    def gallery(self, model: str, width: int) -> tuple[list[str], np.ndarray]:
        """Names, and their embeddings (N, D); all must have been made by this model."""
        rows = self.database.execute("SELECT name, embedding, model FROM people ORDER BY name")
        every = {n: self._embedding(n, content, made, model, width) for n, content, made in rows}
        return list(every), np.array(list(every.values())).reshape(len(every), width)

    def _embedding(self, name, content, made_by, model, width) -> np.ndarray:
        if made_by != model:
            raise TotemError(f"{name!r} was enrolled with another model: --model takes its folder")
        values = np.frombuffer(content, "<f4") if len(content) == 4 * width else None
        if values is None or not np.isfinite(values).all():
            raise TotemError(f"{self.path} is damaged: the embedding of {name!r} is none")
        return values
