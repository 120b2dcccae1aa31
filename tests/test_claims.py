"""Claims: the register, values from runs, what notebooks store, and a stranger's check of it."""

import csv
import hashlib
import importlib.util
import json
import math
import random
import subprocess
import sys
from statistics import mean

import pandas as pd
import pytest
from scipy import stats

from kdutils import claims, notebooks, records, results, runs, verdicts
from kdutils.claims import ClaimError
from kdutils.results import Found

CHECK = records.PROJECT / "tools" / "check_claims.py"
COLUMNS = claims.COLUMNS


def checked(row):
    """A judged row as ``tools/check_claims.py`` prints it, with kdutils' own numbers."""
    if row["verdict"] is None:
        return f"{row['id']:12} {'no verdict':19} {row['found']} of {row['seeds']} seeds"
    span = "{mean:+.4f} [{low:+.4f}, {high:+.4f}]".format_map(row)
    part = f", {row['part']}" if row["part"] else ""
    holm = "" if row["holm"] is None else f", Holm: {'yes' if row['holm'] else 'no'}"
    return f"{row['id']:12} {row['verdict']:19} {span}{part}{holm}"


def registered_row(name, kind="above", **more):
    row = dict.fromkeys(COLUMNS, "") | {"id": name, "study": name.partition("-")[0], "kind": kind}
    row |= {"statement": f"{name} holds", "bound": "0", "margin": "0.01", "unit": "points"}
    return row | {"seeds": "3"} | more


@pytest.fixture
def register(tmp_path, monkeypatch):
    """A function that registers rows in place of the project's."""
    path = tmp_path / "data" / "claims.csv"
    path.parent.mkdir()
    monkeypatch.setattr(claims, "REGISTER", path)

    def write(*rows):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        return path

    return write


def found(*values, how="value", first=0):
    series = pd.Series(dict(enumerate(values, first)), dtype=float)
    return Found(series, {seed: [(f"k{seed}", "accuracy", v)] for seed, v in series.items()}, how)


# ------------------------------------------------------------------------------- the register


def test_the_projects_register_can_be_read():
    known = claims.registered()
    assert len(known) >= 42
    assert all(claim.id.startswith(f"{claim.study}-") for claim in known.values())


def test_a_registered_claim_has_a_rule_for_each_part(register):
    register(
        registered_row("a-1", "all above", parts="x;y", effect="0.1;0.2"),
        registered_row(
            "a-2", "any 2 of below", parts="x;y;z", effect="0.1", unit="ratio", bound="1"
        ),
        registered_row("a-3", "within", bound="-1 2"),
        registered_row("a-4", "every above", effect=""),
    )
    known = claims.registered()
    assert known["a-1"].rules["y"] == verdicts.Rule("above", 0.0, 0.01, 0.2)
    assert known["a-1"].need is None
    assert known["a-2"].need == 2
    assert known["a-2"].rules["z"] == verdicts.Rule("below", 1.0, 0.01, 0.1, ratio=True)
    assert known["a-3"].rules == {"": verdicts.Rule("within", -1.0, 0.01, upper=2.0)}
    assert known["a-4"].rules[""].effect is None
    assert known["a-4"].seeds == 3


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"kind": "larger"}, "unknown kind 'larger'; kinds: above, below, at most"),
        ({"kind": ""}, "unknown kind ''"),
        ({"kind": "all bigger", "parts": "x;y"}, "unknown kind 'bigger'"),
        ({"kind": "any two of above", "parts": "x;y"}, "kind is 'two', which is no whole number"),
        ({"kind": "any 3 of above", "parts": "x;y"}, "3 of 2 parts cannot hold"),
        ({"kind": "all above"}, "kind 'all above' does not fit its parts, ''"),
        ({"parts": "x;y"}, "kind 'above' does not fit its parts, 'x;y'"),
        ({"kind": "all above", "parts": "x;x"}, "does not fit its parts"),
        ({"kind": "all above", "parts": "x;y", "effect": "1;2;3"}, "3 effects for 2 parts"),
        ({"bound": "zero"}, "bound is 'zero', which is no number"),
        ({"bound": ""}, "bound is ''; it must be one number"),
        ({"bound": "nan"}, "bound is 'nan', which is no number"),
        ({"bound": "0 1"}, "bound is '0 1'; it must be one number"),
        ({"kind": "within"}, "bound is '0'; it must be a lower and an upper number"),
        ({"kind": "within", "bound": "2 1"}, "must be a lower and an upper number"),
        ({"margin": ""}, "margin is '', which is no number"),
        ({"margin": "0"}, "its margin must be above 0"),
        ({"effect": "some"}, "effect is 'some', which is no number"),
        ({"seeds": "3.5"}, "seeds is '3.5', which is no whole number"),
        ({"seeds": "1"}, "its seeds at least 2"),
        ({"unit": "percent"}, "unknown unit 'percent'; units: points, share"),
        ({"unit": "ratio"}, "a ratio of 0.0 has no logarithm"),
        ({"unit": "ratio", "kind": "below", "bound": "1", "effect": "1.5"}, "a ratio of -0.5"),
        ({"id": "a-1"}, "claim a-1 is registered twice"),
    ],
)
def test_a_row_from_which_no_verdict_could_follow_is_refused(register, changed, sentence):
    register(registered_row("a-1"), registered_row("a-2") | changed)
    with pytest.raises(ClaimError) as error:
        claims.registered()
    assert str(error.value).startswith(f"claim {changed.get('id', 'a-2')}")
    assert sentence in str(error.value)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_a_row_of_another_length_is_refused(register):
    """A comma in a text that is not quoted moves every field behind it."""
    path = register(registered_row("a-1"))
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace("a-1 holds", "a-1, holds"), encoding="utf-8")
    with pytest.raises(ClaimError, match="claim a-1: it has more fields than there are columns"):
        claims.registered()
    path.write_text(whole.replace(",points,3", ",points"), encoding="utf-8")
    with pytest.raises(ClaimError, match="claim a-1: it has no seeds"):
        claims.registered()


