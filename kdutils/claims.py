"""Claims: what a paper says, registered before the runs, and what the runs say of it.

``data/claims.csv`` registers, a study's stored output carries each seed's values and where they
came from, and everything else (mean, interval, word) is computed from these two.
"""

import csv
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

from kdutils import verdicts
from kdutils.records import PROJECT
from kdutils.results import Found
from kdutils.verdicts import Rule

REGISTER = PROJECT / "data" / "claims.csv"
TEXTS = ("id", "study", "source", "statement", "quantity", "paper_value", "kind", "unit")
COLUMNS = (*TEXTS[:-1], "parts", "bound", "effect", "margin", "unit", "seeds")
SPAN = ("mean", "low", "high")
MIME = "application/vnd.kdutils.claims+json"  # of the values in a notebook's output
UNITS = {  # how a value is said: factor, digits, what stands behind it
    "points": (100, 1, " points"),
    "share": (100, 1, " %"),
    "ratio": (1, 2, " times"),
    "correlation": (1, 3, ""),
    "nats": (1, 3, " nats"),
    "epochs": (1, 1, " epochs"),
    "doublings": (1, 2, " doublings"),
    "number": (1, 4, ""),
}


class ClaimError(ValueError):
    """The register, or what was found, is not as it must be; one sentence naming the claim."""


@dataclass(frozen=True)
class Claim:
    """One row of the register. ``rules`` has one rule a part; ``need`` of them have to hold.

    ``need`` is None where all have to. A claim without parts has one, named "". ``texts`` are the
    row's fields that hold no number.
    """

    id: str
    study: str
    seeds: int
    texts: dict[str, str]
    rules: dict[str, Rule]
    need: int | None


