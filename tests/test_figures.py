"""The plots of verdicts: everything is drawn, nothing sticks out."""

import itertools

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from kdutils import figures, verdicts
from kdutils.results import Found


def row(name, word, **more):
    margins = {"mean": 0.5, "low": 0.1, "high": 0.9, "effect": None}
    common = {"id": f"{name}-1", "study": name, "verdict": word, "part": "", "margins": margins}
    common |= {"statement": "It holds", "mean": 0.01, "low": 0.0, "high": 0.02, "unit": "points"}
    return common | {"found": 3, "seeds": 3} | more


@pytest.fixture(autouse=True)
def closed():
    figures.style()
    yield
    plt.close("all")


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_tally_counts_every_claim_once():
    rows = [row(study, word) for study in ("a", "b") for word in (*verdicts.WORDS, None)]
    rows += [row("b", "reversed")] * 4
    ax = figures.tally(rows)
    assert sum(map(int, texts(ax))) == len(rows) == sum(bar.get_width() for bar in ax.patches)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    named = {text.get_text() for text in ax.get_legend().get_texts()}
    assert named == {*verdicts.WORDS, "no verdict"}


def test_forest_says_every_word_and_number_within_its_frame():
    long = "x" * 9 + " distilled student beats the same student that was trained on the labels only"
    rows = [row("concierge", word, statement=long) for word in verdicts.WORDS]
    rows += [row("a", None, mean=None, margins=None, found=1, statement="short")]
    ax = figures.forest(rows)
    ax.figure.canvas.draw()
    shown = texts(ax)
    assert {*verdicts.WORDS, "a-1  short (1 of 3 seeds)"} <= set(shown)
    assert shown.count("+1.0 points (0.0 to 2.0), n = 3") == 5
    right = ax.figure.bbox.x1
    assert all(text.get_window_extent().x1 <= right for text in ax.texts)
    assert max(text.count("\n") for text in shown) == 1, "two lines at most"


def test_forest_says_what_waits_in_little_room():
    waiting = row("a", None, mean=None, margins=None, found=1)
    alone, judged = figures.forest([waiting] * 3), figures.forest([row("a", "reversed")])
    assert not alone.axison, "nothing can be read off"
    assert judged.axison
    assert alone.figure.get_figheight() < judged.figure.get_figheight()
    alone.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in alone.texts]
    assert all(above.y0 >= below.y1 for above, below in itertools.pairwise(boxes))


def test_paired_draws_each_seed_the_mean_and_its_interval():
    ax = figures.paired(
        {
            "a": Found(pd.Series({0: 0.01, 1: 0.03, 2: 0.02}), {}),
            "b": Found(pd.Series({4: -0.01}), {}),
        }
    )
    dots, span, middle, alone = [line.get_xdata() for line in ax.lines][:4]
    assert list(dots) == pytest.approx([1, 3, 2])
    found = verdicts.interval([1, 3, 2])
    assert list(span) == pytest.approx([found.low, found.high])
    assert list(middle) == pytest.approx([2])
    assert list(alone) == pytest.approx([-1])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert ax.get_xlabel() == "difference (points)"


def test_lines_draw_every_seed_and_means_their_interval():
    seeds = [1.0, 2.0, 4.0]
    frame = pd.DataFrame(
        [(e, s, v + e, "x") for e in (1, 2) for s, v in enumerate(seeds)],
        columns=["e", "seed", "y", "of"],
    )
    drawn = [list(line.get_ydata()) for line in figures.lines(frame, "e", "y", hue="of").lines]
    mean = sum(seeds) / 3
    assert [[v + 1, v + 2] for v in seeds] == drawn[:3]
    assert drawn[3] == pytest.approx([mean + 1, mean + 2])
    plt.close("all")
    ax, found = figures.means(frame, "e", "y", hue="of"), verdicts.interval([v + 1 for v in seeds])
    ends = [x for line in ax.lines for x in line.get_ydata()]
    for end in (found.mean, found.low, found.high):
        assert min(abs(x - end) for x in ends) < 1e-9


def test_forest_draws_what_lies_beyond_its_reach_as_arrows():
    far = {"mean": 9.0, "low": 8.0, "high": 10.0, "effect": -9.0}
    ax = figures.forest([row("a", "replicated", margins=far), row("a", "reversed")])
    drawn = [(line.get_marker(), line.get_xdata()[0]) for line in ax.lines]
    assert (">", 4.5) in drawn
    assert ("<", -4.5) in drawn
    assert ("X", 0.5) in drawn
