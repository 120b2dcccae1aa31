"""Every number opens its record: what a claim's and a run's page are made of, and the links."""

import importlib.util
import json
from pathlib import Path

import pytest

from kdutils import claims, notebooks, records

PROJECT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def opened():
    spec = importlib.util.spec_from_file_location("opened", PROJECT / "book" / "opened.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows():
    return {row["id"]: row for row in claims.of_notebooks()}


def test_names_and_numbers_lead_to_their_claim_and_code_does_not(opened):
    known = {"vid-1": "vid-1", "vid-10": "vid-10", "+2.0 points (1.4 to 2.7)": "vid-1"}
    body = (
        "<h2>On vid-1</h2><p>It gains +2.0 points (1.4 to 2.7), see vid-10. Not vid-100, "
        'vid-1.json, my-vid-1 or −vid-1: <code>vid-1</code> <a href="x">vid-1</a></p>'
        "<td>vid-1<br>no</td>"
    )
    found = opened.linked(body, "../book/record.html", known)
    assert found.count('<a class="claim"') == 3
    for text, name in (("+2.0 points (1.4 to 2.7)", "vid-1"), ("vid-10", "vid-10")):
        assert f'<a class="claim" href="../book/record.html?of={name}">{text}</a>' in found
    assert "<td><a class" in found
    assert opened.linked(body, "x", {}) == body


def test_a_number_that_two_claims_share_leads_nowhere(opened, rows):
    known = opened.texts()
    assert rows.keys() <= known.keys()
    for text, name in known.items():
        numbers = {r["id"]: claims.said_with_interval(r) for r in rows.values()}
        told = [name for name, said in numbers.items() if text in (said, said.lstrip("+"))]
        assert text == name or told == [name]


def test_a_claim_shows_each_value_and_the_runs_that_it_was_taken_from(opened, rows):
    names = {}
    for study in notebooks.studies():
        names |= {c["key"]: f"{study}/{c['run']}-{c['key']}" for c in records.published(study)}
    seen, register = 0, (PROJECT / "data" / "errata.csv").read_text(encoding="utf-8")
    put_right = {line.partition(",")[0] for line in register.splitlines()[1:]}
    for row in rows.values():
        shown = opened.of_claim(row, names)
        per_part = len(shown["values"]) / max(1, len(row["parts"]))
        assert shown["verdict"] is None or per_part == row["seeds"]
        assert {s for s in shown["rule"]} >= {"bound", "margin"}
        assert bool(shown["errata"]) == (row["id"] in put_right)
        for _, _, _, sources in shown["values"]:
            for run, _path, _value in sources:
                assert (PROJECT / "data" / "records" / f"{run}.json").exists()
                seen += 1
    assert seen > 400


def test_a_run_keeps_what_a_reader_asks_for_and_stays_small(opened):
    made = {}
    for content in records.published("geometry"):
        shown = opened.of_run(content, ["geometry-1"], made)
        assert shown["arguments"] == content["arguments"]
        assert shown["made"] == content["made"]
        history = content["results"].get("history", [])
        assert len(json.dumps(shown)) < 10_000 + 40 * len(history)
        for name, column in shown["history"].items():
            given = [row.get(name) for row in history]
            for here, there in zip(column, given, strict=True):  # None where it was not measured
                number = isinstance(there, float)
                assert here == (pytest.approx(there, rel=1e-5) if number else there)


def test_teachers_are_found_by_their_weights(opened):
    contents = {f"vid/{c['run']}-{c['key']}": c for c in records.published("vid")}
    made = {d: name for name, c in contents.items() for d in c["weights"].values()}
    for content in contents.values():
        shown = opened.of_run(content, [], made)
        taught = content["results"].get("teacher_weights")
        assert shown["taught"] == ({taught: made[taught]} if taught in made else {})


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.123456789, 0.123457),
        (float("nan"), "nan"),
        ([[1.0] * 100] * 2, "200 values: see the record"),
        ("7 " * 150, "300 characters: see the record"),
        ({"a": [1, None, True, "x"]}, {"a": [1, None, True, "x"]}),
    ],
)
def test_values_are_shortened(opened, value, shown):
    assert opened.short(value) == shown


def test_histories_with_holes_keep_their_epochs(opened):
    rows = [{"epoch": 1, "a": 1.0}, {"epoch": 2, "b": 2.0}]
    assert opened.columns(rows) == {"epoch": [1, 2], "a": [1.0, None], "b": [None, 2.0]}
