"""Settings: the UPPERCASE constants at the top of a script, which the command line may override.

    # --- model
    DEPTH = 4  # layers
    # ---------

makes `--depth=4`, typed by its default and explained by its comment in `--help`. Settings begin at the first heading
(`# --- words`) and end at a line of dashes. A test sets `script.DEPTH = 2` and calls `main()`; only under `__main__`
does a script call `override(__name__)`. REMOVED = {"OLD": "what to use"} names settings that are gone.

A script is given as the name of its module, or as its namespace.
"""

import ast
import contextlib
import difflib
import math
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from nanotrain.errors import UserError

BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
SETTING_LINE = re.compile(r"([A-Z][A-Z0-9_]*) = [^#]*?(?:#\s*(.*))?")
HEADING_LINE = re.compile(r"# --- (.*)")
END_LINE = re.compile(r"# -{6,}")


def settings(script: str | dict) -> dict:
    """The settings of a script, {NAME: value}, in the order of its source."""
    namespace = _namespace(script)
    return {name: namespace[name] for name, _ in _documented(namespace) if name}


def snapshot(script: str | dict) -> SimpleNamespace:
    """The settings of a script as they are now, as attributes: `snapshot(__name__).DEPTH`."""
    return SimpleNamespace(**settings(script))


def defaults(path: str | Path) -> dict:
    """The settings in the source of a script, {NAME: value}, without a command line; only those that are literals."""
    names, found = {name for name, _ in _documented({"__file__": path}) if name}, {}
    for node in ast.parse(Path(path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in names:
            with contextlib.suppress(ValueError):
                found[node.targets[0].id] = ast.literal_eval(node.value)
    return found


def override(
    script: str | dict,
    argv: Sequence[str] | None = None,
    positional: bool = False,
    short: Mapping[str, str] | None = None,
) -> list[str]:
    """Apply each `--name=value` of `argv` (the process's own by default) to the constant NAME of the script, in place.

    A bare `--name` sets a boolean true. `short` maps a one-letter flag with a separate value to a setting, as in
    {"-n": "TRAIN_SHARDS"}. Returns the other arguments if `positional`; else one of them is an error. `--help` prints
    the settings and exits. Raises UserError for an unknown name (with the nearest one) or a value of the wrong type.
    """
    namespace = _namespace(script)
    known, others, short = settings(namespace), [], dict(short or {})
    arguments = iter(sys.argv[1:] if argv is None else argv)
    for argument in arguments:
        if argument == "--":  # torchrun's users write `-m scripts.base_train -- --depth=24`
            continue
        if argument in ("-h", "--help"):
            print(help_text(namespace, short), flush=True)
            sys.exit(0)
        if argument in short:
            value = next(arguments, None)
            if value is None:
                raise UserError(f"{argument} needs a value, as in {argument} 8")
            namespace[short[argument]] = parse(value, known[short[argument]], argument)
            continue
        if not argument.startswith("--"):
            if not positional:
                raise UserError(f"{argument!r}: settings are written --name=value (--help lists them)")
            others.append(argument)
            continue
        flag, equals, text = argument.partition("=")
        name = flag[2:].replace("-", "_").upper()
        if name in namespace.get("REMOVED", ()):
            raise UserError(f"{flag} is gone: {namespace['REMOVED'][name]}")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {flag_of(close[0])}?" if close else ""
            raise UserError(f"{flag}: no such setting{hint} (--help lists them)")
        if not equals:
            if not isinstance(known[name], bool):
                raise UserError(f"{flag} needs a value, as in {flag}={known[name]}")
            text = "true"
        namespace[name] = parse(text, known[name], flag)
    return others


def parse(text: str, default: object, flag: str) -> object:
    """`text` as a value of the type of `default`; raises UserError that names `flag`."""
    try:
        if isinstance(default, bool):
            return BOOLEANS[text.lower()]
        if isinstance(default, int):
            return int(text)
        if isinstance(default, float):
            value = float(text)
            if not math.isfinite(value):
                raise ValueError(text)
            return value
        return text
    except (ValueError, KeyError):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
        raise UserError(f"{flag}={text}: expected {kind}, as in {flag}={default}") from None


def check_numbers(settings: SimpleNamespace, at_least_one: Iterable[str] = (), fractions: Iterable[str] = ()) -> None:
    """Raise UserError if a number is negative, an integer has more than 63 bits, one of the settings `at_least_one` is
    0, or one of the `fractions` above 1.
    """
    for name, value in vars(settings).items():
        if isinstance(value, (int, float)) and value < 0:
            raise UserError(f"{flag_of(name)}={value}: must not be negative")
        if isinstance(value, int) and value >= 2**63:
            raise UserError(f"{flag_of(name)}={value}: must be below 2^63")
    for name in at_least_one:
        if getattr(settings, name) < 1:
            raise UserError(f"{flag_of(name)}={getattr(settings, name)}: at least 1")
    for name in fractions:
        if getattr(settings, name) > 1:
            raise UserError(f"{flag_of(name)}={getattr(settings, name)}: a fraction, at most 1")


def choice(name: str, value: str, allowed: Iterable[str]) -> str:
    """`value` if it is one of `allowed`; raises UserError that lists them if not."""
    if value not in allowed:
        raise UserError(f"{flag_of(name)}={value}: must be one of {', '.join(allowed)}")
    return value


def flag_of(name: str) -> str:
    """The command-line form of a setting: RUN_NAME -> --run-name."""
    return "--" + name.lower().replace("_", "-")


def help_text(script: str | dict, short: Mapping[str, str] | None = None) -> str:
    """What `--help` prints: the script's docstring, then each setting with its default and its comment."""
    namespace = _namespace(script)
    letters = {name: letter for letter, name in dict(short or {}).items()}
    lines = [(namespace.get("__doc__") or "").strip(), ""]
    for name, comment in _documented(namespace):
        if not name:
            lines += ["", f"{comment}:"]
            continue
        letter = f"{letters[name]} N, " if name in letters else ""
        left = f"  {letter}{flag_of(name)}={namespace[name]}"
        wrapped = textwrap.wrap(comment, 46) or [""]
        if len(left) > 32:
            lines.append(left)
            left = ""
        lines += [f"{left:<33}{wrapped[0]}".rstrip(), *(" " * 33 + line for line in wrapped[1:])]
    return "\n".join(lines)


def _namespace(script):
    return vars(sys.modules[script]) if isinstance(script, str) else script


def _documented(namespace):
    """(NAME, comment) of every setting in the script's source, and ("", heading) for each section line in between."""
    found, inside = [], False
    for line in Path(namespace["__file__"]).read_text(encoding="utf-8").splitlines():
        heading = HEADING_LINE.fullmatch(line)
        setting = SETTING_LINE.fullmatch(line)
        if heading:
            found.append(("", heading[1]))
            inside = True
        elif inside and END_LINE.fullmatch(line):
            break
        elif inside and setting:
            found.append((setting[1], setting[2] or ""))
    return found
