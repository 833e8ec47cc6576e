"""The report of a run, or of several runs against each other: one HTML file with its pictures, also beside it as files.

It can be made at any time, also of a run that is still going. What a run did not record is left out, with a line that
says so. Every text may come from a model or a data set, so none of it is trusted: it is escaped, and a policy in the
page's head forbids scripts and the network.
"""

import base64
import time
from collections.abc import Iterable
from pathlib import Path

import jinja2

from nanotrain import paths
from nanotrain.files import atomic_file
from nanotrain.report import pictures, sections
from nanotrain.report.data import read_run


def write(run_dirs: Iterable[str | Path], out: str | Path = "") -> tuple[Path, str]:
    """Write the report of the runs in some folders into the folder `out`, or into report/ of the first run.

    Returns (path of report.html, why it has no pictures: empty if it has). Raises UserError if a folder holds no run.
    """
    runs = [read_run(run_dir) for run_dir in dict.fromkeys(Path(run_dir).absolute() for run_dir in run_dirs)]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.folder)
    drawn, complaint = {}, ""
    try:
        drawn = pictures.draw(runs)
    except Exception as error:  # no matplotlib, or one that fails: the tables are still worth having
        complaint = f"Without pictures, which need pip install matplotlib ({type(error).__name__}: {error})"
    page = sections.build(runs)
    page["notes"] += [complaint] if complaint else []
    page["title"] = " against ".join(run.name for run in runs)
    page["date"] = time.strftime("%Y-%m-%d %H:%M")
    page["pictures"] = {name: f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in drawn.items()}
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template("report.html.jinja").render(page)
    folder = paths.absolute(out) if out else runs[0].folder / "report"
    with atomic_file(folder / "report.html") as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")
    for name, png in drawn.items():
        (folder / f"{name}.png").write_bytes(png)
    return folder / "report.html", complaint


def attempt(run_dir: str | Path) -> str:
    """`write` at the end of a run, and what to say of it. An error is said, not raised: it must not fail the run."""
    try:
        path, complaint = write([run_dir])
    except Exception as error:
        return f"report     not written: {type(error).__name__}: {error}"
    return f"report     {path}\n{complaint}".rstrip()
