"""Settings: the UPPERCASE constants at the top of a script, which the command line can override.

    # --- model
    DEPTH = 4  # layers
    # ---------

defines `--depth=4`: the default gives its type, the comment its `--help` text. Settings start at the first heading
(`# --- words`) and end at a line of dashes. Functions take a script as its module name or its namespace.
"""

import ast
import contextlib
import difflib
import math
import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

from nanotrain import terminal
from nanotrain.errors import UserError

BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
BLOCK = re.compile(r"^# --- .*?(?=^# -{6,}$)", re.MULTILINE | re.DOTALL)
LINE = re.compile(r"^(?:# --- (.*)|([A-Z][A-Z0-9_]*) = ([^#\n]*?) *(?:# *(.*))?)$", re.MULTILINE)


def settings(script: str | dict) -> dict:
    """{NAME: value} of a script's settings, in source order."""
    namespace = _namespace(script)
    return {name: namespace[name] for _, name, _, _ in _parse_source(namespace["__file__"]) if name}


def snapshot(script: str | dict) -> SimpleNamespace:
    """The current settings of a script as attributes: `snapshot(__name__).DEPTH`."""
    return SimpleNamespace(**settings(script))


def defaults(path: str | Path) -> dict:
    """{NAME: value} of the settings in a script's source, without a command line; literals only."""
    found = {}
    for _, name, value, _ in _parse_source(path):
        with contextlib.suppress(ValueError, SyntaxError):  # a heading has no value
            found[name] = ast.literal_eval(value)
    return found


def override(
    script: str | dict, argv: list[str] | None = None, positional: bool = False, short: dict[str, str] | None = None
) -> list[str]:
    """Apply each `--name=value` of `argv` (default: sys.argv[1:]) to the constant NAME of the script, in place.

    A bare `--name` sets a boolean to true. short: {"-n": "TRAIN_SHARDS"} makes `-n 8` mean `--train-shards=8`. Returns
    the positional arguments if `positional`; else they are a UserError. `--help` prints the settings and exits.
    """
    namespace, others = _namespace(script), []
    known, arguments = settings(namespace), iter(sys.argv[1:] if argv is None else argv)
    for argument in arguments:
        if argument in (short or ()):
            argument = f"{flag_of(short[argument])}={next(arguments, '')}"
        if argument == "--":  # positional text follows; otherwise ignored, since torchrun needs `-- --depth=24`
            others += arguments if positional else ()
            continue
        if argument in ("-h", "--help"):
            print(_help(namespace), flush=True)
            sys.exit(0)
        if not argument.startswith("--"):
            if not positional:
                raise UserError(f"{argument!r}: write settings as --name=value (--help lists them)")
            others.append(argument)
            continue
        flag, equals, text = argument.partition("=")
        name = flag[2:].replace("-", "_").upper()
        if name not in known:
            close = [f"; did you mean {flag_of(other)}?" for other in difflib.get_close_matches(name, known, 1, 0.5)]
            raise UserError(f"{flag}: no such setting{''.join(close)} (--help lists them)")
        if not equals and not isinstance(known[name], bool):
            raise UserError(f"{flag} needs a value, as in {flag}={known[name]}")
        namespace[name] = _parse(text if equals else "true", known[name], flag)
    return others


def _parse(text, default, flag):
    kind = type(default)
    with contextlib.suppress(ValueError, KeyError):
        value = BOOLEANS[text.lower()] if kind is bool else kind(text)
        if kind is not float or math.isfinite(value):
            return value
    expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
    raise UserError(f"{flag}={text}: expected {expected}, as in {flag}={default}")


def check_numbers(
    given: SimpleNamespace, at_least_one: Iterable[str] = (), fractions: Iterable[str] = (), unset: Iterable[str] = ()
) -> None:
    """Raise UserError for numbers outside 0 (`at_least_one`: 1) to 2^63 - 1 (`fractions`: 1); `unset` may be -1."""
    for name, value in vars(given).items():
        least, most = int(name in at_least_one), 1 if name in fractions else 2**63 - 1
        is_unset = value == -1 and name in unset
        if not isinstance(value, str) and not is_unset and not least <= value <= most:
            raise UserError(f"{flag_of(name)}={value}: must be from {least} to {most}")


def choice(name: str, value: str, allowed: Iterable[str]) -> str:
    """Return `value` if it is one of `allowed`. Raises UserError otherwise."""
    if value not in allowed:
        raise UserError(f"{flag_of(name)}={value}: must be one of {', '.join(allowed)}")
    return value


def flag_of(name: str) -> str:
    """The command-line flag of a setting: RUN_NAME -> --run-name."""
    return "--" + name.lower().replace("_", "-")


def _help(namespace):
    lines = [terminal.fit(namespace.get("__doc__") or "")]
    for heading, name, _, comment in _parse_source(namespace["__file__"]):
        if heading:
            lines += ["", f"{heading}:"]
        else:
            left = f"  {flag_of(name)}={namespace[name]} "
            lines.append(textwrap.fill(comment, 79, initial_indent=f"{left:<33}", subsequent_indent=" " * 33) or left)
    return "\n".join(lines)


def _namespace(script):
    return vars(sys.modules[script]) if isinstance(script, str) else script


def _parse_source(path):
    """[(heading, NAME, value, comment)] of the settings in a script's source; a heading has only the first field."""
    blocks = BLOCK.findall(Path(path).read_text(encoding="utf-8"))
    return LINE.findall(blocks[0]) if blocks else []  # a script may have no settings
