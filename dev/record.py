"""Record what training computes, to check that a change keeps it bit-identical.

    python dev/record.py OUT.json               eight small runs of 30 steps, about five minutes on two cores
    python dev/record.py OUT.json BEFORE.json   the same, then compare; exit code 1 if anything differs

A record has, for each run, data_hash, loss and gradient norm of every step, and a SHA-256 of the weights in parameter
order, independent of their names. Bits depend on the machine and on torch: make both records on one machine.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMON = ["--depth=2", "--total-batch-size=3072", "--num-iterations=30", "--eval-every=0", "--compile=off"]
COMMON += ["--report=false", "--save-every=10"]
RUNS = {  # name: (ranks, flags, step after which the run is killed; 0: never)
    "default": (1, ["--compile=on", "--total-batch-size=4096"], 0),
    "accumulation": (1, ["--depth=3", "--device-batch-size=4"], 0),
    "plain": (1, ["--plain=true", "--bigram-rows=0"], 0),
    "grad_checkpoint": (1, ["--grad-checkpoint=true"], 0),
    "two_ranks": (2, [], 0),
    "three_ranks": (3, [], 0),
    "killed": (1, [], 15),
    "batch_ramp": (1, ["--batch-ramp=true", "--total-batch-size=4096"], 0),
}
KEYS = ("data_hash", "train/loss", "train/grad_norm")


def main(out: str, before: str = "") -> None:
    """Make all runs, write the record to `out`, and compare it with the record `before` if given."""
    with tempfile.TemporaryDirectory(prefix="nanotrain-record-") as folder:
        os.environ |= {"NANOTRAIN_DIR": folder, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        module("nanotrain.dataset", "--dataset=stdlib")
        module("scripts.tok_train", "--vocab-size=4096")
        with ThreadPoolExecutor(2) as pool:
            record = dict(zip(RUNS, pool.map(lambda name: run(Path(folder), name, *RUNS[name]), RUNS), strict=True))
    Path(out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if before:
        compare(json.loads(Path(before).read_text(encoding="utf-8")), record)


def module(name: str, *arguments: str) -> None:
    """Run a module of this repository."""
    subprocess.run([sys.executable, "-m", name, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def run(folder: Path, name: str, ranks: int, flags: list[str], killed_after: int) -> dict:
    """Train the run `name` and return its record."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    settings = {flag.partition("=")[0]: flag for flag in [*COMMON, *flags]}
    command = [*launch, "-m", "scripts.base_train", f"--run-name={name}", *settings.values()]
    metrics = folder / "runs" / name / "metrics.jsonl"
    with open(folder / f"{name}.log", "w", encoding="utf-8") as log:
        if killed_after:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
            while not metrics.exists() or metrics.read_text(encoding="utf-8").count("train/loss") < killed_after:
                assert process.poll() is None, f"{name} ended before it was killed"
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
            command.append("--resume=true")
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True)
    rows = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "train/loss" in row:
            rows[row["step"]] = [row[key] for key in KEYS]
    return {"steps": [rows[step] for step in sorted(rows)], "weights": weights_sha256(folder / "runs" / name)}


def weights_sha256(run_dir: Path) -> str:
    """SHA-256 of a run's weights, in the order of the model's parameters."""
    code = (
        "import hashlib, sys, torch; from nanotrain.checkpoint import load_model;"
        "digest = hashlib.sha256();"
        "[digest.update(p.detach().flatten().view(torch.uint8).numpy())"
        " for p in load_model(sys.argv[1], device='cpu')[0].parameters()];"
        "print(digest.hexdigest())"
    )
    command = [sys.executable, "-c", code, str(run_dir)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def compare(before: dict, after: dict) -> None:
    """Print what is equal in each run; exit with 1 if anything differs."""
    same = True
    for name, old in before.items():
        new = after[name]
        columns = [[row[place] for row in old["steps"]] == [row[place] for row in new["steps"]] for place in range(3)]
        equal = dict(zip((*KEYS, "weights"), (*columns, old["weights"] == new["weights"]), strict=True))
        same &= all(equal.values())
        print(
            f"{name:<16}", ", ".join(f"{key} {'equal' if is_equal else 'DIFFERS'}" for key, is_equal in equal.items())
        )
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
