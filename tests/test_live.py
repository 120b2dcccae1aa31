"""The page of verdicts as its reader sets it: JavaScript must say what Python says.

The page is made of the stored notebook's outputs, without the book's theme, and is opened from its
folder as a reader without a network would; tests/test_book.py looks at the built one.
"""

import json
import os
import random
import re
import shutil
from dataclasses import replace
from html import escape
from pathlib import Path

import nbformat
import pytest
from scipy import stats

from kdutils import claims, notebooks, pages, verdicts
from kdutils.verdicts import Rule

PROJECT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def stored() -> list[dict]:
    return claims.of_notebooks()


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """The page's address in a folder; its figures have no pixels."""
    folder = tmp_path_factory.mktemp("live")
    for name in ("_static", "notebooks"):
        (folder / name).mkdir()
    shutil.copy(PROJECT / "book" / "_static" / "verdicts.js", folder / "_static")
    parts = []
    for cell in nbformat.read(PROJECT / "notebooks" / "verdicts.ipynb", as_version=4).cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                about = cell.metadata.mystnb
                image = f'<img alt="{escape(about.image.alt)}">'
                caption = f'<span class="caption-text">{about.figure.caption}</span>'
                parts.append(f'<figure id="{about.figure.name}">{image}{caption}</figure>')
            else:
                parts.append(output.get("data", {}).get("text/html", ""))
    text = f'<!doctype html><meta charset="utf-8"><main>{"".join(parts)}</main>'
    (folder / "notebooks" / "verdicts.html").write_text(text, encoding="utf-8")
    return (folder / "notebooks" / "verdicts.html").as_uri()


@pytest.fixture(scope="module")
def opened(browser, address):
    """A page that notes what goes wrong on it and what it asks for."""
    page = browser.new_page()
    page.wrong, page.asked = [], []
    page.on("console", lambda message: page.wrong.append(message.text))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(address)
    yield page
    page.close()


@pytest.fixture
def page(opened, address):
    """The page as registered."""
    if opened.url != address:
        opened.goto(address)
    return opened


# ------------------------------------------------------------------------------- as Python


def by_epoch(study: str, part: dict, epoch: str) -> dict:
    """A part's values by another epoch than the last one, from the records themselves."""
    paths = {path for sources in part.get("from", {}).values() for _, path, _ in sources}
    plain = all(p.startswith("history/") and p.endswith("/test_accuracy") for p in paths)
    if epoch == "last" or not paths or not plain or part["how"] != "difference":
        return part["values"]

    def history(key):
        (path,) = (PROJECT / "data" / "records" / study).glob(f"*-{key}.json")
        return json.loads(path.read_text(encoding="utf-8"))["results"]["history"]

    keys = {key for sources in part["from"].values() for key, *_ in sources}
    if any("test_accuracy" not in row for key in keys for row in history(key)):
        return part["values"]  # measured at the end alone

    def accuracy(key):
        rows = history(key)
        by = "test_accuracy" if epoch == "best" else "validation_accuracy"
        return max(rows, key=lambda row: row[by])["test_accuracy"]  # the first of equals

    pairs = {seed: [accuracy(key) for key, *_ in of] for seed, of in part["from"].items()}
    return {seed: one - other for seed, (one, other) in pairs.items()}


def again(monkeypatch, stored, level=95, correction="study", margin=1, out=(), epoch="last"):
    """The stored claims as kdutils judges them at a reader's settings."""
    known, drawn = claims.registered(), claims._margins
    rows = []
    for row in stored:
        claim, parts = known[row["id"]], {}
        complete = all(len(part["values"]) == claim.seeds for part in row["parts"].values())
        for part, kept in row["parts"].items():
            taken = by_epoch(row["study"], kept, epoch)
            left = {s: x for s, x in taken.items() if f"{claim.study}.{s}" not in out}
            parts[part] = {"values": left, "from": {}}
        seeds = len(left) if complete else claim.seeds
        rules = {part: replace(r, margin=r.margin * margin) for part, r in claim.rules.items()}
        known[row["id"]] = replace(claim, rules=rules, seeds=seeds)
        rows.append({"id": row["id"], "scale": None, "parts": parts})

    def margins(rule, found):  # drawn in the registered ones
        return drawn(replace(rule, margin=rule.margin / margin), found) if margin else None

    with monkeypatch.context() as patch:
        patch.setattr(claims, "registered", lambda: known)
        patch.setattr(claims, "_margins", margins)
        for function in (verdicts.judge, verdicts.seeds_needed):
            patch.setattr(function, "__defaults__", (level / 100,))
        patch.setattr(verdicts.holm, "__defaults__", ((100 - level) / 100,))
        found = claims.judged(rows)
    if correction != "study":
        ps = {row["id"]: row["p"] for row in found if row["p"] is not None}
        passed = verdicts.holm(ps, (100 - level) / 100) if correction == "all" else {}
        found = [row | {"holm": passed.get(row["id"])} for row in found]
    registered = {row["id"]: row["seeds"] for row in stored}
    return [row | {"seeds": registered[row["id"]]} for row in found]


