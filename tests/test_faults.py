"""Two ranks under torchrun: SIGTERM, SIGKILL and numbers that are not finite, at a known step of a known rank; and two
nodes, of which one is lost.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from nanotrain import checkpoint
from tests import soak

pytestmark = pytest.mark.slow

LONGEST = 100  # seconds for a launch: whatever happens, all ranks have left by then
STEPS, EVERY = 12, 5
STOPPED, SAVED, KILLED = 4, 5, 8  # steps: SIGTERM comes in one, another is the last saved before that of SIGKILL
BAD = {"single": 3, "first": 6, "second": 7, "third": 8}
SHORT, LONG = 15, 60  # seconds for which a node waits for another
NODE = (  # the arguments of torchrun on every node, beside the place where they meet
    "--nnodes=2",
    "--nproc_per_node=1",
    "--max-restarts=3",
    "--rdzv-backend=c10d",
    "--local-addr=127.0.0.1",  # whatever this machine's name resolves to
)
# torch 2.13 otherwise tells a node that comes anew nothing of where the others meet (README, Several machines)
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def start(folder, left, name, fault, torchrun, stdout, stderr, variables=(), **settings):
    """The process of torchrun with these arguments and environment variables; its ranks of tests.faulty leave their
    files in `left`.
    """
    settings = {**soak.TINY, "NUM_ITERATIONS": STEPS, "EVAL_EVERY": EVERY, "SAVE_EVERY": EVERY, **settings}
    settings.update(DEVICE_BATCH_SIZE=2, RESUME=True, RUN_NAME=name)
    program = ("-m", "tests.faulty", str(left), fault, *soak.flags(**settings))
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun, *program]
    environment = {**os.environ, **dict(variables), "NANOTRAIN_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=soak.ROOT, env=environment, text=True, stdout=stdout, stderr=stderr)


class Nodes:
    """Two nodes that train one run: each a torchrun with one rank, started by the same command. Node 0 has the place
    where they meet, and rank 0.
    """

    def __init__(self, folder, left, name, fault, patience):
        """patience: seconds for which a node waits for the other."""
        self.left, self.run = left, folder / "runs" / name
        left.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        configuration = f"--rdzv-conf=join_timeout={patience},keep_alive_interval=1,keep_alive_max_attempt=4"
        torchrun = (*NODE, f"--rdzv-endpoint=127.0.0.1:{self.port}", configuration)
        self.options = (folder, left, name, fault, torchrun)
        self.begin, self.processes = time.monotonic(), []

    def __enter__(self):
        self.start()
        self.wait_for(self.is_open)
        self.start()
        return self

    def __exit__(self, *error):
        for process in self.processes:
            if process.poll() is None:
                process.terminate()  # and not kill, so that torchrun takes its ranks along
                process.wait()

    def start(self):
        """Start a torchrun; what it prints goes into a file."""
        number = len(self.processes)
        with open(self.left / f"node{number}.log", "wb") as log:
            self.processes.append(start(*self.options, stdout=log, stderr=log, variables=OWN_STORE))

    def is_open(self):
        """Whether the first node can be met."""
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self.port)):
            return True

    def wait_for(self, reached):
        """Return once `reached()` is."""
        while not reached():
            assert time.monotonic() - self.begin < 2 * LONGEST, [self.log(n) for n in range(len(self.processes))]
            time.sleep(0.01)

    def end_of(self, number):
        """The exit code of the torchrun that was started as this number."""
        self.wait_for(lambda: self.processes[number].poll() is not None)
        return self.processes[number].returncode

    def log(self, number):
        """What the torchrun that was started as this number and its ranks have printed."""
        return (self.left / f"node{number}.log").read_text(encoding="utf-8")

    def read(self, name):
        """The contents of a file that a rank has left."""
        return (self.left / name).read_text(encoding="utf-8")


def launch(folder, name, fault, restarts=0, **settings):
    """Run two ranks of tests.faulty; returns their exit code, what they printed, and what each left behind."""
    left = folder / f"{name}-{fault.partition('@')[0]}"
    left.mkdir()
    torchrun = ("--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}")
    process = start(folder, left, name, fault, torchrun, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings)
    try:
        printed, errors = process.communicate(timeout=LONGEST)
    finally:
        if process.poll() is None:
            process.terminate()  # and not kill, so that torchrun takes its ranks along
            process.communicate()
    files = {path.name: path.read_text(encoding="utf-8") for path in left.iterdir()}
    return SimpleNamespace(
        code=process.returncode,
        printed=printed,
        errors=errors,
        run=folder / "runs" / name,
        hashes=[files[f"rank{rank}.hashes"].split() for rank in range(2)],
        ends=[files.get(f"rank{rank}.end") for rank in range(2)],
        killed=[files.get(f"rank{rank}.killed") for rank in range(2)],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The place of data, tokenizer and runs."""
    made = tmp_path_factory.mktemp("faults")
    soak.make_inputs(made)
    return made


