"""The report of a run, or of several runs against each other, as tables and pictures.

python -m nanotrain.report d4            writes report/report.html into the folder of the run d4
python -m nanotrain.report d4 d4-wide    both runs in every picture and table, in the folder of the first
"""

from collections.abc import Sequence

from nanotrain import config, errors, paths, report
from nanotrain.errors import UserError

# --- settings
OUT = ""  # folder for the report; empty: report/ in the folder of the first run
# ------------


def main(names: Sequence[str]) -> None:
    if not names:
        raise UserError("which run? Give its name or its folder, as in python -m nanotrain.report d4")
    print(report.write([paths.run_dir(name) for name in names], OUT))


if __name__ == "__main__":
    errors.run(lambda: main(config.override(__name__, positional=True)))
