"""Studies as notebooks: where they are, running one, its procedure alone, its claims."""

import linecache
import os
from pathlib import Path

from kdutils import parameters
from kdutils.records import PROJECT
from kdutils.runs import SCALES

FOLDER = PROJECT / "notebooks"
CLAIMS = "application/vnd.kdutils.claims+json"  # MIME type of the verdicts in a notebook's output


class UnknownStudy(ValueError):
    """There is no notebook of that name."""


class NotebookFailed(RuntimeError):
    """A notebook stopped with an error; the message is that error."""


def studies() -> dict[str, Path]:
    """Names of the studies, with their notebooks (``notebooks/<number>-<name>.ipynb``)."""
    found = sorted(FOLDER.glob("[0-9]-*.ipynb"))
    return {path.stem.partition("-")[2]: path for path in found}


def find(study: str) -> Path:
    """The notebook of a study; raises :class:`UnknownStudy` naming those that exist."""
    known = studies()
    if study not in known:
        raise UnknownStudy(f"unknown study {study!r}; studies: {', '.join(known) or 'none'}")
    return known[study]


def scale_parameters(study: str, scale: str) -> dict:
    """The parameters in ``notebooks/params/<study>.<scale>.yaml``."""
    import yaml

    if scale not in SCALES:
        raise parameters.ParameterError(f"unknown scale {scale!r}; scales: {', '.join(SCALES)}.")
    return yaml.safe_load((FOLDER / "params" / f"{study}.{scale}.yaml").read_text())


def run(study: str, given: dict, output: Path) -> Path:
    """Run a study's notebook through papermill with a progress bar; the path of the result.

    Names of parameters are checked before a kernel starts, values by the notebook's second cell.
    """
    import papermill
    from jupyter_client.manager import AsyncKernelManager

    class LocalKernel(AsyncKernelManager):
        """Talks to its kernel through files, which needs no network, not even this machine's."""

        def __init__(self, **options):
            super().__init__(**options | ({"transport": "ipc"} if os.name == "posix" else {}))

    path = find(study)
    known = list(papermill.inspect_notebook(path))
    for name in given:
        if name not in known:
            raise parameters.ParameterError(parameters.unknown(name, known))
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            path, output, given, cwd=PROJECT, kernel_manager_class=LocalKernel
        )
    except papermill.PapermillExecutionError as error:
        raise NotebookFailed(f"{error.ename}: {error.evalue} (see {output})") from None
    return output


def procedure(study: str, given: dict) -> dict:
    """The names a notebook defines up to its results: runs parameters and ``define`` cells.

    ``given`` replaces parameters. Nothing is trained: the runs are only defined.
    """
    import nbformat

    path = find(study)
    names = {"__name__": f"kdutils_study_{study}"}
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code" and {"parameters", "define"} & set(tags):
            source = f"{path}#{number}"
            lines = cell.source.splitlines(keepends=True)
            linecache.cache[source] = (len(cell.source), None, lines, source)
            exec(compile(cell.source, source, "exec"), names)
            if "parameters" in tags:
                names.update(given)
    return names


def judged(study: str, scale: str, verdicts: dict) -> None:
    """Show a study's claims in a table: the paper's value, ours with its interval, the verdict.

    ``verdicts`` holds a :class:`kdutils.verdicts.Verdict` for every claim id. The stored output
    carries the numbers as data too, for :func:`claims`.
    """
    from IPython.display import display

    table = _claims_table().query("study == @study").set_index("id")
    if set(verdicts) != set(table.index):
        odd = sorted(set(verdicts) ^ set(table.index))
        raise ValueError(f"claims and verdicts of {study} differ in {', '.join(odd)}")
    shown = table[["statement", "quantity", "paper_value"]].fillna("–")
    shown.columns = ["the paper says", "measured as", "paper"]
    shown["ours [95 % interval]"] = [str(verdicts[name]) for name in shown.index]
    shown["seeds"] = [verdicts[name].seeds for name in shown.index]
    shown["verdict"] = [verdicts[name].verdict or "no record yet" for name in shown.index]
    rows = [
        {"id": name, "scale": scale if found.verdict else None, **found.as_dict()}
        for name, found in verdicts.items()
    ]
    html = shown.rename_axis(None).to_html(border=0, classes="claims", justify="left")
    bundle = {"text/html": f'<div class="claims">{html}</div>', "text/plain": shown.to_string()}
    display(bundle | {CLAIMS: rows}, raw=True)


def _claims_table():
    import pandas as pd

    table = pd.read_csv(PROJECT / "data" / "claims.csv", dtype=str).astype(object)
    return table.where(table.notna(), None)


def claims() -> list[dict]:
    """Every claim of ``data/claims.csv`` with what the stored notebooks found of it.

    Keys: id, study, paper_value, estimate, low, high, seeds, scale, verdict; None where there is
    no record yet.
    """
    import nbformat

    found = {}
    for path in studies().values():
        for cell in nbformat.read(path, as_version=4).cells:
            for output in cell.get("outputs", []):
                found |= {row["id"]: row for row in output.get("data", {}).get(CLAIMS, [])}
    empty = dict.fromkeys(("estimate", "low", "high", "seeds", "scale", "verdict"))
    return [
        {"id": row.id, "study": row.study, "paper_value": row.paper_value, **empty}
        | found.get(row.id, {})
        for row in _claims_table().itertuples()
    ]
