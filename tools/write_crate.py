"""Write ``ro-crate-metadata.json``: which runs made each claim, as linked data.

``python tools/write_crate.py [OUT]`` describes this project by RO-Crate 1.1 and its profile Process
Run Crate 0.5: every record of data/records is a ``CreateAction``, every registered claim a
``Claim`` that mentions the actions its numbers came from. The same records, notebooks, claims and
CITATION.cff give the same bytes; no clock is asked. What is wrong is said in one sentence, and the
old file stays. tools/read_crate.py reads it.
"""

import hashlib
import json
import re
import sys
import tomllib
from pathlib import Path

import yaml
from rocrate.model.contextentity import ContextEntity
from rocrate.rocrate import ROCrate

from kdutils import claims, files

ROOT = Path(__file__).parent.parent
PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
# The terms of https://w3id.org/ro/terms/workflow-run/context that are used, so that a reader
# has one context to fetch and not two.
TERMS = {
    term: f"https://w3id.org/ro/terms/workflow-run#{term}"
    for term in ("environment", "resourceUsage", "sha256")
}
STATUS = {"done": "Completed", "failed": "Failed"}
FIELDS = {"study": str, "run": str, "version": int, "key": str, "scale": str, "arguments": dict}
FIELDS |= {"status": str, "results": dict, "weights": dict, "made": dict}
MADE = {"begun": str, "seconds": (int, float), "source": str, "commit": str, "versions": dict}
MADE |= {"data": dict, "processor": str, "python": str, "threads": int, "precision": str}
CITED = ("title", "abstract", "authors", "version", "date-released", "license", "keywords")
CITED += ("references",)
# Of ``made``, what is said elsewhere than in an action's environment; memory is the record's alone.
APART = ("begun", "seconds", "source", "versions", "data", "peak_memory_mb")


class CrateError(ValueError):
    """What cannot be described; one sentence naming the file or the claim."""


def read_json(path: Path, name: str) -> tuple[dict, bytes]:
    """A JSON file's object and its bytes. Raises :class:`CrateError`, naming it by ``name``."""

    def no_number(text):
        raise ValueError(f"{text} is no number")

    try:
        raw = path.read_bytes()
        content = json.loads(raw, parse_constant=no_number)
    except ValueError as error:
        raise CrateError(f"{name} is damaged: {error}.") from None
    if not isinstance(content, dict):
        raise CrateError(f"{name} is damaged: it holds no object.")
    return content, raw


