"""`vpenc run --cluster slurm` on a real Slurm of one node, which the test starts for itself; skipped where Slurm is not installed or the user is not root."""
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from vpenc.data.sim import SimConfig, generate_labels
from vpenc.experiments.runner import find_notebook

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "scancel", "munged")
missing = [name for name in PROGRAMS if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")]
pytestmark = [pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)}: apt install slurmctld slurmd slurm-client munge"),
              pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can start a Slurm of its own")]


def free_port() -> int:
    "A TCP port that nobody uses."
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    "The environment with a Slurm of two cores, without accounting."
    folder, host, processes = tmp_path_factory.mktemp("slurm"), socket.gethostname().partition(".")[0], []
    for name in ("state", "spool"): (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    folder.chmod(0o755)
    (folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ReturnToService=2
MinJobAge=2
KillWait=2
SchedulerParameters=sched_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory=2000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
""")
    environment = os.environ | dict(SLURM_CONF=str(folder / "slurm.conf"), PATH=os.environ["PATH"] + ":/usr/sbin:/sbin")

    def start(*words):
        log = open(folder / f"{words[0]}.out", "w")
        processes.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True))

    start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key", f"--log-file={folder}/munged.log",
          f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed")
    start("slurmctld", "-D", "-i")
    start("slurmd", "-D", "-N", host)
    try:
        end, state = time.monotonic() + 60, ""
        while "idle" not in state and time.monotonic() < end:
            time.sleep(.5)
            state = subprocess.run(["sinfo", "--noheader", "--format=%t"], env=environment, capture_output=True, text=True).stdout
        assert "idle" in state, "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root", "--signal=KILL", "--full"], env=environment)
        wait_until(lambda: not queue(environment), 20)
        for process in reversed(processes):
            process.terminate()
            try: process.wait(20)
            except subprocess.TimeoutExpired: process.kill()


@pytest.fixture
def grid(tmp_path):
    "A notebook in place of the ablation, labelled frames, and a grid of three rows; one of them waits for a file."
    generate_labels(tmp_path / "few-labels.h5", SimConfig(), dict(train=2, val=1, test=1), processes=1)
    parameters = next(cell for cell in nbformat.read(find_notebook(), as_version=4).cells if "parameters" in cell.metadata.get("tags", ()))
    work = """
import os, pathlib, time
folder = pathlib.Path(out).parent.parent
if head == "heavy": raise ValueError("the heavy head is broken")
while head == "light" and not (folder/"go").exists(): time.sleep(.2)
pathlib.Path(out).write_text(os.environ["OMP_NUM_THREADS"] + " " + os.environ["SLURM_JOB_ID"])"""
    toy = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(work)], metadata=dict(kernelspec=dict(name="python3", language="python", display_name="python3")))
    nbformat.write(toy, tmp_path / "toy.ipynb")
    (tmp_path / "grid.toml").write_text(f'[[row]]\nencoder = "pixels"\nhead = ["linear1x1", "light", "heavy"]\ndata = "{tmp_path}/few-labels.h5"\n')
    return tmp_path


COMMAND = """
import sys
from functools import partial
from vpenc.experiments.cluster import submit
from vpenc.experiments.runner import report, run_grid
folder = sys.argv[1]
run = partial(submit, asked=dict(cpus_per_task=1, mem_gb=0.5, timeout_min=10), every=.5)
sys.exit(report(run_grid(f"{folder}/grid.toml", f"{folder}/out", 2, notebook=f"{folder}/toy.ipynb", run=run)))
"""


def start(folder, environment):
    "The command that submits and waits, in a process of its own."
    return subprocess.Popen([sys.executable, "-c", COMMAND, str(folder)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def results(folder): return sorted(path.stem for path in (folder / "out").glob("*.json"))


def queue(environment): return subprocess.run(["squeue", "--noheader", "--array", "--format=%i %t"], env=environment, capture_output=True, text=True).stdout.split("\n")[:-1]


def wait_until(condition, seconds=90):
    "Whether a condition becomes true in time."
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end: time.sleep(.3)
    return condition()


def test_rows_run_as_one_array_and_failures_are_named(slurm, grid):
    (grid / "go").touch()
    done = start(grid, slurm)
    said, _ = done.communicate(timeout=180)
    assert done.returncode == 1 and "2 run, 0 already done, 1 failed" in said, said
    assert "the heavy head is broken" in said
    assert results(grid) == ["pixels_light_corrected_few-labels", "pixels_linear1x1_corrected_few-labels"]
    threads, ids = zip(*(path.read_text().split() for path in (grid / "out").glob("*.json")))
    assert set(threads) == {"1"} and len(set(ids)) == 2  # one core a task, each its own job of Slurm
    again = start(grid, slurm)
    assert "0 run, 2 already done, 1 failed" in again.communicate(timeout=180)[0]


def test_an_interrupted_command_cancels_its_array(slurm, grid):
    running = start(grid, slurm)
    assert wait_until(lambda: results(grid) == ["pixels_linear1x1_corrected_few-labels"])  # the row that waits for a file still runs
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=60)
    assert running.returncode != 0 and "KeyboardInterrupt" in said
    assert wait_until(lambda: not queue(slurm)), queue(slurm)
    assert results(grid) == ["pixels_linear1x1_corrected_few-labels"]


def test_tasks_outlive_a_killed_command_and_the_next_one_waits_for_them(slurm, grid):
    running = start(grid, slurm)
    assert wait_until(lambda: results(grid) == ["pixels_linear1x1_corrected_few-labels"])
    running.kill()
    running.communicate(timeout=60)
    assert queue(slurm)  # the waiting row is still there
    again = start(grid, slurm)
    assert wait_until(lambda: len({line.partition("_")[0] for line in queue(slurm)}) == 2)  # the same row a second time, in another array
    (grid / "go").touch()
    said, _ = again.communicate(timeout=180)
    assert "1 run, 1 already done, 1 failed" in said, said
    assert wait_until(lambda: not queue(slurm)), queue(slurm)


def test_a_cancelled_task_is_a_failure_with_its_log(slurm, grid):
    running = start(grid, slurm)
    assert wait_until(lambda: results(grid) == ["pixels_linear1x1_corrected_few-labels"])
    assert wait_until(lambda: len(queue(slurm)) == 1)
    subprocess.run(["scancel", queue(slurm)[0].split()[0]], env=slurm, check=True)
    said, _ = running.communicate(timeout=120)
    assert "1 run, 0 already done, 2 failed" in said, said
    assert "ended without a result" in said
    assert Path(said.partition("memory; see ")[2].split()[0]).exists()


def test_what_slurm_refuses_is_told_in_its_words(slurm, grid):
    "A row is not lost: nothing was submitted, and the command says why."
    done = subprocess.run([sys.executable, "-c", COMMAND.replace("timeout_min=10", "timeout_min=10, partition='nope'"), str(grid)], env=slurm, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "ValueError: Slurm refused the array: sbatch: error:" in done.stderr and "artition" in done.stderr.splitlines()[-1], done.stderr
    assert not queue(slurm) and not results(grid)
