"""Say which runs, data and code made a claim, by ``ro-crate-metadata.json`` alone.

``python tools/read_crate.py eskd-1 [CRATE]`` prints the claim with its verdict, then the data with
their fingerprints, the commits, and the records of the runs; after these, of the runs whose weights
they began with or were taught by. It needs Python's standard library and the crate, nothing else of
this project.
"""

import difflib
import json
import sys
from pathlib import Path


def many(value):
    return value if isinstance(value, list) else [] if value is None else [value]


def main(name, path):
    try:
        graph = json.loads(path.read_text(encoding="utf-8"))["@graph"]
        return answer(name, {entity["@id"]: entity for entity in graph})
    except FileNotFoundError:
        return f"{path} does not exist: make it by `make crate`."
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"{path} is no crate: {error!r}."


def answer(name, entities):
    def of(entity, key):  # the entities that this one names by key
        return [entities[one["@id"]] for one in many(entity.get(key))]

    def said(entity, key):
        return {one["name"]: one["value"] for one in of(entity, key) if "value" in one}

    found = {e["name"]: e for e in entities.values() if e["@type"] == "Claim"}
    if name not in found:
        close = difflib.get_close_matches(name, found, 5, 0.5) or found
        return f"{name} is no claim of this crate; close ones: {', '.join(close)}."
    claim, facts = found[name], said(found[name], "additionalProperty")
    print(f"{name}: {claim['text']}\nverdict: {facts['verdict']}")
    print("the paper's effect:", facts.get("the paper's effect", "not said as a number"))
    for one in of(claim, "additionalProperty"):
        if "minValue" in one:
            print(f"{one['name']}: {one['value']} [{one['minValue']}, {one['maxValue']}]")
    actions = [e for e in entities.values() if e["@type"] == "CreateAction"]
    makers = {one["@id"]: action for action in actions for one in many(action["result"])}
    asked, runs = of(claim, "mentions"), {}
    direct = {action["@id"] for action in asked}
    while asked:
        action = asked.pop(0)
        if action["@id"] not in runs:
            runs[action["@id"]] = action
            asked += [makers[x["@id"]] for x in many(action.get("object")) if x["@id"] in makers]
    data = {one["@id"]: one for action in runs.values() for one in of(action, "object")}
    data = [one for one in data.values() if one["@type"] == "Dataset"]
    for one in data:
        prints = "".join(f"\n  {k}: {v}" for k, v in said(one, "identifier").items())
        print(f"data {one['name']}, fingerprints:{prints or ' none stated'}")
    commits = {at: said(action, "environment")["commit"] for at, action in runs.items()}
    for commit in sorted({*commits.values()}):
        print(f"commit {commit}: {[*commits.values()].count(commit)} runs")
    for at, action in runs.items():
        (record,) = [one["@id"] for one in of(action, "result") if one["@type"] == "File"]
        code = of(action, "instrument")[0]["identifier"]
        what = "run" if at in direct else "weights of"
        print(f"{what} {record}, commit {commits[at][:12]}, source {code}")
    if not data:
        print("data: no dataset but what the code draws" if runs else "no runs yet")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("read_crate takes a claim, as eskd-1, and a crate if it is not this project's.")
    default = Path(__file__).parent.parent / "ro-crate-metadata.json"
    sys.exit(main(sys.argv[1], Path([*sys.argv[2:], default][0])))
