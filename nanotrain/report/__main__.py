"""Write the report of a run, or compare several runs in one.

python -m nanotrain.report d4            writes report/report.html to the folder of run d4
python -m nanotrain.report d4 d4-wide    both runs in every picture and table, in the folder of the first
"""

from collections.abc import Sequence

from nanotrain import config, errors, paths, report

# --- settings
OUT = ""  # folder for the report; empty: report/ in the folder of the first run
# ------------


def main(names: Sequence[str]) -> None:
    if not names:
        raise errors.UserError("no run given: give names or folders, as in python -m nanotrain.report d4")
    print(report.write([paths.run_dir(name) for name in names], OUT))


if __name__ == "__main__":
    errors.run(lambda: main(config.override(__name__, positional=True)))
