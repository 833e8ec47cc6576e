"""Kill a training run again and again, and show that it ends as a run that nobody disturbed.

    python -m tests.soak --kills=50

Two runs of a tiny model, in processes of their own. One is left alone. The other is ended with
SIGKILL at random instants, half of them aimed at a save, and started again with --resume each time. Then weights,
optimizer state, loader state and the record must be equal to the bit, and no kill may have cost a finished checkpoint.
The exit code is 1 if anything differs.
"""

import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from nanotrain import checkpoint, config, errors
from nanotrain.errors import CheckpointError, UserError
from nanotrain.store import Store
from nanotrain.tokenizer import BPETokenizer
from tests.conftest import ROOT, TINY_RUN, make_shards, make_texts

# --- soak
KILLS = 50  # times that the run is ended with SIGKILL
SEED = 1  # of the instants at which that happens
NUM_ITERATIONS = 0  # steps; 0: enough for so many kills
# ------------

SAVE_EVERY, EVAL_EVERY = 3, 10  # steps; an evaluation may save a best checkpoint too
TINY = {**TINY_RUN, "DEVICE": "cpu"}
KINDS = ("save", "training", "save", "anytime")  # of instants, in turn
MOST_STEPS, MOST_SAVES = 30, 6  # of one process, before it is killed
STEPS_PER_KILL, SPARE_STEPS = 20, 40  # a kill comes after some ten steps that count
FILES_OF_A_SAVE = 4  # weights, optimizer, state, manifest
LONGEST_WAIT = 600  # seconds for any one process


class SoakError(UserError):
    """What should be equal is not."""

    exit_code = 1


@dataclass
class Result:
    """What came of all the kills."""

    kills: int = 0
    cut_saves: int = 0  # that left a temporary folder behind
    rejected: int = 0  # restarts that found a checkpoint which did not verify
    steps: list = field(default_factory=list)  # of the newest checkpoint after each kill
    problems: list = field(default_factory=list)


def main():
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nanotrain-soak-") as temporary:
        result = soak(Path(temporary))
    found = f"{result.cut_saves} cut a save; {result.rejected} restarts rejected a checkpoint"
    print(f"{result.kills} kills: {found}; {time.monotonic() - begin:.0f} s")
    if result.problems:
        raise SoakError("the disturbed run differs:\n  " + "\n  ".join(result.problems))
    print("equal to the undisturbed run: weights, optimizer state, loader state, losses, rows, evaluations")


def soak(folder):
    """Make both runs in `folder`; the Result says where they differ, and whether a kill cost a finished checkpoint."""
    make_inputs(folder)
    num_iterations = NUM_ITERATIONS or STEPS_PER_KILL * KILLS + SPARE_STEPS
    settings = {"NUM_ITERATIONS": num_iterations, "SAVE_EVERY": SAVE_EVERY, "EVAL_EVERY": EVAL_EVERY}
    with Training(folder, "whole", settings) as whole:
        whole.wait_for(lambda: whole.new_steps() > 0)
        start_seconds = time.monotonic() - whole.begin
        whole.finish()
    seconds = time.monotonic() - whole.begin
    print(f"undisturbed: {num_iterations} steps in {seconds:.0f} s, the first after {start_seconds:.1f} s", flush=True)

    result, draw = Result(), random.Random(SEED)
    for kind in itertools.islice(itertools.cycle(KINDS), KILLS):
        with Training(folder, "killed", settings) as victim:
            instant, reached, delay = aim(kind, draw, victim, start_seconds)
            if not victim.wait_for(reached):
                raise SoakError(f"the run ended after {result.kills} kills: --num-iterations={num_iterations} is few")
            time.sleep(delay)
            seen = max(Store(victim.run).steps(), default=0)
            victim.process.kill()
            victim.process.wait()
            result.kills += 1
            result.cut_saves += len(victim.begun_saves()) > 0
            step, problems = after_a_kill(victim.run, seen, victim.first_step, victim.output())
            result.rejected += "not used:" in victim.output()
        result.steps.append(step)
        result.problems += [f"kill {result.kills}, {instant}: {problem}" for problem in problems]
        print(f"kill {result.kills} of {KILLS}: {instant}; goes on from step {step}", *problems, sep="; ", flush=True)
    with Training(folder, "killed", settings) as last:
        last.finish()
    result.problems += differences(whole.run, last.run)
    return result


def make_inputs(folder):
    """Shards and tokenizer, as base_train finds them by itself."""
    make_shards(folder / "data" / "tiny")
    BPETokenizer.train(make_texts(50), 320).save(folder / "tokenizer")