JUDGED = """set => {
    const {units, rows} = JSON.parse(document.getElementById("claims").textContent);
    return verdicts.judged(rows, {...verdicts.REGISTERED, ...set}).map(row =>
        ({...row, said: verdicts.saidWithInterval(row, units)}));
}"""


def near(value, rel=1e-9):
    return None if value is None else pytest.approx(value, rel=rel, abs=1e-12)


def compare(mine: list[dict], theirs: list[dict]):
    assert [row["id"] for row in theirs] == [row["id"] for row in mine]
    for ours, js in zip(mine, theirs, strict=True):
        for key in ("verdict", "part", "found", "holm", "needed"):
            assert js[key] == ours[key], (ours["id"], key)
        assert js["excluded"] == ours["effect_excluded"], ours["id"]
        assert js["said"] == claims.said_with_interval(ours)
        for key in ("mean", "low", "high", "p", "paper"):
            assert js[key] == near(ours[key]), (ours["id"], key)
        if ours["margins"]:
            kept = {key: js["margins"][key] for key in ours["margins"]}
            assert kept == {key: near(value) for key, value in ours["margins"].items()}


def test_claims_as_registered(page, stored):
    found = page.evaluate(JUDGED, {})
    compare(stored, found)
    assert len({row["verdict"] for row in found}) > 4


@pytest.mark.parametrize(
    "set",
    [
        {"level": 90},
        {"level": 99},
        {"margin": 0},
        {"margin": 0.5},
        {"margin": 2},
        {"correction": "none"},
        {"correction": "all"},
        {"epoch": "best"},
        {"epoch": "chosen", "out": ["vid.3"]},
        {"level": 90, "margin": 0.5, "correction": "all"},
        {"level": 99, "margin": 2, "correction": "all"},
        {"out": ["vid.3"]},
        {"out": ["geometry.0", "binary.1", "vid.0", "vid.9"], "level": 90, "margin": 2},
        {"out": ["concierge.0", "concierge.2"]},  # one is left: no verdict
    ],
    ids=str,
)
def test_claims_as_a_reader_sets_them(page, stored, monkeypatch, set):
    compare(again(monkeypatch, stored, **set), page.evaluate(JUDGED, set))


def test_students_t(page):
    """From the middle to the far tail, for few and for very many seeds."""
    cases = [(t, df) for df in (1, 2, 3, 7, 30, 200, 8827, 60000) for t in (0, 1e-6, 0.3, 2, 9, 80)]
    found = page.evaluate("all => all.map(([t, df]) => verdicts.tails(t, df))", cases)
    for (t, df), p in zip(cases, found, strict=True):
        wanted = 2 * stats.t.sf(t, df)
        assert p == pytest.approx(wanted, rel=1e-9 if wanted > 1e-100 else 1e-6, abs=0), (t, df)
    cases = [(level, df) for level in (0.9, 0.95, 0.99) for df in (*range(1, 40), 500, 10_000)]
    found = page.evaluate("all => all.map(([level, df]) => verdicts.quantile(level, df))", cases)
    wanted = [stats.t.ppf((1 + level) / 2, df) for level, df in cases]
    assert found == pytest.approx(wanted, rel=1e-11)


def test_rules_and_values_drawn_at_random(page):
    """Every kind, points and ratios; values near the bound, some of them equal."""
    drawn, cases, wanted = random.Random(7), [], []
    for number in range(420):
        kind, n = verdicts.KINDS[number % 7], drawn.choice([1, 2, 3, 5, 8, 12])
        rule = Rule(
            kind,
            1.0,
            margin=drawn.choice([0.1, 0.2, 0.4]),
            effect=drawn.choice([None, 0.05, 0.3, -0.1]),
            upper=1.5 if kind == "within" else None,
            ratio=number % 2 == 0,
        )
        centre, spread = drawn.choice([0.7, 1, 1.2]), drawn.choice([0, 0.01, 0.1])
        values = [max(0.05, drawn.gauss(centre, spread)) for _ in range(n)]
        confidence = drawn.choice([0.9, 0.95, 0.99])
        cases.append((vars(rule), values, confidence))
        one = verdicts.judge(rule, values, confidence)
        wanted.append((one, verdicts.seeds_needed(rule, values, confidence)))
    script = """all => all.map(([rule, values, confidence]) => [
        verdicts.judge(rule, values, confidence),
        verdicts.seedsNeeded(rule, values, confidence)])"""
    words = set()
    for case, (js, needed), (one, wanted_seeds) in zip(
        cases, page.evaluate(script, cases), wanted, strict=True
    ):
        assert (js["word"], js["n"], js["excluded"]) == (one.word, one.n, one.effect_excluded), case
        for key in ("mean", "low", "high", "p", "lead"):
            assert js[key] == near(getattr(one, key)), (case, key)
        assert needed == wanted_seeds, case
        words.add(one.word)
    assert words == {None, *verdicts.WORDS}


