"""What pages share: the answer's length, counts by word, the setting, provenance."""

import re

import nbformat
import pytest
from tiny import tiny_study

from kdutils import notebooks, pages


def row(word, **more):
    return (
        {"id": "a-1", "verdict": word, "mean": 0.011, "low": 0.001, "high": 0.021}
        | {
            "unit": "points",
            "found": 8,
            "seeds": 8,
            "part": "",
        }
        | more
    )


def test_an_answer_is_its_finding_and_a_list_without_empty_points():
    assert pages.answer("A.").data == "A."
    assert pages.answer("A.", "B.", "", "C.").data == "A.\n\n- B.\n- C."
    assert pages.answer("", "B.").data == "- B."


def test_tally_counts_words_the_strongest_first():
    rows = [row("no effect"), row("replicated"), row(None), row("replicated"), row("reversed")]
    said = "Of 5 claims: 2 replicated, 1 with no effect, 1 reversed and 1 not judged yet."
    assert pages.tally(rows) == said
    assert pages.tally([row("inconclusive")]) == "Of 1 claims: 1 inconclusive."


def test_a_claim_is_said_with_its_word_its_interval_and_its_weakest_part():
    assert pages.holds(row("replicated")) == "*replicated*, +1.1 points (0.1 to 2.1)"
    assert pages.holds(row(None, mean=None, found=3)) == "*no verdict*, 3 of 8 seeds"
    text = pages.say([row("inconclusive", part="late")], {"a-1": "Better"}).data
    said = "- **inconclusive**, +1.1 points (0.1 to 2.1): Better (a-1); decided by *late*."
    assert text == said


def test_the_setting_escapes_what_would_be_html():
    shown = pages.settings({"rate": ("<b>", "0.1", "a & b")}).data
    assert "&lt;b&gt;" in shown
    assert "a &amp; b" in shown


def test_source_shows_a_function_as_it_was_written():
    assert pages.source(pages.tally).data.startswith("def tally(rows")
    named = pages.source("pages.tally", "losses.VID._link").data
    assert named.startswith(pages.source(pages.tally).data + "\n\n\ndef _link(self,")


def test_provenance_counts_runs_commits_and_the_register(tmp_path, monkeypatch):
    monkeypatch.setenv("KDUTILS_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("KDUTILS_RECORDS", str(tmp_path / "records"))
    study, trained = tiny_study()
    assert "No run" in pages.provenance(study).data
    study.map(trained, [{"seed": 0}])
    text = pages.provenance(study).data
    assert re.search(r"\*\*Runs\*\* 1, 0\.0 hours", text)
    assert "1 of 1 runs began under today" in text
    assert f"train {study.name} --scale {study.scale}" in text


def test_every_study_has_an_answer():
    for path in notebooks.studies().values():
        (said,) = [put["text/markdown"] for put in notebooks.outputs(path, "answer")]
        assert re.match(r"\*\*[^*]+\?\*\* \S.{20}", said), "a question, its answer"
        assert 1 + said.count("\n- ") <= 8, "a reader has a minute"


def test_caveats_name_scales_and_what_survives_the_correction():
    rows = [
        row("replicated", scale="paper", study="a", holm=True),
        row("replicated, smaller", scale="laptop", study="b", holm=False),
        row("replicated", scale="laptop", study="geometry", holm=None),
        row(None, scale=None, study="c", holm=None),
        row(None, scale="paper", study="d", holm=None),
        row(None, scale=None, study="a", holm=None),
    ]
    assert pages.caveats(rows) == (
        "Judged at the paper's scale: study a (1 of 2 claims); on smaller stand-ins: study 5, b; "
        "not yet: study c, d. 1 of the 2 replicated with a p-value survive a correction for many "
        "claims."
    )


@pytest.mark.parametrize(
    "path", sorted(notebooks.FOLDER.glob("*.ipynb")), ids=lambda path: path.stem
)
def test_nothing_that_a_page_shows_is_a_warning(path):
    """A library's, for one: it is stored with a cell's outputs, and readers would see it."""
    cells = nbformat.read(path, as_version=4).cells
    every = [output for cell in cells for output in cell.get("outputs", [])]
    assert [o.text for o in every if o.output_type == "stream" and o.name == "stderr"] == []


@pytest.mark.parametrize(
    "path", sorted(notebooks.FOLDER.glob("*.ipynb")), ids=lambda path: path.stem
)
def test_every_figure_that_a_page_promises_is_there(path):
    """Where a page says that runs have no record yet, nothing can be promised."""
    cells = nbformat.read(path, as_version=4).cells
    if not any("runs have no record yet" in str(cell.get("outputs")) for cell in cells):
        promised = [cell for cell in cells if "figure" in cell.metadata.get("mystnb", {})]
        put = {
            cell.id: [kind for o in cell.outputs for kind in o.get("data", {})] for cell in promised
        }
        bare = [cell for cell in promised if not any("image/" in kind for kind in put[cell.id])]
        assert [cell.metadata.mystnb.figure.get("name") for cell in bare] == []
