# Only in the copy for Colab; elsewhere this cell does nothing.
import sys


def fetch(repository="REPOSITORY", commit="COMMIT"):
    """Get the repository as it was when this page was built, and install what Colab lacks of it."""
    import os
    import re
    import subprocess
    from importlib.metadata import distributions
    from pathlib import Path

    folder = Path("/content") / repository.rpartition("/")[2]
    for words in (
        ["init", "-q", folder],
        ["-C", folder, "fetch", "-q", "--depth", "1", repository, commit],
        ["-C", folder, "checkout", "-q", commit],
    ):
        subprocess.run(["git", *words], check=True)
    os.chdir(folder)
    sys.path.insert(0, str(folder))  # this Python, once begun, does not see what is installed as -e

    def plain(name):
        return re.sub("[-_.]+", "-", name).lower()

    # What Colab has stays as it is, above all PyTorch with CUDA; the rest gets the tested versions.
    here = {plain(found.metadata["Name"]) for found in distributions()}
    pins = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    lacking = [pin for pin in pins if pin[0] != "#" and plain(pin.partition("==")[0]) not in here]
    Path("/tmp/lacking.txt").write_text("\n".join(lacking), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "-q", "-c", "/tmp/lacking.txt"]
    subprocess.run([*pip, "-e", ".[train]"], check=True)
    print(f"{repository} at {commit[:12]} is in {folder}, which is the folder now, and installed.")


if "google.colab" in sys.modules:
    fetch()
