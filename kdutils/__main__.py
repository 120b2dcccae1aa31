"""The command line: run, train, data, publish, verify, sync, claims, concierge."""

import json
import random
import re
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from kdutils import claims as claims_room
from kdutils import data, notebooks, parameters, pictures, records, runs
from kdutils.concierge import program

PLAIN = {"no_args_is_help": True, "pretty_exceptions_enable": False, "add_completion": False}
app = typer.Typer(help="Rerun the compendium's studies and read their records.", **PLAIN)
data_app = typer.Typer(help="Datasets: which there are, where they lie, getting them.")
app.add_typer(data_app, name="data", no_args_is_help=True)
app.add_typer(program.app, name="concierge", no_args_is_help=True)

Study = Annotated[str, typer.Argument(help="A study's name, e.g. eskd.")]
AnyStudy = Annotated[str, typer.Argument(help="A study's name; all if left out.")]
Scale = Annotated[str, typer.Option(help="smoke, laptop or paper.")]
Engine = Annotated[str, typer.Option(help="serial, processes, dask or a Dask scheduler's address.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Runs side by side; else what fits.")]
Given = Annotated[list[str], typer.Option("--parameter", "-p", help="name=value, value in YAML.")]
EXECUTED = Path("_build/notebooks")
# How Python says, in a notebook's kernel too, that something of the extra `train` is not there.
ABSENT = "No module named '(filelock|lightning_fabric|optuna|safetensors|sklearn|torch)"


@app.command()
def run(
    study: AnyStudy = "",
    scale: Scale = "smoke",
    engine: Engine = "",
    parameter: Given = (),
    output: Annotated[Path, typer.Option(help="Folder for the executed notebooks.")] = EXECUTED,
):
    """Run a study's notebook at a scale, training what has no record; prints where it is."""
    given = dict(map(_parameter, parameter)) | ({"engine": engine} if engine else {})
    for name in [study] if study else notebooks.studies():
        executed = output / f"{notebooks.find(name).stem}.{scale}.ipynb"
        print(notebooks.run(name, _values(name, scale, given), executed))


@app.command()
def train(
    study: Study,
    scale: Scale,
    workers: Workers = None,
    only: Annotated[str, typer.Option(help="Train runs of this name, and what they need.")] = "",
    parameter: Given = (),
):
    """Train what has no record, without Jupyter; interrupted, the same command goes on."""
    notebooks.find(study)
    given = _values(study, scale, dict(map(_parameter, parameter)))
    print(notebooks.train(study, given, workers, only).summary())


def _values(study: str, scale: str, given: dict) -> dict:
    """A scale's parameters and those given; more seeds than registered would be refused later."""
    values = notebooks.scale_parameters(study, scale) | given
    known = [one.seeds for one in claims_room.registered().values() if one.study == study]
    if known and isinstance(values.get("seeds"), list) and len(values["seeds"]) > max(known):
        why = f"seeds has {len(values['seeds'])}; data/claims.csv registers {max(known)}."
        raise parameters.ParameterError(why)
    return values


def _parameter(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise parameters.ParameterError(f"-p takes name=value, not {text!r}.")
    return name, parameters.from_yaml(value, f"-p {text}")


@data_app.command("list")
def data_list():
    """The known datasets, and which of them are on this machine."""
    for name, source in data.sources().items():
        here = name == "digits" or (data.folder() / f"{name}.npz").exists()
        print(f"{name:10} {'here' if here else 'absent':7} {source['title']}")
    print(f"their folder ($KDUTILS_DATA, else the user's cache): {data.folder()}")


@data_app.command("get")
def data_get(name: Annotated[str, typer.Argument(help="cifar10 or cifar100.")]):
    """Download a dataset through torchvision, check it, and keep it as one .npz file."""
    if "how" in data.sources().get(name, {}):
        raise data.DataError(f"{name} cannot be downloaded: {data.sources()[name]['how']}")
    print(data.get(name))


@data_app.command("import")
def data_import(
    path: Annotated[Path, typer.Argument(help="A folder or zip archive of cats and dogs.")],
    size: Annotated[int, typer.Option(min=8, help="Height and width in pixels.")] = 224,
):
    """Decode Kaggle's Dogs vs. Cats once, and keep it as dogs-vs-cats.npz."""
    path, skipped = pictures.collect("dogs-vs-cats", path, size)
    print(*map("skipped {}".format, skipped), f"{len(skipped)} pictures skipped", path, sep="\n")


@app.command()
def publish(study: Study):
    """Copy this machine's records of a study into data/records, to be committed."""
    notebooks.find(study)
    written = records.publish(study)
    print(*written, f"{len(written)} records published", sep="\n")


@app.command()
def verify(
    study: Study,
    sample: Annotated[int, typer.Option(min=1, help="How many records, drawn at random.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Makes the draw repeatable.")] = None,
    key: Annotated[str, typer.Option(help="Verify the record of this key instead.")] = "",
):
    """Train published runs again from nothing, teachers included, and compare.

    Where processor, threads, precision and versions are the record's, every number and weight
    must be the same; elsewhere the last accuracies may differ by at most 0.03.
    """
    notebooks.find(study)
    chosen = [c for c in records.published(study) if c["key"].startswith(key)]
    if not chosen:
        wanted = f"{study} with key {key!r}" if key else study
        raise runs.RunFailed(f"no published record of {wanted} in {records.published_folder()}")
    if not key:
        chosen = random.Random(seed).sample(chosen, min(sample, len(chosen)))
    sound = True
    for old in chosen:
        minutes = old["made"]["seconds"] / 60
        print(f"{old['run']}-{old['key']}: took {minutes:.1f} minutes, its teachers aside")
        with tempfile.TemporaryDirectory() as folder:
            names = notebooks.procedure(study, {"scale": old["scale"], "train_missing": True})
            names["study"].folder, names["study"].published = Path(folder), None
            new = names[old["run"]].compute(old["arguments"]).content
        good, sentence = records.compare(old, new)
        sound &= good
        print(f"{old['run']}-{old['key']}: {sentence}")
    raise typer.Exit(0 if sound else 1)


@app.command()
def sync(study: AnyStudy = ""):
    """Carry an edited notebook's .md over to its .ipynb, and run that from published records."""
    print(*notebooks.sync(study), sep="\n")


@app.command()
def claims(
    as_json: Annotated[bool, typer.Option("--json", help="As a list of JSON objects.")] = False,
):
    """Every registered claim with its verdict, from the notebooks' stored values."""
    found = claims_room.of_notebooks()
    as_text = json.dumps(found, indent=1, ensure_ascii=False)
    print(as_text if as_json else "\n".join(map(claims_room.line, found)))


def main():
    """Run the command line; what a user can mend is said in one sentence."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without our letters
    received = []

    def stop(signum, _):  # it ends what runs as an error does, so that this ends what it started
        received.append(signum)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, stop)
    try:
        app()
    except BaseException as error:
        if received and getattr(error, "code", True):  # whatever came of it on the way here
            what_now = "what is finished is kept (not at smoke), and the same command goes on"
            typer.echo(f"kdutils: stopped; {what_now}", err=True)
            raise SystemExit(128 + received[0]) from None
        hint = '; training needs pip install -e ".[train]"' * bool(re.search(ABSENT, str(error)))
        if not (hint or isinstance(error, OSError) or type(error).__module__[:8] == "kdutils."):
            raise  # only errors of our own say what a user can mend
        typer.echo(f"kdutils: {error}{hint}", err=True)
        raise SystemExit(1 if isinstance(error, OSError) else 2) from None


if __name__ == "__main__":
    main()
