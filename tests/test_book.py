"""The book as a reader meets it: built strictly, then looked at in a browser, wide and narrow."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from kdutils import notebooks

PROJECT = Path(__file__).parent.parent
STUDY = "notebooks/3-eskd"
PAGES = ["notebooks/index", "book/methods", "book/rerun", "book/design", "book/log", "book/device"]
PAGES += ["book/glossary", "book/references", "notebooks/verdicts", "notebooks/scenes"]
PAGES += [f"notebooks/{path.stem}" for path in notebooks.studies().values()]
WIDTHS = {"desktop": 1280, "phone": 390}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


# What readers and their tools leave in a checkout, and what it is a copy of.
LEFT_BEHIND = {
    "mine.ipynb": f"{STUDY}.ipynb",  # papermill's output, named as our page on rerunning names it
    "notebooks/3-eskd-Copy1.ipynb": f"{STUDY}.ipynb",  # Jupyter's "Duplicate"
    "notebooks/.ipynb_checkpoints/3-eskd-checkpoint.ipynb": f"{STUDY}.ipynb",
    "notes.md": "book/methods.md",
    "notes [1].md": "book/methods.md",
    "notebooks/notes.md": "book/methods.md",
    "recordings/README.md": "book/methods.md",
    "venv/lib/python3.12/site-packages/some/README.md": "book/methods.md",
}


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> Path:
    """The folder of the book's pages, built from the working tree; a warning is an error.

    The tree is a copy of what the book is made from, and what people leave in theirs lies in it.
    """
    tree = tmp_path_factory.mktemp("book")
    for name in ("book", "notebooks"):
        shutil.copytree(PROJECT / name, tree / name, ignore=shutil.ignore_patterns(".*"))
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(PROJECT / name, tree)
    for name, source in LEFT_BEHIND.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / source, tree / name)
    command = [Path(sys.executable).parent / "jupyter-book", "build", tree]
    command += ["-W", "-n", "--keep-going"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    if seconds > 60:
        warnings.warn(f"building the book took {seconds:.0f} s; it should take 60", stacklevel=1)
    return tree / "_build" / "html"


def test_the_book_has_the_pages_of_its_table_of_contents_and_no_others(html):
    made = {str(path.relative_to(html).with_suffix("")) for path in html.rglob("*.html")}
    ours = {name for name in made if not name.startswith("_static/")}
    assert ours - {"index", "genindex", "search"} == set(PAGES)


@pytest.fixture(scope="module")
def address(html):
    """The book's address on this machine while the tests run."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=html)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module", params=WIDTHS)
def screen(request, browser, address):
    """A page of each width that reaches the book and nothing else, and what goes wrong on it."""
    page = browser.new_page(viewport={"width": WIDTHS[request.param], "height": 900})
    page.wrong = []

    def only_here(route):
        return route.continue_() if route.request.url.startswith(address) else route.abort()

    def heard(message):
        if message.type == "error" and message.location["url"].startswith(address):
            page.wrong.append(message.text)

    def thrown(error):
        if "THEBE_JS_URL" not in str(error):  # sphinx-thebe puts its constants in twice; harmless
            page.wrong.append(str(error))

    def answered(response):
        if response.status >= 400:
            page.wrong.append(f"{response.status} {response.url}")

    page.route("**/*", only_here)
    page.on("console", heard)
    page.on("pageerror", thrown)
    page.on("response", answered)
    yield page
    page.close()


@pytest.mark.parametrize("name", PAGES)
def test_page(screen, address, name):
    """Nothing sticks out sideways, every picture says what it shows, nothing of ours fails."""
    screen.wrong.clear()
    screen.goto(f"{address}/{name}.html", wait_until="load")
    width = screen.viewport_size["width"]
    sticking_out = screen.evaluate(
        """width => document.documentElement.scrollWidth <= width ? [] :
        [...document.querySelectorAll("main *")]
            .filter(e => e.getBoundingClientRect().right > width + 1)
            .slice(0, 5).map(e => e.outerHTML.slice(0, 200))""",
        width,
    )
    assert screen.evaluate("document.documentElement.scrollWidth") <= width, sticking_out
    assert screen.locator("article h1").count() == 1
    mute = """images => images.filter(i => !i.alt.trim()).map(i => i.src)"""
    assert screen.locator("article img").evaluate_all(mute) == []
    assert screen.wrong == []


