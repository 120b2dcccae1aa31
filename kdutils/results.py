"""From runs' rows to values by seed that know where they came from.

A frame is what :meth:`runs.Study.map` returns: one row a run and epoch, with the run's ``key``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

import pandas as pd


@dataclass(frozen=True)
class Found:
    """A value a seed, and the numbers in records that it was made of.

    ``values`` is indexed by seed. ``sources`` holds, for each seed, triples of a run's key, a
    field of its results or arguments (a path such as ``history/9/test_accuracy``; ``*`` stands for
    all) and the number found there. ``how`` is ``value``, ``difference``, ``ratio`` or a function's
    name.
    """

    values: pd.Series
    sources: dict[int, list[tuple]]
    how: str = "value"

    def __sub__(self, other: "Found") -> "Found":
        return self._with(other, self.values - other.values, "difference")

    def __truediv__(self, other: "Found") -> "Found":
        return self._with(other, self.values / other.values, "ratio")

    def _with(self, other, values, how):
        plain = self.how == other.how == "value"
        name = how if plain else f"{how} of {self.how if self.how != 'value' else other.how}"
        values = values.dropna() if plain else values.dropna().round(10)
        return Found(values, {s: self.sources[s] + other.sources[s] for s in values.index}, name)

    def as_dict(self) -> dict:
        """Plain numbers, seeds as text, as they are stored in a notebook's output.

        By the mean a changed value is noticed, even one that only a notebook's function makes.
        """
        seeds = sorted(self.values.index)
        values = {str(seed): float(self.values[seed]) for seed in seeds}
        found = {"how": self.how, "mean": mean(values.values()) if seeds else None}
        sources = {str(seed): [list(source) for source in self.sources[seed]] for seed in seeds}
        return found | {"values": values, "from": sources}


NOTHING = Found(pd.Series(dtype=float), {})


def rows_of(frame: pd.DataFrame, **chosen) -> pd.DataFrame:
    """The rows in which the named columns have these values; one value, or any of a list.

    Raises KeyError for a column that rows do not have; a frame without rows has none.
    """
    for name, value in chosen.items() if len(frame) else ():
        every = isinstance(value, list | tuple | range)
        frame = frame[frame[name].isin(value if every else [value])]
    return frame


def final(frame: pd.DataFrame, path: str = "test_accuracy", **chosen) -> Found:
    """A column's value after the last epoch, by seed, of the rows chosen.

    ``path`` may lead into a column of dicts: ``engines/onnxruntime/accuracy``.
    Raises ValueError where a seed has two runs.
    """
    rows = rows_of(frame, **chosen)
    if "epoch" in rows:
        rows = rows[rows.epoch.notna()].sort_values("epoch").groupby("key").tail(1)
    if not len(rows):
        return NOTHING
    if len(twice := rows.seed[rows.seed.duplicated()]):
        which = f"seed {twice.iloc[0]} has several runs"
        raise ValueError(f"{which}; name what sets them apart ({chosen})")
    found = {row.seed: _at(row, path, frame) for _, row in rows.iterrows()}
    values = {seed: float(value) for seed, (value, _) in found.items()}
    return Found(pd.Series(values), {seed: [source] for seed, (_, source) in found.items()})


def _at(row: pd.Series, path: str, frame: pd.DataFrame) -> tuple:
    """What ``path`` leads to in a row of the frame, and where it stands in the run's record."""
    column, *rest = path.split("/")
    value = row[column]
    for name in rest:
        value = value[int(name)] if isinstance(value, list) else value[name]
    in_history = "epoch" in row and column in frame.attrs.get("history", [])
    field = f"history/{int(row.epoch) - 1}/{path}" if in_history else path
    return value, (row.key, field, getattr(value, "item", lambda: value)())


def of_rows(function: Callable[..., float], frame: pd.DataFrame, by: str, *paths: str) -> Found:
    """``function`` of a list for each path, over the last epoch's rows that ``by`` has in common.

    For what is judged over settings: ``by``, a column of numbers, takes the seed's place. Paths are
    those of :func:`final` and may lead to lists. What is not finite drops.
    """
    values, sources = {}, {}
    rows = frame.loc[frame.groupby("key").epoch.idxmax()] if len(frame) else frame
    for name, group in rows.groupby(by) if len(rows) else ():
        every = [[_at(row, path, frame) for _, row in group.iterrows()] for path in paths]
        value = round(float(function(*([v for v, _ in one] for one in every))), 10)
        if math.isfinite(value):
            values[name], sources[name] = value, [s for one in every for _, s in one]
    return Found(pd.Series(values, dtype=float), sources, function.__name__)


def curve(frame: pd.DataFrame, column: str = "test_accuracy", **chosen) -> dict[int, tuple]:
    """A column's values after every epoch, and their source, by seed of the rows chosen.

    Raises ValueError where a seed has two runs.
    """
    frame, found = rows_of(frame, **chosen), {}
    for (seed, key), rows in frame.groupby(["seed", "key"]) if len(frame) else ():
        if seed in found:
            raise ValueError(f"seed {seed} has several runs; name what sets them apart ({chosen})")
        values = rows.sort_values("epoch")[column].tolist()
        found[seed] = (values, (key, f"history/*/{column}", values))
    return found


def three_accuracies(frame: pd.DataFrame) -> dict[str, float]:
    """Means over runs of test accuracy: last epoch, chosen on held-out pictures, best on test.

    Runs that diverged, which have none, are left out; of no run the means are NaN.
    """
    sound = frame[frame.test_accuracy.notna()].sort_values("epoch")
    ways = {
        "last epoch": lambda rows: rows.test_accuracy.iloc[-1],
        "chosen on held-out": lambda rows: rows.test_accuracy[rows.validation_accuracy.idxmax()],
        "best on test (optimistic)": lambda rows: rows.test_accuracy.max(),
    }
    runs = [rows.reset_index() for _, rows in sound.groupby("key")]
    return {name: pd.Series(map(way, runs), dtype=float).mean() for name, way in ways.items()}


def of_curves(function: Callable[..., float], *curves: dict[int, tuple]) -> Found:
    """``function`` of a list for each of the curves, seed by seed; its name says how."""
    each = [{s: (values, [source]) for s, (values, source) in c.items()} for c in curves]
    return Found(*_by_seed(function, each), function.__name__)


def made_of(function: Callable[..., float], *founds: Found) -> Found:
    """``function`` of one number for each of the founds, seed by seed; its name says how.

    For what is neither a difference nor a ratio of two. Seeds that one of them lacks drop.
    """
    each = [{s: (one.values[s], one.sources[s]) for s in one.values.index} for one in founds]
    inner = {found.how for found in founds if len(found.values)} - {"value"}
    name = " of ".join([function.__name__, *sorted(inner)])
    return Found(*_by_seed(function, each), name)


def _by_seed(function: Callable[..., float], each: list[dict]) -> tuple[pd.Series, dict]:
    """``function`` of what each has at a seed that all have, and all the sources of it."""
    seeds = sorted(set.intersection(*map(set, each)))
    values = {s: round(float(function(*(one[s][0] for one in each))), 10) for s in seeds}
    sources = {s: [source for one in each for source in one[s][1]] for s in seeds}
    return pd.Series(values, dtype=float), sources
