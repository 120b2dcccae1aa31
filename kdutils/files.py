"""Files that are never half written, and never trusted blindly."""

import hashlib
import os
import time
from pathlib import Path

import platformdirs


def cache_folder(variable: str, name: str) -> Path:
    """The folder named by the environment ``variable``, else ``name`` in the user's cache."""
    return Path(os.environ.get(variable) or platformdirs.user_cache_path("kdutils") / name)


def write(path: Path, content: bytes | str) -> None:
    """Write ``content`` aside, then put it in place: ``path`` holds the old or the new, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    partial = path.with_name(f"{path.name}.{os.getpid()}-{time.monotonic_ns()}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


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
