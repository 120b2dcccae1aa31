"""Copies of a notebook page that leave the book: one for Colab, and all of it in one archive.

Jupyter Book loads this as a local extension of Sphinx, see ``_config.yml``.
"""

import os
import shutil
import zipfile
from pathlib import Path

import nbformat
from published import repository

GITHUB = "https://github.com"  # Colab opens no other
COLAB = "https://colab.research.google.com/github/{}/blob/colab/{}.ipynb"
FIRST = Path(__file__).with_name("colab.py")  # the cell that a copy for Colab begins with


def pages(app) -> dict[str, Path]:
    """The notebooks of the book, by the name of their page."""
    found = {name: Path(app.env.doc2path(name)) for name in sorted(app.env.found_docs)}
    return {name: path for name, path in found.items() if path.suffix == ".ipynb"}


def built_from(app) -> tuple[str, str] | None:
    """Repository and commit that Colab is to fetch; None where nobody could."""
    name, commit = repository(Path(app.confdir)), os.environ.get("GITHUB_SHA")
    there = os.environ.get("GITHUB_SERVER_URL", GITHUB) == GITHUB
    return (name, commit) if name and commit and there else None


def parts(path: Path) -> list[Path]:
    """What it takes to run a page anew: its notebook, its text, its parameters."""
    study = path.stem.partition("-")[2] or path.stem
    sizes = sorted((path.parent / "params").glob(f"{study}.*.yaml"))
    return [path, path.with_suffix(".md"), *sizes]


def pack(path: Path, archive: Path) -> None:
    """Write a page's parts into an archive, named as in the repository; always the same bytes."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for part in parts(path):
            entry = zipfile.ZipInfo(part.relative_to(path.parent.parent).as_posix())
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # whatever system this is
            entry.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(entry, part.read_bytes())


def for_colab(path: Path, where: tuple[str, str]) -> str:
    """The notebook with its outputs, and before them the cell that fetches the repository."""
    notebook, (name, commit) = nbformat.read(path, as_version=4), where
    source = FIRST.read_text(encoding="utf-8").rstrip().replace("COMMIT", commit)
    source = source.replace("REPOSITORY", f"{GITHUB}/{name}")
    notebook.cells.insert(0, nbformat.v4.new_code_cell(source, id="colab"))
    return nbformat.writes(notebook) + "\n"


def offer(app, page, template, context, doctree):
    """A page's buttons: its archive in place of the notebook alone, Colab beside Binder."""
    if page not in pages(app):
        return
    name, where = pages(app)[page].stem, built_from(app)
    groups = {button.get("label"): button for button in context["header_buttons"]}
    whole = {
        "type": "link",
        "text": ".zip",
        "url": context["pathto"](f"_downloads/{name}.zip", 1),
        "tooltip": "Download this page's notebook, text and parameters",
        "icon": "fas fa-file-zipper",
        "label": "download-all-button",
    }
    downloads = groups["download-buttons"]["buttons"]
    rest = [button for button in downloads if button.get("label") != "download-source-button"]
    downloads[:] = [whole, *rest]
    if where:
        colab = {
            "type": "link",
            "text": "Colab",
            "url": COLAB.format(where[0], name),
            "tooltip": "Launch on Colab",
            "icon": "_static/images/logo_colab.png",
        }
        groups["launch-buttons"]["buttons"].append(colab)


def write(app, failed):
    """The archives into the book, and beside it what CI puts on the branch ``colab``.

    What Sphinx copied of a notebook is removed: the archive has it at two thirds of the size.
    """
    if failed or app.builder.format != "html":
        return
    downloads, colab = Path(app.outdir) / "_downloads", Path(app.outdir).parent / "colab"
    shutil.rmtree(colab, ignore_errors=True)
    downloads.mkdir(exist_ok=True)
    for name, path in pages(app).items():
        pack(path, downloads / f"{path.stem}.zip")
        (Path(app.outdir) / "_sources" / f"{name}.ipynb").unlink(missing_ok=True)
        if where := built_from(app):
            colab.mkdir(exist_ok=True)
            copy = for_colab(path, where)
            (colab / path.name).write_text(copy, encoding="utf-8", newline="\n")


def setup(app):
    app.connect("html-page-context", offer, priority=600)  # after the theme's own buttons
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