@pytest.fixture(scope="module")
def whole(folder):
    """Two ranks that nothing has disturbed."""
    done = launch(folder, "whole", "none")
    assert (done.code, done.ends) == (0, ["0", "0"]), done.errors
    return done


@pytest.fixture(scope="module")
def stopped(folder):
    """SIGTERM to torchrun, while rank 1 is in step STOPPED."""
    done = launch(folder, "disturbed", f"terminate@1:{STOPPED}")
    shutil.copytree(done.run, folder / "runs" / "stopped")  # as it is before the next fixture goes on with it
    return done


@pytest.fixture(scope="module")
def killed(folder, stopped):
    """The same run resumed; SIGKILL of rank 1 in step KILLED; torchrun starts both again, and rank 0 is the last."""
    return launch(folder, "disturbed", f"kill@1:{KILLED - STOPPED},late@0", restarts=1)


@pytest.fixture(scope="module")
def poisoned(folder):
    """The loss of rank 1 is NaN in one step, and later in three in a row."""
    faults = ",".join(f"nan@1:{step}" for step in BAD.values())
    return launch(folder, "poisoned", faults, SAVE_EVERY=1, KEEP_LAST=9, EVAL_EVERY=0)


@pytest.fixture(scope="module")
def nodes(folder):
    """Two pairs of nodes, the second of which is lost in step KILLED. (Nobody brings it back, it is started again.)"""
    fault = f"lose@1:{KILLED}"
    with Nodes(folder, folder / "abandoned", "abandoned", fault, SHORT) as abandoned:
        abandoned.end_of(1)
        with Nodes(folder, folder / "rejoined", "rejoined", fault, LONG) as rejoined:  # while the first pair waits
            rejoined.end_of(1)
            rejoined.start()
            rejoined.codes = [rejoined.end_of(number) for number in range(3)]
        abandoned.codes = [abandoned.end_of(number) for number in range(2)]
    return abandoned, rejoined


def weights(run, step):
    return checkpoint.read(run, step)[checkpoint.MODEL]


def test_p1_sigterm_to_torchrun_saves_once_on_both_ranks_at_the_same_step(whole, stopped):
    assert stopped.ends == ["0", "0"], stopped.errors  # though torchrun itself calls it a failure
    assert f"stopped and saved at step {STOPPED} of {STEPS}" in stopped.printed
    assert stopped.hashes == [hashes[: STOPPED + 1] for hashes in whole.hashes]
    run = stopped.run.parent / "stopped"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [f"step_{STOPPED:08d}"]
    losses = soak.recorded(run, "train/loss")
    assert losses == soak.recorded(whole.run, "train/loss")[:STOPPED]
    assert soak.differences(whole.run, run) != []


def test_p1_bit_exact_resume_after_sigterm_and_after_sigkill_of_one_rank_under_max_restarts(whole, killed):
    assert (killed.code, killed.ends) == (0, ["0", "0"]), killed.errors
    assert killed.killed == [None, str(KILLED - STOPPED)]
    # torchrun names the rank that it saw end first: the killed one, or the one that noticed
    assert re.search(r"failed \(exitcode: (-9\) local_rank: 1|1\) local_rank: 0) ", killed.errors)
    assert "error: another rank has ended, and says why itself" in killed.errors
    assert f"resume     disturbed at step {STOPPED}\n" in killed.printed
    assert f"resume     disturbed at step {SAVED}\n" in killed.printed
    assert weights(killed.run, STEPS) == weights(whole.run, STEPS)
    assert soak.differences(whole.run, killed.run) == []
    assert [hashes[-1] for hashes in killed.hashes] == [hashes[-1] for hashes in whole.hashes]


