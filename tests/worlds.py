"""base_train on several world sizes, one run after the other, by processes that are forked from one which has imported
everything.

python -m tests.worlds FOLDER

FOLDER/plan.json is a list of {"name", "ranks", "stop", "fault", "flags"}. In step "stop" the last rank alone gets
SIGTERM, and the fault is what goes wrong:

    unsent        rank 1 does not send the parameters that it has updated
    unaveraged    the gradients are not averaged over the ranks
    lost          the optimizer state of rank 1 is zeros in what is saved
    none          all goes well

A run's ranks leave FOLDER/NAME.rank0.json and so on: the steps begun and the bytes of optimizer state; rank 0 leaves
the first step's gradients in FOLDER/NAME.gradients; and FOLDER/codes.json has the exit code of every rank.
"""

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from nanotrain import config, errors, optim, trainer
from nanotrain.dist import DistContext
from scripts import base_train


def main():
    folder = Path(sys.argv[1])
    codes = {}
    for plan in json.loads((folder / "plan.json").read_text(encoding="utf-8")):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = [fork(folder, plan, rank, port) for rank in range(plan["ranks"])]
        codes[plan["name"]] = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    (folder / "codes.json").write_text(json.dumps(codes), encoding="utf-8")


def fork(folder, plan, rank, port):
    """The id of a process that is this rank of the planned run."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(folder / f"{plan['name']}.rank{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(plan["ranks"]))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(plan["ranks"]))
        errors.run(lambda: train(folder, plan, rank))
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def train(folder, plan, rank):
    """The run, with its fault, and what is recorded of it."""
    record = {"steps": 0, "state": 0}
    set_schedule, collect_gradients = optim.set_schedule, optim.collect_gradients

    def recording(optimizers, *schedule):
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        record["state"] = sum(tensor.untyped_storage().nbytes() for state in states for tensor in state.values())
        record["steps"] += 1
        (folder / f"{plan['name']}.rank{rank}.json").write_text(json.dumps(record), encoding="utf-8")
        if record["steps"] == plan["stop"] and rank == plan["ranks"] - 1:
            signal.raise_signal(signal.SIGTERM)
        set_schedule(optimizers, *schedule)

    def collecting(parameters, dist):
        found = collect_gradients(parameters, dist)
        if record["steps"] == 1 and rank == 0:
            gradients = {str(number): parameter.grad.to_dense() for number, parameter in enumerate(parameters)}
            save_file(gradients, folder / f"{plan['name']}.gradients")
        return found

    optim.set_schedule, optim.collect_gradients = recording, collecting
    {"unsent": unsent, "unaveraged": unaveraged, "lost": lost, "none": lambda: None}[plan["fault"]]()
    torch.set_num_threads(1)  # as torchrun does
    config.override(vars(base_train), plan["flags"])
    base_train.main()


def unsent():
    send = DistContext.broadcast_owned
    DistContext.broadcast_owned = lambda self, owned: send(self, [owned[0], [], *owned[2:]])


def unaveraged():
    class Alone(DistributedDataParallel):
        require_backward_grad_sync = property(lambda self: False, lambda self, wanted: None)

    trainer.DistributedDataParallel = Alone


def lost():
    gather = DistContext.gather_to_rank0
    DistContext.gather_to_rank0 = lambda self, part, sizes: gather(self, part * 0 if self.rank == 1 else part, sizes)


if __name__ == "__main__":
    main()