def test_parts_holm_and_sums_drawn_at_random(page):
    drawn, parts, ps, sums = random.Random(8), [], [], []
    for _ in range(200):
        words = drawn.choice([verdicts.WORDS, (*verdicts.WORDS, None)])
        each = {
            name: {
                "word": drawn.choice(words),
                "n": drawn.randint(0, 4),
                "p": drawn.choice([drawn.random(), None] if drawn.random() < 0.3 else [0.01, 0.4]),
                "lead": drawn.choice([0.1, 0.2, drawn.gauss(0, 1)]),
            }
            for name in "abcd"[: drawn.randint(1, 4)]
        }
        parts.append((each, drawn.choice([None, *range(1, len(each) + 1)])))
        ps.append({f"c-{k}": drawn.choice([0.01, 0.012, 1e-4]) for k in range(drawn.randint(1, 6))})
        size = 10.0 ** drawn.randint(-9, 9)
        sums.append([drawn.choice([0.1, drawn.gauss(size, 1)]) for _ in range(drawn.randint(2, 9))])
    sums += [[0.1] * 3, [0.7] * 7, [1e16, 1.0, -1e16], [-0.0, 0.0]]
    script = """([parts, ps, sums]) => [parts.map(([each, need]) => verdicts.weakest(each, need)),
        ps.map(one => verdicts.holm(one, 0.05)),
        sums.map(x => [verdicts.mean(x), verdicts.stdev(x)])]"""
    weakest, holm, moments = page.evaluate(script, [parts, ps, sums])
    for (each, need), js in zip(parts, weakest, strict=True):
        whole = verdicts.weakest({k: verdicts.Verdict(**one) for k, one in each.items()}, need)
        assert js == {key: getattr(whole, key) for key in ("word", "n", "p", "lead", "part")}
    assert holm == [verdicts.holm(one) for one in ps]
    for x, (mean, stdev) in zip(sums, moments, strict=True):
        assert mean == verdicts.mean(x)
        assert stdev == pytest.approx(verdicts.stdev(x), rel=4e-16, abs=0)


def test_numbers_are_written_as_python_writes_them(page):
    drawn = random.Random(9)
    cases = [(x, d) for x in (0.25, 0.35, 2.5, 1.25, -0.01, -0.0, 0.125, 1e-20) for d in (0, 1, 2)]
    cases += [(drawn.gauss(0, 10), drawn.choice([0, 1, 2, 3, 4])) for _ in range(300)]
    found = page.evaluate("all => all.map(([x, digits]) => verdicts.fixed(x, digits))", cases)
    assert found == [f"{x:z.{digits}f}".replace("-", "−") for x, digits in cases]


# ------------------------------------------------------------------------------- the page


def tables(page) -> list[str]:
    return page.locator("div.claims").evaluate_all("all => all.map(one => one.innerHTML)")


def control(page, name: str):
    return page.get_by_role("combobox", name=name, exact=True)


def status(page) -> str:
    return page.get_by_role("status").inner_text()


def test_as_registered_the_page_says_what_stands_there_without_scripts(page, stored, browser):
    still = browser.new_context(java_script_enabled=False).new_page()
    still.goto(page.url)
    assert still.locator("svg, select").count() == 0
    assert still.locator("figure img:visible").count() == 6
    # The book links a claim's name when it is built (book/opened.py), the script itself.
    unlinked = [re.sub('<a class="claim"[^>]*>(.*?)</a>', r"\1", one) for one in tables(page)]
    assert unlinked == tables(still)
    still.context.close()
    assert status(page) == "As registered."
    assert page.locator("figure svg").count() == 1 + len(notebooks.studies())
    words = page.locator("figure svg .word").evaluate_all("all => all.map(e => e.textContent)")
    assert words == [row["verdict"] or "no verdict" for row in stored]


