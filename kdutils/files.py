"""Files that are never half written, and never trusted blindly."""

import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO

import platformdirs


def cache_folder(variable: str, name: str) -> Path:
    """The folder named by the environment ``variable``, else ``name`` in the user's cache."""
    if os.environ.get(variable):
        return Path(os.environ[variable])
    try:
        return platformdirs.user_cache_path("kdutils") / name
    except RuntimeError:  # no $HOME, and nobody knows this user
        raise OSError(f"no home folder to keep {name} in: name a folder by ${variable}") from None


def write(path: Path, content: bytes | str) -> None:
    """Write ``content`` aside, then put it in place: ``path`` holds the old or the new, whole."""
    with replacing(Path(path)) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of ``path`` when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{owner()}-{time.monotonic_ns()}.partial")
    try:
        with open(partial, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def owner() -> str:
    """This process, as it stands in the names of what it must not leave behind."""
    return f"{_machine()}-{os.getpid()}"


@cache
def _machine() -> str:
    """Eight digits for this machine since it was started, and the container it numbers for."""
    try:
        where = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
        where += os.readlink("/proc/self/ns/pid")
    except OSError:  # a system without /proc
        where = platform.node()
    return hashlib.sha256(where.encode()).hexdigest()[:8]


def sweep(folder: Path, pattern: str = "*.partial", hours: float = 1) -> None:
    """Remove the files and folders of this pattern whose :func:`owner` has ended.

    Of an owner on another machine that cannot be known, nor where another process has its number
    by now; what has not changed for so many ``hours`` goes all the same.
    """
    for path in Path(folder).glob(pattern):
        with suppress(OSError):  # another process swept it
            if ended(path) or time.time() - path.stat().st_mtime > hours * 3600:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def ended(path: Path) -> int | None:
    """The number of the process that owned a file or folder, if it ran here and has ended."""
    named = re.match(r".*([0-9a-f]{8})-(\d+)-", path.name)
    ours = named and named[1] == _machine() and not _lives(int(named[2]))
    return int(named[2]) if ours else None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return b") Z " not in Path(f"/proc/{pid}/stat").read_bytes()  # killed, not yet waited for
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or a system without /proc
        return True


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def set_aside(path: Path, why: str) -> Path:
    """Rename a damaged file so that it is neither used nor lost, and say so."""
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    os.replace(path, aside)
    print(f"{path} is damaged ({why}); set aside as {aside.name}")
    return aside
