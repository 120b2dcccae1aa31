"""The book as a reader meets it: built strictly, then looked at in a browser, wide and narrow."""

import functools
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import types
import warnings
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe

from kdutils import claims, notebooks, records

PROJECT = Path(__file__).parent.parent
STUDY = "notebooks/3-eskd"
TOC = yaml.safe_load((PROJECT / "_toc.yml").read_text(encoding="utf-8"))
PAGES = [TOC["root"], *(page["file"] for part in TOC["parts"] for page in part["chapters"])]
NOTEBOOKS = [name for name in PAGES if name.startswith("notebooks/")]
FORMULAS = "notebooks/2-vid"
WIDTHS = {"desktop": 1280, "phone": 390, "paper": 720}
REPOSITORY = "Someone/their-copy"  # that the book is built from, as CI's machines say it
COMMIT = "0123456789abcdef0123456789abcdef01234567"
MEGABYTE = 1_000_000


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
    where = {"GITHUB_REPOSITORY": REPOSITORY, "GITHUB_SERVER_URL": "https://github.com"}
    where["GITHUB_SHA"] = COMMIT
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=os.environ | where)
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
def screen(browser, address):
    """A page, and what goes wrong on it: errors, and whatever asks for more than the book.

    One for all tests, whose width and theme are switched in place.
    """
    page = browser.new_page(viewport={"width": WIDTHS["desktop"], "height": 900})
    page.wrong = []

    def asked(request):
        if not request.url.startswith((address, "data:", "blob:")):
            page.wrong.append(f"asks {request.url}")

    def heard(message):
        if message.type == "error":
            page.wrong.append(message.text)

    def thrown(error):
        if "THEBE_JS_URL" not in str(error):  # sphinx-thebe puts its constants in twice; harmless
            page.wrong.append(str(error))

    def answered(response):
        if response.status >= 400:
            page.wrong.append(f"{response.status} {response.url}")

    page.on("request", asked)
    page.on("console", heard)
    page.on("pageerror", thrown)
    page.on("response", answered)
    yield page
    page.close()


def switch(screen, width: str | None = None, theme: str | None = None):
    """As by turning the phone, or by the system's evening; the page hears of both by itself."""
    if width:
        screen.set_viewport_size({"width": WIDTHS[width], "height": 900})
    if theme:
        screen.emulate_media(color_scheme=theme)
        night = "theme => document.documentElement.dataset.theme === theme"
        screen.wait_for_function(night, arg=theme)
    # Two pictures later all who heard of it have answered.
    screen.evaluate("new Promise(go => requestAnimationFrame(() => requestAnimationFrame(go)))")


def sticking_out(screen) -> list[str]:
    """What makes the page scroll sideways."""
    return screen.evaluate(
        """() => {
            const width = window.innerWidth;
            if (document.documentElement.scrollWidth <= width) return [];
            const out = [...document.querySelectorAll("main *")]
                .filter(e => e.getBoundingClientRect().right > width + 1)
                .slice(0, 5).map(e => e.outerHTML.slice(0, 200));
            return ["the page is wider than the screen", ...out];
        }"""
    )


# What depends on colours alone; the rest of axe's rules ask about structure, focus and names.
OF_COLOUR = ["color-contrast", "link-in-text-block"]
# Opened folds, colours that change at once, and of code a word of each kind: thousands are alike.
PREPARE = """() => {
    for (const fold of document.querySelectorAll("details")) fold.open = true;
    const style = document.createElement("style");
    style.textContent = "* { transition: none !important }";
    document.head.append(style);
    const kinds = new Set();
    for (const word of document.querySelectorAll("pre span")) {
        if (kinds.has(word.className)) word.replaceWith(word.textContent);
        kinds.add(word.className);
    }
}"""
# One text of each colour, ground and size is enough.
SAMPLE = """() => {
    const kinds = new Set();
    const ground = e => {
        for (; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor;
            if (colour !== "rgba(0, 0, 0, 0)") return colour;
        }
    };
    for (const e of document.body.querySelectorAll("*")) {
        delete e.dataset.sample;
        if (![...e.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.data.trim())) continue;
        if (!e.checkVisibility({visibilityProperty: true})) continue;
        const style = getComputedStyle(e);
        const link = e.closest("p a") !== null;
        const kind = [style.color, style.fontSize, style.fontWeight, ground(e), link].join();
        if (!kinds.has(kind)) e.dataset.sample = "";
        kinds.add(kind);
    }
}"""