def test_the_command_line_says_what_is_wrong_with_the_register_and_draws_nothing(
    register, tmp_path
):
    path = register(registered_row("a-1", kind="larger"))
    program = (
        "import pathlib, sys; from kdutils import claims, __main__ as m;"
        f"claims.REGISTER = pathlib.Path({str(path)!r}); sys.argv = ['kdutils', 'claims']; m.main()"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8")
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("kdutils: claim a-1: unknown kind 'larger'")
    assert len(run.stderr.strip().splitlines()) == 1


# ----------------------------------------------------------------------- stored, and judged


def test_what_is_found_must_fit_the_register(register):
    register(registered_row("a-1"), registered_row("a-2", "all above", parts="x;y"))
    sound = {"a-1": found(1, 2, 3), "a-2": {"x": found(1, 2, 3), "y": found(1, 2)}}
    assert [row["id"] for row in claims.stored("a", "paper", sound)] == ["a-1", "a-2"]
    for wrong, sentence in (
        ({"a-1": found(1, 2)}, "claim a-2 is registered, but no runs are given for it."),
        (sound | {"a-3": found()}, "runs are given for a-3, which is no registered claim of a."),
        (
            sound | {"a-2": found(1, 2)},
            "claim a-2: its parts are 'x', 'y', but runs are given for ''.",
        ),
        (
            sound | {"a-1": {"z": found(1)}},
            "claim a-1: its parts are '', but runs are given for 'z'.",
        ),
        (sound | {"a-1": found(1, 2, 3, 4)}, "claim a-1: 3 seeds are registered, but there are 4"),
    ):
        with pytest.raises(ClaimError) as error:
            claims.judge("a", "paper", wrong)
        assert sentence in str(error.value)


def test_stored_rows_are_judged_by_todays_register(register):
    register(registered_row("a-1"), registered_row("a-2"), registered_row("b-1"))
    keep = json.loads(
        json.dumps(claims.stored("a", "laptop", {"a-1": found(0.1, 0.11, 0.12), "a-2": found()}))
    )
    rows = claims.judged(keep)
    assert [(row["id"], row["verdict"], row["found"], row["scale"]) for row in rows] == [
        ("a-1", verdicts.REPLICATED, 3, "laptop"),
        ("a-2", None, 0, None),
        ("b-1", None, 0, None),
    ]
    assert rows[0]["values"] == {"0": 0.1, "1": 0.11, "2": 0.12}
    assert rows[0]["runs"] == ["k0", "k1", "k2"]
    assert [row["holm"] for row in rows] == [True, None, None]
    register(registered_row("a-1", seeds="4"), registered_row("a-2"))
    assert claims.judged(keep)[0]["verdict"] is None, "fewer seeds than registered: no verdict"
    assert claims.line(claims.judged(keep)[0]) == "a-1: no verdict, 3 of 4 seeds"
    register(registered_row("a-1", seeds="2"), registered_row("a-2"))
    with pytest.raises(ClaimError, match="claim a-1: 2 seeds are registered, but there are 3"):
        claims.judged(keep)
    register(registered_row("a-2"))
    with pytest.raises(ClaimError, match="values are stored for a-1, which is no registered claim"):
        claims.judged(keep)


def test_a_value_that_cannot_be_judged_names_its_claim(register):
    register(registered_row("a-1", unit="ratio", bound="1"))
    keep = claims.stored("a", "paper", {"a-1": found(1, 2, -1)})
    with pytest.raises(ClaimError, match=r"claim a-1: a ratio of -1\.0 has no logarithm\."):
        claims.judged(keep)


def test_a_claim_of_parts_names_the_weakest_and_says_how_many_seeds_would_decide(register):
    register(registered_row("a-1", "all above", parts="x;y;z", effect="0.5;0.2;"))
    open_, wider = found(-0.01, 0.01, 0.02), found(-0.05, 0.05, 0.05)
    (row,), keep = claims.judge(
        "a", "paper", {"a-1": {"x": found(1, 1, 1), "y": open_, "z": wider}}
    )
    assert (row["verdict"], row["part"]) == (verdicts.INCONCLUSIVE, "y")
    assert (row["effect"], row["paper"], row["effect_excluded"]) == (0.2, 0.2, True)
    assert row["values"] == {"0": -0.01, "1": 0.01, "2": 0.02}
    assert row["parts"]["z"]["values"] == {"0": -0.05, "1": 0.05, "2": 0.05}
    rule = claims.registered()["a-1"].rules["z"]
    assert row["needed"] == verdicts.seeds_needed(rule, [-0.05, 0.05, 0.05]), "every open part"
    assert len(keep[0]["parts"]["x"]["from"]) == 3


def test_a_table_shows_the_papers_effect_as_a_value_of_the_quantity(register):
    """1.41 times, beside ours of 1.2 times: not the 0.41 beyond the bound."""
    register(registered_row("a-1", unit="ratio", bound="1", effect="0.41"))
    rows, keep = claims.judge("a", "paper", {"a-1": found(1.2, 1.21, 1.19)})
    html = claims.table(rows)
    assert "1.41 times<br>(excluded)" in html
    assert "1.20 times (1.18 to 1.23)" in html
    assert 'class="verdict replicated">replicated, smaller<' in html
    assert "3 of 3" in html
    register(registered_row("a-1", "at most", bound="0.04", effect="0.02"))
    assert "+2.0 points" in claims.table(claims.judged(keep[:0]))


# ---------------------------------------------------------------------------- from runs to values


def frame():
    """Two networks, two seeds, three epochs; as :meth:`runs.Study.map` returns it."""
    rows = [
        {
            "epoch": epoch,
            "test_accuracy": base + 0.1 * epoch,
            "validation_accuracy": held[epoch - 1],
        }
        | {"engines": {"onnx": [{"accuracy": base}]}, "network": network, "seed": seed}
        | {"key": f"{network}{seed}"}
        for network, seed, base, held in (
            ("a", 0, 0.5, [0.2, 0.9, 0.3]),
            ("a", 1, 0.6, [0.5, 0.6, 0.7]),
            ("b", 0, 0.25, [0.1, 0.2, 0.8]),
            ("b", 1, 0.125, [0.9, 0.1, 0.1]),
        )
        for epoch in (3, 1, 2)  # in no order
    ]
    made = pd.DataFrame(rows)
    made.attrs["history"] = ["epoch", "test_accuracy", "validation_accuracy"]
    return made


def test_final_takes_the_last_epoch_and_says_where_it_stood():
    one = results.final(frame(), network="a")
    assert one.values.to_dict() == {0: 0.5 + 0.1 * 3, 1: 0.6 + 0.1 * 3}
    assert one.sources[1] == [("a1", "history/2/test_accuracy", 0.6 + 0.1 * 3)]
    assert one.how == "value"
    nested = results.final(frame(), "engines/onnx/0/accuracy", network="b", seed=[0, 1])
    assert nested.values.to_dict() == {0: 0.25, 1: 0.125}
    assert nested.sources[0] == [("b0", "engines/onnx/0/accuracy", 0.25)]
    once = frame().query("epoch == 1").drop(columns="epoch")  # of runs without a history
    one = results.final(once, "validation_accuracy", network="b")
    assert one.values.to_dict() == {0: 0.1, 1: 0.9}
    assert one.sources[0] == [("b0", "validation_accuracy", 0.1)]
    assert results.final(frame(), network="c").values.empty
    assert results.final(pd.DataFrame(), network="a") is results.NOTHING
    with pytest.raises(ValueError, match="seed 0 has several runs"):
        results.final(frame())


def test_differences_and_ratios_are_by_seed_and_keep_both_sources():
    a, b = results.final(frame(), network="a"), results.final(frame(), network="b", seed=1)
    less, over = a - b, a / b
    assert less.values.to_dict() == {1: a.values[1] - b.values[1]}, "only seeds that both have"
    assert over.values.to_dict() == {1: a.values[1] / b.values[1]}
    assert [key for key, *_ in less.sources[1]] == ["a1", "b1"]
    assert (less.how, over.how) == ("difference", "ratio")
    assert (less - a).how == "difference of difference"
    stored = json.loads(json.dumps(less.as_dict()))
    assert stored["values"] == {"1": less.values[1]}
    first, second = stored["from"]["1"]
    assert first[2] - second[2] == stored["values"]["1"], "the same floats after JSON"


def test_a_misspelt_column_is_no_empty_result():
    with pytest.raises(KeyError, match="netwrok"):
        results.final(frame(), netwrok="a")
    assert results.final(pd.DataFrame(), netwrok="a").values.empty
    one, other = (results.final(frame(), network="a", seed=s) for s in (range(3), [0, 1, 2]))
    assert one.values.equals(other.values)


def test_a_function_of_curves_has_its_name():
    curves = results.curve(frame(), network="a"), results.curve(frame(), network="b")
    assert curves[0][0] == ([0.6, 0.7, 0.8], ("a0", "history/*/test_accuracy", [0.6, 0.7, 0.8]))

    def gap(one, other):
        return max(one) - max(other)

    made = results.of_curves(gap, *curves)
    assert made.values.to_dict() == {0: 0.25, 1: 0.475}
    assert made.how == "gap"
    assert [path for _, path, _ in made.sources[1]] == ["history/*/test_accuracy"] * 2
    assert results.curve(pd.DataFrame(), network="a") == {}
    assert results.of_curves(gap, {}, curves[0]).values.empty
    with pytest.raises(ValueError, match="seed 0 has several runs"):
        results.curve(frame())


# -------------------------------------------------------------------------- a stranger's check


@pytest.fixture(scope="module")
def stranger():
    spec = importlib.util.spec_from_file_location("check_claims", CHECK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_students_t_of_the_check_is_exact(stranger):
    for df in range(1, 1001):
        assert stranger.inside(stats.t.ppf(0.975, df), df) == pytest.approx(0.95, abs=1e-9)
    for df in (*range(1, 40), 99, 100, 1000):
        for t in (0.0, 0.1, 1.0, 3.3, 12.0, 500.0):
            expected = 1 - 2 * stats.t.sf(t, df)
            assert stranger.inside(t, df) == pytest.approx(expected, abs=1e-9)


def test_the_interval_of_the_check_is_exact(stranger):
    row = {"unit": "points", "bound": "0", "margin": "1"}
    for n in (2, 3, 4, 5, 8, 31, 1001):
        x = [random.Random(k).gauss(1, 1) for k in range(n)]
        *_, low, high, p = stranger.judge(row, "above", "", x)
        expected = verdicts.interval(x)
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
        assert p == pytest.approx(stats.ttest_1samp(x, 0).pvalue, abs=1e-9)


def test_the_check_names_a_register_without_one_of_its_columns(project):
    table = project / "data" / "claims.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("bound", "bounf"), encoding="utf-8")
    command = [sys.executable, CHECK, project]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1
    assert f"{table} is damaged or not there: KeyError('bound')" in done.stdout + done.stderr
    table.unlink()
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1
    assert f"{table} is damaged or not there: FileNotFoundError" in done.stdout + done.stderr


def test_three_accuracies_are_means_over_runs_that_did_not_diverge():
    held, test = [[0.1, 0.5, 0.4], [0.6, 0.2, 0.3]], [[0.2, 0.4, 0.7], [0.8, 0.9, 0.3]]
    rows = [
        {"key": k, "epoch": e + 1, "test_accuracy": test[k][e], "validation_accuracy": held[k][e]}
        for k in (0, 1)
        for e in (2, 0, 1)
    ]
    frame = pd.DataFrame([*rows, {"key": 2, "epoch": 1}], index=[0] * 7)
    assert results.three_accuracies(frame) == pytest.approx(
        {"last epoch": 0.5, "chosen on held-out": 0.6, "best on test (optimistic)": 0.8}
    )
    assert all(map(math.isnan, results.three_accuracies(frame.tail(1)).values()))


REGISTERED = [
    registered_row("a-1", effect="0.2", seeds="5"),
    registered_row("a-2", "below", margin="0.5"),
    registered_row("a-3", "all above", unit="ratio", bound="1", parts="x;y", effect="0.4;1.5"),
    registered_row("a-4", "any 2 of above", parts="x;y;z", unit="correlation"),
    registered_row("a-5", "at most", bound="0.5"),
    registered_row("a-6", "at least", bound="0.5"),
    registered_row("a-7", "within", bound="0.2 0.6", unit="share"),
    registered_row("a-8", "every above", bound="0.1"),
    registered_row("a-9"),
    registered_row("b-1", "every below", bound="0.5", statement='with, a comma and "quotes"'),
    registered_row("b-2", seeds="4"),
    registered_row("b-3", unit="epochs", bound="1", margin="0.4"),
]


def record(study, seed, arm, numbers, folder):
    """A made-up run's record; its key."""
    content = {"study": study, "run": "made", "version": 1, "arguments": {"arm": arm, "seed": seed}}
    parts = [content[k] for k in ("study", "run", "version", "arguments")]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
    content |= {"key": key, "results": {"history": [{"accuracy": n} for n in numbers]}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"made-{key}.json").write_text(json.dumps(content), encoding="utf-8")
    return key


@pytest.fixture
def project(register, tmp_path, monkeypatch):
    """A made-up project: the register, two notebooks with stored claims, the records they name."""
    register(*REGISTERED)
    drawn = random.Random(7)
    (tmp_path / "notebooks").mkdir()

    def arm(study, name, centre, n):
        rows = []
        for seed in range(n):
            numbers = [drawn.gauss(centre, 0.07) for _ in range(3)]
            key = record(study, seed, name, numbers, tmp_path / "data" / "records" / study)
            rows += [
                {"epoch": k + 1, "accuracy": number, "seed": seed, "arm": name, "key": key}
                for k, number in enumerate(numbers)
            ]
        made = pd.DataFrame(rows)
        made.attrs["history"] = ["epoch", "accuracy"]
        return made

    def last(study, name, centre, n=3):
        return results.final(arm(study, name, centre, n), "accuracy")

    def largest(values):
        return max(values)

    def best(name, centre):
        return results.of_curves(largest, results.curve(arm("a", name, centre, 3), "accuracy"))

    found = {
        "a": {
            "a-1": last("a", "1", 0.9, 5) - last("a", "0", 0.5, 5),
            "a-2": last("a", "2", 0.1),
            "a-3": {p: last("a", f"3{p}", 0.6) / last("a", f"3{p}0", 0.4) for p in "xy"},
            "a-4": {p: last("a", f"4{p}", c) for p, c in zip("xyz", (0.3, 0.0, -0.5), strict=True)},
            "a-5": last("a", "5", 0.2),
            "a-6": last("a", "6", 0.5),
            "a-7": last("a", "7", 0.4),
            "a-8": best("8", 0.9),
            "a-9": best("9", 0.9) - best("90", 0.5),
        },
        "b": {
            "b-1": last("b", "1", 0.9),
            "b-2": last("b", "2", 0.5, 3),
            "b-3": last("b", "3", 1.0),
        },
    }
    paths = {}
    for number, (study, of_study) in enumerate(found.items(), 1):
        keep = claims.stored(study, "paper", of_study)
        output = {"output_type": "display_data", "metadata": {}, "data": {claims.MIME: keep}}
        cell = {"cell_type": "code", "metadata": {}, "source": "", "execution_count": 1}
        book = {"cells": [cell | {"outputs": [output], "id": "x"}], "metadata": {}}
        paths[study] = tmp_path / "notebooks" / f"{number}-{study}.ipynb"
        paths[study].write_text(
            json.dumps(book | {"nbformat": 4, "nbformat_minor": 5}), encoding="utf-8"
        )
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path / "notebooks")
    return tmp_path


def check(root):
    command = [sys.executable, "-I", "-S", str(CHECK), str(root)]  # without any package
    return subprocess.run(command, capture_output=True, encoding="utf-8")


def test_the_check_agrees_with_kdutils(project):
    rows = claims.of_notebooks()
    words = {row["verdict"] for row in rows}
    assert {
        verdicts.REPLICATED,
        verdicts.INCONCLUSIVE,
        verdicts.NO_EFFECT,
        verdicts.REVERSED,
    } <= words
    assert None in words
    run = check(project)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines() == [checked(row) for row in rows]
    assert run.stderr == ""


@pytest.mark.parametrize("seed", range(8))
def test_the_check_agrees_on_values_drawn_at_random(stranger, seed):
    """Every kind, every unit; values near the bound, so that every word comes up."""
    drawn = random.Random(seed)
    for kind in verdicts.KINDS:
        for unit in ("points", "ratio"):
            for n in (2, 3, 8):
                bound, margin, effect = 1.0, 0.2, drawn.choice(["", "0.3"])
                x = [max(0.05, drawn.gauss(drawn.choice([0.7, 1, 1.2]), 0.1)) for _ in range(n)]
                row = {"unit": unit, "margin": str(margin)}
                row["bound"] = "1 1.5" if kind == "within" else "1"
                rule = verdicts.Rule(
                    kind, bound, margin, float(effect) if effect else None, 1.5, unit == "ratio"
                )
                one = verdicts.judge(rule, x)
                rank, lead, centre, low, high, p = stranger.judge(row, kind, effect, x)
                assert stranger.WORDS[rank] == one.word, (kind, unit, x)
                numbers = (one.lead, one.mean, one.low, one.high)
                assert (lead, centre, low, high) == pytest.approx(numbers, rel=1e-9, abs=1e-9)
                assert p == (None if one.p is None else pytest.approx(one.p, abs=1e-9))


def change_a_digit(path, number):
    """Change the last digit of a number as it is written, where it stands first."""
    text, old = path.read_text(encoding="utf-8"), repr(number)
    assert old in text
    path.write_text(text.replace(old, old[:-1] + str((int(old[-1]) + 1) % 10), 1), encoding="utf-8")


def stored_in(project, study):
    (path,) = project.glob(f"notebooks/*-{study}.ipynb")
    book = json.loads(path.read_text(encoding="utf-8"))
    (rows,) = [o["data"][claims.MIME] for cell in book["cells"] for o in cell["outputs"]]
    return (
        {row["id"]: row for row in rows},
        path,
        lambda: path.write_text(json.dumps(book), encoding="utf-8"),
    )


def refused(project, *texts):
    run = check(project)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    assert {line.partition(":")[0] for line in run.stdout.splitlines()} == {
        texts[0].partition(":")[0]
    }
    for text in texts:
        assert text in run.stdout
    assert all(line.endswith(".") for line in run.stdout.splitlines())


@pytest.mark.parametrize("name", ["a-1", "a-2", "a-3", "a-8", "b-2"])
def test_a_changed_digit_of_a_record_is_found(project, name):
    rows, *_ = stored_in(project, name[0])
    part = next(iter(rows[name]["parts"].values()))
    key, path, number = part["from"]["1"][-1]
    (file,) = project.glob(f"data/records/*/*-{key}.json")
    change_a_digit(file, number[0] if "*" in path else number)
    refused(project, f"claim {name}: ", key, path)


def test_a_record_of_another_seed_is_found(project):
    rows, *_ = stored_in(project, "b")
    key = rows["b-1"]["parts"][""]["from"]["1"][0][0]
    (file,) = project.glob(f"data/records/*/*-{key}.json")
    file.write_text(
        file.read_text(encoding="utf-8").replace('"seed": 1', '"seed": 2'), encoding="utf-8"
    )
    refused(project, "claim b-1: ", key)


@pytest.mark.parametrize(
    "damage", [lambda f: f.unlink(), lambda f: f.write_text("{", encoding="utf-8")]
)
def test_a_record_that_is_gone_or_broken_is_found(project, damage):
    rows, *_ = stored_in(project, "b")
    key = rows["b-1"]["parts"][""]["from"]["1"][0][0]
    damage(*project.glob(f"data/records/*/*-{key}.json"))
    refused(project, "claim b-1: ", key)


@pytest.mark.parametrize("name", ["a-1", "a-2", "a-3", "a-4", "a-8", "a-9", "b-1"])
def test_a_changed_digit_of_a_stored_value_is_found(project, name):
    rows, path, _ = stored_in(project, name[0])
    change_a_digit(path, next(iter(rows[name]["parts"].values()))["values"]["2"])
    refused(project, f"claim {name}: ")


def test_a_changed_digit_of_a_stored_mean_is_found(project):
    rows, path, _ = stored_in(project, "a")
    change_a_digit(path, rows["a-8"]["parts"][""]["mean"])
    refused(project, "claim a-8: ", "its values have the mean")


def test_a_changed_digit_of_a_named_number_is_found(project):
    rows, path, _ = stored_in(project, "a")
    key, _, numbers = rows["a-8"]["parts"][""]["from"]["0"][0]
    change_a_digit(path, min(numbers))
    refused(project, "claim a-8: ", key)


def test_two_numbers_that_are_one_float_are_two(project):
    """0.30000000000000004 and 0.30000000000000005 are the same number to most that read JSON."""
    rows, path, _ = stored_in(project, "b")
    number = rows["b-1"]["parts"][""]["values"]["0"]
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(repr(number), f"{number!r}" + "0" * 12 + "1", 1), encoding="utf-8")
    assert stored_in(project, "b")[0] == rows
    refused(project, "claim b-1: ", "is not the value of")