def read_record(root: Path, path: Path) -> dict:
    """A record with its ``path`` from the root, its ``size`` and its ``sha256``."""
    name = path.relative_to(root).as_posix()
    content, raw = read_json(path, name)
    for prefix, fields in (("", FIELDS), ("made.", MADE)):
        place = content if not prefix else content["made"]
        for field, kind in fields.items():
            if field not in place:
                raise CrateError(f"{name} lacks the field {prefix}{field}.")
            if not isinstance(place[field], kind):
                raise CrateError(f"{name} has no sound {prefix}{field}: {place[field]!r}.")
    sound = {*map(type, content["weights"].values())} <= {str}
    if not sound or not {*map(type, content["made"]["data"].values())} <= {dict}:
        raise CrateError(f"{name} has no sound weights or made.data.")
    if content["status"] not in STATUS:
        raise CrateError(f"{name} has the unknown status {content['status']!r}.")
    if path.stem != f"{content['run']}-{content['key']}":
        raise CrateError(f"{name} holds another run: {content['run']}-{content['key']}.")
    if path.relative_to(root / "data" / "records").parts[0] != content["study"]:
        raise CrateError(f"{name} lies in another study's folder, not {content['study']}'s.")
    return content | {"path": name, "size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def stored_claims(root: Path) -> list[dict]:
    """Every registered claim of the project, judged by what its notebooks store."""
    rows = []
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        book, _ = read_json(path, path.relative_to(root).as_posix())
        for cell in book.get("cells", []):
            for output in cell.get("outputs", []):
                rows += output.get("data", {}).get(claims.MIME, [])
    claims.REGISTER = root / "data" / "claims.csv"  # judged by the register that stands beside them
    try:
        return claims.judged(rows)
    except KeyError as error:
        raise CrateError(f"a claim that a notebook stores lacks {error}.") from None


def read_citation(root: Path) -> dict:
    """What CITATION.cff says, which has to hold all that a crate says of the whole."""
    try:
        found = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
        absent = [name for name in CITED if name not in found]
    except (yaml.YAMLError, TypeError):
        raise CrateError("CITATION.cff is damaged: it is no YAML of names and values.") from None
    if absent:
        raise CrateError(f"CITATION.cff lacks the field {absent[0]}.")
    return found


class Graph:
    """Entities by id; what is added twice has to be the same."""

    def __init__(self):
        self.entities: dict[str, dict] = {}

    def add(self, name: str, kind: str, /, **properties) -> dict:
        """Add an entity, without what is None or an empty list; a reference to it."""
        kept = {k: _compact(v) for k, v in properties.items() if v is not None and v != []}
        entity = {"@type": kind, **kept}
        if self.entities.setdefault(name, entity) != entity:
            raise CrateError(f"two different things would be called {name}.")
        return {"@id": name}

    def value(self, room: str, name: str, value) -> dict:
        """The PropertyValue of a name and a value, one for all who share both."""
        text = json.dumps(value, sort_keys=True, ensure_ascii=False)
        plain = value if isinstance(value, str) and not _is_json(value) else text
        if not re.fullmatch(r"[\w.+:-]{1,32}", plain, re.ASCII):
            plain = hashlib.sha256(text.encode()).hexdigest()[:12]
        at = f"#{room}/{re.sub(r'[^a-z0-9_]+', '-', name.lower())}={plain}"
        shown = value if isinstance(value, str | int | float) else text
        return self.add(at, "PropertyValue", name=name, value=shown)


def _compact(value):
    """A list of one is that one, as JSON-LD has it."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _is_json(text: str) -> bool:
    """Whether a text would be taken for a number, true, false or null."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def describe(root: Path, records: list[dict], rows: list[dict], citation: dict) -> dict:
    """The metadata of a crate at ``root``: its JSON-LD, in a fixed order.

    ``records`` as :func:`read_record` gives them, ``rows`` as ``kdutils.claims.judged`` does.
    """
    graph = Graph()
    made_by = {digest: r["path"] for r in records for digest in r["weights"].values()}
    known = sources(root)
    actions = [_action(graph, record, made_by, known) for record in records]
    # A claim is judged by the records that lie in its study's folder, not by those of an earlier
    # edition, which lie one deeper.
    flat = {(r["study"], r["key"]): r for r in records if r["path"].count("/") == 3}
    papers = _papers(graph, citation)
    for row in rows:
        absent = [key for key in row["runs"] if (row["study"], key) not in flat]
        if absent:
            raise CrateError(f"claim {row['id']} names the run {absent[0]}, which has no record.")
        made = [{"@id": action_id(flat[row["study"], key])} for key in row["runs"]]
        _claim(graph, row, made, papers)
    graph.add(PROFILE, "CreativeWork", name="Process Run Crate", version=PROFILE.rpartition("/")[2])
    licences = [
        graph.add(
            f"https://spdx.org/licenses/{citation['license']}",
            "CreativeWork",
            name=citation["license"],
            description="The licence of the code.",
        ),
        graph.add(
            "https://creativecommons.org/licenses/by/4.0/",
            "CreativeWork",
            name="CC BY 4.0",
            description="The licence of the text, the records and the claims.",
        ),
    ]
    crate = ROCrate(version="1.1")
    crate.metadata.extra_terms = TERMS
    root_entity = {
        "name": citation["title"],
        "description": citation["abstract"],
        "datePublished": str(citation["date-released"]),
        "version": citation["version"],
        "keywords": citation["keywords"],
        "license": licences,
        "author": [_author(graph, one) for one in citation["authors"]],
        "conformsTo": {"@id": PROFILE},
        "citation": sorted(papers.values(), key=lambda one: one["@id"]),
        "mentions": actions + [{"@id": f"#claim/{row['id']}"} for row in rows],
    }
    for name, value in root_entity.items():
        crate.root_dataset[name] = _compact(value)
    for name in FILES:
        if (root / name).exists():
            crate.add_file(root / name, name, properties=_file(root, name))
    for record in records:
        properties = {
            "name": Path(record["path"]).name,
            "description": f"Record of a run of {record['run']}, study {record['study']}",
            "encodingFormat": "application/json",
            "contentSize": str(record["size"]),
            "sha256": record["sha256"],
        }
        crate.add_file(root / record["path"], record["path"], properties=properties)
    for name, properties in graph.entities.items():
        crate.add(ContextEntity(crate, name, properties=properties))
    found = crate.metadata.generate()
    first = ("ro-crate-metadata.json", "./")
    found["@graph"].sort(key=lambda e: (e["@id"] not in first, e["@id"] == "./", e["@id"]))
    return found


FILES = {
    "CITATION.cff": ("How to cite the project, and the papers it reruns", "application/yaml"),
    "data/claims.csv": ("The register of claims, committed before their runs", "text/csv"),
    "data/errata.csv": ("Words of claims that were put right after the runs", "text/csv"),
    "data/sources.toml": ("Where data come from, and their fingerprints", "application/toml"),
    "tools/check_claims.py": ("Makes every verdict again from the records", "text/x-python"),
    "tools/read_crate.py": ("Says which runs made a claim", "text/x-python"),
}


def _file(root: Path, name: str) -> dict:
    description, form = FILES[name]
    raw = (root / name).read_bytes()
    return {
        "name": Path(name).name,
        "description": description,
        "encodingFormat": form,
        "contentSize": str(len(raw)),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }


def sources(root: Path) -> dict:
    """What data/sources.toml says of the datasets; nothing where there is none."""
    path = root / "data" / "sources.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def action_id(record: dict) -> str:
    return "#run/" + record["path"].removeprefix("data/records/").removesuffix(".json")


def _action(graph: Graph, record: dict, made_by: dict, known: dict) -> dict:
    """Add a record's run, and what went in and came out; a reference to the run."""
    made, study, run = record["made"], record["study"], record["run"]
    code = graph.add(
        f"#code/{study}/{run}-{record['version']}-{made['source'][:16]}",
        "SoftwareSourceCode",
        name=f"{run}, a function of study {study}'s notebook",
        description="As it stood at the commit that the action's environment names. The identifier "
        "is a SHA-256 over the syntax tree of the function and of all it reaches.",
        identifier=f"sha256:{made['source']}",
        version=str(record["version"]),
        programmingLanguage="Python",
    )
    went_in = [_data(graph, *of_one, known.get(of_one[0], {})) for of_one in made["data"].items()]
    taught = {v for v in record["results"].values() if isinstance(v, str) and v in made_by}
    went_in += [{"@id": f"#weights/{digest[:16]}"} for digest in sorted(taught)]
    went_in += [graph.value("argument", k, v) for k, v in record["arguments"].items()]
    weights = [
        graph.add(
            f"#weights/{digest[:16]}",
            "CreativeWork",
            name=name,
            description="Weights, kept where they were trained; not part of the repository.",
            sha256=digest,
        )
        for name, digest in record["weights"].items()
    ]
    around = {k: v for k, v in made.items() if k not in APART} | made["versions"]
    return graph.add(
        action_id(record),
        "CreateAction",
        name=f"{run} {record['key']}",
        description=f"A run of {run}, study {study}, at scale {record['scale']}",
        actionStatus=f"http://schema.org/{STATUS[record['status']]}ActionStatus",
        error=str(record["results"].get("error", "")) if record["status"] == "failed" else None,
        startTime=made["begun"],
        resourceUsage=graph.value("usage", "seconds", made["seconds"]),
        instrument=code,
        object=went_in,
        result=[{"@id": record["path"]}, *weights],
        environment=[graph.value("environment", k, v) for k, v in around.items()],
    )


def _data(graph: Graph, name: str, fingerprints: dict, known: dict) -> dict:
    """Add a dataset as a run saw it; other fingerprints are another dataset."""
    digest = hashlib.sha256(json.dumps(fingerprints, sort_keys=True).encode()).hexdigest()[:16]
    prints = [graph.value("fingerprint", split, v) for split, v in sorted(fingerprints.items())]
    return graph.add(
        f"#data/{name}-{digest}",
        "Dataset",
        name=name,
        description=known.get("title"),
        usageInfo=known.get("terms"),
        identifier=prints,
    )


def _author(graph: Graph, author: dict) -> dict:
    """Add a person or a group as CITATION.cff names them."""
    if "name" in author:
        name, kind = author["name"], "Organization"
    else:
        name, kind = f"{author['given-names']} {author['family-names']}", "Person"
    slug = re.sub(r"\W+", "-", name.lower()).strip("-")
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    slug = slug if slug.isascii() else digest
    of = author.get("affiliation")
    affiliation = of and _author(graph, {"name": of})
    return graph.add(f"#by/{slug}", kind, name=name, affiliation=affiliation)


def _papers(graph: Graph, citation: dict) -> dict[str, dict]:
    """Add the papers that CITATION.cff refers to; references to them by study."""
    found = {}
    for paper in citation["references"]:
        named = re.match(r"Study (\w+)", paper.get("notes", ""))
        if not named:
            raise CrateError(f"CITATION.cff names no study for {paper['title']!r}.")
        authors = [a for a in paper["authors"] if a.get("name") != "anonymous"]
        found[named[1]] = graph.add(
            f"#paper/{named[1]}",
            "ScholarlyArticle",
            name=paper["title"],
            description=paper["notes"],
            author=[_author(graph, one) for one in authors],
        )
    return found


def _claim(graph: Graph, row: dict, actions: list[dict], papers: dict[str, dict]) -> None:
    """Add a judged claim: the paper's words, our verdict with its interval, the runs."""
    said = ("kind", "unit", "bound", "upper", "margin", "seeds", "paper_value", "found", "scale")
    said = {name.replace("_", " "): row[name] for name in said} | {
        "verdict": row["verdict"] or "no verdict",
        "part that decides": row["part"],
        "the paper's effect": row["paper"],
        "survives Holm's correction": row["holm"],
    }
    facts = [graph.value("said", k, _rounded(v)) for k, v in said.items() if v not in (None, "")]
    for part, found in row["parts"].items():
        if found["mean"] is not None:
            facts.append(
                graph.add(
                    f"#claim/{row['id']}/{hashlib.sha256(part.encode()).hexdigest()[:8]}",
                    "PropertyValue",
                    name=f"mean and interval{part and f', {part}'}",
                    value=_rounded(found["mean"]),
                    minValue=_rounded(found["low"]),
                    maxValue=_rounded(found["high"]),
                    unitText=row["unit"],
                    description=found["verdict"],
                )
            )
    graph.add(
        f"#claim/{row['id']}",
        "Claim",
        name=row["id"],
        text=row["statement"],
        description=f"{row['quantity']} ({row['source']})",
        appearance=None if row["source"].startswith("ours") else papers.get(row["study"]),
        isPartOf={"@id": "data/claims.csv"},
        additionalProperty=facts,
        mentions=actions,
    )


def _rounded(value):
    """A number to 12 digits: what another machine's mathematics may change lies beyond."""
    return float(f"{value:.12g}") if isinstance(value, float) else value


def as_text(crate: dict) -> str:
    """JSON, one entity a line: small, and a change shows where it is."""
    lines = [
        json.dumps(e, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        for e in crate["@graph"]
    ]
    context = json.dumps(crate["@context"])
    return f'{{"@context": {context},\n"@graph": [\n' + ",\n".join(lines) + "\n]}\n"


def write(root: Path, out: Path) -> dict:
    """Write the crate of the project at ``root``. Raises :class:`CrateError`."""
    found = sorted((root / "data" / "records").rglob("*.json"))
    records = [read_record(root, path) for path in found]
    crate = describe(root, records, stored_claims(root), read_citation(root))
    files.write(out, as_text(crate))
    return crate


def main(arguments: list[str]) -> int:
    out = Path(arguments[0]) if arguments else ROOT / "ro-crate-metadata.json"
    try:
        crate = write(ROOT, out)
    except (CrateError, claims.ClaimError, OSError) as error:
        print(f"write_crate: {error}", file=sys.stderr)
        return 1
    kinds = [entity["@type"] for entity in crate["@graph"]]
    counted = f"{kinds.count('CreateAction')} runs, {kinds.count('Claim')} claims"
    print(f"{out}: {counted}, {out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
