"""base_train with something that goes wrong, for the tests of what must hold then.

python -m tests.faulty FOLDER FAULTS --depth=1 ...

FAULTS, separated by commas; STEP 1 is the first that this process does:

    nan@RANK:STEP         the loss of this rank is NaN
    kill@RANK:STEP        the rank ends itself with SIGKILL, unless torchrun has already started it again
    lose@RANK:STEP        once, the rank ends its torchrun with SIGKILL and then itself, as a machine does that fails
    terminate@RANK:STEP   the rank sends SIGTERM to torchrun, and begins the step when it has got it back
    late@RANK             the rank starts LATE seconds after the others, where torchrun has started it again
    none                  all goes well

Every rank leaves two files in FOLDER: `rank0.hashes`, a hash of all parameters before each of its steps and at the end,
and `rank0.end`, the exit code and message it ends with. A killed one leaves no end, but `rank0.killed`, the step.
"""

import hashlib
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch

from nanotrain import config, errors, guard, loss, optim
from scripts import base_train

RANK = os.environ.get("RANK", "0")
RESTARTED = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
LATE = 3
LONGEST_WAIT = 30  # seconds for torchrun to pass SIGTERM on


def main():
    folder, faults = Path(sys.argv[1]), sys.argv[2].split(",")
    step, seen, stops = 0, [], []
    set_schedule, mean_loss = optim.set_schedule, loss.mean_loss

    def planned(what):
        return f"{what}@{RANK}:{step}" in faults

    def record():
        parameters = [p for optimizer in seen for group in optimizer.param_groups for p in group["params"]]
        digest = hashlib.sha256()
        for parameter in parameters:
            digest.update(parameter.detach().flatten().view(torch.uint8).numpy())
        with open(folder / f"rank{RANK}.hashes", "a", encoding="utf-8") as file:
            file.write(digest.hexdigest() + "\n")

    def beginning(optimizers, *schedule):
        nonlocal step
        step, seen[:] = step + 1, optimizers
        record()
        if planned("kill") and not RESTARTED:
            (folder / f"rank{RANK}.killed").write_text(str(step), encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)
        if planned("lose") and not (folder / f"rank{RANK}.lost").exists():
            (folder / f"rank{RANK}.lost").write_text(str(step), encoding="utf-8")
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        if planned("terminate"):
            os.kill(os.getppid(), signal.SIGTERM)
            until = time.monotonic() + LONGEST_WAIT
            while not stops[0].requested and time.monotonic() < until:
                time.sleep(0.01)
        set_schedule(optimizers, *schedule)

    def poisoned(*arguments):
        return mean_loss(*arguments) * (math.nan if planned("nan") else 1.0)

    class KnownStopRequest(guard.StopRequest):
        def __init__(self, prints):
            super().__init__(prints)
            stops.append(self)

    optim.set_schedule, loss.mean_loss, guard.StopRequest = beginning, poisoned, KnownStopRequest
    config.override(vars(base_train), sys.argv[3:])
    if f"late@{RANK}" in faults and RESTARTED:
        time.sleep(LATE)
    end = "an error that should not be"
    try:
        base_train.main()
        end = "0"
    except errors.UserError as error:
        end = f"{error.exit_code} {error}"
        raise
    finally:
        record()
        (folder / f"rank{RANK}.end").write_text(end, encoding="utf-8")


if __name__ == "__main__":
    errors.run(main)
