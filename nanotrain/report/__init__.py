"""The report of a run, or of several runs against each other: one HTML file, the same as Markdown, and its pictures.

It can be made at any time, also of a run that is still going. What a run did not record is left out, with a line that
says so. Every text may come from a model or a data set, so none of it is trusted: in the page it is escaped, control
characters are replaced, and a policy in its head forbids scripts and the network.
"""

import base64
import html
import re
import time
from collections.abc import Iterable
from pathlib import Path

import jinja2

from nanotrain.errors import UserError
from nanotrain.files import atomic_file
from nanotrain.report import pictures, sections
from nanotrain.report.data import read_run

MARK = "A report of nanotrain"  # in report.html where it may be replaced
# Control characters but tab and newline, halves of surrogate pairs, and what turns the direction of writing.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def write(run_dirs: Iterable[str | Path], out: str | Path = "") -> tuple[Path, str]:
    """Write the report of the runs in some folders into the folder `out`, or into report/ of the first run.

    Returns (path of report.html, why it has no pictures: empty if it has). Raises UserError if a folder holds no run,
    or `out` files that are not of a report.
    """
    runs = [read_run(run_dir) for run_dir in dict.fromkeys(Path(run_dir).absolute() for run_dir in run_dirs)]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)
    drawn, complaint = {}, ""
    try:
        drawn = pictures.draw(runs)
    except ImportError:
        complaint = "Without pictures, because matplotlib is missing: pip install matplotlib brings them."
    except Exception as error:  # of that package, or its fonts: the tables are still worth having
        complaint = f"Without pictures: {type(error).__name__}: {error}"
    page = {
        "title": " against ".join(run.name for run in runs),
        "subtitle": f"{MARK}, {time.strftime('%Y-%m-%d %H:%M')}",
        "sections": sections.build(runs, drawn),
    }
    page["sections"]["Numbers"] += [complaint] if complaint else []
    files = {name: _render(f"{name}.jinja", page).encode() for name in ("report.html", "report.md")}
    files |= {f"{name}.png": drawn.get(name, (None,))[0] for name in pictures.NAMES}
    folder = Path(out).expanduser().absolute() if out else runs[0].folder / "report"
    taken = [name for name in files if (folder / name).exists()]
    if out and taken and not ("report.html" in taken and MARK.encode() in (folder / "report.html").read_bytes()):
        raise UserError(f"--out={out} holds {', '.join(taken)}, not of a report of nanotrain: choose another folder")
    for name, content in files.items():  # report.html first: it has the mark
        if content is None:
            (folder / name).unlink(missing_ok=True)  # of an earlier report
            continue
        with atomic_file(folder / name) as temporary:
            temporary.write_bytes(content)
    return folder / "report.html", complaint


def attempt(run_dir: str | Path) -> str:
    """`write` at the end of a run, and what to say of it. An error is said, not raised: it must not fail the run."""
    try:
        path, complaint = write([run_dir])
    except Exception as error:
        return f"report     not written: {type(error).__name__}: {error}"
    return f"report     {path}\n{complaint}".rstrip()


def _render(name, page):
    """A template of this folder filled in. In HTML everything is escaped; in Markdown a filter has to do it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=name.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.filters |= {"data_uri": _data_uri, "inline": _inline, "fenced": _fenced}
    return environment.get_template(name).render(page)


def _printable(value):
    """`value` with a replacement character for everything that would do something else than be seen."""
    return type(value)(UNPRINTABLE.sub("\ufffd", value)) if isinstance(value, str) else value


def _data_uri(png):
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _inline(text):
    """`text` as Markdown of one line in which nothing has a meaning, also in a table and a link."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _fenced(text):
    """`text` in a block of code that it cannot end itself."""
    ticks = "`" * max([2, *map(len, re.findall("`+", text))]) + "`"
    return f"{ticks}\n{text}\n{ticks}"
