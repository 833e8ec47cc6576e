"""Random search over dev/sweep.yaml without a wandb account: trains runs one by one and tabulates them.

python dev/sweep.py NAME COUNT                          COUNT runs in total; finished runs are not repeated
python dev/sweep.py NAME COUNT --depth=2 --data-dir=D   with other settings of base_train in every run

After an interruption the same command continues, even in the middle of a run. Run n of a sweep NAME always has the same
settings. Results go to NANOTRAIN_DIR/sweeps: NAME.jsonl, and NAME.md with the best run first.
"""

import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))
from nanotrain import errors, paths
from nanotrain.errors import UserError

ROOT = Path(__file__).parent.parent
SPACE = ROOT / "dev" / "sweep.yaml"
RESULTS = {5: "out of memory", 7: "not finite", 8: "hung"}  # exit codes that count as a result; others end the sweep


def draw(parameters, draws):
    """{name: value} of each parameter of a wandb sweep, drawn with the random.Random `draws`."""
    return {name: _value(name, spec, draws) for name, spec in parameters.items()}


def _value(name, spec, draws):
    if "value" in spec:
        return spec["value"]
    if "values" in spec:
        return draws.choice(spec["values"])
    if spec.get("distribution") == "int_uniform":
        return draws.randint(spec["min"], spec["max"])
    if spec.get("distribution") == "uniform":
        return float(f"{draws.uniform(spec['min'], spec['max']):.4g}")
    if spec.get("distribution") == "log_uniform_values":
        return float(f"{math.exp(draws.uniform(math.log(spec['min']), math.log(spec['max']))):.4g}")
    known = "value, values, or a distribution int_uniform, uniform or log_uniform_values"
    raise UserError(f"{SPACE}: {name}: {spec}: must have one of {known}")


def train(run_name, settings, flags):
    """Train or resume a run and return its exit code. On Ctrl-C and SIGTERM it saves first."""
    drawn = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "scripts.base_train", "--resume", f"--run-name={run_name}", *drawn, *flags]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


def result_of(run_name):
    """(bits per byte, steps) of a run; None instead of bits per byte if its last step was not evaluated."""
    path = paths.run_dir(run_name) / "metrics.jsonl"  # missing if the run failed before its first step
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = max((row["step"] for row in rows), default=0)
    found = [row["val/bpb"] for row in rows if "val/bpb" in row and row["step"] == steps]
    return (found[-1] if found else None), steps


def table(results):
    """The results as a Markdown table, best first, with the settings that differ."""
    names = [name for name in results[0]["settings"] if len({str(one["settings"][name]) for one in results}) > 1]
    lines = ["| " + " | ".join(["run", "val bpb", "steps", "minutes", *names]) + " |", "|---" * (4 + len(names)) + "|"]
    for one in sorted(results, key=lambda one: (one["bpb"] is None, one["bpb"])):
        bpb = RESULTS.get(one["exit_code"], "none") if one["bpb"] is None else f"{one['bpb']:.4f}"
        values = [one["settings"][name] for name in names]
        lines.append("| " + " | ".join(map(str, [one["run"], bpb, one["steps"], one["minutes"], *values])) + " |")
    return "\n".join(lines) + "\n"


def sweep(name, count, flags):
    """Train the runs missing from `count` and return all results."""
    parameters = yaml.safe_load(SPACE.read_text(encoding="utf-8"))["parameters"]
    fixed = {flag[2:].partition("=")[0].replace("-", "_") for flag in flags}
    parameters = {name: spec for name, spec in parameters.items() if name not in fixed}
    folder = paths.base_dir() / "sweeps"
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / f"{name}.jsonl"
    results = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    for number in range(count):
        settings = draw(parameters, random.Random(f"{name} {number}"))
        if number < len(results):
            if (results[number]["settings"], results[number]["flags"]) != (settings, flags):
                raise UserError(f"{record}: run {number} had other settings: give this sweep another NAME")
            continue
        run_name, begin = f"sweep-{name}-{number:03d}", time.monotonic()
        print(f"== {run_name} ({number + 1} of {count})", flush=True)
        code = train(run_name, settings, flags)
        if code and code not in RESULTS:
            raise UserError(f"{run_name} failed with exit code {code}, as the next runs would; see above")
        bpb, steps = result_of(run_name)
        if code:
            bpb = None  # results before a failure do not count
        elif bpb is None:
            raise UserError(f"{run_name} was stopped at step {steps}: the same command continues")
        minutes = round((time.monotonic() - begin) / 60, 1)
        one = {"run": run_name, "bpb": bpb, "steps": steps, "minutes": minutes, "exit_code": code}
        results.append({**one, "settings": settings, "flags": flags})
        with open(record, "a", encoding="utf-8") as file:
            file.write(json.dumps(results[-1]) + "\n")
        (folder / f"{name}.md").write_text(table(results), encoding="utf-8")
    return results


def main():
    flags = [argument for argument in sys.argv[1:] if argument.startswith("--")]
    others = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    if len(others) != 2 or not others[1].isdecimal() or int(others[1]) < 1:
        raise UserError("give a name and a number of runs: python dev/sweep.py NAME 20 [--setting=value ...]")
    name = paths.checked_name(others[0], "name of a sweep")
    print(f"\n{table(sweep(name, int(others[1]), flags))}")


if __name__ == "__main__":
    errors.run(main)
