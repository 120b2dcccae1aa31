"""Every number opens its record: what ``record.js`` shows of a claim or a run, and links to it.

A local extension of Sphinx, see ``_config.yml``. It writes one small script a claim and a run into
``_static/records``, since a page that lies in a folder may load scripts and nothing else.
"""

import csv
import functools
import json
import math
import re
from collections import defaultdict
from html import escape
from pathlib import Path

from kdutils import claims, notebooks, records

PAGE = "book/record"
DIGITS = 6  # of a history's numbers; the record itself has them all
TOLD = ("id", "study", "source", "statement", "quantity", "paper_value", "kind", "unit")
TOLD += ("seeds", "verdict", "part", "holm")
RULE = ("bound", "upper", "margin")
MOST = 64  # numbers in one value that are still shown
LONGEST = 200  # text
TAG = re.compile(r"</?([a-z0-9]+)\b")
QUIET = {"a", "code", "h1", "h2", "h3", "h4", "pre", "script", "style", "summary", "svg", "title"}


def short(value):
    """A value as the page can show it: six digits, and long lists by their shape."""
    if isinstance(value, dict):
        return {name: short(one) for name, one in value.items()}
    if isinstance(value, list):
        if (count := sum(1 for _ in flat(value))) > MOST:
            return f"{count:,} values: see the record"
        return [short(one) for one in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{len(value):,} characters: see the record"
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def flat(value):
    """The values in a list of lists."""
    for one in value:
        yield from flat(one) if isinstance(one, list) else (one,)


def columns(history: list[dict]) -> dict[str, list]:
    """A history by what was measured; None where an epoch has no such number."""
    names = dict.fromkeys(name for row in history for name in row)
    return {name: [short(row.get(name)) for row in history] for name in names}


def of_run(content: dict, judged: list[str], made: dict[str, str]) -> dict:
    """What the page shows of a record. ``made`` has the run of each file of weights, by SHA-256."""
    results = dict(content["results"])
    history = columns(results.pop("history", None) or [])
    asked = str(results) + str(content["arguments"])
    own = set(content["weights"].values())
    taught = {d: name for d, name in made.items() if d in asked and d not in own}
    kept = {k: content[k] for k in ("study", "run", "key", "scale", "status", "weights", "made")}
    said = {"arguments": content["arguments"], "results": short(results), "history": history}
    return kept | said | {"claims": judged, "taught": taught}


@functools.cache
def errata() -> dict[str, list[str]]:
    """Why words of a claim are not those that were registered, by claim."""
    found = defaultdict(list)
    with open(records.PROJECT / "data" / "errata.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found[row["id"]].append(f"{row['field'].replace('_', ' ')}: {row['why']}")
    return found


def of_claim(row: dict, names: dict[str, str]) -> dict:
    """What the page shows of a judged claim: each seed's value, and the runs it was taken from."""
    values = []
    for part, kept in row["parts"].items():
        for seed, value in kept["values"].items():
            sources = [[names.get(key, key), *rest] for key, *rest in kept["from"][seed]]
            values.append([part, seed, claims.said(value, row["unit"]), sources])
    effect = None if row["paper"] is None else claims.said(row["paper"], row["unit"])
    rule = {k: claims.said(row[k], row["unit"]) for k in RULE if row[k] is not None}
    told = {"said": claims.said_with_interval(row), "effect": effect, "rule": rule}
    told |= {"errata": errata().get(row["id"], [])}
    return {name: row[name] for name in TOLD} | told | {"values": values}


def write(app, failed):
    """One script a claim and a run, and one that lists all runs."""
    if failed or app.builder.format != "html":
        return
    folder, pages = Path(app.outdir) / "_static" / "records", notebooks.studies()
    rows, judges = claims.of_notebooks(), defaultdict(list)
    for row in rows:
        for key in row["runs"]:
            judges[row["study"], key].append(row["id"])
    contents = {
        f"{study}/{one['run']}-{one['key']}": one
        for study in pages
        for one in records.published(study)
    }
    made = {digest: name for name, one in contents.items() for digest in one["weights"].values()}
    names: dict = {study: {} for study in pages}
    listed = {}
    for name, one in contents.items():
        names[one["study"]][one["key"]] = name
        minutes = round(one["made"]["seconds"] / 60, 1)
        counts = judges[one["study"], one["key"]]
        listed[name] = [one["scale"], one["arguments"].get("seed"), minutes, counts]
    shown = {r["id"]: of_claim(r, names[r["study"]]) for r in rows}
    shown |= {name: of_run(one, listed[name][-1], made) for name, one in contents.items()}
    shown["index"] = {
        "runs": listed,
        "claims": {
            row["id"]: [row["statement"], claims.line(row).partition(": ")[2]] for row in rows
        },
        "pages": {study: f"../notebooks/{path.stem}.html" for study, path in pages.items()},
    }
    where = {
        "repository": app.config.html_theme_options["repository_url"],
        "commit": records.commit().partition("+")[0],
    }
    for name, content in shown.items():
        path = folder / f"{name}.js"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content | where, ensure_ascii=False, separators=(",", ":"))
        path.write_text(f"record({text})\n", encoding="utf-8")


def linked(body: str, page: str, known: dict[str, str]) -> str:
    """A page's HTML in which what names a claim, or says its number, leads to that claim.

    ``known`` has the claim of each such text. Headings, code and links stay as they are.
    """
    longest = sorted(known, key=len, reverse=True)
    if not longest:
        return body
    pattern = re.compile(rf"(?<![\w.+−-])(?:{'|'.join(map(re.escape, longest))})(?![\w.-]*\w)")
    open_tags: list[str] = []

    def link(found):
        at = f"{page}?of={known[found[0]]}"
        return f'<a class="claim" href="{escape(at)}">{found[0]}</a>'

    pieces = re.split(r"(<[^>]+>)", body)
    for k, piece in enumerate(pieces):
        if k % 2 == 0:
            if not open_tags:
                pieces[k] = pattern.sub(link, piece)
        elif (tag := TAG.match(piece)) and tag[1] in QUIET:
            if piece.startswith("</"):
                open_tags.pop()
            else:
                open_tags.append(tag[1])
    return "".join(pieces)


@functools.cache
def texts() -> dict[str, str]:
    """What leads to a claim: its name, and its number with the interval where no other has it."""
    rows, said = claims.of_notebooks(), defaultdict(list)
    for row in rows:
        if row["mean"] is not None:
            number = claims.said_with_interval(row)
            for text in {number, number.lstrip("+")}:  # a sentence may leave the sign out
                said[text].append(row["id"])
    return {row["id"]: row["id"] for row in rows} | {
        text: ids[0] for text, ids in said.items() if len(ids) == 1
    }


def link(app, page, template, context, doctree):
    if "body" in context and page != PAGE:
        context["body"] = linked(context["body"], context["pathto"](PAGE), texts())


def setup(app):
    app.connect("html-page-context", link)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
