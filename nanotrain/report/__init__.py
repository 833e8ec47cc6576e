"""The report of one run, or of several side by side: an HTML file with pictures, which also lie beside it as files.

It can be written at any time, even while the run is still training. What a run did not record is left out, and the page
says so. Any text may come from a model or a data set, so none is trusted: all of it is escaped, and a policy in the
page's head forbids scripts and the network.
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
    """Write the report of the runs in some folders into the folder `out`, or into report/ of the first run.

    Returns the path of report.html. Raises UserError if a folder holds no run.
    """
    runs = [read_run(run_dir) for run_dir in dict.fromkeys(Path(run_dir).absolute() for run_dir in run_dirs)]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.folder)
    page = sections.build(runs)
    page["title"] = " and ".join(run.name for run in runs)
    page["date"] = time.strftime("%Y-%m-%d %H:%M")
    page["pictures"] = pictures.draw(runs)
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
    """`write` at the end of a run, and what to say of it. An error is said, not raised: it must not fail the run."""
    try:
        return f"report     {write([run_dir])}"
    except Exception as error:
        return f"report     not written: {type(error).__name__}: {error}"
