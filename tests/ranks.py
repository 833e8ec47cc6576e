"""base_train with a hash of all parameters written before every step and after the last, by every rank.

torchrun --standalone --nproc_per_node=2 -m tests.ranks FOLDER NUDGED_STEP STOPPED_STEP --depth=1 ...

Before step NUDGED_STEP a weight of rank 1 is nudged, which whoever compares the hashes must notice: one of the table of
pairs, because every rank updates all of that; what one rank owns all get from it anew. In STOPPED_STEP rank 1 alone
gets SIGTERM.
"""

import hashlib
import os
import signal
import sys
from pathlib import Path

import torch

from nanotrain import config, errors, optim
from scripts import base_train


def main():
    folder, nudged_step, stopped_step = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rank, step, seen = os.environ.get("RANK", "0"), 0, []
    set_schedule = optim.set_schedule

    def record(optimizers):
        digest = hashlib.sha256()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    digest.update(parameter.detach().flatten().view(torch.uint8).numpy())
        with open(folder / f"rank{rank}", "a", encoding="utf-8") as file:
            file.write(digest.hexdigest() + "\n")

    def recording(optimizers, *schedule):
        nonlocal step
        seen[:], step = optimizers, step + 1
        if step == nudged_step and rank == "1":
            with torch.no_grad():
                optimizers[-1].param_groups[0]["params"][0][0, 0] += 1e-6
        if step == stopped_step and rank == "1":
            signal.raise_signal(signal.SIGTERM)
        record(optimizers)
        set_schedule(optimizers, *schedule)

    optim.set_schedule = recording
    config.override(vars(base_train), sys.argv[4:])
    base_train.main()
    record(seen)


if __name__ == "__main__":
    errors.run(main)
