"""How long things take on this machine: writes data/times.json, which a page of the book shows.

``python tools/measure.py`` reads every page from published records and reruns every study at
``smoke``, one after another; ``--whole`` also times building the book, ``make reproduce`` and
``make test``. Run it when nothing else runs.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kdutils import files, notebooks, records

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def seconds(command: list, **environment: str) -> float:
    """How long a command takes. Exits with what it said where it fails."""
    before = time.perf_counter()
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-3000:]}")
    return round(time.perf_counter() - before, 1)


def measure(whole: bool) -> dict:
    """Seconds by study: from published records, and anew at the smallest scale."""
    found: dict = {"read": {}, "smoke": {}, "whole": {}}
    python = sys.executable
    with tempfile.TemporaryDirectory() as folder:
        runs = {"KDUTILS_RUNS": folder}
        for study, path in notebooks.studies().items():
            out = Path(folder) / f"{study}.ipynb"
            read = [python, "-m", "papermill", path, out, "--cwd", path.parent]
            found["read"][study] = seconds(read, **runs)
            anew = [python, "-m", "kdutils", "run", study, "--output", folder]
            found["smoke"][study] = seconds(anew, **runs)
            print(study, found["read"][study], found["smoke"][study], flush=True)
    if whole:
        for built in ("html", ".doctrees"):  # else only what changed is built
            shutil.rmtree(ROOT / "_build" / built, ignore_errors=True)
        for verb in ("book", "reproduce", "test"):  # the environment stands
            found["whole"][f"make {verb}"] = seconds(["make", verb])
        page = ROOT / "_build" / "html" / "notebooks" / "verdicts.html"
        found["live"] = {str(slower): live(page, slower) for slower in (1, 4)}
    return found


def live(page: Path, slower: int) -> dict:
    """Seconds until the page of verdicts judges by itself, on a processor so many times slower, and
    the bytes that it alone needs: its text, script and pictures."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, BROWSERS)))
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        tab, asked = browser.new_page(), []
        session = tab.context.new_cdp_session(tab)
        session.send("Emulation.setCPUThrottlingRate", {"rate": slower})
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.as_uri(), wait_until="commit")
        tab.get_by_text("As registered.").wait_for()
        took = tab.evaluate("performance.now()") / 1000
        tab.wait_for_load_state()
        browser.close()
    own = {url for url in asked if url.endswith((".webp", "verdicts.js", page.name))}
    size = sum(Path(unquote(urlsplit(url).path)).stat().st_size for url in own)
    return {"seconds": round(took, 2), "kilobytes": round(size / 1000)}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--whole", action="store_true", help="also make book, reproduce, test")
    found = measure(ask.parse_args().whole)
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": records.commit(),
        "processor": records.made_with({})["processor"],
        "cores": os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count(),
    }
    text = json.dumps(about | found, indent=1) + "\n"
    files.write(ROOT / "data" / "times.json", text)


if __name__ == "__main__":
    main()
