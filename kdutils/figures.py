"""The recurring plots. They know DataFrames, one row a run (and epoch), and nothing else."""

from textwrap import fill

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.ticker import MaxNLocator

from kdutils.verdicts import interval


def style() -> None:
    """Colours that stay apart for colour-blind readers, and letters that survive a phone."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=1.05)
    plt.rcParams |= {"figure.figsize": (5.6, 3.8), "figure.dpi": 110, "savefig.bbox": "tight"}


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
    side["errorbar"] = lambda values: (interval(values).low, interval(values).high)
    sns.pointplot(**common, **side, capsize=0.08, markersize=7)
    above = {"ncols": 2, "loc": "lower center", "bbox_to_anchor": (0.5, 1)} if hues > 1 else {}
    ax.legend(title=None, frameon=False, **above)
    return ax


def label(ax: plt.Axes, x: str, y: str) -> None:
    """Name the axes; returns nothing, so that a cell that ends with it shows the figure alone."""
    ax.set(xlabel=x, ylabel=y)


SIGNS = {  # a verdict's colour and marker
    "replicated": ("#0173b2", "o"),
    "replicated, smaller": ("#56b4e9", "p"),
    "no effect": ("#de8f05", "s"),
    "reversed": ("#d55e00", "X"),
    "inconclusive": ("#949494", "o"),
    None: ("#cccccc", "."),
}


def forest(rows: list[dict], reach: float = 4.5) -> plt.Axes:
    """One line a claim (:func:`claims.judged`): ours with its interval, the paper's effect.

    Every judged claim is drawn in its own margins, the smallest effect that would matter, counted
    from the bound towards the claimed side: 0 is the bound, 1 the margin. What lies beyond
    ``reach`` is an arrow at the edge. A claim without a verdict is named in grey.
    """
    from kdutils import claims

    told, tops = [], [0.0]
    for row in rows:
        waits = row["margins"] is None
        text = f"{row['id']}  {row['statement']}" + f" ({claims.said_with_interval(row)})" * waits
        size = 9 if len(text) < 105 else 8  # two lines at most
        told.append((fill(text, 57 * 9 // size), size))
        # What has no verdict is named in grey and no more: an empty row would be scrolled past.
        tops.append(tops[-1] + (0.25 + 0.17 * told[-1][0].count("\n") if waits else 1))
    ax = plt.subplots(figsize=(4.8, 0.94 * tops[-1] + 0.6))[1]
    for k, (row, (text, size)) in enumerate(zip(rows, told, strict=True)):
        y, tint = tops[k] + 0.5, "black" if row["margins"] else "0.35"
        if k % 2:
            ax.axhspan(*tops[k : k + 2], color="0.96", zorder=0)
        ax.text(-reach, tops[k] + 0.05, text, color=tint, size=size, va="top", linespacing=1.1)
        if not row["margins"]:
            continue
        colour, marker = SIGNS[row["verdict"]]
        said = f"{claims.said_with_interval(row)}, n = {row['found']}"
        said += f" [{row['part']}]" * bool(row["part"])
        ax.text(-reach, y + 0.36, said, size=9 if len(said) < 40 else 8, va="center", color="0.35")
        ax.text(reach, y + 0.36, row["verdict"], size=9, ha="right", va="center", weight="bold")
        ax.vlines([0, 1], y - 0.05, y + 0.22, ["black", "grey"], ["-", "--"], linewidth=0.9)
        drawn = {k: max(-reach, min(reach, v)) for k, v in row["margins"].items() if v is not None}
        span, arrows = [drawn["low"], drawn["high"]], {-reach: "<", reach: ">"}
        ax.plot(span, [y + 0.08] * 2, color=colour, linewidth=2.6, solid_capstyle="butt")
        edge = arrows.get(drawn["mean"], marker)
        hollow = {"markerfacecolor": "white"} if row["verdict"] == "inconclusive" else {}
        ax.plot(drawn["mean"], y + 0.08, edge, color=colour, markersize=8, **hollow)
        if "effect" in drawn:
            at, edge = (drawn["effect"], y + 0.08), arrows.get(drawn["effect"], "D")
            ax.plot(*at, edge, markerfacecolor="none", color="black", markersize=7)
    ax.set(ylim=(tops[-1] + 0.05, -0.05), xlim=(-reach - 0.1, reach + 0.1), yticks=[])
    ax.set_xlabel("beyond the bound, in margins  (◇ the paper's effect)", size=9)
    ax.tick_params(labelsize=9)
    ax.grid(False)
    sns.despine(ax=ax, left=True)
    ax.axis("on" if any(row["margins"] for row in rows) else "off")
    return ax


def tally(rows: list[dict]) -> plt.Axes:
    """One bar a study (:func:`claims.judged`): how many of its claims have which word."""
    colours = {word or "no verdict": colour for word, (colour, _) in SIGNS.items()}
    told = pd.DataFrame([(row["study"], row["verdict"] or "no verdict") for row in rows])
    counts = pd.crosstab(told[0], told[1]).reindex(told[0].unique())
    counts = counts[[word for word in colours if word in counts]]
    ax = plt.subplots(figsize=(4.4, 0.46 * len(counts) + 1.2))[1]
    counts.plot.barh(stacked=True, width=0.72, edgecolor="white", color=colours, ax=ax)
    for bars, word in zip(ax.containers, counts, strict=True):
        shown = [str(n) * (n > len(rows) / 100) for n in counts[word]]
        tint = "white" if word == "replicated" else "black"
        ax.bar_label(bars, shown, label_type="center", size=11, color=tint)
    ax.set(xticks=[], ylabel="", xlim=(0, counts.T.sum().max()), ylim=(len(counts) - 0.5, -0.5))
    ax.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=11)
    ax.grid(False)
    sns.despine(ax=ax, left=True, bottom=True)
    return ax


def paired(found: dict, ax: plt.Axes | None = None, unit: str = "points") -> plt.Axes:
    """Differences by name (:class:`results.Found`): a dot a seed, the mean with its interval.

    A paired comparison drawn in place of a table; the line at 0 is "no difference".
    """
    from kdutils.claims import UNITS

    factor, _, behind = UNITS[unit]
    ax = ax or plt.subplots(figsize=(4, 0.48 * len(found) + 0.9))[1]
    for y, one in enumerate(found.values()):
        values = factor * one.values.to_numpy(float)
        ax.plot(values, [y + 0.16] * len(values), "o", color="0.6", markersize=4)
        span = interval(values)
        ax.plot([span.low, span.high], [y - 0.08] * 2, color="#0173b2", linewidth=2.4)
        ax.plot(span.mean, y - 0.08, "o", color="#0173b2", markersize=7)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(found)), [fill(name, 24) for name in found])  # narrow, for phones
    ax.set(ylim=(len(found) - 0.5, -0.5), xlabel=f"difference{behind and f' ({behind.strip()})'}")
    return ax
