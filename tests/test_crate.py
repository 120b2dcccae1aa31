"""The crate: what ran, as linked data; and what Zenodo and CodeMeta read."""

import csv
import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from kdutils import claims, records

ROOT = records.PROJECT
TOOLS = ROOT / "tools"
STUDY = "a"
DATA = {"digits": {"train": "1" * 64, "test": "2" * 64}}


def tool(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def writer():
    pytest.importorskip("rocrate", reason="the extra `crate` is not installed")
    return tool("write_crate")


@pytest.fixture(scope="module")
def reader():
    return tool("read_crate")


@pytest.fixture(autouse=True)
def own_register(monkeypatch):
    """The writer points kdutils to the register of the project it describes."""
    monkeypatch.setattr(claims, "REGISTER", claims.REGISTER)


@pytest.fixture(scope="module")
def whole(writer, tmp_path_factory):
    """The project's own crate: its entities by id, and the file."""
    path = tmp_path_factory.mktemp("whole") / "ro-crate-metadata.json"
    crate = writer.write(ROOT, path)
    return {entity["@id"]: entity for entity in crate["@graph"]}, path


def many(value):
    return value if isinstance(value, list) else [] if value is None else [value]


def ids(entity, key):
    return {one["@id"] for one in many(entity.get(key))}


def of_type(entities, kind):
    return {at: entity for at, entity in entities.items() if entity["@type"] == kind}


# ------------------------------------------------------------------------- a made-up project


def record(root, run, folder=STUDY, weights=None, made=None, **more):
    """A made-up run's record; its path."""
    arguments = more.pop("arguments", {"seed": 0})
    key = hashlib.sha256(json.dumps([run, arguments]).encode()).hexdigest()[:12]
    content = {"study": STUDY, "run": run, "version": 1, "key": key, "scale": "paper"}
    content |= {"arguments": arguments, "status": "done", "results": {}, "weights": weights or {}}
    content |= more
    content["made"] = {"begun": "2026-11-21T18:02:26+00:00", "seconds": 1.5, "threads": 1}
    content["made"] |= {"device": "cpu", "precision": "bf16-mixed", "processor": "A CPU (R)"}
    content["made"] |= {"python": "3.11.7", "versions": {"torch": "2.13.0+cpu"}}
    content["made"] |= {"source": "5" * 64, "commit": "c" * 40, "data": DATA} | (made or {})
    path = root / "data" / "records" / folder / f"{run}-{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def key_of(path):
    return path.stem.partition("-")[2]


@pytest.fixture
def project(tmp_path):
    """A handful of records, two claims, one of them with runs."""
    root = tmp_path / "project"
    record(root, "teacher", weights={"end.safetensors": "9" * 64}, arguments={"seed": 7})
    found = {"how": "difference", "values": {}, "from": {}}
    for seed in range(2):
        one = record(root, "plain", arguments={"seed": seed, "lr": 0.1, "note": ""})
        arguments = {"seed": seed, "terms": {"x": [1, 2]}}
        other = record(root, "taught", arguments=arguments, results={"taught_by": "9" * 64})
        found["values"][str(seed)] = 0.1 + seed / 100
        found["from"][str(seed)] = [[key_of(other), "n", 0.2], [key_of(one), "n", 0.1]]
    record(root, "plain", "a/first-edition", arguments={"seed": 0, "lr": 0.1, "note": ""})
    diverged = {"error": "the loss is not finite", "epoch": 1}
    record(root, "plain", arguments={"seed": 3}, status="failed", results=diverged)
    row = dict.fromkeys(claims.COLUMNS, "") | {"study": STUDY, "kind": "above", "bound": "0"}
    row |= {"statement": "It helps", "margin": "0.01", "unit": "points", "seeds": "2"}
    with open(root / "data" / "claims.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, claims.COLUMNS)
        table.writeheader()
        table.writerows([row | {"id": "a-1", "effect": "0.5"}, row | {"id": "a-2"}])
    stored = [{"id": "a-1", "scale": "paper", "parts": {"": found}}]
    cell = {"outputs": [{"data": {claims.MIME: stored}}]}
    (root / "notebooks").mkdir()
    (root / "notebooks" / "1-a.ipynb").write_text(json.dumps({"cells": [cell]}), encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    (root / "CITATION.cff").write_text(citation, encoding="utf-8")
    return root


def written(writer, root):
    out = root / "ro-crate-metadata.json"
    writer.write(root, out)
    return out.read_bytes()


def one_record(root, run="plain"):
    return sorted((root / "data" / "records" / STUDY).glob(f"{run}-*.json"))[0]


def changed(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


# ----------------------------------------------------------------------------------- writing


def test_every_claim_points_at_its_runs(whole, writer):
    entities, _ = whole
    rows = writer.stored_claims(ROOT)
    assert of_type(entities, "Claim").keys() == {f"#claim/{row['id']}" for row in rows}
    assert any(row["runs"] for row in rows)
    for row in rows:
        claim = entities[f"#claim/{row['id']}"]
        named = {at.rpartition("-")[2] for at in ids(claim, "mentions")}
        assert named == set(row["runs"])
        facts = {entities[at]["name"]: entities[at] for at in ids(claim, "additionalProperty")}
        assert facts["verdict"]["value"] == (row["verdict"] or "no verdict")
        assert ("the paper's effect" in facts) == (row["paper"] is not None)
        for part, found in row["parts"].items():
            interval = facts.get(f"mean and interval{part and f', {part}'}")
            assert (interval is None) == (found["mean"] is None)
            if interval:
                assert interval["minValue"] == pytest.approx(found["low"], rel=1e-11)
                assert interval["maxValue"] == pytest.approx(found["high"], rel=1e-11)


def test_every_record_is_the_result_of_a_run(whole):
    entities, _ = whole
    results = {}
    for action in of_type(entities, "CreateAction").values():
        (path,) = [at for at in ids(action, "result") if entities[at]["@type"] == "File"]
        results[path] = action
    there = {p.relative_to(ROOT).as_posix() for p in (ROOT / "data" / "records").rglob("*.json")}
    assert results.keys() == there
    for path, action in results.items():
        raw, file = (ROOT / path).read_bytes(), entities[path]
        assert (file["sha256"], file["contentSize"]) == (
            hashlib.sha256(raw).hexdigest(),
            str(len(raw)),
        )
        content = json.loads(raw)
        went_in = [entities[at] for at in ids(action, "object")]
        given = {e["name"] for e in went_in if e["@type"] == "PropertyValue"}
        assert given == content["arguments"].keys()
        data = {e["name"] for e in went_in if e["@type"] == "Dataset"}
        assert data == content["made"]["data"].keys()
        around = {entities[at]["name"]: entities[at]["value"] for at in ids(action, "environment")}
        for name in ("commit", "processor", "threads", "precision", "python"):
            assert around[name] == content["made"][name]
        assert around.items() >= content["made"]["versions"].items()
        assert content["made"]["source"] in entities[action["instrument"]["@id"]]["identifier"]
        digests = {entities[at].get("sha256") for at in ids(action, "result")}
        assert digests == {file["sha256"], *content["weights"].values()}


def test_no_reference_leads_nowhere(whole):
    entities, _ = whole
    for entity in entities.values():
        for key in entity:
            for one in many(entity[key]):
                if isinstance(one, dict) and key != "conformsTo":
                    assert one["@id"] in entities, (entity["@id"], key)


def test_the_file_is_small_and_the_same_in_another_process(whole, tmp_path):
    """Where hashes of strings differ, as they do from process to process."""
    _, path = whole
    assert path.stat().st_size < 8_000_000
    again = tmp_path / "again.json"
    run = subprocess.run(
        [sys.executable, str(TOOLS / "write_crate.py"), str(again)],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stderr
    assert again.read_bytes() == path.read_bytes()


def test_changing_a_record_changes_the_crate(writer, project):
    before = written(writer, project)
    assert written(writer, project) == before
    changed(one_record(project), lambda content: content["results"].update(accuracy=0.5))
    assert written(writer, project) != before


def test_what_taught_a_run_went_into_it(writer, project):
    crate = {e["@id"]: e for e in json.loads(written(writer, project))["@graph"]}
    actions = of_type(crate, "CreateAction")
    (teacher,) = [a for at, a in actions.items() if "/teacher-" in at]
    (weights,) = [at for at in ids(teacher, "result") if at.startswith("#weights/")]
    taught = {at for at, action in actions.items() if weights in ids(action, "object")}
    assert taught == {at for at in actions if "/taught-" in at}


def test_a_run_that_failed_says_why(writer, project):
    crate = json.loads(written(writer, project))["@graph"]
    (failed,) = [e for e in crate if "Failed" in e.get("actionStatus", "")]
    assert failed["error"] == "the loss is not finite"
    assert sum("error" in entity for entity in crate) == 1


def test_values_are_shared_and_never_mixed_up(writer):
    graph = writer.Graph()
    values = [1, 1.0, "1", True, "true", None, "null", "", [1], "[1]", {"a": 1}, "x", "x y", "Ж"]
    named = [graph.value("argument", "a", value)["@id"] for value in values]
    assert len(set(named)) == len(values)
    assert [graph.value("argument", "a", value)["@id"] for value in values] == named
    assert len(graph.entities) == len(values)
    assert all(name.isascii() and " " not in name for name in named)
    assert graph.value("argument", "b", 1)["@id"] not in named


def lacking(field):
    def change(content):
        room, _, name = field.rpartition(".")
        del (content[room] if room else content)[name]

    return change


NEEDED = ["study", "run", "key", "arguments", "status", "results", "weights", "made", "made.begun"]
NEEDED += ["made.source", "made.commit", "made.data", "made.versions", "made.processor"]


def refused(writer, root, *said):
    """The crate is refused in one sentence, and the old file stays as it is, alone."""
    out = root / "ro-crate-metadata.json"
    out.write_text("the old one", encoding="utf-8")
    with pytest.raises((writer.CrateError, claims.ClaimError)) as caught:
        writer.write(root, out)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    for text in said:
        assert text in sentence
    assert out.read_text(encoding="utf-8") == "the old one"
    assert not list(root.rglob("*.partial"))


@pytest.mark.parametrize("field", NEEDED)
def test_a_record_that_lacks_a_field_is_named(writer, project, field):
    path = one_record(project)
    changed(path, lacking(field))
    refused(writer, project, path.relative_to(project).as_posix(), f"lacks the field {field}")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": NaN}', "\ufffe"])
def test_a_damaged_record_is_named_and_left_alone(writer, project, text):
    path = one_record(project)
    path.write_text(text, encoding="utf-16" if text == "\ufffe" else "utf-8")
    before = path.read_bytes()
    refused(writer, project, path.relative_to(project).as_posix(), "is damaged")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("arguments", [1], "arguments"),
        ("status", "begun", "unknown status 'begun'"),
        ("key", "0" * 12, "another run"),
        ("study", "b", "another study's"),
        ("weights", {"end": 1}, "weights"),
    ],
)
def test_a_record_that_cannot_be_is_named(writer, project, field, value, said):
    path = one_record(project)
    changed(path, lambda content: content.update({field: value}))
    refused(writer, project, path.relative_to(project).as_posix(), said)


def test_a_claim_of_a_run_without_a_record_is_named(writer, project):
    path = one_record(project, "taught")
    path.unlink()
    refused(writer, project, "claim a-1", key_of(path))


def test_a_record_of_an_earlier_edition_does_not_stand_for_a_new_one(writer, project):
    (old,) = (project / "data" / "records" / STUDY / "first-edition").glob("*.json")
    (old.parent.parent / old.name).unlink()
    refused(writer, project, "claim a-1", key_of(old))


def test_a_damaged_notebook_is_named(writer, project):
    (project / "notebooks" / "1-a.ipynb").write_text("{", encoding="utf-8")
    refused(writer, project, "notebooks/1-a.ipynb is damaged")


def test_a_stored_claim_that_is_not_registered_is_named(writer, project):
    path = project / "notebooks" / "1-a.ipynb"
    path.write_text(path.read_text(encoding="utf-8").replace('"a-1"', '"a-9"'), encoding="utf-8")
    refused(writer, project, "a-9")


@pytest.mark.parametrize(
    ("text", "said"),
    [("title: x\n", "lacks the field abstract"), ("", "is damaged"), ("a: [", "is damaged")],
)
def test_a_citation_that_says_too_little_is_named(writer, project, text, said):
    (project / "CITATION.cff").write_text(text, encoding="utf-8")
    refused(writer, project, "CITATION.cff", said)


def test_the_command_says_one_sentence(writer, project, monkeypatch, capsys):
    monkeypatch.setattr(writer, "ROOT", project)
    assert writer.main([]) == 0
    assert "7 runs, 2 claims" in capsys.readouterr().out
    path = one_record(project)
    path.write_text("{", encoding="utf-8")
    assert writer.main([]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert path.name in said.err
    assert len(said.err.splitlines()) == 1


# ------------------------------------------------------------------------------- the profile


@pytest.fixture
def validated(tmp_path, monkeypatch):
    """A function that gives what a crate lacks of the profile's REQUIRED level.

    Without a network: the context comes with rocrate (a later one, which has every term of 1.1),
    and nothing else may be asked for.
    """
    services = pytest.importorskip("rocrate_validator.services")
    from rocrate import vocabs
    from rocrate_validator.models import Severity
    from rocrate_validator.utils.http import HttpRequester

    def get(self, url, **_):
        assert url == "https://w3id.org/ro/crate/1.1/context"
        kind = {"Content-Type": "application/ld+json"}
        text = json.dumps(vocabs.RO_CRATE)
        return SimpleNamespace(
            status_code=200, headers=kind, text=text, json=lambda: json.loads(text)
        )

    def no_network(*_):
        pytest.fail("the validator asked the network")

    monkeypatch.setattr(HttpRequester, "get", get, raising=False)
    monkeypatch.setattr(socket.socket, "connect", no_network)

    def validate(root):
        settings = services.ValidationSettings(
            rocrate_uri=str(root),
            profile_identifier="process-run-crate",
            requirement_severity=Severity.REQUIRED,
            offline=True,
            cache_path=tmp_path / "cache",
        )
        return [issue.message for issue in services.validate(settings).get_issues()]

    return validate


def test_the_profile_has_all_it_requires(writer, project, validated):
    written(writer, project)
    assert validated(project) == []
    # And the check sees: a run without its code, a record that is gone.
    out = project / "ro-crate-metadata.json"
    crate = json.loads(out.read_text(encoding="utf-8"))
    for entity in crate["@graph"]:
        if "/taught-" in entity["@id"] and entity["@type"] == "CreateAction":
            del entity["instrument"]
    out.write_text(json.dumps(crate), encoding="utf-8")
    gone = one_record(project)
    gone.unlink()
    wrong = validated(project)
    assert any("instrument" in message for message in wrong)
    assert any(gone.name in message for message in wrong)


# ----------------------------------------------------------------------------------- reading


def test_the_reader_knows_every_claim(whole, writer, reader, capsys):
    entities, path = whole
    assert not reader.main(next(iter(claims.registered())), path)
    capsys.readouterr()
    for row in writer.stored_claims(ROOT):
        assert not reader.answer(row["id"], entities)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"{row['id']}: {row['statement']}"
        assert lines[1] == f"verdict: {row['verdict'] or 'no verdict'}"
        runs = [line.split(",")[0].rpartition("/")[2] for line in lines if line.startswith("run ")]
        files = [
            next((ROOT / "data/records" / row["study"]).glob(f"*-{k}.json")) for k in row["runs"]
        ]
        assert sorted(runs) == sorted(file.name for file in files)
        contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        for content in contents:
            assert any(line.startswith(f"commit {content['made']['commit']}:") for line in lines)
            for prints in content["made"]["data"].values():
                for split, value in prints.items():
                    assert f"  {split}: {value}" in lines
        assert ("no runs yet" in lines) == (not runs)


def test_the_reader_follows_weights_to_the_runs_they_came_from(writer, project, reader, capsys):
    written(writer, project)
    assert not reader.main("a-1", project / "ro-crate-metadata.json")
    lines = capsys.readouterr().out.splitlines()
    assert "the paper's effect: 0.5" in lines
    assert sum(line.startswith("run ") for line in lines) == 4
    (before,) = [line for line in lines if line.startswith("weights of ")]
    assert one_record(project, "teacher").name in before
    assert f"commit {'c' * 40}: 5 runs" in lines


def test_the_reader_says_what_it_cannot_do(whole, tmp_path):
    _, path = whole

    def ask(*words):
        command = [sys.executable, "-I", "-S", str(TOOLS / "read_crate.py"), *map(str, words)]
        run = subprocess.run(command, capture_output=True, encoding="utf-8")
        assert (run.returncode, run.stdout) == (1, "")
        assert len(run.stderr.splitlines()) == 1
        return run.stderr

    assert "close ones: eskd-1" in ask("eskdd-1", path)
    assert "vid-1" in ask("no such thing", path)
    assert "does not exist" in ask("eskd-1", tmp_path / "none.json")
    (tmp_path / "damaged.json").write_text("{", encoding="utf-8")
    assert "is no crate" in ask("eskd-1", tmp_path / "damaged.json")
    assert "takes a claim" in ask()


# ------------------------------------------------------------------------- Zenodo and CodeMeta


def test_zenodo_and_codemeta_say_what_the_citation_says():
    for name, text in tool("write_citation").texts(ROOT).items():
        there = (ROOT / name).read_text(encoding="utf-8")
        assert there == text, "run `python tools/write_citation.py`"


def test_people_keep_their_names_and_orcids():
    person = {"given-names": "Ada", "family-names": "Byron", "affiliation": "Home"}
    person |= {"orcid": "https://orcid.org/0000-0000-0000-0000"}
    citation = {"title": "T", "abstract": "a < b", "version": "1", "date-released": "2026-01-01"}
    citation |= {"license": "MIT", "keywords": ["k"], "authors": [person], "references": []}
    made = tool("write_citation")
    zenodo, codemeta = made.zenodo(citation), made.codemeta(citation)
    assert zenodo["creators"] == [
        {"name": "Byron, Ada", "affiliation": "Home", "orcid": "0000-0000-0000-0000"}
    ]
    assert zenodo["description"] == "<p>a &lt; b</p>"
    (author,) = codemeta["author"]
    assert (author["id"], author["familyName"]) == (person["orcid"], "Byron")