def test_every_control_moves_words_tally_and_pictures_and_one_click_goes_back(
    page, stored, monkeypatch, address
):
    before = tables(page), status(page)
    pictures = page.locator("figure svg")
    drawn = pictures.evaluate_all("all => all.map(e => e.outerHTML)")
    control(page, "Confidence").select_option("99 %")
    control(page, "Holm’s correction").select_option("over all")
    control(page, "Margin").select_option("× 2")
    control(page, "Epoch").select_option("best on test")
    page.locator("input[value='vid.3']").uncheck()
    mine = again(monkeypatch, stored, 99, "all", 2, ["vid.3"], "best")
    differ = [a["id"] for a, b in zip(mine, stored, strict=True) if a["verdict"] != b["verdict"]]
    assert differ
    correction = pages.caveats(mine).partition(". ")[2].replace("for many", "for all")
    assert status(page) == (
        "Judged at 99 %, at twice the margins, by best epochs on test, without 1 seed. "
        f"{pages.tally(mine)} {correction} {len(differ)} words differ from the registered."
    )
    page.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    lines = page.locator("div.claims tbody tr").evaluate_all(
        "all => all.map(line => [...line.cells].map(cell => cell.innerText.split('\\n')))"
    )
    for row, (name, _, _, ours, seeds, holm) in zip(mine, lines, strict=True):
        assert name[:2] == [row["id"], row["verdict"] or "no verdict"]
        assert (len(name) == 3) == (row["id"] in differ)
        assert row["mean"] is None or ours[0] == claims.said_with_interval(row)
        assert seeds[0] == f"{row['found']} of {row['seeds']}"
        assert holm == [{True: "yes", False: "no", None: "–"}[row["holm"]]]
    assert "ours (99 %)" in page.locator("div.claims thead").first.inner_text()
    assert "99 % intervals" in page.locator("#fig-verdicts-vid .caption-text").inner_text()
    assert page.locator("svg .word .was").count() == len(differ)
    now = pictures.evaluate_all("all => all.map(e => e.outerHTML)")
    moved = [study for study in notebooks.studies() if any(d.startswith(study) for d in differ)]
    assert sum(a != b for a, b in zip(drawn, now, strict=True)) > len(moved)
    page.get_by_role("button", name="Back to as registered").click()
    assert (tables(page), status(page)) == before
    assert pictures.evaluate_all("all => all.map(e => e.outerHTML)") == drawn
    assert page.url == address


def test_filters_show_what_they_name(page, stored):
    control(page, "Verdict").select_option("reversed")
    wanted = [row["id"] for row in stored if row["verdict"] == "reversed"]
    visible = "all => all.filter(e => !e.hidden).map(e => e.cells[0].firstChild.textContent)"
    lines = page.locator("div.claims tbody tr")
    assert lines.evaluate_all(visible) == wanted
    assert page.locator("figure svg .word").count() >= len(wanted)
    assert status(page).endswith(f"Shown: {len(wanted)}.")
    study = wanted[0].partition("-")[0]
    control(page, "Study").select_option(study)
    assert lines.evaluate_all(visible) == [name for name in wanted if name.startswith(study)]
    assert (
        page.get_by_text("None of this study’s claims is shown.").locator("visible=true").count()
        == 4
    )
    control(page, "Verdict").select_option("not as registered")
    assert lines.evaluate_all(visible) == []


def test_the_address_keeps_all_that_is_set(page, address):
    control(page, "Confidence").select_option("90 %")
    control(page, "Margin").select_option("0")
    control(page, "Verdict").select_option("inconclusive")
    page.locator("input[value='vid.3']").uncheck()
    page.locator("input[value='geometry.1']").uncheck()
    kept = "level=90&margin=0&word=inconclusive&out=vid.3&out=geometry.1"
    assert page.url == f"{address}?{kept}"
    before = tables(page), status(page)
    page.reload()
    assert (tables(page), status(page)) == before
    assert control(page, "Margin").input_value() == "0"
    assert not page.locator("input[value='vid.3']").is_checked()
    page.goto(f"{address}?level=80&correction=x&margin=&study=y&out=vid.99&word=%3Cb%3E")
    assert status(page).startswith("As registered.")


def test_a_keyboard_is_enough(page):
    before = status(page)
    control(page, "Confidence").focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_url("**level=90*")  # the browser says its new address a moment later
    page.keyboard.press("Tab")
    page.keyboard.press("End")
    page.wait_for_url("**correction=all*")
    page.locator("input[value='vid.3']").focus()
    page.keyboard.press("Space")
    page.wait_for_url("**out=vid.3*")
    page.get_by_role("button", name="Back to as registered").focus()
    page.keyboard.press("Enter")
    assert status(page) == before
    names = "all => all.map(e => e.labels.length)"
    assert set(page.locator("select, input").evaluate_all(names)) == {1}


def test_nothing_goes_wrong_and_nothing_is_asked_of_a_server(opened, address):
    """Runs last: what the page did in all tests before."""
    folder = address.rpartition("/notebooks/")[0]
    assert opened.wrong == []
    assert opened.asked
    assert all(url.startswith(folder) for url in opened.asked)
    parts = ["_static/verdicts.js", "notebooks/verdicts.html"]
    size = sum(os.path.getsize(f"{folder.removeprefix('file://')}/{part}") for part in parts)
    assert size < 300_000
    assert json.loads(opened.locator("#claims").text_content())["rows"]
