"""Settings: what the command line may say, what it is refused, and what --help prints."""

import runpy

import pytest

from nanotrain import config
from nanotrain.errors import UserError

SOURCE = '''"""A script for these tests.

    python -m example
"""

IGNORED = 1  # above the first heading

# --- shape
DEPTH = 4  # layers; the width follows
RATE = 0.5  # learning rate
TINY = 1e-10
# --- run
RUN_NAME = ""  # folder of the run, named in a comment that is long enough to be wrapped over more than one line of help
RESUME = False  # go on
PROMPT = "a=b"  # text
# -----------

LATER = 2  # below the last line
'''


@pytest.fixture
def script(tmp_path):
    """The globals() of a script with settings of every type."""
    path = tmp_path / "example.py"
    path.write_text(SOURCE, encoding="utf-8")
    return runpy.run_path(str(path))


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("--depth=12", "DEPTH", 12),
        ("--depth=-3", "DEPTH", -3),
        ("--rate=2", "RATE", 2.0),
        ("--rate=1e-3", "RATE", 0.001),
        ("--resume", "RESUME", True),
        ("--resume=true", "RESUME", True),
        ("--resume=False", "RESUME", False),
        ("--resume=0", "RESUME", False),
        ("--run-name=d4", "RUN_NAME", "d4"),
        ("--run_name=d4", "RUN_NAME", "d4"),
        ("--run-name=", "RUN_NAME", ""),
        ("--run-name=12", "RUN_NAME", "12"),
        ("--prompt=x = y == z", "PROMPT", "x = y == z"),
    ],
)
def test_a_value_gets_the_type_of_the_default_and_nothing_else_changes(script, argument, name, value):
    before = dict(script)
    assert config.override(script, [argument]) == []
    assert script[name] == value
    assert type(script[name]) is type(before[name])
    assert {key for key in before if script[key] != before[key]} <= {name}


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--depth=4.5", "a whole number, as in --depth=4"),
        ("--depth=", "a whole number"),
        ("--depth=1e3", "a whole number"),
        ("--rate=fast", "a number, as in --rate=0.5"),
        ("--rate=nan", "a number"),
        ("--rate=inf", "a number"),
        ("--rate=-inf", "a number"),
        ("--rate=1e999", "a number"),
        ("--resume=maybe", "true or false"),
        ("--resume=", "true or false"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_what_is_expected(script, argument, expected):
    with pytest.raises(UserError) as caught:
        config.override(script, [argument])
    assert argument in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize("flag", ["--depth", "--rate", "--run-name"])
def test_a_bare_name_of_anything_but_a_boolean_asks_for_a_value(script, flag):
    with pytest.raises(UserError, match=f"{flag} needs a value"):
        config.override(script, [flag])


@pytest.mark.parametrize(
    ("argument", "nearest"),
    [("--detph=4", "--depth"), ("--rnu-name=x", "--run-name"), ("--resum", "--resume"), ("--Dept=4", "--depth")],
)
def test_an_unknown_name_gets_the_nearest_one(script, argument, nearest):
    with pytest.raises(UserError) as caught:
        config.override(script, [argument])
    assert f"did you mean {nearest}?" in str(caught.value)


@pytest.mark.parametrize("argument", ["--xyzzy=1", "--ignored=2", "--later=3", "--=4", "---"])
def test_a_name_near_nothing_and_constants_that_are_no_settings_are_refused(script, argument):
    with pytest.raises(UserError, match="no such setting"):
        config.override(script, [argument])


def test_a_lone_double_dash_is_skipped_and_later_settings_count(script):
    config.override(script, ["--depth=2", "--", "--rate=3"])
    assert (script["DEPTH"], script["RATE"]) == (2, 3.0)


def test_the_last_of_two_values_counts(script):
    config.override(script, ["--depth=2", "--depth=3"])
    assert script["DEPTH"] == 3


def test_other_arguments_are_returned_in_order_only_where_they_are_wanted(script):
    assert config.override(script, ["one", "--depth=2", "-x", ""], positional=True) == ["one", "-x", ""]
    with pytest.raises(UserError, match=r"'one'.*--name=value"):
        config.override(script, ["one"])


def test_a_short_flag_takes_the_next_argument_as_its_value(script):
    assert config.override(script, ["-n", "8", "--rate=1"], short={"-n": "DEPTH"}) == []
    assert (script["DEPTH"], script["RATE"]) == (8, 1.0)


@pytest.mark.parametrize(("arguments", "reason"), [(["-n"], "needs a value"), (["-n", "x"], "-n=x: expected a whole")])
def test_a_short_flag_without_a_good_value_is_refused(script, arguments, reason):
    with pytest.raises(UserError, match=reason):
        config.override(script, arguments, short={"-n": "DEPTH"})


def test_settings_are_those_between_heading_and_end_in_the_order_of_the_source(script):
    script["DEPTH"] = 7
    assert list(config.settings(script).items()) == [
        ("DEPTH", 7),
        ("RATE", 0.5),
        ("TINY", 1e-10),
        ("RUN_NAME", ""),
        ("RESUME", False),
        ("PROMPT", "a=b"),
    ]


def test_defaults_are_those_of_the_source_whatever_the_command_line_says(script, tmp_path):
    before = config.settings(script)
    config.override(script, ["--depth=9", "--resume"])
    assert config.defaults(script["__file__"]) == before != config.settings(script)
    (tmp_path / "other.py").write_text("# --- a\nA = 2 * 3  # six\nB = -1.5  # minus\n# -------\nC = 1\n")
    assert config.defaults(tmp_path / "other.py") == {"B": -1.5}


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_prints_docstring_headings_defaults_and_comments_and_ends_with_zero(script, capsys, flag):
    with pytest.raises(SystemExit) as caught:
        config.override(script, ["--depth=9", flag, "--nonsense"], short={"-n": "DEPTH"})
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("A script for these tests.\n\n    python -m example\n")
    words = " ".join(printed.split())
    for expected in (
        "shape: -n N, --depth=9 layers; the width follows --rate=0.5 learning rate --tiny=1e-10",
        "run: --run-name= folder of the run, named in a comment that is long enough to be wrapped over more than one "
        "line of help --resume=False go on",
    ):
        assert expected in words
    assert "above the first heading" not in printed
    assert "below the last line" not in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_choice_returns_what_is_allowed_and_lists_it_otherwise():
    assert config.choice("COMPILE", "off", ("on", "off")) == "off"
    with pytest.raises(UserError, match="--compile=maybe: must be one of on, off"):
        config.choice("COMPILE", "maybe", ("on", "off"))