def barriers(screen, what: dict, rules: dict) -> list[str]:
    """What axe finds of weight: ``serious`` and ``critical`` stop somebody from reading."""
    found = screen.evaluate(
        "([what, rules]) => axe.run(what, {resultTypes: ['violations'], preload: false, ...rules})"
        ".then(results => results.violations)",
        [what, rules],
    )
    return [
        f"{kind['id']}: {node['html'][:200]} {node['failureSummary']}"
        for kind in found
        if kind["impact"] in ("serious", "critical")
        for node in kind["nodes"][:5]
    ]


@pytest.mark.parametrize("name", PAGES)
def test_page(screen, address, name):
    """On either screen, by day and by night: nothing sticks out, fails or keeps anyone out.

    Folds are open. Structure is looked at in either width (on a desk, what a phone folds away: the
    rest is the same), colours in either theme (on a desk, where most can be seen).
    """
    screen.wrong.clear()
    switch(screen, "desktop")
    screen.goto(f"{address}/{name}.html", wait_until="load")
    switch(screen, theme="light")
    formulas = screen.locator("article .math").count()
    screen.wait_for_function(
        "() => [...document.querySelectorAll('article .math')]"
        ".every(formula => formula.querySelector('mjx-container'))"
    )
    assert name != FORMULAS or formulas > 10
    assert screen.locator("article h1").count() == 1
    screen.evaluate(PREPARE)
    screen.evaluate(Axe().axe_script)
    structure = {"rules": {rule: {"enabled": False} for rule in OF_COLOUR}}
    found = barriers(screen, {"exclude": [["article"]]}, structure)
    switch(screen, "phone")
    found += sticking_out(screen) + barriers(screen, {"exclude": []}, structure)
    switch(screen, theme="dark")
    found += sticking_out(screen)
    switch(screen, "desktop")
    for theme in ("dark", "light"):
        switch(screen, theme=theme)
        found += sticking_out(screen)
        screen.evaluate(SAMPLE)
        found += barriers(screen, {"include": [["[data-sample]"]]}, {"runOnly": OF_COLOUR})
    assert found + screen.wrong == []


def test_wide_tables_scroll_in_their_own_box(screen, address):
    switch(screen, "desktop")
    screen.goto(f"{address}/notebooks/verdicts.html", wait_until="load")
    boxes = screen.locator("div.claims")
    assert boxes.count() == len(notebooks.studies())
    for summary in screen.locator("details:has(div.claims) > summary").all():
        summary.click()
    kinds = boxes.evaluate_all("all => all.map(box => getComputedStyle(box).overflowX)")
    assert set(kinds) == {"auto"}
    for width in ("desktop", "phone"):
        switch(screen, width)
        inside = boxes.evaluate_all(
            "all => all.every(box => box.getBoundingClientRect().right <= window.innerWidth)"
        )
        assert inside
    assert {box.get_attribute("tabindex") for box in boxes.all()} == {"0"}  # for the keyboard
    one = boxes.first
    assert "has-more" in one.get_attribute("class")  # it fades where there is more
    one.evaluate("box => { box.scrollLeft = box.scrollWidth }")
    screen.wait_for_function("box => !box.classList.contains('has-more')", arg=one.element_handle())


@pytest.mark.parametrize("width", ["desktop", "phone"])
def test_verdicts_are_judged_anew_and_nothing_sticks_out(screen, address, width):
    """Here the script has the theme; test_live.py holds what it says against kdutils."""
    screen.wrong.clear()
    switch(screen, width)
    screen.goto(f"{address}/notebooks/verdicts.html?margin=2&out=vid.3", wait_until="load")
    if screen.locator("section.live form:visible").count() == 0:
        screen.get_by_text("Judge otherwise").click()
    screen.get_by_role("combobox", name="Confidence").select_option("99 %")
    said = "Judged at 99 %, at twice the margins, without 1 seed."
    assert screen.locator("section.live").get_by_role("status").inner_text().startswith(said)
    for summary in screen.locator("details:has(div.claims) > summary").all():
        summary.click()
    assert sticking_out(screen) == []
    drawn = screen.locator("figure svg.live")
    assert drawn.count() == 1 + len(notebooks.studies())
    for box in [drawing.bounding_box() for drawing in drawn.all()]:
        assert box["x"] >= 0
        assert 300 < box["width"] <= WIDTHS[width] - box["x"]
    assert screen.locator("article img:visible").count() == 0
    assert screen.wrong == []