class Training:
    """A process that trains, and what can be seen of it from outside. It ends with the `with` block at the latest."""

    def __init__(self, folder, name, settings):
        self.run, self.log = folder / "runs" / name, folder / f"{name}.log"
        self.checkpoints, self.metrics = self.run / "checkpoints", self.run / "metrics.jsonl"
        self.first_step = max(Store(self.run).steps(), default=0)
        self.old_names = set(self.names())
        self.old_metrics = self.metrics.stat().st_ino if self.metrics.exists() else None
        options = flags(**TINY, **settings, RUN_NAME=name, RESUME=True)
        command = [sys.executable, "-m", "scripts.base_train", *options]
        environment = {**os.environ, "NANOTRAIN_DIR": str(folder), "OMP_NUM_THREADS": "1"}
        self.begin = time.monotonic()
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()

    def output(self):
        return self.log.read_text(encoding="utf-8")

    def names(self):
        return os.listdir(self.checkpoints) if self.checkpoints.is_dir() else []

    def begun_saves(self):
        """The temporary folders of saves that are there because of this process."""
        return [name for name in self.names() if name.startswith(".tmp-step_") and name not in self.old_names]

    def new_steps(self):
        """How many steps it has recorded since it was started."""
        try:
            with open(self.metrics, "rb") as file:
                if os.fstat(file.fileno()).st_ino == self.old_metrics:  # it first writes the file anew
                    return 0
                file.seek(max(file.seek(0, os.SEEK_END) - 2000, 0))
                lines = file.read().split(b"\n")
        except FileNotFoundError:
            return 0
        return json.loads(lines[-2])["step"] - self.first_step if len(lines) > 1 else 0

    def wait_for(self, reached):
        """True once `reached()` is, False if the process has done its work before. Raises SoakError if it failed."""
        while not reached():
            if self.process.poll() is not None:
                self.finish()
                return False
            if time.monotonic() - self.begin > LONGEST_WAIT:
                raise SoakError(f"nothing has happened for {LONGEST_WAIT} s: {self.output()[-2000:]}")
            time.sleep(0.0002)  # a save takes a few milliseconds
        return True

    def finish(self):
        """Wait until it ends by itself. Raises SoakError if it does so with an error."""
        if self.process.wait(LONGEST_WAIT):
            raise SoakError(f"training ended with exit code {self.process.returncode}: {self.output()[-2000:]}")


def aim(kind, draw, victim, start_seconds):
    """(words, function, seconds): kill this victim so many seconds after the function gives True."""
    if kind == "anytime":  # imports, reading the checkpoint, the first step
        seconds = draw.uniform(0, start_seconds)
        return f"{seconds:.2f} s after its start", lambda: time.monotonic() - victim.begin >= seconds, 0.0
    if kind == "training":
        steps, delay = draw.randint(1, MOST_STEPS), draw.uniform(0, 0.01)
        return f"{1000 * delay:.1f} ms after {steps} steps", lambda: victim.new_steps() >= steps, delay
    saves, files, seen = draw.randint(1, MOST_SAVES), draw.randint(0, FILES_OF_A_SAVE + 1), []

    def reached():
        seen.extend(name for name in victim.begun_saves() if name not in seen)
        if len(seen) < saves:
            return False
        try:
            return len(os.listdir(victim.checkpoints / seen[saves - 1])) >= files
        except FileNotFoundError:  # it has its final name
            return True

    if files > FILES_OF_A_SAVE:  # old checkpoints are about to be removed
        delay = draw.uniform(0, 0.005)
        return f"{1000 * delay:.1f} ms after save {saves} got its final name", reached, delay
    return f"in save {saves}, at {files} files", reached, 0.0


def after_a_kill(run, seen, first_step, output):
    """(step, problems): the checkpoint from which the next process goes on, and what is wrong with that. seen: the
    newest step saved before the kill. first_step: from which the killed process should have gone on.
    """
    try:
        step = Store(run).newest()[0] or 0
    except CheckpointError as error:
        return 0, [str(error)]
    problems = [] if step >= seen else [f"step {seen} was saved, but the newest that verifies is step {step}"]
    resumed = re.search(r"^resume +\S+ at step (\d+)$", output, re.MULTILINE)
    if resumed and int(resumed[1]) != first_step:
        problems.append(f"it went on from step {resumed[1]} and not from step {first_step}")
    return step, problems


def differences(first, second):
    """Sentences that say where two finished runs differ in what must be equal to the bit."""
    found, contents = [], []
    for run in (first, second):
        step, files, _ = Store(run).newest()
        state = checkpoint.unpack(files)[2]
        for name in ("seconds", "evaluation_seconds", "core_seconds"):
            del state["train_state"][name]
        del state["environment"]["commit"]  # which may differ
        for name in ("RUN_NAME", "RESUME"):
            del state["settings"][name]
        digests = {name: hashlib.sha256(files[name]).hexdigest() for name in (checkpoint.MODEL, checkpoint.OPTIMIZER)}
        contents.append({"last step": step, **digests, **state})
    for name in contents[0].keys() | contents[1].keys():
        values = [content.get(name) for content in contents]
        if values[0] != values[1]:
            found.append(f"{name}: {str(values[0])[:200]} and {str(values[1])[:200]}")
    for key in ("train/loss", "data_hash", "val/bpb"):
        for row, other in itertools.zip_longest(recorded(first, key), recorded(second, key)):
            if row != other:
                found.append(f"metrics.jsonl, {key}: (step, value) is {row} and {other}")
                break
    return found


def recorded(run, key):
    """[(step, value)] of the rows of metrics.jsonl that have `key`, as they stand there."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(row["step"], row[key]) for row in rows if key in row]


def flags(**settings):
    """The command line that gives these settings."""
    return [f"{config.flag_of(name)}={value}" for name, value in settings.items()]


if __name__ == "__main__":
    errors.run(lambda: config.override(__name__), main)
