"""The study's settings: dataclasses, command-line options, presets and invalid values."""

import doctest
import importlib
import io
import json
import re
import runpy
import shlex
import sys

import pytest

from experiments.__main__ import main, parser
from experiments.digits.settings import (
    AdapterSettings,
    DigitSettings,
    NetworkSettings,
    PretrainingSettings,
    chosen_digits,
    preset,
)
from experiments.harness.settings import (
    StudyError,
    flattened,
    groups,
    options,
    own_options,
    replace,
    result_settings,
    values,
)
from experiments.tasks.settings import TaskSettings
from experiments.text.settings import TextSettings

COUNTS = [33, 12, 147, 115, 69, 196, 98, 91, 185, 148]
OTHER = {
    "preset": "relu",
    "seed": 3,
    "seeds": 2,
    "seed_from": 4,
    "hidden": (20, 30),
    "activation": "relu",
    "relu_logits": False,
    "mean": 0.5,
    "std": 0.25,
    "base_steps": 7,
    "base_lr": 0.5,
    "batch": 4,
    "digits": "worst:2",
    "order": "seeded",
    "steps": 5,
    "lr": 0.01,
    "rank": 4,
    "alpha": 8.0,
    "scale_rule": "alpha",
    "init": "kaiming",
    "schedule": "cosine",
    "tune_batch": 32,
    "average": 0.5,
    "strength": 0.25,
    "margin": 4.0,
    "distill": 2.0,
    "temperature": 3.0,
    "mass": 0.5,
    "replay": 10,
    "replay_of": "all",
    "ewc": 100.0,
    "null_space": 0.9,
    "null_space_of": "old",
    "route": "gate",
    "validation": 100,
    "patience": 3,
    "selection": True,
    "look": 5,
    "tensorboard": True,
    "compat": "none",
    "data": "digits",
    "data_dir": "elsewhere",
    "device": "cpu",
    "threads": 2,
    "out": "somewhere",
    "bases": "kept",
}


def parsed(*words: str) -> dict[str, object]:
    return vars(parser().parse_args(["digits", *words]))