def test_a_number_leads_to_its_claim_and_from_there_to_its_runs(screen, address):
    """From a study's page, on a phone: nothing sticks out, and each step has what it promises."""
    screen.wrong.clear()
    switch(screen, "phone")
    rows = {row["id"]: row for row in claims.of_notebooks()}
    row = next(row for row in rows.values() if row["verdict"] and row["study"] != "concierge")
    screen.goto(f"{address}/notebooks/{notebooks.find(row['study']).stem}.html")
    text = claims.said_with_interval(row)
    screen.locator("article a.claim", has_text=text).first.click()
    screen.wait_for_url(f"**/book/record.html?of={row['id']}")
    place = screen.locator("#opened")
    place.locator("table").first.wait_for()
    assert screen.locator("article h1").inner_text().startswith(row["id"])
    assert text in place.inner_text()
    assert sticking_out(screen) == []
    run = place.locator("table[aria-label='Values by seed'] a").first
    name = run.inner_text()
    run.click()
    screen.wait_for_url(f"**of={row['study']}/{name}")
    place.get_by_role("combobox", name="Measure").wait_for()
    key = name.rpartition("-")[2]
    assert f"python -m kdutils verify {row['study']} --key {key}" in place.inner_text()
    assert place.get_by_role("img").get_attribute("aria-label").startswith("test accuracy from")
    place.get_by_role("combobox", name="Measure").select_option("loss")
    assert place.get_by_role("img").get_attribute("aria-label").startswith("loss from epoch 1")
    screen.evaluate(Axe().axe_script)
    assert sticking_out(screen) + barriers(screen, {"exclude": []}, {}) == []
    switch(screen, "desktop")
    screen.goto(f"{address}/book/record.html?of=vid-99")
    assert text in place.locator("table[aria-label='All claims']").inner_text()
    place.locator("input").fill(f"{name} {row['id']}")
    assert place.get_by_role("status").inner_text().startswith("1 of ")
    lines, more = (
        place.locator("table[aria-label='All runs'] tbody tr:visible"),
        place.locator("button"),
    )
    assert (lines.count(), more.is_visible()) == (1, False)
    place.locator("input").fill("")
    assert (lines.count(), more.is_visible()) == (20, True)
    more.click()
    published = sum(len(records.published(study)) for study in notebooks.studies())
    assert (lines.count(), more.is_visible()) == (published, False)
    assert "no claim and no published run named vid-99" in place.inner_text()
    assert screen.wrong == []


