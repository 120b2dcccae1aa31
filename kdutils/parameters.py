"""Parameters of a notebook, checked before anything is computed.

papermill passes anything through; a notebook therefore states the type and range of each of its
parameters, and the cell after them stops with one sentence when something does not fit.
"""

import difflib
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval, Le, Len, MinLen
from pydantic import AfterValidator, AllowInfNan, BaseModel, ConfigDict, ValidationError

Scale = Literal["smoke", "laptop", "paper"]
Count = Annotated[int, Ge(1)]
Whole = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0), AllowInfNan(False)]
Share = Annotated[float, Interval(ge=0, le=1)]
NotEmpty = MinLen(1)


def _engine(value: str) -> str:
    if value not in ("serial", "processes", "dask") and "://" not in value:
        raise ValueError("it must be serial, processes, dask or the address of a Dask scheduler")
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


__all__ = ["Count", "Distinct", "Engine", "Ge", "Le", "Length", "NotEmpty", "Parameters"]
__all__ += ["Positive", "Rising", "Scale", "Share", "Whole"]


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

        Plain values whose name does not begin with an underscore are taken for parameters.
        Raises :class:`ParameterError` with one sentence that names the first wrong one.
        """
        plain = (str, int, float, bool, list, dict, tuple, type(None))
        given = {
            name: value
            for name, value in variables.items()
            if type(value) in plain and not name.startswith("_") and name not in ("In", "Out")
        }
        return cls.check(given)

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


def unknown(name: str, known: list[str]) -> str:
    """A sentence saying that the parameter does not exist, which it may have meant, and all."""
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown parameter {name!r}{hint} Parameters: {', '.join(known)}."


def _sentence(errors: list[dict], known: list[str]) -> str:
    first = min(errors, key=lambda e: e["type"] != "extra_forbidden")  # a misspelling explains more
    if not first["loc"]:  # a check of several parameters at once: it says which
        return first["msg"].removeprefix("Value error, ")
    name = first["loc"][0]
    if first["type"] == "extra_forbidden":
        return unknown(name, known)
    if first["type"] == "missing":
        return f"parameter {name!r} is missing."
    place = "".join(f"[{part}]" for part in first["loc"][1:] if isinstance(part, int))
    problem = first["msg"].removeprefix("Value error, ")
    problem = problem[0].lower() + problem[1:]
    return f"parameter {name}{place} is {first['input']!r}: {problem}."
