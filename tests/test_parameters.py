"""A notebook's parameters: what does not fit is refused in one sentence that names it."""

import math
from typing import Annotated

import pydantic
import pytest

from kdutils import parameters
from kdutils.parameters import Count, NotEmpty, Parameters, Positive, Scale, Share, Whole


class Given(Parameters):
    scale: Scale
    epochs: Count
    validation: Whole
    temperature: Positive
    alpha: Share
    seeds: Annotated[list[Whole], NotEmpty]
    teacher: str


GOOD = dict(
    scale="smoke",
    epochs=3,
    validation=0,
    temperature=4.0,
    alpha=0.9,
    seeds=[0, 1],
    teacher="resnet34",
)


def sentence(**change):
    """What is said when these parameters replace the good ones."""
    with pytest.raises(parameters.ParameterError) as caught:
        Given.check(GOOD | change)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_good_parameters_are_read_as_given_and_cannot_be_changed():
    found = Given.check(GOOD)
    assert found.model_dump() == GOOD
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        found.epochs = 4


@pytest.mark.parametrize(
    ("wrong", "meant"), [("epoch", "epochs"), ("tempreature", "temperature"), ("Alpha", "alpha")]
)
def test_a_misspelt_parameter_is_named_with_what_it_may_have_meant(wrong, meant):
    text = sentence(**{wrong: 3})
    assert text.startswith(f"unknown parameter {wrong!r}; did you mean {meant!r}?")
    for name in GOOD:
        assert name in text


def test_a_misspelling_is_named_before_the_parameter_that_is_missing_for_it():
    given = {k: v for k, v in GOOD.items() if k != "seeds"} | {"sedes": [1]}
    with pytest.raises(parameters.ParameterError, match="'sedes'; did you mean 'seeds'"):
        Given.check(given)


def test_an_unknown_parameter_like_no_other_gets_no_guess():
    text = sentence(xyzzy=1)
    assert "'xyzzy'" in text
    assert "did you mean" not in text


@pytest.mark.parametrize("name", GOOD)
def test_a_missing_parameter_is_named(name):
    with pytest.raises(parameters.ParameterError, match=f"^parameter '{name}' is missing.$"):
        Given.check({k: v for k, v in GOOD.items() if k != name})


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("epochs", "hello", "valid integer"),
        ("epochs", "3", "valid integer"),
        ("epochs", True, "valid integer"),
        ("epochs", 3.0, "valid integer"),
        ("epochs", None, "valid integer"),
        ("epochs", 0, "greater than or equal to 1"),
        ("epochs", -1, "greater than or equal to 1"),
        ("validation", -1, "greater than or equal to 0"),
        ("temperature", "4", "valid number"),
        ("temperature", True, "valid number"),
        ("temperature", 0.0, "greater than 0"),
        ("temperature", -2, "greater than 0"),
        ("temperature", math.nan, "finite number"),
        ("alpha", 1.01, "less than or equal to 1"),
        ("alpha", -0.01, "greater than or equal to 0"),
        ("alpha", math.nan, "equal to"),
        ("seeds", [], "at least 1 item"),
        ("seeds", 3, "valid list"),
        ("seeds", "012", "valid list"),
        ("teacher", 34, "valid string"),
        ("scale", "huge", "'smoke', 'laptop' or 'paper'"),
    ],
)
def test_a_wrong_value_is_named_with_the_reason(name, value, reason):
    text = sentence(**{name: value})
    assert text.startswith(f"parameter {name} is {value!r}: ")
    assert reason in text


@pytest.mark.parametrize("value", ["x", -1, 1.5, True])
def test_a_wrong_item_of_a_list_is_named_with_its_place(value):
    assert sentence(seeds=[0, 1, value]).startswith(f"parameter seeds[2] is {value!r}: ")


def test_a_whole_number_is_a_number():
    assert Given.check(GOOD | {"temperature": 4, "alpha": 1}).temperature == 4


def test_infinity_is_no_temperature():
    assert "temperature" in sentence(temperature=math.inf)