@pytest.mark.parametrize("name", list(options(DigitSettings)))
def test_every_field_is_an_option(name):
    """Each field of the settings is a command-line option that gives it a value of its type."""
    value = OTHER[name]
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        words = [flag if value else "--no-" + flag[2:]]
    else:
        words = [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    given = parsed(*words)
    assert given.pop("command")
    assert given == {name: value}
    # Options that some remedies require.
    needed = {"patience": {"validation": 1}, "selection": {"validation": 1}}
    needed |= {"route": {"replay": 1}, "null_space_of": {"replay": 1}, "digits": {"validation": 1}}
    changes = {**needed.get(name, {}), **given}
    assert values(replace(DigitSettings(), **changes))[name] == value


def test_help_in_an_encoding_without_greek_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe on Windows, which may lack the letter λ, gets a question mark in its place."""
    pipe = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", pipe)
    monkeypatch.setattr(sys, "argv", ["experiments", "digits", "--help"])
    monkeypatch.delitem(sys.modules, "experiments.__main__")  # runpy would warn of it
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("experiments", run_name="__main__")
    pipe.seek(0)
    assert "strength ? in W' = W + ?·" in pipe.read()


def test_the_help_has_every_option(capsys, monkeypatch):
    """The help has every option with its help text and its default."""
    monkeypatch.setenv("COLUMNS", "500")  # do not break lines at hyphens
    with pytest.raises(SystemExit):
        main(["digits", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for entry in options(DigitSettings).values():
        assert "--" + entry.name.replace("_", "-") in shown
        assert " ".join(entry.metadata["help"].split()) in shown
    assert "optimizer steps of fine-tuning [200]" in shown


def test_help_groups_the_options_and_ends_with_examples_that_parse(capsys):
    """Each group of settings has a heading in --help, and the examples are valid commands."""
    for command in ("digits", "sweep", "tasks", "text"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = capsys.readouterr().out
        assert "\nThe adapter" in shown
        assert "\nFine-tuning" in shown
        examples = re.findall(r"^  python -m experiments (.*)$", shown, re.MULTILINE)
        assert len(examples) == 3
        for example in examples:
            words = shlex.split(example)
            assert words[0] == command
            assert parser().parse_args(words)


def test_replace_takes_option_names_of_any_group():
    """replace finds an option in any group by its name and leaves other groups unchanged."""
    changed = replace(DigitSettings(), rank=4, base_steps=7)
    assert (changed.adapter.rank, changed.pretraining.base_steps) == (4, 7)
    assert changed.remedies == DigitSettings().remedies
    assert changed == DigitSettings(
        adapter=AdapterSettings(rank=4), pretraining=PretrainingSettings(base_steps=7)
    )
    with pytest.raises(StudyError, match=r"there is no setting 'ranks'; did you mean rank\?"):
        replace(DigitSettings(), ranks=4)


@pytest.mark.parametrize("kind", [DigitSettings, TaskSettings, TextSettings])
def test_option_names_are_unique(kind):
    """Option names are unique across the groups of a study."""
    names = [name for group in (kind, *groups(kind).values()) for name in own_options(group)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("words", [["2,3"], ["2", "3"], ["2,", "3"]])
def test_lists_are_typed_with_commas_or_spaces(words):
    """Digits and layers can be given with commas, with spaces, or with both."""
    assert parsed("--digits", *words)["digits"] == "2,3"
    assert parsed("--hidden", *words)["hidden"] == (2, 3)


def test_presets_are_those_of_the_published_studies():
    """The presets have the networks, digits, ranks and steps of the published studies."""
    assert DigitSettings() == preset("blog")
    blog, relu, nine = map(preset, ("blog", "relu", "nine"))
    assert blog.network == NetworkSettings((256, 128), "none", relu_logits=True, mean=0.1301)
    assert (blog.adapter.rank, blog.adapter.alpha) == (2, 1.0)
    assert (blog.finetuning.steps, blog.pretraining.batch) == (200, 10)
    assert (relu.network.mean, relu.network.activation) == (0.1307, "relu")
    assert relu.finetuning.digits == blog.finetuning.digits
    assert (nine.network.hidden, nine.adapter.rank) == ((1000, 2000), 1)
    assert (nine.finetuning.digits, nine.finetuning.steps) == ("9", 100)


def test_an_option_replaces_the_value_of_the_preset():
    """An option on the command line replaces only its own value of the preset."""
    given = parsed("--preset", "nine", "--rank", "3")
    del given["command"]
    assert preset(str(given.pop("preset")), **given) == replace(preset("nine"), rank=3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "two"], "argument --rank: invalid int value: 'two'"),
        (["--hidden", "2,x"], "argument --hidden: invalid literal for int() with base 10: 'x'"),
        (["--ranks", "2"], "unrecognized arguments: --ranks 2"),
    ],
)
def test_values_of_a_wrong_type_are_refused(words, message, capsys):
    """A value of the wrong type exits with status 2 and names the option and the value."""
    with pytest.raises(SystemExit) as ended:
        main(["digits", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "0"], "--rank must be a whole number of at least 1, got '0'"),
        (["--steps", "-5"], "--steps must be a whole number of at least 1, got '-5'"),
        (["--seed", "-1"], "--seed must be a whole number from 0 to 2^63 - 1, got '-1'"),
        (["--alpha", "nan"], "--alpha must be a finite number, got 'nan'"),
        (["--lr", "0"], "--lr must be a finite number above 0, got '0.0'"),
        (["--hidden", "256,0"], "--hidden must be one or more whole numbers of at least 1"),
        (["--digits", "2,3,3"], "--digits must be 1 to 9 different digits or worst:K, got '2,3,3'"),
        (["--digits", "12"], "--digits must be 1 to 9 different digits or worst:K, got '12'"),
        (["--digits", "worst:10"], "--digits must be 1 to 9 different digits or worst:K"),
        (["--digits", "worst:2"], "--digits must be a list, or worst:K with --validation above 0"),
        (["--digits", "0,1,2,3,4,5,6,7,8,9"], "--digits must be 1 to 9 different digits"),
        (["--preset", "red"], "--preset must be blog or relu or nine or small, got 'red'"),
        (["--data", "cifar"], "--data must be auto or mnist or digits, got 'cifar'"),
        (
            ["--init", "zero"],
            "kaiming or gaussian or gaussian/sqrt_r or uniform/sqrt_r or orthogonal",
        ),
        (["--device", "abacus"], "--device must be auto or a device that torch knows"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here: "),
    ],
)
def test_bad_values_are_refused_by_name(words, message, capsys, tmp_path):
    """An invalid value exits with status 2 and names the option, the value and the condition."""
    assert main(["digits", "--out", str(tmp_path / "run"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_value_of_another_type_is_refused():
    """Settings built in Python validate types too, such as a rank of 2.5."""
    with pytest.raises(StudyError, match=r"--rank must be of type int, got '2.5'"):
        AdapterSettings(rank=2.5)
    assert AdapterSettings(alpha=1).alpha == 1


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [("9", [9]), ("8,2", [2, 8]), ("worst:1", [5]), ("worst:5", [2, 3, 5, 8, 9])],
)
def test_digits_are_those_given_or_the_worst(asked, chosen):
    """The digits to tune are the list, or the K digits with most wrong answers."""
    assert chosen_digits(asked, COUNTS) == chosen


def test_equally_bad_digits_are_taken_in_order():
    """If two digits have equally many wrong answers, the smaller one is taken first."""
    assert chosen_digits("worst:2", [1, 5, 9, 5, 0, 0, 0, 0, 0, 0]) == [1, 2]


def test_the_folder_is_named_after_what_differs_from_the_preset():
    """The default folder names the settings that differ from the preset and affect results."""
    assert preset("blog").folder == "runs/digits-blog"
    assert preset("blog", data_dir="x").folder == "runs/digits-blog"
    assert preset("nine", rank=4, hidden=(8, 9)).folder == "runs/digits-nine-hidden_8,9-rank_4"
    assert preset("blog", out="x").folder == "x"


def test_result_settings_are_plain_json():
    """result_settings survive JSON and leave out folders and logging."""
    kept = result_settings(preset("nine", out="somewhere"))
    assert json.loads(json.dumps(kept)) == kept
    assert kept["network"]["hidden"] == [1000, 2000]
    names = flattened(kept).keys()
    assert options(DigitSettings).keys() - names == {"out", "bases", "data_dir", "tensorboard"}
    assert names <= options(DigitSettings).keys()


@pytest.mark.parametrize(
    "name",
    [
        "digits.settings",
        "digits.model",
        "analysis.confusion",
        "report.table",
        "harness.train",
        "digits.data",
        "harness.loggers",
    ],
)
def test_examples_in_docstrings_run(name):
    """The examples in the experiments' docstrings pass as doctests."""
    result = doctest.testmod(importlib.import_module(f"experiments.{name}"))
    assert result.attempted
    assert not result.failed
