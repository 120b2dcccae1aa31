"""Studies as notebooks: where they are, running one, its procedure alone, training by it."""

import io
import linecache
import logging
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

from kdutils import files, parameters, spread
from kdutils.records import PROJECT
from kdutils.runs import RunFailed, RunFunction, Study

FOLDER = PROJECT / "notebooks"
OUTCOMES = ("index", "together", "verdicts")  # they read what studies' pages store; synced last
DIED = "was killed, often for want of memory; what is finished is kept, the same command goes on"
KERNEL_FOLDERS = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")  # else in $HOME


class UnknownStudy(ValueError):
    """There is no notebook of that name."""


class NotebookFailed(RuntimeError):
    """A notebook stopped with an error; the message is that error."""


def studies() -> dict[str, Path]:
    """Names of the studies, with their notebooks (``notebooks/<number>-<name>.ipynb``).

    A copy that somebody made beside them (``3-eskd-Copy1.ipynb``) is none.
    """
    found = [p for p in sorted(FOLDER.glob("*.ipynb")) if re.fullmatch("[0-9]+-[a-z]+", p.stem)]
    if not found:
        why = "install kdutils from a clone of the compendium, with pip install -e ."
        raise UnknownStudy(f"no studies in {FOLDER}: {why}")
    return {path.stem.partition("-")[2]: path for path in found}


def find(study: str) -> Path:
    """The notebook of a study; raises :class:`UnknownStudy` naming those that exist."""
    known = studies()
    if study not in known:
        raise UnknownStudy(f"unknown study {study!r}; studies: {', '.join(known)}")
    return known[study]


def outputs(path: Path, tag: str = "") -> list[dict]:
    """What the cells, or those of a tag, have put out in a stored notebook, by kind of data.

    Raises :class:`NotebookFailed` for a damaged one.
    """
    import nbformat

    try:
        cells = nbformat.read(path, as_version=4).cells
        tagged = [cell for cell in cells if not tag or tag in cell.metadata.get("tags", [])]
        return [put.get("data", {}) for cell in tagged for put in cell.get("outputs", [])]
    except Exception:  # what is no notebook fails in many ways
        raise NotebookFailed(f"{path} is damaged: it is no notebook") from None


def scale_parameters(study: str, scale: str) -> dict:
    """The parameters in ``notebooks/params/<study>.<scale>.yaml``."""
    if scale not in (known := parameters.Scale.__args__):
        raise parameters.ParameterError(f"unknown scale {scale!r}; scales: {', '.join(known)}.")
    path = FOLDER / "params" / f"{study}.{scale}.yaml"
    return parameters.from_yaml(path.read_text(encoding="utf-8"), path.name)


def run(study: str, given: dict, output: Path) -> Path:
    """Run a study's notebook through papermill with a progress bar; the path of the result.

    Names of parameters are checked before a kernel starts, values by the notebook's second cell.
    """
    import papermill

    path = find(study)
    known = list(papermill.inspect_notebook(path))
    if odd := [name for name in given if name not in known]:
        raise parameters.ParameterError(parameters.unknown(odd[0], known))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
    except OSError as error:
        why = f"{output} cannot be written ({error.strerror}): --output takes another folder"
        raise NotebookFailed(why) from None
    with _kernel() as kernel:
        options = {"cwd": PROJECT, "kernel_manager_class": kernel}
        try:
            papermill.execute_notebook(path, output, given, **options)
        except papermill.PapermillExecutionError as error:
            raise NotebookFailed(f"{error.ename}: {error.evalue} (see {output})") from None
    return output