def registered(path: Path | None = None) -> dict[str, Claim]:
    """The claims by id, their words as the errata have them.

    Raises :class:`ClaimError` for a row that no verdict could follow from.
    """
    found: dict[str, Claim] = {}
    with open(path or REGISTER, encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            name = row.get("id")
            if name in found:
                raise ClaimError(f"claim {name} is registered twice.")
            try:
                found[name] = _claim(row)
            except ValueError as error:
                raise ClaimError(f"claim {name or 'in claims.csv'}: {error}.") from None
    # Words put right after the runs: rows stay as registered, and no verdict reads these fields.
    with open(PROJECT / "data" / "errata.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["id"] in found:
                found[row["id"]].texts[row["field"]] = row["now"]
    return found


def _claim(row: dict) -> Claim:
    """Raises ValueError, saying what is wrong, for what no verdict could follow from."""
    if absent := [column for column in COLUMNS if row.get(column) is None]:
        raise ValueError(f"it has no {absent[0]}")
    if None in row:
        raise ValueError("it has more fields than there are columns")
    several, count, kind = re.fullmatch("(all |any (.+) of )?(.*)", row["kind"]).groups()
    need = int(_number("kind", count, whole=True)) if count else None
    if row["unit"] not in UNITS:
        raise ValueError(f"unknown unit {row['unit']!r}; units: {', '.join(UNITS)}")
    parts = row["parts"].split(";") if row["parts"] else [""]
    if len(set(parts)) < len(parts) or (len(parts) > 1) != bool(several):
        raise ValueError(f"kind {row['kind']!r} does not fit its parts, {row['parts']!r}")
    if need is not None and not 1 <= need <= len(parts):
        raise ValueError(f"{need} of {len(parts)} parts cannot hold")
    effects = [_number("effect", text) if text else None for text in row["effect"].split(";")]
    effects = effects * len(parts) if len(effects) == 1 else effects
    if len(effects) != len(parts):
        raise ValueError(f"it has {len(effects)} effects for {len(parts)} parts")
    bounds = [_number("bound", text) for text in row["bound"].split()]
    if len(bounds) != 1 + (kind == "within") or bounds != sorted(set(bounds)):
        wanted = "a lower and an upper number" if kind == "within" else "one number"
        raise ValueError(f"bound is {row['bound']!r}; it must be {wanted}")
    margin, seeds = _number("margin", row["margin"]), _number("seeds", row["seeds"], whole=True)
    if margin <= 0 or seeds < 2:
        raise ValueError("its margin must be above 0, and its seeds at least 2")
    upper, ratio = bounds[1] if kind == "within" else None, row["unit"] == "ratio"
    shared = {"kind": kind, "bound": bounds[0], "margin": margin, "upper": upper, "ratio": ratio}
    rules = {k: Rule(effect=one, **shared) for k, one in zip(parts, effects, strict=True)}
    for rule in rules.values():  # what is beyond the bound has to be a ratio too
        for distance in (0, margin, rule.effect or 0):
            rule.scaled(rule.reach(distance))
    texts = {name: row[name] for name in TEXTS}
    return Claim(row["id"], row["study"], int(seeds), texts, rules, need)


def _number(name: str, text: str, whole: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (whole and value != int(value)):
        raise ValueError(f"{name} is {text!r}, which is no {'whole ' if whole else ''}number")
    return value


def judge(study: str, scale: str, found: Mapping) -> tuple[list[dict], list[dict]]:
    """A study's judged rows (:func:`judged`) and what its notebook keeps (:func:`stored`)."""
    keep = stored(study, scale, found)
    return [row for row in judged(keep) if row["study"] == study], keep


def stored(study: str, scale: str, found: Mapping[str, Found | Mapping[str, Found]]) -> list[dict]:
    """What a notebook keeps of a study's claims: each part's values by seed, and their sources.

    ``found`` has a :class:`results.Found` for every registered claim of the study, or one for each
    of its parts, by name. Raises :class:`ClaimError` where the two do not fit.
    """
    known = {name: claim for name, claim in registered().items() if claim.study == study}
    if missing := sorted(known.keys() - found.keys()):
        raise ClaimError(f"claim {missing[0]} is registered, but no runs are given for it.")
    if odd := sorted(found.keys() - known.keys()):
        raise ClaimError(f"runs are given for {odd[0]}, which is no registered claim of {study}.")
    rows = []
    for name, claim in known.items():
        parts = found[name] if isinstance(found[name], Mapping) else {"": found[name]}
        if set(parts) != set(claim.rules):
            given, wanted = (", ".join(map(repr, sorted(x))) for x in (parts, claim.rules))
            why = f"its parts are {wanted}, but runs are given for {given}"
            raise ClaimError(f"claim {name}: {why}.")
        kept = {part: parts[part].as_dict() for part in claim.rules}
        rows.append({"id": name, "scale": scale, "parts": kept})
    return rows


def judged(rows: list[dict]) -> list[dict]:
    """Every registered claim with what the stored rows say of it.

    Keys: those of the register; ``values`` (by seed, of the part that decides), ``parts``,
    ``runs``, ``scale``, ``found`` (seeds), ``verdict`` (one of five words, or None), ``part``,
    ``mean``, ``low``, ``high``, ``paper`` (its effect as a value of the quantity),
    ``effect_excluded``, ``holm`` (None where it does not apply), ``needed`` (seeds that would
    decide, where it is inconclusive), ``margins`` (what :func:`figures.forest` draws).
    Raises :class:`ClaimError` for stored rows that the register does not admit.
    """
    by_id, result, ps, known = {row["id"]: row for row in rows}, [], {}, registered()
    if odd := sorted(by_id.keys() - known.keys()):
        raise ClaimError(f"values are stored for {odd[0]}, which is no registered claim.")
    for claim in known.values():
        row = by_id.get(claim.id, {"scale": None, "parts": {}})
        try:
            found = _verdict(claim, row["parts"])
        except ValueError as error:
            raise ClaimError(f"claim {claim.id}: {error}.") from None
        if found["p"] is not None:
            ps.setdefault(claim.study, {})[claim.id] = found["p"]
        result.append(found | {"scale": row["scale"] if found["found"] else None})
    survived = {k: kept for of_study in ps.values() for k, kept in verdicts.holm(of_study).items()}
    return [row | {"holm": survived.get(row["id"])} for row in result]


def _verdict(claim: Claim, parts: dict) -> dict:
    """Raises ValueError, saying what is wrong, where there are too many seeds or odd values."""
    by_seed = {part: parts.get(part, {}).get("values", {}) for part in claim.rules}
    values = {part: list(of_part.values()) for part, of_part in by_seed.items()}
    if (most := max(map(len, values.values()))) > claim.seeds:
        why = "none may be added after a look"
        raise ValueError(f"{claim.seeds} seeds are registered, but there are {most}; {why}")
    each = {part: verdicts.Verdict(None, n=len(found)) for part, found in values.items()}
    for part, rule in claim.rules.items():
        if len(values[part]) == claim.seeds:
            each[part] = verdicts.judge(rule, values[part])
    whole = verdicts.weakest(each, claim.need)
    rule = claim.rules[whole.part]
    needed = [  # to decide the claim for sure, each part that is open has to be decided
        verdicts.seeds_needed(claim.rules[part], values[part])
        for part, verdict in each.items()
        if whole.word == verdict.word == verdicts.INCONCLUSIVE
    ]
    return {
        **claim.texts,
        "seeds": claim.seeds,
        **{k: getattr(rule, k) for k in ("bound", "upper", "margin", "effect")},
        "paper": None if rule.effect is None else rule.reach(rule.effect),
        "values": by_seed[whole.part],
        "parts": {
            part: parts.get(part, {"values": {}})
            | {k: getattr(v, k) for k in SPAN}
            | {"verdict": v.word, "found": v.n, "effect": claim.rules[part].effect}
            for part, v in each.items()
        },
        "runs": sorted({s[0] for p in parts.values() for of in p["from"].values() for s in of}),
        "verdict": whole.word,
        "found": whole.n,
        **{k: getattr(whole, k) for k in ("part", *SPAN, "p", "effect_excluded")},
        "margins": _margins(rule, whole),
        "needed": None if None in needed else max(needed, default=None),
    }


def _margins(rule: Rule, found: verdicts.Verdict) -> dict | None:
    """Mean, interval and the paper's effect beyond the bound, in margins, to be drawn."""
    if found.mean is None:
        return None
    unit = abs(rule.beyond(rule.reach(rule.margin)))
    effect = None if rule.effect is None else rule.beyond(rule.reach(rule.effect)) / unit
    return {k: rule.beyond(getattr(found, k)) / unit for k in SPAN} | {"effect": effect}


def said(value: float, unit: str) -> str:
    """A value as a reader has it: ``+1.1 points``."""
    factor, digits, behind = UNITS[unit]
    shown = f"{value * factor:{'' if unit == 'ratio' else '+'}z.{digits}f}"
    return f"{shown.replace('-', '−')}{behind}"


def said_with_interval(row: dict) -> str:
    """A judged row's estimate with its interval: ``+1.1 points (0.1 to 2.1)``."""
    if row["mean"] is None:
        return f"{row['found']} of {row['seeds']} seeds"
    factor, digits, _ = UNITS[row["unit"]]
    low, high = (f"{row[k] * factor:z.{digits}f}".replace("-", "−") for k in ("low", "high"))
    return f"{said(row['mean'], row['unit'])} ({low} to {high})"


def line(row: dict) -> str:
    """A judged row in one line: ``eskd-1: replicated, +1.1 points (0.1 to 2.1)``."""
    return f"{row['id']}: {row['verdict'] or 'no verdict'}, {said_with_interval(row)}"


def show(rows: list[dict], keep: list[dict]) -> None:
    """Show judged rows as a table whose output carries ``keep``, the stored rows, as data."""
    from IPython.display import display

    text = {"text/plain": "\n".join(map(line, rows))}
    display(text | {"text/html": table(rows), MIME: keep}, raw=True)


def table(rows: list[dict]) -> str:
    """Judged rows as an HTML table that scrolls in a box of its own where the screen is narrow."""
    import pandas as pd

    def cells(row):
        (factor, _, unit), word = UNITS[row["unit"]], row["verdict"] or "no verdict"
        bounds = [f"{factor * row[k]:g}" for k in ("bound", "upper") if row[k] is not None]
        rule = f"<br>({row['kind']} {' to '.join(bounds)}, margin {factor * row['margin']:g}{unit})"
        badge = f'<span class="verdict {word.split(",")[0].replace(" ", "-")}">{word}</span>'
        part = f"<br>({escape(row['part'])})" * bool(row["part"])
        effect = "–" if row["paper"] is None else said(row["paper"], row["unit"])
        effect += "<br>(excluded)" * bool(row["effect_excluded"])
        needed = f"<br>({row['needed']:,} would decide)" if row["needed"] else ""
        ours = said_with_interval(row) if row["mean"] is not None else "–"
        says = "ours: " * row["source"].startswith("ours") + escape(row["statement"]) + rule
        of = {"claim": f"{row['id']}<br>{badge}", "what it says": says, "the paper's": effect}
        of |= {"ours (95 %)": ours + part, "seeds": f"{row['found']} of {row['seeds']}{needed}"}
        return of | {"Holm": {True: "yes", False: "no", None: "–"}[row["holm"]]}

    frame = pd.DataFrame(map(cells, rows)).set_index("claim").rename_axis(None)
    html = frame.to_html(border=0, classes="claims", justify="left", escape=False)
    return f'<div class="claims">{html}</div>'


def of_notebooks() -> list[dict]:
    """Every registered claim with what the stored notebooks found of it; see :func:`judged`."""
    from kdutils import notebooks

    found = [put for path in notebooks.studies().values() for put in notebooks.outputs(path)]
    return judged([row for put in found for row in put.get(MIME, [])])
