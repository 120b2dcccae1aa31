"""Parameters of a notebook, checked before anything is computed.

papermill passes anything through; a notebook therefore states the type and range of each of its
parameters, and the cell after them stops with one sentence when something does not fit.
"""

import ast
import builtins
import difflib
import importlib.util
import re
from collections.abc import Iterable
from typing import Annotated, Literal

import pydantic
from annotated_types import Ge, Gt, Interval, Len, MinLen
from annotated_types import Le as Le  # for notebooks
from pydantic import AfterValidator, AllowInfNan, BaseModel, ConfigDict, ValidationError

Scale = Literal["smoke", "laptop", "paper"]
Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0), AllowInfNan(False)]
Share = Annotated[float, Interval(ge=0, le=1)]
NotEmpty = MinLen(1)


def _engine(value: str) -> str:
    dask = value == "dask" or "://" in value
    if not dask and value not in ("serial", "processes"):
        raise ValueError("it must be serial, processes, dask or the address of a Dask scheduler")
    if dask and importlib.util.find_spec("distributed") is None:
        raise ValueError("it needs the extra `cluster` (pip install -e '.[cluster]')")
    return value


def _distinct(values: list) -> list:
    if len({repr(value) for value in values}) < len(values):
        raise ValueError("its values must differ from one another")
    return values


def _rising(values: list) -> list:
    if sorted(set(values)) != values:
        raise ValueError("its values must rise")
    return values


Engine = Annotated[str, AfterValidator(_engine)]
Distinct, Rising = AfterValidator(_distinct), AfterValidator(_rising)


def Length(n: int) -> Len:
    """A list of exactly ``n``."""
    return Len(n, n)


class ParameterError(ValueError):
    """A parameter is unknown, absent, of the wrong type or out of range."""

    def _render_traceback_(self):  # IPython shows this in place of a traceback
        return [f"ParameterError: {self}"]


class Parameters(BaseModel):
    """Base of a notebook's parameters: names with types, no defaults, nothing else allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    @classmethod
    def read(cls, variables: dict):
        """Check the notebook's variables (``globals()``), after its parameters cell and imports.

        Where IPython tells what was run (``In``), the names of later cells and of the user's own
        startup files do not count, so a parameter can be changed as often as one likes. Elsewhere
        plain values whose name does not begin with an underscore are taken for parameters.
        Raises :class:`ParameterError` with one sentence that names the first wrong one.
        """
        if "In" in variables:
            names = cls.model_fields.keys() | _set_in(variables["In"], cls.model_fields.keys())
        else:
            plain = (str, int, float, bool, list, dict, tuple, type(None))
            names = {n for n, v in variables.items() if type(v) in plain and not n.startswith("_")}
        return cls.check({name: value for name, value in variables.items() if name in names})

    @classmethod
    def check(cls, given: dict):
        """The parameters ``given`` by name, validated; see :meth:`read`."""
        try:
            return cls(**given)
        except ValidationError as error:
            raise ParameterError(_sentence(error.errors(), list(cls.model_fields))) from None


class OfStudy(Parameters):
    """What every study's notebook asks for, beside its own sizes."""

    scale: Scale
    seeds: Annotated[list[Whole], NotEmpty, Distinct]
    train_missing: bool
    engine: Engine
    threads: Count

    @pydantic.model_validator(mode="after")
    def sized(self):
        """In a notebook the scale is a label: smoke without its sizes would train for days."""
        if self.scale == "smoke" and not self.train_missing:
            why = "scale smoke has its sizes in notebooks/params: python -m kdutils run STUDY."
            raise ValueError(why)
        return self


def from_yaml(text: str, where: str):
    """A value written as YAML, in which 1e-3 is a number; ``where`` names what cannot be read."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.1 wants 1.0e-3."""

    power = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", power, list("-+0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "it has a character that cannot be"
        raise ParameterError(f"{where}: not a value in YAML ({problem}).") from None


def _set_in(cells: list[str], known: Iterable[str]) -> set[str]:
    """The names set by the last cell of parameters, and by the last one that papermill put in.

    A cell of parameters does nothing but set names to values, a known one among them; papermill's
    begins with a comment, and may hold nothing but a misspelling.
    """
    found = {}
    for cell in cells:
        try:
            tree = ast.parse(cell)
        except SyntaxError:
            continue
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        names = {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
        read = {node.id for node in nodes} - names - {*dir(builtins)}  # a type, float("inf")
        sets = all(isinstance(line, ast.Assign | ast.AnnAssign) for line in tree.body)
        by_papermill = cell.startswith("# Parameters\n")
        if sets and not read and (by_papermill or names & set(known)):
            found[by_papermill] = names
    return set().union(*found.values())


def unknown(name: str, known: list[str]) -> str:
    """A sentence saying that the parameter does not exist, which it may have meant, and all."""
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown parameter {name!r}{hint} Parameters: {', '.join(known)}."


def _sentence(errors: list[dict], known: list[str]) -> str:
    first = min(errors, key=lambda e: e["type"] != "extra_forbidden")  # a misspelling explains more
    problem = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # a check of several parameters at once: it says which
        return problem
    name = first["loc"][0]
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        return unknown(name, known)
    if first["type"] == "missing":
        return f"parameter {name!r} is missing."
    place = "".join(f"[{part!r}]" for part in first["loc"][1:])
    return f"parameter {name}{place} is {first['input']!r}: {problem[0].lower() + problem[1:]}."