def test_a_seed_more_than_registered_is_a_fault(project):
    rows, _, write = stored_in(project, "b")
    part = rows["b-1"]["parts"][""]
    part["values"]["3"], part["from"]["3"] = part["values"]["2"], part["from"]["2"]
    part["mean"] = mean(part["values"].values())
    write()
    refused(project, "claim b-1: more seeds are stored than registered")


def test_a_registered_claim_without_runs_is_said(project):
    rows, _, write = stored_in(project, "b")
    rows["b-1"]["id"] = "b-2"
    write()
    refused(project, "claim b-1: ", "stored none")


def test_runs_without_a_registered_claim_are_said(project, register):
    register(*(row for row in REGISTERED if row["id"] != "b-3"))
    refused(project, "claim b-3: stored, but not registered")


# -------------------------------------------------------------------------- the project's own


def test_the_check_agrees_on_the_published_claims(tmp_path):
    """Once every study stores its values by seed, the check passes on the project as it is."""
    import nbformat

    stores, complete = {}, {}
    for study, path in notebooks.studies().items():
        cells = nbformat.read(path, as_version=4).cells
        shown = [c for c in cells if c.cell_type == "code" and "claims.show(" in c.source]
        complete[study] = any(cell.outputs for cell in shown)  # else it has to be run first
        data = [o.get("data", {}) for cell in cells for o in cell.get("outputs", [])]
        rows = [row for one in data for row in one.get(claims.MIME, [])]
        stores[study] = {row["id"] for row in rows if "parts" in row}
        if complete[study]:
            wanted = {c.id for c in claims.registered().values() if c.study == study}
            assert stores[study] == wanted, f"sync {study}"
    rows = [row for row in claims.of_notebooks() if row["id"] in set().union(*stores.values())]
    if all(complete.values()):
        assert len(rows) == len(claims.registered())
        run = check(records.PROJECT)
    else:  # a copy that registers and stores what has values by seed
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "records").symlink_to(records.published_folder())
        (tmp_path / "notebooks").mkdir()
        for study, path in notebooks.studies().items():
            if stores[study]:
                (tmp_path / "notebooks" / path.name).symlink_to(path)
        with open(claims.REGISTER, encoding="utf-8", newline="") as file:
            known = [r for r in csv.DictReader(file) if r["id"] in {row["id"] for row in rows}]
        with open(tmp_path / "data" / "claims.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(known)
        run = check(tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.split("\n")[:-1] == ([checked(row) for row in rows] or [""])


def test_errata_put_words_right_and_nothing_that_is_judged():
    with open(records.PROJECT / "data" / "errata.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(claims.REGISTER, encoding="utf-8", newline="") as file:
        register = {row["id"]: row for row in csv.DictReader(file)}
    assert rows
    assert len({(row["id"], row["field"]) for row in rows}) == len(rows)
    known = claims.registered()
    for row in rows:
        assert row["field"] in ("source", "statement", "paper_value")
        assert row["why"]
        assert (
            register[row["id"]][row["field"]] != row["now"] == known[row["id"]].texts[row["field"]]
        )


def test_claims_as_json_have_all_that_a_verdict_is_made_of():
    command = [sys.executable, "-m", "kdutils", "claims", "--json"]
    run = subprocess.run(
        command, cwd=records.PROJECT, capture_output=True, encoding="utf-8", check=True
    )
    rows = json.loads(run.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    known = claims.registered()
    assert [row["id"] for row in rows] == list(known)
    for row in rows:
        claim = known[row["id"]]
        assert row["margin"] > 0
        assert row["effect"] is None or math.isfinite(row["effect"])
        assert row["verdict"] in (None, *verdicts.WORDS)
        assert row["seeds"] == claim.seeds
        assert set(row["parts"]) == set(claim.rules)
        assert row["holm"] in (True, False, None)
        if row["verdict"] is None:
            assert row["holm"] is None
            continue
        assert len(row["values"]) == row["found"] == row["seeds"]
        assert row["runs"]
        assert row["low"] <= row["mean"] <= row["high"]
        assert (row["holm"] is None) == (
            not row["kind"].endswith(("above", "below")) or "every" in row["kind"]
        )


def test_every_student_was_taught_by_a_published_teacher():
    """A teacher that was trained again elsewhere has other weights: its students do not compare."""
    named = ("taught_by", "teacher", "teacher_weights")
    for study in notebooks.studies():
        every = list(records.published(study))
        weights = {digest for record in every for digest in record["weights"].values()}
        told = [(record["key"], record["results"].get(name)) for record in every for name in named]
        assert [key for key, digest in told if digest and digest not in weights] == [], study


def test_a_claim_compares_runs_of_one_processor():
    """Other bits are another draw: a difference would be the processors' too. Two of one name may
    differ: one has bf16 arithmetic, one has not."""
    every = [record for study in notebooks.studies() for record in records.published(study)]
    what = "device", "processor", "precision"
    where = {one["key"]: tuple(one["made"][name] for name in what) for one in every}
    found = {row["id"] for row in claims.of_notebooks() if len({where[k] for k in row["runs"]}) > 1}
    assert found == set()


NEUTRAL = set()  # (run, source) of records whose numbers `verify` has found again by later source


@pytest.mark.parametrize("study", ["concierge", "vid", "eskd", "geometry"])
def test_published_runs_are_of_the_source_that_stands_here(study):
    """Second editions have one source a kind of run: what they call cannot change unnoticed."""
    names = notebooks.procedure(study, {"scale": "paper", "train_missing": False})
    here = {f.name: f.source for f in names.values() if isinstance(f, runs.RunFunction)}
    published = {(one["run"], one["made"]["source"]) for one in records.published(study)}
    assert published - NEUTRAL <= set(here.items())
