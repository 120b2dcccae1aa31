"""What the pages of studies share: the answer, the setting, code shown, provenance and cost."""

import ast
import inspect
import textwrap
from collections import Counter
from pathlib import Path

from kdutils import claims, notebooks, records, verdicts
from kdutils.runs import Study


def answer(lead: str, *points: str):
    """The page's answer: the finding, then a list of what else to know; empty points are left out.

    Lead and points are at most eight, which a test counts: a reader has a minute.
    """
    from IPython.display import Markdown

    return Markdown("\n".join([lead, "", *(f"- {point}" for point in points if point)]).strip())


def tally(rows: list[dict], what: str = "claims") -> str:
    """How many judged claims have which word: ``Of 8 claims: 3 replicated and 5 inconclusive.``"""
    counts = Counter(row["verdict"] or "not judged yet" for row in rows)
    order = [*reversed(verdicts.WORDS), "not judged yet"]
    names = {verdicts.NO_EFFECT: "with no effect", verdicts.SMALLER: "replicated (smaller)"}
    said = [f"{counts[word]} {names.get(word, word)}" for word in order if counts[word]]
    return f"Of {len(rows)} {what}: {', '.join(said[:-1])}{' and ' * (len(said) > 1)}{said[-1]}."


def holds(row: dict) -> str:
    """A judged claim as a sentence needs it: ``*replicated*, +1.1 points (0.1 to 2.1)``."""
    return f"*{row['verdict'] or 'no verdict'}*, {claims.said_with_interval(row)}"


def settings(rows: dict[str, tuple]):
    """The setting as a table: for each choice the paper's, ours, and why."""
    import pandas as pd
    from IPython.display import HTML

    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["paper", "ours", "why"])
    html = frame.astype(str).to_html(border=0, classes="settings", justify="left")
    return HTML(f'<div class="settings">{html}</div>')


def source(*functions):
    """The code of functions that were defined further up, as the method has it.

    What lies in kdutils is named, ``losses.VID._link``, and read without importing it.
    """
    from IPython.display import Code

    return Code("\n\n\n".join(map(_text, functions)), language="python")


def _text(function) -> str:
    if not isinstance(function, str):
        return inspect.getsource(getattr(function, "function", function)).rstrip()
    room, *names = function.split(".")
    text = (Path(__file__).parent / f"{room}.py").read_text(encoding="utf-8")
    node = ast.parse(text)
    for name in names:
        node = next(one for one in node.body if getattr(one, "name", None) == name)
    return textwrap.dedent(ast.get_source_segment(text, node, padded=True))


def provenance(study: Study):
    """What the records used say: what they cost, where, by which code and register."""
    from IPython.display import Markdown

    if not study.records:
        return Markdown("No run has been published yet.")
    made, kinds = [record.content["made"] for record in study.records], {}
    for record in study.records:
        kinds.setdefault(record.content["run"], []).append(record.content["made"])
    listed = "; ".join(
        f"{name} {len(of)} ({sum(one['seconds'] for one in of) / len(of) / 60:.1f} minutes each, "
        f"source {', '.join(sorted({one['source'][:8] for one in of}))})"
        for name, of in sorted(kinds.items())
    )
    register = records.register(study.name)
    before = sum(one.get("register") == register for one in made)
    since = "; an older run's: `git show COMMIT:data/claims.csv`" * (before < len(made))
    text = "{0}, torch {versions[torch]}, threads {threads}"
    where = Counter(text.format(records.place(one), **one) for one in made)
    commits = Counter(one["commit"][:12] for one in made)
    failed = sum(record.content["status"] == "failed" for record in study.records)
    what = f"{len(made)}{f' ({failed} diverged)' * (failed > 0)}"
    lines = [
        f"**Runs** {what}, {sum(one['seconds'] for one in made) / 3600:.1f} hours: {listed}.",
        f"**Made on** {'; '.join(f'{name} ({count})' for name, count in where.items())}.",
        f"**Commits** {', '.join(f'{name} ({count})' for name, count in commits.items())}.",
        f"**Claims** {before} of {len(made)} runs began under today's rows of `data/claims.csv` "
        f"(`{register[:12]}`){since}.",
        f"**Again** `python -m kdutils train {study.name} --scale {study.scale}`, then "
        f"`python -m kdutils sync {study.name}`.",
    ]
    return Markdown("\n".join(f"- {line}" for line in lines))


def say(rows: list[dict], named: dict[str, str]):
    """Judged claims as a list, a sentence a claim: the word, the numbers, what was asked."""
    from IPython.display import Markdown

    by_id, lines = {row["id"]: row for row in rows}, []
    for name, question in named.items():
        row = by_id[name]
        weakest = f"; decided by *{row['part']}*" if row["part"] and row["verdict"] else ""
        lines.append(f"- {holds(row).replace('*', '**')}: {question} ({name}){weakest}.")
    return Markdown("\n".join(lines))


def caveats(rows: list[dict]) -> str:
    """At which scale claims were judged, and how many replicated ones survive a correction."""
    of, done = Counter(r["study"] for r in rows), Counter(r["study"] for r in rows if r["verdict"])
    scale_of = {row["study"]: row["scale"] for row in rows if row["verdict"]}
    numbers = {name: path.stem.partition("-")[0] for name, path in notebooks.studies().items()}
    where = {"paper": "at the paper's scale", "laptop": "on smaller stand-ins", None: "not yet"}
    scales = {text: [] for text in where.values()}
    for study, n in of.items():
        part = f" ({done[study]} of {n} claims)" * (0 < done[study] < n)
        scales[where[scale_of.get(study)]].append(numbers.get(study, study) + part)
    said = "; ".join(f"{k}: study {', '.join(sorted(of))}" for k, of in scales.items() if of)
    held = [r["holm"] for r in rows if (r["verdict"] or "").startswith(verdicts.REPLICATED)]
    what = f"{held.count(True)} of the {len(held) - held.count(None)} replicated with a p-value"
    return f"Judged {said}. {what} survive a correction for many claims."