def test_formulas_are_set_without_any_other_server(screen, address):
    screen.goto(f"{address}/notebooks/2-vid.html", wait_until="load")
    screen.wait_for_selector("mjx-container", timeout=20_000)
    screen.wait_for_function("!document.querySelector('article').innerText.includes('\\\\(')")
    assert screen.locator("article mjx-container").count() > 10


def test_wide_tables_scroll_in_their_own_box(screen, address):
    screen.goto(f"{address}/notebooks/verdicts.html", wait_until="load")
    boxes = screen.locator("div.claims")
    assert boxes.count() == len(notebooks.studies())
    for summary in screen.locator("details:has(div.claims) > summary").all():
        summary.click()
    kinds = boxes.evaluate_all("all => all.map(box => getComputedStyle(box).overflowX)")
    assert set(kinds) == {"auto"}
    inside = boxes.evaluate_all(
        "all => all.every(box => box.getBoundingClientRect().right <= window.innerWidth)"
    )
    assert inside


def test_verdicts_are_judged_anew_and_nothing_sticks_out(screen, address):
    """Here the script has the theme; test_live.py holds what it says against kdutils."""
    screen.wrong.clear()
    screen.goto(f"{address}/notebooks/verdicts.html?margin=2&out=vid.3", wait_until="load")
    if screen.locator("section.live form:visible").count() == 0:
        screen.get_by_text("Judge otherwise").click()
    screen.get_by_role("combobox", name="Confidence").select_option("99 %")
    said = "Judged at 99 %, at twice the margins, without 1 seed."
    assert screen.locator("section.live").get_by_role("status").inner_text().startswith(said)
    for summary in screen.locator("details:has(div.claims) > summary").all():
        summary.click()
    width = screen.viewport_size["width"]
    assert screen.evaluate("document.documentElement.scrollWidth") <= width
    drawn = screen.locator("figure svg.live")
    assert drawn.count() == 1 + len(notebooks.studies())
    for box in [drawing.bounding_box() for drawing in drawn.all()]:
        assert box["x"] >= 0
        assert 300 < box["width"] <= width - box["x"]
    assert screen.locator("article img:visible").count() == 0
    assert screen.wrong == []


def test_figures_of_the_study_have_captions(screen, address):
    cells = json.loads((PROJECT / f"{STUDY}.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    pictures = [o for o in outputs if any(k.startswith("image/") for k in o.get("data", {}))]
    screen.goto(f"{address}/{STUDY}.html", wait_until="load")
    captions = screen.locator("article figure:has(img) figcaption").all_inner_texts()
    assert len([text for text in captions if text.strip()]) == len(pictures)
    assert screen.locator("article img").count() == len(pictures)


def test_study_can_be_launched(screen, address):
    screen.goto(f"{address}/{STUDY}.html", wait_until="load")
    launch = screen.locator("a[href*='mybinder.org']")
    assert launch.count() == 1
    assert f"{STUDY}.ipynb" in unquote(launch.get_attribute("href"))


class Page(HTMLParser):
    """What a page links to, and the places in it that can be linked to."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.places = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        self.places |= {given[key] for key in ("id", "name") if given.get(key)}


def test_links_inside_the_book_resolve(html):
    pages = {path.resolve(): Page(path) for path in html.rglob("*.html")}
    assert len(pages) > len(PAGES)
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = unquote(parts.fragment)
            missing = not target.exists() or (
                place and target in pages and place not in pages[target].places
            )
            if missing:
                dead.append(f"{path.name}: {link}")
    assert dead == []
