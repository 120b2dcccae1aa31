"""The recurring plots. They know DataFrames, one row a run (and epoch), and nothing else."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.ticker import MaxNLocator

from kdutils.verdicts import interval


def style() -> None:
    """Colours that stay apart for colour-blind readers, and letters that survive a phone."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=1.05)
    plt.rcParams |= {"figure.figsize": (7, 4.2), "figure.dpi": 110, "savefig.bbox": "tight"}


def lines(frame: pd.DataFrame, x: str, y: str, hue: str, ax: plt.Axes | None = None) -> plt.Axes:
    """One thin line a seed and one thick line for their mean, a colour for each ``hue``.

    ``frame`` has a column ``seed``.
    """
    ax = ax or plt.subplots()[1]
    common = {"data": frame, "x": x, "y": y, "hue": hue, "ax": ax}
    sns.lineplot(**common, units="seed", estimator=None, linewidth=0.8, alpha=0.45, legend=False)
    sns.lineplot(**common, errorbar=None, linewidth=2.4, marker="o", markersize=5)
    ax.legend(title=None, frameon=False)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def means(frame: pd.DataFrame, x: str, y: str, hue: str, ax: plt.Axes | None = None) -> plt.Axes:
    """Every seed as a small point, and per group the mean with its 95 % interval over seeds."""
    ax = ax or plt.subplots()[1]
    common = {"data": frame, "x": x, "y": y, "hue": hue, "ax": ax}
    hues = frame[hue].nunique()
    sns.stripplot(**common, dodge=hues > 1, size=6, alpha=0.7, jitter=False, legend=False)
    # Seeds are spread over 0.8 of a category, so that is how far apart their means have to lie.
    side = {"dodge": 0.8 * (1 - 1 / hues) if hues > 1 else False, "linestyle": "none"}
    sns.pointplot(**common, **side, errorbar=_span, capsize=0.08, markersize=7)
    ax.legend(title=None, frameon=False)
    return ax


def label(ax: plt.Axes, x: str, y: str) -> None:
    """Name the axes; returns nothing, so that a cell that ends with it shows the figure alone."""
    ax.set(xlabel=x, ylabel=y)


def _span(values) -> tuple[float, float]:
    found = interval(values)
    return found.low, found.high
