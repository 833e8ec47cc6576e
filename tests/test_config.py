"""Settings: what the command line may say, what it is refused, and what --help prints."""

import runpy
from types import SimpleNamespace

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
    ("arguments", "name", "value"),
    [
        ("--depth=-3", "DEPTH", -3),
        ("--rate=2", "RATE", 2.0),
        ("--rate=1e-3", "RATE", 0.001),
        ("--resume", "RESUME", True),
        ("--resume --resume=False", "RESUME", False),
        ("--run-name=12", "RUN_NAME", "12"),
        ("--prompt=x==y", "PROMPT", "x==y"),
        ("-n 8", "DEPTH", 8),
        ("--depth=2 -- --depth=3", "DEPTH", 3),  # the last one counts; torchrun's users write the --
    ],
)
def test_a_value_gets_the_type_of_the_default_and_nothing_else_changes(script, arguments, name, value):
    before = dict(script)
    assert config.override(script, arguments.split(" "), short={"-n": "DEPTH"}) == []
    assert script[name] == value
    assert type(script[name]) is type(before[name])
    assert {key for key in before if script[key] != before[key]} <= {name}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        *((argument, "--depth=4") for argument in ("--depth=4.5", "--depth=", "--depth", "-n x", "-n")),
        *((argument, "a number") for argument in ("--rate=fast", "--rate=nan", "--rate=1e999")),
        ("--resume=maybe", "true or false"),
        ("--detph=4", "did you mean --depth?"),
        *((argument, "no such setting") for argument in ("--xyzzy=1", "--ignored=2", "--later=3", "---")),
        ("one", "--name=value"),
    ],
)
def test_what_is_wrong_is_refused_with_what_is_expected(script, arguments, expected):
    with pytest.raises(UserError) as caught:
        config.override(script, arguments.split(" "), short={"-n": "DEPTH"})
    assert arguments.startswith("-n") or arguments.partition("=")[0] in str(caught.value)
    assert expected in str(caught.value)


def test_other_arguments_are_returned_in_order_where_they_are_wanted(script):
    assert config.override(script, ["one", "--depth=2", "", "a=b"], positional=True) == ["one", "", "a=b"]
    assert script["DEPTH"] == 2


def test_settings_are_those_between_heading_and_end_and_defaults_those_of_the_source(script, tmp_path):
    source = {"DEPTH": 4, "RATE": 0.5, "TINY": 1e-10, "RUN_NAME": "", "RESUME": False, "PROMPT": "a=b"}
    config.override(script, ["--depth=9"])
    assert list(config.settings(script).items()) == list({**source, "DEPTH": 9}.items())
    assert vars(config.snapshot(script)) == {**source, "DEPTH": 9}
    assert config.defaults(script["__file__"]) == source
    (tmp_path / "other.py").write_text("# --- a\nA = 2 * 3  # six\nB = -1.5  # minus\n# -------\nC = 1\n")
    assert config.defaults(tmp_path / "other.py") == {"B": -1.5}
    (tmp_path / "without.py").write_text("C = 1\n")
    assert config.settings({"__file__": tmp_path / "without.py"}) == {}


def test_help_prints_docstring_headings_values_and_comments_and_ends_with_zero(script, capsys):
    with pytest.raises(SystemExit) as caught:
        config.override(script, ["--depth=9", "--help", "--nonsense"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("A script for these tests.\n\n    python -m example\n")
    assert " ".join(printed.split()).endswith(
        "shape: --depth=9 layers; the width follows --rate=0.5 learning rate --tiny=1e-10 "
        "run: --run-name= folder of the run, named in a comment that is long enough to be wrapped over more than one "
        "line of help --resume=False go on --prompt=a=b text"
    )
    assert max(map(len, printed.splitlines())) <= 80


def test_numbers_have_a_range_and_choices_a_list():
    given = {"A": 0, "B": 1, "C": 1.0, "D": "text"}
    config.check_numbers(SimpleNamespace(**given), at_least_one=("B",), fractions=("C",))
    for name, value in (("A", -1), ("A", 2**63), ("B", 0), ("C", 1.5)):
        with pytest.raises(UserError, match=f"--{name.lower()}={value}: must be from"):
            config.check_numbers(SimpleNamespace(**{**given, name: value}), at_least_one=("B",), fractions=("C",))
    assert config.choice("COMPILE", "off", ("on", "off")) == "off"
    with pytest.raises(UserError, match="--compile=maybe: must be one of on, off"):
        config.choice("COMPILE", "maybe", ("on", "off"))