def test_figures_of_the_study_have_captions(pages):
    cells = json.loads((PROJECT / f"{STUDY}.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    pictures = [o for o in outputs if any(k.startswith("image/") for k in o.get("data", {}))]
    page = pages[STUDY]
    assert len([text for text in page.captions if text.strip()]) == len(pictures)
    assert len([image for image in page.images if "_images" in image["src"]]) == len(pictures)


def test_search_finds_what_a_reader_looks_for(screen, address):
    screen.wrong.clear()
    switch(screen, "desktop")
    screen.goto(f"{address}/search.html?q=temperature", wait_until="load")
    screen.wait_for_selector("#search-results li a")
    found = screen.locator("#search-results li a").evaluate_all("all => all.map(a => a.pathname)")
    assert any(f"/{STUDY}.html" in path for path in found)
    assert screen.wrong == []


def test_theme_is_switched_by_its_button_and_remembered(screen, address):
    switch(screen, "desktop")
    screen.goto(f"{address}/book/references.html", wait_until="load")
    switch(screen, theme="light")
    seen = set()
    for _ in range(3):  # the system's, light, dark
        screen.locator("button.theme-switch-button:visible").first.click()
        mode, theme = screen.evaluate(
            "() => [document.documentElement.dataset.mode, document.documentElement.dataset.theme]"
        )
        assert theme == ("light" if mode == "auto" else mode)
        seen.add(mode)
        if mode == "dark":
            screen.reload(wait_until="load")
            assert screen.evaluate("document.documentElement.dataset.theme") == "dark"
    assert seen == {"auto", "light", "dark"}
    screen.evaluate("localStorage.clear()")


def test_print_leaves_the_text_and_drops_the_rest(screen, address):
    """In the dark theme, which must not print pale letters on white paper."""
    switch(screen, "desktop")
    screen.goto(f"{address}/{STUDY}.html", wait_until="load")
    switch(screen, theme="dark")
    screen.emulate_media(media="print")
    try:
        gone = ".bd-sidebar-primary, .bd-sidebar-secondary, .bd-header, .bd-header-article, footer"
        shown = "elements => elements.filter(e => e.checkVisibility()).map(e => e.className)"
        assert screen.locator(gone).count() >= 3
        assert screen.locator(gone).evaluate_all(shown) == []
        assert screen.locator("h1").evaluate_all(shown) != []
        assert screen.locator(".tag_answer div.cell_output").first.is_visible()
        figures = screen.locator("article figure img")
        assert figures.count() == len(figures.evaluate_all(shown)) > 0
        colours = (
            "all => all.map(e => getComputedStyle(e).color.match(/\\d+/g).slice(0, 3).map(Number))"
        )
        ink = screen.locator("article :is(p, h2, a, th, td)").evaluate_all(colours)
        assert all(max(colour) < 128 for colour in ink)
        dimmed = "all => all.filter(image => getComputedStyle(image).filter !== 'none').length"
        assert figures.evaluate_all(dimmed) == 0
        wide = "document.documentElement.scrollWidth <= window.innerWidth"
        switch(screen, "paper")
        assert screen.evaluate(wide)
    finally:
        screen.emulate_media(media="screen")


class Page(HTMLParser):
    """What a page links to and loads, the places in it that can be linked to, and its pictures."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.links, self.loads, self.images, self.captions = [], [], [], []
        self.places, self.says, self.canonical = set(), {}, None
        self.in_caption = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "img":
            self.images.append(given)
        if tag in ("img", "script") and given.get("src"):
            self.loads.append(given["src"])
        if tag == "link" and given.get("rel") == "canonical":
            self.canonical = given["href"]
        elif tag == "link":
            self.loads.append(given["href"])
        if tag == "meta" and (name := given.get("property", given.get("name"))):
            self.says[name] = given.get("content")
        if tag == "figcaption":
            self.in_caption = True
            self.captions.append("")
        self.places |= {given[key] for key in ("id", "name") if given.get(key)}

    def handle_endtag(self, tag):
        if tag == "figcaption":
            self.in_caption = False

    def handle_data(self, text):
        if self.in_caption:
            self.captions[-1] += text


@pytest.fixture(scope="module")
def pages(html) -> dict[str, Page]:
    found = (path for path in html.rglob("*.html") if "_static" not in path.parts)
    return {str(path.relative_to(html).with_suffix("")): Page(path) for path in found}


def target(page: Page, link: str) -> Path:
    """The file that a link inside the book leads to."""
    path = unquote(urlsplit(link).path)
    return (page.path.parent / path).resolve() if path else page.path.resolve()


def test_links_inside_the_book_resolve(pages):
    """What a page loads is here, too: downloads, pictures, scripts."""
    assert len(pages) > len(PAGES)
    places = {page.path.resolve(): page.places for page in pages.values()}
    dead = []
    for name, page in pages.items():
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                dead += [f"{name} loads {link}"] if link in page.loads else []
                continue
            found, place = target(page, link), unquote(parts.fragment)
            if not found.exists() or (place and found in places and place not in places[found]):
                dead.append(f"{name}: {link}")
    assert dead == []


def test_every_picture_says_what_it_shows(pages):
    mute = [
        f"{name}: {image['src']}"
        for name, page in pages.items()
        for image in page.images
        # The logo's name stands beside it.
        if not (image.get("alt") or "").strip() and "_static" not in image["src"]
    ]
    assert mute == []


def test_pages_and_the_book_are_light(html, pages):
    """A page with its pictures, and all that is published; what pages share is read once."""
    heavy = {}
    for name, page in pages.items():
        shown = {target(page, image["src"]) for image in page.images}
        size = page.path.stat().st_size
        size += sum(path.stat().st_size for path in shown if "_static" not in path.parts)
        if size > MEGABYTE:
            heavy[name] = size
    assert heavy == {}
    sizes = {path: path.stat().st_size for path in html.rglob("*") if path.is_file()}
    largest = sorted(sizes, key=sizes.get, reverse=True)[:5]
    assert sum(sizes.values()) < 25 * MEGABYTE, largest


def test_addresses_are_those_of_the_building_repository(html, pages):
    site = "https://someone.github.io/their-copy/"
    for name in PAGES:
        page = pages[name]
        assert page.canonical == page.says["og:url"] == f"{site}{name}.html"
        assert page.says["og:title"]
        assert page.says["description"]
        card = page.says["og:image"]
        assert card.startswith(site)
        assert (html / card.removeprefix(site)).exists()
        assert f"https://github.com/{REPOSITORY}" in page.links
        launch = [link for link in page.links if "mybinder.org/" in link]
        hub = f"https://mybinder.org/v2/gh/{REPOSITORY}/main?urlpath=lab/tree"
        assert launch == ([f"{hub}/{name}.ipynb"] if name in NOTEBOOKS else [])
        launch = [link for link in page.links if "colab.research.google.com/" in link]
        colab = f"https://colab.research.google.com/github/{REPOSITORY}/blob/colab"
        ours = [f"{colab}/{Path(name).name}.ipynb"]
        assert launch == (ours if name in NOTEBOOKS else [])
    written = yaml.safe_load((PROJECT / "_config.yml").read_text(encoding="utf-8"))["repository"]
    texts = [page.path.read_text(encoding="utf-8") for page in pages.values()]
    assert not any(written["url"] in text for text in texts)
    listed = (html / "sitemap.xml").read_text(encoding="utf-8")
    assert listed.count("<loc>") == len(PAGES)
    assert all(f"<loc>{site}{name}.html</loc>" in listed for name in PAGES)


def test_a_page_is_downloaded_whole_and_always_as_the_same_bytes(html, pages, copies, tmp_path):
    for name in NOTEBOOKS:
        stem = Path(name).name
        (link,) = [link for link in pages[name].links if link.endswith(".zip")]
        archive = target(pages[name], link)
        assert archive == (html / "_downloads" / f"{stem}.zip").resolve()
        wanted = {f"{name}.ipynb", f"{name}.md"}
        if stem[0].isdigit():
            sizes = ("smoke", "laptop", "paper")
            wanted |= {f"notebooks/params/{stem.partition('-')[2]}.{size}.yaml" for size in sizes}
        with zipfile.ZipFile(archive) as whole:
            assert set(whole.namelist()) == wanted
            for part in wanted:
                assert whole.read(part) == (html.parent.parent / part).read_bytes()
        again = tmp_path / "again.zip"
        copies.pack(PROJECT / f"{name}.ipynb", again)
        assert again.read_bytes() == archive.read_bytes()
    assert list(html.rglob("*.ipynb")) == []  # nothing is there twice
    others = [pages[name] for name in PAGES if name not in NOTEBOOKS]
    assert not [link for page in others for link in page.links if link.endswith(".zip")]


def test_colab_gets_the_pages_as_they_are_with_a_cell_that_fetches_their_commit(html):
    made = html.parent / "colab"
    assert {path.stem for path in made.iterdir()} == {Path(name).name for name in NOTEBOOKS}
    for name in NOTEBOOKS:
        first, *rest = nbformat.read(made / f"{Path(name).name}.ipynb", as_version=4).cells
        assert rest == nbformat.read(PROJECT / f"{name}.ipynb", as_version=4).cells
        wanted = f'def fetch(repository="https://github.com/{REPOSITORY}", commit="{COMMIT}"):'
        assert first.source.splitlines().count(wanted) == 1


def local(name: str):
    """One of the book's extensions of Sphinx."""
    spec = importlib.util.spec_from_file_location(name, PROJECT / "book" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def published():
    return local("published")


@pytest.fixture
def copies(monkeypatch):
    monkeypatch.syspath_prepend(PROJECT / "book")
    return local("copies")


def test_colab_is_left_out_where_no_commit_or_another_server_is_known(copies, monkeypatch):
    app = types.SimpleNamespace(confdir=str(PROJECT))
    for name in ("GITHUB_SHA", "GITHUB_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GITHUB_REPOSITORY", REPOSITORY)
    assert copies.built_from(app) is None
    monkeypatch.setenv("GITHUB_SHA", COMMIT)
    assert copies.built_from(app) == (REPOSITORY, COMMIT)
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://git.example.org")
    assert copies.built_from(app) is None


@pytest.mark.parametrize("there", [False, True], ids=["elsewhere", "in Colab"])
def test_the_cell_for_colab_fetches_and_installs_only_there(copies, tmp_path, there):
    """With a repository on this disk; what pip is asked for is noted instead of done."""
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@here", "-C", str(tmp_path / "their")]
    subprocess.run(["git", "init", "-q", str(tmp_path / "their")], check=True)
    pins = "# ours\nJinja2==0\nno_such.thing==1.2\n"
    (tmp_path / "their" / "constraints.txt").write_text(pins, encoding="utf-8")
    for words in (["add", "."], ["commit", "-qm", "one"], ["commit", "-qm", "2", "--allow-empty"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.check_output([*git, "rev-parse", "HEAD~"], encoding="utf-8").strip()
    cell = copies.FIRST.read_text(encoding="utf-8").replace("REPOSITORY", f"{tmp_path}/their")
    cell = cell.replace("COMMIT", commit).replace("/content", f"{tmp_path}/content")
    cell = cell.replace("/tmp/lacking", f"{tmp_path}/lacking")
    program = f"""
import os, subprocess, sys
run, before = subprocess.run, os.getcwd()
def noted(words, **how):
    print(words[1:]) if words[0] == sys.executable else run(words, **how)
subprocess.run = noted
sys.modules.update({{"google.colab": sys}} if {there} else {{}})
exec({cell!r})
print(os.getcwd() != before, os.getcwd() in sys.path, os.path.exists("constraints.txt"))
"""
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, encoding="utf-8"
    )
    assert said.returncode == 0, said.stderr
    if not there:
        assert said.stdout == "False False False\n"
        return
    pip, sentence, where = said.stdout.splitlines()
    asked = ["-m", "pip", "install", "-q", "-c", f"{tmp_path}/lacking.txt", "-e", ".[train]"]
    assert pip == str(asked)
    assert (tmp_path / "lacking.txt").read_text(encoding="utf-8") == "no_such.thing==1.2"
    assert sentence.startswith(f"{tmp_path}/their at {commit[:12]} is in {tmp_path}/content/their")
    assert where == "True True True"
    head = subprocess.check_output(
        ["git", "-C", tmp_path / "content" / "their", "rev-parse", "HEAD"], encoding="utf-8"
    )
    assert head.strip() == commit


def test_address_follows_the_remote_and_is_absent_without_one(published, monkeypatch, tmp_path):
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    assert published.repository(tmp_path) is None
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert published.repository(tmp_path) is None
    asked = ["git", "-C", tmp_path, "remote"]
    subprocess.run([*asked, "add", "origin", "/somewhere/else"], check=True)
    assert published.repository(tmp_path) is None
    for url in (
        "git@github.com:a/b.c.git",
        "https://github.com/a/b.c",
        "ssh://git@github.com/a/b.c/",
    ):
        subprocess.run([*asked, "set-url", "origin", url], check=True)
        assert published.repository(tmp_path) == "a/b.c"
    settings = yaml.safe_load((PROJECT / "_config.yml").read_text(encoding="utf-8"))["sphinx"]
    assert not {key for key in settings["config"] if key.startswith(("ogp_", "sitemap_"))}
    assert published.address("Some/Thing") == "https://some.github.io/Thing/"
    assert published.address("Some/some.github.io") == "https://some.github.io/"
