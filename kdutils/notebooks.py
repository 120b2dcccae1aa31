"""Studies as notebooks: where they are, running one, its procedure alone."""

import linecache
import os
import re
import tempfile
from pathlib import Path

from kdutils import files, parameters
from kdutils.records import PROJECT
from kdutils.runs import SCALES, Study

FOLDER = PROJECT / "notebooks"
OUTCOMES = ("index", "verdicts")  # pages that read what the studies' pages store; synced last


class UnknownStudy(ValueError):
    """There is no notebook of that name."""


class NotebookFailed(RuntimeError):
    """A notebook stopped with an error; the message is that error."""


def studies() -> dict[str, Path]:
    """Names of the studies, with their notebooks (``notebooks/<number>-<name>.ipynb``).

    A copy that somebody made beside them (``3-eskd-Copy1.ipynb``) is none.
    """
    found = [p for p in sorted(FOLDER.glob("*.ipynb")) if re.fullmatch("[0-9]+-[a-z]+", p.stem)]
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

    path = find(study)
    known = list(papermill.inspect_notebook(path))
    for name in given:
        if name not in known:
            raise parameters.ParameterError(parameters.unknown(name, known))
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            path, output, given, cwd=PROJECT, kernel_manager_class=_local_kernel()
        )
    except papermill.PapermillExecutionError as error:
        raise NotebookFailed(f"{error.ename}: {error.evalue} (see {output})") from None
    return output


def _local_kernel() -> type:
    """A kernel spoken to through files, which needs no network, not even this machine's."""
    from jupyter_client.manager import AsyncKernelManager

    class LocalKernel(AsyncKernelManager):
        def __init__(self, **options):
            if os.name == "posix":  # in a folder of its own: paths of sockets must be short
                options |= {"transport": "ipc", "ip": f"{tempfile.mkdtemp(prefix='kd')}/k"}
            super().__init__(**options)

    return LocalKernel


def sync(study: str = "") -> list[Path]:
    """Carry the edited ``.md`` of a study or page (of all) over to its ``.ipynb`` and run it.

    What the notebook shows then follows from its source and from published records. A new study's
    ``.ipynb`` is made. When a cell fails, the old ``.ipynb`` stays and :class:`NotebookFailed` says
    which error it was.
    """
    import jupytext
    import nbformat
    from jupytext.combine import combine_inputs_with_outputs
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    texts = {path: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    sources = [path for path, text in texts.items() if "\nkernelspec:" in text]  # notes have none
    sources.sort(key=lambda path: (path.stem in OUTCOMES, path.stem))
    if study:  # and the pages that read its claims
        named = [p for p in sources if study in (p.stem, p.stem.partition("-")[2])]
        if not named:
            find(study)
        sources = [p for p in sources if p in named or p.stem in OUTCOMES]
    paths = [path.with_suffix(".ipynb") for path in sources]
    for path in paths:
        notebook = jupytext.read(path.with_suffix(".md"))
        if path.exists():  # cells that stay keep their ids
            old = nbformat.read(path, as_version=4)
            notebook = combine_inputs_with_outputs(notebook, old, fmt="ipynb")
        client = NotebookClient(
            notebook,
            record_timing=False,
            resources={"metadata": {"path": str(FOLDER)}},
            kernel_manager_class=_local_kernel(),
        )
        try:
            client.execute()
        except CellExecutionError as error:
            text = f"{path.with_suffix('.md').name}: {error.ename}: {error.evalue}"
            raise NotebookFailed(text) from None
        files.write(path, nbformat.writes(notebook) + "\n")
    return paths


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


def notice(study: Study) -> None:
    """Say that a page's records are elsewhere than in the repository, or that it has none."""
    from IPython.display import Markdown, display

    if not study.published:
        return
    here = any(study.published.glob("*.json"))
    if study.published.resolve() != (PROJECT / "data" / "records" / study.name).resolve():
        found = "the records" if here else "no record"
        text = f"This page shows {found} of `{study.published}`, which `$KDUTILS_RECORDS` names."
        display(Markdown(f"**{text}**"))
    elif not here:
        text = "No run has been published yet, so tables and figures below are empty."
        display(Markdown(f"**{text}** The text and the code are complete and can be rerun."))