@contextmanager
def _kernel() -> Iterator[type]:
    """A kind of kernel that is this Python's and leaves nothing behind, not even when killed.

    It is spoken to through files, which needs no network, not even this machine's. Sockets and
    all that it keeps for a while lie in one folder. On leaving, what is left of its processes is
    ended, and the folder removed; of one who was killed, when the next starts or ends. The user's
    settings of IPython and Matplotlib do not count: what a notebook shows is the same for all.
    """
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    usual = tempfile.gettempdir()  # one that can be written
    place = usual if len(os.fsencode(usual)) < 60 else "/tmp"  # sockets' paths: about 100 bytes
    files.sweep(place, "kd-*", hours=30 * 24)
    folder, started = Path(tempfile.mkdtemp(prefix=f"kd-{files.owner()}-", dir=place)), []

    class Kernel(AsyncKernelManager):
        kernel_spec = KernelSpec(**get_kernel_dict())

        def __init__(self, **options):
            own = {"connection_file": f"{folder}/connection.json", "transport": "ipc"}
            super().__init__(**options | own | {"ip": f"{folder}/k"})

        async def _async_launch_kernel(self, command, **options):
            own = dict.fromkeys((*KERNEL_FOLDERS, "TMPDIR"), str(folder))
            own["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
            options["env"] = (options.get("env") or dict(os.environ)) | own
            await super()._async_launch_kernel(command, **options)
            started.append(self.provisioner.process)

    try:
        yield Kernel
    except KeyboardInterrupt:  # nobody will ask what became of the cell
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        raise
    except RuntimeError as error:  # nbclient's or jupyter_client's
        if not str(error).startswith("Kernel died"):
            raise
        why = "did not start; why is said above" if "replying" in str(error) else DIED
        raise NotebookFailed(f"the notebook's kernel {why}") from None
    finally:
        for process in started:
            _end(process)
        shutil.rmtree(folder, ignore_errors=True)
        # A killed command's kernel lives for a second or more, and may write after the first sweep.
        files.sweep(folder.parent, "kd-*", hours=30 * 24)


def _end(process) -> None:
    """End a kernel's process group, which its workers belong to, politely first."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with suppress(OSError):  # none is left
            os.killpg(process.pid, signum)
            for _ in range(30):
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.1)


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

    files.sweep(FOLDER)
    pages = sorted(FOLDER.glob("*.md"), key=lambda path: (path.stem in OUTCOMES, path.stem))
    pages = [p for p in pages if "\nkernelspec:" in p.read_text(encoding="utf-8")]  # no notes
    named = [p for p in pages if study in ("", p.stem, p.stem.partition("-")[2])]
    if not named:
        find(study) if study else studies()
    wanted = [p for p in pages if p in named or p.stem in OUTCOMES]  # these read its claims
    paths = [path.with_suffix(".ipynb") for path in wanted]
    for path in paths:
        notebook, before = jupytext.read(path.with_suffix(".md")), set()
        if path.exists():  # cells that stay keep their ids
            old = nbformat.read(path, as_version=4)
            before = {cell.source for cell in old.cells if _pictured(cell)}
            notebook = combine_inputs_with_outputs(notebook, old, fmt="ipynb")
        options = {"resources": {"metadata": {"path": str(FOLDER)}}, "record_timing": False}
        with _kernel() as kernel:
            client = NotebookClient(notebook, kernel_manager_class=kernel, **options)
            try:
                with client.setup_kernel():  # client.execute() would take signals for itself
                    told = client.wait_for_reply(client.kc.kernel_info())["content"]
                    notebook.metadata["language_info"] = told["language_info"]
                    for number, cell in enumerate(notebook.cells):
                        count = client.code_cells_executed + 1
                        client.execute_cell(cell, number, execution_count=count)
            except CellExecutionError as error:
                why = f"{path.stem}.md: {error.ename}: {error.evalue}"
                raise NotebookFailed(why) from None
        for cell in notebook.cells:
            if cell.source in before and not _pictured(cell):
                why = f"a figure is gone, of the cell that begins {cell.source[:40]!r}"
                raise NotebookFailed(f"{path.stem}.md: {why}; if that is meant, delete {path.name}")
        files.write(path, nbformat.writes(notebook) + "\n")
    return paths


def _pictured(cell) -> bool:
    return any("image/png" in put.get("data", {}) for put in cell.get("outputs", []))


def procedure(study: str, given: dict, also: tuple = (), begin: Callable | None = None) -> dict:
    """The names a study's ``.md`` defines: runs its cells tagged ``parameters`` and ``define``.

    ``given`` replaces parameters. Nothing is trained: the runs are only defined, unless cells with
    a tag in ``also`` train; ``begin(names)`` is called before the first of those. What cells
    would display is not shown.
    """
    import jupytext

    path = find(study).with_suffix(".md")  # the edited one: its .ipynb may be behind
    names = {"__name__": f"kdutils_study_{study}", "display": lambda *_, **__: None}
    for number, cell in enumerate(jupytext.read(path).cells):
        tags = {"parameters", "define", *also} & set(cell.metadata.get("tags", []))
        if cell.cell_type == "code" and tags:
            if begin and tags & set(also):
                begin = begin(names)
            source = f"{path}#{number}"
            linecache.cache[source] = len(cell.source), None, cell.source.splitlines(True), source
            exec(compile(cell.source, source, "exec"), names)
            if "parameters" in tags:
                names.update(given)
    return names


def train(study: str, given: dict, workers: int | None = None, only: str = "") -> spread.Plan:
    """Train what has no record, in this Python, by a study's cells tagged ``runs``.

    With ``only``, runs of that name and what they need. What there is to train is found by going
    through the cells once without training, as far as they lead, and said. Returns what was done.
    """
    plan, begun = spread.Plan(dry=True), []

    def begin(names):
        begun.append(names)
        known = [name for name, one in names.items() if isinstance(one, RunFunction)]
        if only and only not in known:
            raise NotebookFailed(f"{study} has no run {only!r}; its runs: {', '.join(known)}")
        names["study"].workers, names["study"].only, names["study"].plan = workers, only, plan

    given = given | {"train_missing": True}
    with suppress(Exception), redirect_stdout(io.StringIO()) as said:  # it will come again below
        procedure(study, given, ("runs",), begin)
    print("".join(re.findall(r".*; set aside as .*\n", said.getvalue())), end="")  # this will not
    plan.dry = False
    try:
        procedure(study, given, ("runs",), begin)
    except Exception as error:
        told = isinstance(error, RunFailed | NotebookFailed | parameters.ParameterError)
        if told or plan.training or not only:
            raise
        why = f"going on needs others first ({type(error).__name__}: {error})"
        raise NotebookFailed(f"{plan.trained} runs of {only} were trained; {why}") from error
    if not begun:
        raise NotebookFailed(f"{find(study).stem}.md has no cell tagged runs")
    return plan


def notice(study: Study) -> None:
    """Say that a page's records are elsewhere than in the repository, or that it has none."""
    from IPython.display import Markdown, display

    if not study.published:
        return
    here, home = any(study.published.glob("*.json")), PROJECT / "data" / "records" / study.name
    if study.published.resolve() != home.resolve():
        found = f"{'the records' if here else 'no record'} of `{study.published}`"
        display(Markdown(f"**This page shows {found}, which `$KDUTILS_RECORDS` names.**"))
    elif not here:
        text = "No run has been published yet, so tables and figures below are empty."
        display(Markdown(f"**{text}** The text and the code are complete and can be rerun."))