def test_p7_a_node_that_is_not_brought_back_ends_the_other_in_bounded_time(nodes):
    abandoned, _ = nodes
    assert abandoned.codes == [1, -9], abandoned.log(0)
    assert abandoned.read("rank1.lost") == str(KILLED)
    assert "error: another rank has ended, and says why itself" in abandoned.log(0)
    assert "RendezvousTimeoutError" in abandoned.log(0)  # torchrun's own, once it has waited
    lost, ended = ((abandoned.left / name).stat().st_mtime for name in ("rank1.lost", "node0.log"))
    assert SHORT - 1 < ended - lost < SHORT + 20
    assert checkpoint.steps(abandoned.run) == [SAVED]


def test_p1_bit_exact_after_a_node_is_lost_and_started_again(whole, nodes):
    _, rejoined = nodes
    assert rejoined.codes == [0, -9, 0], [rejoined.log(number) for number in range(3)]
    assert rejoined.read("rank1.lost") == str(KILLED)
    assert [rejoined.read(f"rank{rank}.end") for rank in range(2)] == ["0", "0"]
    assert "error: another rank has ended, and says why itself" in rejoined.log(0)
    assert f"resume     rejoined at step {SAVED}\n" in rejoined.log(0)
    assert weights(rejoined.run, STEPS) == weights(whole.run, STEPS)
    assert soak.differences(whole.run, rejoined.run) == []
    hashes = [rejoined.read(f"rank{rank}.hashes").split() for rank in range(2)]
    assert [found[-1] for found in hashes] == [found[-1] for found in whole.hashes]


def test_p1_the_comparison_notices_one_bit_of_the_weights(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole.run, run)
    step, files, _ = checkpoint.newest(run)
    tensors, moments, state = checkpoint.unpack(files)
    tensors["lm_head.weight"].view(torch.int32)[0, 0] ^= 1
    checkpoint.save(run, step, tensors, moments, state)
    assert [line.partition(":")[0] for line in soak.differences(whole.run, run)] == [checkpoint.MODEL]


def test_p8_one_ranks_nan_leaves_the_weights_of_both_ranks_and_the_checkpoints_alone(poisoned):
    first, second = poisoned.hashes
    assert first == second
    assert len(first) == BAD["third"] + 1
    changed = [first[step] != first[step - 1] for step in range(1, len(first))]
    assert changed == [step not in BAD.values() for step in range(1, BAD["third"] + 1)]
    assert checkpoint.steps(poisoned.run) == [*range(BAD["third"] - 1, 0, -1)]
    for step in checkpoint.steps(poisoned.run):
        tensors, moments, state = checkpoint.unpack(checkpoint.read(poisoned.run, step))
        assert all(tensor.isfinite().all() for tensor in [*tensors.values(), *moments.values()])
        assert state["train_state"]["skipped_steps"] == sum(bad <= step for bad in BAD.values())
        same = step > 1 and weights(poisoned.run, step) == weights(poisoned.run, step - 1)
        assert same == (step in BAD.values())


def test_p7_three_bad_steps_in_a_row_end_all_ranks_with_a_sentence_and_exit_code_7(poisoned):
    assert poisoned.code != 0
    tensors = checkpoint.unpack(checkpoint.newest(poisoned.run)[1])[0]
    begin = re.compile(
        rf"step {BAD['third']}: loss \d\.\d+, nan on the ranks, first parameter with a bad gradient: (\w+)"
    )
    for end in poisoned.ends:
        code, _, message = end.partition(" ")
        assert code == "7"
        assert begin.match(message)[1] in tensors
        assert f"error: {message}" in poisoned.errors
    assert "exitcode  : 7" in poisoned.errors
    assert poisoned.errors.count("Traceback") == 1  # torchrun's own
