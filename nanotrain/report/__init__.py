"""Reports: one HTML file for one run or for several side by side, with the curves also saved as SVG files.

A report can be written at any time, even during training; what a run did not record is left out. Models and data sets
can contain any text, so all of it is escaped and a policy in the page's head forbids scripts and the network.
"""

import time
from collections.abc import Iterable
from pathlib import Path

import jinja2

from nanotrain import paths
from nanotrain.files import atomic_file
from nanotrain.report import pictures, sections
from nanotrain.report.data import read_run


def write(run_dirs: Iterable[str | Path], out: str | Path = "") -> Path:
    """Write the report of the runs in `run_dirs` to the folder `out` (default: report/ in the first run's folder).
    Returns the path of report.html. Raises UserError if a folder holds no run.
    """
    runs = [read_run(run_dir) for run_dir in dict.fromkeys(Path(run_dir).absolute() for run_dir in run_dirs)]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.folder)
    page = {"title": " and ".join(run.name for run in runs), "date": time.strftime("%Y-%m-%d %H:%M")}
    page |= {"pictures": pictures.draw(runs), **sections.build(runs)}
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template("report.html.jinja").render(page)
    folder = paths.absolute(out) if out else runs[0].folder / "report"
    with atomic_file(folder / "report.html") as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")
    for name, svg in page["pictures"].items():
        (folder / f"{name}.svg").write_text(svg, encoding="utf-8", errors="replace")
    return folder / "report.html"


def attempt(run_dir: str | Path) -> str:
    """Write a run's report and return a line about it. Errors go into the line: a report must not fail the run."""
    try:
        return f"report     {write([run_dir])}"
    except Exception as error:
        return f"report     not written: {type(error).__name__}: {error}"
