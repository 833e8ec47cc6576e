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
from nanotrain.store import Store
from tests import soak

pytestmark = pytest.mark.slow

LONGEST = 100  # seconds for a launch: whatever happens, all ranks have left by then
STEPS, EVERY = 12, 5
STOPPED, SAVED, KILLED = 4, 5, 8  # steps: SIGTERM comes in one, another is the last saved before that of SIGKILL
BAD = {"single": 3, "first": 6, "second": 7, "third": 8}
NODE = (  # the arguments of torchrun on every node, beside the place where they meet
    "--nnodes=2",
    "--nproc_per_node=1",
    "--max-restarts=3",
    "--rdzv-backend=c10d",
    "--rdzv-conf=join_timeout=60,keep_alive_interval=1,keep_alive_max_attempt=4",
    "--local-addr=127.0.0.1",  # whatever this machine's name resolves to
)
# torch 2.13 otherwise tells a node that comes anew nothing of where the others meet (docs/gpus.md)
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def start(folder, left, name, fault, torchrun, stdout, stderr, variables=(), **settings):
    """The process of torchrun with these arguments; its ranks of tests.faulty leave their files in `left`."""
    settings = {**soak.TINY, "NUM_ITERATIONS": STEPS, "EVAL_EVERY": EVERY, "SAVE_EVERY": EVERY, **settings}
    settings.update(DEVICE_BATCH_SIZE=2, RESUME=True, RUN_NAME=name)
    program = ("-m", "tests.faulty", str(left), fault, *soak.flags(**settings))
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun, *program]
    environment = {**os.environ, **dict(variables), "NANOTRAIN_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=soak.ROOT, env=environment, text=True, stdout=stdout, stderr=stderr)


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
def rejoined(folder):
    """Two nodes, each a torchrun with one rank; the second is lost in step KILLED and then started again."""
    left = folder / "rejoined-nodes"
    left.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = (*NODE, f"--rdzv-endpoint=127.0.0.1:{port}")
    logs, processes, begin = [left / f"node{number}.log" for number in range(3)], [], time.monotonic()

    def launch_node():
        with open(logs[len(processes)], "wb") as log:
            processes.append(start(folder, left, "rejoined", f"lose@1:{KILLED}", torchrun, log, log, OWN_STORE))

    def wait_for(reached):
        while not reached():
            assert time.monotonic() - begin < 2 * LONGEST, [log.read_text() for log in logs if log.exists()]
            time.sleep(0.01)

    def can_be_met():
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return True

    try:
        launch_node()
        wait_for(can_be_met)
        launch_node()
        wait_for(lambda: processes[1].poll() is not None)
        launch_node()
        wait_for(lambda: all(process.poll() is not None for process in processes))
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # and not kill, so that torchrun takes its ranks along
                process.wait()
    return left, folder / "runs" / "rejoined", [process.returncode for process in processes]


def test_p1_sigterm_to_torchrun_saves_once_on_both_ranks_at_the_same_step(whole, stopped):
    assert stopped.ends == ["0", "0"], stopped.errors  # though torchrun itself calls it a failure
    assert f"stopped and saved at step {STOPPED} of {STEPS}" in stopped.printed
    assert stopped.hashes == [hashes[: STOPPED + 1] for hashes in whole.hashes]
    run = stopped.run.parent / "stopped"
    assert Store(run).steps() == [STOPPED]
    assert soak.recorded(run, "train/loss") == soak.recorded(whole.run, "train/loss")[:STOPPED]


def test_p1_bit_exact_resume_after_sigterm_and_after_sigkill_of_one_rank_under_max_restarts(whole, killed):
    assert (killed.code, killed.ends) == (0, ["0", "0"]), killed.errors
    assert killed.killed == [None, str(KILLED - STOPPED)]
    assert "error: another rank has ended (its own message says why)" in killed.errors
    assert f"resume     disturbed at step {STOPPED}\n" in killed.printed
    assert f"resume     disturbed at step {SAVED}\n" in killed.printed
    assert soak.differences(whole.run, killed.run) == []
    assert [hashes[-1] for hashes in killed.hashes] == [hashes[-1] for hashes in whole.hashes]


def test_p1_bit_exact_after_a_node_is_lost_and_started_again(whole, rejoined):
    left, run, codes = rejoined
    files = {path.name: path.read_text(encoding="utf-8") for path in left.iterdir()}
    assert codes == [0, -9, 0], files
    assert files["rank1.lost"] == str(KILLED)
    assert [files[f"rank{rank}.end"] for rank in range(2)] == ["0", "0"]
    assert "error: another rank has ended (its own message says why)" in files["node0.log"]
    assert f"resume     rejoined at step {SAVED}\n" in files["node0.log"]
    assert soak.differences(whole.run, run) == []
    assert [files[f"rank{rank}.hashes"].split()[-1] for rank in range(2)] == [found[-1] for found in whole.hashes]


def test_p1_the_comparison_notices_one_bit_of_the_weights(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole.run, run)
    step, files, _ = Store(run).newest()
    tensors, moments, state = checkpoint.unpack(files)
    tensors["lm_head.weight"].view(torch.int32)[0, 0] ^= 1
    Store(run).commit(step, checkpoint.pack(tensors, moments, state))
    assert [line.partition(":")[0] for line in soak.differences(whole.run, run)] == [checkpoint.MODEL]


def test_p8_one_ranks_nan_leaves_the_weights_of_both_ranks_and_the_checkpoints_alone(poisoned):
    first, second = poisoned.hashes
    assert first == second
    changed = [first[step] != first[step - 1] for step in range(1, len(first))]
    assert changed == [step not in BAD.values() for step in range(1, BAD["third"] + 1)]
    assert Store(poisoned.run).steps() == [*range(BAD["third"] - 1, 0, -1)]
    for step in Store(poisoned.run).steps():
        tensors, moments, state = checkpoint.unpack(Store(poisoned.run).read(step))
        assert all(tensor.isfinite().all() for tensor in [*tensors.values(), *moments.values()])
        assert state["train_state"]["skipped_steps"] == sum(bad <= step for bad in BAD.values())


def test_p7_three_bad_steps_in_a_row_end_all_ranks_with_a_sentence_and_exit_code_7(poisoned):
    assert poisoned.code != 0
    said = rf"step {BAD['third']}: loss \d\.\d+, nan by rank, first parameter with a non-finite gradient: \w+"
    for end in poisoned.ends:
        code, _, message = end.partition(" ")
        assert code == "7"
        assert re.match(said, message)
        assert f"error: {message}" in poisoned.errors
