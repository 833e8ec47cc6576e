"""The Slurm script of dev/several_machines.md, with stand-ins for Slurm's programs."""

import os
import re
import signal
import subprocess
import textwrap
import time

import pytest
from conftest import ROOT

# What the real ones do as far as the script depends on it, seen under Slurm 22.05: a `srun` that itself gets SIGTERM
# kills its processes at once; given to the step by `scancel`, the signal lets them save.
PROGRAMS = {
    "srun": """\
        trap 'echo killed >> log; exit 137' TERM
        echo "srun $*" >> log
        for _ in $(seq 200); do
            if [ -e signalled ]; then sleep 0.3; echo saved >> log; exit 1; fi
            if [ -e finished ]; then exit 7; fi
            sleep 0.05
        done
    """,
    "scancel": 'echo "scancel $*" >> log; touch signalled',
    "scontrol": 'if [ "$1" = show ]; then printf "node0\\nnode1\\n"; else echo "scontrol $*" >> log; fi',
}


def script():
    page = (ROOT / "dev" / "several_machines.md").read_text(encoding="utf-8")
    block = re.search(r"^    #!/bin/bash\n(?:    .*\n)+", page, re.MULTILINE)
    return textwrap.dedent(block[0])


@pytest.fixture
def run(tmp_path):
    """A function that starts the script, does something, and gives (exit code, lines of the log)."""
    (tmp_path / "bin").mkdir()
    for name, body in PROGRAMS.items():
        path = tmp_path / "bin" / name
        path.write_text("#!/bin/bash\n" + textwrap.dedent(body))
        path.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_ID": "42", "SLURM_NNODES": "2"}
    log = tmp_path / "log"

    def start(act):
        process = subprocess.Popen(["bash", "-c", script()], cwd=tmp_path, env={**os.environ, "PATH": path, **slurm})
        try:
            deadline = time.monotonic() + 20
            while not log.exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            act(process)
            return process.wait(20), log.read_text().splitlines()
        finally:
            process.kill()

    return start


def test_before_its_time_is_up_the_run_saves_and_the_job_is_put_back(run):
    code, lines = run(lambda process: process.send_signal(signal.SIGTERM))
    assert code == 0
    assert lines[1:] == ["scancel --signal=TERM 42", "saved", "scontrol requeue 42"]
    assert "--nnodes=2" in lines[0]
    assert "--rdzv-endpoint=node0:29500" in lines[0]


def test_a_job_that_ends_by_itself_is_not_put_back(run, tmp_path):
    code, lines = run(lambda process: (tmp_path / "finished").touch())
    assert code == 7
    assert len(lines) == 1
