"""Write ``.zenodo.json`` and ``codemeta.json`` from CITATION.cff, the one place to edit.

``python tools/write_citation.py`` writes both; a test says when it was forgotten. Zenodo reads its
file from the repository when a release is made; CodeMeta's is for catalogues of software.
"""

import html
import json
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


def zenodo(citation: dict) -> dict:
    """The deposit as Zenodo's API has it."""
    return {
        "title": citation["title"],
        "description": f"<p>{html.escape(citation['abstract'])}</p>",
        "upload_type": "software",
        "creators": [_creator(one) for one in citation["authors"]],
        "version": citation["version"],
        "publication_date": str(citation["date-released"]),
        "license": citation["license"].lower(),
        "keywords": citation["keywords"],
        "language": "eng",
        "references": [_reference(one) for one in citation["references"]],
    }


def codemeta(citation: dict) -> dict:
    """The software as CodeMeta 3.0 has it."""
    return {
        "@context": "https://w3id.org/codemeta/3.0",
        "type": "SoftwareSourceCode",
        "name": citation["title"],
        "description": citation["abstract"],
        "author": [_agent(one) for one in citation["authors"]],
        "version": citation["version"],
        "datePublished": str(citation["date-released"]),
        "license": f"https://spdx.org/licenses/{citation['license']}",
        "codeRepository": citation.get("repository-code"),
        "keywords": citation["keywords"],
        "programmingLanguage": "Python",
        "citation": [_paper(one) for one in citation["references"]],
    }


def _agent(author: dict) -> dict:
    if "name" in author:
        return {"type": "Organization", "name": author["name"]}
    more = {"id": author.get("orcid")}
    if "affiliation" in author:
        more["affiliation"] = {"type": "Organization", "name": author["affiliation"]}
    found = {"givenName": author["given-names"], "familyName": author["family-names"]}
    return {"type": "Person"} | found | {k: v for k, v in more.items() if v}


def _creator(author: dict) -> dict:
    orcid = author.get("orcid", "").removeprefix("https://orcid.org/")
    found = {"name": author.get("name") or f"{author['family-names']}, {author['given-names']}"}
    more = {"affiliation": author.get("affiliation"), "orcid": orcid}
    return found | {k: v for k, v in more.items() if v}


def _known(paper: dict) -> list[dict]:
    """A paper's authors, none where it names none."""
    return [author for author in paper["authors"] if author.get("name") != "anonymous"]


def _paper(paper: dict) -> dict:
    authors = {"author": [_agent(author) for author in _known(paper)]}
    found = {"type": "ScholarlyArticle", "name": paper["title"]}
    return found | (authors if authors["author"] else {})


def _reference(paper: dict) -> str:
    names = ["; ".join(one["name"] for one in map(_creator, _known(paper))), paper["title"]]
    return ": ".join(filter(None, names))


def texts(root: Path) -> dict[str, str]:
    """The two files' contents by their names."""
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    made = {".zenodo.json": zenodo(citation), "codemeta.json": codemeta(citation)}
    return {k: json.dumps(v, indent=1, ensure_ascii=False) + "\n" for k, v in made.items()}


def main() -> int:
    try:
        made = texts(ROOT)
    except KeyError as error:
        print(f"write_citation: CITATION.cff lacks the field {error}.", file=sys.stderr)
        return 1
    for name, text in made.items():
        (ROOT / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
