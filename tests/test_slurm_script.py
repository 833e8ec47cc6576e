"""The Slurm script of docs/gpus.md, with stand-ins for Slurm's programs."""

import os
import re
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
            if [ -e finished ]; then exit 7; else sleep 0.05; fi
        done
    """,
    "scancel": 'echo "scancel $*" >> log; touch signalled',
    "scontrol": 'if [ "$1" = show ]; then printf "node0\\nnode1\\n"; else echo "scontrol $*" >> log; fi',
}


@pytest.mark.parametrize(("ends_itself", "code"), [(False, 0), (True, 7)])
def test_before_its_time_is_up_the_run_saves_and_the_job_is_put_back(tmp_path, ends_itself, code):
    page = (ROOT / "docs" / "gpus.md").read_text(encoding="utf-8")
    script = textwrap.dedent(re.search(r"^    #!/bin/bash\n(?:    .*\n)+", page, re.MULTILINE)[0])
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text("#!/bin/bash\n" + textwrap.dedent(body))
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42", "SLURM_NNODES": "2"}
    process = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=environment)
    try:
        log, deadline = tmp_path / "log", time.monotonic() + 20
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        (tmp_path / "finished").touch() if ends_itself else process.terminate()
        assert process.wait(20) == code
    finally:
        process.kill()
    lines = log.read_text().splitlines()
    assert lines[1:] == ([] if ends_itself else ["scancel --signal=TERM 42", "saved", "scontrol requeue 42"])
    assert {"--nnodes=2", "--rdzv-endpoint=node0:29500"} <= {*lines[0].split()}