@pytest.mark.parametrize("value", [[], [1], [1, 2, 3]])
def test_a_list_of_the_wrong_length_is_named(value):
    class Pair(Parameters):
        widths: Annotated[list[Count], parameters.Length(2)]

    assert Pair.check({"widths": [4, 8]}).widths == [4, 8]
    with pytest.raises(parameters.ParameterError, match=r"^parameter widths is \[.*2 items.*\.$"):
        Pair.check({"widths": value})


def test_a_check_of_several_parameters_says_its_own_sentence():
    class Both(Parameters):
        epochs: Count
        snapshots: list[Count]

        @pydantic.model_validator(mode="after")
        def within(self):
            if max(self.snapshots) > self.epochs:
                raise ValueError("parameter snapshots goes past the last epoch.")
            return self

    assert Both.check({"epochs": 3, "snapshots": [3]}).epochs == 3
    with pytest.raises(parameters.ParameterError, match=r"^parameter snapshots goes past"):
        Both.check({"epochs": 3, "snapshots": [2, 4]})


def test_read_takes_plain_variables_alone_from_a_notebook():
    import numpy as np

    around = {
        "__name__": "__main__",
        "_": 3,
        "_i1": "epochs = 3",
        "In": ["", "epochs = 3"],
        "Out": {1: 3},
        "np": np,
        "Parameters": Parameters,
        "check": Given.check,
        "array": np.arange(3),
        "exit": object(),
    }
    assert Given.read(around | GOOD) == Given.check(GOOD)


def test_read_refuses_a_plain_variable_that_is_no_parameter():
    with pytest.raises(parameters.ParameterError, match="'epoch'; did you mean 'epochs'"):
        Given.read(GOOD | {"epoch": 5})
    with pytest.raises(parameters.ParameterError, match="unknown parameter 'nothing'"):
        Given.read(GOOD | {"nothing": None})


CELL = "\n".join(f"{name} = {value!r}  # why" for name, value in GOOD.items())
CHECK = "from kdutils import parameters\np = Given.read(globals())\nearly = p.epochs"


def test_a_parameter_can_be_changed_as_often_as_one_likes():
    later = {"early": 3, "rows": [], "DEBUG": True}  # of later cells, of the user's startup file
    cells = ["", CELL, CHECK, "rows = []", "%matplotlib inline", "lr = early"]
    assert Given.read(GOOD | later | {"In": cells}) == Given.check(GOOD)
    for epochs in (4, 5):
        cells += [CELL.replace("epochs = 3", f"epochs = {epochs}"), CHECK]
        assert Given.read(GOOD | later | {"epochs": epochs, "In": cells}).epochs == epochs
    wrong = {"epochs": 0, "In": [*cells, "epochs = 0", CHECK]}
    with pytest.raises(parameters.ParameterError, match="parameter epochs is 0"):
        Given.read(GOOD | later | wrong)
    with pytest.raises(parameters.ParameterError, match="'seeds' is missing"):
        Given.read({k: v for k, v in GOOD.items() if k != "seeds"} | {"In": cells})


def test_a_misspelling_counts_until_the_cell_is_mended():
    misspelt = {"tempreature": 2.0}
    cells = ["", CELL, CHECK, CELL.replace("temperature", "tempreature"), CHECK]
    with pytest.raises(parameters.ParameterError, match="'tempreature'; did you mean 'temperat"):
        Given.read(GOOD | misspelt | {"In": cells})
    assert Given.read(GOOD | misspelt | {"In": [*cells, CELL, CHECK]})


@pytest.mark.parametrize(
    "injected", ["epocs = 3", 'alpha = float("inf")\nepocs = 3', "epocs: int = 3", "epocs = [-1]"]
)
def test_a_misspelling_that_papermill_puts_in_is_named(injected):
    variables = GOOD | {"epocs": 3, "In": ["", CELL, f"# Parameters\n{injected}\n", CHECK]}
    with pytest.raises(parameters.ParameterError, match="'epocs'; did you mean 'epochs'"):
        Given.read(variables)


def test_a_notebook_shows_the_sentence_in_place_of_a_traceback():
    error = parameters.ParameterError("parameter epochs is -1.")
    assert error._render_traceback_() == ["ParameterError: parameter epochs is -1."]
    assert isinstance(error, ValueError)
