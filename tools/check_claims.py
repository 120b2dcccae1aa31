"""Judge every claim again, for someone who trusts none of this project's code.

``python tools/check_claims.py [PROJECT]`` finds every number that a claim in notebooks/*.ipynb
names in its run's record and puts differences and ratios together again (what a function of the
notebook makes of curves is held against its stored mean alone). It judges by data/claims.csv and
prints the verdicts, which ``python -m kdutils claims`` prints too; or says each fault in a sentence
and exits with 1.
"""

import csv
import hashlib
import json
import math
import sys
from decimal import Decimal  # numbers as they are written: two may be one float
from pathlib import Path
from statistics import mean, stdev

WORDS = "reversed", "no effect", "inconclusive", "replicated, smaller", "replicated"  # by rank
HOW = {"value": lambda a: a, "difference": lambda a, b: a - b, "ratio": lambda a, b: a / b}


def read(path):
    read.last = path  # to be named, should it be damaged
    return json.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)


def inside(t, df):  # the chance that Student's t is within ±t: Abramowitz and Stegun, 26.7.3 and 4
    angle, odd, terms = math.atan(t / math.sqrt(df)), df % 2, 0.0
    term = math.sin(angle) * math.cos(angle) ** odd
    for power in range(odd, df - 1, 2):
        terms += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + terms) if odd else terms


def judge(row, kind, effect, values):  # the word's rank, lead over the bound, mean, low, high, p
    scale, back = (math.log, math.exp) if row["unit"] == "ratio" else (float, float)
    side = -1 if kind in ("below", "at most", "every below") else 1
    bound, *top = map(float, row["bound"].split())
    x, start, limit = [scale(v) for v in values], scale(bound), scale(*top) if top else math.inf
    centre, error, every, p = mean(x), stdev(x) / math.sqrt(len(x)), kind[:5] == "every", None
    low, high = 0.0, 1e4  # around the t within which 95 % lie, halved until nothing is between
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if inside(middle, len(x) - 1) < 0.95 else (low, middle)
    low, high = (min(x), max(x)) if every else (centre - high * error, centre + high * error)
    near, far = sorted((side * (low - start), side * (high - start)))
    near, far = min(near, limit - high), min(far, limit - low)
    edge = near == 0 and kind in ("within", "at most", "at least")
    rank = 4 if near > 0 or edge else 0 if far < 0 or (every and far == 0) else 2
    if kind in ("above", "below"):
        p = 1 - inside(abs(centre - start) / error, len(x) - 1) if error else centre == start
        smaller, some = (scale(bound + side * float(d or 0)) for d in (effect, row["margin"]))
        rank = 1 if rank == 2 and far < side * (some - start) else rank
        rank = 3 if rank == 4 and far < side * (smaller - start) else rank
    return rank, side * (centre - start), back(centre), back(low), back(high), p


def faults(folder, part):
    for seed, value in part["values"].items():
        for key, path, number in part["from"][seed]:
            try:
                (record,) = map(read, folder.glob(f"*-{key}.json"))
                made_of = [record[name] for name in ("study", "run", "version", "arguments")]
                made = hashlib.sha256(json.dumps(made_of, sort_keys=True, default=float).encode())
                at = [record["arguments"] | record["results"]]
                for step in path.split("/"):
                    every = [one for whole in at if step == "*" for one in whole]
                    at = every or [x[int(step) if isinstance(x, list) else step] for x in at]
                if not made.hexdigest().startswith(key) or number != (at if "*" in path else at[0]):
                    raise ValueError
            except (OSError, ValueError, LookupError, TypeError):
                yield f"no sound record of run {key} has the {path} of seed {seed}."
        numbers = (float(number) for *_, number in part["from"][seed])
        if part["how"] in HOW and Decimal(repr(HOW[part["how"]](*numbers))) != value:
            yield f"seed {seed}'s {value} is not the {part['how']} of its numbers."
    values = [*map(float, part["values"].values())]
    if values and mean(values) != float(part.get("mean", "nan")):
        yield f"its values have the mean {mean(values)}, but stored is {part.get('mean')}."


def main(root):
    cells = [c for p in root.glob("notebooks/*.ipynb") for c in read(p)["cells"]]
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    rows = [row for one in data for row in one.get("application/vnd.kdutils.claims+json", [])]
    stored = {row["id"]: row.get("parts", {}) for row in rows}
    read.last, lines, ps = root / "data/claims.csv", {}, {}
    text = csv.DictReader(read.last.read_text(encoding="utf-8").splitlines())
    used = ("study", "kind", "parts", "effect", "margin", "bound", "unit")
    register = {row["id"]: {k: row[k] for k in used} | {"seeds": int(row["seeds"])} for row in text}
    wrong = [f"claim {name}: stored, but not registered." for name in {*stored} - {*register}]
    for name, row in register.items():
        names, parts, seeds = row["parts"].split(";"), stored.get(name, {}), row["seeds"]
        count, several, kind = row["kind"].removeprefix("all ").rpartition(" of ")
        texts = [t for p in parts.values() for t in faults(root / "data/records" / row["study"], p)]
        texts += [f"registered are {names}, stored {[*parts] or 'none'}."] * ({*names} != {*parts})
        values = [[*map(float, parts.get(n, {"values": {}})["values"].values())] for n in names]
        texts += ["more seeds are stored than registered."] * any(len(x) > seeds for x in values)
        wrong += [f"claim {name}: {text}" for text in texts]
        lines[name] = f"{name:12} {'no verdict':19} {min(map(len, values))} of {seeds} seeds"
        if {*map(len, values)} == {seeds}:
            effects = row["effect"].split(";") * len(names)
            found = [(*judge(row, kind, effects[k], x), names[k]) for k, x in enumerate(values)]
            found.sort(key=lambda one: (-one[0], -one[1]))
            place = int(count.split()[1]) - 1 if several else -1
            rank, _, centre, low, high, p, part = found[place]
            span = f"{centre:+.4f} [{low:+.4f}, {high:+.4f}]{part and f', {part}'}"
            lines[name] = f"{name:12} {WORDS[rank]:19} {span}"
            if p is not None:
                some = sorted(one[5] for one in (found if rank else found[place:]))
                p = some[place if rank else -1] * (len(names) if several or not rank else 1)
                ps.setdefault(row["study"], []).append((min(1, p), name))
    for of_study in ps.values():
        passed = [p <= 0.05 / (len(of_study) - k) for k, (p, _) in enumerate(sorted(of_study))]
        for k, (_, name) in enumerate(sorted(of_study)):
            lines[name] += f", Holm: {'yes' if all(passed[: k + 1]) else 'no'}"
    return print(*wrong or lines.values(), sep="\n") or bool(wrong)


if __name__ == "__main__":
    sys.excepthook = lambda _, error, at: print(f"{read.last} is damaged or not there: {error!r}.")
    sys.exit(main(Path([*sys.argv, Path(__file__).parent.parent][1])))
